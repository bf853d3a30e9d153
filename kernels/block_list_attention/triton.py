"""Triton kernel of attention over listed blocks of keys: one program for a block of queries of one head.

One function: ``block_kernel`` is one loop over the keys of a block of queries; its state stays in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import softmax_scale, wide
from ..launch import AVAILABLE, Launch, power_of_two
from ..online_softmax import factors, precision

if AVAILABLE:
    import triton
    import triton.language as tl

    from ..online_softmax import logits, step

    @triton.jit  # type: ignore[untyped-decorator]
    def block_kernel(  # type: ignore[no-untyped-def]
        query,
        key,
        value,  # [B, H, Q, D], [B, Hkv, L, D], [B, Hkv, L, Dv]; rows of adjacent numbers
        index,
        count,  # int [B, M, blocks, C], int [B, M, blocks]; or None
        position,  # int32 [B, 1 or Hkv, L] or None
        result,
        lse,  # [B, H, Q, Dv], fp32 [B, H, Q]
        query_batch,
        query_head,
        query_row,
        key_batch,
        key_head,
        key_row,
        value_batch,
        value_head,
        value_row,
        position_batch,
        position_head,
        heads,
        sharing,
        serving,
        lists,
        blocks,
        capacity,  # H, H / Hkv, H / M, M, ceil(Q / BLOCK_Q), C
        queries,
        length,
        inner,
        outer,
        window,
        WIDTH: tl.constexpr,
        VALUE_WIDTH: tl.constexpr,
        CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr,
        LISTED: tl.constexpr,
        COUNTED: tl.constexpr,
        PLACED: tl.constexpr,
        CAPPED: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        number = tl.program_id(1).to(tl.int64)
        batch, head = number // heads, number % heads
        # the last blocks of a causal attention are the longest: they go first
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
        row, column, value_column = first + tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, DV)
        block = first // BLOCK_Q
        there_q = row < queries
        tile = tl.load(
            query + batch * query_batch + head * query_head + row[:, None] * query_row + column[None, :],
            mask=there_q[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
        keys = key + batch * key_batch + head // sharing * key_head
        values = value + batch * value_batch + head // sharing * value_head
        places = position
        mine = length - queries + row
        if PLACED:
            places = position + batch * position_batch + head // sharing * position_head
            mine = tl.load(places + mine, mask=there_q, other=-1).to(tl.int32)
        list_ = (batch * lists + head // serving) * blocks + block
        STEPS: tl.constexpr = BLOCK_K // KEYS
        if LISTED:
            todo = capacity
            if COUNTED:
                todo = tl.minimum(tl.load(count + list_).to(tl.int32), capacity)
            begin = 0
            todo = todo * STEPS
        else:
            end = length
            begin = 0
            if CAUSAL:
                end = tl.minimum(length, length - queries + first + ROWS)
            if WINDOW and not PLACED:
                begin = tl.maximum(0, length - queries + first - window + 1) // KEYS
            todo = tl.cdiv(tl.maximum(end, 0), KEYS)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        accumulator = tl.zeros([ROWS, DV], tl.float32)
        for number_k in range(begin, todo):
            start = number_k * KEYS
            if LISTED:  # -1, none: all its slots are negative
                listed = tl.load(index + list_ * capacity + number_k // STEPS).to(tl.int32)
                start = listed * BLOCK_K + number_k % STEPS * KEYS
            slot = start + tl.arange(0, KEYS)
            there = (slot >= 0) & (slot < length)
            place = slot
            if PLACED:
                place = tl.load(places + slot, mask=there, other=-1).to(tl.int32)
                there = there & (place >= 0)
            key_tile = tl.load(
                keys + slot[None, :].to(tl.int64) * key_row + column[:, None],
                mask=there[None, :] & (column < WIDTH)[:, None],
                other=0.0,
            )
            score = logits(tile, key_tile, inner, outer, CAPPED, PRECISION)
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (place[None, :] <= mine[:, None])
            if WINDOW:
                seen = seen & (place[None, :] > mine[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
            value_tile = tl.load(
                values + slot[:, None].to(tl.int64) * value_row + value_column[None, :],
                mask=there[:, None] & (value_column < VALUE_WIDTH)[None, :],
                other=0.0,
            )
            top, total, accumulator = step(score, value_tile, top, total, accumulator, PRECISION)
        empty = total == 0.0
        accumulator = accumulator / tl.where(empty, 1.0, total)[:, None]
        out = number * queries + row
        tl.store(lse + out, tl.where(empty, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453), mask=there_q)
        tl.store(
            result + out[:, None] * VALUE_WIDTH + value_column[None, :],
            accumulator.to(result.dtype.element_ty),
            mask=there_q[:, None] & (value_column < VALUE_WIDTH)[None, :],
        )


def tile_sizes(block_q: int, block_k: int, width: int, itemsize: int) -> tuple[int, int]:
    """Rows and keys of a tile: powers of two that divide the blocks, small enough for registers and shared memory."""
    if itemsize == 4:  # three TF32 products keep both operands in two parts
        most_rows, most_keys = (32, 32) if width <= 128 else (16, 16)
    else:
        most_rows, most_keys = (128, 64) if width <= 128 else (64, 32)
    return min(most_rows, block_q & -block_q), min(most_keys, block_k & -block_k)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    position: Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch for these arguments, and the tensors that it fills: output and log-sum-exp.

    One function: nearly all of it is the list of arguments of one kernel.
    """
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, width = query.shape
    value_width, blocks = value.shape[3], -(-queries // block_q)
    d, dv = power_of_two(width), power_of_two(value_width)
    rows, keys = tile_sizes(block_q, block_k, max(d, dv), query.element_size())
    output = query.new_empty(batch, heads, queries, value_width)
    lse = query.new_empty(batch, heads, queries, dtype=wide(query.dtype))
    place = None if position is None else position.to(torch.int32).contiguous()
    lists = heads if index is None else index.shape[1]
    return (
        Launch(
            block_kernel,
            (-(-queries // rows), batch * heads),
            {
                "query": query,
                "key": key,
                "value": value,
                "index": None if index is None else index.contiguous(),
                "count": None if count is None else count.contiguous(),
                "position": place,
                "result": output,
                "lse": lse,
                "query_batch": query.stride(0),
                "query_head": query.stride(1),
                "query_row": query.stride(2),
                "key_batch": key.stride(0),
                "key_head": key.stride(1),
                "key_row": key.stride(2),
                "value_batch": value.stride(0),
                "value_head": value.stride(1),
                "value_row": value.stride(2),
                "position_batch": 0 if place is None else place.stride(0),
                "position_head": 0 if place is None or place.shape[1] == 1 else place.stride(1),
                "heads": heads,
                "sharing": heads // key.shape[1],
                "serving": heads // lists,
                "lists": lists,
                "blocks": blocks,
                "capacity": 0 if index is None else index.shape[3],
                "queries": queries,
                "length": key.shape[2],
                **factors(softmax_scale(scale, width), softcap),
                "window": window,
            },
            {
                "WIDTH": width,
                "VALUE_WIDTH": value_width,
                "CAUSAL": causal,
                "WINDOW": window > 0,
                "LISTED": index is not None,
                "COUNTED": count is not None,
                "PLACED": place is not None,
                "CAPPED": softcap > 0,
                "BLOCK_Q": block_q,
                "BLOCK_K": block_k,
                "ROWS": rows,
                "KEYS": keys,
                "D": d,
                "DV": dv,
                "PRECISION": precision(query.dtype),
            },
            warps=8 if rows * dv >= 1 << 14 else 4,
        ),
        output,
        lse,
    )


def block_list_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    position: Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As ``reference.block_list_attention_reference``."""
    todo, output, lse = launch(
        query, key, value, index, count, position, block_q, block_k, scale, causal, window, softcap
    )
    if output.numel():
        todo.run()
    return output, lse
