"""Cuts between the layers of a decoder equal the dense model with the dropped keys hidden from each cut on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokcompile
import tokcompile.registry
from tests import oracle
from tests.pruning import check, error, optimized, run
from tests.zoo.vlm import VARIANTS, VLMS
from tokcompile.errors import NoMatchError

CASES = {**VLMS, **VARIANTS}
PASSES = ["staged_random", "fastv", "pyramiddrop", "transprune"]
MODELS = ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "gemma3_window", "smolvlm", "plain_cat", "plain_index_put"]


def steps(name: str, keep: list[Any], at: list[Any], **params: Any) -> list[dict[str, Any]]:
    return [{"pass": name, "params": {"keep": keep, "at": at, **params}}]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "llava") for name in PASSES),
        *(pytest.param("transprune", model, marks=pytest.mark.slow) for model in MODELS),
    ],
)
def test_pruned_equals_masked_dense(name: str, model: str) -> None:
    """Three rows, one with padding in front, one with two images: prefill and each decode step."""
    case = CASES[model]()
    images = 1 if case.uniform_images else [2, 1, 1]
    inputs = case.inputs(batch=3, left_padding=3, images_per_row=images)
    pruned = optimized(case.model, steps(name, [0.5, 0.25], [1, 3]))
    recording = check(pruned, case, inputs)
    assert [(entry.name, entry.layer) for entry in recording.kept] == [(name, 1), (name, 3)]
    visual = case.visual_mask(inputs)
    for entry, share in zip(recording.kept, (2, 4), strict=True):  # ratios are of all that an image had
        left = [int(visual[row][kept[kept >= 0]].sum()) for row, kept in enumerate(entry.indices)]
        assert left == [int(n) // share for n in visual.sum(1)]


@pytest.mark.parametrize("name", PASSES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    case = CASES["llava"]()
    inputs = case.inputs(batch=2, left_padding=3)
    found, _ = run(optimized(case.model, steps(name, [1.0, 1.0], [1, 3])), case, inputs, 3)
    wanted = oracle.run(case, inputs, 3)
    assert torch.equal(found.logits[0], wanted.logits[0])
    assert max(error(a, b) for a, b in zip(found.logits, wanted.logits, strict=True)) <= 1e-5


def test_fastv_keeps_what_the_last_token_attends_to() -> None:
    """By the rows of a model in double precision that gives its attention weights."""
    case = CASES["llava"]("eager")  # type: ignore[call-arg]
    inputs = case.inputs(batch=2, left_padding=3)
    with torch.no_grad(), tokcompile.record(pruned := optimized(case.model, steps("fastv", [0.25], [2]))) as recording:
        pruned(**inputs, use_cache=False)
        double = case.model.double()
        weights = double(**{**inputs, "pixel_values": inputs["pixel_values"].double()}, output_attentions=True)
    score = weights.attentions[1][:, :, -1].mean(1)
    visual = case.visual_mask(inputs)
    for row, kept in enumerate(recording.kept[0].indices.tolist()):
        best = score[row].masked_fill(~visual[row], -1).topk(int(visual[row].sum()) // 4).indices.tolist()
        assert sorted(i for i in kept if i >= 0) == sorted({*best, *(~visual[row]).nonzero().flatten().tolist()})


def test_stages_that_do_not_fit_are_refused_before_anything_is_changed() -> None:
    case = CASES["llava"]()
    inputs = case.inputs(batch=1)
    for at, says in (([1, 9], "do not fit into 4 layers"), ([0.24, 0.26], "need to ascend")):
        with pytest.raises(NoMatchError, match=says):
            optimized(case.model, steps("transprune", [0.5, 0.25], at), inputs=inputs)
    twice = [{"pass": "random", "params": {"keep": 0.5}}, *steps("fastv", [0.25], [2])]
    model = optimized(case.model, twice, on_no_match="ignore")
    check(model, case, inputs, 2)
    assert "an earlier step has removed visual tokens" in tokcompile.report(model).steps[1].reason


def layer_macs(tokens: int, width: int, inner: int) -> int:
    """Multiply-adds of a gated layer: four projections, attention, three of the feed-forward part."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * inner


def test_flops_of_transprune_by_hand() -> None:
    """LLaVA-1.5-7B, 576 visual tokens: the figures of the paper, from the depths and ratios of the defaults."""
    method = tokcompile.registry.get_pass("transprune")
    params = method.Params()
    starts = method(params).cut_layers(32)
    assert starts == [7, 9, 12]
    left = [576, *(keep.count(576) for keep in params.keep)]
    assert left == [576, 504, 360, 72]
    layers = [b - a for a, b in zip([0, *starts], [*starts, 32], strict=True)]
    total = sum(n * layer_macs(tokens, 4096, 11008) for n, tokens in zip(layers, left, strict=True))
    assert round(32 * layer_macs(576, 4096, 11008) / 1e12, 3) == 3.817
    assert round(total / 1e12, 3) == 1.557
