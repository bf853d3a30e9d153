"""The operation ``torch.ops.tokcompile.token_votes``: an opaque leaf in a graph, without a derivative.

On CUDA the Triton kernels run where :func:`supports` allows it, elsewhere the definition in ``reference.py``. The
kernels look at the flags of the rows themselves: nothing is copied to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..attend import differ, kernel_limits
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import token_votes_reference


@operation("tokcompile::token_votes", mutates_args=())
def token_votes(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    skip: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Votes of the heads for each key; see ``reference.token_votes_reference``.

    Args:
        query: float [B, H, 1, D].
        key: [B, Hkv, T, D].
        candidate: bool [B or 1, T].
        skip: bool [B].
        scale, softcap: of the dot products.

    Returns:
        fp32 [B, T]; zeros in rows that are skipped.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    check(query, key, candidate, skip)
    if query.is_cuda and supports(query, key)[0]:
        return kernel.token_votes_triton(query, key, candidate, skip, scale, softcap)
    return token_votes_reference(query, key, candidate, skip, scale, softcap)


@token_votes.register_fake
def _(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    skip: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    check(query, key, candidate, skip)
    return key.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)


def check(query: Tensor, key: Tensor, candidate: Tensor, skip: Tensor) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    if (
        query.ndim != 4
        or key.ndim != 4
        or differ(query.shape[2], 1)
        or differ(query.shape[3], key.shape[3])
        or (differ(query.shape[0], key.shape[0]) or query.dtype != key.dtype or not key.is_floating_point())
    ):
        raise ValueError(
            f"expected query [B, H, 1, D] and key [B, Hkv, T, D] of one float type, found {query.dtype} "
            f"{tuple(query.shape)} and {key.dtype} {tuple(key.shape)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads")
    if (
        candidate.dtype != torch.bool
        or candidate.ndim != 2
        or differ(candidate.shape[1], key.shape[2])
        or (differ(candidate.shape[0], 1) and differ(candidate.shape[0], key.shape[0]))
    ):
        raise ValueError(
            f"candidate must be bool [{key.shape[0]} or 1, {key.shape[2]}], found {candidate.dtype} "
            f"{tuple(candidate.shape)}"
        )
    if skip.dtype != torch.bool or skip.ndim != 1 or differ(skip.shape[0], key.shape[0]):
        raise ValueError(f"skip must be bool [{key.shape[0]}], found {skip.dtype} {tuple(skip.shape)}")


def supports(query: Tensor, key: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can run on these arguments, and why not."""
    ok, reason = runs_on(query)
    return kernel_limits(query, key) if ok else (ok, reason)


@register_flop_formula(torch.ops.tokcompile.token_votes)
def _(query: list[int], key: list[int], *_: object, **__: object) -> int:
    """Products with all keys; skipped rows count too, since no shape shows them."""
    batch, heads, _queries, width = query
    return 2 * batch * heads * key[2] * width
