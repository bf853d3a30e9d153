"""Attention within pieces of one row of tokens: images, or windows of an image, that lie one behind the other.

Model code cuts queries, keys and values up, calls attention for each piece, and joins the results::

    q, k, v [B, H, N, Dh] -> split(lengths) -> attention, piece by piece -> [transpose, view] -> cat

That is one attention with a mask of blocks, and a layer that reads it as such. :func:`pack` puts one operation in its
place, which computes the same things in the same order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from tokcompile.capture.captured import Captured
from tokcompile.capture.ops import op_name
from tokcompile.capture.trace import inline

aten = torch.ops.aten

_library = torch.library.Library("tokcompile", "FRAGMENT")
_library.define(
    "packed_attention(Tensor query, Tensor key, Tensor value, int[] lengths, float? scale=None, "
    "bool enable_gqa=False) -> Tensor"
)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=enable_gqa) for q, k, v in pieces], 2
    )


_library.impl("packed_attention", _packed_attention, "CompositeImplicitAutograd")
PACKED = torch.ops.tokcompile.packed_attention.default


@register_flop_formula(torch.ops.tokcompile.packed_attention)
def _flops(query: Any, key: Any, value: Any, lengths: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    pairs = sum(n * n for n in lengths)
    return 2 * query[0] * query[1] * pairs * (query[-1] + value[-1])


def block_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """bool ``[1, 1, N, N]``: True within the pieces of these lengths."""
    ends = torch.tensor(list(lengths), device=device).cumsum(0)
    piece = torch.bucketize(torch.arange(sum(lengths), device=device), ends, right=True)
    return (piece[:, None] == piece[None])[None, None]


def pack(captured: Captured) -> int:
    """Join attentions piece by piece to :data:`PACKED`, or to plain attention of one piece; returns how many."""
    count = 0
    for node in list(captured.graph.find_nodes(op="call_function", target=aten.cat.default)):
        count += _pack(captured, node)
    return count


#: Layout between the attention of a piece and the place where the pieces are joined.
_LAYOUT = {"transpose", "permute", "contiguous", "clone", "reshape", "view", "_unsafe_view"}


@dataclass
class _Branch:
    attention: fx.Node
    steps: list[fx.Node]


def _pack(captured: Captured, join: fx.Node) -> bool:
    tensors: Any = join.args[0]
    found = [_branch(tensor, join) for tensor in tensors]
    branches = [branch for branch in found if branch is not None]
    if len(branches) != len(found) or len({branch.attention for branch in branches}) != len(branches):
        return False
    operands = [_whole([branch.attention.args[i] for branch in branches]) for i in range(3)]
    if any(operand is None for operand in operands):
        return False
    lengths = [_shape(branch.attention.args[0])[2] for branch in branches]
    if any([_shape(b.attention.args[i])[2] for b in branches] != lengths for i in (1, 2)):
        return False
    options = [_options(branch.attention) for branch in branches]
    dim = join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)
    steps = _steps(branches, lengths, int(dim) % join.meta["val"].dim())  # type: ignore[arg-type]
    if None in options or any(option != options[0] for option in options) or steps is None:
        return False
    scale, grouped = options[0]  # type: ignore[misc]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if len(lengths) == 1:
            result = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
        else:
            result = PACKED(query, key, value, lengths, scale, grouped)
        for target, args in steps:
            result = target(result, *args)
        return result

    first = branches[0].attention
    result = inline(captured, attention, [operand for operand in operands if operand is not None], join)
    node = result
    while True:
        node.meta.update({key: first.meta[key] for key in ("nn_module_stack", "stack_trace") if key in first.meta})
        if node.target is PACKED or node.target is aten.scaled_dot_product_attention.default:
            break
        node = node.args[0]
    join.replace_all_uses_with(result)
    _erase(join)
    return True


def _erase(node: fx.Node) -> None:
    todo = [node]
    while todo:
        dead = todo.pop()
        if not dead.users and dead.op == "call_function" and not dead._erased:
            sources = dead.all_input_nodes
            dead.graph.erase_node(dead)
            todo += sources


def _shape(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)


def _branch(node: fx.Node, user: fx.Node) -> _Branch | None:
    """The attention that a joined tensor comes from, and the layout in between, from the attention on."""
    steps: list[fx.Node] = []
    while list(node.users) == [user]:
        if node.target is aten.scaled_dot_product_attention.default:
            return _Branch(node, steps[::-1]) if len(_shape(node)) == 4 else None
        if op_name(node) not in _LAYOUT:
            return None
        steps.append(node)
        user, node = node, node.args[0]  # type: ignore[assignment]
    return None


def _whole(pieces: Sequence[Any]) -> fx.Node | None:
    """What ``pieces`` are all the pieces of, in order, along the axis of tokens."""
    splits = {piece.args[0] for piece in pieces if isinstance(piece, fx.Node) and piece.target is operator.getitem}
    if len(splits) != 1 or [piece.args[1:] for piece in pieces] != [(i,) for i in range(len(pieces))]:
        return None
    split: Any = splits.pop()
    if op_name(split) not in ("split", "split_with_sizes", "chunk", "tensor_split") or len(split.meta["val"]) != len(
        pieces
    ):
        return None
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    source: fx.Node = split.args[0]
    sizes = [value.shape[2] for value in split.meta["val"] if value.dim() == 4]
    if dim not in (2, -2) or len(sizes) != len(pieces) or not all(type(size) is int for size in sizes):
        return None
    return source


def _options(attention: fx.Node) -> tuple[float | None, bool] | None:
    """Scale and grouping; None where there is a mask, dropout or causality."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = {**dict(zip(names, attention.args, strict=False)), **attention.kwargs}
    if given.get("attn_mask") is not None or given.get("dropout_p") or given.get("is_causal"):
        return None
    return given.get("scale"), bool(given.get("enable_gqa", False))


