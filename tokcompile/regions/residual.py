"""Where a block's result is added back to the stream that the block read.

::

    stream ----------------------+
      |                          |
      +-> [norm] -> block -> [norm, scale, dropout, other branches +] -> add -> stream
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tokcompile.capture.ops import CONTRACTION, CONV, SDPA, SOFTMAX

from .flow import Flow

_STOPS = (
    CONTRACTION | CONV | SDPA | SOFTMAX | {"linear", "addmm", "embedding", "cat", "topk", "argmax", "masked_scatter"}
)


@dataclass(frozen=True)
class Join:
    """``add = residual + branch``: ``residual`` is the stream above the block, ``add`` the stream below it."""

    add: fx.Node
    residual: fx.Node
    branch: fx.Node


def find_join(
    flow: Flow, sources: Sequence[fx.Node], result: fx.Node, through_all: bool = False, shortcut: bool = False
) -> Join | None:
    """The first addition, below ``result``, of the stream that feeds ``sources``.

    Other branches may be added first (parallel residual, shared experts). With ``through_all`` no operation
    between ``result`` and the addition stops the search. With ``shortcut`` the residual is something made from the
    source itself (a projection and pooling, where a stage changes the width).
    """

    def passes(node: fx.Node) -> bool:
        return through_all or flow.op[node] not in _STOPS

    inside = {result}
    for node in flow.forward(result, lambda n: n in inside and passes(n), limit=400 if through_all else 60):
        if flow.op[node] == "add" and len(flow.inputs[node]) >= 2:
            operands = flow.inputs[node][:2]
            branch = [n for n in operands if flow.reaches(result, n)]
            others = [n for n in operands if not flow.reaches(result, n)]
            if len(branch) == 1 and len(others) == 1 and flow.dims(branch[0]) == flow.dims(node):
                if shortcut:
                    residual = others[0] if flow.reaches(sources[0], others[0]) else None
                else:
                    residual = _stream(flow, others[0], sources, 4)
                if residual is not None:
                    return Join(node, flow.canonical(residual), branch[0])
        inside.add(node)
    return None


def _stream(flow: Flow, node: fx.Node, sources: Sequence[fx.Node], depth: int) -> fx.Node | None:
    """The node itself, or a summand or a scaled factor of it, that feeds one of the sources."""
    plain = flow.canonical(node)
    if flow.dims(node) is not None and any(flow.reaches(plain, source) for source in sources):
        return None if flow.is_leaf(plain) and len(flow.dims(plain) or ()) < 2 else plain
    if depth and flow.op[plain] == "add":
        for operand in flow.inputs[plain]:
            found = _stream(flow, operand, sources, depth - 1) if flow.dims(operand) == flow.dims(plain) else None
            if found is not None:
                return found
    if depth and flow.op[plain] in ("mul", "div"):
        primary = flow.primary(plain)
        return _stream(flow, primary, sources, depth - 1) if primary is not None else None
    return None
