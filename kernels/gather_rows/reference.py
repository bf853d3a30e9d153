"""Gather and scatter of rows by head: the definition, in plain torch; also what runs on the host.

Source: the compress and decompress steps of Token Sparse Attention (arXiv 2602.03216).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import take_rows


def places(index: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batch, head and row (0 for an empty slot) of each entry of ``index [B, M, K]``."""
    batch, lists = index.shape[:2]
    number = torch.arange(batch, device=index.device)[:, None, None].expand(index.shape)
    head = (torch.arange(lists, device=index.device) // max(1, lists // heads))[:, None].expand(index.shape)
    return number, head, index.clamp(min=0).to(torch.int64)


def gather_rows_reference(source: Tensor, index: Tensor) -> Tensor:
    """``out[b, m, k] = source[b, m // (M / H), index[b, m, k]]``; rows of 0 for an empty slot.

    Args:
        source: [B, H, L, D]. index: int32 or int64 [B, M, K], -1 for an empty slot; M a multiple of H.

    Returns:
        [B, M, K, D]
    """
    if source.shape[2] == 0:
        return source.new_zeros(*index.shape, source.shape[3])
    rows = take_rows(source, *places(index, source.shape[1]))
    empty = index < 0
    return rows.masked_fill_(empty.unsqueeze(-1), 0) if bool(empty.any()) else rows


def scatter_rows_reference(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """``out[b, m, index[b, m, k]] = rows[b, m, k]``, 0 elsewhere; empty slots are left out.

    Args:
        rows: [B, M, K, D]. index: [B, M, K], distinct in each list apart from -1. length: L.

    Returns:
        [B, M, L, D]
    """
    batch, lists, _, width = rows.shape
    result = rows.new_zeros(batch * lists * length, width)
    start = (torch.arange(batch * lists, device=index.device) * length).view(batch, lists, 1)
    place, values = (start + index).flatten(), rows.reshape(-1, width)
    there = index.flatten() >= 0
    if not bool(there.all()):
        place, values = place[there], values[there]
    return result.index_copy_(0, place.to(torch.int64), values).view(batch, lists, length, width)


def gather_backward_reference(grad: Tensor, index: Tensor, heads: int, length: int) -> Tensor:
    """Derivative of the gather for its source [B, H, L, D]: rows that were read twice get both."""
    number, head, row = places(index, heads)
    total = torch.zeros(
        grad.shape[0],
        heads,
        length,
        grad.shape[3],
        device=grad.device,
        dtype=torch.promote_types(grad.dtype, torch.float32),
    )
    grad = grad.masked_fill((index < 0).unsqueeze(-1), 0).to(total.dtype)
    return total.index_put_((number, head, row), grad, accumulate=True).to(grad.dtype)
