"""Rules for rows that are picked, put in another order and put back: how experts share the work on tokens.

A sort by expert, a ``nonzero`` of the slots that chose one expert: both give rows whose order the values choose. Such
rows are an axis of their own (``Axis.rows``): what is known of a row is a function of its own entry of the dimension
that it comes from, nothing depends on its place. The integers that say where a row comes from (``Flow.positions``)
count entries, so they change when tokens go: they may pick rows and put rows back, may be divided by the number of
slots, and nothing else. Rows that are put back are entries of the old dimension again, each made from itself alone.

One file: picking, putting back and grouping are proved from the same axes and places.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tokcompile.capture.ops import LAYOUT, TRIVIAL, is_in_place, op_name
from tokcompile.capture.sizes import equal, guarded_equal, product, shape_of
from tokcompile.rewrite.labels import Axis, Dim, Dims, Factor, is_token, is_tracked, plain, same_dim, size_of
from tokcompile.rewrite.token_axis import POSITIONS, Follower, overloads, rule
from tokcompile.rewrite.token_rules import indexing
from tokcompile.rewrite.token_rules.pointwise import _along, _nodes, dim_argument, pointwise
from tokcompile.rewrite.token_rules.shapes import _split, getitem

aten = torch.ops.aten


def carry(self: Follower, node: fx.Node) -> None:
    """The result says what its first operand says."""
    held = self.flow.positions.get(node.args[0])  # type: ignore[arg-type]
    if held is not None and node.meta["val"].dtype.is_floating_point:
        raise self.as_number(node)
    if isinstance(held, list) and len(shape_of(node)) == 1 and len(held) == 1:
        held = held[0]
    if held is not None:
        self.flow.positions[node] = held


POSITIONS.update(
    dict.fromkeys(
        [
            t
            for t in overloads(
                *("to", "_to_copy", "clone", "contiguous", "alias", "detach", "view", "reshape", "_unsafe_view"),
                *("flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "tile"),
            )
            if t is not aten.view.dtype
        ],
        carry,
    )
)
POSITIONS.update(
    dict.fromkeys(overloads("zeros_like", "ones_like", "empty_like", "full_like", "rand_like"), lambda self, node: None)
)


def _carry_slice(self: Follower, node: fx.Node) -> None:
    if isinstance(self.flow.positions.get(node.args[0]), list):  # type: ignore[arg-type]
        raise self.as_number(node)
    carry(self, node)


POSITIONS[aten.slice.Tensor] = _carry_slice


@rule(aten.one_hot.default)
def _one_hot(self: Follower, node: fx.Node) -> Any:
    if len(node.args) < 2 or node.args[1] == -1:
        raise self.refuse(node, "one_hot takes the number of classes from the largest value among the tokens")
    return (*self.known(node.args[0]), plain(shape_of(node)[-1]))


@rule(operator.getitem, positions=True)
def _item(self: Follower, node: fx.Node) -> Any:
    held = self.flow.positions.get(node.args[0])  # type: ignore[arg-type]
    if held is not None and held[node.args[1]] is not None:
        self.flow.positions[node] = held[node.args[1]]
    return getitem(self, node)


# .. rows in an order that values choose


def _first(node: fx.Node, count: int) -> tuple[Any, ...]:
    return tuple(node.args[:count])


def _one_to_one(self: Follower, node: Any) -> Axis | None:
    """The axis of the rows, if ``node [N]`` says for each of them which entry it is, or the other way round."""
    dims, held = self.dims(node), self.flow.positions.get(node)
    if dims is None or held is None or isinstance(held, list) or len(dims) != 1:
        return None
    for here, there in ((dims[0], held), (held, dims[0])):
        axis = here[0].axis if len(here) == 1 else None
        if axis is not None and axis.rows and same_dim(axis.rows, there):
            return axis
    return None


def _chosen(node: fx.Node, base: Dim, size: Any, complete: bool) -> Dim:
    kind = "token" if is_token(base) else "batch"
    axis = Axis(f"rows by {node.name}", size, kind, rows=base, source=node, complete=complete)
    return (Factor(size, axis),)


@rule(*overloads("sort", "argsort"), positions=True)
def _sort(self: Follower, node: fx.Node) -> Any:
    value: Any = node.args[0]
    dims, only = self.known(value), op_name(node) == "argsort"
    held = self.flow.positions.get(value)
    if len(dims) != 1 or not is_tracked(dims[0]):
        if held is not None:
            raise self.as_number(node)
        return _along(self, node)
    if held is not None:
        axis = _one_to_one(self, value)
        if axis is None or not axis.complete or _descending(node):
            raise self.as_number(node)
        self.flow.positions[node] = dims[0] if only else [held, dims[0]]
        return (held,) if only else [(held,), (held,)]
    rows = _chosen(node, dims[0], size_of(dims[0]), complete=True)
    self.flow.positions[node] = dims[0] if only else [None, dims[0]]
    return (rows,) if only else [(rows,), (rows,)]


def _descending(node: fx.Node) -> bool:
    return bool(node.kwargs.get("descending", node.args[2] if len(node.args) > 2 else False))


@rule(*overloads("nonzero", "nonzero_numpy"), aten.where.default)
def _nonzero(self: Follower, node: fx.Node) -> Any:
    """The entries that are true, one row each."""
    dims = self.known(node.args[0])
    several = isinstance(node.meta["val"], (tuple, list))
    size = (node.meta["val"][0] if several else node.meta["val"]).shape[0]
    rows: Dim = plain(size)
    if any(is_tracked(d) for d in dims):
        rows = _chosen(node, tuple(f for d in dims for f in d), size, complete=False)
        self.flow.positions[node] = [d if is_tracked(d) else None for d in dims]
    return [(rows,) for _ in dims] if several else (rows, plain(len(dims)))


@rule(aten.unbind.int, aten.select.int, positions=True)
def _column(self: Follower, node: fx.Node) -> Any:
    held = self.flow.positions.get(node.args[0])  # type: ignore[arg-type]
    if held is None:
        return (_split if node.target is aten.unbind.int else indexing.select)(self, node)
    dims = self.known(node.args[0])
    at = dim_argument(node, 1, 0, len(dims))
    if not isinstance(held, list) or at != 1:
        raise self.as_number(node)
    if node.target is aten.unbind.int:
        self.flow.positions[node] = held
        return [dims[:1] for _ in held]
    if held[node.args[2]] is not None:  # type: ignore[index]
        self.flow.positions[node] = held[node.args[2]]  # type: ignore[index]
    return dims[:1]


@rule(
    *overloads("floor_divide", "floor_divide_", "remainder", "fmod"),
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    positions=True,
)
def _divide(self: Follower, node: fx.Node) -> Any:
    """``place // slots`` is the place of the token, ``place % slots`` the slot."""
    held = self.flow.positions.get(node.args[0])  # type: ignore[arg-type]
    by: Any = node.args[1]
    if held is None and by not in self.flow.positions:
        return pointwise(self, node)
    number = by.meta["val"] if isinstance(by, fx.Node) else by
    floors = op_name(node) != "div" or node.kwargs.get("rounding_mode") in ("floor", "trunc")
    whole = isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)
    if held is None or isinstance(held, list) or not whole or not floors or is_in_place(node):
        raise self.as_number(node)
    starts = [i for i in range(len(held) + 1) if equal(product(f.size for f in held[i:]), number)]
    if not starts:
        raise self.as_number(node)
    rest = op_name(node) in ("remainder", "fmod")
    start = starts[0 if rest else -1]  # axes of one entry stay with what is left
    inner = held[start:]
    if is_token(inner):
        self.flow.divisors[node] = inner
    left = inner if rest else held[:start]
    if is_tracked(left):
        self.flow.positions[node] = left
    return self.known(node.args[0])


