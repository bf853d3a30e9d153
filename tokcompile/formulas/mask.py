"""What the mask of an attention says: later keys, a window, keys that are padding; and what is left of it.

A mask ``[B, H, S, T]`` costs as much to read as the attention that it masks. Nearly all are conjunctions of a few rules
of which each is a comparison of two ranges of positions or a row of keys, and the graph shows which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from tokcompile.capture.ops import TRIVIAL, op_name
from tokcompile.capture.sizes import dims_of, expr, shape_of
from tokcompile.formulas.attention import AttentionForm
from tokcompile.kernels.hidden import hides as hides
from tokcompile.kernels.hidden import is_hidden as is_hidden
from tokcompile.kernels.hidden import is_visible as is_visible
from tokcompile.regions.flow import Flow
from tokcompile.rewrite.context import Context


@dataclass(frozen=True)
class MaskForm:
    """A key j is visible to query i, at position ``p = T - S + i``, where all of these hold.

    Attributes:
        causal: ``j <= p``.
        window: ``j > p - window``; None: no such rule.
        keys: node, bool [B or 1, T]: ``keys[b, j]``; None.
        rest: node, bool or float (added), broadcasts to [B, H, S, T]; None: nothing is left that the others do not say.
    """

    causal: bool = False
    window: int | None = None
    keys: fx.Node | None = None
    rest: fx.Node | None = None


def read_mask(ctx: Context, form: AttentionForm) -> MaskForm:
    """Take the mask of an attention apart. Puts views and conjunctions of parts into the graph, dead until used."""
    found = MaskForm(causal=form.causal)
    if form.mask is None:
        return found
    reader = _Masks(ctx, form)
    parts = reader.parts(form.mask)
    keys = [p.keys for p in parts if p.keys is not None]
    rest = [p.rest for p in parts if p.rest is not None]
    windows = [p.window for p in parts if p.window is not None]
    return MaskForm(
        found.causal or any(p.causal for p in parts),
        min(windows, default=None),
        reader.all_of(keys),
        reader.all_of(rest),
    )


@dataclass(frozen=True)
class _Line:
    """Integers that are linear in the row and the column of a mask: ``rows * i + columns * j + start``."""

    rows: int
    columns: int
    start: Any  # sympy

    def __sub__(self, other: _Line) -> _Line:
        return _Line(self.rows - other.rows, self.columns - other.columns, sympy.expand(self.start - other.start))

    def __add__(self, other: _Line) -> _Line:
        return _Line(self.rows + other.rows, self.columns + other.columns, sympy.expand(self.start + other.start))


_LESS = {"le": (1, 0), "lt": (1, 1), "ge": (-1, 0), "gt": (-1, 1)}


class _Masks:
    """Reads a mask as forms that are known.

    One class: a mask is made of masks, so the reader of each form calls those of all others.
    """

    def __init__(self, ctx: Context, form: AttentionForm) -> None:
        self.ctx, self.flow, self.output = ctx, Flow(ctx.captured.graph), form.output
        queries, keys = (expr(shape_of(n)[2]) for n in (form.query, form.key))
        self.ahead = sympy.expand(keys - queries)  # of the first query, that many keys are earlier

    def parts(self, node: fx.Node) -> list[MaskForm]:
        """The conjuncts of a bool mask, the summands of a float one."""
        if node.meta["val"].dtype == torch.bool:
            return self._conjuncts(node)
        return self._added(node)

    def all_of(self, nodes: list[fx.Node]) -> fx.Node | None:
        if len(nodes) < 2:
            return nodes[0] if nodes else None

        def conjunction(*values: Tensor) -> Tensor:
            result = values[0]
            for value in values[1:]:
                if result.dtype == torch.bool and value.dtype == torch.bool:
                    result = result & value
                elif torch.bool in (result.dtype, value.dtype):
                    bools, floats = (result, value) if result.dtype == torch.bool else (value, result)
                    result = torch.where(bools, floats, -math.inf)
                else:
                    result = result + value
            return result

        return self._emit(conjunction, *nodes)

    def _op(self, node: Any) -> str:
        """Name of the operation; "" also where the memory of the value is written to later on."""
        if not isinstance(node, fx.Node) or (node in self.flow.position and self.flow.written(node)):
            return ""
        return op_name(node)

    def _input(self, node: fx.Node) -> fx.Node:
        return next(n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))

    def _emit(self, function: Callable[..., Tensor], *nodes: fx.Node) -> fx.Node:
        written = any(n in self.flow.position and self.flow.written(n) for n in nodes)
        return self.ctx.emit(  # type: ignore[no-any-return]
            function, *nodes, before=self.output if written else self.ctx.after(*nodes)
        )

    def _added(self, whole: fx.Node) -> list[MaskForm]:
        """The parts of a float mask: zeros and numbers that hide, or anything else as it is."""
        node = whole
        while self._op(node) in TRIVIAL | {"expand", "slice", "unsqueeze", "view"}:
            if self._op(node) in ("slice", "unsqueeze", "view") and not self._keeps(node):
                return [MaskForm(rest=whole)]
            node = self._input(node)
        op, args = self._op(node), node.args
        if op == "add" and all(isinstance(a, fx.Node) for a in args) and node.kwargs.get("alpha", 1) == 1:
            return [*self._added(args[0]), *self._added(args[1])]  # type: ignore[arg-type]
        if op == "where" and self._is(args[1], 0) and self._hides(args[2]):
            return self._conjuncts(args[0])  # type: ignore[arg-type]
        if op == "where" and self._is(args[2], 0) and self._hides(args[1]):
            return self._hidden(args[0])  # type: ignore[arg-type]
        if op == "masked_fill" and self._is(args[0], 0) and self._hides(args[2]):
            return self._hidden(args[1])  # type: ignore[arg-type]
        if op == "triu" and self._hides(args[0]) and self._square(node) and (args[1] if len(args) > 1 else 0) == 1:
            return [MaskForm(causal=True)]
        return [MaskForm() if self._is(node, 0) else MaskForm(rest=whole)]

    def _hidden(self, node: fx.Node) -> list[MaskForm]:
        """The parts of the complement of a condition."""
        op = self._op(node)
        if op in ("logical_not", "bitwise_not"):
            return self._conjuncts(node.args[0])  # type: ignore[arg-type]
        if op in ("__or__", "bitwise_or", "logical_or"):
            return [*self._hidden(node.args[0]), *self._hidden(node.args[1])]  # type: ignore[arg-type]
        if (
            op in ("to", "expand", "view", "unsqueeze", "slice")
            and self._keeps(node)
            and (self._input(node).meta["val"].dtype == torch.bool)
        ):
            return self._hidden(self._input(node))
        if op in _LESS:
            sign, strict = _LESS[op]
            rule = self._rule(node, -sign, 1 - strict)  # not (x <= 0) is (1 - x <= 0)
            if rule is not None:
                return [rule]
        if op == "eq" and self._is_number(node.args[1], 0):
            inner = self._truth(node.args[0])  # type: ignore[arg-type]
            if inner is not None:
                return inner
        if op == "triu" and self._ones(node.args[0]) and self._square(node) and tuple(node.args[1:]) == (1,):
            return [MaskForm(causal=True)]
        if op in ("new_zeros", "zeros", "zeros_like"):
            return [MaskForm()]
        return [self._leaf(self._emit(lambda t: t.logical_not(), node))]

    def _conjuncts(self, node: fx.Node) -> list[MaskForm]:
        op = self._op(node)
        if op in ("__and__", "bitwise_and", "logical_and"):
            return [*self._conjuncts(node.args[0]), *self._conjuncts(node.args[1])]  # type: ignore[arg-type]
        if op in ("logical_not", "bitwise_not"):
            return self._hidden(node.args[0])  # type: ignore[arg-type]
        if op in ("to", "expand", "view", "unsqueeze", "slice", "contiguous", "clone", "alias") and (
            self._keeps(node) and self._input(node).meta["val"].dtype == torch.bool
        ):
            return self._conjuncts(self._input(node))
        if op == "to":
            inner = self._truth(self._input(node))
            if inner is not None:
                return inner
        if op in _LESS:
            rule = self._rule(node, *_LESS[op])
            if rule is not None:
                return [rule]
        if op == "ne" and self._is_number(node.args[1], 0):
            inner = self._truth(node.args[0])  # type: ignore[arg-type]
            if inner is not None:
                return inner
        if op == "tril" and self._ones(node.args[0]) and self._square(node) and tuple(node.args[1:]) in ((), (0,)):
            return [MaskForm(causal=True)]
        if self._ones(node):
            return [MaskForm()]
        return [self._leaf(node)]

    def _truth(self, node: fx.Node) -> list[MaskForm] | None:
        """The parts of numbers that are 0 or not: a lower triangle of ones."""
        while self._op(node) in TRIVIAL | {"expand", "view", "unsqueeze", "slice"} and self._keeps(node):
            node = self._input(node)
        if (
            self._op(node) == "tril"
            and self._ones(node.args[0])
            and self._square(node)
            and (tuple(node.args[1:]) in ((), (0,)))
        ):
            return [MaskForm(causal=True)]
        return None

    def _leaf(self, node: fx.Node) -> MaskForm:
        shape = [*[1] * (4 - node.meta["val"].dim()), *node.meta["val"].shape]
        if all(isinstance(s, int) and s == 1 for s in shape[1:3]) and node.meta["val"].dim() <= 4:
            rank = node.meta["val"].dim()
            return MaskForm(keys=self._emit(lambda t: t.reshape(t.shape[0] if rank == 4 else 1, t.shape[-1]), node))
        return MaskForm(rest=node)

    def _rule(self, node: fx.Node, sign: int, strict: int) -> MaskForm | None:
        """``sign * (left - right) + strict <= 0`` as a rule of positions."""
        sides = [self._line(a, node.meta["val"].dim()) for a in node.args[:2]]
        if sides[0] is None or sides[1] is None:
            return None
        line = sides[0] - sides[1]
        rows, columns, start = line.rows * sign, line.columns * sign, sympy.expand(line.start * sign + strict)
        if rows <= 0 and columns <= 0 and start.is_nonpositive:  # always
            return MaskForm()
        if (rows, columns) == (-1, 1) and start == -self.ahead:
            return MaskForm(causal=True)
        if (rows, columns) == (1, -1):  # i - j + start <= 0, and position p = i + ahead, so p - j < 1 - start + ahead
            width = sympy.expand(1 - start + self.ahead)
            if width.is_Integer and width > 0:
                return MaskForm(window=int(width))
        return None

    def _line(self, value: Any, rank: int) -> _Line | None:
        """Positions as a function of row and column of a mask of ``rank`` axes, of which the last two are these."""
        if isinstance(value, int):
            return _Line(0, 0, sympy.Integer(value))
        if not isinstance(value, fx.Node):
            return None
        known = value.meta["val"]
        if isinstance(known, (int, torch.SymInt)):
            return _Line(0, 0, expr(known))
        if not isinstance(known, Tensor) or known.is_floating_point():
            return None
        op, args = self._op(value), value.args
        if op == "arange":
            if known.dim() != 1 or (len(args) > 2 and args[2] != 1):
                return None
            start = self._line(args[0], 0) if len(args) > 1 else _Line(0, 0, sympy.Integer(0))
            axis = rank - 1  # a vector stands on the last axis
            return None if start is None else _Line(0, 1, start.start) if axis >= 0 else None
        if op in ("add", "sub") and value.kwargs.get("alpha", 1) == 1:
            one, other = self._line(args[0], rank), self._line(args[1], rank)
            if one is None or other is None:
                return None
            return one + other if op == "add" else one - other
        if op in TRIVIAL or op in ("expand", "alias"):
            inner = self._input(value)
            return self._line(inner, rank) if inner.meta["val"].dim() == known.dim() else None
        if op == "slice" and self._keeps(value):
            return self._line(args[0], rank)
        if op in ("unsqueeze", "view"):
            return self._moved(value, rank)
        return None

    def _moved(self, value: fx.Node, rank: int) -> _Line | None:
        """An unsqueeze or a view that adds axes of one: the last axis may become the last but one."""
        inner = self._input(value)
        line = self._line(inner, rank)
        if line is None:
            return None
        old, new = list(inner.meta["val"].shape), list(value.meta["val"].shape)
        ones = [isinstance(s, int) and s == 1 for s in new]
        if self._op(value) == "unsqueeze":
            place = int(value.args[1]) % len(new)  # type: ignore[arg-type]
        else:
            places = [i for i, one in enumerate(ones) if one and dims_of(new[:i] + new[i + 1 :]) == dims_of(old)]
            if len(places) != 1:
                return None
            place = places[0]
        behind = len(new) - 1 - place  # axes behind the new one
        if behind == 0:
            return _Line(line.columns, 0, line.start) if line.rows == 0 else None
        return line if behind >= 2 or line.rows == 0 else None

    def _keeps(self, node: fx.Node) -> bool:
        """A view that leaves rows and columns where they are."""
        op, source = self._op(node), self._input(node)
        if op == "slice":
            return (node.args[2] if len(node.args) > 2 else None) in (0, None) and (
                dims_of(node.meta["val"].shape) == dims_of(source.meta["val"].shape)
            )
        if op in ("unsqueeze", "view"):
            new, old = dims_of(node.meta["val"].shape), dims_of(source.meta["val"].shape)
            return (
                len(new) >= len(old)
                and new[len(new) - len(old) :] == old
                and all(s == 1 for s in new[: len(new) - len(old)])
            )
        return True

    def _square(self, node: fx.Node) -> bool:
        rows, columns = dims_of(node.meta["val"].shape[-2:])
        return bool(rows == columns) and self.ahead == 0

    def _value(self, value: Any) -> float | None:
        """The one number that a tensor is filled with."""
        if isinstance(value, (int, float)):
            return float(value)
        while self._op(value) in TRIVIAL | {"expand", "view"}:
            value = self._input(value)
        op = self._op(value)
        if op in ("zeros", "new_zeros", "zeros_like"):
            return 0.0
        if op in ("ones", "new_ones", "ones_like"):
            return 1.0
        place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}.get(op)
        if place is not None and isinstance(value.args[place], (int, float)):
            return float(value.args[place])
        if isinstance(value, fx.Node) and value.op == "get_attr" and value.meta["val"].dim() == 0:
            return float(getattr(self.ctx.captured.graph_module, str(value.target)))
        return None

    def _is(self, value: Any, number: float) -> bool:
        return self._value(value) == number

    def _is_number(self, value: Any, number: float) -> bool:
        return isinstance(value, (int, float)) and value == number

    def _ones(self, value: Any) -> bool:
        return self._value(value) == 1.0

    def _hides(self, value: Any) -> bool:
        number = self._value(value)
        return number is not None and hides(number)
