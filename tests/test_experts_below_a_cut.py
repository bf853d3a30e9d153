"""Mixtures of experts below a cut: what acts token by token is narrowed, what makes tokens compete is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokcompile
from tests import oracle
from tests.pruning import TODRE, check, error, optimized, run
from tests.test_token_axis import output_nodes, plain_capture
from tests.zoo.experts import EXPERTS
from tokcompile.errors import NarrowError
from tokcompile.rewrite.narrow import Cut, narrow

B, S, D, E = 2, 6, 8, 3
GENERATOR = torch.Generator().manual_seed(0)
ROUTER, WEIGHTS = torch.randn(D, E, generator=GENERATOR), torch.randn(E, D, D, generator=GENERATOR)
LIMIT = 3


def routed(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, the expert of each (two for a token) in ascending order, that order, and the tokens."""
    flat = x.reshape(-1, D)
    key, order = (flat @ ROUTER).topk(2, -1).indices.reshape(-1).sort()
    return flat, key, order, order // 2


def grouped(x: Tensor, ends: Callable[[Tensor], Tensor]) -> Tensor:
    flat, key, _, token = routed(x)
    rows = torch.ops.transformers.grouped_mm_fallback(flat[token], WEIGHTS, ends(key).int())
    return torch.zeros_like(flat).index_add(0, token, rows)


def limited_by_place(x: Tensor) -> Tensor:
    flat, key, _, token = routed(x)
    ends = torch.histc(key.float(), E, 0, E - 1).cumsum(0).long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    fits = torch.arange(len(key)) - starts[key] < LIMIT
    return torch.zeros_like(flat).index_add(0, token, flat[token] * fits[:, None])


def limited_by_running_count(x: Tensor) -> Tensor:
    chosen = torch.nn.functional.one_hot((x.reshape(-1, D) @ ROUTER).argmax(-1), E)
    return x.reshape(-1, D) * ((chosen.cumsum(0) * chosen).sum(-1) <= LIMIT)[:, None]


def experts_choose(x: Tensor) -> Tensor:
    _, token = (x.reshape(-1, D) @ ROUTER).t().topk(LIMIT, 1)
    return torch.zeros(B * S, D).index_add(0, token.reshape(-1), x.reshape(-1, D)[token.reshape(-1)])