# .. pick


def _picked(self: Follower, node: fx.Node, value: Any, chosen: list[tuple[int, fx.Node]]) -> Dims:
    """Dimensions of ``value`` with those that ``chosen`` (dimension, index) picks from as the indices count them."""
    dims = list(self.known(value))
    outside = self.dims(value) is None
    for i, index in chosen:
        held = self.flow.positions.get(index)
        if held is None:
            if is_tracked(dims[i]):
                raise self.refuse(node, "an index is computed from tokens")
            continue
        if outside and guarded_equal(size_of(dims[i]), size_of(held)):
            dims[i] = held
        elif outside or isinstance(held, list) or not same_dim(dims[i], held):
            raise self.refuse(node, f"places counted along {held} pick from {dims[i]}")
    if outside and any(is_token(d) for d in dims):
        self.demand(node, value, list(range(len(dims))), dims, {})
    return tuple(dims)


@rule(aten.index.Tensor, positions=True)
def _index_rows(self: Follower, node: fx.Node) -> Any:
    value: Any = node.args[0]
    tensors: list[tuple[int, Any]] = [(i, t) for i, t in enumerate(node.args[1]) if t is not None]  # type: ignore[arg-type]
    places = [i for i, _ in tensors]
    if value in self.flow.positions:
        raise self.as_number(node)
    if all(self.dims(t) is None for _, t in tensors) or any(t.meta["val"].dtype == torch.bool for _, t in tensors):
        return indexing.index(self, node)
    if any(self.dims(t) is None for _, t in tensors):
        raise self.refuse(node, "an index is computed from tokens, and another one is not")
    if places != list(range(places[0], places[0] + len(places))):
        raise self.refuse(node, "indices with a gap are not followed")
    dims = _picked(self, node, value, tensors)
    rank = max(len(shape_of(t)) for _, t in tensors)
    table = self.align(node, [(t, list(range(rank))) for _, t in tensors])
    made = shape_of(node)[places[0] : places[0] + rank]
    labels = [table.get(i, plain(s)) if not equal(s, 1) else plain(s) for i, s in enumerate(made)]
    return (*dims[: places[0]], *labels, *dims[places[-1] + 1 :])


