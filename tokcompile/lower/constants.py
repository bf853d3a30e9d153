"""Compute once what depends on no input of a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.known import MOST_CONSTANT


def fold_constants(captured: Captured) -> int:
    """Compute once what depends on no input, in place; returns how many constants replace it.

    With sizes that are numbers this is a good part of a choice of tokens: which positions are patches, how many of
    them stay.
    """
    graph, values, roots = captured.graph, dict[fx.Node, Any](), []
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in graph.nodes):
        return 0  # it may be a constant that is written to
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(captured.graph_module, node.target)
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes) and _is_foldable(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node in values:
        # what a single operation makes, say a range, costs nothing where it is used
        if (
            node.op != "get_attr"
            and node.all_input_nodes
            and isinstance(values[node], torch.Tensor)
            and any(user not in values for user in node.users)
        ):
            roots.append(node)
    for number, node in enumerate(roots):
        name = f"_tokcompile_constant_{number}"
        captured.graph_module.register_buffer(name, values[node].detach(), persistent=False)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta = {**node.meta, "val": captured.fake(values[node])}
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
    graph.eliminate_dead_code()
    captured.graph_module.recompile()
    return len(roots)


def _is_foldable(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    value = node.meta.get("val")
    sizes = (
        [t.numel() for t in value]
        if isinstance(value, (tuple, list))
        else ([value.numel()] if isinstance(value, torch.Tensor) else [])
    )
    return (
        bool(sizes)
        and all(isinstance(n, int) and n <= MOST_CONSTANT for n in sizes)
        and not (torch.Tag.nondeterministic_seeded in node.target.tags or node.target.namespace == "tokcompile")
    )
