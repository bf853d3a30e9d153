"""Routed feed-forward experts: the definition, in plain torch.

    gated   FFN_e(x) = W_down[e] (act(W_gate[e] x + b_gate[e]) * (W_up[e] x + b_up[e]))
    plain   FFN_e(x) = W_down[e]  act(W_up[e] x + b_up[e])
    y_i     = sum_j weight[i, j] * FFN_{index[i, j]}(x_i)        over the slots j with index[i, j] >= 0

There is no output bias: where experts are slices of one layer its bias belongs to the layer and is added once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import activate


def is_gated(gate_up: Tensor, down: Tensor) -> bool:
    """Whether ``gate_up`` holds gate rows in front of up rows (its height is twice the width of ``down``)."""
    return gate_up.shape[1] == 2 * down.shape[2]


def grouped_ffn_reference(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    """Every token through the experts of its slots; copies an expert's weights for each slot of each token.

    Args:
        x: float [N, d].
        index: int64 [N, k], experts in 0..E-1; negative: the slot is empty, its weight has no influence.
        weight: float [N, k].
        gate_up: float [E, 2m, d], gate rows in front of up rows; or [E, m, d] for plain experts.
        down: float [E, d, m].
        activation: one of ``ACTIVATIONS``.
        bias: float [E, 2m] or [E, m], added before the activation; or None.

    Returns:
        float [N, d], type of ``x``; sums over slots in fp32 at least.
    """
    tokens, slots = index.shape
    inside = (index >= 0).reshape(-1)
    token = torch.arange(tokens, device=x.device).repeat_interleave(slots)[inside]
    expert = index.reshape(-1)[inside]
    hidden = torch.einsum("pd,phd->ph", x[token], gate_up[expert])
    if bias is not None:
        hidden = hidden + bias[expert]
    if is_gated(gate_up, down):
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activate(gate, activation) * up
    else:
        hidden = activate(hidden, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    result = torch.einsum("pm,pdm->pd", hidden, down[expert]).to(wide)
    result = result * weight.reshape(-1)[inside].to(wide).unsqueeze(-1)
    return torch.zeros(x.shape, dtype=wide, device=x.device).index_add(0, token, result).to(x.dtype)


def slots_of_gate(gate: Tensor) -> tuple[Tensor, Tensor]:
    """A dense gate, zero where an expert is off (ReLU routers), as the slots of :func:`grouped_ffn_reference`.

    Args:
        gate: float [N, E].

    Returns:
        index int64 [N, E] (expert, or -1 where the gate is zero) and ``gate`` itself as weights.
    """
    expert = torch.arange(gate.shape[1], device=gate.device).expand(gate.shape)
    return torch.where(gate != 0, expert, -1), gate
