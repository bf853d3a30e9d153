"""The one form in which choices of tokens and keys give their scores, and what is accepted besides it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from tests.pruning import optimized
from tests.zoo.vlm import VLMS, shallow
from tokcompile import registry
from tokcompile.demo import tiny_vit
from tokcompile.families.pruning.patches import PatchParams, PatchSelection
from tokcompile.families.pruning.staged import StagedSelection
from tokcompile.families.pruning.visual import VisualParams, VisualSelection
from tokcompile.families.scores import Scores, read_scores
from tokcompile.passes.pruning.patch_merge import PatchMerge
from tokcompile.registry import get_pass, register, shipped_passes
from tokcompile.rewrite.selection import budgets, pooled, segments


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.pass_names()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))


def test_a_tensor_stands_for_its_values() -> None:
    values = torch.rand(2, 5)
    assert read_scores(values, "mine", 2).values is values
    given = Scores(values, tokens=torch.rand(2, 5, 3))
    assert read_scores(given, "mine", 2, "tokens") is given


def test_a_tuple_is_read_with_a_warning() -> None:
    tokens, values, into, sizes = (torch.rand(2, 5) for _ in range(4))
    with pytest.warns(DeprecationWarning, match=r"mine\.score gives a tuple; give Scores\(values, tokens=\.\.\.\)"):
        read = read_scores((tokens, values), "mine", 2, "tokens")
    assert (read.tokens is tokens, read.values is values, read.carried, read.into) == (True, True, None, None)
    with pytest.warns(DeprecationWarning, match="tuple"):
        read = read_scores((tokens, values, into, sizes), "mine", 2, "tokens", "carried", "into")
    assert read.into is into
    assert read.carried is not None
    assert list(read.carried.values()) == [sizes]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "expected Scores, or a tensor of values, found NoneType"),
        ([torch.zeros(1, 2)], "found list"),
        (torch.zeros(3), r"expected values of 2 dimensions, found 1: \(3,\)"),
        (Scores(torch.zeros(1, 3), into=torch.zeros(1, 3)), "nothing reads the field into"),
        (Scores(torch.zeros(1, 3), carried={"a": torch.zeros(1, 3)}), "nothing reads the field carried"),
    ],
)
def test_what_is_no_score_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"mine\.score: .*{message}"):
        read_scores(given, "mine", 2, "tokens")


def test_every_choice_of_tokens_that_ships_gives_scores() -> None:
    segment = segments(torch.tensor([[0, *[1] * 8, 0]]).bool())
    budget, tokens = budgets(segment, 1, 2), torch.rand(1, 10, 4)
    seen = []
    for name in shipped_passes():
        method = get_pass(name)
        if issubclass(method, VisualSelection):
            more = [torch.rand(1, 10)] if name == "vtc_cls" else []
            result = method(method.Params(keep=0.5)).score(tokens, segment, budget, *more)
        elif issubclass(method, StagedSelection):
            params = method.Params(keep=[0.5], at=[0.5])
            result = method(params).score(0, tokens, segment, budget, {}, torch.rand(1, 10), tokens, tokens)
        elif issubclass(method, PatchSelection):
            context, rows, key = torch.rand(1, 2, 10, 4), torch.rand(1, 2, 1, 10), torch.rand(1, 2, 10, 4)
            inputs = [key] if issubclass(method, PatchMerge) else [context, rows]
            result = method(method.Params(keep=[0.5], at=[0.5])).score(tokens, segment, budget, 1, 1, *inputs)
        else:
            continue
        seen.append(name)
        assert isinstance(result, Scores), name
        assert result.values.shape == segment.shape, name
    assert len(seen) >= 8


def _logits(name: str) -> Tensor:
    case = shallow(VLMS["llava"]())
    with torch.no_grad():
        return optimized(case.model, [{"pass": name, "params": {"keep": 0.5}}])(**case.inputs()).logits  # type: ignore[no-any-return]


def test_the_same_model_comes_out_whichever_form_is_given() -> None:
    """A method that changes tokens, in the form of the first releases."""

    @register
    class Tupled(VisualSelection):
        """Average tokens."""

        name = "tupled_for_tests"

        class Params(VisualParams):
            pass

        def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Any:
            return pooled(tokens, segment, budget)[:2]

    with pytest.warns(DeprecationWarning, match="tupled_for_tests"):
        tupled = _logits("tupled_for_tests")
    assert torch.equal(_logits("pool"), tupled)


@pytest.mark.slow
def test_an_old_patch_merge_still_runs() -> None:
    """A choice of patches with a tuple of four, and the ``below`` that goes with it."""

    @register
    class Old(PatchMerge):
        """As patch_merge, in the form of the first releases."""

        name = "old_merge_for_tests"

        def score(self, *args: Any) -> Any:
            scores = super().score(*args)
            assert scores.carried is not None
            return scores.tokens, scores.values, scores.into, scores.carried["sizes"]

        def below(self, ctx: Any, region: Any, layers: Any, kept: Any, *values: Any) -> None:
            (sizes,) = values
            super().below(ctx, region, layers, kept, {"sizes": sizes})

    with pytest.warns(DeprecationWarning, match=r"old_merge_for_tests\.score gives a tuple"):
        old = _encoded("old_merge_for_tests")
    assert torch.equal(old, _encoded("patch_merge"))


def test_restoring_without_the_places_is_a_mistake_of_the_pass() -> None:
    @register
    class Lost(PatchSelection):
        """Keep patches, and forget where the others went."""

        name = "lost_for_tests"

        class Params(PatchParams):
            restore: bool = Field(True, description="Give all patches back.")

        def score(self, tokens: Tensor, *args: Any) -> Tensor:
            return tokens.float().mean(-1)

    assert _encoded("lost_for_tests", restore=False).shape[1] < 65
    with pytest.raises(Exception, match=r"lost_for_tests\.score: restore needs the field into"):
        _encoded("lost_for_tests")


def _encoded(name: str, **params: Any) -> Tensor:
    model, inputs = tiny_vit()
    steps = [{"pass": name, "params": {"keep": [0.75], "at": [0.25], **params}}]
    with torch.no_grad():
        out = optimized(model, steps)(**inputs)
    return out.last_hidden_state  # type: ignore[no-any-return]
