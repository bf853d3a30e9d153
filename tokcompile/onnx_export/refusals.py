"""Errors of an export that name the node, its line, and the way out, made of what the exporters say."""

from __future__ import annotations

import re

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import module_path, source_line
from tokcompile.errors import ExportError
from tokcompile.onnx_export.repairs import WAYS_OUT

aten = torch.ops.aten


def not_traceable(stage: str, error: Exception) -> ExportError:
    """Name the node and the line of the model at which tracing stopped."""
    text = " ".join(str(error).split("\n\n")[0].split())
    found = re.findall(r"#\s*(\S+\.py:\d+)", str(error)) + [
        f"{f}:{n}" for f, n in re.findall(r'File "([^"]+)", line (\d+)', str(error))
    ]
    if not found:
        trace, frames = error.__traceback__, []
        while trace is not None:
            frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
            trace = trace.tb_next
        found = frames
    own = [f for f in found if "/torch/" not in f and "/tokcompile/" not in f and "/contextlib.py" not in f]
    node = _read_value(error)
    parts = [*([f"node {node.name} ({node.target})"] if node is not None else []), *own[-1:]]
    place = f" [{', '.join(parts)}]" if parts else ""
    way = (
        "move what depends on values of tensors out of forward, or replace it by operations with shapes that follow "
        "from shapes (torch.where for a branch, a mask for a selection)"
    )
    return ExportError(
        f"{stage}: the model cannot be traced with dynamic shapes: {type(error).__name__}: {text[:600]}{place}; {way}"
    )


def _read_value(error: BaseException) -> fx.Node | None:
    """The node whose value Python asked for when tracing failed: the last that the tracer wrote down."""
    trace, graph = error.__traceback__, None
    while trace is not None:
        for value in list(trace.tb_frame.f_locals.values()):
            if isinstance(value, fx.Tracer) and hasattr(value, "graph"):
                graph = value.graph
        trace = trace.tb_next
    calls = [n for n in graph.nodes if n.op == "call_function"] if graph is not None else []
    node = next((n for n in reversed(calls) if n.target is aten.item.default), None)
    if node is None:
        return calls[-1] if calls else None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is aten.ne.Scalar and source.args[1] == 0:
        source = source.args[0]  # a truth value is read as "not 0"
    return source if isinstance(source, fx.Node) else node


def not_convertible(captured: Captured, stage: str, error: Exception) -> ExportError:
    """Name the node of the captured graph that the exporter stumbled over."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = "\n".join(texts)
    ops = re.findall(r"OpOverload\(op='(\w+)\.(\w+)'(?:, overload='(\w+)')?\)", text) or [
        (a, b, c) for a, b, c in re.findall(r"(\w+)[.:]+(\w+)\.(\w+)", text) if a in ("aten", "tokcompile", "prims")
    ]
    for namespace, name, _ in ops:
        for node in captured.graph.nodes:
            if str(node.target).startswith(f"{namespace}.{name}."):
                place = ", ".join(p for p in (f"node {node.name}", module_path(node), source_line(node)) if p)
                way = WAYS_OUT.get(
                    name,
                    "rewrite it with operations that ONNX has, or give its kernel a "
                    "decomposition in kernels/<name>/onnx.py",
                )
                return ExportError(f"{stage}: {node.target} has no ONNX form [{place}]; {way}")
    what = next((t for t in reversed(texts) if t), type(error).__name__)
    named = re.search(r"[Nn]ode '?%?(\w+)'?", text)
    node = next((n for n in captured.graph.nodes if named and n.name == named[1]), None)
    place = "" if node is None else f" [node {node.name}, {source_line(node)}]"
    return ExportError(f"{stage}: cannot be converted to ONNX: {' '.join(what.split())[:600]}{place}")
