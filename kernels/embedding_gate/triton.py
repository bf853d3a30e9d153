"""Triton kernel of the gated product with table rows: one program for each token and block of columns.

Elementwise, bound by memory: the gate is read once, one row of the table for each token (contiguous along the columns),
the result written once. The remap is looked up inside, so that no tensor of rows is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import AVAILABLE, Launch, power_of_two

if AVAILABLE:
    import triton
    import triton.language as tl

    from ..activation import activate_block

if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def gate_kernel(  # type: ignore[no-untyped-def]
        gate,  # [N, f]
        table,  # [R, f]
        index,  # int64 [N]
        remap,  # int [V]
        fallback,  # [f] or [N, f]
        result,  # [N, f]
        width,
        count,
        vocabulary,  # f, R, V
        ACTIVATION: tl.constexpr,
        REMAP: tl.constexpr,
        FALLBACK: tl.constexpr,  # 0: none, 1: one row, 2: a row for each token
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < width
        place = tl.load(index + token)
        if REMAP:
            known = (place >= 0) & (place < vocabulary)
            place = tl.where(known, tl.load(remap + tl.where(known, place, 0)).to(tl.int64), -1)
        value = activate_block(tl.load(gate + token * width + n, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        if (place >= 0) & (place < count):
            value *= tl.load(table + place * width + n, mask=inside, other=0.0).to(tl.float32)
        elif FALLBACK == 0:
            value *= 0.0
        else:
            row = fallback + (token * width if FALLBACK == 2 else 0)
            value *= tl.load(row + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + token * width + n, value.to(result.dtype.element_ty), mask=inside)


def embedding_gate_triton(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    """As ``reference.embedding_gate_reference``."""
    gate = gate.contiguous()
    result = torch.empty_like(gate)
    launch(gate, table.contiguous(), index.contiguous(), activation, remap, fallback, result).run()
    return result


def launch(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None,
    fallback: Tensor | None,
    result: Tensor,
) -> Launch:
    """The launch that computes ``result`` [..., f]; gate, table and index contiguous."""
    width = gate.shape[-1]
    block = min(1024, power_of_two(width))
    per_token = fallback is not None and fallback.ndim == gate.ndim > 1
    return Launch(
        gate_kernel,
        (gate.numel() // max(1, width), -(-width // block)),
        {
            "gate": gate,
            "table": table,
            "index": index,
            "remap": index if remap is None else remap.contiguous(),
            "fallback": gate if fallback is None else fallback.contiguous(),
            "result": result,
            "width": width,
            "count": table.shape[0],
            "vocabulary": 0 if remap is None else remap.shape[0],
        },
        {
            "ACTIVATION": activation,
            "REMAP": remap is not None,
            "FALLBACK": 0 if fallback is None else 2 if per_token else 1,
            "BLOCK": block,
        },
    )
