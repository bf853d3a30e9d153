"""Whether an attention lets a token see only what came before it."""

from __future__ import annotations

from torch import fx

from tokcompile.capture.ops import COMPARE, LAYOUT, TRIVIAL

from .flow import Flow
from .model import Region

_INDEX = TRIVIAL | LAYOUT | {"slice", "add", "sub", "index", "select", "cumsum", "getitem"}


def is_causal(flow: Flow, region: Region) -> bool:
    """By the flag, by a mask that compares positions with positions, or by keys from a cache."""
    if region.variant["mask"] == "causal" or region.variant["cache"] == "yes":
        return True
    mask = region.roles.get("mask")
    if mask is None:
        return False
    compares = [n for op in COMPARE for n in flow.by_op.get(op, []) if _reaches(flow, n, mask)]
    if any(_compares_positions(flow, n) for n in compares):
        return True
    return any(_reaches(flow, n, mask) for op in ("tril", "triu") for n in flow.by_op.get(op, []))


def _reaches(flow: Flow, node: fx.Node, mask: fx.Node) -> bool:
    return flow.reaches(node, mask)


def _compares_positions(flow: Flow, node: fx.Node) -> bool:
    """Both operands are ranges of indices, one along the queries and one along the keys."""
    operands = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    return len(operands) == 2 and all(_is_range(flow, n) for n in operands)


def _is_range(flow: Flow, node: fx.Node) -> bool:
    return any(flow.op[n] == "arange" for n in flow.back(node, _INDEX, limit=20).stops)
