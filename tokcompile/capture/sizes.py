"""Sizes that are numbers or symbols: compare them, multiply them, read their value in the call that was captured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx


def hint(size: Any, unknown: int | None = None) -> int:
    """The size, or the node that holds it, in the call that was captured.

    Args:
        unknown: what a size is taken for that is read off data, so that no call tells it.

    Raises:
        TypeError: it is such a size, and ``unknown`` is not given.
    """
    size = size.meta["val"] if isinstance(size, fx.Node) else size
    known = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(unknown if known is None else known)  # type: ignore[arg-type]


MAX_INT = 2**63 - 1


def expr(size: Any) -> sympy.Expr:
    """The size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(expr(a) - expr(b)) == 0)


def guarded_equal(a: Any, b: Any) -> bool:
    """As :func:`equal`, or equal at the sizes at hand, which then becomes a condition of the compiled graph.

    For operands of one operation that must agree: labels come with symbols of their own, beside those of the logits.
    """
    return equal(a, b) or bool(a == b)


def dims_of(sizes: Iterable[Any]) -> tuple[Any, ...]:
    """Sizes as ints and symbolic expressions: to compare and to look up, which never adds a guard."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in sizes)


def shape_of(node: Any) -> list[Any]:
    """The sizes of the tensor that a node computes, ints and SymInts."""
    return list(node.meta["val"].shape)


def product(sizes: Iterable[Any]) -> Any:
    """The number of elements that sizes give."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
