"""How ``tokcompile::greedy_select`` lowers to ONNX: to standard operations, before export.

    program.run_decompositions({torch.ops.tokcompile.greedy_select.default: decomposition(steps)})

:func:`decompose` works on all rows and segments at once. Similarities come from one MatMul (exact, see
``reference.py``); a step finds the smallest key ``score * 2 ** 20 + index`` of each segment with ScatterElements(min)
over the segment ids, gathers the similarities of all tokens to the choice of their own segment, and adds them.

The loop is unrolled: about 12 nodes per step. The number of steps is fixed at export and must be at least the largest
budget that the exported graph will meet; a segment stops at its own budget. Memory: the similarities are
``B * S * S`` fp32 values.

A runtime that computes fp32 MatMul in TF32 gives the same result; one that computes it in bf16 does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokcompile.selection import segment_positions, segment_sizes

from .reference import check_criterion, quantise
from .triton import first_choices

_STRIDE = 1 << 20  # longest row; a constant, because the exporter takes no symbolic number as a divisor
_TAKEN = 1 << 60


def decompose(
    features: Tensor, segment: Tensor, budget: Tensor, criterion: str, steps: int, pivot: Tensor | None = None
) -> Tensor:
    """``greedy_select`` in operations that ONNX has.

    Args:
        features: float [B, S, D].
        segment: int64 [B, S], see ``tokcompile.selection.segments``.
        budget: int64 [B, S]; tokens after the first ``steps`` choices of a segment are not chosen.
        criterion: "max_sum" or "k_center".
        steps: number of unrolled steps.
        pivot: float [B, S] or None.

    Returns:
        int64 [B, S], see ``reference.greedy_select_reference``.
    """
    check_criterion(criterion)
    length = segment.shape[1]
    index = torch.arange(length, device=segment.device).unsqueeze(0)
    inside, slot = segment >= 0, segment.clamp(min=0)
    tokens = quantise(features)
    similarity = torch.matmul(tokens, tokens.transpose(1, 2))
    start = index - segment_positions(segment)
    choice = torch.where(inside, start + first_choices(segment, pivot), 0)  # of the own segment, for each token
    limit = torch.minimum(budget.gather(1, torch.where(inside, start, 0)), segment_sizes(segment))
    order = torch.zeros_like(segment) + length
    score = torch.zeros_like(segment) if criterion == "max_sum" else torch.full_like(segment, -(1 << 30))
    free = inside
    for step in range(steps):
        taken = torch.logical_and(torch.logical_and(inside, choice == index), limit > step)
        order = torch.where(taken, step, order)
        if step + 1 == steps:
            break
        free = torch.logical_and(free, torch.logical_not(taken))
        values = similarity.gather(2, choice.unsqueeze(-1)).squeeze(-1).to(torch.int64)
        score = score + values if criterion == "max_sum" else torch.maximum(score, values)
        key = torch.where(free, score * _STRIDE + index, _TAKEN)
        smallest = torch.full_like(key, _TAKEN).scatter_reduce(1, slot, key, "amin", include_self=True).gather(1, slot)
        choice = torch.remainder(torch.where(smallest < _TAKEN, smallest, 0), _STRIDE)
    return order


def decomposition(steps: int) -> Callable[..., Tensor]:
    """The entry for ``run_decompositions``: :func:`decompose` with a fixed number of steps."""

    def lower(
        features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None
    ) -> Tensor:
        return decompose(features, segment, budget, criterion, steps, pivot)

    return lower
