"""How ``tokcompile::block_list_attention`` lowers to ONNX: dense attention under the mask of the lists.

Exact, and as expensive as dense attention: ONNX has no operation that skips blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import attend_traceable, head_of, softmax_scale, wide
from ..attention_rows.reference import hidden_keys


def decompose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    position: Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``block_list_attention`` in operations that ONNX has; blocks that are listed twice count once."""
    _, heads, queries, width = query.shape
    length, numbers = key.shape[2], wide(query.dtype)
    head = head_of(heads, key.shape[1], key.device)
    hidden = hidden_keys(queries, length, position, causal, window, query.device)
    if hidden is None:
        hidden = torch.zeros(1, 1, queries, length, dtype=torch.bool, device=query.device)
    if position is not None and position.shape[1] != 1:
        hidden = hidden[:, head]
    if index is not None:
        seen = index >= 0
        if count is not None:
            seen = torch.logical_and(seen, torch.arange(index.shape[3], device=index.device) < count.unsqueeze(-1))
        blocks = (length + block_k - 1) // block_k
        place = torch.where(seen, index, blocks).to(torch.int64)
        listed = torch.zeros(*index.shape[:3], blocks + 1, dtype=numbers, device=index.device)
        listed = listed.scatter(3, place, torch.ones(index.shape, dtype=numbers, device=index.device)) > 0
        listed = listed[:, head_of(heads, index.shape[1], index.device)]
        row = torch.arange(queries, device=index.device) // block_q
        column = torch.arange(length, device=index.device) // block_k
        hidden = torch.logical_or(hidden, torch.logical_not(listed[:, :, row][:, :, :, column]))
    keys, values = key.to(numbers)[:, head], value.to(numbers)[:, head]
    output, lse = attend_traceable(query.to(numbers), keys, values, softmax_scale(scale, width), softcap, hidden)
    return output.to(query.dtype), lse


DECOMPOSITIONS = {"block_list_attention": decompose}
