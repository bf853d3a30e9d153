"""Operations of our kernels become standard ones, by the ``onnx.py`` of each kernel."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import tokcompile.kernels
from tokcompile.capture.captured import Captured
from tokcompile.capture.trace import inline


def decompose(captured: Captured) -> None:
    """Put what operations of kernels compute in their place."""
    kernels = decompositions()
    for node in list(captured.graph.nodes):
        if node.target in kernels:
            inline_call(captured, node, kernels[node.target])


def inline_call(captured: Captured, node: fx.Node, function: Callable[..., Any]) -> None:
    """Put the graph of ``function``, called as ``node`` is, in the place of ``node``."""
    flat = list(dict.fromkeys(node.all_input_nodes))

    def call(*values: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), dict(zip(flat, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    _replace(captured, node, inline(captured, call, flat, node))


def _replace(captured: Captured, node: fx.Node, new: Any) -> None:
    base = node.args[0]
    if str(node.target).split(".")[1].endswith("_") and isinstance(base, fx.Node):  # in place: later readers too
        later = False
        for user in list(captured.graph.nodes):
            if user is node:
                later = True
            elif later and base in user.all_input_nodes:
                user.replace_input_with(base, new)
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(new[user.args[1]])
            captured.graph.erase_node(user)
    captured.graph.erase_node(node)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operation of a kernel -> how its ``kernels/<name>/onnx.py`` decomposes it: ``DECOMPOSITIONS``, by name."""
    table: dict[Any, Callable[..., Any]] = {}
    for module in pkgutil.iter_modules(tokcompile.kernels.__path__):
        if not module.ispkg:
            continue
        name = f"tokcompile.kernels.{module.name}"
        try:
            lowering = importlib.import_module(f"{name}.onnx")
        except ModuleNotFoundError as error:
            if error.name != f"{name}.onnx":
                raise
            continue
        importlib.import_module(f"{name}.op")
        for operation, function in lowering.DECOMPOSITIONS.items():
            table[getattr(torch.ops.tokcompile, operation).default] = function
    return table