def best_first(x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    order = flat[:, 0].argsort(descending=True)
    share = flat[order].cumsum(0)
    return torch.zeros_like(flat).index_copy(0, order, share)


def first_rows(x: Tensor) -> Tensor:
    flat, _, _, token = routed(x)
    return torch.zeros_like(flat).index_add(0, token[:4], flat[token[:4]])


def first_of_each_expert(x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    (token,) = torch.where((flat @ ROUTER).argmax(-1) == 1)
    return flat[token[:1]]


def rows_attend(x: Tensor) -> Tensor:
    flat, _, _, token = routed(x)
    rows = flat[token]
    return (rows @ rows.t()).softmax(-1) @ rows


def outside_by_place(x: Tensor) -> Tensor:
    flat, _, _, token = routed(x)
    return flat[token] * torch.linspace(0, 1, 2 * B * S)[:, None]


def written_twice(x: Tensor) -> Tensor:
    flat, _, _, token = routed(x)
    return torch.zeros_like(flat).index_copy(0, token, flat[token])


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "limited_by_place": (limited_by_place, "sub", "order of places"),
    "limited_by_running_count": (limited_by_running_count, "cumsum", "runs along the token axis"),
    "limited_groups": (
        lambda x: grouped(x, lambda key: torch.histc(key.float(), E, 0, E - 1).clamp(max=LIMIT).cumsum(0)),
        "grouped_mm_fallback",
        "depends on the other tokens",
    ),
    "equal_groups": (
        lambda x: grouped(x, lambda key: torch.tensor([4, 8, 12])),
        "grouped_mm_fallback",
        "depends on the other tokens",
    ),
    "bins_of_the_data": (
        lambda x: grouped(x, lambda key: torch.histc(key.float(), E).cumsum(0)),
        "grouped_mm_fallback",
        "depends on the other tokens",
    ),
    "first_bin_left_out": (
        lambda x: grouped(x, lambda key: torch.histc(key.float(), E, 1, E).cumsum(0)),
        "grouped_mm_fallback",
        "depends on the other tokens",
    ),
    "other_key": (
        lambda x: grouped(
            x, lambda key: torch.histc((x.reshape(-1, D) @ ROUTER).argmin(-1).float(), E, 0, E - 1).cumsum(0)
        ),
        "grouped_mm_fallback",
        "depends on the other tokens",
    ),
    "experts_choose": (experts_choose, "topk", "runs along the token axis"),
    "best_first": (best_first, "cumsum", "runs along the token axis"),
    "first_rows": (first_rows, "slice_1", "border among tokens"),
    "first_of_each_expert": (first_of_each_expert, "slice_1", "border among tokens"),
    "rows_attend": (rows_attend, "softmax", "order that values choose"),
    "outside_by_place": (outside_by_place, "mul_1", "order of places"),
    "written_twice": (written_twice, "index_copy", "the last one counts"),
    "place_as_number": (lambda x: routed(x)[0][routed(x)[3]] * (routed(x)[2] < 5)[:, None], "lt", "used as a number"),
    "place_as_result": (lambda x: routed(x)[2], "getitem_3", "used as a number"),
    "wrong_number_of_slots": (lambda x: routed(x)[0][routed(x)[2] // 3], "floor_divide_2", "used as a number"),
    "windows_of_rows": (
        lambda x: routed(x)[0][routed(x)[3]].view(-1, 3, D).softmax(1),
        "view",
        "splits the token axis",
    ),
    "joined_rows": (lambda x: torch.cat([routed(x)[0][routed(x)[3]], torch.zeros(1, D)]), "cat", "concatenated"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals(name: str) -> None:
    """With the node, the reason, and the graph as it was."""
    function, node, reason = REFUSED[name]
    x, keep = torch.randn(B, S, D), torch.tensor([[0, 2, 5], [1, 3, 5]])
    captured = plain_capture(lambda x, keep: (y := x * 2, function(y)), x, keep)
    before = captured.graph_module.code
    with pytest.raises(NarrowError) as error:
        narrow(captured, [Cut(output_nodes(captured)[0], captured.placeholders[1], 3)])
    assert reason in error.value.reason
    assert error.value.node == node
    captured.graph_module.recompile()
    assert captured.graph_module.code == before


def test_counts_of_padded_rows() -> None:
    """A histogram counts empty slots; where it only ends groups of rows these are rows too, elsewhere it is refused."""

    def load(x: Tensor) -> Tensor:
        _, key, _, _ = routed(x)
        return x * torch.histc(key.float(), E, 0, E - 1).mean()

    x, keep = torch.randn(B, S, D), torch.tensor([[-1, 2, 5], [1, 3, 5]])
    for ragged in (True, False):
        captured = plain_capture(lambda x, keep: (y := x * 2, load(y)), x, keep)
        cut = Cut(output_nodes(captured)[0], captured.placeholders[1], 3, ragged=ragged)
        if ragged:
            with pytest.raises(NarrowError, match="counts over the tokens"):
                narrow(captured, [cut])
        else:
            narrow(captured, [cut])


HEAVY = {"qwen3_vl_moe_batched", "glm4v_moe", "deepseek", "deepseek_batched", "mixtral", "plain_sorted"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else []) for name in EXPERTS]


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked_dense(name: str) -> None:
    """Two cuts in one graph, a row with left padding; prefill and generation."""
    case = EXPERTS[name]()
    model = optimized(case.model, TODRE)
    recording = check(model, case, case.inputs(batch=2, left_padding=3), 5)
    assert [entry.layer for entry in recording.kept] == [0, 2]
    step = tokcompile.report(model).steps[0]
    assert step.status == "matched"
    assert step.flop_ratio > 1.2


@pytest.mark.parametrize("name", ["plain_loop", pytest.param("qwen3_vl_moe", marks=pytest.mark.slow)])
def test_keeping_everything_changes_nothing(name: str) -> None:
    case = EXPERTS[name]()
    inputs = case.inputs(batch=2, left_padding=3)
    model = optimized(case.model, [{"pass": "random", "params": {"keep": 1.0}}])
    found, _ = run(model, case, inputs, 4)
    wanted = oracle.run(case, inputs, 4 if case.has_generate else 1)
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.logits[0], wanted.logits[0])  # the prefill, bit for bit
    assert max(error(a, b) for a, b in zip(found.logits, wanted.logits, strict=True)) <= 1e-5


@pytest.mark.parametrize("name", ["plain_loop", pytest.param("glm4v_moe", marks=pytest.mark.slow)])
def test_images_of_rows_that_differ(name: str) -> None:
    """Rows with one and two images: empty slots go through the experts, and no token sees them."""
    case = EXPERTS[name]()
    model = optimized(case.model, [{"pass": "random", "params": {"keep": 0.25}}])
    recording = check(model, case, case.inputs(batch=2, images_per_row=[1, 2]), 3)
    assert len(recording.kept) == 1
