"""Remove tokens at a cut of the residual stream: ``narrow(captured, cuts)``.

The value at a cut loses the tokens that are not in its index, every value that enters the region below from
outside and carries the token axis is indexed alike (both axes of a mask, cos, sin, position ids, labels), the
sizes that views name are written anew. Lowering derives all shapes again, so that anything inconsistent fails when
the graph is compiled and not at run time. Each row of the batch has its own kept tokens, in ascending order.

One file: nearly all of it is the walk over the graph, which says why it is one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import ancestors, refuse
from tokcompile.capture.markers import FEATURE_SCORES, HELD, RESTORED
from tokcompile.capture.ops import sdpa_arguments
from tokcompile.capture.sizes import MAX_INT, equal, expr, shape_of
from tokcompile.capture.trace import derive, inline
from tokcompile.rewrite.empty_slots import check_ragged
from tokcompile.rewrite.labels import Axis, Demand, Dim, Dims, Factor, Flow, is_token, is_tracked, plain, size_of
from tokcompile.rewrite.token_axis import RULES, Follower
from tokcompile.rewrite.token_rules.indexing import held_rule, marker_rule
from tokcompile.rewrite.token_rules.pointwise import dim_argument
from tokcompile.rewrite.token_rules.shapes import RESIZED

aten = torch.ops.aten
RULES[HELD] = held_rule
RULES[FEATURE_SCORES] = marker_rule
RULES[RESTORED] = marker_rule


@dataclass(eq=False)
class Cut:
    """A value that loses tokens.

    Attributes:
        node: the value, for example the residual stream ``[B, S, D]``.
        index: int64 ``[B, K]`` node: the kept positions of each row, ascending; empty slots in front hold -1.
        size: K, an int or a SymInt node.
        ragged: some rows may have empty slots (their entries are masked wherever tokens look at each other).
        token_dim, batch_dim: the dimensions of ``node``.
        narrowed: the value after the cut, if it is there already; else ``node`` is indexed.
        prefix, suffix: how many tokens at either end are known to be kept in every row.
        aside: values computed from ``node`` that stay as they are, whatever they are made of.
    """

    node: fx.Node
    index: fx.Node
    size: Any
    ragged: bool = False
    token_dim: int = 1
    batch_dim: int = 0
    narrowed: fx.Node | None = None
    prefix: int = 0
    suffix: int = 0
    aside: tuple[fx.Node, ...] = ()


def narrow(captured: Captured, cuts: Sequence[Cut]) -> Flow:
    """Narrow the token axis below ``cuts``, in place.

    Cuts that share an index share their axis. For cuts at different depths of one stack call this once for each,
    the upper one first.

    Returns:
        The labels below the cuts (before narrowing).

    Raises:
        NarrowError: something below a cut cannot be narrowed; the graph is unchanged.
    """
    narrower = _Narrower(captured, cuts)
    flow = narrower.analyse()
    narrower.rewrite()
    return flow


def check(
    captured: Captured,
    node: fx.Node,
    *,
    prefix: int = 0,
    suffix: int = 0,
    ragged: bool = False,
    token_dim: int = 1,
    batch_dim: int = 0,
) -> Flow:
    """Whether the token axis of ``node`` can be narrowed; raises :class:`NarrowError` and changes nothing."""
    shape = shape_of(node)
    batch = Axis("batch", shape[batch_dim], kind="batch")
    axis = Axis("tokens", shape[token_dim], prefix=prefix, suffix=suffix)
    if ragged:
        axis.prefix = 0
    flow = Follower(captured.graph, batch).follow({node: _labels(shape, token_dim, axis, batch_dim, batch)})
    check_ragged(flow, {axis} if ragged else set())
    return flow


def _labels(shape: Sequence[Any], token_dim: int, axis: Axis, batch_dim: int, batch: Axis) -> Dims:
    dims = [plain(s) for s in shape]
    dims[token_dim] = (Factor(axis.size, axis),)
    dims[batch_dim] = (Factor(batch.size, batch),)
    return tuple(dims)


class _Narrower:
    """The walk below the cuts of one graph.

    One class: what is indexed at a node decides what its users need, and every rule reads the same labels and indices.
    """

    def __init__(self, captured: Captured, cuts: Sequence[Cut]) -> None:
        self.captured, self.graph, self.cuts = captured, captured.graph, list(cuts)
        first = cuts[0]
        self.batch = Axis("batch", shape_of(first.node)[first.batch_dim], kind="batch")
        self.axes: dict[fx.Node, Axis] = {}
        self.roots: dict[Axis, Cut] = {}
        self.fixed = ancestors([c.index for c in cuts] + [c.narrowed for c in cuts if c.narrowed is not None])
        self.fixed |= {c.index for c in cuts} | {c.narrowed for c in cuts if c.narrowed is not None}
        self.fixed |= {n for c in cuts for n in c.aside} | ancestors(n for c in cuts for n in c.aside)
        self._index: dict[Axis, fx.Node] = {}
        self._alive: dict[Axis, fx.Node | None] = {}
        self._size: dict[Axis, Any] = {}
        self._sides: dict[Any, fx.Node] = {}

    # .. analysis

    def analyse(self) -> Flow:
        start: dict[fx.Node, Dims] = {}
        for cut in self.cuts:
            shape = shape_of(cut.node)
            axis = self.axes.get(cut.index)
            if axis is None:
                # padding goes in front, so the first tokens of a ragged axis are not in its first slots
                axis = self.axes[cut.index] = Axis(
                    "tokens", shape[cut.token_dim], suffix=cut.suffix, prefix=0 if cut.ragged else cut.prefix
                )
                self.roots[axis] = cut
            start[cut.node] = _labels(shape, cut.token_dim, axis, cut.batch_dim, self.batch)
        follower = Follower(self.graph, self.batch)
        follower.skip = self.fixed - set(start)  # what computes the kept index is not below the cut
        self.flow = follower.follow(start)
        check_ragged(self.flow, {axis for axis, cut in self.roots.items() if cut.ragged})
        return self.flow

    # .. rewriting

    def rewrite(self) -> None:
        replaced: dict[fx.Node, fx.Node] = {}
        order = list(self.graph.nodes)
        position = {n: i for i, n in enumerate(order)}
        places = {
            cut: _after(order, [cut.node, cut.index, *([cut.size] if isinstance(cut.size, fx.Node) else [])])
            for cut in self.cuts
        }
        for cut in sorted(self.cuts, key=lambda c: position[places[c]]):
            at = places[cut]
            if cut.narrowed is None:
                replaced[cut.node] = self._gather(cut.node, self.flow.labels[cut.node], at)
            else:
                replaced[cut.node] = cut.narrowed
        new = set(replaced.values())
        ragged = any(cut.ragged for cut in self.cuts)
        self._detach_sizes(order)
        for node in order:
            if node not in self.flow.labels or (node in self.fixed and node not in replaced):
                if node.op == "output":
                    node.args = fx.map_arg(node.args, lambda n: replaced.get(n, n))
                continue
            if node in new:
                continue
            if node in replaced:
                continue
            swap = dict(replaced)
            for demand in self.flow.demands.get(node, ()):
                swap[demand.side] = self._side(demand, node)
            _substitute(node, swap)
            self._rewrite_node(node)
            if ragged:
                # what is traced further down for empty slots must see shapes after the cut
                if self._reads_size(node):
                    self._restate_node(node)
                else:
                    derive(self.captured, [node])
        if not ragged:
            self._restate(replaced)
        self.graph.lint()
        self.captured.graph_module.recompile()

    def _rewrite_rows(self, node: fx.Node) -> None:
        if node in self.flow.repeats:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "output_size"}
        if node in self.flow.divisors:
            node.args = (node.args[0], self._dim_size(self.flow.divisors[node], node), *node.args[2:])
        if node in self.flow.inverses:
            order, axis = self.flow.inverses[node]
            size = self.size(axis, node)
            count = inline(self.captured, lambda o, n: torch.arange(n, device=o.device), [order, size], node)
            empty = inline(self.captured, lambda o, n: o.new_empty(n), [order, size], node)
            at = 3 if len(node.args) > 3 and node.args[2] is order else 2
            node.args = (empty, *node.args[1:at], count, *node.args[at + 1 :])

    def _restate(self, skip: Collection[fx.Node]) -> None:
        """Give every value below the cut the sizes that its labels say.

        Lowering runs the whole graph on fake tensors once, and fails where an operation disagrees. Doing that here,
        for each cut, took half of the time of a rewrite (24 layers).
        """
        with self.captured.fake_mode, enable_python_dispatcher():
            for node, dims in self.flow.labels.items():
                if dims is not None and node not in skip:
                    node.meta["val"] = self._resized(node.meta["val"], dims)

    def _reads_size(self, node: fx.Node) -> bool:
        """Whether ``node`` holds rows whose number is read off values: deriving it would make up another symbol."""
        axes = [f.axis for dims in _each(self.flow.labels[node]) for d in dims for f in d if f.axis is not None]
        return any(axis.rows and not axis.complete for axis in axes)

    def _restate_node(self, node: fx.Node) -> None:
        with self.captured.fake_mode, enable_python_dispatcher():
            node.meta["val"] = self._resized(node.meta["val"], self.flow.labels[node])

    def _resized(self, value: Any, dims: Any) -> Any:
        if isinstance(dims, list):
            return [v if d is None else self._resized(v, d) for v, d in zip(value, dims, strict=True)]
        if not isinstance(value, torch.Tensor) or not any(is_token(d) for d in dims):
            return value
        shape = [
            math.prod(self._new_size(f) for f in d) if is_token(d) else s
            for d, s in zip(dims, value.shape, strict=True)
        ]
        return torch.empty(shape, dtype=value.dtype, device=value.device)

    def _resizes(self, dim: Dim) -> bool:
        """Whether the size of ``dim`` is another one below the cut; that of picked rows is read off the values."""
        axes = [f.axis for f in dim if f.axis is not None and f.axis.kind == "token"]
        return any(axis.complete or not axis.rows for axis in axes)

    def _new_size(self, factor: Factor) -> Any:
        axis = factor.axis
        if axis is None or axis.kind != "token":
            return factor.size
        if axis in self.roots:
            size = self.roots[axis].size
            return size.meta["val"] if isinstance(size, fx.Node) else size
        if axis.base is not None:
            return self._new_size(Factor(axis.base.size, axis.base)) - axis.start
        if axis.rows:
            return math.prod(map(self._new_size, axis.rows)) if axis.complete else factor.size
        return sum(self._new_size(Factor(p.size, p)) if isinstance(p, Axis) else p for p in axis.parts)

    def _rewrite_node(self, node: fx.Node) -> None:
        dims = self.flow.sizes.get(node)
        if dims is not None:
            if node.target in RESIZED:
                old = [None if is_token(d) else self.number(size_of(d), node) for d in dims]
                node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], old), {}
            else:
                old = list(node.args[1])  # type: ignore[arg-type]
            sizes = [self._dim_size(d, node) if is_token(d) else old[i] for i, d in enumerate(dims)]
            node.args = (node.args[0], sizes, *node.args[2:])
        if node in self.flow.full_slices:
            args = [*list(node.args), *[None] * (4 - len(node.args))]
            args[2], args[3] = args[2] or 0, MAX_INT
            node.args = tuple(args)
        if node in self.flow.slices:
            before, picked, to_end = self.flow.slices[node]
            start = self._parts_size(before, node)
            end = MAX_INT if to_end else self._sum(start, self._parts_size(picked, node), node)
            node.args = (*node.args[:2], start, end, *node.args[4:])
        for (user, position), (axis, by_row) in self.flow.indices.items():
            if user is node:
                self._map_index(node, position, axis, by_row)
        self._rewrite_rows(node)
        if node in self.flow.attention:
            self._mask_empty(node, *self.flow.attention[node])
        if node.target is aten.cross_entropy_loss.default:
            self._ignore_empty(node)
        if node.target is HELD:
            token = next((f.axis for f in self.flow.labels[node][1]), None)
            alive = self.alive(token, node) if token is not None else None
            if alive is not None:
                derive(self.captured, [node])
                self._after(node, lambda held, ok: torch.where(ok, held, -1), [alive])

    def _after(self, node: fx.Node, function: Callable[..., Any], extra: list[fx.Node]) -> None:
        """Replace ``node`` for all its users by ``function(node, *extra)``."""
        users = list(node.users)
        new = inline(self.captured, function, [node, *extra], node.next)
        for user in users:
            if user is not new:
                user.replace_input_with(node, new)

    # .. axes: index, mask of filled slots, size

    def index(self, axis: Axis, before: fx.Node) -> fx.Node:
        """``[B, K]`` int64, no negative entries."""
        if axis not in self._index:
            if axis in self.roots:
                cut = self.roots[axis]
                node = inline(self.captured, lambda i: i.clamp(min=0), [cut.index], before) if cut.ragged else cut.index
            elif axis.base is not None:
                node = inline(
                    self.captured,
                    lambda i, start=axis.start: i[:, start:] - start,
                    [self.index(axis.base, before)],
                    before,
                )
            else:
                node = self._concat(axis, before, self._positions)
            self._index[axis] = node
        return self._index[axis]

    def alive(self, axis: Axis, before: fx.Node) -> fx.Node | None:
        """``[B, K]`` bool: slots that hold a token; None when all do."""
        if axis not in self._alive:
            node: fx.Node | None = None
            if axis in self.roots:
                cut = self.roots[axis]
                node = inline(self.captured, lambda i: i >= 0, [cut.index], before) if cut.ragged else None
            elif axis.base is not None:
                base = self.alive(axis.base, before)
                node = (
                    None
                    if base is None
                    else inline(self.captured, lambda a, start=axis.start: a[:, start:], [base], before)
                )
            elif any(self.alive(p, before) is not None for p in axis.parts if isinstance(p, Axis)):
                node = self._concat(axis, before, self._filled)
            self._alive[axis] = node
        return self._alive[axis]

    def _positions(self, part: Any, offset: Any, index: fx.Node, before: fx.Node) -> fx.Node:
        if isinstance(part, Axis):
            return inline(self.captured, lambda i, o: i + o, [index, offset], before)
        return inline(
            self.captured,
            lambda i, n, o: (torch.arange(n, device=i.device) + o)[None].expand(i.shape[0], n),
            [index, self.number(part, before), offset],
            before,
        )

    def _filled(self, part: Any, offset: Any, index: fx.Node, before: fx.Node) -> fx.Node:
        if isinstance(part, Axis):
            alive = self.alive(part, before)
            return (
                alive
                if alive is not None
                else inline(self.captured, lambda i: torch.ones_like(i, dtype=torch.bool), [index], before)
            )
        return inline(
            self.captured,
            lambda i, n: torch.ones(i.shape[0], n, dtype=torch.bool, device=i.device),
            [index, self.number(part, before)],
            before,
        )

    def _concat(self, axis: Axis, before: fx.Node, make: Callable[..., fx.Node]) -> fx.Node:
        some = next(p for p in axis.parts if isinstance(p, Axis))
        anchor = self.index(some, before)
        pieces, offset = [], 0
        for part in axis.parts:
            index = self.index(part, before) if isinstance(part, Axis) else anchor
            pieces.append(make(part, self.number(offset, before), index, before))
            offset = offset + (part.size if isinstance(part, Axis) else part)
        return inline(self.captured, lambda *p: torch.cat(p, 1), pieces, before)

    def size(self, axis: Axis, before: fx.Node) -> Any:
        if axis not in self._size:
            if axis in self.roots:
                size: Any = self.roots[axis].size
            elif axis.base is not None:
                size = self._sum(self.size(axis.base, before), -axis.start, before)
            elif axis.rows:
                size = self._dim_size(axis.rows, before) if axis.complete else self.number(axis.size, before)
            else:
                size = self._parts_size(axis.parts, before)
            self._size[axis] = size
        return self._size[axis]

    def _parts_size(self, parts: Sequence[Any], before: fx.Node) -> Any:
        size: Any = 0
        for part in parts:
            more = self.size(part, before) if isinstance(part, Axis) else self.number(part, before)
            size = self._sum(size, more, before)
        return size

    def _sum(self, a: Any, b: Any, before: fx.Node) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        return self._call(operator.add, (a, b), before)

    def _dim_size(self, dim: Dim, before: fx.Node) -> Any:
        total: Any = 1
        for f in dim:
            size = (
                self.size(f.axis, before)
                if f.axis is not None and f.axis.kind == "token"
                else self.number(f.size, before)
            )
            if isinstance(total, int) and isinstance(size, int):
                total = total * size
            elif isinstance(total, int) and total == 1:
                total = size
            else:
                total = self._call(operator.mul, (total, size), before)
        return total

    def number(self, value: Any, before: fx.Node) -> Any:
        """A node (or an int) for a size, made from sizes that the graph has in front of ``before``."""
        if isinstance(value, (int, fx.Node)):
            return value
        wanted = expr(value)
        if wanted.is_Integer:
            return int(wanted)
        atoms: dict[Any, fx.Node] = {}
        for node in self.graph.nodes:
            if node is before:
                break
            found = node.meta.get("val")
            if isinstance(found, torch.SymInt) and node.op in ("placeholder", "call_function"):
                if found.node.expr == wanted:
                    return node
                if found.node.expr.is_Symbol:
                    atoms.setdefault(found.node.expr, node)
        for node in self.captured.placeholders:
            found = node.meta.get("val")
            if isinstance(found, torch.Tensor):
                for i, s in enumerate(found.shape):
                    if isinstance(s, torch.SymInt) and s.node.expr in wanted.free_symbols and s.node.expr not in atoms:
                        atoms[s.node.expr] = self._call(aten.sym_size.int, (node, i), before)

        def build(e: sympy.Expr) -> Any:
            if e.is_Integer:
                return int(e)
            if e in atoms:
                return atoms[e]
            if e.is_Add or e.is_Mul:
                fold = operator.add if e.is_Add else operator.mul
                total = build(e.args[0])
                for arg in e.args[1:]:
                    total = self._call(fold, (total, build(arg)), before)
                return total
            if e.is_Pow and e.exp.is_Integer and e.exp > 0:
                total = build(e.base)
                for _ in range(int(e.exp) - 1):
                    total = self._call(operator.mul, (total, build(e.base)), before)
                return total
            if type(e).__name__ in ("FloorDiv", "CleanDiv"):
                return self._call(operator.floordiv, (build(e.args[0]), build(e.args[1])), before)
            raise refuse(before, f"the size {e} is not in the graph")

        return build(wanted)

    def _call(self, target: Any, args: tuple[Any, ...], before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        with self.captured.fake_mode:
            values = fx.map_arg(args, lambda n: n.meta["val"])
            node.meta["val"] = target(*values)
        return node

    # .. values

    def _side(self, demand: Demand, before: fx.Node) -> fx.Node:
        key = (
            demand.side,
            tuple((f.axis, None if f.axis else expr(f.size)) for d in demand.dims for f in d),
            len(demand.dims),
        )
        if key not in self._sides:
            self._sides[key] = self._gather(demand.side, demand.dims, before)
        return self._sides[key]

    def _gather(self, value: fx.Node, dims: Dims, before: fx.Node) -> fx.Node:
        """Index every token axis of ``value``, whose dimensions (with leading ones added) are ``dims``."""
        axes = [f.axis for d in dims for f in d if f.axis is not None and f.axis.kind == "token"]
        indices = [self.index(a, before) for a in axes]
        flat = [f for d in dims for f in d]
        composite = any(len(d) > 1 and is_tracked(d) for d in dims)
        split = [self.number(f.size, before) for f in flat] if composite else []
        joined = (
            [self._dim_size(d, before) if is_token(d) else self.number(size_of(d), before) for d in dims]
            if composite
            else []
        )
        shape = shape_of(value)
        shape = [1] * (len(dims) - len(shape)) + shape
        grow = [i for i, d in enumerate(dims) if composite and equal(shape[i], 1) and not equal(size_of(d), 1)]
        grown = [self.number(size_of(dims[i]), before) for i in grow]
        factors = flat if composite else [next((f for f in d if f.axis is not None), d[0]) for d in dims]
        batch = next((i for i, f in enumerate(factors) if f.axis is self.batch), None)
        places = [i for i, f in enumerate(factors) if f.axis is not None and f.axis.kind == "token"]
        one_row = equal(self.batch.size, 1)
        count = len(indices)

        def take(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            index, sizes = rest[:count], rest[count:]
            while x.dim() < len(dims):
                x = x.unsqueeze(0)
            if composite:
                sizes, full = sizes[: len(flat) + len(dims)], sizes[len(flat) + len(dims) :]
                x = x.expand([full[grow.index(i)] if i in grow else -1 for i in range(len(dims))])
                x = x.reshape(sizes[: len(flat)])
            for at, i in zip(places, index, strict=True):
                if batch is None or one_row:
                    x = x.index_select(at, i[0])
                    continue
                if equal(x.shape[batch], 1):
                    x = x.expand(*(i.shape[0] if d == batch else -1 for d in range(x.dim())))
                view = [1] * x.dim()
                view[batch], view[at] = i.shape[0], i.shape[1]
                shape = list(x.shape)
                shape[at] = i.shape[1]
                i = i if batch < at else i.transpose(0, 1)
                x = x.gather(at, i.reshape(view).expand(shape))
            return x.reshape(sizes[len(flat) :]) if composite else x

        return inline(self.captured, take, [value, *indices, *split, *joined, *grown], before)

    def _map_index(self, node: fx.Node, position: int, axis: Axis, by_row: bool) -> None:
        """Positions in the unpruned sequence -> positions among the kept: how many kept ones lie before."""
        indices = list(node.args[1])  # type: ignore[arg-type]
        rows = indices[position - 1] if by_row else None
        alive = self.alive(axis, node)
        extra = [a for a in (rows, alive) if a is not None]

        def slot(kept: torch.Tensor, at: torch.Tensor, size: Any, *rest: torch.Tensor) -> torch.Tensor:
            if alive is not None:
                kept = torch.where(rest[-1], kept, -1)
            kept = kept[0] if rows is None else kept[rest[0]]
            at = torch.where(at < 0, at + size, at)
            return (kept < at.unsqueeze(-1)).sum(-1)

        indices[position] = inline(
            self.captured, slot, [self.index(axis, node), indices[position], self.number(axis.size, node), *extra], node
        )
        node.args = (node.args[0], indices, *node.args[2:])

    def _mask_empty(self, node: fx.Node, query: Dim, key: Dim) -> None:
        """Hide empty slots (-1 in a ragged index) from attention; an empty query looks at empty slots only."""
        key_axis = key[0].axis if is_token(key) else None
        query_axis = query[0].axis if is_token(query) else None
        alive_key = self.alive(key_axis, node) if key_axis is not None else None
        alive_query = self.alive(query_axis, node) if query_axis is not None else None
        if alive_key is None:
            return
        if node.target is aten.scaled_dot_product_attention.default:
            call = sdpa_arguments(node)
            mask, causal = call.mask, call.is_causal
            given = [x for x in (alive_query, mask) if x is not None]

            def allowed(q: torch.Tensor, alive_k: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
                it = iter(rest)
                alive_q = next(it) if alive_query is not None else None
                old = next(it) if mask is not None else None
                shape = [alive_k.shape[0], *[1] * (q.dim() - 2)]
                column = alive_k.view(*shape, alive_k.shape[1])
                empty = None
                if alive_q is not None:
                    empty = ~alive_q.view(*shape, alive_q.shape[1]).transpose(-1, -2) & ~column
                if old is not None and old.dtype != torch.bool:
                    old = old.masked_fill(~column, torch.finfo(old.dtype).min)
                    return old if empty is None else old.masked_fill(empty, 0)
                if causal:
                    old = torch.ones(q.shape[-2], alive_k.shape[1], dtype=torch.bool, device=q.device).tril()
                new = column if old is None else old & column
                return new if empty is None else new | empty

            new_mask = inline(self.captured, allowed, [call.query, alive_key, *given], node)
            replace(call, mask=new_mask, is_causal=False).write(node)
            return
        dims = self.flow.labels[node]
        at = dim_argument(node, 1, -1, len(dims))
        batch = next(i for i, d in enumerate(dims) if d[0].axis is self.batch and len(d) == 1)

        def hide(scores: torch.Tensor, alive_k: torch.Tensor) -> torch.Tensor:
            alive_k = alive_k if batch < at else alive_k.transpose(0, 1)
            view = [1] * scores.dim()
            view[min(batch, at)], view[max(batch, at)] = alive_k.shape
            return scores.masked_fill(~alive_k.view(view), torch.finfo(scores.dtype).min)

        hidden = inline(self.captured, hide, [node.args[0], alive_key], node)
        node.args = (hidden, *node.args[1:])

    def _ignore_empty(self, loss: fx.Node) -> None:
        """Empty slots have no label."""
        logits, target = loss.args[:2]
        axes = [f.axis for d in self.flow.labels[logits] for f in d]  # type: ignore[index]
        token = next((a for a in axes if a is not None and a.kind == "token"), None)
        alive = self.alive(token, loss) if token is not None else None
        if alive is None:
            return
        ignored: Any = loss.args[4] if len(loss.args) > 4 else -100
        if axes.index(token) < axes.index(self.batch):
            raise refuse(loss, "a loss over tokens by row cannot leave empty slots out")
        filled = inline(self.captured, lambda t, a: torch.where(a.reshape(t.shape), t, ignored), [target, alive], loss)
        loss.args = (logits, filled, *loss.args[2:])

    def _detach_sizes(self, order: list[fx.Node]) -> None:
        """Sizes read off values below the cut, but used for what lies outside, keep their old value."""
        cut = {c.node for c in self.cuts}
        for node in order:
            if node.target not in (aten.sym_size.int, aten.sym_numel.default) or node.args[0] in cut:
                continue
            dims = self.flow.labels.get(node.args[0])  # type: ignore[arg-type]
            which = slice(None) if len(node.args) < 2 else slice(int(node.args[1]), int(node.args[1]) + 1)  # type: ignore[arg-type]
            if isinstance(dims, tuple) and any(map(self._resizes, dims[which])):
                if node.users:
                    value = self.number(node.meta["val"], node)
                    for user in list(node.users):
                        _substitute(user, {node: value})
                self.graph.erase_node(node)


def _substitute(node: fx.Node, table: Mapping[fx.Node, Any]) -> None:
    """Replace arguments of ``node`` by what ``table`` has for them (a node or a number)."""
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: table.get(n, n))


def _each(dims: Any) -> list[Dims]:
    """The dimensions of each result of a node."""
    return [d for d in dims if d is not None] if isinstance(dims, list) else [] if dims is None else [dims]


def _after(order: list[fx.Node], nodes: Iterable[fx.Node]) -> fx.Node:
    position = {n: i for i, n in enumerate(order)}
    last = max(nodes, key=lambda n: position[n])
    following = last.next
    while following.op == "placeholder":
        following = following.next
    return following
