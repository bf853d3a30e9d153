"""Blocks of queries and keys: means, which blocks see each other, the best of a row, lists of what is kept.

Everything here is traceable, with lengths that may be symbols and need not be multiples of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokcompile.kernels.attend import wide


@dataclass(frozen=True)
class BlockLists:
    """What a choice of blocks gives.

    Attributes:
        keep: bool [B or 1, M, nq, nk]: the blocks of keys that each block of queries attends to. M is the number of
            query heads, or of key heads (one list for all that share a key head), or 1.
        mass: float [B, H, nq]: a factor of the attention over the kept blocks; None: 1.
        rest: float [B, H, nq, Dv]: what stands for the other blocks, the same for all queries of a block; None: 0.
    """

    keep: Tensor
    mass: Tensor | None = None
    rest: Tensor | None = None


def blocks_of(length: Any, size: int) -> Any:
    """The number of blocks, the last one perhaps not full."""
    return (length + size - 1) // size


def filled(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """``x`` with zeros behind, so that ``dim`` is a multiple of ``size``."""
    shape = list(x.shape)
    shape[dim] = blocks_of(shape[dim], size) * size - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def in_blocks(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """``[.., L, ..] -> [.., n, size, ..]``, zeros at the end."""
    blocks: Tensor = filled(x, size, dim).unflatten(dim, (blocks_of(x.shape[dim], size), size))
    return blocks


def visible_of(length: Any, visible: Tensor | None, device: torch.device) -> Tensor:
    """bool [B or 1, L]: ``visible``, or all."""
    return torch.ones(1, length, dtype=torch.bool, device=device) if visible is None else visible


def blank(x: Tensor, visible: Tensor | None) -> Tensor:
    """``x [B, H, L, D]`` in the type of sums, 0 (whatever stood there) for tokens that are not visible."""
    x = x.to(wide(x.dtype))
    return x if visible is None else torch.where(visible[:, None, :, None], x, 0.0)


def block_sizes(length: Any, size: int, visible: Tensor | None, device: torch.device) -> Tensor:
    """int64 [B or 1, n]: visible tokens of each block."""
    return in_blocks(visible_of(length, visible, device), size, 1).sum(-1)


def block_means(x: Tensor, size: int, visible: Tensor | None) -> Tensor:
    """``[B, H, L, D] -> [B, H, n, D]``: the mean of the visible tokens of each block, 0 where there is none."""
    count = block_sizes(x.shape[2], size, visible, x.device).clamp(min=1)
    return in_blocks(blank(x, visible), size).sum(3) / count[:, None, :, None]


def seen_blocks(length: Any, size: int, causal: bool, window: int, visible: Tensor | None, device: torch.device) -> Any:
    """bool [B or 1, 1, n, n]: whether some query of a block may see some key of another.

    Args:
        visible: bool [B or 1, L]: the keys that are there. window: only so many keys before a query; 0: all.
    """
    number = torch.arange(blocks_of(length, size), device=device)
    query, key = number[:, None], number[None, :]
    seen = torch.ones_like(query >= key) if not causal else query >= key
    if window:  # the first query of a block reaches back the furthest
        seen = seen & ((key + 1) * size > query * size - window + 1)
    seen = seen[None, None]
    if visible is not None:
        seen = seen & in_blocks(visible, size, 1).any(-1)[:, None, None, :]
    return seen


def top_share(values: Tensor, share: float) -> Tensor:
    """bool: the fewest entries of each row that hold at least ``share`` of its sum, the largest first.

    Args:
        values: float [..., N], not negative. Ties go to the lower index. A row of zeros keeps nothing, unless
            ``share`` is 1, which keeps all.
    """
    if share >= 1:
        return torch.ones_like(values, dtype=torch.bool)
    ordered, order = torch.sort(values, dim=-1, descending=True, stable=True)
    before = torch.cumsum(ordered, -1) - ordered
    kept = before < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def top_count(values: Tensor, count: Tensor | int) -> Tensor:
    """bool: the ``count`` largest entries of each row; ties go to the lower index.

    Args:
        values: float [..., N]. count: a number, or int64 [..., 1].
    """
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    place = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, place < count)


def as_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """``keep [.., nk]`` as lists for the kernel: blocks int32 [.., nk], the kept ones first and ascending; how many."""
    order = torch.sort((~keep).to(torch.uint8), dim=-1, stable=True).indices
    return order.to(torch.int32), keep.sum(-1).to(torch.int32)
