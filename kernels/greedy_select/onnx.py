"""How ``tokcompile::greedy_select`` lowers to ONNX: to standard operations, before export.

    program.run_decompositions({torch.ops.tokcompile.greedy_select.default: decomposition()})

:func:`decompose` works on all rows and segments at once. Similarities come from one MatMul (exact, see
``reference.py``). A step finds the smallest key ``score * 2 ** 20 + index`` of each segment with ScatterElements(min)
over the segment ids, gathers the similarities of all tokens to the choice of their own segment, and adds them.

The loop becomes one ONNX Loop whose trip count is the largest budget that the graph meets. With ``steps`` it is
unrolled instead, about 18 nodes per step; that number is then fixed at export and must be at least the largest
budget. Memory: the similarities are ``B * S * S`` fp64 values, and as many int32 values.

The choice is made in fp64 and in integers. Converters to fp16, to QDQ and to dynamic int8 change fp32 operations alone,
so that it survives them: a converted file chooses from converted features, and otherwise as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from tokcompile.kernels.segments import segment_positions, segment_sizes

from .reference import EPSILON, NORM, check_criterion, mean_in_segment
from .triton import first_choices

_STRIDE = 1 << 20  # longest row; a constant, because the exporter takes no symbolic number as a divisor
_TAKEN = 1 << 60  # a multiple of the stride
_EPSILON = float(torch.tensor(EPSILON, dtype=torch.float32))


def decompose(
    features: Tensor,
    segment: Tensor,
    budget: Tensor,
    criterion: str,
    pivot: Tensor | None = None,
    *,
    steps: int | None = None,
) -> Tensor:
    """``greedy_select`` in operations that ONNX has.

    Args:
        features: float [B, S, D].
        segment: int64 [B, S], see ``tokcompile.kernels.segments.segments``.
        budget: int64 [B, S].
        criterion: "max_sum", "k_center" or "herding".
        pivot: float [B, S] or None.
        steps: None for a loop; else the number of unrolled steps, after which no more tokens are chosen.

    Returns:
        int64 [B, S], see ``reference.greedy_select_reference``.
    """
    check_criterion(criterion)
    index = torch.arange(segment.shape[1], device=segment.device).unsqueeze(0)
    inside, slot = segment >= 0, segment.clamp(min=0)
    tokens = _quantise(features)
    similarity = torch.matmul(tokens, tokens.transpose(1, 2))
    start = torch.where(inside, index - segment_positions(segment), 0)
    limit = torch.where(inside, torch.minimum(budget.gather(1, start), segment_sizes(segment)), 0)
    order = torch.zeros_like(segment) + segment.shape[1]
    none = torch.full_like(segment, _TAKEN)
    score = torch.zeros_like(segment)
    if criterion == "herding":
        mean = mean_in_segment(similarity, segment)
        similarity, score = similarity - mean.to(torch.float64).unsqueeze(2), -mean
    elif criterion == "k_center":
        score = torch.full_like(segment, -(1 << 30))
    similarity = similarity.to(torch.int32)  # below 2 ** 24: exact, and no number in the loop is a float
    # at each token: the next choice of its own segment
    if criterion == "herding" and pivot is None:  # the largest mean, ties: lower index
        least = none.scatter_reduce(1, slot, torch.where(inside, index - mean * _STRIDE, _TAKEN), "amin").gather(
            1, slot
        )
        choice = torch.where(inside, torch.remainder(least, _STRIDE), 0)
    else:
        choice = torch.where(inside, start + first_choices(segment, pivot), 0)

    def body(
        step: Tensor, order: Tensor, score: Tensor, choice: Tensor, free: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        taken = torch.logical_and(choice == index, limit > step)  # the limit of what is in no segment is 0
        free = torch.logical_and(free, torch.logical_not(taken))
        values = similarity.gather(2, choice.unsqueeze(-1)).squeeze(-1).to(torch.int64)
        score = torch.maximum(score, values) if criterion == "k_center" else score + values
        key = torch.where(free, score * _STRIDE + index, _TAKEN)
        smallest = none.scatter_reduce(1, slot, key, "amin", include_self=True).gather(1, slot)
        choice = torch.remainder(smallest, _STRIDE)  # 0 where nothing is left
        return step + 1, torch.where(taken, step, order), score, choice, free

    state = (torch.zeros((), dtype=torch.int64, device=segment.device), order, score, choice, inside.clone())
    if steps is None:
        last = limit.max()
        state = while_loop(lambda step, *_: step < last, body, state)  # type: ignore[no-untyped-call]
    else:
        for _ in range(steps):
            state = body(*state)
    return state[1]


def _quantise(features: Tensor) -> Tensor:
    """``reference.quantise`` in fp64, to the same integers: results of fp32 operations are rounded to 24 bits."""
    features = features.to(torch.float64)
    norm = _fp32(features.square().sum(dim=-1, keepdim=True).sqrt())
    finite = norm <= torch.finfo(torch.float32).max  # False for NaN as well
    scale = torch.where(finite, _fp32(NORM / norm.clamp(min=_EPSILON)), 0.0)
    return torch.round(_fp32(torch.where(finite, features, 0.0) * scale))


def _fp32(x: Tensor) -> Tensor:
    """fp64 numbers rounded to the 24 bits of fp32, in arithmetic (Veltkamp): converters of files change casts to fp32.

    Right for what one fp32 operation gives: products of two such numbers are exact in fp64, quotients and roots have
    more than twice the bits.
    """
    far = x * (2.0**29 + 1)
    return far - (far - x)


def decomposition(steps: int | None = None) -> Callable[..., Tensor]:
    """The entry for ``run_decompositions``: :func:`decompose` as a loop, or unrolled to ``steps`` steps."""

    def lower(features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None) -> Tensor:
        return decompose(features, segment, budget, criterion, pivot, steps=steps)

    return lower


DECOMPOSITIONS = {"greedy_select": decompose}
