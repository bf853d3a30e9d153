"""Whether a mask lets a token see only what came before it."""

from __future__ import annotations

from torch import fx

from tokcompile.capture.ops import COMPARE, LAYOUT, TRIVIAL

from .flow import Flow

_INDEX = TRIVIAL | LAYOUT | {"slice", "add", "sub", "index", "select", "cumsum", "getitem"}


class Order:
    """What puts tokens into an order: comparisons of positions with positions, and triangles."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        compares = [n for op in COMPARE for n in flow.by_op.get(op, []) if _compares_positions(flow, n)]
        self.makers = flow.mask([*compares, *flow.by_op.get("tril", []), *flow.by_op.get("triu", [])])

    def is_in(self, mask: fx.Node | None) -> bool:
        """Whether a mask is made with such an order."""
        return mask is not None and bool(self.flow.reached_by(mask, self.makers))


def _compares_positions(flow: Flow, node: fx.Node) -> bool:
    """Both operands are ranges of indices, one along the queries and one along the keys."""
    operands = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    return len(operands) == 2 and all(_is_range(flow, n) for n in operands)


def _is_range(flow: Flow, node: fx.Node) -> bool:
    return any(flow.op[n] == "arange" for n in flow.back(node, _INDEX, limit=20).stops)
