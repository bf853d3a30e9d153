"""A feed-forward layer as shared and routed experts: its tensors, its router and what it computes.

One definition for all: calibration measures with it, and passes trace it into graphs. Tensors by name, with E routed
experts of m neurons, s shared neurons, and h = 2 for gated layers, 1 for plain ones:

    shared_in [h s, d], shared_out [d, s]    gate rows in front of up rows
    gate_up [E, h m, d], down [E, d, m]      as ``kernels.grouped_ffn`` takes them
    router_in [h E, d]                       the rows of one neuron for each expert; or, of a fitted router,
    router [E, d], router_offset [E]         a linear map, in fp32
    scale [E], threshold [E]                 see :func:`route`
    shared_bias, bias, router_bias           where the layer has biases
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokcompile.families.moe.split import Split
from tokcompile.kernels.activation import activate
from tokcompile.kernels.grouped_ffn import grouped_ffn
from tokcompile.kernels.precision import as_autocast, linear

_EPS = 1e-6


def hidden(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """What the down-projection reads."""
    return activate(up, activation) if gate is None else activate(gate, activation) * up


def _inner(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, activation: str) -> Tensor:
    value = functional.linear(x, weight, bias)
    gate, up = value.chunk(2, dim=-1) if gated else (None, value)
    return hidden(up, gate, activation)


def energy(x: Tensor, weights: Mapping[str, Tensor], activation: str) -> Tensor:
    """Squared norm of what each neuron adds to the output, as a share of the sum over neurons: fp32 [N, f]."""
    value = _neurons(x, weights, activation).float().square() * weights["down"].float().square().sum(0)
    return value / value.sum(-1, keepdim=True).clamp(min=1e-30)


def parts(
    weights: Mapping[str, Tensor], split: Split, router: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a layer whose neurons are split.

    Args:
        weights: up, gate (of gated layers) [f, d], down [d, f], up_bias, gate_bias [f]; see ``ffn.Formula.weights``.
        router: weight and offset of a fitted one, see ``moe_split.fit``; without, it is made of the typical neurons.
    """
    names = ["gate", "up"] if "gate" in weights else ["up"]
    rows = [weights[n].detach() for n in names]
    biased = any(f"{n}_bias" in weights for n in names)
    biases = [
        weights[f"{n}_bias"].detach() if f"{n}_bias" in weights else rows[0].new_zeros(len(rows[0])) for n in names
    ]
    at = rows[0].device
    shared, experts, typical = (i.to(at) for i in (split.shared, split.experts, split.typical))
    down = weights["down"].detach()
    made = {"gate_up": torch.cat([r[experts] for r in rows], 1), "down": down.T[experts].transpose(1, 2).contiguous()}
    if router is None:
        made["router_in"] = torch.cat([r[typical] for r in rows])
    else:
        made["router"], made["router_offset"] = (v.float().to(at) for v in router)
    if len(shared):
        made |= {"shared_in": torch.cat([r[shared] for r in rows]), "shared_out": down[:, shared].contiguous()}
    if biased:
        made["bias"] = torch.cat([b[experts] for b in biases], 1)
        if router is None:
            made["router_bias"] = torch.cat([b[typical] for b in biases])
        if len(shared):
            made["shared_bias"] = torch.cat([b[shared] for b in biases])
    made["scale"] = torch.zeros(len(experts), device=at)
    made["threshold"] = torch.full((len(experts),), -1.0, device=at)
    return made


def logits(x: Tensor, t: Mapping[str, Tensor], activation: str) -> Tensor:
    """How active the typical neuron of each expert is, or what a fitted router predicts: fp32 [N, E], at least 0."""
    if "router" in t:
        return linear(x.float(), t["router"].float(), t["router_offset"].float()).sigmoid()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(t["router_in"].dtype)
    value = linear(x, t["router_in"], t.get("router_bias")).float()
    gate, up = value.chunk(2, dim=-1) if t["router_in"].shape[0] == 2 * t["scale"].shape[0] else (None, value)
    return hidden(up, gate, activation).abs()


