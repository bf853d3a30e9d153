"""Dataflow questions about one graph: who feeds whom, through which operations, with which sizes.

Only tensors are followed: a size taken from a tensor does not carry its values. An in-place write to a view
(``buffer[..., :8] = x``) makes every later reader of the buffer depend on the write.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcompile.capture.ops import CONV, LAYOUT, NORM, POINTWISE, SHAPE_ONLY, TRIVIAL, VIEWS, is_in_place, op_name
from tokcompile.capture.sizes import dims_of


@dataclass(frozen=True)
class Linear:
    """An affine map of the last axis: ``node = input @ weight + bias``; ``features`` is the output width."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    features: Any


@dataclass
class Walk:
    """The result of a walk against the dataflow: nodes passed, and the nodes at which it stopped."""

    passed: list[fx.Node] = field(default_factory=list)
    stops: list[fx.Node] = field(default_factory=list)


class Flow:
    """Index of one graph. All queries are by node; positions follow graph order, which is a topological order."""

    def __init__(self, graph: fx.Graph) -> None:
        live = _live(graph)
        self.nodes = [node for node in graph.nodes if node in live]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.op = {node: op_name(node) for node in self.nodes}
        self._dims: dict[fx.Node, tuple[Any, ...] | None] = {}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        self._above: dict[fx.Node, int] = {}
        self._base: dict[fx.Node, fx.Node] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        self._connect()
        self.by_op: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            self.by_op.setdefault(self.op[node], []).append(node)

    def _connect(self) -> None:
        base, writers = self._base, self._writers
        for node in self.nodes:
            operands = [n for n in node.all_input_nodes if _is_tensor(n)]
            if self.op[node] in VIEWS and operands:
                base[node] = base.get(operands[0], operands[0])
            inputs = [] if self.op[node] in SHAPE_ONLY else list(operands)
            for operand in operands if self.op[node] not in SHAPE_ONLY else []:
                inputs += [w for w in writers.get(base.get(operand, operand), []) if w not in inputs]
            if is_in_place(node) and operands:
                target = base.get(operands[0], operands[0])
                base[node] = target
                writers.setdefault(target, []).append(node)
            self.inputs[node] = inputs if _is_tensor(node) else []
            above = 0
            for source in self.inputs[node]:
                above |= self._above[source] | (1 << self.position[source])
                self.users[source].append(node)
            self._above[node] = above

    def writes(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """In-place writes to the memory of ``node`` before ``reader`` reads it."""
        found = self._writers.get(self._base.get(node, node), [])
        return [n for n in found if self.position[n] < self.position[reader]]

    def written(self, node: fx.Node) -> bool:
        """Whether anything writes to the memory of ``node``."""
        return bool(self._writers.get(self._base.get(node, node)))

    # Reachability -----------------------------------------------------------------------------------------------

    def reaches(self, source: fx.Node, target: fx.Node) -> bool:
        """Whether values of ``source`` flow into ``target`` (a node reaches itself)."""
        return source is target or bool(self._above[target] >> self.position[source] & 1)

    def mask(self, nodes: Iterable[fx.Node]) -> int:
        """A set of nodes as a bit mask, for :meth:`reached_by`."""
        bits = 0
        for node in nodes:
            bits |= 1 << self.position[node]
        return bits

    def reached_by(self, target: fx.Node, mask: int) -> list[fx.Node]:
        """The nodes of ``mask`` whose values flow into ``target``, in graph order."""
        found = (self._above[target] | 1 << self.position[target]) & mask
        nodes = []
        while found:
            low = found & -found
            nodes.append(self.nodes[low.bit_length() - 1])
            found ^= low
        return nodes

    # Sizes ------------------------------------------------------------------------------------------------------

    def dims(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Sizes as ints and symbolic expressions: comparing them never adds a guard. None when not one tensor."""
        if node not in self._dims:
            value = node.meta.get("val")
            self._dims[node] = dims_of(value.shape) if isinstance(value, torch.Tensor) else None
        return self._dims[node]

    def sizes(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes as ints and SymInts."""
        value = node.meta.get("val")
        return tuple(value.shape) if isinstance(value, torch.Tensor) else ()

    # Steps ------------------------------------------------------------------------------------------------------

    def canonical(self, node: fx.Node, layout: bool = False) -> fx.Node:
        """Look through operations that keep the values (with ``layout``: that keep them up to shape and order).

        A copy that is written to afterwards does not keep them.
        """
        while (
            self.inputs[node]
            and node not in self._writers
            and (self.op[node] in TRIVIAL or (layout and self.op[node] in LAYOUT))
        ):
            node = self.inputs[node][0]
        return node

    def primary(self, node: fx.Node) -> fx.Node | None:
        """The one operand that has the result's size in a pointwise operation, the operand of a norm or a view."""
        op, inputs = self.op[node], self.inputs[node]
        if op in TRIVIAL or op in LAYOUT or op in NORM:
            return inputs[0] if inputs else None
        if op not in POINTWISE:
            return None
        full = {n for n in inputs if self.dims(n) == self.dims(node)}
        return full.pop() if len(full) == 1 else None

    def linear(self, node: fx.Node) -> Linear | None:
        """The node as an affine map with a weight that is a parameter, in any of its spellings."""
        op, args, dims = self.op[node], node.args, self.dims(node)
        pair: tuple[Any, Any] | None = None
        if op == "linear":
            pair = (args[0], args[1])
        elif op == "addmm":
            pair = (args[1], args[2])
        elif op in ("mm", "matmul") and self._is_weight(args[1]):
            pair = (args[0], args[1])
        elif op == "conv1d" and isinstance(args[1], fx.Node) and (self.dims(args[1]) or (0,))[-1] == 1:
            return Linear(node, args[0], args[1], dims[1] if dims and len(dims) == 3 else None)  # type: ignore[arg-type]
        if pair is None or not dims:
            return None
        return Linear(node, pair[0], pair[1], dims[-1])

    def _is_weight(self, node: Any) -> bool:
        if not isinstance(node, fx.Node) or len(self.dims(node) or ()) != 2:
            return False
        return self.is_leaf(self.canonical(node, layout=True))

    def is_leaf(self, node: fx.Node) -> bool:
        """Whether the node is a parameter, a buffer or an input of the graph."""
        return node.op in ("placeholder", "get_attr")

    def is_conv(self, node: fx.Node, least_axes: int = 2) -> bool:
        dims = self.dims(node.args[1]) if self.op[node] in CONV and isinstance(node.args[1], fx.Node) else None
        return dims is not None and len(dims) >= least_axes + 2

    # Walks ------------------------------------------------------------------------------------------------------

    def back(
        self,
        start: fx.Node,
        through: Collection[str],
        limit: int = 120,
        stop: Callable[[fx.Node], bool] | None = None,
        reader: fx.Node | None = None,
    ) -> Walk:
        """Walk against the flow through the named operations; latest node first.

        With ``reader`` (who reads ``start``), in-place writes to ``start`` before it count as its sources.
        """
        starts = [start, *(self.writes(start, reader) if reader is not None else [])]
        walk, seen = Walk(), set(starts)
        heap = [(-self.position[n], n.name, n) for n in starts]
        heapq.heapify(heap)
        while heap and len(walk.passed) < limit:
            node = heapq.heappop(heap)[2]
            if self.op[node] not in through or (stop is not None and stop(node)):
                walk.stops.append(node)
                continue
            walk.passed.append(node)
            for source in self.inputs[node]:
                if source not in seen:
                    seen.add(source)
                    heapq.heappush(heap, (-self.position[source], source.name, source))
        return walk

    def forward(self, start: fx.Node, through: Callable[[fx.Node], bool], limit: int = 80) -> Iterator[fx.Node]:
        """Readers of ``start``, readers of those that ``through`` lets pass, and so on, in graph order."""
        seen, heap = {start}, [(self.position[n], n.name, n) for n in self.users[start]]
        heapq.heapify(heap)
        while heap and limit:
            node = heapq.heappop(heap)[2]
            if node in seen:
                continue
            seen.add(node)
            limit -= 1
            yield node
            if through(node):
                for user in self.users[node]:
                    heapq.heappush(heap, (self.position[user], user.name, user))


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values leave the graph, as a result or by a write; a tracer keeps more (random operations)."""
    stack = [
        n for node in graph.nodes if node.op == "output" or is_in_place(node) for n in (*node.all_input_nodes, node)
    ]
    live = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    while stack:
        node = stack.pop()
        if node not in live and node.op != "output":
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, list, tuple))