@rule(aten.index_select.default, positions=True)
def _select_rows(self: Follower, node: fx.Node) -> Any:
    value, at, index = _first(node, 3)
    if value in self.flow.positions:
        raise self.as_number(node)
    if self.dims(index) is None:
        return indexing.index_select(self, node)
    dims = self.known(value)
    at = int(at) % len(dims)
    dims = _picked(self, node, value, [(at, index)])
    return (*dims[:at], self.known(index)[0], *dims[at + 1 :])


@rule(aten.gather.default, positions=True)
def _gather_rows(self: Follower, node: fx.Node) -> Any:
    value, at, index = _first(node, 3)
    if value in self.flow.positions:
        raise self.as_number(node)
    if index not in self.flow.positions:
        return indexing.gather(self, node)
    rank = len(shape_of(node))
    at = int(at) % rank
    _picked(self, node, value, [(at, index)])
    keys = [i if i != at else "to" for i in range(rank)]
    table = self.align(node, [(value, [i if i != at else "from" for i in range(rank)]), (index, keys)])
    return self.output(node, keys, table)


# .. put back


@rule(*overloads("index_put", "index_put_"), positions=True)
def _put(self: Follower, node: fx.Node) -> Any:
    value, indices, source = node.args[:3]
    adds = bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))
    tensors: list[tuple[int, Any]] = [(i, t) for i, t in enumerate(indices) if t is not None]  # type: ignore[arg-type]
    if len(tensors) != 1 or tensors[0][1] not in self.flow.positions:
        raise self.refuse(node, "index_put writes to places that are not those of the tokens that it writes")
    return _put_rows(self, node, value, tensors[0][0], tensors[0][1], source, adds)


@rule(*overloads("index_add", "index_add_", "index_copy", "index_copy_"), positions=True)
def _add(self: Follower, node: fx.Node) -> Any:
    value, at, index, source = _first(node, 4)
    if index not in self.flow.positions:
        raise self.refuse(node, f"{op_name(node)} writes to places that are not those of the tokens that it writes")
    at = int(at) % len(shape_of(node))
    return _put_rows(self, node, value, at, index, source, "add" in op_name(node))