def _steps(branches: Sequence[_Branch], lengths: Sequence[int], dim: int) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """The layout of all pieces as layout of the whole; None where that does not leave the tokens along ``dim``."""
    if len({tuple(step.target for step in branch.steps) for branch in branches}) != 1:
        return None
    place, result = 2, list[tuple[Any, tuple[Any, ...]]]()
    for same in zip(*(branch.steps for branch in branches), strict=True):
        name, step = op_name(same[0]), same[0]
        if name in ("reshape", "view", "_unsafe_view"):
            shapes = [_by_length(node, place, length) for node, length in zip(same, lengths, strict=True)]
            if shapes[0] is None or any(shape != shapes[0] for shape in shapes):
                return None
            if _shape(step) == _shape(step.args[0]):
                continue
            place, shape = shapes[0]
            result.append((step.target, ([*shape[:place], sum(lengths), *shape[place + 1 :]],)))
            continue
        if any(node.args[1:] != step.args[1:] or node.kwargs for node in same):
            return None
        if name in ("transpose", "permute"):
            rank = len(_shape(step))
            order = list(range(rank))
            if name == "permute":
                order = [axis % rank for axis in step.args[1]]  # type: ignore[union-attr]
            else:
                a, b = (axis % rank for axis in step.args[1:])  # type: ignore[operator]
                order[a], order[b] = order[b], order[a]
            place = order.index(place)
        result.append((step.target, tuple(step.args[1:])))
    return result if place == dim else None


def _by_length(node: fx.Node, place: int, length: int) -> tuple[int, list[Any]] | None:
    """The shape that a view gives, with 0 for the axis of tokens, and the number of that axis."""
    before, after = _shape(node.args[0]), _shape(node)
    front = 1
    for size in before[:place]:
        front *= size
    left = 1
    for i, size in enumerate(after):
        if left == front and size == length:
            return i, [*after[:i], 0, *after[i + 1 :]]
        left *= size
    return None
