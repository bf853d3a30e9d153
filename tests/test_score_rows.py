"""Rows of attention weights for scores: what the layer itself computes, whatever its mask; and what hides a key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.test_narrow import PADDED, capture, outputs, take
from tests.test_narrow import run as narrowed
from tokcompile.capture.captured import Captured
from tokcompile.capture.ops import CONTRACTION, SOFTMAX, op_name
from tokcompile.errors import NarrowError
from tokcompile.families.sparse_attention.decode.form import visible_keys
from tokcompile.formulas.attention import read_attention
from tokcompile.formulas.attention_rows import attention_rows
from tokcompile.formulas.mask import hides, is_hidden, is_visible
from tokcompile.kernels.token_sparse_attention.reference import compute, select
from tokcompile.regions import find_regions
from tokcompile.regions.model import Layer, Region
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import row_attention

B, H, S, D = 2, 4, 7, 8
LOWEST = torch.finfo(torch.float32).min
HIDING = [-math.inf, LOWEST, -1e9, -1e4]
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
#: Row 0 starts with two places of padding, so its first two queries see nothing.
REAL = torch.tensor([[False, False, *[True] * 5], [True] * 7])


def operands(kv_heads: int = H, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, heads, S, D).to(dtype) * 2 for heads in (H, kv_heads, kv_heads))  # type: ignore


def oracle(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    added: Tensor | float = 0.0,
    scale: float = D**-0.5,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Weights [B, H, S, T] in double precision; a row without a key is 0."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + added).masked_fill(~visible, -math.inf)
    if sink is None:
        return logits.softmax(-1).nan_to_num(0.0)
    column = sink.double().expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def rows_of(function: Callable[..., Any], inputs: tuple[Tensor, ...], rows: Any, most: int | None = None) -> Tensor:
    """The rows that ``attention_rows`` reads off the graph of ``function(*inputs)``; ``rows`` may be a tensor."""
    chosen = [rows] if isinstance(rows, Tensor) else []
    captured = capture(lambda *values: (function(*values[: len(inputs)]), *[v + 0 for v in chosen]), *inputs, *chosen)
    regions = find_regions(captured.graph)
    (attention,) = regions.of("attention")
    layer = Layer("", 0, captured.placeholders[0], outputs(captured)[0], attention)
    asked = captured.placeholders[-1] if chosen else rows
    result = attention_rows(Context(captured, regions, []), layer, asked, most=most)
    if isinstance(rows, int):  # the first rows and no more
        assert all(n.meta["val"].shape[-1] != S or n.meta["val"].shape[-2] != S for n in products(captured, attention))
    captured.graph.output_node().args = ((result,),)
    captured.graph_module.recompile()
    (found,) = captured.graph_module(*inputs, *chosen)
    assert found.dtype == torch.float32
    return found


def products(captured: Captured, attention: Region) -> list[fx.Node]:
    """Products and softmaxes that are not the attention's own."""
    own = set(attention.roles.values())
    return [n for n in captured.graph.nodes if op_name(n) in CONTRACTION | SOFTMAX and n not in own]


def sdpa(**options: Any) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, *mask, **options)

    return attention


def eager(softcap: float = 0.0, fill: float | None = None, scale: float = D**-0.5) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        for m in mask:
            scores = scores + m if fill is None else scores.masked_fill(~m, fill)
        return scores.softmax(-1) @ value

    return attention


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (query, key, value))
    scores = torch.bmm(q, k.transpose(1, 2)) * D**-0.5
    scores = (scores.view(B, H, S, S) + mask).view(B * H, S, S)
    return torch.bmm(scores.softmax(-1), v).view(B, H, S, D)


def with_sinks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * D**-0.5 + mask
    scores = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], -1)
    return scores.softmax(-1)[..., :-1] @ value


def added(visible: Tensor, low: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)