def _put_rows(self: Follower, node: fx.Node, value: Any, at: int, index: Any, source: Any, adds: bool) -> Any:
    """``value[index] = source`` or ``+= source`` along dimension ``at``, by ``index [N]``."""
    held, one = self.flow.positions[index], _one_to_one(self, index)
    if value in self.flow.positions or isinstance(held, list) or len(shape_of(index)) != 1:
        raise self.as_number(node)
    if not adds and one is None:
        raise self.refuse(node, "several rows are written to one place, and the last one counts")
    if _counts_up(source):
        if adds or one is None or not one.complete or len(shape_of(node)) != 1 or not _fresh(node, value):
            raise self.as_number(node)
        self.flow.inverses[node] = index, one
        self.flow.positions[node] = self.known(index)[0]
        return (held,)
    if source in self.flow.positions:
        raise self.as_number(node)
    rank = len(shape_of(node))
    keys = [i if i != at else "into" for i in range(rank)]
    rows = [i if i != at else "row" for i in range(rank)]
    into = self.known(value)[at]
    if self.dims(value) is not None and not same_dim(into, held):
        if not (
            op_name(value) in FRESH and is_token(into) and same_dim(into, self.known(index)[0]) and one and one.complete
        ):
            raise self.refuse(node, f"places counted along {held} are written to {into}")
        into = held  # an empty copy of the rows, to be filled in the order of the entries
    table = self.align(node, [(source, rows), (index, ["row"])])
    if self.dims(value) is None:
        if not guarded_equal(shape_of(value)[at], size_of(held)):
            raise self.refuse(node, f"places counted along {held} are written to a value from outside")
        if is_in_place(node) and not _fresh(node, value):
            raise self.refuse(node, "tokens are written into a value from outside")
        dims = [table.get(k, plain(s)) if k != "into" else held for k, s in zip(keys, shape_of(value), strict=True)]
        self.demand(node, value, keys, dims, {})
        return tuple(dims)
    table = {key: dim for key, dim in table.items() if key != "row"}
    known = dict(zip(keys, self.known(value), strict=True))
    for key, dim in table.items():
        if not same_dim(known[key], dim):
            raise self.refuse(node, f"rows of {dim} are written to {known[key]}")
    return tuple(held if k == "into" else known[k] for k in keys)


@rule(
    aten.scatter.value,
    aten.scatter.src,
    aten.scatter_.value,
    aten.scatter_.src,
    aten.scatter_add.default,
    aten.scatter_add_.default,
    positions=True,
)
def _scatter_rows(self: Follower, node: fx.Node) -> Any:
    value, at, index, source = _first(node, 4)
    if index not in self.flow.positions:
        if value in self.flow.positions or source in self.flow.positions:
            raise self.as_number(node)
        return indexing.scatter(self, node)
    rank, adds = len(shape_of(node)), "add" in op_name(node)
    at = int(at) % rank
    if rank == 1:
        return _put_rows(self, node, value, at, index, source, adds)
    shape, other = shape_of(value), shape_of(index)
    held = self.flow.positions[index]
    if not adds or isinstance(held, list) or any(not equal(shape[i], other[i]) for i in range(rank) if i != at):
        raise self.refuse(node, "scatter writes a part of the rows, or several of them to one place")
    rows = [i if i != at else "row" for i in range(rank)]
    table = self.align(node, [(source, rows), (index, rows)])
    dims = [table.get(i, plain(s)) if i != at else held for i, s in enumerate(shape)]
    if self.dims(value) is None:
        if is_in_place(node) and not _fresh(node, value):
            raise self.refuse(node, "tokens are written into a value from outside")
        if not guarded_equal(shape[at], size_of(held)):
            raise self.refuse(node, f"places counted along {held} are written to a value from outside")
        self.demand(node, value, list(range(rank)), dims, {})
    elif not all(same_dim(a, b) for a, b in zip(self.known(value), dims, strict=True)):
        raise self.refuse(node, f"places counted along {held} are written to {self.known(value)[at]}")
    return tuple(dims)


FRESH = {"empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full"} | {
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
}


def _fresh(node: fx.Node, value: Any) -> bool:
    """Whether ``value`` was made for ``node`` to write into."""
    return op_name(value) in FRESH and list(value.users) == [node]


