"""ONNX export of recipes that remove tokens in front of and inside a decoder: tokens and logits of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
import tokcompile
from tests.onnx_tools import both
from tests.pruning import recipe
from tests.zoo import vlm
from tokcompile import OnnxModel

#: Two cuts: at the merge point, and after layer 0, so that layers 0 and 1 have caches of their own lengths.
TWO_CUTS = recipe([{"pass": "todre", "params": {"keep": 0.25, "drop_layer": 0}}])


def llava(layers: int = 2) -> vlm.Case:
    """A LLaVA with fewer layers, to be exported in less time."""
    case = vlm.llava()
    tower: Any = case.text_tower
    del tower.layers[layers:]
    tower.config.num_hidden_layers = layers
    return case


@pytest.fixture(scope="module")
def two_cuts(tmp_path_factory: pytest.TempPathFactory) -> tuple[vlm.Case, tokcompile.ExportReport, nn.Module]:
    case = llava()
    report = tokcompile.export_onnx(
        case.model,
        case.inputs(batch=2, left_padding=2),
        tmp_path_factory.mktemp("llava") / "out",
        recipe=TWO_CUTS,
        check=False,
    )
    return case, report, tokcompile.optimize(case.model, TWO_CUTS, lowering="eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "images", "padding", "text"),
    [(3, [1, 2, 1], [0, 3, 1], 9), (2, 1, 2, 12), (1, 1, 0, 5), (2, 1, [5, 1], 19), (2, [2, 0], 0, 7)],
)
def test_two_cuts_are_token_equal_at_other_sizes(
    two_cuts: Any, batch: int, images: Any, padding: Any, text: int
) -> None:
    case, report, pruned = two_cuts
    inputs = case.inputs(batch=batch, images_per_row=images, left_padding=padding, text_len=text, seed=3)
    error, equal = both(report.directory, pruned, inputs)
    assert equal
    assert error < 1e-5


@pytest.mark.slow
def test_layers_below_a_cut_have_lengths_of_their_own(two_cuts: Any) -> None:
    case, report, _ = two_cuts
    assert [(k["layers"], k["tokens"], k["of"]) for k in report.manifest["kept"]] == [([0], 18, 30), ([1], 14, 30)]
    shapes = {v["name"]: v["shape"] for v in report.manifest["files"]["decoder"]["inputs"]}
    assert [shapes[f"past_key_values.{i}.key"][2] for i in range(2)] == ["past_length_0", "past_length_1"]
    assert shapes["visual_mask"] == ["batch_size", "sequence_length"]
    assert [g["layers"] for g in report.manifest["generation"]["cache_groups"]] == [[0], [1]]
    inputs = {n: v.numpy() for n, v in case.inputs(batch=2, left_padding=2).items()}
    model = OnnxModel.from_pretrained(report.directory)
    lengths: list[int] = []
    run = model.run

    def watch(role: str, feed: dict[str, Any]) -> dict[str, Any]:
        results = run(role, feed)
        if role == "decoder":
            lengths.extend(results[f"present.{i}.key"].shape[2] for i in (0, 1))
        return results

    model.run = watch  # type: ignore[method-assign]
    model.generate(**inputs, max_new_tokens=3, eos_token_id=-1)
    assert lengths == [18, 14, 19, 15, 20, 16]


@pytest.mark.slow
def test_a_prompt_without_an_image(two_cuts: Any) -> None:
    case, report, _ = two_cuts
    ids = torch.randint(3, vlm.TEXT_VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    error, equal = both(report.directory, case.model, {"input_ids": ids, "attention_mask": mask})
    assert equal
    assert error < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vlm_prune_90_sparse", [r"steps[1] (token_sparse)", "the prefill alone", "leave the step out"]),
        ("llm_sparse_prefill", [r"steps[0] (token_sparse)", "tokcompile.optimize"]),
        ("decode", ["steps[0] (decode_control)", "decode steps alone", "tokcompile.optimize"]),
        ("compact", ["steps[0] (random): positions: compact", "an empty past alone", "positions: keep"]),
    ],
)
def test_steps_for_one_kind_of_call_are_refused(tmp_path: Path, name: str, words: list[str]) -> None:
    case = llava()
    control = recipe([{"pass": "decode_control", "params": {"budget": 16, "choose": "window"}}])
    compact = recipe([{"pass": "random", "params": {"keep": 0.25, "positions": "compact"}}])
    chosen: Any = {"decode": control, "compact": compact}.get(name, name)
    with pytest.raises(tokcompile.ExportError) as caught:
        tokcompile.export_onnx(case.model, case.inputs(), tmp_path / "out", recipe=chosen)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vlm_prune_90", "vlm_prune_75", "vlm_herd_90", "vlm_cls_90", "vlm_random_90", "vlm_pool_90"]
)
def test_shipped_recipes_of_llava(tmp_path: Path, name: str) -> None:
    case = vlm.llava()
    report = tokcompile.export_onnx(case.model, case.inputs(batch=2, left_padding=2), tmp_path / "out", recipe=name)
    assert [row.tokens_equal for row in report.parity] == [True] * 8
    assert max(row.relative for row in report.parity) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain_cat", "plain_index_put"])
@pytest.mark.parametrize("name", ["vlm_prune_90", "vlm_random_90"])
def test_a_model_written_by_hand_is_one_graph(tmp_path: Path, form: str, name: str) -> None:
    """No cache: every step runs the whole sequence, and keeps the same tokens of the image."""
    case = vlm.VLMS[form]()
    pruned = tokcompile.optimize(case.model, name, lowering="eager")
    inputs = case.inputs(batch=2, left_padding=2)
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total"},
        "pixel_values": {0: "batch_size"},
    }
    report = tokcompile.export_onnx(case.model, inputs, tmp_path / "out", recipe=name, axes=axes, check=False)
    served = OnnxModel.from_pretrained(report.directory)
    inputs = case.inputs(batch=2, left_padding=[4, 0], text_len=15, seed=5)
    for _ in range(8):
        with torch.no_grad():
            wanted = pruned(**inputs)
        wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
        found = next(iter(served(**{n: v.numpy() for n, v in inputs.items()}).values()))
        assert found.shape == tuple(wanted.shape)
        assert np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy()) < 1e-5
        token = wanted[:, -1].argmax(-1, keepdim=True)
        assert (torch.from_numpy(found)[:, -1].argmax(-1, keepdim=True) == token).all()
        more = torch.ones_like(token)
        inputs |= {
            "input_ids": torch.cat([inputs["input_ids"], token], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], more], 1),
        }
