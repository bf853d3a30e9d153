"""The operation ``torch.ops.tokcompile.token_sparse_attention``: each head attends among tokens of its own choice.

How many tokens are kept depends on the data, so that the whole of it - scores, choice, compression, attention and
decompression - is one operation with a result of static shape: nothing in the graph around it depends on the count.

Source: Token Sparse Attention, arXiv 2602.03216.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from tokcompile.kernels.attend import attend, check_heads, check_numbers, logits, softmax_scale, wide
from tokcompile.kernels.attention_rows import attention_rows
from tokcompile.kernels.attention_rows.op import check_position
from tokcompile.kernels.attention_rows.reference import hidden_keys
from tokcompile.kernels.block_list_attention import block_list_attention
from tokcompile.kernels.gather_rows import gather_rows, scatter_rows

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


def select(query: Tensor, key: Tensor, position: Tensor | None, mask: Tensor | None, scale: float | None,
           softcap: float, sliding: int, coverage: float, keep: float, least: int, window: int, pool: int,
           seed: int, causal: bool = True) -> Tensor | None:
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
        real = torch.ones(batch, prefix, dtype=torch.bool, device=query.device) if position is None else (
            position[:, 0, :prefix] >= 0)
    else:
        weight = _rows(last, key, mask[..., prefix:, :], scale, softcap, position, sliding, causal)
        scores = weight.sum(2)
        seen = _visible(mask[..., prefix:, :])
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


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > -1e4


def _rows(query: Tensor, key: Tensor, mask: Tensor, scale: float | None, softcap: float, position: Tensor | None,
          sliding: int, causal: bool) -> Tensor:
    """Weights [B, H, Q, L] of the last Q queries under a part [.., Q, L] of the mask."""
    group = query.shape[1] // key.shape[1]
    keys = key.to(wide(key.dtype)).repeat_interleave(group, 1)
    score = logits(query.to(keys.dtype), keys, softmax_scale(scale, query.shape[3]), softcap)
    score = score.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else score + mask.to(score.dtype)
    hidden = hidden_keys(query.shape[2], key.shape[2], position, causal, sliding, query.device)
    if hidden is not None:
        score = score.masked_fill(hidden, -math.inf)
    return score.softmax(-1).nan_to_num(0.0)


def dense(query: Tensor, key: Tensor, value: Tensor, position: Tensor | None, mask: Tensor | None,
          scale: float | None, softcap: float, sliding: int, causal: bool = True) -> Tensor:
    """Attention of all tokens, as the model computes it."""
    if mask is not None:
        everything = torch.arange(query.shape[2], device=query.device).expand(*query.shape[:3])
        return _masked(query, key, value, everything, mask, position, scale, softcap, sliding, causal)
    if position is None and not softcap and not sliding:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale,
                                                       enable_gqa=query.shape[1] != key.shape[1])
    return block_list_attention(query, key, value, None, None, position, 128, 64, scale, True, sliding, softcap)[0]


def _masked(query: Tensor, key: Tensor, value: Tensor, index: Tensor, mask: Tensor, position: Tensor | None,
            scale: float | None, softcap: float, sliding: int, causal: bool) -> Tensor:
    """Attention among the rows of ``index [B, H, K]`` under an arbitrary mask, tile by tile; -> [B, H, K, Dv]."""
    batch, heads, kept = index.shape
    numbers = wide(query.dtype)
    queries, keys, values = (gather_rows(t, index).to(numbers) for t in (query, key, value))
    number = torch.arange(batch, device=index.device)[:, None, None, None]
    head = torch.arange(heads, device=index.device)[None, :, None, None]
    mask = mask.expand(batch, heads, *mask.shape[2:])
    safe = index.clamp(min=0)
    place = index if position is None else torch.where(
        index < 0, -1, position.expand(batch, heads, position.shape[2]).gather(2, safe))
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


def compute(query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, position: Tensor | None,
            mask: Tensor | None, scale: float | None, softcap: float, sliding: int, causal: bool = True) -> Tensor:
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
        place = index if position is None else torch.where(
            index < 0, -1, position.expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0)))
        found = block_list_attention(queries, keys, values, None, None, place, 128, 64, scale, True, sliding,
                                     softcap)[0]
    return scatter_rows(found, index, length)


@torch.library.custom_op("tokcompile::token_sparse_attention", mutates_args=())
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None = None, mask: Tensor | None = None,
    scale: float | None = None, softcap: float = 0.0, sliding: int = 0, coverage: float = 0.005, keep: float = 0.0,
    least: int = 1024, window: int = 128, pool: int = 7, seed: int = -1, causal: bool = True,
) -> Tensor:
    """Causal attention in which each head attends among tokens that the last queries look at most.

    Args:
        query: float [B, H, L, D]. key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv].
        keys: bool [B or 1, L]: which tokens are there; None: all.
        mask: what else hides or adds: bool (True: visible) or float, broadcasts to [B, H, L, L]; None.
        scale, softcap: of the dot products. sliding: only the ``sliding`` keys before a query; 0: all.
        coverage: share of the window's attention that may be lost; keep: share of the tokens that is kept, if not 0.
        causal: without a mask it always is; False: the mask says who sees whom.
        least, window, pool, seed: see :class:`tokcompile.passes.token_sparse.TokenSparse`.

    Returns:
        [B, H, L, Dv]; 0 for a (token, head) that was not chosen.

    Raises:
        ValueError: shapes, types or numbers that do not fit together.
    """
    _check(query, key, value, scale, softcap, sliding)
    position, mask = _position(query, keys), _square(mask, query)
    index = select(query, key, position, mask, scale, softcap, sliding, coverage, keep, least, window, pool, seed,
                   causal)
    return compute(query, key, value, index, position, mask, scale, softcap, sliding, causal).clone()


@token_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("tokcompile::token_sparse_attention_backward", mutates_args=())
def token_sparse_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, mask: Tensor | None,
    scale: float | None, softcap: float, sliding: int, coverage: float, keep: float, least: int, window: int,
    pool: int, seed: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives for query, key and value; the choice is made again and is not differentiated."""
    position, mask = _position(query, keys), _square(mask, query)
    index = select(query, key, position, mask, scale, softcap, sliding, coverage, keep, least, window, pool, seed,
                   causal)
    if mask is not None:
        raise NotImplementedError("token_sparse_attention has no derivative under an arbitrary mask (one that is not "
                                  "causal, a window and padding)")
    ops, operands, place = torch.ops.tokcompile, [query, key, value], position
    if index is not None:
        operands, grad = [gather_rows(t, index) for t in operands], gather_rows(grad, index)
        place = index if position is None else torch.where(
            index < 0, -1, position.expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0)))
    settings = (None, None, place, 128, 64, scale, True, sliding, softcap)
    output, lse = block_list_attention(*operands, *settings)
    grads = ops.block_list_attention_backward(grad, torch.zeros_like(lse), *operands, output, lse, *settings)
    if index is not None:
        grads = [ops.gather_rows_backward(g, index, t.shape[1], t.shape[2])
                 for g, t in zip(grads, (query, key, value), strict=True)]
    return grads[0], grads[1], grads[2]


