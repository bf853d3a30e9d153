"""What ``narrow`` and ``inline`` do to a graph, one rule at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokcompile.capture.captured import Captured
from tokcompile.capture.trace import inline, trace
from tokcompile.errors import NarrowError
from tokcompile.rewrite.narrow import Cut, narrow

B, S, D = 2, 6, 8
KEEP = torch.tensor([[0, 2, 5], [0, 3, 5]])
PADDED = torch.tensor([[-1, 2, 5], [0, 3, 5]])


def capture(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype) for t in inputs]
    return Captured(trace(function, fakes, mode), mode, "dynamo")


def outputs(captured: Captured) -> list[fx.Node]:
    return list(next(iter(captured.graph.find_nodes(op="output"))).args[0])


def take(x: Tensor, keep: Tensor = KEEP, dim: int = 1) -> Tensor:
    return torch.stack([row.index_select(dim - 1, k) for row, k in zip(x, keep, strict=True)])


def run(
    function: Callable[..., Any], *sides: Tensor, keep: Tensor = KEEP, x: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """``function(y, *sides)`` with ``y`` cut. Returns the value at the cut before narrowing, and the results."""
    x = torch.randn(B, S, D) if x is None else x

    def model(x: Tensor, keep: Tensor, *sides: Tensor) -> Any:
        y = x * 2
        return y, function(y, *sides)

    captured = capture(model, x, keep, *sides)
    narrow(captured, [Cut(outputs(captured)[0], captured.placeholders[1], keep.shape[1], **options)])
    at_cut, result = captured.graph_module(x, keep, *sides)
    if not options.get("ragged"):
        torch.testing.assert_close(at_cut, take(2 * x, keep))  # the output carries the narrowed value
    return 2 * x, result


@pytest.mark.parametrize("shape", [(S, D), (1, S, D), (B, S, D), (S, 1), (1, S, 1)])
def test_side_inputs(shape: tuple[int, ...]) -> None:
    """Every row has its own tokens, so a side input without a batch dimension gets one."""
    side = torch.randn(shape)
    y, result = run(lambda y, side: y * side, side)
    torch.testing.assert_close(result, take(y * side))


@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D), (B, 1, D), (B, 1, 1), ()])
def test_side_inputs_without_tokens_stay(shape: tuple[int, ...]) -> None:
    side = torch.randn(shape)
    y, result = run(lambda y, side: y * side, side)
    torch.testing.assert_close(result, take(y * side))


@pytest.mark.parametrize("shape", [(S, S), (1, S, S), (B, S, S), (1, S), (B, 1, S)])
def test_both_axes_of_a_mask(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape)
    y, result = run(lambda y, mask: (y @ y.transpose(1, 2) + mask).softmax(-1) @ y, mask)
    kept, full = take(y), mask.expand(B, S, S)
    own = torch.stack([m[k][:, k] for m, k in zip(full, KEEP, strict=True)])
    torch.testing.assert_close(result, (kept @ kept.mT + own).softmax(-1) @ kept)


@pytest.mark.parametrize("rows", [1, B])
def test_side_input_with_batch_and_heads_flattened(rows: int) -> None:
    """Scores ``[B * H, S, S]`` with a bias of that shape, or of one row that all share."""
    heads = 4
    bias = torch.randn(B * heads if rows == B else 1, S, S)

    def model(y: Tensor, bias: Tensor) -> Tensor:
        q = y.view(B, y.shape[1], heads, 2).transpose(1, 2).reshape(B * heads, y.shape[1], 2)
        return (q @ q.mT + bias).softmax(-1) @ q

    y, result = run(model, bias)
    full = bias.expand(B * heads, S, S).view(B, heads, S, S)
    own = torch.stack([m[:, k][:, :, k] for m, k in zip(full, KEEP, strict=True)]).reshape(B * heads, 3, 3)
    torch.testing.assert_close(result, model(take(y), own))


def test_sizes_used_outside_keep_the_unpruned_meaning() -> None:
    """``arange(x.size(1))`` counts all tokens; the kept ones stay at their positions, not at 0 .. K - 1."""

    def model(y: Tensor) -> Any:
        z = y + 1
        return z * torch.arange(z.size(1))[:, None], torch.arange(z.size(1)), z.new_zeros(z.shape[1])

    y, (scaled, positions, zeros) = run(model)
    torch.testing.assert_close(scaled, (take(y) + 1) * KEEP[..., None])
    assert positions.tolist() == list(range(S))
    assert len(zeros) == S


def test_dead_sizes_do_not_come_back() -> None:
    """A size that nothing uses any more must not stand in for the unpruned one in a second cut."""
    x, keep, again = torch.randn(B, S, D), KEEP, torch.tensor([[0, 2], [1, 2]])

    def model(x: Tensor, keep: Tensor, again: Tensor) -> Any:
        y = x * 2
        z = y.tanh()
        w = z * torch.arange(z.shape[1])[:, None]
        return y, z, w.view(B, z.shape[1], 4, 2).flatten(2) + torch.arange(w.shape[1])[:, None]

    captured = capture(model, x, keep, again)
    narrow(captured, [Cut(outputs(captured)[0], captured.placeholders[1], 3)])
    narrow(captured, [Cut(outputs(captured)[1], captured.placeholders[2], 2)])
    at = take(keep, again)
    kept = take(take((2 * x).tanh(), keep), again)
    torch.testing.assert_close(captured.graph_module(x, keep, again)[2], kept * at[..., None] + at[..., None])


def test_two_cuts_share_an_index() -> None:
    x, k, v = torch.randn(B, 2, D), torch.randn(B, S, D), torch.randn(B, S, D)

    def model(x: Tensor, k: Tensor, v: Tensor, mask: Tensor, keep: Tensor) -> Any:
        v = v * 1
        return (F.scaled_dot_product_attention(x, k, v, attn_mask=mask) + k.mean(1, keepdim=True), v + k)

    mask = torch.randn(2, S)
    captured = capture(model, x, k, v, mask, KEEP)
    _, key, _, _, index = captured.placeholders
    value = next(n for n in captured.graph.nodes if n.op == "call_function")
    flow = narrow(captured, [Cut(value, index, 3), Cut(key, index, 3)])
    assert flow.labels[key][1][0].axis is flow.labels[value][1][0].axis
    attended, added = captured.graph_module(x, k, v, mask, KEEP)
    own = torch.stack([mask[:, i] for i in KEEP])
    torch.testing.assert_close(
        attended, F.scaled_dot_product_attention(x, take(k), take(v), attn_mask=own) + take(k).mean(1, keepdim=True)
    )
    torch.testing.assert_close(added, take(k + v))


def test_axes_of_different_cuts_do_not_mix() -> None:
    x, k = torch.randn(B, S, D), torch.randn(B, S, D)
    captured = capture(lambda x, k, i, j: x + k, x, k, KEEP, KEEP)
    a, b, i, j = captured.placeholders
    before = captured.graph_module.code
    with pytest.raises(NarrowError, match="two different token axes meet"):
        narrow(captured, [Cut(a, i, 3), Cut(b, j, 3)])
    captured.graph_module.recompile()
    assert captured.graph_module.code == before


@pytest.mark.parametrize("keep", [KEEP, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("at", [[5, 3], [-1, -3], [2, 0]])
def test_index_maps_positions(keep: Tensor, at: list[int]) -> None:
    """``x[arange(B), positions]`` reads the same tokens as before (all of them are kept)."""
    where = torch.tensor(at)
    y, result = run(lambda y, p: y[torch.arange(B), p] + 1, where, keep=keep, ragged=keep is PADDED)
    torch.testing.assert_close(result, y[torch.arange(B), where] + 1)


def test_index_with_one_row() -> None:
    x = torch.randn(1, S, D)
    y, result = run(lambda y, p: y[:, p], torch.tensor([3]), keep=KEEP[1:], x=x)
    torch.testing.assert_close(result, y[:, [3]])


def test_held_returns_kept_positions() -> None:
    positions = torch.arange(S)[None].repeat(B, 1)
    model = lambda y, p: torch.ops.tokcompile.held(y.view(B, S, 2, 4).transpose(1, 2), p)  # noqa: E731
    assert run(model, positions)[1].tolist() == KEEP.tolist()
    assert run(model, positions, keep=PADDED, ragged=True)[1].tolist() == PADDED.tolist()


@pytest.mark.parametrize("keep", [KEEP, PADDED], ids=["full", "padded"])
def test_logical_keys_are_replaced(keep: Tensor) -> None:
    """A cut whose narrowed value is there already: the model sees S keys, the cache holds 3, a new token is added."""
    keys, values = torch.randn(B, 2, 3, 4), torch.randn(B, 2, 3, 4)
    query, mask = torch.randn(B, 2, 1, 4), torch.randn(B, 1, 1, S + 1)
    ragged = keep is PADDED

    def model(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, mask: Tensor) -> Any:
        k, v = (torch.cat([torch.ops.tokcompile.logical(t, keep, S, ragged), q], 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), k, k.shape[2]

    captured = capture(model, query, keys, values, keep, mask)
    marks = [n for n in captured.graph.nodes if n.target is torch.ops.tokcompile.logical.default]
    narrow(captured, [Cut(n, n.args[1], 3, ragged=ragged, token_dim=2, narrowed=n.args[0]) for n in marks])
    for node in marks:
        assert not node.users
        captured.graph.erase_node(node)
    captured.graph_module.recompile()
    out, k, length = captured.graph_module(query, keys, values, keep, mask)
    assert length == S + 1
    torch.testing.assert_close(k, torch.cat([keys, query], 2))
    for row in range(B):
        live = torch.cat([keep[row] >= 0, torch.tensor([True])])
        at = torch.cat([keep[row], torch.tensor([S])])[live]
        wanted = F.scaled_dot_product_attention(
            query[row],
            torch.cat([keys, query], 2)[row][:, live],
            torch.cat([values, query], 2)[row][:, live],
            attn_mask=mask[row][..., at],
        )
        torch.testing.assert_close(out[row], wanted)


def test_protected_prefix() -> None:
    def model(y: Tensor, pos: Tensor) -> Any:
        patches = y[:, 1:] + pos
        return patches, y[:, 0], y[:, :1], y + torch.cat([y[:, :1], patches.tanh()], 1), patches.view(B, -1, 2, 4)

    pos = torch.randn(S - 1, D)
    y, (patches, first, same, both, heads) = run(model, pos, prefix=1)
    whole = y.clone()
    whole[:, 1:] += pos
    kept = take(whole)
    torch.testing.assert_close(patches, kept[:, 1:])
    torch.testing.assert_close(first, y[:, 0])
    torch.testing.assert_close(same, y[:, :1])
    torch.testing.assert_close(both, take(y) + torch.cat([y[:, :1], kept[:, 1:].tanh()], 1))
    torch.testing.assert_close(heads, kept[:, 1:].view(B, 2, 2, 4))


def test_registers_between_class_token_and_patches() -> None:
    def model(y: Tensor, cls: Tensor) -> Any:
        z = torch.cat([cls.expand(B, -1, -1), y, y.mean(1, keepdim=True)], 1)
        return z[:, 0], z[:, 1:3], z[:, 3:-1], z[:, :-1], z[:, -1:], z[:, 3:]

    cls = torch.randn(1, 3, D)
    y, (first, registers, stream, front, last, rest) = run(model, cls)
    z = torch.cat([cls.expand(B, -1, -1), take(y), take(y).mean(1, keepdim=True)], 1)
    for got, wanted in zip(
        (first, registers, stream, front, last, rest),
        (z[:, 0], z[:, 1:3], z[:, 3:-1], z[:, :-1], z[:, -1:], z[:, 3:]),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_attention_sinks() -> None:
    """Scores with a column of sinks that is dropped after the softmax, with padded rows."""
    sinks = torch.randn(1, 1, 1)

    def model(y: Tensor, sinks: Tensor) -> Tensor:
        scores = (
            torch.cat([y @ y.mT, sinks.expand(B, S, 1)], -1)
            if False
            else torch.cat([y @ y.mT, (y * 0).sum(-1, keepdim=True) + sinks], -1)
        )
        return scores.softmax(-1)[..., :-1] @ y

    y, result = run(model, sinks, keep=PADDED, ragged=True)
    for row in range(B):
        live = PADDED[row] >= 0
        z = y[row][PADDED[row][live]]
        weights = torch.cat([z @ z.mT, sinks[0].expand(len(z), 1)], -1).softmax(-1)[:, :-1]
        torch.testing.assert_close(result[row][live], weights @ z)


@pytest.mark.parametrize("keep", [KEEP, PADDED], ids=["full", "padded"])
def test_protected_suffix(keep: Tensor) -> None:
    y, (last, tail, logits) = run(
        lambda y: (y[:, -1], y[:, -1:], (y + 1)[:, -1:, :].mean(-1)), keep=keep, suffix=1, ragged=keep is PADDED
    )
    torch.testing.assert_close(last, y[:, -1])
    torch.testing.assert_close(tail, y[:, -1:])
    torch.testing.assert_close(logits, (y + 1)[:, -1:].mean(-1))


def test_suffix_must_be_protected() -> None:
    with pytest.raises(NarrowError, match="token -1 is read"):
        run(lambda y: y[:, -1])
    with pytest.raises(NarrowError, match="border among tokens"):
        run(lambda y: y[:, -2:], suffix=1)


def test_token_and_batch_dimensions_of_a_cut() -> None:
    """A stream ``[S, B, D]`` (tokens first)."""
    x, side = torch.randn(S, B, D), torch.randn(S, 1, D)
    captured = capture(lambda x, keep, side: (x.view(S * B, D).tanh().view(S, B, D) + side, x), x, KEEP, side)
    narrow(captured, [Cut(captured.placeholders[0], captured.placeholders[1], 3, token_dim=0, batch_dim=1)])
    wanted = take((x.tanh() + side).transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(captured.graph_module(x, KEEP, side)[0], wanted)


def test_keep_everything_is_exact() -> None:
    all_of_them = torch.arange(S)[None].repeat(B, 1)
    side = torch.randn(S, D)
    model = lambda y, side: F.layer_norm((y @ y.mT).softmax(-1) @ (y * side), (D,))  # noqa: E731
    y, result = run(model, side, keep=all_of_them)
    assert torch.equal(result, model(y, side))


def test_one_row_of_a_padded_batch_is_that_row_alone() -> None:
    model = lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True)  # noqa: E731
    y, result = run(model, keep=PADDED, ragged=True)
    assert not result.isnan().any()
    torch.testing.assert_close(result[0, 1:], model(y[:1, [2, 5]])[0])
    torch.testing.assert_close(result[1], model(y[1:, [0, 3, 5]])[0])


def test_inline() -> None:
    """The traced graph goes in front of a node; constants become attributes of the module."""
    table = torch.randn(11)
    captured = capture(lambda x: x * 2 + 1, torch.randn(4, 5))
    add = next(n for n in captured.graph.nodes if "add" in n.name)
    scale = add.args[0]
    assert isinstance(scale, fx.Node)
    node, top = inline(captured, lambda x, n: ((x + table[:5]) * n, x.topk(2).values), [scale, 3], add)
    add.args = (node, 1)
    captured.graph.lint()
    captured.graph_module.recompile()
    constants = captured.graph.find_nodes(op="get_attr")
    assert constants
    assert all(torch.equal(getattr(captured.graph_module, n.target), table) for n in constants)
    assert top.meta["val"].shape == (4, 2)
    assert node.meta["tokcompile"] == "<lambda>"
    x = torch.randn(4, 5)
    torch.testing.assert_close(captured.graph_module(x), (2 * x + table[:5]) * 3 + 1)


def test_inline_twice_keeps_constants_apart() -> None:
    captured = capture(lambda x: x * 2, torch.randn(5))
    node = next(n for n in captured.graph.nodes if n.op == "call_function")
    tables = torch.randn(5), torch.randn(5)
    for table in tables:
        node.args = (inline(captured, lambda x, table=table: x + table, [node.args[0]], node), 2)
    narrowless = captured.graph_module
    captured.graph.lint()
    narrowless.recompile()
    x = torch.randn(5)
    torch.testing.assert_close(narrowless(x), (x + tables[0] + tables[1]) * 2)
    assert len({n.target for n in captured.graph.find_nodes(op="get_attr")}) == 2


def test_constants_of_the_model_that_carry_the_token_axis() -> None:
    """A mask or a table that the model holds as a constant is indexed like an input."""
    bias = torch.randn(S, S)
    y, result = run(lambda y: (y @ y.mT + bias).softmax(-1) @ y)
    kept = take(y)
    own = torch.stack([bias[k][:, k] for k in KEEP])
    torch.testing.assert_close(result, (kept @ kept.mT + own).softmax(-1) @ kept)


def test_shapes_are_derived_again() -> None:
    x = torch.randn(B, S, D)
    captured = capture(lambda x, keep: (x.view(B, S, 4, 2).transpose(1, 2), x.reshape(B * S, D)), x, KEEP)
    narrow(captured, [Cut(captured.placeholders[0], captured.placeholders[1], 3)])
    assert [tuple(n.meta["val"].shape) for n in outputs(captured)] == [(B, 4, 3, 2), (B * 3, D)]
