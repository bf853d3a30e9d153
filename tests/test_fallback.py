"""A call that cannot be captured costs itself, not the recipe; and what could not be served is told, cause first."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import tokcompile
from tests.small_models import vit, vlm
from tokcompile.demo import tiny_llm
from tokcompile.kinds import Stage
from tokcompile.runtime.fallback import TRIES, Failures, form_of

HALF = {"recipe_version": 1, "steps": [{"pass": "random", "params": {"keep": 0.5}}]}
PATCHES = {"recipe_version": 1, "steps": [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}]}


class Moody(nn.Module):
    """A vision model with a switch that Dynamo cannot follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor, talk: bool = False) -> torch.Tensor:
        hidden = self.inner(pixel_values=pixel_values).last_hidden_state
        if talk:
            torch._dynamo.graph_break()
        return hidden


@pytest.fixture
def moody() -> tuple[nn.Module, torch.Tensor]:
    model, pixels = vit()
    return Moody(model).eval(), pixels


def test_one_call_falls_back_and_the_next_is_served(moody: tuple[nn.Module, torch.Tensor]) -> None:
    model, pixels = moody
    fast = tokcompile.optimize(model, PATCHES, lowering="eager")
    with torch.no_grad():
        want, dense = fast(pixels), model(pixels)
        assert want.shape != dense.shape or not torch.allclose(want, dense)
        with pytest.warns(UserWarning, match="stage 'forward' was not captured"):
            assert torch.equal(fast(pixels, talk=True), dense)
        step = tokcompile.report(fast).steps[0]
        assert step.status == "fell_back"
        assert step.fell_back == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # each reason is told once
            assert torch.equal(fast(pixels, talk=True), dense)
            assert torch.equal(fast(pixels), want)
    step = tokcompile.report(fast).steps[0]
    assert step.status == "matched"
    assert step.fell_back == 2
    noted = [s for s in tokcompile.report(fast).to_dict()["stages"] if not s["captured"]]
    assert [s["fell_back"] for s in noted] == [2]


def test_a_first_call_that_cannot_be_served_raises_with_its_cause_first(moody: tuple[nn.Module, torch.Tensor]) -> None:
    model, pixels = moody
    fast = tokcompile.optimize(model, PATCHES, lowering="eager")
    with torch.no_grad():
        for _ in range(2):  # not once only
            with pytest.raises(tokcompile.NoMatchError) as caught:
                fast(pixels, talk=True)
            assert str(caught.value).startswith("stage 'forward' was not captured: ")
            assert "pixel_values" not in str(caught.value)
        assert tokcompile.report(fast).steps[0].status == "not_captured"
        assert tokcompile.report(fast).problems
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(pixels)  # judged again, with another outcome
    assert tokcompile.report(fast).steps[0].status == "matched"
    assert not tokcompile.report(fast).problems


def test_a_mistake_of_the_caller_is_told_by_the_model(moody: tuple[nn.Module, torch.Tensor]) -> None:
    fast = tokcompile.optimize(moody[0], PATCHES, lowering="eager")
    with pytest.raises(TypeError, match="wrong"):
        fast(moody[1], wrong=1)
    with pytest.raises(ValueError, match="channel"), torch.no_grad():
        fast(moody[1][:, :2])  # two channels of three
    with torch.no_grad():
        fast(moody[1])
    assert tokcompile.report(fast).steps[0].status == "matched"


def test_a_call_on_a_pruned_cache_is_refused_with_its_cause_and_pruning_goes_on() -> None:
    model, inputs = vlm()
    fast = tokcompile.optimize(model, HALF, lowering="eager", on_no_match="ignore")

    def turn(**extra: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = fast(**inputs, use_cache=True).past_key_values
            assert min(layer.keys.shape[2] for layer in cache.layers) < inputs["input_ids"].shape[1]
            length = cache.get_seq_length() + 3
            more = {"attention_mask": torch.ones(1, length, dtype=torch.long), "past_key_values": cache, **extra}
            return fast(input_ids=torch.tensor([[11, 12, 13]]), **more).logits

    want = turn()
    with pytest.raises(tokcompile.CacheError, match=r"cannot be captured as a graph \(.*cache has lost tokens"):
        turn(output_attentions=True)
    torch.testing.assert_close(turn(), want)


def test_a_decode_step_that_falls_back_leaves_the_next_ones_on() -> None:
    model, inputs = tiny_llm()
    recipe = {"recipe_version": 1, "steps": [{"pass": "decode_control", "params": {
        "budget": 9, "sinks": 2, "recent": 3, "dense_below": 1, "choose": "window"}}]}  # fmt: skip
    fast = tokcompile.optimize(model, recipe, lowering="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fast(**inputs, use_cache=True)
        for attentions in (False, True, False):
            token = out.logits[:, -1:].argmax(-1)
            extra = {"output_attentions": True} if attentions else {}
            out = fast(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **extra)
    assert tokcompile.report(fast).steps[0].status == "matched"


def test_calls_of_one_form_are_tried_a_few_times() -> None:
    failures = Failures()
    for size in range(2, 2 + TRIES):
        assert failures.known(Stage.PREFILL, {"x": torch.ones(1, size)}) is None
        failures.note(Stage.PREFILL, {"x": torch.ones(1, size)}, f"reason {size}")
    assert failures.known(Stage.PREFILL, {"x": torch.ones(1, 3)}) == "reason 3"
    assert failures.known(Stage.PREFILL, {"x": torch.ones(1, 99)}) == "reason 2"
    assert failures.known(Stage.PREFILL, {"x": torch.ones(1, 2), "flag": True}) is None
    assert failures.known(Stage.DECODE, {"x": torch.ones(1, 2)}) is None


def test_the_form_of_a_call_leaves_out_sizes() -> None:
    a, b = {"x": torch.ones(2, 3), "y": [1, None]}, {"x": torch.ones(4, 5), "y": [1, None]}
    assert form_of(a)[0] == form_of(b)[0]
    assert form_of(a)[1] != form_of(b)[1]
    assert form_of(a)[0] != form_of({**a, "y": [2, None]})[0]
    assert form_of(a)[0] != form_of({**a, "x": torch.ones(2, 3, dtype=torch.long)})[0]
