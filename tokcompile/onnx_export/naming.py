"""Names of an ONNX model: inputs, outputs and axes; and nothing that says where it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

Axes = Mapping[str, Mapping[int, str]]


def rename(
    placeholders: Sequence[fx.Node],
    named: Axes,
    given: Axes,
    converted: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> None:
    """Give inputs, outputs and their axes the names of the stage: ``named`` axes of inputs, ``given`` of outputs."""
    model = converted.model
    symbols: dict[str, str] = {}
    for node, name in zip(placeholders, inputs, strict=True):
        for dim, axis in named.get(name, {}).items():
            expr = node.meta["val"].shape[dim].node.expr
            if expr.is_Symbol:
                symbols.setdefault(str(expr), axis)
        if isinstance(node.meta["val"], torch.SymInt):
            symbols.setdefault(str(node.meta["val"].node.expr), f"{name}")
    import onnx_ir as ir

    graph = model.graph
    assert len(graph.inputs) == len(inputs), ([v.name for v in graph.inputs], inputs)
    results = list(graph.outputs)
    assert len(results) == len(outputs), ([v.name for v in results], outputs)
    taken = set(graph.inputs)
    for i, value in enumerate(results):  # one value returned twice, or an input handed through
        if value in taken:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
        taken.add(graph.outputs[i])
    wanted = {*inputs, *outputs}
    kept = {*graph.inputs, *graph.outputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in wanted and value not in kept:
                value.name = f"{value.name}__inner"
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    converted.rename_axes(symbols)
    for value in [*graph.inputs, *graph.outputs]:
        axes = {**named.get(value.name, {}), **given.get(value.name, {})}
        if value.shape is not None and axes:
            dims = [axes.get(i, d) if not isinstance(d, int) else d for i, d in enumerate(value.shape)]
            value.shape = ir.Shape(dims)


def splice(model: Any, size: str, value: str) -> None:
    """Feed a data-dependent size from the value that the graph itself computes for it."""
    graph = model.graph
    inner = next(v for v in graph.inputs if v.name == size)
    source = next(v for v in graph.outputs if v.name == value)
    graph.inputs.remove(inner)
    graph.outputs.remove(source)
    inner.replace_all_uses_with(source)
    graph.sort()


def strip(model: Any) -> None:
    """Remove what only says where the model came from: stack traces with paths, signatures."""
    for holder in [model.graph, *model.functions.values()]:
        holder.metadata_props.clear()
        holder.doc_string = None
        for value in [*holder.inputs, *holder.outputs]:
            value.metadata_props.clear()
        for node in holder.all_nodes() if hasattr(holder, "all_nodes") else holder:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