@token_sparse_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.tokcompile.token_sparse_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *[None] * 12)


token_sparse_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.tokcompile.token_sparse_attention)
def _flops(query: Any, key: Any, value: Any, keys: Any = None, mask: Any = None, scale: Any = None,
           softcap: float = 0.0, sliding: int = 0, coverage: float = 0.005, keep: float = 0.0, least: int = 1024,
           window: int = 128, *_args: Any, **_kwargs: Any) -> int:
    """Multiply-adds x 2, as dense attention is counted (the full square); by coverage the count is that of dense."""
    batch, heads, length, width = query
    share = keep if keep else 1.0
    kept = min(length, max(least, int(share * (length - window))) + window)
    scores = 2 * 2 * window * length * width if kept < length else 0
    return int(batch * heads * (scores + 2 * kept * kept * (width + value[3])))


def _position(query: Tensor, keys: Tensor | None) -> Tensor | None:
    """int64 [B, 1, L]: the place of each token that is there, -1 of others."""
    if keys is None:
        return None
    length = query.shape[2]
    return torch.where(keys, torch.arange(length, device=keys.device), -1).expand(query.shape[0], length).unsqueeze(1)


def _square(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask as [B or 1, H or 1, L, L]."""
    if mask is None:
        return None
    mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    return mask.expand(*mask.shape[:2], query.shape[2], query.shape[2])


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float, sliding: int) -> None:
    check_heads(query, key, value)
    check_numbers(scale, softcap)
    check_position(None, key, sliding)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys; this is an attention within one sequence")
