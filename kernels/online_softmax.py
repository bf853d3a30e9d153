"""Triton functions that the attention kernels share: logits to base 2 and one step of the online softmax."""

from __future__ import annotations

import torch

from .launch import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

LOG2E = 1.4426950408889634


def precision(dtype: torch.dtype) -> str:
    """How matrix units multiply: fp32 in three TF32 products, whose error is that of fp32; other types directly."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def factors(scale: float, softcap: float) -> dict[str, float]:
    """Run-time arguments of :func:`logits`."""
    if softcap:
        return {"inner": scale / softcap, "outer": softcap * LOG2E}
    return {"inner": scale * LOG2E, "outer": 1.0}


def key_block(width: int, itemsize: int) -> int:
    """Keys of a tile, 16 to 64: at most 32 KiB of shared memory, for fp32 16 KiB.

    Three TF32 products hold three tiles: with 32 KiB of fp32, heads of width 128 spill registers on sm_90.
    """
    return max(16, min(64, (16384 if itemsize == 4 else 32768) // (width * itemsize)))


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def logits(  # type: ignore[no-untyped-def]
        query, key, inner, outer, CAPPED: tl.constexpr, PRECISION: tl.constexpr
    ):
        """Logits to base 2, fp32 [M, N], of query [M, D] and transposed key [D, N]; capped with tanh if asked for."""
        score = tl.dot(query, key, input_precision=PRECISION) * inner
        if CAPPED:
            decay = tl.exp2(tl.abs(score) * -2.8853900817779268)  # exp(-2 |x|)
            score = tl.where(score < 0, decay - 1, 1 - decay) / (1 + decay) * outer
        return score

    @triton.jit  # type: ignore[untyped-decorator]
    def step(  # type: ignore[no-untyped-def]
        score, value, top, total, result, PRECISION: tl.constexpr
    ):
        """Take in logits [M, N] (-inf: hidden) and values [N, Dv]; top and total [M], result [M, Dv] are the state."""
        highest = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # no key yet: -inf - -inf would be NaN
        weight = tl.exp2(score - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weight, 1)
        result = result * decay[:, None]
        result = tl.dot(weight.to(value.dtype), value, result, input_precision=PRECISION)
        return highest, total, result
