"""Triton kernel of greedy selection: one program for each segment, its tokens in one block.

The similarity matrix of a row comes from one matrix product (exact for quantised tokens, also in TF32). The grid has
one program for each position of each row; those that are not the first of a segment return at once, so the host need
not know where segments begin and nothing is copied back from the device. A program keeps the scores of its segment in
registers; a step adds (or takes the maximum with) one row of similarities and takes the smallest of the keys
``score * BLOCK + index``, which breaks ties by the lower index.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tokcompile.kernels.segments import rank_in_segment, segment_positions, segment_sizes

from .reference import mean_in_segment, quantise

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # Triton has no build for this platform
    AVAILABLE = False

#: Longest row that one program can hold.
MAX_TOKENS = 8192

#: Largest number of similarities (fp32) that the op may allocate: 4 GiB.
MAX_ENTRIES = 1 << 30


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for the compiler (environment variable, read at import of the kernel)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def greedy_kernel(  # type: ignore[no-untyped-def]
        similarity,  # float32 [B, S, S], integers
        segment,  # int64 [B, S]
        budget,  # int64 [B, S]
        mean,  # int64 [B, S]: taken from each similarity (0, but for herding)
        first,  # int64 [B, S]: place of the first choice within the segment, the same at all its tokens
        order,  # int64 [B, S]: result, filled with S
        length,  # S
        ADD: tl.constexpr,  # False: k_center
        BLOCK: tl.constexpr,  # power of two, at least the longest segment
    ):
        start = tl.program_id(0)
        row = tl.program_id(1).to(tl.int64)
        base = row * length + start
        number = tl.load(segment + base)
        before = tl.load(segment + base - 1, mask=start > 0, other=-1)
        if (number >= 0) & (number != before):
            place = tl.arange(0, BLOCK)
            inside = start + place < length
            inside = inside & (tl.load(segment + base + place, mask=inside, other=-1) == number)
            steps = tl.minimum(tl.load(budget + base), tl.sum(inside.to(tl.int64)))
            best = tl.load(first + base)
            free = inside
            if ADD:
                typical = tl.load(mean + base + place, mask=inside, other=0)
                score = -typical
            else:
                score = tl.full([BLOCK], -1073741824, dtype=tl.int64)
            for step in range(steps):
                tl.store(order + base + best, step)
                free = free & (place != best)
                row_of_best = similarity + (base + best) * length + start
                values = tl.load(row_of_best + place, mask=inside, other=0.0).to(tl.int64)
                if ADD:
                    score += values - typical
                else:
                    score = tl.maximum(score, values)
                key = tl.where(free, score * BLOCK + place, 4611686018427387904)
                best = tl.min(key) & (BLOCK - 1)


def first_choices(segment: Tensor, pivot: Tensor | None) -> Tensor:
    """int64 [B, S]: place, within its segment, of the first choice of the segment that a position belongs to."""
    if pivot is None:
        return torch.div(segment_sizes(segment) - 1, 2, rounding_mode="floor").clamp(min=0)
    winner = (rank_in_segment(pivot, segment) == 0).to(torch.int64) * segment_positions(segment)
    slot = segment.clamp(min=0)
    return torch.zeros_like(segment).scatter_add(1, slot, winner).gather(1, slot)


def greedy_select_triton(
    features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None
) -> Tensor:
    """As ``reference.greedy_select_reference``, for contiguous segments whose ids ascend along the row."""
    batch, length, _ = features.shape
    segment, budget = segment.contiguous(), budget.contiguous()
    order = torch.full_like(segment, length)
    if batch == 0 or length == 0:
        return order
    tokens = quantise(features)
    similarity = torch.bmm(tokens, tokens.transpose(1, 2))
    mean = torch.zeros_like(segment)
    if criterion == "herding":
        mean = mean_in_segment(similarity, segment)
        pivot = mean.to(torch.float32) if pivot is None else pivot  # below 2 ** 24: exact
    first = first_choices(segment, pivot).contiguous()
    block = max(16, triton.next_power_of_2(length))
    greedy_kernel[(length, batch)](
        similarity,
        segment,
        budget,
        mean,
        first,
        order,
        length,
        ADD=criterion != "k_center",
        BLOCK=block,
        num_warps=warps(block),
    )
    return order


def warps(block: int) -> int:
    """Warps for a block: about 16 tokens to a thread, 1 to 16 warps."""
    return min(16, max(1, block // 512))
