"""Floating-point operations of a captured graph, at the sizes it was captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def _hints(value: Any) -> list[int]:
    return [int(s.node.hint) if isinstance(s, torch.SymInt) and s.node.hint is not None else int(s)
            if isinstance(s, int) else 0 for s in value.shape]


def _numel(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def node_flops(node: fx.Node) -> int:
    """Multiply-adds x 2 of one node; 0 for everything that is not a contraction."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return 0
    target = node.target
    if target in (aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default):
        inner = _hints(node.args[0].meta["val"])[-1]  # type: ignore[union-attr]
        return 2 * _numel(_hints(value)) * inner
    if target in (aten.addmm.default, aten.baddbmm.default):
        inner = _hints(node.args[1].meta["val"])[-1]  # type: ignore[union-attr]
        return 2 * _numel(_hints(value)) * inner
    if target is aten.scaled_dot_product_attention.default:
        query = _hints(node.args[0].meta["val"])  # type: ignore[union-attr]
        keys = _hints(node.args[1].meta["val"])[-2]  # type: ignore[union-attr]
        return 2 * _numel(query) * keys + 2 * _numel(_hints(value)) * keys
    if target in (aten.conv2d.default, aten.convolution.default, aten.conv1d.default, aten.conv3d.default):
        weight = _hints(node.args[1].meta["val"])  # type: ignore[union-attr]
        return 2 * _numel(_hints(value)) * _numel(weight[1:])
    return 0


def graph_flops(graph: fx.Graph) -> int:
    """Total over the nodes of ``graph``."""
    return sum(node_flops(node) for node in graph.nodes)
