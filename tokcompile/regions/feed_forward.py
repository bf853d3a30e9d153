"""Feed-forward blocks: projections around an activation, added back to the residual stream.

::

    mlp            input -> up_proj -> activation -> down_proj -> output
    gated          input -> gate_proj -> activation --+
                   input -> up_proj ------------------ * -> down_proj -> output
    fused_gate_up  input -> one linear -> chunk -> activation(first) * second -> down_proj -> output
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.ops import CONV, LAYOUT, NONLINEAR, NORM, TRIVIAL, is_pointwise

from .flow import Flow, Linear
from .misses import Misses
from .model import FeedForwardRegion, Size
from .residual import Join, find_join

_PARTS = {"getitem", "slice", "select", "narrow"}
_SPLITS = {"chunk", "split", "split_with_sizes", "unbind", "tensor_split"}


@dataclass
class Inner:
    """What stands between the projections into a feed-forward block and the one out of it."""

    parts: list[tuple[Linear, fx.Node]]
    passed: list[fx.Node]
    convolution: bool = False


@dataclass
class FeedForward:
    """A feed-forward region with its place on the residual stream."""

    region: FeedForwardRegion
    join: Join


def find_feed_forward(flow: Flow, misses: Misses) -> list[FeedForward]:
    """All feed-forward blocks that end on a residual stream, in graph order."""
    found = []
    for node in flow.nodes:
        down = flow.linear(node)
        inner = _inner(flow, down) if down is not None else None
        if down is None or inner is None:
            continue
        region = _describe(flow, down, inner)
        result = node
        join = find_join(flow, [inner.parts[0][0].input], result)
        if join is None:
            misses.attempt("feed_forward", "projection out", "projections in", "activation").fails(
                node,
                "expected linear - activation - linear added to a residual stream, "
                f"found that the result of {node} is not added to the value that {region.input} "
                "comes from (a projector or a head)",
            )
            continue
        found.append(FeedForward(region, join))
    return found


def _inner(flow: Flow, down: Linear) -> Inner | None:
    """Walk from the output projection through pointwise operations to the one or two input projections."""
    inner = Inner([], [])
    seen: set[fx.Node] = set()
    stack = [down.input]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        part = _part(flow, node)
        if part is not None:
            inner.parts.append(part)
            continue
        if len(inner.passed) > 40 or len(inner.parts) > 2:
            return None
        operands = flow.inputs[node]
        if flow.op[node] in CONV and flow.is_conv(node, 1):
            inner.convolution, operands = True, operands[:1]
        elif flow.op[node] in NORM:
            operands = operands[:1]
        elif is_pointwise(node):
            size = flow.dims(node)
            operands = [n for n in operands if flow.dims(n) == size]
        elif flow.op[node] not in TRIVIAL | LAYOUT and flow.op[node] != "glu":
            return None
        if not operands:
            return None
        inner.passed.append(node)
        stack.extend(operands)
    bends = [n for n in inner.passed if flow.op[n] in NONLINEAR or flow.op[n] == "pow"]
    if not bends or not 1 <= len(inner.parts) <= 2:
        return None
    inner.parts.sort(key=lambda part: flow.position[part[1]])
    first = flow.canonical(inner.parts[0][0].input, layout=True)
    if any(flow.canonical(part[0].input, layout=True) is not first for part in inner.parts):
        return None
    return inner


def _part(flow: Flow, node: fx.Node) -> tuple[Linear, fx.Node] | None:
    """A linear, or a part of one (chunk, split, slice), and the node where it enters."""
    current, looked = node, 0
    while flow.linear(current) is None:
        op = flow.op[current]
        if op not in TRIVIAL | LAYOUT | _PARTS | _SPLITS or not flow.inputs[current] or looked > 6:
            return None
        current, looked = flow.inputs[current][0], looked + 1
    linear = flow.linear(current)
    return (linear, node) if linear is not None else None


def _describe(flow: Flow, down: Linear, inner: Inner) -> FeedForwardRegion:
    linears = {part[0].node for part in inner.parts}
    glu = any(flow.op[n] == "glu" for n in inner.passed)
    form: Literal["mlp", "gated", "fused_gate_up"] = "gated" if len(linears) > 1 else "fused_gate_up"
    if len(inner.parts) == 1 and not glu:
        form = "mlp"
    gate, up = _gate_and_up(flow, inner)
    source = flow.canonical(inner.parts[0][0].input, layout=True)
    batch, tokens, width = batch_tokens_width(flow, source)
    return FeedForwardRegion(
        path=common_path([module_path(n) for n in (*linears, down.node)]),
        source=source_line(down.node),
        input=source,
        gate_proj=None if form == "mlp" else gate[0].node,
        up_proj=up[0].node,
        activation=_activation(flow, inner, gate, up),
        down_proj=down.node,
        output=down.node,
        batch=batch,
        tokens=tokens,
        width=width,
        inner_width=flow.sizes(down.input)[-1],
        form=form,
        activation_name=_activation_name(flow, inner),
        convolution=inner.convolution,
    )


def batch_tokens_width(flow: Flow, node: fx.Node) -> tuple[Size | None, Size | None, Size]:
    """The sizes of a node ``[B, S, D]``; D alone where it has another rank."""
    sizes = flow.sizes(node)
    return sizes if len(sizes) == 3 else (None, None, sizes[-1])


def _gate_and_up(flow: Flow, inner: Inner) -> tuple[tuple[Linear, fx.Node], tuple[Linear, fx.Node]]:
    """The gate is the part that reaches the product through the activation."""
    if len(inner.parts) == 1:
        return inner.parts[0], inner.parts[0]
    bends = [n for n in inner.passed if flow.op[n] in NONLINEAR]
    scores = [sum(flow.reaches(part[1], bend) for bend in bends) for part in inner.parts]
    gate = 0 if scores[0] >= scores[1] else 1
    return inner.parts[gate], inner.parts[1 - gate]


def _activation(flow: Flow, inner: Inner, gate: tuple[Linear, fx.Node], up: tuple[Linear, fx.Node]) -> fx.Node:
    """The last node that depends on the gate only."""
    nodes = [
        n
        for n in inner.passed
        if flow.op[n] not in TRIVIAL | LAYOUT | NORM
        and flow.reaches(gate[1], n)
        and (gate is up or not flow.reaches(up[1], n))
    ]
    return max(nodes or inner.passed, key=lambda n: flow.position[n])


def _activation_name(flow: Flow, inner: Inner) -> str:
    ops = [flow.op[n] for n in inner.passed]
    if "relu" in ops and ("pow" in ops or "square" in ops):
        return "relu2"
    parts_of_others = ("sigmoid", "tanh", "exp", "clamp_min", "erf")
    direct = next((op for op in ops if op in NONLINEAR and op not in parts_of_others), "")
    if direct:
        tanh = any(flow.op[n] == "gelu" and n.kwargs.get("approximate") == "tanh" for n in inner.passed)
        return "gelu_tanh" if tanh else direct
    if "tanh" in ops and ("pow" in ops or ops.count("mul") >= 4):
        return "gelu_tanh"
    if "erf" in ops:
        return "gelu"
    if "sigmoid" in ops:
        scaled = any(flow.op[n] == "mul" and len(flow.inputs[n]) == 1 for n in inner.passed)
        return "quick_gelu" if scaled else "silu" if ops.count("mul") > 1 or len(inner.parts) == 1 else "sigmoid"
    return next(op for op in ops if op in NONLINEAR or op == "pow")


def common_path(paths: Sequence[str]) -> str:
    """The module path that all given paths begin with."""
    parts = [path.split(".") for path in paths if path]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in same)
