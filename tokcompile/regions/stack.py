"""Stacks of layers along one residual stream, and the cuts between the layers.

A cut is a node that every path from the first residual node to the last one passes: a dominator of the last node in
the graph between the two. Layers are the runs of blocks between cuts, so pre-norm, post-norm and parallel residuals
need no rules of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from tokcompile.capture.graph import module_path
from tokcompile.capture.ops import CONTRACTION, CONV, NORM

from .feed_forward import common_path
from .flow import Flow
from .model import AttentionRegion, FeedForwardRegion, Layer, MoeRegion
from .residual import Join


@dataclass
class Block:
    """An attention, feed-forward or mixture-of-experts region and where it joins the residual stream."""

    region: AttentionRegion | FeedForwardRegion | MoeRegion
    join: Join


@dataclass
class Stream:
    """The blocks along one residual stream: from ``start`` (read by the first) to ``end`` (written by the last)."""

    start: fx.Node
    end: fx.Node
    blocks: list[Block]
    layers: list[Layer] = field(default_factory=list)

    @property
    def attentions(self) -> list[AttentionRegion]:
        return [b.region for b in self.blocks if isinstance(b.region, AttentionRegion)]

    @property
    def self_attentions(self) -> list[AttentionRegion]:
        """Without those that read another sequence."""
        return [region for region in self.attentions if not region.cross]

    @property
    def output(self) -> fx.Node:
        return self.layers[-1].output if self.layers else self.end


def find_streams(flow: Flow, blocks: Sequence[Block]) -> list[Stream]:
    """Group blocks whose residuals follow one another, with or without a norm between, into streams."""
    adds = {block.join.add for block in blocks}
    links = nx.Graph()
    for block in blocks:
        links.add_edge(_stream_above(flow, block.join.residual, adds), block.join.add)
    streams = []
    for component in nx.connected_components(links):
        members = sorted(
            (b for b in blocks if b.join.add in component),
            key=lambda b: (flow.position[b.join.add], flow.position[b.region.output]),
        )
        start = min((b.join.residual for b in members), key=flow.position.__getitem__)
        stream = Stream(start, members[-1].join.add, members)
        stream.layers = _layers(flow, stream)
        streams.append(stream)
    return sorted(streams, key=lambda s: flow.position[s.start])


def _stream_above(flow: Flow, node: fx.Node, adds: set[fx.Node]) -> fx.Node:
    """The residual addition that ``node`` is, or is made from by norms and scales; else the node itself."""
    current: fx.Node | None = node
    for _ in range(40):
        if current is None:
            break
        if current in adds:
            return current
        current = (
            flow.primary(current)
            or _written(flow, current)
            or _above_unknown(flow, current)
            or _sum_with_outside(flow, current, adds)
        )
    return node


def _sum_with_outside(flow: Flow, node: fx.Node, adds: set[fx.Node]) -> fx.Node | None:
    """The stream before something that no layer made (deepstack features) is added to all of it."""
    operands = flow.inputs[node][:2]
    if flow.op[node] != "add" or len(operands) < 2:
        return None
    inside = [n for n in operands if any(flow.reaches(add, n) for add in adds)]
    return inside[0] if len(inside) == 1 and flow.dims(inside[0]) == flow.dims(node) else None


def _above_unknown(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The stream before a block that is no known region is added to it: what both operands are made from."""
    operands = flow.inputs[node][:2]
    if flow.op[node] != "add" or len(operands) < 2:
        return None
    found = {_shared(flow, one, other) for one, other in (operands, operands[::-1])} - {None}
    stream = found.pop() if len(found) == 1 else None
    return stream if stream is not None and flow.dims(stream) == flow.dims(node) else None


def _shared(flow: Flow, scaled: fx.Node, branch: fx.Node) -> fx.Node | None:
    """The value that ``scaled`` is, but for scales and norms, if ``branch`` is made from it."""
    current: fx.Node | None = scaled
    while current is not None and not flow.reaches(current, branch):
        current = flow.primary(current)
    return current