def route(x: Tensor, t: Mapping[str, Tensor], activation: str, router: str, active: int) -> tuple[Tensor, Tensor]:
    """Which experts the tokens use.

    A chosen expert has the weight ``1 + scale * share``: with ``scale`` zero, as a conversion leaves it, an expert
    counts as in the dense layer.

    Args:
        x: [N, d].
        router: "top_k": the ``active`` experts of largest logits; ``share`` is their softmax over all experts.
            "relu": the experts whose logit is above ``threshold``; ``share`` is ReLU(logit - threshold) over its root
            mean square.

    Returns:
        index int64 [N, k] (-1: empty slot) and weight fp32 [N, k], as ``kernels.grouped_ffn`` takes them.
    """
    scores = logits(x, t, activation)
    scale = t["scale"].float()
    if router == "top_k":
        index = torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices[:, :active]
        return index, 1 + scale[index] * scores.softmax(-1).gather(1, index)
    above = torch.relu(scores - t["threshold"].float())
    share = above * torch.rsqrt(above.square().mean(-1, keepdim=True) + _EPS)
    index = torch.where(above > 0, torch.arange(scores.shape[1], device=x.device), -1)
    return index, 1 + scale * share


def run(x: Tensor, t: Mapping[str, Tensor], activation: str, router: str, active: int) -> Tensor:
    """The layer without the bias of its down-projection: [N, d] -> [N, d]."""
    index, weight = route(x, t, activation, router, active)
    x, gate_up, down, bias = as_autocast(x, t["gate_up"], t["down"], t.get("bias"))
    value = grouped_ffn(x, index, weight, gate_up, down, activation, bias)
    if "shared_in" not in t:
        return value
    gated = t["shared_in"].shape[0] == 2 * t["shared_out"].shape[1]
    inner = _inner(x, t["shared_in"], t.get("shared_bias"), gated, activation)
    return functional.linear(inner, t["shared_out"]) + value


def dense(x: Tensor, weights: Mapping[str, Tensor], activation: str) -> Tensor:
    """The layer as it was, without the bias of its down-projection."""
    return functional.linear(_neurons(x, weights, activation), weights["down"])


def _neurons(x: Tensor, weights: Mapping[str, Tensor], activation: str) -> Tensor:
    gate = functional.linear(x, weights["gate"], weights.get("gate_bias")) if "gate" in weights else None
    return hidden(functional.linear(x, weights["up"], weights.get("up_bias")), gate, activation)


def thresholds(x: Tensor, t: Mapping[str, Tensor], activation: str, share: float) -> Tensor:
    """Thresholds with which each expert is used by this share of the tokens ``x``: [E]."""
    if share >= 1:
        return torch.full_like(t["threshold"], -1.0)
    return logits(x, t, activation).quantile(1 - share, dim=0).to(t["threshold"])


def sample(sums: dict[str, Any], name: str, rows: Tensor, limit: int) -> None:
    """Keep every n-th row of a stream, spread over all of it and at most ``limit``; n doubles as the stream goes on."""
    stride, met = int(sums.get(f"{name}_stride", 1)), int(sums.get(f"{name}_met", 0))
    chosen = rows[(-met) % stride :: stride]
    kept = torch.cat([sums[name], chosen]) if name in sums else chosen.clone()
    while len(kept) > limit:
        kept, stride = kept[::2], 2 * stride
    sums[name], sums[f"{name}_stride"], sums[f"{name}_met"] = kept.contiguous(), stride, met + len(rows)


def speedup(
    x: Tensor, t: Mapping[str, Tensor], weights: Mapping[str, Tensor], activation: str, router: str, active: int
) -> float:
    """Time of the dense layer over that of the experts on ``x``, measured here: the best of a few runs each."""
    once = seconds(lambda: dense(x, weights, activation), x.device)
    return once / max(seconds(lambda: run(x, t, activation, router, active), x.device), 1e-9)


def seconds(call: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """The shortest of a few runs."""
    best = math.inf
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
