"""Attention over listed blocks of keys: the definition, in plain torch; also what runs on the host.

Block by block of queries: the listed blocks of keys are gathered once for all heads that share a list, and attended to
exactly. Work and memory follow the lists. Without lists a block of queries reads all keys up to its own (causal), which
makes it an exact dense attention with soft cap, hidden keys and log-sum-exp.

Sources: the block-sparse attention of MInference, FlexPrefill (arXiv 2502.20766), XAttention (arXiv 2503.16428).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attend import attend, attend_backward, softmax_scale, take_rows, wide

#: Numbers of a tile of scores on the host: 512 KiB of fp32, which stays in a core's cache.
_TILE = 1 << 17


@dataclass(frozen=True)
class Settings:
    """What does not depend on the data; see :func:`block_list_attention_reference`."""

    block_q: int
    block_k: int
    scale: float | None
    causal: bool
    window: int
    softcap: float


@dataclass
class _Tile:
    """A block of queries of some lists, and the keys that it reads.

    Attributes:
        lists: which of the M lists. heads: the query heads that these serve. rows: the queries.
        query: [B, m, R, D]. key: [B, m, N, D]. value: [B, m, N, Dv]. hidden: bool, broadcasts to [B, m, R, N]; None.
        places: batch, head and row of the keys, for the derivative.
    """

    heads: slice
    rows: slice
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor | None
    places: tuple[Any, Any, Any]


def block_list_attention_reference(
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
    """Softmax attention of each block of queries over its blocks of keys.

    Args:
        query: float [B, H, Q, D].
        key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv]. Query head h reads head ``h // (H / Hkv)``.
        index: int32 or int64 [B, M, ceil(Q / block_q), C]: blocks of ``block_k`` keys, -1 where there is none. M is a
            multiple of Hkv that divides H. A block that is listed twice counts twice. None: all blocks.
        count: int32 or int64 [B, M, ceil(Q / block_q)]: only the first ``count`` entries of a list are read.
        position: int32 or int64 [B, 1 or Hkv, L]: positions of the keys, ascending, and of the queries, which are the
            last Q of them; -1: nobody sees the key. None: 0, 1, 2 ...
        scale: of the dot products; None: 1 / sqrt(D).
        causal: a query sees keys at its own position and before. window: w > 0: only those after ``position - w``.
        softcap: c > 0: dot products become c * tanh(product / c).

    Returns:
        output [B, H, Q, Dv] in the type of query, and log-sum-exp fp32 [B, H, Q] (fp64 for fp64). A query without a
        key gives 0 and -inf.
    """
    settings = Settings(block_q, block_k, scale, causal, window, softcap)
    factor = softmax_scale(scale, query.shape[3])
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -float("inf"), dtype=wide(query.dtype))
    for tile in _tiles(query, key, value, index, count, position, settings):
        found, total = attend(tile.query, tile.key, tile.value, factor, softcap, tile.hidden)
        part = output[:, tile.heads, tile.rows]
        part.copy_(found.view(part.shape))
        lse[:, tile.heads, tile.rows] = total.view(part.shape[:3])
    return output, lse


def backward_reference(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    position: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives for query, key and value; weights are computed again, tile by tile."""
    numbers, factor = wide(query.dtype), softmax_scale(settings.scale, query.shape[3])
    grads = [torch.zeros(t.shape, dtype=numbers, device=t.device) for t in (query, key, value)]
    for tile in _tiles(query, key, value, index, count, position, settings):
        rows = tile.query.shape[:3]

        def taken(t: Tensor, tile: _Tile = tile, rows: Any = rows) -> Tensor:
            part = t[:, tile.heads, tile.rows].to(numbers)
            return part.reshape(*rows, -1) if part.ndim == 4 else part.reshape(rows)

        found = attend_backward(
            taken(grad_output),
            taken(grad_lse),
            tile.query,
            tile.key,
            tile.value,
            taken(output),
            taken(lse),
            factor,
            settings.softcap,
            tile.hidden,
        )
        part = grads[0][:, tile.heads, tile.rows]
        part.copy_(found[0].view(part.shape))
        for total, grad in zip(grads[1:], found[1:], strict=True):
            total.index_put_(tile.places, grad, accumulate=True)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    position: Tensor | None,
    settings: Settings,
) -> Iterator[_Tile]:
    batch, heads, queries, _ = query.shape
    kv_heads, length = key.shape[1:3]
    if 0 in (batch, heads, queries, length):
        return
    lists = kv_heads if index is None else index.shape[1]
    group, ahead = heads // lists, length - queries
    for number, first in enumerate(range(0, queries, settings.block_q)):
        rows = slice(first, min(first + settings.block_q, queries))
        where, limit = None, None
        if index is None:
            end = min(length, rows.stop + ahead) if settings.causal else length
            start = max(0, rows.start + ahead - settings.window + 1) if settings.window and position is None else 0
            columns = end - start
            if columns <= 0:
                continue
        else:
            where, limit = _listed(
                index[:, :, number], None if count is None else count[:, :, number], settings.block_k, length
            )
            columns, start, end = where.shape[2], 0, 0
            if columns == 0:
                continue
        step = max(1, _TILE // max(1, batch * group * (rows.stop - rows.start) * columns))
        for low in range(0, lists, step):
            high = min(low + step, lists)
            yield _tile(
                query,
                key,
                value,
                position,
                settings,
                rows,
                slice(low, high),
                group,
                lists,
                None if where is None else where[:, low:high],
                (start, end),
                limit,
            )


def _listed(blocks: Tensor, count: Tensor | None, size: int, length: int) -> tuple[Tensor, bool]:
    """Rows [B, M, N] of the listed blocks, -1 for none; and whether there is any -1."""
    if count is not None:
        longest = int(count.max())
        blocks = blocks[..., :longest]
        blocks = torch.where(torch.arange(longest, device=blocks.device) < count.unsqueeze(-1), blocks, -1)
    rows = (blocks.unsqueeze(-1) * size + torch.arange(size, device=blocks.device)).to(torch.int64)
    rows = torch.where((blocks.unsqueeze(-1) >= 0) & (rows < length), rows, -1).flatten(2)
    return rows, bool((rows < 0).any())


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    settings: Settings,
    rows: slice,
    part: slice,
    group: int,
    lists: int,
    where: Tensor | None,
    span: tuple[int, int],
    gaps: bool | None,
) -> _Tile:
    batch, _, queries, width = query.shape
    kv_heads, length = key.shape[1:3]
    numbers, count, size = wide(query.dtype), part.stop - part.start, rows.stop - rows.start
    heads = slice(part.start * group, part.stop * group)
    grouped = query[:, heads, rows].reshape(batch, count, group * size, width).to(numbers)
    head = torch.arange(part.start, part.stop, device=key.device) // (lists // kv_heads)
    number = torch.arange(batch, device=key.device)[:, None, None]
    place = torch.arange(length, device=key.device)[None, None] if position is None else position
    mine = place[..., length - queries :][..., rows]  # [., ., rows]
    if place.shape[1] > 1:
        place, mine = place[:, head], mine[:, head]
    if where is None:
        row = torch.arange(*span, device=key.device)[None, None]
        keys, values = key[:, part, span[0] : span[1]].to(numbers), value[:, part, span[0] : span[1]].to(numbers)
        place = place[..., span[0] : span[1]]
        hidden = None if position is None else place < 0
        inside = span[1] - span[0] > 0 and position is None
        bounds = settings.causal and not (inside and span[1] - 1 <= rows.start + length - queries)
    else:
        row = where.clamp(min=0)
        keys, values = (take_rows(t, number, head[None, :, None], row).to(numbers) for t in (key, value))
        place = place.expand(batch, place.shape[1], length)
        place = place.gather(2, row) if place.shape[1] == count else place.expand(-1, count, -1).gather(2, row)
        hidden = place < 0 if position is not None else None
        if gaps:
            hidden = where < 0 if hidden is None else hidden | (where < 0)
        bounds = settings.causal
    if hidden is not None:
        values = values.masked_fill(hidden.unsqueeze(-1), 0)  # 0 * NaN would be NaN
        hidden = hidden.unsqueeze(2)
    mine = mine.unsqueeze(-1)
    later = []
    if bounds:
        later.append(place.unsqueeze(2) > mine)
    if settings.window:
        later.append(place.unsqueeze(2) <= mine - settings.window)
    for rule in later:
        rule = rule.repeat(1, 1, group, 1) if group > 1 else rule
        hidden = rule if hidden is None else hidden | rule
    return _Tile(
        heads,
        rows,
        grouped,
        keys,
        values,
        hidden,
        (
            number.expand(batch, count, row.shape[2]),
            head[None, :, None].expand(batch, count, row.shape[2]),
            row.expand(batch, count, row.shape[2]),
        ),
    )
