"""Trace plain torch code to pre-dispatch ATen, put it into a graph, and derive the shapes of a graph anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.ops import VIEWS, is_in_place, op_name

aten = torch.ops.aten
#: Run-time assertions that compute nothing: what tracing learns of numbers (see :mod:`tokcompile.capture.checks`).
ASSERTIONS = {aten._assert_scalar.default, aten._assert_tensor_metadata.default}


def trace(call: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """Trace ``call(*inputs)`` to pre-dispatch ATen under ``mode``."""
    with mode, fx_traceback.preserve_node_meta():
        graph_module = make_fx(call, tracing_mode="real", pre_dispatch=True)(*inputs)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = getattr(graph_module, node.target)  # a tensor, or the body of a loop
        node.meta.setdefault("val", mode.from_tensor(value) if isinstance(value, torch.Tensor) else value)
    placeholders = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        node.meta["val"] = value
    _remove_assertions(graph_module)
    return graph_module


def _remove_assertions(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in ASSERTIONS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() and node.target is not aten.item.default)
    graph_module.recompile()


def propagate(captured: Captured) -> None:
    """Derive every ``meta["val"]`` anew, in place; an inconsistent shape raises here."""
    derive(captured, (node for node in captured.graph.nodes if node.op == "call_function"))


def derive(captured: Captured, nodes: Iterable[fx.Node]) -> None:
    """Derive the ``meta["val"]`` of calls from those of their arguments, in place."""
    # symbolic sizes reach the meta kernels only through the Python dispatcher
    with captured.fake_mode, enable_python_dispatcher():
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            except ValueError:
                if not loosen_view(node):
                    raise
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def loosen_view(node: fx.Node) -> bool:
    """Let a ``view`` copy where the memory of what it views is ordered otherwise than at capture, in place.

    ``contiguous()`` leaves no trace in a graph where there was nothing to do; the ``view`` behind it does not fit what
    a rewrite puts in front of it. As ``reshape`` it is the same view where it can be one. Not where something writes
    through it.

    Returns:
        Whether ``node`` was such a view.
    """
    if node.target is not aten.view.default or _is_written(node):
        return False
    node.target = aten.reshape.default
    return True


def _is_written(node: fx.Node) -> bool:
    """Whether an operation below writes to the memory of ``node``, itself or a view of it."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if is_in_place(user):
                return True
            if op_name(user) in VIEWS and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def inline(captured: Captured, function: Callable[..., Any], args: Sequence[Any], before: fx.Node) -> Any:
    """Trace ``function`` over the values of ``args`` (nodes or numbers) and put its graph in front of ``before``.

    Passes say what they compute in plain torch; this makes it a part of the captured graph.

    Returns:
        The node (or tuple of nodes) of the result.
    """
    nodes = [a for a in args if isinstance(a, fx.Node)]
    values = [n.meta["val"] for n in nodes]

    def call(*tensors: Any) -> Any:
        it = iter(tensors)
        return function(*(next(it) if isinstance(a, fx.Node) else a for a in args))

    sub = trace(call, values, captured.fake_mode)
    mapped: dict[fx.Node, Any] = dict(zip((n for n in sub.graph.nodes if n.op == "placeholder"), nodes, strict=True))
    result: Any = None
    with captured.graph.inserting_before(before):
        for node in sub.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: mapped[n])
                continue
            new = captured.graph.node_copy(node, lambda n: mapped[n])
            if node.op == "get_attr":
                name = f"_tokcompile_{len(list(captured.graph.nodes))}_{node.target}"
                setattr(captured.graph_module, name, getattr(sub, node.target))
                new.target = name
            new.meta["tokcompile"] = getattr(function, "__name__", "inline")
            if "nn_module_stack" in before.meta:
                new.meta["nn_module_stack"] = before.meta["nn_module_stack"]
            mapped[node] = new
    return result
