"""How ``tokcompile::attention_rows`` lowers to ONNX: MatMul, Softmax, ReduceSum over [B, H, Q, L]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attend import head_of, softmax_scale, wide
from .reference import hidden_keys


def decompose(
    query: Tensor,
    key: Tensor,
    position: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sums: bool = True,
) -> Tensor:
    """``attention_rows`` in operations that ONNX has; see ``reference.attention_rows_reference``."""
    numbers = wide(query.dtype)
    head = head_of(query.shape[1], key.shape[1], key.device)
    keys = key.to(numbers)[:, head]
    score = torch.matmul(query.to(numbers) * softmax_scale(scale, query.shape[3]), keys.transpose(-1, -2))
    if softcap:
        score = torch.tanh(score / softcap) * softcap
    hidden = hidden_keys(query.shape[2], key.shape[2], position, causal, window, query.device)
    if hidden is None:
        weight = score.softmax(-1)
    else:
        if position is not None and position.shape[1] != 1:
            hidden = hidden[:, head]
        top = torch.where(hidden, -math.inf, score).amax(-1, keepdim=True)
        top = torch.where(top == -math.inf, 0.0, top)
        weight = torch.where(hidden, 0.0, torch.exp(score - top))
        total = weight.sum(-1, keepdim=True)
        weight = weight / torch.where(total == 0, 1.0, total)
    return weight.sum(2) if sums else weight


DECOMPOSITIONS = {"attention_rows": decompose}
