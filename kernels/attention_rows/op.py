"""The operation ``torch.ops.tokcompile.attention_rows``: scores by which tokens are chosen; it has no derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import check_heads, check_numbers, differ, kernel_limits, shape_of, wide
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import attention_rows_reference


@operation("tokcompile::attention_rows", mutates_args=())
def attention_rows(
    query: Tensor,
    key: Tensor,
    position: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sums: bool = True,
) -> Tensor:
    """Attention of the last Q positions on all L keys; see ``reference.attention_rows_reference``.

    Args:
        query: float [B, H, Q, D]. key: [B, Hkv, L, D].
        position: int32 or int64 [B, 1 or Hkv, L], ascending; -1: hidden. None: 0, 1, 2 ...
        scale, causal, window, softcap: as there.
        sums: add the rows up.

    Returns:
        fp32 (fp64 for fp64) [B, H, L], or [B, H, Q, L].

    Raises:
        ValueError: shapes, types or numbers that do not fit together.
    """
    check(query, key, position, scale, softcap, window)
    if query.is_cuda and supports(query, key)[0]:
        return kernel.attention_rows_triton(query, key, position, scale, causal, window, softcap, sums)
    return attention_rows_reference(query, key, position, scale, causal, window, softcap, sums)


@attention_rows.register_fake
def _(
    query: Tensor,
    key: Tensor,
    position: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sums: bool = True,
) -> Tensor:
    check(query, key, position, scale, softcap, window)
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, heads, *(() if sums else (queries,)), key.shape[2], dtype=wide(query.dtype))


def check(
    query: Tensor, key: Tensor, position: Tensor | None, scale: float | None, softcap: float, window: int
) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    check_heads(query, key)
    check_numbers(scale, softcap)
    check_position(position, key, window)
    if isinstance(query.shape[2], int) and isinstance(key.shape[2], int) and query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries are more than the {key.shape[2]} positions that end with them")


def check_position(position: Tensor | None, key: Tensor, window: int) -> None:
    """Raise ValueError unless position is int [B, 1 or Hkv, L] and the window a number."""
    if window < 0:
        raise ValueError(f"window must be 0 (none) or a positive number, found {window}")
    if position is None:
        return
    shape_of("position", position, "B P L", (torch.int32, torch.int64))
    if any(differ(position.shape[i], key.shape[j]) for i, j in ((0, 0), (2, 2))) or (
        differ(position.shape[1], 1) and differ(position.shape[1], key.shape[1])
    ):
        raise ValueError(f"position {list(position.shape)} must be [B, 1 or Hkv, L] of key {list(key.shape)}")


def supports(query: Tensor, key: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can run on these arguments, and why not."""
    ok, reason = runs_on(query)
    return kernel_limits(query, key) if ok else (ok, reason)
