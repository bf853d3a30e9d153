"""The exact formula of a feed-forward region: which weights, which activation, in which order.

Region detection names the roles; a rewrite has to know what is computed between the projections, to the last factor. It
is read off by running that part of the graph on random numbers and comparing with ``act(gate) * up`` (or ``act(up)``)
for every activation that the kernels have. What agrees is that formula, however the model spells it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokcompile.capture.sizes import hint
from tokcompile.kernels.activation import ACTIVATIONS, activate
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import FeedForwardRegion
from tokcompile.rewrite.context import Context

aten = torch.ops.aten

#: Largest difference from the formula in fp32; and where the graph itself rounds to 16 bits on the way.
_TOLERANCE, _ROUNDED = 2e-5, 2e-2
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_SIXTEEN = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Projection:
    """A linear map of the last axis, ``out = x @ matrix.T + bias``.

    Attributes:
        node: the linear in the graph. input: what it reads.
        weight, bias: inputs of the graph.
        transposed: the weight is stored [in, out].
        start, size: which of its outputs are meant (gate and up may be one linear).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    start: int
    size: int

    def matrix(self, weight: Tensor) -> Tensor:
        """[size, in]: a view of the stored weight."""
        weight = weight.squeeze(-1) if weight.ndim == 3 else weight
        return (weight.t() if self.transposed else weight).narrow(0, self.start, self.size)

    def offset(self, bias: Tensor) -> Tensor:
        """[size]: a view of the stored bias."""
        return bias.narrow(0, self.start, self.size)


@dataclass(frozen=True)
class Formula:
    """``down(act(gate) * up)``, or ``down(act(up))`` where ``gate`` is None.

    Attributes:
        inner: what ``down`` reads.
        activation: one of ``ACTIVATIONS``.
    """

    gate: Projection | None
    up: Projection
    down: Projection
    inner: fx.Node
    activation: str

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.up.size

    def weights(self, ctx: Context) -> dict[str, Tensor]:
        """Real weights by role: gate, up [f, d], down [d, f], and gate_bias, up_bias where there are any."""
        found = {}
        for name, part in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            if part is None:
                continue
            found[name] = part.matrix(ctx.real(part.weight))
            if part.bias is not None and name != "down":
                found[f"{name}_bias"] = part.offset(ctx.real(part.bias))
        return found


def read_formula(ctx: Context, region: FeedForwardRegion) -> Formula:
    """The formula of a feed-forward region.

    Raises:
        NarrowError: it is another one (a convolution, a norm, dropout in training, an activation without a name).
    """
    flow = Flow(ctx.captured.graph)
    up, down = (_projection(ctx, flow, node) for node in (region.up_proj, region.down_proj))
    gate = None if region.gate_proj is None else _projection(ctx, flow, region.gate_proj)
    inner = down.input
    sources = [up.node] if gate is None or gate.node is up.node else [gate.node, up.node]
    generator = torch.Generator().manual_seed(0)
    given = {node: torch.randn(1, node.meta["val"].shape[-1], generator=generator) * 2 for node in sources}
    found, rounded = _evaluate(ctx, flow, region, given, inner)
    fits: list[tuple[float, str, Projection | None, Projection]] = []
    for one, other in _readings(gate, up):
        values = {p: given[p.node].narrow(-1, p.start, p.size) for p in (one, other) if p is not None}
        for name in ACTIVATIONS:
            value = activate(values[other], name) if one is None else activate(values[one], name) * values[other]
            if value.shape[-1] == found.shape[-1]:
                fits.append((float((value - found).abs().max()), name, one, other))
    best = min(fits, key=lambda fit: fit[0], default=None)
    if best is None or not best[0] < (_ROUNDED if rounded else _TOLERANCE):
        raise ctx.refuse(
            region.activation,
            "the computation between the projections is not an activation "
            f"({', '.join(ACTIVATIONS)}), gated or plain: it differs by "
            f"{'nothing that fits' if best is None else f'{best[0]:.2g}'}; a dropout "
            "here needs model.eval()",
        )
    return Formula(best[2], best[3], down, inner, best[1])


def _readings(gate: Projection | None, up: Projection) -> list[tuple[Projection | None, Projection]]:
    """What may be gate and what up: as detected, or the other way round; halves where they are one linear."""
    if gate is None:
        return [(None, up)]
    if gate.node is not up.node:
        return [(gate, up), (up, gate)]
    if up.size % 2:
        return []
    half = up.size // 2
    first = Projection(up.node, up.input, up.weight, up.bias, up.transposed, 0, half)
    second = Projection(up.node, up.input, up.weight, up.bias, up.transposed, half, half)
    return [(first, second), (second, first)]


def _projection(ctx: Context, flow: Flow, node: fx.Node) -> Projection:
    linear = flow.linear(node)
    assert linear is not None
    op, args = flow.op[node], node.args
    bias: Any = args[0] if op == "addmm" else args[2] if op in ("linear", "conv1d") and len(args) > 2 else None
    if op == "addmm" and (node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1):
        raise ctx.refuse(node, "expected a product plus a bias, found one with factors")
    weight, transposed = linear.weight, op not in ("linear", "conv1d")
    while weight.target in _TRANSPOSES:
        weight, transposed = weight.args[0], not transposed  # type: ignore[assignment]
    for value in (weight, bias):
        if value is not None and value not in ctx.captured.placeholders:
            raise ctx.refuse(
                node,
                f"expected a weight that is a parameter, found {value}, computed in the graph "
                "(quantised, or shared weights that are put together at run time)",
            )
    return Projection(node, linear.input, weight, bias, transposed, 0, int(linear.features))


def _evaluate(
    ctx: Context, flow: Flow, region: FeedForwardRegion, given: Mapping[fx.Node, Tensor], target: fx.Node
) -> tuple[Tensor, bool]:
    """``target`` for one token, with the values ``given`` [1, f] for some nodes: -> [1, f], rounded to 16 bits?"""
    between = [
        n for n in flow.nodes if any(flow.reaches(s, n) for s in given) and flow.reaches(n, target) and n not in given
    ]
    rounded = any(a in _SIXTEEN for n in between for a in (*n.args, *n.kwargs.values()))
    error: Exception | None = None
    for ones in (True, False):  # sizes of one token, or of the call where they are numbers in the graph
        values: dict[fx.Node, Any] = {}
        for node, value in given.items():
            sizes = [1 if ones else _number(s, False) for s in node.meta["val"].shape[:-1]]
            values[node] = value.expand(*sizes, value.shape[-1]).clone()
        try:
            for node in between:
                args, kwargs = fx.map_arg((node.args, node.kwargs), functools.partial(_value, values=values, ones=ones))
                values[node] = node.target(*args, **kwargs)
            return values[target].reshape(-1, values[target].shape[-1])[:1].float(), rounded
        except Exception as caught:  # any operation of the model's own
            error = caught
    raise ctx.refuse(region.activation, f"the computation between the projections cannot be run on its own: {error}")


def _value(node: fx.Node, values: Mapping[fx.Node, Any], ones: bool) -> Any:
    if node in values:
        return values[node]
    known = node.meta["val"]
    if isinstance(known, torch.Tensor):
        raise ValueError(f"it reads {node}")
    return _number(known, ones)


def _number(size: Any, ones: bool) -> Any:
    if isinstance(size, torch.SymInt):
        return 1 if ones else hint(size)
    return size
