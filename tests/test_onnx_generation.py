"""ONNX export of models that generate: tokens and logits of every step, batches, images, sampling, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
from transformers import GenerationConfig

import tokcompile
from tests.onnx_tools import arrays, both
from tests.pruning import recipe
from tests.zoo import decoders, seq2seq, vlm
from tokcompile import ExportError, OnnxModel


def llama(name: str = "llama") -> nn.Module:
    model, _ = getattr(decoders, name)()
    vlm.randomize(model)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def prompt(batch: int = 2, length: int = 9, padding: int = 3, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, tokcompile.ExportReport]:
    model = llama()
    return model, tokcompile.export_onnx(model, prompt(), tmp_path_factory.mktemp("llama") / "out")


# ----------------------------------------------------------------------------------------------------------- decoder


def test_decoder_is_token_equal_over_eight_decode_steps(decoder: Any) -> None:
    _, report = decoder
    assert [row.tokens_equal for row in report.parity] == [True] * 8
    assert max(row.relative for row in report.parity) < 1e-5


@pytest.mark.parametrize(("batch", "length", "padding"), [(1, 3, 0), (1, 20, 0), (4, 13, 7)])
def test_decoder_at_other_sizes_and_left_padding(decoder: Any, batch: int, length: int, padding: int) -> None:
    model, report = decoder
    error, equal = both(report.directory, model, prompt(batch, length, padding, seed=5))
    assert equal
    assert error < 1e-5


def test_names_and_axes_of_a_decoder(decoder: Any) -> None:
    _, report = decoder
    entry = report.manifest["files"]["decoder"]
    assert entry["file"] == "model.onnx"
    shapes = {v["name"]: v["shape"] for v in entry["inputs"]}
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert [v["name"] for v in entry["outputs"]] == [
        "logits",
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    ]
    names = {p.name for p in report.directory.iterdir()}
    assert names == {"model.onnx", "manifest.json", "config.json", "generation_config.json"}
    assert json.loads((report.directory / "generation_config.json").read_text())["pad_token_id"] == 0


def test_sampling_follows_the_seed_and_its_limits(decoder: Any) -> None:
    _, report = decoder
    model, inputs = OnnxModel.from_pretrained(report.directory), arrays(prompt())
    sampled = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "eos_token_id": -1}
    one, same, other = (model.generate(**inputs, **sampled, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    greedy = model.generate(**inputs, max_new_tokens=8, eos_token_id=-1)
    assert np.array_equal(model.generate(**inputs, **sampled | {"top_k": 1}, seed=3), greedy)
    assert np.array_equal(model.generate(**inputs, **sampled | {"top_p": 1e-9}, seed=3), greedy)


def test_a_row_that_has_ended_is_padded(decoder: Any) -> None:
    _, report = decoder
    model, inputs = OnnxModel.from_pretrained(report.directory), arrays(prompt())
    free = model.generate(**inputs, max_new_tokens=6, eos_token_id=-1)[:, 9:]
    eos = int(free[0, 1])
    ended = model.generate(**inputs, max_new_tokens=6, eos_token_id=eos, pad_token_id=77)[:, 9:]
    for row, before in zip(ended, free, strict=True):
        stop = list(before).index(eos) + 1 if eos in before else len(row)
        assert list(row[:stop]) == list(before[:stop])[: len(row)]
        assert all(token == 77 for token in row[stop:])


def test_wrong_prompts_are_refused(decoder: Any, tmp_path: Path) -> None:
    model, report = decoder
    right = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4])}
    with pytest.raises(ExportError, match="pad on the left"):
        OnnxModel.from_pretrained(report.directory).generate(**arrays(right))
    with pytest.raises(ExportError, match="pad on the left"):
        tokcompile.export_onnx(model, right, tmp_path / "out")
    with pytest.raises(ExportError, match="takes no pixel_values"):
        OnnxModel.from_pretrained(report.directory).generate(
            np.ones((1, 3)), pixel_values=np.zeros((1, 3, 8, 8), np.float32)
        )
    with pytest.raises(ExportError, match="run with generate"):
        OnnxModel.from_pretrained(report.directory)(input_ids=np.ones((1, 3)))
    assert list(tmp_path.iterdir()) == []


def test_serving_imports_no_torch(decoder: Any) -> None:
    _, report = decoder
    code = (
        "import sys, numpy, tokcompile\n"
        f"model = tokcompile.OnnxModel.from_pretrained({str(report.directory)!r})\n"
        "print(model.generate(numpy.array([[5, 6, 7]]), max_new_tokens=4, eos_token_id=-1).shape)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 7)"


# ----------------------------------------------------------------------------------------------------------- images


def test_a_vlm_without_an_image_in_its_inputs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give inputs with an image"):
        tokcompile.export_onnx(vlm.llava().model, prompt(), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2_5_vl", ["get_rope_index", "modeling_qwen2_5_vl.py:", "tokcompile.optimize"]),
        ("smolvlm", ["vision_encoder", "modeling_smolvlm.py:"]),
    ],
)
def test_what_blocks_a_family_is_named(tmp_path: Path, name: str, words: list[str]) -> None:
    case = vlm.VLMS[name]()
    with pytest.raises(ExportError) as caught:
        tokcompile.export_onnx(case.model, case.inputs(2), tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_encoder_decoders_are_refused_with_a_way_out(tmp_path: Path) -> None:
    model, inputs = seq2seq.t5()
    with pytest.raises(ExportError, match=r"get_encoder\(\)"):
        tokcompile.export_onnx(model, inputs, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ whole matrix


@pytest.mark.slow
@pytest.mark.parametrize("target", ["standard", "contrib"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "mistral"])
def test_decoders(tmp_path: Path, name: str, target: str) -> None:
    report = tokcompile.export_onnx(llama(name), prompt(), tmp_path / "out", target=target)
    assert max(row.relative for row in report.parity) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"),
    [("moe_from_dense", {"experts": 8, "shared": 3, "active": 3, "gate": "off"}), ("stem", {"convert": 1})],
)
def test_what_calibration_prepared_is_part_of_the_file(tmp_path: Path, name: str, params: dict[str, Any]) -> None:
    step = {"pass": name, "params": params}
    report = tokcompile.export_onnx(
        llama(),
        prompt(),
        tmp_path / "out",
        recipe=recipe([step]),
        calibration=[prompt(4, 32, 0, seed) for seed in range(6)],
    )
    assert [row.tokens_equal for row in report.parity] == [True] * 8
    assert max(row.relative for row in report.parity) < 1e-5


def test_llava(tmp_path: Path) -> None:
    case = vlm.shallow(vlm.llava())
    report = tokcompile.export_onnx(case.model, case.inputs(batch=2, left_padding=2), tmp_path / "out")
    assert [entry["file"] for entry in report.manifest["files"].values()] == [
        "onnx/vision_encoder.onnx",
        "onnx/embed_tokens.onnx",
        "onnx/decoder_model_merged.onnx",
    ]
    assert [row.tokens_equal for row in report.parity] == [True] * 8
    assert max(row.relative for row in report.parity) < 1e-5
