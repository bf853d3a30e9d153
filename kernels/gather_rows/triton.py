"""Triton kernels of the gather and the scatter: one program for a few rows, whole rows at a time."""

from __future__ import annotations

from torch import Tensor

from ..launch import AVAILABLE, Launch, power_of_two

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def rows_kernel(  # type: ignore[no-untyped-def]
        source,
        index,
        result,  # [B, H, L, D]; int [B, M, K]; [B, M, K, D] or [B, M, L, D]
        batch_stride,
        head_stride,
        row_stride,  # of the source of a gather, of the rows of a scatter
        lists,
        sharing,
        entries,
        length,  # M, M / H, K, L
        WIDTH: tl.constexpr,
        SCATTER: tl.constexpr,
        ROWS: tl.constexpr,
        D: tl.constexpr,
    ):
        number = tl.program_id(1).to(tl.int64)
        batch, list_ = number // lists, number % lists
        slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, D)
        row = tl.load(index + number * entries + slot, mask=slot < entries, other=-1).to(tl.int64)
        there = (row >= 0) & (row < length)
        start = source + batch * batch_stride + list_ // sharing * head_stride
        inside = (column < WIDTH)[None, :]
        if SCATTER:
            value = tl.load(start + slot[:, None] * row_stride + column[None, :], mask=there[:, None] & inside)
            tl.store(
                result + (number * length + row)[:, None] * WIDTH + column[None, :], value, mask=there[:, None] & inside
            )
        else:
            value = tl.load(
                start + row[:, None] * row_stride + column[None, :], mask=there[:, None] & inside, other=0.0
            )
            tl.store(
                result + (number * entries + slot)[:, None] * WIDTH + column[None, :],
                value,
                mask=(slot < entries)[:, None] & inside,
            )


def launch(source: Tensor, index: Tensor, result: Tensor, length: int, scatter: bool) -> Launch:
    """The launch that fills ``result`` (of zeros, for a scatter)."""
    source = source if source.stride(-1) == 1 else source.contiguous()
    batch, lists, entries = index.shape
    width = source.shape[3]
    d = power_of_two(width)
    rows = max(1, min(64, 4096 // d))
    return Launch(
        rows_kernel,
        (-(-entries // rows), batch * lists),
        {
            "source": source,
            "index": index.contiguous(),
            "result": result,
            "batch_stride": source.stride(0),
            "head_stride": source.stride(1),
            "row_stride": source.stride(2),
            "lists": lists,
            "sharing": max(1, lists // source.shape[1]),
            "entries": entries,
            "length": length,
        },
        {"WIDTH": width, "SCATTER": scatter, "ROWS": rows, "D": d},
    )


def gather_rows_triton(source: Tensor, index: Tensor) -> Tensor:
    """As ``reference.gather_rows_reference``; an index that is out of range counts as an empty slot."""
    result = source.new_empty(*index.shape, source.shape[3])
    if result.numel():
        launch(source, index, result, source.shape[2], False).run()
    return result


def scatter_rows_triton(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """As ``reference.scatter_rows_reference``."""
    result = rows.new_zeros(*rows.shape[:2], length, rows.shape[3])
    if rows.numel() and result.numel():
        launch(rows, index, result, length, True).run()
    return result