def _written(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The stream before some of its tokens are replaced, or features are added at some of them."""
    if flow.op[node] in ("index_put", "index_add", "index_copy", "scatter", "scatter_add", "masked_scatter"):
        return flow.inputs[node][0]
    return None


def cuts(flow: Flow, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """All nodes that every path from ``start`` to ``end`` passes, both included, in graph order."""
    graph = nx.DiGraph()
    graph.add_node(start)
    for node in flow.nodes[flow.position[start] : flow.position[end] + 1]:
        if flow.reaches(start, node) and flow.reaches(node, end):
            graph.add_edges_from((source, node) for source in flow.inputs[node] if source in graph)
    above = nx.immediate_dominators(graph, start)
    chain = [end]
    while chain[-1] is not start:
        chain.append(above[chain[-1]])
    return chain[::-1]


def _layers(flow: Flow, stream: Stream) -> list[Layer]:
    points = cuts(flow, stream.start, stream.end)
    place = {node: i for i, node in enumerate(points)}
    segments = _segments(flow, stream, points)
    runs: list[list[tuple[int, list[Block]]]] = []
    for segment in segments:
        kinds = {b.region.kind for b in segment[1]}
        ended = bool(runs) and any(b.region.kind != "attention" for _, run in runs[-1] for b in run)
        if not runs or ended or ("attention" in kinds and _unknown_behind_attention(runs[-1])):
            runs.append([])
        runs[-1].append(segment)
    layers: list[Layer] = []
    for index, run in enumerate(runs):
        before = layers[-1].output if layers else stream.start
        if index + 1 < len(runs):
            number, following = runs[index + 1][0]
            residual = following[0].join.residual if following else points[number]
            output = residual if residual in place else points[number]
        else:
            output = _last_output(flow, stream)
        layers.append(_layer(flow, index, [b for _, part in run for b in part], before, output))
    return layers


def _unknown_behind_attention(run: list[tuple[int, list[Block]]]) -> bool:
    """Whether something that is no known region stands where a layer has its feed-forward block."""
    filled = [bool(blocks) for _, blocks in run]
    return True in filled and False in filled[filled.index(True) :]


def _segments(flow: Flow, stream: Stream, points: list[fx.Node]) -> list[tuple[int, list[Block]]]:
    """(number of the cut above, blocks) for each stretch between cuts that holds blocks or unknown mixing."""
    positions = [flow.position[n] for n in points]
    owned: dict[int, list[Block]] = {}
    number = 0
    for block in stream.blocks:
        while number + 1 < len(positions) - 1 and positions[number + 1] < flow.position[block.join.add]:
            number += 1
        owned.setdefault(number, []).append(block)
    mixing = CONTRACTION | CONV | {"linear", "addmm"}
    for number, (low, high) in enumerate(itertools.pairwise(positions)):
        if (
            number not in owned
            and high - low > 1
            and any(
                flow.op[n] in mixing and flow.reaches(points[number], n) and flow.reaches(n, points[number + 1])
                for n in flow.nodes[low + 1 : high]
            )
        ):
            owned[number] = []
    return sorted(owned.items())


def _layer(flow: Flow, index: int, blocks: list[Block], before: fx.Node, output: fx.Node) -> Layer:
    attentions = [b.region for b in blocks if isinstance(b.region, AttentionRegion)]
    own = [r for r in attentions if not r.cross]
    feeds = [b.region for b in blocks if not isinstance(b.region, AttentionRegion)]
    paths = [b.region.path for b in blocks] + [module_path(b.join.add) for b in blocks]
    return Layer(
        common_path(paths), index, before, output, next(iter(own or attentions), None), next(iter(feeds), None)
    )


def _last_output(flow: Flow, stream: Stream) -> fx.Node:
    """The last addition or, where the stream goes through a norm after each addition, the norm of it."""
    adds = {b.join.add for b in stream.blocks}
    inner = [b.join.residual for b in stream.blocks if b.join.residual is not stream.start]
    normed = [n for n in inner if n not in adds and _passes_norm(flow, n, adds)]
    if not normed or len(normed) < len(inner):
        return stream.end
    found = stream.end
    for node in flow.forward(stream.end, lambda n: flow.primary(n) is not None, limit=16):
        if flow.primary(node) is not None and flow.op[node] in NORM | {"mul", "add"}:
            root = _stream_above(flow, node, {stream.end})
            if root is stream.end and _passes_norm(flow, node, {stream.end}):
                found = node
                if flow.op[node] in NORM:
                    break
    return found


def _passes_norm(flow: Flow, node: fx.Node, adds: set[fx.Node]) -> bool:
    current: fx.Node | None = node
    while current is not None and current not in adds:
        if flow.op[current] in NORM or any(flow.op[n] == "rsqrt" for n in flow.inputs[current]):
            return True
        current = flow.primary(current)
    return False
