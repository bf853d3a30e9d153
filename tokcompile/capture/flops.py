"""Floating-point operations of a captured graph, at the sizes it was captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from tokcompile.capture.ops import sdpa_arguments
from tokcompile.capture.sizes import hint, product

aten = torch.ops.aten


def _hints(value: Any) -> list[int]:
    return [hint(size, 0) for size in value.shape]


def node_flops(node: fx.Node) -> int:
    """Multiply-adds x 2 of one node; 0 for everything that is not a contraction.

    Operations of a kernel say it themselves, with ``torch.utils.flop_counter.register_flop_formula``.
    """
    value = node.meta.get("val")
    if node.op != "call_function":
        return 0
    target = node.target
    if target in (aten.linear.default, aten.matmul.default):
        inner = _hints(node.args[0].meta["val"])[-1]  # type: ignore[union-attr]
        return 2 * product(_hints(value)) * inner
    if target is aten.scaled_dot_product_attention.default:
        given = sdpa_arguments(node)
        query, keys = _hints(given.query.meta["val"]), _hints(given.key.meta["val"])[-2]
        return 2 * product(query) * keys + 2 * product(_hints(value)) * keys
    if target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        weight = _hints(node.args[1].meta["val"])  # type: ignore[union-attr]
        return 2 * product(_hints(value)) * product(weight[1:])
    if target in (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input):
        inputs, weight = (_hints(n.meta["val"]) for n in node.args[:2])  # type: ignore[union-attr]
        return 2 * product(inputs) * product(weight[1:])
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _sizes(n.meta["val"]))
    return int(formula(*args, **kwargs, out_val=_sizes(value)))


def _sizes(value: Any) -> Any:
    """Sizes of a tensor as a list; a number as it is."""
    return _hints(value) if isinstance(value, torch.Tensor) else value


def graph_flops(graph: fx.Graph) -> int:
    """Total over the nodes of ``graph``."""
    return sum(node_flops(node) for node in graph.nodes)
