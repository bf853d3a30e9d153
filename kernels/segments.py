"""Segments of a token axis, in integers: their sizes, places, budgets and ranks.

Every function here is meant to be traced, compiled and exported: no data-dependent shape, no ``.item()``, counts in
integer arithmetic, and only operations that every runtime has.

**Ties.** Of two tokens with equal scores the one with the lower index is better, in every runtime. No stable sort is
needed for that. A first sort of the float scores serves only to number the *distinct* values: runs of equal values
get one number, so it does not matter in which order the runtime leaves them. The second sort is over the integers
``(segment, number of the value, index)`` packed into one int64; they are all different, so any sort is right.
The packing takes 20 bits for each of the three, so rows hold at most ``2 ** 20`` tokens.
Scores are compared in fp32; NaN counts as the worst score, equal to ``-inf``.

**Segments.** A segment is one image, tile or frame: positions of a row with the same id ``>= 0``. Ids are smaller than
``S``, ascend along the row, and a segment is contiguous; ``-1`` marks everything else (text, padding), which is always
kept. Two images without a token between them are one run of visual tokens, and one segment for :func:`segments`.

Shapes: ``B`` batch, ``S`` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rank of a position that belongs to no segment; larger than any budget.
NO_RANK = 1 << 40

_STRIDE = 1 << 20  # longest row; a constant, because an exporter may not take a symbolic number here
_LAST = 1 << 61  # sort key of positions outside every segment


def index_of(like: Tensor) -> Tensor:
    """int64 [1, S]: 0, 1, ..., S - 1."""
    return torch.arange(like.shape[1], device=like.device).unsqueeze(0)


def _previous(x: Tensor, first: float) -> Tensor:
    """``x`` shifted right by one along the token axis, with ``first`` in front."""
    index = index_of(x)  # a gather and not a slice: the length of a slice would put a guard on S
    return torch.where(index > 0, x.gather(1, (index - 1).clamp(min=0).expand_as(x)), first)


def segments(visual: Tensor) -> Tensor:
    """Number the contiguous runs of visual tokens of each row.

    Args:
        visual: bool [B, S], True at visual tokens.

    Returns:
        int64 [B, S]: 0, 1, 2, ... for the runs from left to right, -1 elsewhere.
    """
    flag = visual.to(torch.int64)
    start = flag * (1 - _previous(flag, 0))
    return torch.cumsum(start, dim=1) * flag - 1


def segment_sum(value: Tensor, segment: Tensor) -> Tensor:
    """Sum of ``value`` ([B, S], 0 outside segments) over the segment of each position; [B, S]."""
    slot = segment.clamp(min=0)
    return torch.zeros_like(value).scatter_add(1, slot, value).gather(1, slot)


def segment_sizes(segment: Tensor) -> Tensor:
    """int64 [B, S]: number of tokens of the segment that a position belongs to, 0 outside segments."""
    flag = (segment >= 0).to(torch.int64)
    return segment_sum(flag, segment) * flag


def segment_positions(segment: Tensor) -> Tensor:
    """int64 [B, S]: place of a token inside its segment (0 = first), 0 outside segments."""
    flag = (segment >= 0).to(torch.int64)
    index = index_of(segment) * flag
    start = (segment != _previous(segment, -1)).to(torch.int64) * flag
    return (index - segment_sum(start * index, segment)) * flag


def budgets(segment: Tensor, num: int, den: int) -> Tensor:
    """Number of tokens to keep in the segment of each position, as a ratio of its size.

    Computed in integers, ``ceil(n * num / den)``: a float product rounds differently from runtime to runtime.

    Args:
        segment: int64 [B, S], see :func:`segments`.
        num, den: the ratio ``num / den``, ``0 <= num <= den``.

    Returns:
        int64 [B, S]: at least 1 and at most the size of the segment; 0 outside segments.
    """
    size = segment_sizes(segment)
    count = torch.div(size * num + (den - 1), den, rounding_mode="floor").clamp(min=1)
    return torch.minimum(count, size)


def budgets_count(segment: Tensor, count: int) -> Tensor:
    """As :func:`budgets`, for an absolute number of tokens per segment: ``min(n, count)`` (``count=0`` drops all)."""
    return segment_sizes(segment).clamp(max=count)


def rank_in_segment(scores: Tensor, segment: Tensor) -> Tensor:
    """Rank of each token among the tokens of its segment by descending score.

    Args:
        scores: float [B, S]; larger is better.
        segment: int64 [B, S].

    Returns:
        int64 [B, S]: 0 for the best; equal scores rank by lower index; :data:`NO_RANK` outside segments.
    """
    index, inside = index_of(segment), segment >= 0
    flag = inside.to(torch.int64)
    scores = scores.detach().to(torch.float32)
    scores = torch.where(torch.isnan(scores), float("-inf"), scores)
    ordered, order = torch.sort(scores, dim=1, descending=True)
    # number the distinct values: independent of the order in which equal ones come out of the sort
    change = torch.logical_and(index > 0, ordered != _previous(ordered, 0.0))
    number = torch.zeros_like(segment).scatter(1, order, torch.cumsum(change.to(torch.int64), dim=1))
    key = torch.where(inside, (segment * _STRIDE + number) * _STRIDE, _LAST) + index
    place = torch.zeros_like(segment).scatter(1, torch.sort(key, dim=1)[1], index.expand_as(segment))
    before = torch.cumsum(flag, dim=1) - flag - segment_positions(segment)  # tokens of earlier segments
    return torch.where(inside, place - before, NO_RANK)
