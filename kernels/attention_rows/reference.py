"""Attention weights of a few queries, and their sums by key: the definition in plain torch; also what the host runs.

Sources: the scores of Token Sparse Attention (arXiv 2602.03216), SnapKV (arXiv 2404.14469), MInference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attend import logits, softmax_scale, wide


def hidden_keys(
    queries: int, length: int, position: Tensor | None, causal: bool, window: int, device: torch.device
) -> Tensor | None:
    """bool, broadcasts to [B, heads, Q, L]: the keys that a query does not see; None: it sees all."""
    place = torch.arange(length, device=device)[None, None] if position is None else position
    last = place[..., length - queries :].unsqueeze(-1)
    place = place.unsqueeze(2)
    hidden = None if position is None else place < 0
    for rule in ([place > last] if causal else []) + ([place <= last - window] if window else []):
        hidden = rule if hidden is None else hidden | rule
    return hidden


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    position: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sums: bool = True,
) -> Tensor:
    """Softmax weights of the last Q positions of a sequence over all its keys.

    Args:
        query: float [B, H, Q, D]: the last Q of L positions. key: [B, Hkv, L, D].
        position: int32 or int64 [B, 1 or Hkv, L]: positions, ascending; -1: nobody sees the key. None: 0, 1, 2 ...
        scale: of the dot products; None: 1 / sqrt(D). softcap: c > 0: c * tanh(product / c).
        causal: a query sees keys at its own position and before. window: w > 0: only those after ``position - w``.
        sums: add the rows up.

    Returns:
        fp32 (fp64 for fp64) [B, H, L], or the weights [B, H, Q, L]; a query that sees no key adds 0.
    """
    batch, heads, queries, width = query.shape
    kv_heads, length = key.shape[1:3]
    numbers = wide(query.dtype)
    hidden = hidden_keys(queries, length, position, causal, window, query.device)
    group = heads // max(kv_heads, 1)
    result = query.new_zeros(batch, heads, *(() if sums else (queries,)), length, dtype=numbers)
    if length == 0 or queries == 0:
        return result
    for head in range(kv_heads):
        part = slice(head * group, (head + 1) * group)
        score = logits(
            query[:, part].to(numbers), key[:, head : head + 1].to(numbers), softmax_scale(scale, width), softcap
        )
        if hidden is not None:
            score.masked_fill_(hidden if hidden.shape[1] == 1 else hidden[:, head : head + 1], -math.inf)
        weight = score.softmax(-1)
        if hidden is not None:
            weight = weight.nan_to_num_(0.0)
        result[:, part] = weight.sum(2) if sums else weight
    return result
