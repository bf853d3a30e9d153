"""The operation ``torch.ops.tokcompile.token_sparse_attention``: each head attends among tokens of its own choice.

How many tokens are kept depends on the data, so that the whole of it - scores, choice, compression, attention and
decompression - is one operation with a result of static shape: nothing in the graph around it depends on the count.

Source: Token Sparse Attention, arXiv 2602.03216.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokcompile.kernels.attend import check_heads, check_numbers
from tokcompile.kernels.attention_rows.op import check_position
from tokcompile.kernels.block_list_attention import block_list_attention
from tokcompile.kernels.gather_rows import gather_rows
from tokcompile.kernels.token_sparse_attention.reference import compute, select

from ..precision import operation


@operation("tokcompile::token_sparse_attention", mutates_args=())
def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sliding: int = 0,
    coverage: float = 0.005,
    keep: float = 0.0,
    least: int = 1024,
    window: int = 128,
    pool: int = 7,
    seed: int = -1,
    causal: bool = True,
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
    index = select(
        query, key, position, mask, scale, softcap, sliding, coverage, keep, least, window, pool, seed, causal
    )
    return compute(query, key, value, index, position, mask, scale, softcap, sliding, causal).clone()


@token_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@operation("tokcompile::token_sparse_attention_backward", mutates_args=())
def token_sparse_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor | None,
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
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives for query, key and value; the choice is made again and is not differentiated."""
    position, mask = _position(query, keys), _square(mask, query)
    index = select(
        query, key, position, mask, scale, softcap, sliding, coverage, keep, least, window, pool, seed, causal
    )
    if mask is not None:
        raise NotImplementedError(
            "token_sparse_attention has no derivative under an arbitrary mask (one that is not "
            "causal, a window and padding)"
        )
    ops, operands, place = torch.ops.tokcompile, [query, key, value], position
    if index is not None:
        operands, grad = [gather_rows(t, index) for t in operands], gather_rows(grad, index)
        place = (
            index
            if position is None
            else torch.where(index < 0, -1, position.expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0)))
        )
    settings = (None, None, place, 128, 64, scale, True, sliding, softcap)
    output, lse = block_list_attention(*operands, *settings)
    grads = ops.block_list_attention_backward(grad, torch.zeros_like(lse), *operands, output, lse, *settings)
    if index is not None:
        grads = [
            ops.gather_rows_backward(g, index, t.shape[1], t.shape[2])
            for g, t in zip(grads, (query, key, value), strict=True)
        ]
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
def _flops(
    query: Any,
    key: Any,
    value: Any,
    keys: Any = None,
    mask: Any = None,
    scale: Any = None,
    softcap: float = 0.0,
    sliding: int = 0,
    coverage: float = 0.005,
    keep: float = 0.0,
    least: int = 1024,
    window: int = 128,
    *_args: Any,
    **_kwargs: Any,
) -> int:
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
