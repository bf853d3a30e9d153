"""What is known of each dimension of a value: plain, the batch, the token axis, or axes flattened together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from tokcompile.capture.sizes import expr, product


@dataclass(eq=False)
class Axis:
    """An axis that is followed.

    Attributes:
        name: for messages.
        size: number of entries before narrowing.
        kind: "token" (will be narrowed) or "batch" (keeps its size; each row has its own kept tokens).
        prefix, suffix: how many entries at either end are known to be kept (class tokens; the last token).
        parts: for a concatenation, its segments in order: token axes, or sizes of what is not narrowed.
        base, start: for a slice ``base[start:]`` of a token axis.
        rows: for rows in an order that values choose (a sort by expert): the dimension whose entries they are, each at
            most once. What is known of such a row is a function of its own entry; of its place nothing is known.
        source: the node that chose the order.
        complete: whether every entry of ``rows`` is among them.
    """

    name: str
    size: Any
    kind: str = "token"
    prefix: int = 0
    suffix: int = 0
    parts: tuple[Any, ...] = ()
    base: Axis | None = None
    start: int = 0
    rows: tuple[Factor, ...] = ()
    source: fx.Node | None = None
    complete: bool = True

    def __repr__(self) -> str:
        return f"{self.name}:{self.size}"


@dataclass(frozen=True)
class Factor:
    """One factor of a dimension: its size, and the axis that it is (None: an ordinary dimension)."""

    size: Any
    axis: Axis | None = None


Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]


def plain(size: Any) -> Dim:
    return (Factor(size),)


def size_of(dim: Dim) -> Any:
    """Number of entries of a dimension."""
    return product(f.size for f in dim)


def is_token(dim: Dim) -> bool:
    return any(f.axis is not None and f.axis.kind == "token" for f in dim)


def is_tracked(dim: Dim) -> bool:
    return any(f.axis is not None for f in dim)


def is_chosen(dim: Dim) -> bool:
    """Whether a dimension holds rows of tokens in an order that values choose."""
    return any(f.axis is not None and f.axis.kind == "token" and f.axis.rows for f in dim)


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are made of the same axes; ordinary factors count by their product."""

    def normal(dim: Dim) -> list[Any]:
        parts: list[Any] = [sympy.Integer(1)]
        for f in dim:
            if f.axis is not None:
                parts += [f.axis, sympy.Integer(1)]
            else:
                parts[-1] = parts[-1] * expr(f.size)
        return parts

    return normal(a) == normal(b)


@dataclass(frozen=True)
class Demand:
    """A value from outside that must be narrowed for one user: its dimensions as the user aligns them.

    ``dims`` can be longer than the value's rank: the value is then first given leading dimensions of size 1.
    """

    side: fx.Node
    dims: Dims


@dataclass
class Flow:
    """The result of following the axes below a set of cuts.

    Attributes:
        labels: node -> its dimensions (a list of them for nodes with several results).
        demands: user node -> what it needs from outside.
        sizes: node -> new labels by which its size arguments are written anew (views, expands).
        indices: (user, position of the index list) -> the axis whose old positions the index tensor holds, and
            whether the index before it picks rows of the batch.
        attention: nodes that normalise over a token axis (softmax, sdpa) -> (query dims, key dims).
        reductions: nodes that reduce over a token axis.
        contractions: products that sum over token axes -> these axes, each with the operands that have it and the
            dimension where.
        orders: transpositions -> the old place of each dimension.
        full_slices: slices over the whole of a token axis.
        slices: slices of a concatenation -> (segments in front of the result, segments of the result, up to the end).
        positions: integer values that say where a row comes from -> the dimension whose entries they count (None: no
            such value; a list of them for nodes with several results).
        divisors: divisions of such values -> the dimensions whose size they divide by.
        inverses: nodes that turn an order around -> their operand that says the order.
        repeats: nodes that repeat each token.
        counts: how many tokens have each value (histograms).
    """

    labels: dict[fx.Node, Any] = field(default_factory=dict)
    demands: dict[fx.Node, list[Demand]] = field(default_factory=dict)
    sizes: dict[fx.Node, Dims] = field(default_factory=dict)
    indices: dict[tuple[fx.Node, int], tuple[Axis, bool]] = field(default_factory=dict)
    attention: dict[fx.Node, tuple[Dim, Dim]] = field(default_factory=dict)
    reductions: list[fx.Node] = field(default_factory=list)
    contractions: dict[fx.Node, list[tuple[Axis, list[tuple[fx.Node, int]]]]] = field(default_factory=dict)
    orders: dict[fx.Node, list[int]] = field(default_factory=dict)
    full_slices: dict[fx.Node, int] = field(default_factory=dict)
    slices: dict[fx.Node, tuple[tuple[Any, ...], tuple[Any, ...], bool]] = field(default_factory=dict)
    positions: dict[fx.Node, Any] = field(default_factory=dict)
    divisors: dict[fx.Node, Dim] = field(default_factory=dict)
    inverses: dict[fx.Node, tuple[fx.Node, Axis]] = field(default_factory=dict)
    repeats: list[fx.Node] = field(default_factory=list)
    counts: list[fx.Node] = field(default_factory=list)
    batch: Axis | None = None