PADDING = CAUSAL & REAL[:, None, None, :]
WINDOW = CAUSAL & ~CAUSAL.tril(-3)
BY_HEAD = torch.rand(B, H, S, S, generator=torch.Generator().manual_seed(1)) < 0.6
ALIBI = -torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * (torch.arange(S)[:, None] - torch.arange(S)).abs()
#: name -> (layer, its mask, what a query sees, what is added to the logits, key heads, more of the formula)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor, Any, int, dict[str, Any]]] = {
    "plain": (sdpa(), (), torch.ones(S, S, dtype=torch.bool), 0.0, H, {}),
    "causal": (sdpa(is_causal=True), (), CAUSAL, 0.0, H, {}),
    "causal and scaled": (sdpa(is_causal=True, scale=0.5), (), CAUSAL, 0.0, H, {"scale": 0.5}),
    "causal, shared key heads": (sdpa(is_causal=True, enable_gqa=True), (), CAUSAL, 0.0, 2, {}),
    "bool": (sdpa(), (PADDING,), PADDING, 0.0, H, {}),
    "bool by name": (lambda q, k, v, m: sdpa(attn_mask=m)(q, k, v), (PADDING,), PADDING, 0.0, H, {}),
    "bool, two axes": (sdpa(), (WINDOW,), WINDOW, 0.0, H, {}),
    "bool by head": (sdpa(), (BY_HEAD,), BY_HEAD, 0.0, H, {}),
    "padding alone": (sdpa(), (REAL[:, None, None],), REAL[:, None, None], 0.0, H, {}),
    "window, shared key heads": (sdpa(enable_gqa=True), (WINDOW[None, None],), WINDOW, 0.0, 1, {}),
    "bias": (sdpa(), (ALIBI,), torch.ones(S, S, dtype=torch.bool), ALIBI, H, {}),
    "bias and padding": (sdpa(), (ALIBI + added(PADDING, -1e9),), PADDING, ALIBI, H, {}),
    "eager": (eager(), (), torch.ones(S, S, dtype=torch.bool), 0.0, H, {}),
    "eager, added": (eager(), (added(PADDING, -1e9),), PADDING, 0.0, H, {}),
    "eager, filled": (eager(fill=-1e9), (PADDING,), PADDING, 0.0, H, {}),
    "eager, capped": (eager(softcap=2.0), (added(WINDOW, -1e9),), WINDOW, 0.0, H, {"softcap": 2.0}),
    "eager, folded": (folded, (added(PADDING, -1e9),), PADDING, 0.0, H, {}),
} | {f"sdpa, added {low:g}": (sdpa(), (added(PADDING, low),), PADDING, 0.0, H, {}) for low in HIDING}
INDEX = torch.tensor([[-1, 1, 4], [0, 2, 6]])
CHOSEN = torch.tensor([[False, False, True, False, False, True, False], [True, True, False, True, True, True, False]])