def _counts_up(source: Any) -> bool:
    """Whether it is 0, 1, 2 ... in this order."""
    if not isinstance(source, fx.Node) or "arange" not in str(source.target):
        return False
    return source.target is aten.arange.default or bool(
        source.target in (aten.arange.start, aten.arange.start_step)
        and source.args[0] == 0
        and (len(source.args) < 3 or source.args[2] == 1)
    )


# .. groups of rows


@rule(*overloads("histc", "bincount"))
def _histogram(self: Follower, node: fx.Node) -> Any:
    value: Any = node.args[0]
    if any(self.dims(n) is not None for n in _nodes(node.args[1:])):
        raise self.refuse(node, "a histogram with weights is not followed")
    if any(is_token(d) for d in self.known(value)):
        self.flow.counts.append(node)
    return tuple(plain(s) for s in shape_of(node))


@rule(aten._grouped_mm.default, "grouped_mm", "grouped_mm_fallback")
def _grouped(self: Follower, node: fx.Node) -> Any:
    """``grouped_mm(rows [N, I], weights [E, I, O], ends [E])``: the group of a row must follow from its own key."""
    x, weight = node.args[:2]
    ends = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    dims = self.known(x)
    if self.dims(weight) is not None:
        raise self.refuse(node, "the weights of a grouped product depend on tokens")
    if len(dims) != 2 or is_token(dims[1]):
        raise self.refuse(node, "a grouped product sums over tokens")
    if not is_token(dims[0]):
        return (dims[0], plain(shape_of(node)[-1]))
    axis = dims[0][0].axis if len(dims[0]) == 1 else None
    if axis is None or not axis.rows or axis.source is None or not _ends_by_key(ends, axis.source):
        raise self.refuse(
            node,
            "where the groups of rows end does not follow from counting the keys that the rows were sorted by (a "
            "limit on the rows of an expert?), so the expert of a token depends on the other tokens",
        )
    return (dims[0], plain(shape_of(node)[-1]))


def _ends_by_key(ends: Any, sort: fx.Node) -> bool:
    """Whether ``ends`` are the running sums of a histogram of what ``sort`` sorted, smallest first."""
    if op_name(sort) not in ("sort", "argsort") or _descending(sort):
        return False
    total = _strip(ends)
    if total is None or op_name(total) != "cumsum" or len(shape_of(total)) != 1:
        return False
    counts = _strip(total.args[0])
    if counts is None or op_name(counts) not in ("histc", "bincount"):
        return False
    if op_name(counts) == "histc":
        low, high = (
            counts.args[i] if len(counts.args) > i else counts.kwargs.get(n, 0) for i, n in ((2, "min"), (3, "max"))
        )
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or not low <= 0 < high:
            return False  # without a range the bins lie between the smallest and the largest key of all tokens
    key, sorted_by = _strip(counts.args[0]), _strip(sort.args[0])
    if key is not None and key.target is operator.getitem and key.args[0] is sort and key.args[1] == 0:
        key = sorted_by
    return key is not None and key is sorted_by and _from_zero(key)


def _strip(node: Any) -> fx.Node | None:
    """What ``node`` is but for casts and layout; None if something writes into it on the way."""
    while isinstance(node, fx.Node):
        if any(is_in_place(user) and user.args[0] is node for user in node.users):
            return None
        if op_name(node) not in TRIVIAL | LAYOUT:
            return node
        node = node.args[0]
    return None


def _from_zero(key: fx.Node) -> bool:
    """Whether ``key`` holds numbers from 0 on: the places that a choice along a dimension gives, or clamped ones."""
    name = op_name(key)
    if key.target is operator.getitem:
        return bool(key.args[1] == 1) and op_name(key.args[0]) in ("topk", "sort", "max", "min")  # type: ignore[arg-type]
    if name in ("clamp", "clip"):
        low = key.args[1] if len(key.args) > 1 else key.kwargs.get("min")
        return isinstance(low, int) and low >= 0
    if name == "where" and len(key.args) == 3:
        return all(isinstance(a, fx.Node) and (s := _strip(a)) is not None and _from_zero(s) for a in key.args[1:])
    return name in ("argmax", "argmin", "argsort", "multinomial")
