"""The operation ``torch.ops.tokcompile.token_list_attention``: an opaque, differentiable leaf in a graph.

On CUDA the Triton kernel runs where :func:`supports` allows it, elsewhere the definition in ``reference.py``. The
derivative is computed in plain torch on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..attend import check_heads, check_numbers, check_range, differ, kernel_limits, register_derivative, shape_of, wide
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import backward_reference, token_list_attention_reference


@operation("tokcompile::token_list_attention", mutates_args=())
def token_list_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries over listed keys; see ``reference.token_list_attention_reference``.

    Args:
        query: float [B, H, Q, D].
        key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv].
        index: int32 or int64 [B, M, C], -1 for an empty slot; M a multiple of Hkv that divides H.
        count: int32 or int64 [B, M] or None.
        scale: of the dot products; None: 1 / sqrt(D).
        causal: query i sees keys up to position L - Q + i only.
        softcap: of the dot products; 0: none.

    Returns:
        output [B, H, Q, Dv] and log-sum-exp [B, H, Q]; 0 and -inf for a query without a key.

    Raises:
        ValueError: shapes, types or numbers that do not fit together; on the host also indices out of range.
    """
    check(query, key, value, index, count, scale, softcap)
    check_range("index", index, key.shape[2])
    if query.is_cuda and supports(query, key, value, index, count, scale, causal, softcap)[0]:
        return kernel.token_list_attention_triton(query, key, value, index, count, scale, causal, softcap)
    return token_list_attention_reference(query, key, value, index, count, scale, causal, softcap)


@token_list_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check(query, key, value, index, count, scale, softcap)
    batch, heads, queries, _ = query.shape
    return (
        query.new_empty(batch, heads, queries, value.shape[3]),
        query.new_empty(batch, heads, queries, dtype=wide(query.dtype)),
    )


@operation("tokcompile::token_list_attention_backward", mutates_args=())
def token_list_attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float | None,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of :func:`token_list_attention` for query, key and value."""
    return backward_reference(
        grad_output, grad_lse, query, key, value, output, lse, index, count, scale, causal, softcap
    )


register_derivative(token_list_attention, token_list_attention_backward, 2)


def check(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, count: Tensor | None, scale: float | None, softcap: float
) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    check_heads(query, key, value)
    check_numbers(scale, softcap)
    shape_of("index", index, "B M C", (torch.int32, torch.int64))
    heads, kv_heads, lists = query.shape[1], key.shape[1], index.shape[1]
    if all(isinstance(n, int) for n in (heads, kv_heads, lists)) and (lists == 0 or lists % kv_heads or heads % lists):
        raise ValueError(
            f"{lists} lists for {heads} query heads and {kv_heads} key heads: the number of lists must "
            "be a multiple of the key heads and divide the query heads"
        )
    if differ(index.shape[0], query.shape[0]):
        raise ValueError(f"query has {query.shape[0]} rows of the batch, index has {index.shape[0]}")
    if count is not None:
        shape_of("count", count, "B M", (torch.int32, torch.int64))
        if differ(count.shape[0], index.shape[0]) or differ(count.shape[1], lists):
            raise ValueError(f"count {list(count.shape)} must have the shape of index {list(index.shape)} without C")
        check_range("count", count, index.shape[2] + 1 if isinstance(index.shape[2], int) else 1 << 62)


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[bool, str]:
    """Whether the Triton kernel can run on these arguments, and why not."""
    ok, reason = runs_on(query)
    return kernel_limits(query, value) if ok else (ok, reason)


@register_flop_formula(torch.ops.tokcompile.token_list_attention)
def _(query: list[int], key: list[int], value: list[int], index: list[int], *_: object, **__: object) -> int:
    """Products with the listed keys and values; empty slots count too, since no shape shows them."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * index[2] * (width + value[3])
