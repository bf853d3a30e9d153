"""Fold what is known when a graph is made: values that follow from given tensors and from literals alone."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

#: A constant of more elements than this is computed anew in each call rather than kept in memory.
MOST_CONSTANT = 2**20
#: Operations whose result can share memory with an argument though their signature does not say so.
_SHARING = {"atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "dropout", "meshgrid", "type_as"}


def fold(traced: fx.GraphModule, given: dict[fx.Node, torch.Tensor]) -> None:
    """Replace what follows from ``given`` and from literals alone by its value, in place.

    Writes into such tensors (a mask that is filled image by image) are carried out here; a tensor that anything else is
    written into stays as it is. Large results that nobody writes to are computed anew in each call.

    Args:
        given: placeholders whose value is known.
    """
    graph = traced.graph
    shared = _Shared(graph)
    known, written = _known(graph, set(given), shared)
    emitted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        large = (
            node in known
            and node.op == "call_function"
            and shared.root(node) not in written
            and _size(node) > MOST_CONSTANT
        )
        if node not in known or (large and any(user in emitted for user in node.users)):
            emitted.add(node)
    values: dict[fx.Node, Any] = {node: tensor.detach().clone() for node, tensor in given.items()}
    constants = _Constants(traced)
    for node in list(graph.nodes):
        for source in node.all_input_nodes if node in emitted else ():
            if source in known and source not in emitted:
                node.replace_input_with(source, constants.get(source, values[source], node))
        if node in known and node not in values:
            values[node] = _evaluate(traced, node, values)
    for node in reversed(graph.nodes):
        if node in known and node not in emitted and node.op != "placeholder":
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()


def _evaluate(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return getattr(traced, str(node.target)).detach().clone()
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


class _Shared:
    """Which values of a graph can share memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self._above: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for source in _sources(node):
                a, b = self.root(source), self.root(node)
                if a is not b:
                    self._above[b] = a

    def root(self, node: fx.Node) -> fx.Node:
        while node in self._above:
            node = self._above[node]
        return node


def _sources(node: fx.Node) -> list[fx.Node]:
    """Arguments whose memory the result of ``node`` can share."""
    if node.target is operator.getitem:
        return [node.args[0]]  # type: ignore[list-item]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target._schema.name.removeprefix("aten::") in _SHARING:
        return node.all_input_nodes
    shared = {
        name
        for result in node.target._schema.returns
        if result.alias_info is not None
        for name in result.alias_info.before_set
    }
    return [
        n
        for argument, n in _by_argument(node)
        if argument.alias_info is not None and argument.alias_info.before_set & shared
    ]


def _by_argument(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, fx.Node):
                yield argument, item


def _known(graph: fx.Graph, given: set[fx.Node], shared: _Shared) -> tuple[set[fx.Node], set[fx.Node]]:
    """What follows from ``given`` and literals alone; and the roots of what is written to."""
    writes = [
        (node, n)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        for argument, n in _by_argument(node)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    spoilt: set[fx.Node] = set()
    while True:
        known = set(given)
        for node in graph.nodes:
            if shared.root(node) not in spoilt and (_is_literal(node) or _can_be_known(node, known)):
                known.add(node)
        more = {shared.root(target) for node, target in writes if node not in known} - spoilt
        if not more:
            return known, {shared.root(target) for _, target in writes}
        spoilt |= more


def _is_literal(node: fx.Node) -> bool:
    """Whether a constant of the graph was written out in the traced code; no tensor that something else holds."""
    return node.op == "get_attr" and all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)


def _can_be_known(node: fx.Node, known: set[fx.Node]) -> bool:
    if node.op != "call_function" or not all(n in known for n in node.all_input_nodes):
        return False
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        and (torch.Tag.nondeterministic_seeded not in node.target.tags)
    )


class _Constants:
    """Values as attributes of a graph module; equal ones are held once."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.names = traced, dict[Any, str]()

    def get(self, node: fx.Node, value: torch.Tensor, user: fx.Node) -> fx.Node:
        """A node for the present ``value`` of ``node``, in front of ``user``."""
        raw = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value
        key = (value.dtype, value.device, value.shape, value.stride(), raw.cpu().numpy().tobytes())
        name = self.names.get(key)
        if name is None:
            name = self.names[key] = f"_known_{len(self.names)}"
            self.traced.register_buffer(name, value.detach().clone(), persistent=False)
        with self.traced.graph.inserting_before(user):
            new = self.traced.graph.get_attr(name)
        new.meta = dict(node.meta)
        return new
