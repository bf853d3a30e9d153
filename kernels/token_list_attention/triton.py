"""Triton kernels of attention over listed keys: the list is split, partial results are merged by their log-sum-exp.

A program loads the query rows that share a list (the heads of a group times the queries) as one tile, so keys are read
once for a group, and gathers keys and values of its part of the list. Parts are equal shares of the list's actual
length: all programs work, however short the list is compared with its capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import softmax_scale, wide
from ..launch import AVAILABLE, Launch, power_of_two, processors
from ..online_softmax import factors, key_block, precision

if AVAILABLE:
    import triton
    import triton.language as tl

    from ..online_softmax import logits, step

#: Most parts that a list is split into, and most query rows in a tile.
MAX_PARTS = 64
MAX_ROWS = 64


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def part_kernel(  # type: ignore[no-untyped-def]
        query,
        key,
        value,  # [B, H, Q, D], [B, Hkv, L, D], [B, Hkv, L, Dv]; rows of adjacent numbers
        index,  # int32 or int64 [B, M, C]; lists of adjacent numbers
        count,  # int32 or int64 [B, M] or None
        result,  # [B, H, Q, parts, Dv]
        lse,  # float32 [B, H, Q, parts]
        query_batch,
        query_head,
        query_row,
        key_batch,
        key_head,
        key_row,
        value_batch,
        value_head,
        value_row,  # strides
        index_batch,
        index_list,  # strides
        lists,
        sharing,  # M; lists that read the same key head
        rows,
        queries,
        length,
        capacity,
        parts,  # rows = H / M * Q
        inner,
        outer,  # see `logits`
        WIDTH: tl.constexpr,
        VALUE_WIDTH: tl.constexpr,
        CAUSAL: tl.constexpr,
        CAPPED: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        number = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        batch, list_ = number // lists, number % lists
        row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        column, value_column = tl.arange(0, D), tl.arange(0, DV)
        head, place = list_ * (rows // queries) + row // queries, row % queries
        tile = tl.load(
            query + batch * query_batch + head[:, None] * query_head + place[:, None] * query_row + column[None, :],
            mask=(row < rows)[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
        listed = capacity
        if count is not None:
            listed = tl.minimum(tl.load(count + number).to(tl.int32), capacity)
        share = tl.cdiv(tl.cdiv(listed, KEYS), parts) * KEYS
        first = part * share
        end = tl.minimum(first + share, listed)
        list_start = index + batch * index_batch + list_ * index_list
        keys = key + batch * key_batch + list_ // sharing * key_head
        values = value + batch * value_batch + list_ // sharing * value_head
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        accumulator = tl.zeros([ROWS, DV], tl.float32)
        for start in range(first, end, KEYS):
            slot = start + tl.arange(0, KEYS)
            token = tl.load(list_start + slot, mask=slot < end, other=-1).to(tl.int64)
            there = (token >= 0) & (token < length)
            key_tile = tl.load(
                keys + token[None, :] * key_row + column[:, None],
                mask=there[None, :] & (column < WIDTH)[:, None],
                other=0.0,
            )
            score = logits(tile, key_tile, inner, outer, CAPPED, PRECISION)
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (token[None, :] <= length - queries + place[:, None])
            score = tl.where(seen, score, float("-inf"))
            value_tile = tl.load(
                values + token[:, None] * value_row + value_column[None, :],
                mask=there[:, None] & (value_column < VALUE_WIDTH)[None, :],
                other=0.0,
            )
            top, total, accumulator = step(score, value_tile, top, total, accumulator, PRECISION)
        empty = total == 0.0
        accumulator = accumulator / tl.where(empty, 1.0, total)[:, None]
        out = (number * rows + row) * parts + part
        tl.store(
            lse + out, tl.where(empty, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453), mask=row < rows
        )
        tl.store(
            result + out[:, None] * VALUE_WIDTH + value_column[None, :],
            accumulator.to(result.dtype.element_ty),
            mask=(row < rows)[:, None] & (value_column < VALUE_WIDTH)[None, :],
        )

    @triton.jit  # type: ignore[untyped-decorator]
    def merge_kernel(  # type: ignore[no-untyped-def]
        partial,
        partial_lse,  # float32 [rows, parts, Dv], [rows, parts]
        result,
        lse,  # [rows, Dv], float32 [rows]
        parts,
        VALUE_WIDTH: tl.constexpr,
        PARTS: tl.constexpr,
        DV: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        part, column = tl.arange(0, PARTS), tl.arange(0, DV)
        every = tl.load(partial_lse + row * parts + part, mask=part < parts, other=float("-inf"))
        top = tl.max(every, 0)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp(every - shift), 0)
        accumulator = tl.zeros([DV], tl.float32)
        for number in range(parts):
            weight = tl.exp(tl.load(partial_lse + row * parts + number) - shift)
            accumulator += weight * tl.load(
                partial + (row * parts + number) * VALUE_WIDTH + column, mask=column < VALUE_WIDTH, other=0.0
            )
        accumulator = accumulator / tl.where(total == 0.0, 1.0, total)
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), shift + tl.log(total)))
        tl.store(
            result + row * VALUE_WIDTH + column, accumulator.to(result.dtype.element_ty), mask=column < VALUE_WIDTH
        )


def launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    parts: int | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches for these arguments, and the tensors that they fill: output and log-sum-exp.

    ``parts``: how many parts a list is split into; None: enough to occupy the device.

    One function: nearly all of it is the lists of arguments of two kernels.
    """
    query, key, value, index = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, index))
    batch, heads, queries, width = query.shape
    lists, capacity, value_width = index.shape[1], index.shape[2], value.shape[3]
    rows = heads // lists * queries
    d, dv = power_of_two(width), power_of_two(value_width)
    keys = key_block(max(d, dv), query.element_size())
    tile = min(MAX_ROWS, power_of_two(rows))
    tiles = -(-rows // tile)
    if parts is None:
        wanted = -(-2 * processors(query) // max(1, batch * lists * tiles))
        parts = max(1, min(MAX_PARTS, wanted, -(-capacity // (2 * keys))))
    output = query.new_empty(batch, heads, queries, value_width)
    lse = query.new_empty(batch, heads, queries, dtype=wide(query.dtype))
    partial, partial_lse = output, lse
    if parts > 1:
        partial = query.new_empty(batch, heads, queries, parts, value_width, dtype=torch.float32)
        partial_lse = query.new_empty(batch, heads, queries, parts, dtype=torch.float32)
    split = Launch(
        part_kernel,
        (batch * lists, parts, tiles),
        {
            "query": query,
            "key": key,
            "value": value,
            "index": index,
            "count": None if count is None else count.contiguous(),
            "result": partial,
            "lse": partial_lse,
            "query_batch": query.stride(0),
            "query_head": query.stride(1),
            "query_row": query.stride(2),
            "key_batch": key.stride(0),
            "key_head": key.stride(1),
            "key_row": key.stride(2),
            "value_batch": value.stride(0),
            "value_head": value.stride(1),
            "value_row": value.stride(2),
            "index_batch": index.stride(0),
            "index_list": index.stride(1),
            "lists": lists,
            "sharing": max(1, lists // key.shape[1]),
            "rows": rows,
            "queries": queries,
            "length": key.shape[2],
            "capacity": capacity,
            "parts": parts,
            **factors(softmax_scale(scale, width), softcap),
        },
        {
            "WIDTH": width,
            "VALUE_WIDTH": value_width,
            "CAUSAL": causal,
            "CAPPED": softcap > 0,
            "ROWS": tile,
            "KEYS": keys,
            "D": d,
            "DV": dv,
            "PRECISION": precision(query.dtype),
        },
        warps=8 if max(d, dv) * query.element_size() > 512 else 4,  # fp32 heads of width 256 spill with 4
    )
    if parts == 1:
        return [split], output, lse
    merge = Launch(
        merge_kernel,
        (batch * heads * queries,),
        {"partial": partial, "partial_lse": partial_lse, "result": output, "lse": lse, "parts": parts},
        {"VALUE_WIDTH": value_width, "PARTS": power_of_two(parts, 1), "DV": dv},
        warps=1 if dv <= 128 else 2,
    )
    return [split, merge], output, lse


def token_list_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.token_list_attention_reference``; an index that is out of range counts as an empty slot."""
    todo, output, lse = launches(query, key, value, index, count, scale, causal, softcap, parts)
    if output.numel():
        for launch in todo:
            launch.run()
    return output, lse
