"""Token Sparse Attention in plain torch: the definition (arXiv 2602.03216)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tokcompile.kernels.attend import attend, logits, softmax_scale, wide
from tokcompile.kernels.attention_rows import attention_rows
from tokcompile.kernels.attention_rows.reference import hidden_keys
from tokcompile.kernels.block_list_attention import block_list_attention
from tokcompile.kernels.gather_rows import gather_rows, scatter_rows
from tokcompile.kernels.hidden import is_visible

#: Rows of a tile of the attention under an arbitrary mask.
_TILE = 128


def budget(scores: Tensor, count: Tensor, coverage: float, keep: float, least: int) -> int:
    """How many tokens each head keeps in front of the window: the most that a row of the batch needs.

    Args:
        scores: fp32 [B, H, P], 0 where there is no token. count: int64 [B]: real tokens among the P.
        coverage: share of the attention that may be lost. keep: share of the tokens that are kept; 0: by coverage.
        least: tokens.
    """
    length = scores.shape[2]
    if keep:
        parts = round(keep * (1 << 20))  # integers, so that every runtime counts alike
        wanted = (count * parts + (1 << 20) - 1) >> 20
    else:
        mean = scores.mean(1)
        share = (mean / (mean.sum(-1, keepdim=True) + 1e-8)).sort(-1).values
        lost = (share.cumsum(-1) < coverage).sum(-1)
        dropped = torch.where(lost > 0, lost + 1, 0)  # counted over the padding too, whose scores are 0
        wanted = length - dropped
    return min(length, max(least, int(wanted.max())))


def select(
    query: Tensor,
    key: Tensor,
    position: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    sliding: int,
    coverage: float,
    keep: float,
    least: int,
    window: int,
    pool: int,
    seed: int,
    causal: bool = True,
) -> Tensor | None:
    """The tokens [B, H, K + window] that each head keeps, ascending, -1 in front where a row has fewer; None: all.

    Args:
        query, key: [B, H, L, D] and [B, Hkv, L, D]. position: [B, 1, L]. mask: broadcasts to [B, H, L, L].
        window: the last tokens, which choose and are kept. seed: at least 0: choose at random.
    """
    batch, heads, length, _ = query.shape
    prefix = length - window
    if prefix <= least or (coverage == 0 and keep in (0, 1)):
        return None
    last = query[:, :, prefix:]
    if mask is None:
        scores = attention_rows(last, key, position, scale, True, sliding, softcap)
        real = (
            torch.ones(batch, prefix, dtype=torch.bool, device=query.device)
            if position is None
            else (position[:, 0, :prefix] >= 0)
        )
    else:
        weight = _rows(last, key, mask[..., prefix:, :], scale, softcap, position, sliding, causal)
        scores = weight.sum(2)
        seen = is_visible(mask[..., prefix:, :])
        real = seen.any(2).any(1)[:, :prefix].expand(batch, prefix)
    scores = scores[:, :, :prefix] / window
    if seed >= 0:
        generator = torch.Generator(query.device).manual_seed(seed)
        scores_used = torch.rand(scores.shape, generator=generator, device=query.device, dtype=scores.dtype)
    else:
        scores_used = scores
    smooth = scores_used if pool == 1 or seed >= 0 else functional.avg_pool1d(scores_used, pool, 1, pool // 2)
    if pool > 1:
        scores = functional.avg_pool1d(scores, pool, 1, pool // 2)
    scores = scores.masked_fill(~real[:, None], 0)
    smooth = smooth.masked_fill(~real[:, None], -math.inf)
    kept = budget(scores, real.sum(-1), coverage, keep, least)
    if kept >= prefix:
        return None
    # a stable order breaks ties by index, in every runtime alike
    chosen = smooth.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    chosen = torch.where(real[:, None].expand(-1, heads, -1).gather(2, chosen), chosen, -1).sort(-1).values
    tail = torch.arange(prefix, length, device=query.device).expand(batch, heads, window)
    return torch.cat([chosen, tail], -1)


def _rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float,
    position: Tensor | None,
    sliding: int,
    causal: bool,
) -> Tensor:
    """Weights [B, H, Q, L] of the last Q queries under a part [.., Q, L] of the mask."""
    group = query.shape[1] // key.shape[1]
    keys = key.to(wide(key.dtype)).repeat_interleave(group, 1)
    score = logits(query.to(keys.dtype), keys, softmax_scale(scale, query.shape[3]), softcap)
    score = score.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else score + mask.to(score.dtype)
    hidden = hidden_keys(query.shape[2], key.shape[2], position, causal, sliding, query.device)
    if hidden is not None:
        score = score.masked_fill(hidden, -math.inf)
    return score.softmax(-1).nan_to_num(0.0)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    sliding: int,
    causal: bool = True,
) -> Tensor:
    """Attention of all tokens, as the model computes it."""
    if mask is not None:
        everything = torch.arange(query.shape[2], device=query.device).expand(*query.shape[:3])
        return _masked(query, key, value, everything, mask, position, scale, softcap, sliding, causal)
    if position is None and not softcap and not sliding:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    return block_list_attention(query, key, value, None, None, position, 128, 64, scale, True, sliding, softcap)[0]


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    mask: Tensor,
    position: Tensor | None,
    scale: float | None,
    softcap: float,
    sliding: int,
    causal: bool,
) -> Tensor:
    """Attention among the rows of ``index [B, H, K]`` under an arbitrary mask, tile by tile; -> [B, H, K, Dv]."""
    batch, heads, kept = index.shape
    numbers = wide(query.dtype)
    queries, keys, values = (gather_rows(t, index).to(numbers) for t in (query, key, value))
    number = torch.arange(batch, device=index.device)[:, None, None, None]
    head = torch.arange(heads, device=index.device)[None, :, None, None]
    mask = mask.expand(batch, heads, *mask.shape[2:])
    safe = index.clamp(min=0)
    place = (
        index
        if position is None
        else torch.where(index < 0, -1, position.expand(batch, heads, position.shape[2]).gather(2, safe))
    )
    parts = []
    for start in range(0, kept, _TILE):
        rows = slice(start, start + _TILE)
        part = mask[number, head, safe[:, :, rows, None], safe[:, :, None, :]]
        mine = place[:, :, rows, None]
        hidden = place[:, :, None, :] < 0
        if causal:
            hidden = hidden | (place[:, :, None, :] > mine)
        if sliding:
            hidden = hidden | (place[:, :, None, :] <= mine - sliding)
        if part.dtype == torch.bool:
            hidden = hidden | ~part
            output, _ = attend(queries[:, :, rows], keys, values, softmax_scale(scale, query.shape[3]), softcap, hidden)
        else:
            score = logits(queries[:, :, rows], keys, softmax_scale(scale, query.shape[3]), softcap) + part
            output = score.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0) @ values
        parts.append(output)
    return torch.cat(parts, 2).to(query.dtype) if parts else query.new_zeros(batch, heads, 0, value.shape[3])


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    sliding: int,
    causal: bool = True,
) -> Tensor:
    """Attention among the chosen tokens of each head, 0 elsewhere; differentiable."""
    if index is None:
        return dense(query, key, value, position, mask, scale, softcap, sliding, causal)
    length = query.shape[2]
    if mask is not None:
        found = _masked(query, key, value, index, mask, position, scale, softcap, sliding, causal)
        return scatter_rows(found, index, length)
    queries, keys, values = (gather_rows(t, index) for t in (query, key, value))
    if position is None and not softcap and not sliding:
        found = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    else:
        place = (
            index
            if position is None
            else torch.where(index < 0, -1, position.expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0)))
        )
        found = block_list_attention(queries, keys, values, None, None, place, 128, 64, scale, True, sliding, softcap)[
            0
        ]
    return scatter_rows(found, index, length)
