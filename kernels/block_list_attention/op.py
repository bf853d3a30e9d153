"""The operation ``torch.ops.tokcompile.block_list_attention``: an opaque, differentiable leaf in a graph.

On CUDA the Triton kernel runs where :func:`supports` allows it, elsewhere the definition in ``reference.py``. The
derivative is computed in plain torch on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..attend import check_heads, check_numbers, check_range, differ, kernel_limits, register_derivative, shape_of, wide
from ..attention_rows.op import check_position
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import Settings, backward_reference, block_list_attention_reference


@operation("tokcompile::block_list_attention", mutates_args=())
def block_list_attention(
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
    """Attention over listed blocks of keys; see ``reference.block_list_attention_reference``.

    Args:
        query: float [B, H, Q, D]. key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv].
        index: int32 or int64 [B, M, ceil(Q / block_q), C] or None; -1 for none. count: [B, M, ceil(Q / block_q)].
        position: int32 or int64 [B, 1 or Hkv, L], ascending; -1: hidden. None: 0, 1, 2 ...
        block_q, block_k: rows of a block of queries, and of keys; powers of two for the Triton kernel.
        scale, causal, window, softcap: as there.

    Returns:
        output [B, H, Q, Dv] and log-sum-exp [B, H, Q]; 0 and -inf for a query without a key.

    Raises:
        ValueError: shapes, types or numbers that do not fit together; on the host also indices out of range.
    """
    check(query, key, value, index, count, position, block_q, block_k, scale, window, softcap)
    args = (query, key, value, index, count, position, block_q, block_k, scale, causal, window, softcap)
    if query.is_cuda and supports(query, key, value, block_q, block_k)[0]:
        return kernel.block_list_attention_triton(*args)
    return block_list_attention_reference(*args)


@block_list_attention.register_fake
def _(
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
    check(query, key, value, index, count, position, block_q, block_k, scale, window, softcap)
    batch, heads, queries, _ = query.shape
    return (
        query.new_empty(batch, heads, queries, value.shape[3]),
        query.new_empty(batch, heads, queries, dtype=wide(query.dtype)),
    )


@operation("tokcompile::block_list_attention_backward", mutates_args=())
def block_list_attention_backward(
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
    block_q: int,
    block_k: int,
    scale: float | None,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of :func:`block_list_attention` for query, key and value."""
    return backward_reference(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        index,
        count,
        position,
        Settings(block_q, block_k, scale, causal, window, softcap),
    )


register_derivative(block_list_attention, block_list_attention_backward, 3)


@register_flop_formula(torch.ops.tokcompile.block_list_attention)
def _flops(
    query: Any,
    key: Any,
    value: Any,
    index: Any = None,
    count: Any = None,
    position: Any = None,
    block_q: int = 128,
    block_k: int = 64,
    *_args: Any,
    **_kwargs: Any,
) -> int:
    """Multiply-adds x 2, at full lists."""
    columns = key[2] if index is None else min(key[2], index[3] * block_k)
    return 2 * query[0] * query[1] * query[2] * columns * (query[3] + value[3])  # type: ignore[no-any-return]


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    position: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float | None,
    window: int,
    softcap: float,
) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    check_heads(query, key, value)
    check_numbers(scale, softcap)
    check_position(position, key, window)
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks must have at least one row, found {block_q} queries and {block_k} keys")
    if (
        isinstance(query.shape[2], int)
        and isinstance(key.shape[2], int)
        and position is not None
        and (query.shape[2] > key.shape[2])
    ):
        raise ValueError(f"{query.shape[2]} queries are more than the {key.shape[2]} positions")
    if index is None:
        if count is not None:
            raise ValueError("count without index: there are no lists to count")
        return
    shape_of("index", index, "B M blocks C", (torch.int32, torch.int64))
    heads, kv_heads, lists = query.shape[1], key.shape[1], index.shape[1]
    if all(isinstance(n, int) for n in (heads, kv_heads, lists)) and (lists == 0 or lists % kv_heads or heads % lists):
        raise ValueError(
            f"{lists} lists for {heads} query heads and {kv_heads} key heads: the number of lists must "
            "be a multiple of the key heads and divide the query heads"
        )
    blocks = -(-query.shape[2] // block_q)
    if differ(index.shape[0], query.shape[0]) or differ(index.shape[2], blocks):
        raise ValueError(
            f"index {list(index.shape)} must be [B, M, {blocks}, C] for query {list(query.shape)} in "
            f"blocks of {block_q}"
        )
    if count is not None:
        shape_of("count", count, "B M blocks", (torch.int32, torch.int64))
        if any(differ(count.shape[i], index.shape[i]) for i in range(3)):
            raise ValueError(f"count {list(count.shape)} must have the shape of index {list(index.shape)} without C")
        check_range("count", count, index.shape[3] + 1 if isinstance(index.shape[3], int) else 1 << 62)
    if isinstance(key.shape[2], int):
        check_range("index", index, -(-key.shape[2] // block_k))


def supports(query: Tensor, key: Tensor, value: Tensor, block_q: int = 128, block_k: int = 64) -> tuple[bool, str]:
    """Whether the Triton kernel can run on these arguments, and why not."""
    ok, reason = runs_on(query)
    if ok and min(block_q & -block_q, block_k & -block_k) < 16:
        return False, f"blocks of {block_q} queries and {block_k} keys; the Triton kernel takes multiples of 16"
    return kernel_limits(query, value) if ok else (ok, reason)
