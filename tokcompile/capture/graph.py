"""Questions about a graph and small edits: what a node is computed from, where it stands in the model's code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.ops import is_in_place
from tokcompile.errors import NarrowError


def erase(node: fx.Node) -> None:
    """Erase a node, and what only it used: dead code elimination leaves operations that may draw random numbers."""
    todo = [node]
    while todo:
        dead = todo.pop()
        if not dead.users and dead.op == "call_function" and not dead._erased and not is_in_place(dead):
            sources = dead.all_input_nodes
            dead.graph.erase_node(dead)
            todo += sources


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that ``nodes`` are computed from (without themselves)."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def extract(captured: Captured, results: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[int]]:
    """The part of the graph that computes ``results``, as a module that returns the list of them.

    Returns:
        The module, and which placeholders of ``captured`` it takes, by number.
    """
    needed = ancestors(results) | set(results)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inputs = [i for i, node in enumerate(captured.placeholders) if node in needed]
    for node in captured.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output([copied[n] for n in results])
    return fx.GraphModule(captured.graph_module, graph), inputs


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose code made ``node``, relative to the captured model ("" for the model)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(next(reversed(stack.values()))[0])


#: Attribute of what stands in the place of a module's method: the module. Its name is no part of a path.
OWNER = "_tokcompile_owner"


def clean_path(path: str) -> str:
    """The path as ``named_modules()`` has it, of the source that Dynamo gives for a module."""
    path = "." + re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path)
    path = re.sub(r"\.__dict__\[['\"]_modules['\"]\]", "._modules", path)  # of a module with its own __getattr__
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    path = re.sub(rf"\.\w+\.{OWNER}\b", "", path)
    return path.lstrip(".").removeprefix("_orig_mod.")


def source_line(node: fx.Node) -> str:
    """``file:line`` of the model code that made ``node``, the innermost frame ("" if unknown)."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def refuse(node: fx.Node, reason: str) -> NarrowError:
    """The error, to be raised, that says why ``node`` is left as it is and which line of the model makes it."""
    return NarrowError(reason, node=node.name, path=module_path(node), source=source_line(node))