@pytest.mark.parametrize("asked", ["first", "all", "places", "chosen"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_layer(name: str, asked: str) -> None:
    layer, masks, visible, bias, kv_heads, more = CASES[name]
    query, key, value = operands(kv_heads)
    wanted = oracle(query, key, visible, bias, **more)
    if asked in ("places", "chosen"):
        # the last three that are chosen; a row with two has nothing in front
        index = INDEX if asked == "places" else torch.tensor([[-1, 2, 5], [3, 4, 5]])
        rows: Any = INDEX if asked == "places" else CHOSEN
        place = index.clamp(min=0)[:, None, :, None].expand(-1, H, -1, S)
        wanted = wanted.gather(2, place).masked_fill((index < 0)[:, None, :, None], 0)
    else:
        rows = 3 if asked == "first" else None
        wanted = wanted[:, :, :rows]
    found = rows_of(layer, (query, key, value, *masks), rows, 3 if asked == "chosen" else None)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not found[wanted.sum(-1) == 0].any()  # exactly 0 where a query sees nothing


def test_sinks_take_their_part() -> None:
    query, key, value = operands()
    sink = torch.randn(H)
    found = rows_of(with_sinks, (query, key, value, added(CAUSAL, -1e9), sink), 4)
    wanted = oracle(query, key, CAUSAL, sink=sink.view(1, -1, 1, 1))[:, :, :4]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_queries_by_a_mask_need_a_number() -> None:
    with pytest.raises(ValueError, match="most="):
        rows_of(sdpa(), operands(), CHOSEN)


def test_a_layer_without_attention_is_refused() -> None:
    captured = capture(lambda x: (x + 1,), torch.randn(2, 3))
    node = outputs(captured)[0]
    with pytest.raises(NarrowError, match="no attention to score with"):
        attention_rows(Context(captured, find_regions(captured.graph), []), Layer("", 0, node, node), 1)


# .. what hides a key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_hide(dtype: torch.dtype) -> None:
    """-inf, the lowest numbers of the types, -1e9 and -1e4, as they are in each type, also with a bias added."""
    low = [-math.inf, torch.finfo(dtype).min, -1e4, -1e4 + 1000]
    low += [] if dtype == torch.float16 else [-1e9, torch.finfo(torch.float16).min, torch.finfo(torch.bfloat16).min]
    hidden = torch.tensor(low, dtype=dtype)
    assert is_hidden(hidden).all()
    assert not is_visible(hidden).any()
    assert all(map(hides, hidden.tolist()))
    # biases: of windows (-100), by distance in a text of 8,000 tokens, and none
    seen = torch.tensor([0.0, -0.0, 3.5, -100.0, -0.5 * 8000, math.inf], dtype=dtype)
    assert is_visible(seen).all()
    assert not is_hidden(seen).any()
    assert not any(map(hides, seen.tolist()))
    assert is_visible(REAL).equal(REAL)
    assert is_hidden(REAL).equal(~REAL)


def test_a_key_that_counts_as_hidden_has_no_weight() -> None:
    """Next to a visible key; so a long bias by distance stays exact."""
    query, key, _ = operands()
    distance = -3000.0 * (torch.arange(S)[:, None] - torch.arange(S)).abs()
    found = row_attention(query, key, 1.0, distance)
    assert torch.equal(found, (query @ key.mT + distance).softmax(-1))


@pytest.mark.parametrize("low", HIDING)
@pytest.mark.parametrize("form", ["where", "masked_fill"])
def test_a_decode_step_lists_no_padding(low: float, form: str) -> None:
    query, key, value = operands()
    query = query[:, :, -1:]

    def step(query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> tuple[Tensor]:
        real = real[:, None, None]
        mask = torch.where(real, 0.0, low) if form == "where" else torch.zeros(B, 1, 1, S).masked_fill(~real, low)
        return (F.scaled_dot_product_attention(query, key, value, mask),)

    captured = capture(step, query, key, value, REAL)
    ctx = Context(captured, find_regions(captured.graph), [])
    seen = visible_keys(ctx, read_attention(ctx, ctx.regions.of("attention")[0]))
    assert seen is not None
    captured.graph.output_node().args = ((seen,),)
    captured.graph_module.recompile()
    assert captured.graph_module(query, key, value, REAL)[0].equal(REAL)


@pytest.mark.parametrize("low", HIDING)
def test_a_sparse_prefill_chooses_no_padding(low: float) -> None:
    query, key, value = operands()
    options: tuple[Any, ...] = (None, 0.0, 0)  # scale, soft cap, window
    chosen = [
        select(query, key, None, mask, *options, 0.0, 0.5, 1, 2, 1, -1) for mask in (PADDING, added(PADDING, low))
    ]
    assert chosen[0] is not None
    assert chosen[1] is not None
    assert torch.equal(*chosen)
    index = chosen[0]
    assert not ((index[0] >= 0) & (index[0] < 2)).any()
    found = compute(query, key, value, index, None, added(PADDING, low), *options)
    member = torch.zeros(B, H, S + 1, dtype=torch.bool).scatter(2, torch.where(index < 0, S, index), True)[..., :S]
    weights = oracle(query, key, PADDING & member[:, :, None] & member[..., None])
    torch.testing.assert_close(found.double(), weights @ value.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", HIDING)
@pytest.mark.parametrize("by", ["sdpa", "eager"])
def test_rows_of_different_lengths_under_a_padding_mask(low: float, by: str) -> None:
    """Kept tokens attend to the kept tokens that are no padding, and to no empty slot."""
    real = torch.tensor([[True, True, False, True, True, True], [False, True, True, True, True, True]])
    mask = added(real, low)[:, None]  # [B, 1, S]

    def model(y: Tensor, mask: Tensor) -> Tensor:
        if by == "sdpa":
            y4 = y[:, None]
            return F.scaled_dot_product_attention(y4, y4, y4, mask[:, None].expand(-1, -1, y.shape[1], -1))[:, 0]
        return (y @ y.mT * 8**-0.5 + mask).softmax(-1) @ y

    y, found = narrowed(model, mask, keep=PADDED, ragged=True)
    for row, places in enumerate(PADDED):
        there = places >= 0
        own, seen = take(y, PADDED.clamp(min=0))[row, there], real[row, places[there]]
        weights = oracle(own[None, None], own[None, None], seen)[0, 0]
        torch.testing.assert_close(found[row, there].double(), weights @ own.double(), rtol=1e-5, atol=1e-5)
