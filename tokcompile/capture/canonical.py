"""Rewrite a few forms that model code uses into others that mean the same and are easier to follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.packed import pack
from tokcompile.capture.trace import inline, propagate
from tokcompile.capture.written import join_writes

aten = torch.ops.aten
_PUT = {aten.index_put.default, aten.index_put_.default}
_ADD = {aten.add.Tensor, aten.add_.Tensor}


#: Ops that only look at their operand in another way; equal ones are interchangeable, whatever is written in between.
_VIEWS = {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.view.default,
}


def canonicalise(captured: Captured) -> int:
    """Apply all rewrites in place; returns how many were made."""
    _share_views(captured.graph)
    count = pack(captured) + join_writes(captured)
    for node in list(captured.graph.nodes):
        if node.target in _PUT and _masked_add(captured, node):
            count += 1
    if count:
        captured.graph.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() and n.target not in _PUT)
        propagate(captured)
        captured.graph.lint()
        captured.graph_module.recompile()
    return count


def _share_views(graph: fx.Graph) -> None:
    """One node for equal views: every layer makes its own of cos, sin and the mask, and each would be narrowed."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in _VIEWS:
            continue
        key = (node.target, fx.node.map_aggregate((node.args, tuple(node.kwargs.items())), _hashable))
        first = seen.setdefault(repr(key), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _hashable(arg: Any) -> Any:
    return ("node", arg.name) if isinstance(arg, fx.Node) else arg


def _masked_add(captured: Captured, put: fx.Node) -> bool:
    """``x[mask] = x[mask] + v``  ->  ``x + masked_scatter(0, mask, v)``: every row keeps its place in x.

    The first form gathers the chosen tokens of all rows into one list, whose length depends on the data.
    """
    x, indices, values = put.args[:3]
    if (len(put.args) > 3 and put.args[3]) or not isinstance(values, fx.Node) or values.target not in _ADD:
        return False
    if len([i for i in indices if i is not None]) != 1 or not isinstance(indices[0], fx.Node):  # type: ignore[index, union-attr]
        return False
    mask = indices[0]  # type: ignore[index]
    if mask.meta["val"].dtype != torch.bool or mask.meta["val"].dim() != x.meta["val"].dim() - 1:  # type: ignore[union-attr]
        return False
    picked = [a for a in values.args[:2] if isinstance(a, fx.Node) and a.target is aten.index.Tensor]
    picked = [a for a in picked if a.args[0] is x and a.args[1][0] is mask]  # type: ignore[index]
    if len(picked) != 1 or values.kwargs.get("alpha", 1) != 1:
        return False
    added = next(a for a in values.args[:2] if a is not picked[0])
    if not isinstance(added, fx.Node):
        return False

    def spread(mask: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        mask = mask.unsqueeze(-1).expand(*mask.shape, added.shape[-1])
        return torch.zeros(mask.shape, dtype=added.dtype, device=added.device).masked_scatter(mask, added)

    order = {n: i for i, n in enumerate(captured.graph.nodes)}
    dense = inline(captured, spread, [mask, added], put)
    total = inline(captured, lambda x, d: x + d, [x, dense], put)
    put.replace_all_uses_with(total)
    if put.target is aten.index_put_.default:  # later readers of x see the new value
        for user in list(x.users):  # type: ignore[union-attr]
            if user in order and order[user] > order[put]:
                user.replace_input_with(x, total)
    captured.graph.erase_node(put)
    return True
