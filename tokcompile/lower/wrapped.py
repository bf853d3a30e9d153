"""Weights that are no plain tensors: quantised by torchao, or sharded (DTensor).

A capture has plain stand-ins of the same shape in their place, so that regions are found and tokens dropped as ever.
What runs gets the weights themselves. They define ``torch.nn.functional.linear``, not the steps that
``aten.linear`` is made of, so a graph that reads such a weight calls the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokcompile.capture.captured import Captured
from tokcompile.lower.parallel import local_example, write_out

aten = torch.ops.aten


def wrapped_kind(value: Any) -> str:
    """Name of the class of a tensor that wraps others ("" for plain ones)."""
    return type(value).__name__ if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value) else ""


def note_wrapped(captured: Captured, args: Sequence[Any]) -> None:
    """Note, at each placeholder that such a weight comes in at, what it looks like (``meta["wrapped"]``)."""
    for node, arg in zip(captured.placeholders, args, strict=False):
        if wrapped_kind(arg) and "sharded" not in node.meta:
            node.meta["wrapped"] = captured.fake_mode.from_tensor(arg.detach(), static_shapes=True)
            node.meta["wrapped"].requires_grad_(arg.requires_grad)


def call_functions(captured: Captured) -> list[str]:
    """Let the graph call the functions that wrapped weights define, in place; the classes of these weights."""
    sharded = write_out(captured)
    kinds = sorted({wrapped_kind(node.meta.get("wrapped")) for node in captured.placeholders} - {""})
    if kinds:
        for node in captured.graph.nodes:
            if node.op == "call_function" and node.target in _FUNCTIONS:
                node.target = _FUNCTIONS[node.target]
        captured.graph_module.recompile()
    return [*kinds, "DTensor"] if sharded else kinds


def _embedding(weight: Tensor, indices: Tensor, padding: int = -1, scale: bool = False, sparse: bool = False) -> Tensor:
    return F.embedding(indices, weight, None if padding < 0 else padding, scale_grad_by_freq=scale, sparse=sparse)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: F.linear,
    aten.embedding.default: _embedding,
    aten.conv2d.default: F.conv2d,
    aten.matmul.default: torch.matmul,
}


def example(node: fx.Node) -> Any:
    """What a placeholder takes: the value that it was captured with, or the form of a wrapped weight."""
    return local_example(node) if "sharded" in node.meta else node.meta.get("wrapped", node.meta["val"])
