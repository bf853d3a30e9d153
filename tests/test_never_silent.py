"""A valid call of an optimized model equals its oracle, or raises, or says that it ran dense: never none of these."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile
from tests import oracle
from tests.pruning import RANDOM, TODRE, close, hidden, optimized
from tests.zoo.vlm import VLMS, Case

STEPS = {"random": RANDOM, "todre": TODRE}
#: How a user calls: the method, and what is said besides the inputs.
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("generate", {}),
    ("generate", {"num_beams": 2}),
    ("forward", {}),
    ("forward", {"use_cache": False}),
    ("forward", {"output_hidden_states": True}),
    ("forward", {"output_attentions": True}),
    ("forward", {"logits_to_keep": 1}),
    ("forward", {"return_dict": False}),
]


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Case, Any]]:
    """Recipe -> a small LLaVA and the same optimized; compiled graphs go on from example to example."""
    made: dict[str, tuple[Case, Any]] = {}

    def get(name: str) -> tuple[Case, Any]:
        if name not in made:
            case = VLMS["llava"]()
            made[name] = case, optimized(case.model, STEPS[name], on_no_match="warn")
        return made[name]

    return get


@st.composite
def inputs_of(draw: st.DrawFn) -> dict[str, Any]:
    batch = draw(st.integers(1, 3))
    images = draw(st.lists(st.integers(0, 2), min_size=batch, max_size=batch))
    return {
        "batch": batch,
        "images_per_row": images if any(images) else [1] * batch,
        "left_padding": draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch)),
        "text_len": draw(st.integers(4, 16)),
        "seed": draw(st.integers(0, 9)),
    }


def called(model: Any, method: str, inputs: dict[str, Tensor], given_: dict[str, Any]) -> list[Tensor]:
    """Logits of the last token: of a forward, or of each of two steps."""
    with torch.no_grad():
        if method == "generate":
            out = model.generate(
                **inputs, **given_, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            return list(out.logits)
        out = model(**inputs, **given_)
        return [(out if isinstance(out, tuple) else (out.logits,))[0][:, -1]]


def holds(case: Case, model: Any, inputs: dict[str, Tensor], method: str, given_: dict[str, Any]) -> str:
    """Which of the three a call was; fails where it was none."""
    before = sum(step.fell_back for step in tokcompile.report(model).steps)
    with warnings.catch_warnings(record=True) as told, tokcompile.record(model) as recording:
        warnings.simplefilter("always")
        try:
            found = called(model, method, inputs, given_)
        except Exception:
            return "raised"
    counted = sum(step.fell_back for step in tokcompile.report(model).steps) > before
    if counted:
        assert told or before, "the first call that falls back says so"
        close(found, called(case.model, method, inputs, given_))
        return "said that it ran dense"
    dropped = hidden(recording, inputs["attention_mask"].shape[1], len(case.decoder_layers))
    assert dropped, "nothing was pruned, and nothing was said"
    with oracle.hidden_keys(case.decoder_layers, dropped, [case.model.config.get_text_config()]):  # type: ignore[union-attr]
        close(found, called(case.model, method, inputs, given_))
    return "equals its oracle"


@pytest.mark.parametrize("examples", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_any_valid_call(models: Any, examples: int) -> None:
    seen: dict[str, int] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
        database=None,
    )
    @given(st.sampled_from(sorted(STEPS)), inputs_of(), st.sampled_from(CALLS))
    def check(name: str, asked: dict[str, Any], call: tuple[str, dict[str, Any]]) -> None:
        case, model = models(name)
        became = holds(case, model, case.inputs(**asked), *call)
        seen[became] = seen.get(became, 0) + 1

    check()
    assert seen.get("equals its oracle", 0) > examples // 2, seen
