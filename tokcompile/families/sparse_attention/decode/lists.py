"""Lists of keys: which ones a decode step attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcompile.recipe.budget import Budget


def least_length(budget: Budget, sinks: int, recent: int) -> int:
    """The shortest cache of which ``budget`` lets at least one key be chosen and no more than there are."""
    if budget.is_count:
        return budget.num
    return (sinks + recent) * budget.den // budget.num + 1


def ends(
    visible: Tensor | None, length: Any, sinks: int, recent: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that are always in the list, and those between them.

    Args:
        visible: bool [B or 1, T]; None: all T = ``length`` keys.

    Returns:
        candidate bool [B or 1, T]; the first ``sinks`` and the last ``recent`` visible keys, int64 [B or 1, .]. A row
        that has fewer holds -1, and no key twice.
    """
    position = torch.arange(length, device=device).unsqueeze(0)
    if visible is None:
        candidate = (position >= sinks) & (position < length - recent)
        return candidate, position[:, :sinks], position[:, length - recent :]
    newest = torch.topk(torch.where(visible, position, -1), recent, dim=1).values
    first = torch.where(newest < 0, length, newest).amin(1, keepdim=True)
    before = visible & (position < first)
    if sinks == 0:
        return before, newest[:, :0], newest
    oldest = torch.topk(torch.where(before, -position, -length), sinks, dim=1).values.neg()
    oldest = torch.where(oldest < length, oldest, -1)
    return before & (position > oldest.amax(1, keepdim=True)), oldest, newest


def listed(scores: Tensor, candidate: Tensor, oldest: Tensor, newest: Tensor, count: Any) -> Tensor:
    """The list of a decode step: the best candidates between the first and the last keys.

    Args:
        scores: float [B or 1, M, T]. candidate, oldest, newest: see :func:`ends`.
        count: length of the list, at least one more than ``oldest`` and ``newest`` together have.

    Returns:
        int64 [B or 1, M, count]; -1: an empty slot.
    """
    return joined(chosen(scores, candidate, count - width_of(oldest, newest)), oldest, newest)


def joined(best: Tensor, oldest: Tensor, newest: Tensor) -> Tensor:
    """The list of the first keys, the best ones [B or 1, M, .] and the last ones, int64 [B or 1, M, .]."""
    rows, lists = best.shape[:2]
    return torch.cat(
        [
            oldest.unsqueeze(1).expand(rows, lists, oldest.shape[1]),
            best,
            newest.unsqueeze(1).expand(rows, lists, newest.shape[1]),
        ],
        2,
    )


def chosen(scores: Tensor, candidate: Tensor, count: Any) -> Tensor:
    """The ``count`` best candidates, int64 [B or 1, M, count]; -1 where there are fewer."""
    scores = torch.where(candidate.unsqueeze(1), scores, -torch.inf)
    best = torch.topk(scores, count, dim=2)
    return torch.where(best.values == -torch.inf, -1, best.indices)


def width_of(oldest: Tensor, newest: Tensor) -> Any:
    return oldest.shape[1] + newest.shape[1]
