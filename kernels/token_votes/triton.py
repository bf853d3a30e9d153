"""Triton kernels of the votes: products and their maximum and sum by parts of the keys, then the votes.

The first kernel reads every key once for all heads of its group and writes the products (H numbers for each key, where
a key has D in each of Hkv heads). The second puts the parts of each head together and adds up the probabilities. A row
that is skipped is left as soon as its flag is read, so its keys are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import AVAILABLE, Launch, power_of_two, processors
from ..online_softmax import factors, key_block, precision

if AVAILABLE:
    import triton
    import triton.language as tl

    from ..online_softmax import logits

#: Most parts that the keys are split into; keys of a tile of the second kernel.
MAX_PARTS = 64
BLOCK = 256


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def product_kernel(  # type: ignore[no-untyped-def]
        query,
        key,  # [B, H, 1, D], [B, Hkv, T, D]; rows of adjacent numbers
        candidate,  # bool [B or 1, T]
        skip,  # bool [B]
        product,  # float32 [B, H, T], to base 2
        tops,
        totals,  # float32 [B, H, parts]
        query_batch,
        query_head,
        key_batch,
        key_head,
        key_row,
        candidate_batch,  # strides
        kv_heads,
        group,
        length,
        parts,
        inner,
        outer,  # see `logits`
        WIDTH: tl.constexpr,
        CAPPED: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        D: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        number = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        batch, shared = number // kv_heads, number % kv_heads
        row, column = tl.arange(0, ROWS), tl.arange(0, D)
        head = shared * group + row
        there = row < group
        tile = tl.load(
            query + batch * query_batch + head[:, None] * query_head + column[None, :],
            mask=there[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
        share = tl.cdiv(tl.cdiv(length, KEYS), parts) * KEYS
        first = part * share
        end = tl.minimum(first + share, length)
        end = tl.where(tl.load(skip + batch) != 0, first, end)
        keys = key + batch * key_batch + shared * key_head
        out = (batch * kv_heads * group + head)[:, None] * length
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(first, end, KEYS):
            token = start + tl.arange(0, KEYS)
            inside = token < end
            key_tile = tl.load(
                keys + token[None, :].to(tl.int64) * key_row + column[:, None],
                mask=inside[None, :] & (column < WIDTH)[:, None],
                other=0.0,
            )
            seen = tl.load(candidate + batch * candidate_batch + token, mask=inside, other=0) != 0
            score = logits(tile, key_tile, inner, outer, CAPPED, PRECISION)
            score = tl.where(seen[None, :], score, float("-inf"))
            highest = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(score - shift[:, None]), 1)
            top = highest
            tl.store(product + out + token[None, :], score, mask=there[:, None] & inside[None, :])
        place = (batch * kv_heads * group + head) * parts + part
        tl.store(tops + place, top, mask=there)
        tl.store(totals + place, total, mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def vote_kernel(  # type: ignore[no-untyped-def]
        product,
        tops,
        totals,  # see `product_kernel`
        skip,  # bool [B]
        result,  # float32 [B, T]
        heads,
        length,
        parts,
        PARTS: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        batch = tl.program_id(0).to(tl.int64)
        token = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        part = tl.arange(0, PARTS)
        vote = tl.zeros([KEYS], tl.float32)
        count = tl.where(tl.load(skip + batch) != 0, 0, heads)
        for head in range(count):
            place = batch * heads + head
            every = tl.load(tops + place * parts + part, mask=part < parts, other=float("-inf"))
            top = tl.max(every, 0)
            shift = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(
                tl.exp2(every - shift) * tl.load(totals + place * parts + part, mask=part < parts, other=0.0), 0
            )
            score = tl.load(product + place * length + token, mask=token < length, other=float("-inf"))
            vote += tl.exp2(score - shift) / tl.where(total == 0.0, 1.0, total)
        tl.store(result + batch * length + token, vote, mask=token < length)


def launches(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    skip: Tensor,
    scale: float,
    softcap: float = 0.0,
    parts: int | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches for these arguments, and the tensor of votes that they fill.

    ``parts``: how many parts the keys are split into; None: enough to occupy the device.
    """
    query, key, candidate = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, candidate))
    batch, heads, _, width = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    d = power_of_two(width)
    keys = key_block(d, query.element_size())
    if parts is None:
        wanted = -(-2 * processors(query) // max(1, batch * kv_heads))
        parts = max(1, min(MAX_PARTS, wanted, -(-length // (2 * keys))))
    product = query.new_empty(batch, heads, length, dtype=torch.float32)
    tops = query.new_empty(batch, heads, parts, dtype=torch.float32)
    totals, result = torch.empty_like(tops), query.new_empty(batch, length, dtype=torch.float32)
    group = heads // max(1, kv_heads)
    one = Launch(
        product_kernel,
        (batch * kv_heads, parts),
        {
            "query": query,
            "key": key,
            "candidate": candidate,
            "skip": skip.contiguous(),
            "product": product,
            "tops": tops,
            "totals": totals,
            "query_batch": query.stride(0),
            "query_head": query.stride(1),
            "key_batch": key.stride(0),
            "key_head": key.stride(1),
            "key_row": key.stride(2),
            "candidate_batch": candidate.stride(0) if candidate.shape[0] > 1 else 0,
            "kv_heads": kv_heads,
            "group": group,
            "length": length,
            "parts": parts,
            **factors(scale, softcap),
        },
        {
            "WIDTH": width,
            "CAPPED": softcap > 0,
            "ROWS": power_of_two(group),
            "KEYS": keys,
            "D": d,
            "PRECISION": precision(query.dtype),
        },
    )
    two = Launch(
        vote_kernel,
        (batch, -(-length // BLOCK)),
        {
            "product": product,
            "tops": tops,
            "totals": totals,
            "skip": skip.contiguous(),
            "result": result,
            "heads": heads,
            "length": length,
            "parts": parts,
        },
        {"PARTS": power_of_two(parts), "KEYS": BLOCK},
    )
    return [one, two], result


def token_votes_triton(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    skip: Tensor,
    scale: float,
    softcap: float = 0.0,
    parts: int | None = None,
) -> Tensor:
    """As ``reference.token_votes_reference``."""
    todo, result = launches(query, key, candidate, skip, scale, softcap, parts)
    if result.numel():
        for launch in todo:
            launch.run()
    return result
