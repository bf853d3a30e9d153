"""Triton kernels of the attention of a few queries: the softmax's denominator first, the sums by key second.

The matrix of weights is never stored: keys are read twice. The first kernel is split along the keys; the second merges
the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import softmax_scale
from ..launch import AVAILABLE, Launch, power_of_two, processors
from ..online_softmax import factors, key_block, precision

if AVAILABLE:
    import triton
    import triton.language as tl

    from ..online_softmax import logits

    @triton.jit  # type: ignore[untyped-decorator]
    def _score(  # type: ignore[no-untyped-def]
        tile,
        keys,
        places,
        slot,
        row,
        queries,
        length,
        key_row,
        inner,
        outer,
        window,
        WIDTH: tl.constexpr,
        D: tl.constexpr,
        CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr,
        PLACED: tl.constexpr,
        CAPPED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        column = tl.arange(0, D)
        there = slot < length
        key_tile = tl.load(
            keys + slot[None, :].to(tl.int64) * key_row + column[:, None],
            mask=there[None, :] & (column < WIDTH)[:, None],
            other=0.0,
        )
        score = logits(tile, key_tile, inner, outer, CAPPED, PRECISION)
        mine = length - queries + row
        place = slot
        if PLACED:
            place = tl.load(places + slot, mask=there, other=-1).to(tl.int32)
            mine = tl.load(places + mine, mask=row < queries, other=-1).to(tl.int32)
        seen = (there & (place >= 0))[None, :] & (row < queries)[:, None]
        if CAUSAL:
            seen = seen & (place[None, :] <= mine[:, None])
        if WINDOW:
            seen = seen & (place[None, :] > mine[:, None] - window)
        return tl.where(seen, score, float("-inf"))

    @triton.jit  # type: ignore[untyped-decorator]
    def total_kernel(  # type: ignore[no-untyped-def]
        query,
        key,
        position,
        lse,  # [B, H, Q, D], [B, Hkv, L, D], int32 [B, P, L] or None; fp32 [B, H, parts, Q]
        query_batch,
        query_head,
        query_row,
        key_batch,
        key_head,
        key_row,
        position_batch,
        position_head,
        heads,
        sharing,
        queries,
        length,
        parts,
        inner,
        outer,
        window,
        WIDTH: tl.constexpr,
        CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr,
        PLACED: tl.constexpr,
        CAPPED: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        number, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        batch, head = number // heads, number % heads
        row, column = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
        tile = tl.load(
            query + batch * query_batch + head * query_head + row[:, None] * query_row + column[None, :],
            mask=(row < queries)[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
        keys = key + batch * key_batch + head // sharing * key_head
        places = position
        if PLACED:
            places = position + batch * position_batch + head // sharing * position_head
        share = tl.cdiv(tl.cdiv(length, KEYS), parts) * KEYS
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(part * share, tl.minimum((part + 1) * share, length), KEYS):
            score = _score(
                tile,
                keys,
                places,
                start + tl.arange(0, KEYS),
                row,
                queries,
                length,
                key_row,
                inner,
                outer,
                window,
                WIDTH,
                D,
                CAUSAL,
                WINDOW,
                PLACED,
                CAPPED,
                PRECISION,
            )
            highest = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(score - shift[:, None]), 1)
            top = highest
        tl.store(
            lse + (number * parts + part) * queries + row,
            tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total))),
            mask=row < queries,
        )

    @triton.jit  # type: ignore[untyped-decorator]
    def weight_kernel(  # type: ignore[no-untyped-def]
        query,
        key,
        position,
        lse,
        result,  # as above; fp32 [B, H, L] or [B, H, Q, L]
        query_batch,
        query_head,
        query_row,
        key_batch,
        key_head,
        key_row,
        position_batch,
        position_head,
        heads,
        sharing,
        queries,
        length,
        parts,
        inner,
        outer,
        window,
        WIDTH: tl.constexpr,
        CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr,
        PLACED: tl.constexpr,
        CAPPED: tl.constexpr,
        SUMS: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        PARTS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        number = tl.program_id(0).to(tl.int64)
        batch, head = number // heads, number % heads
        slot, column, part = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.arange(0, D), tl.arange(0, PARTS)
        keys = key + batch * key_batch + head // sharing * key_head
        places = position
        if PLACED:
            places = position + batch * position_batch + head // sharing * position_head
        collected = tl.zeros([KEYS], tl.float32)
        for first in range(0, queries, ROWS):
            row = first + tl.arange(0, ROWS)
            tile = tl.load(
                query + batch * query_batch + head * query_head + row[:, None] * query_row + column[None, :],
                mask=(row < queries)[:, None] & (column < WIDTH)[None, :],
                other=0.0,
            )
            every = tl.load(
                lse + (number * parts + part)[None, :] * queries + row[:, None],
                mask=(row < queries)[:, None] & (part < parts)[None, :],
                other=float("-inf"),
            )
            top = tl.max(every, 1)
            shift = tl.where(top == float("-inf"), 0.0, top)
            total = shift + tl.log2(tl.maximum(tl.sum(tl.exp2(every - shift[:, None]), 1), 1e-37))
            score = _score(
                tile,
                keys,
                places,
                slot,
                row,
                queries,
                length,
                key_row,
                inner,
                outer,
                window,
                WIDTH,
                D,
                CAUSAL,
                WINDOW,
                PLACED,
                CAPPED,
                PRECISION,
            )
            weight = tl.exp2(score - total[:, None])
            if SUMS:
                collected += tl.sum(weight, 0)
            else:
                tl.store(
                    result + (number * queries + row)[:, None] * length + slot[None, :],
                    weight,
                    mask=(row < queries)[:, None] & (slot < length)[None, :],
                )
        if SUMS:
            tl.store(result + number * length + slot, collected, mask=slot < length)


def launches(
    query: Tensor,
    key: Tensor,
    position: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sums: bool = True,
    parts: int | None = None,
) -> tuple[list[Launch], Tensor]:
    """The two launches for these arguments, and the tensor that they fill."""
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    batch, heads, queries, width = query.shape
    length, d = key.shape[2], power_of_two(width)
    keys, rows = key_block(d, query.element_size()), min(32, power_of_two(queries))
    if d >= 128 and query.element_size() == 4:  # three TF32 products keep both operands in two parts
        keys = 16
        rows = rows if d == 128 else 16
    tiles = -(-queries // rows)
    if parts is None:
        parts = max(1, min(64, -(-2 * processors(query) // max(1, batch * heads * tiles)), -(-length // (2 * keys))))
    lse = query.new_empty(batch, heads, parts, queries, dtype=torch.float32)
    result = query.new_empty(batch, heads, *(() if sums else (queries,)), length, dtype=torch.float32)
    place = None if position is None else position.to(torch.int32).contiguous()
    shared = {
        "query_batch": query.stride(0),
        "query_head": query.stride(1),
        "query_row": query.stride(2),
        "key_batch": key.stride(0),
        "key_head": key.stride(1),
        "key_row": key.stride(2),
        "position_batch": 0 if place is None else place.stride(0),
        "position_head": 0 if place is None or place.shape[1] == 1 else place.stride(1),
        "heads": heads,
        "sharing": heads // key.shape[1],
        "queries": queries,
        "length": length,
        "parts": parts,
        **factors(softmax_scale(scale, width), softcap),
        "window": window,
    }
    constants = {
        "WIDTH": width,
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "PLACED": place is not None,
        "CAPPED": softcap > 0,
        "ROWS": rows,
        "KEYS": keys,
        "D": d,
        "PRECISION": precision(query.dtype),
    }
    tensors = {"query": query, "key": key, "position": place, "lse": lse}
    return [
        Launch(total_kernel, (batch * heads, parts, tiles), {**tensors, **shared}, constants),
        Launch(
            weight_kernel,
            (batch * heads, -(-length // keys)),
            {**tensors, "result": result, **shared},
            {**constants, "SUMS": sums, "PARTS": power_of_two(parts, 1)},
        ),
    ], result


def attention_rows_triton(
    query: Tensor,
    key: Tensor,
    position: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sums: bool = True,
    parts: int | None = None,
) -> Tensor:
    """As ``reference.attention_rows_reference``."""
    todo, result = launches(query, key, position, scale, causal, window, softcap, sums, parts)
    if query.shape[2] == 0:
        return result.zero_()
    if result.numel():
        for launch in todo:
            launch.run()
    return result
