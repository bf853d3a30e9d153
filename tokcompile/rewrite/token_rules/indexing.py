"""Rules for slices and the marker operators, and for picking entries by places that are not those of tokens.

The functions without a decorator are the second half of the rules in ``rows``, which sees first whether an index says
where rows come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcompile.capture.ops import is_in_place
from tokcompile.capture.sizes import MAX_INT, equal, product, shape_of
from tokcompile.rewrite.labels import Axis, Dim, Factor, is_token, is_tracked, plain
from tokcompile.rewrite.token_axis import Follower, rule

aten = torch.ops.aten


@rule(aten.slice.Tensor)
def _slice(self: Follower, node: fx.Node) -> Any:
    dims, shape = self.known(node.args[0]), shape_of(node)
    args: list[Any] = [*node.args, *[None] * 5]
    dim = int(args[1] or 0) % len(dims)
    start, end, step = args[2] or 0, MAX_INT if args[3] is None else args[3], args[4] or 1
    along = dims[dim]
    if not is_token(along):
        return tuple(
            plain(shape[i]) if i == dim and not equal(shape[i], product(f.size for f in d)) else d
            for i, d in enumerate(dims)
        )
    before = product(f.size for f in along)
    end_value = end.meta["val"] if isinstance(end, fx.Node) else end
    if isinstance(end_value, int) and end_value < 0:
        end_value = before + end_value
    to_end = (isinstance(end_value, int) and end_value == MAX_INT) or equal(end_value, before)
    if start == 0 and step == 1 and to_end:
        self.flow.full_slices[node] = dim
        return dims
    if len(along) != 1 or step != 1:
        raise self.refuse(node, "a slice takes part of a flattened or strided token axis")
    axis = along[0].axis
    assert axis is not None
    return tuple(
        d if i != dim else self_slice(self, node, axis, start, end_value, to_end, shape[dim])
        for i, d in enumerate(dims)
    )


def self_slice(self: Follower, node: fx.Node, axis: Axis, start: Any, end: Any, to_end: bool, size: Any) -> Dim:
    """A slice of a token axis: allowed where its borders lie among tokens that are all kept."""
    if isinstance(start, fx.Node):
        start = start.meta["val"]
    if axis.parts:
        at: Any = 0
        borders = [at]
        for part in axis.parts:
            at = at + (part.size if isinstance(part, Axis) else part)
            borders.append(at)
        first = axis.size + start if isinstance(start, int) and start < 0 else start
        starts = [i for i, b in enumerate(borders) if equal(b, first)]
        ends = [len(axis.parts)] if to_end else [i for i, b in enumerate(borders) if equal(b, end)]
        if starts and ends and starts[0] < ends[0]:
            picked = axis.parts[starts[0] : ends[0]]
            self.flow.slices[node] = (axis.parts[: starts[0]], picked, to_end)
            if not any(isinstance(p, Axis) for p in picked):
                return plain(size)
            return (Factor(size, picked[0] if len(picked) == 1 else self.concat(picked, size)),)
    if to_end and isinstance(start, int):
        if start < 0 and -start <= axis.suffix:
            return plain(size)
        if 0 < start <= axis.prefix:
            return (Factor(size, self.tail(axis, start)),)
    if isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= axis.prefix:
        return plain(size)
    raise self.refuse(
        node,
        f"a slice [{start}:{'' if to_end else end}] of the token axis {axis} has its border among "
        "tokens that may be dropped; protect them, or cut later",
    )


def select(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    dim, index = int(node.args[1]) % len(dims), node.args[2]  # type: ignore[arg-type]
    if is_token(dims[dim]):
        axis = dims[dim][0].axis
        fits = (
            len(dims[dim]) == 1
            and isinstance(index, int)
            and axis is not None
            and (0 <= index < axis.prefix or -axis.suffix <= index < 0)
        )
        if not fits:
            raise self.refuse(node, f"token {index} is read, and it may be dropped")
    return tuple(d for i, d in enumerate(dims) if i != dim)


def index_select(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    dim = int(node.args[1]) % len(dims)  # type: ignore[arg-type]
    if is_tracked(dims[dim]):
        raise self.refuse(node, "index_select picks tokens or rows")
    return tuple(plain(shape_of(node)[i]) if i == dim else d for i, d in enumerate(dims))


def gather(self: Follower, node: fx.Node) -> Any:
    value, dim, index = node.args[:3]
    rank = len(shape_of(node))
    dim = int(dim) % rank  # type: ignore[arg-type]
    keys = [i if i != dim else "from" for i in range(rank)]
    table = self.align(node, [(value, keys), (index, [i if i != dim else "to" for i in range(rank)])])
    if is_token(table.get("from", ())):
        raise self.refuse(node, "gather picks tokens")
    return self.output(node, [i if i != dim else "to" for i in range(rank)], table)


def scatter(self: Follower, node: fx.Node) -> Any:
    """Writes along a dimension that is no token axis: each token writes into its own row."""
    value, dim, index, source = node.args[:4]
    shape, picked = shape_of(node), shape_of(index)
    rank = len(shape)
    dim = int(dim) % rank  # type: ignore[arg-type]
    keys, written = ([i if i != dim else name for i in range(rank)] for name in ("into", "from"))
    if any(not equal(shape[i], picked[i]) for i in range(rank) if i != dim):
        raise self.refuse(node, "scatter writes a part of the rows")
    table = self.align(node, [(value, keys), (index, written), (source, written)])
    if is_token(table.get("into", ())) or is_token(table.get("from", ())):
        raise self.refuse(node, "scatter picks tokens")
    if is_in_place(node) and self.dims(value) is None and any(is_token(d) for d in table.values()):
        raise self.refuse(node, "tokens are written into a value from outside")
    return self.output(node, keys, table)


def index(self: Follower, node: fx.Node) -> Any:
    """``x[rows, positions]``: positions in the unpruned sequence are mapped to positions among the kept."""
    value, indices = node.args[:2]
    if self.dims(value) is None:
        raise self.refuse(node, "tokens choose entries of a value from outside")
    dims = self.known(value)
    tensors = [(i, t) for i, t in enumerate(indices) if t is not None]  # type: ignore[arg-type]
    if any(t.meta["val"].dtype == torch.bool for _, t in tensors):
        raise self.refuse(node, "a boolean mask picks tokens")
    if any(self.dims(t) is not None for _, t in tensors):
        raise self.refuse(node, "an index is computed from tokens")
    positions = [i for i, _ in tensors]
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise self.refuse(node, "indices with a gap are not followed")
    rank = max(len(shape_of(t)) for _, t in tensors)
    made = [plain(s) for s in shape_of(node)[positions[0] : positions[0] + rank]]
    batch = self.flow.batch
    for i, _ in tensors:
        if is_token(dims[i]):
            if len(dims[i]) != 1:
                raise self.refuse(node, "an index into a flattened token axis")
            rows = 1 if batch is None else batch.size
            if not equal(rows, 1) and not (i - 1 in positions and dims[i - 1] == (Factor(rows, batch),)):
                raise self.refuse(node, "tokens are picked by one index for all rows of the batch")
            if not equal(product(d[0].size for d in made), rows):
                raise self.refuse(node, "an index picks several tokens of a row, and some of them may be dropped")
            by_row = i - 1 in positions and any(f.axis is batch for f in dims[i - 1])
            self.flow.indices[node, i] = dims[i][0].axis, by_row  # type: ignore[assignment]
    return (*dims[: positions[0]], *made, *dims[positions[-1] + 1 :])


def held_rule(self: Follower, node: fx.Node) -> Any:
    """``tokcompile::held(keys [B, H, T, Dh], positions [B, T]) -> [B, T]``: aligned on batch and tokens."""
    table = self.align(node, [(node.args[0], ["b", "h", "t", "d"]), (node.args[1], ["b", "t"])])
    return self.output(node, ["b", "t"], table)


def marker_rule(self: Follower, node: fx.Node) -> Any:
    """A marker that only reads, or gives all tokens back: what follows is not narrowed."""
    return None
