"""The operations ``gather_rows`` and ``scatter_rows``: opaque, differentiable leaves in a graph.

Each is the derivative of the other, except that a row that was gathered twice gets both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attend import FLOATS, KERNEL_FLOATS, check_range, differ, shape_of
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import gather_backward_reference, gather_rows_reference, scatter_rows_reference


@operation("tokcompile::gather_rows", mutates_args=())
def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """Rows by head; see ``reference.gather_rows_reference``.

    Args:
        source: float [B, H, L, D]. index: int32 or int64 [B, M, K], -1 for an empty slot; M a multiple of H.

    Returns:
        [B, M, K, D]

    Raises:
        ValueError: shapes or types that do not fit together; on the host also an index out of range.
    """
    check(source, index, False)
    check_range("index", index, source.shape[2])
    if source.is_cuda and supports(source, index)[0]:
        return kernel.gather_rows_triton(source, index)
    return gather_rows_reference(source, index)


@operation("tokcompile::scatter_rows", mutates_args=())
def scatter_rows(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows back to their places; see ``reference.scatter_rows_reference``.

    Args:
        rows: float [B, M, K, D]. index: int32 or int64 [B, M, K], distinct in each list apart from -1. length: L.

    Returns:
        [B, M, L, D]; 0 where no row goes.

    Raises:
        ValueError: as for :func:`gather_rows`.
    """
    check(rows, index, True)
    check_range("index", index, length)
    if rows.is_cuda and supports(rows, index)[0]:
        return kernel.scatter_rows_triton(rows, index, length)
    return scatter_rows_reference(rows, index, length)


@operation("tokcompile::gather_rows_backward", mutates_args=())
def gather_rows_backward(grad: Tensor, index: Tensor, heads: int, length: int) -> Tensor:
    """Derivative of :func:`gather_rows` for its source."""
    return gather_backward_reference(grad, index, heads, length)


@gather_rows.register_fake
def _(source: Tensor, index: Tensor) -> Tensor:
    check(source, index, False)
    return source.new_empty(*index.shape, source.shape[3])


@scatter_rows.register_fake
def _(rows: Tensor, index: Tensor, length: int) -> Tensor:
    check(rows, index, True)
    return rows.new_empty(rows.shape[0], rows.shape[1], length, rows.shape[3])


@gather_rows_backward.register_fake
def _(grad: Tensor, index: Tensor, heads: int, length: int) -> Tensor:
    return grad.new_empty(grad.shape[0], heads, length, grad.shape[3])


def _save_gather(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.heads, ctx.length = inputs[0].shape[1:3]
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tokcompile.gather_rows_backward(grad, ctx.saved_tensors[0], ctx.heads, ctx.length), None


def _save_scatter(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tokcompile.gather_rows(grad, ctx.saved_tensors[0]), None, None


gather_rows.register_autograd(_gather_backward, setup_context=_save_gather)
scatter_rows.register_autograd(_scatter_backward, setup_context=_save_scatter)


def check(rows: Tensor, index: Tensor, scatter: bool) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    shape_of("rows" if scatter else "source", rows, "B H L D", FLOATS)
    shape_of("index", index, "B M K", (torch.int32, torch.int64))
    if differ(rows.shape[0], index.shape[0]):
        raise ValueError(f"{rows.shape[0]} rows of the batch, index has {index.shape[0]}")
    heads, lists = rows.shape[1], index.shape[1]
    if scatter and (differ(heads, lists) or differ(rows.shape[2], index.shape[2])):
        raise ValueError(f"rows {list(rows.shape)} must have the shape of index {list(index.shape)} and D")
    if isinstance(heads, int) and isinstance(lists, int) and (heads == 0 or lists % heads):
        raise ValueError(f"{lists} lists cannot share {heads} heads: the number does not divide")


def supports(rows: Tensor, index: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can run on these arguments, and why not."""
    ok, reason = runs_on(rows)
    if ok and rows.dtype not in KERNEL_FLOATS:
        return False, f"the Triton kernel moves fp32, fp16 and bf16, not {rows.dtype}"
    if ok and rows.shape[3] > 4096:
        return False, f"rows of {rows.shape[3]} numbers; the Triton kernel holds 4096"
    return ok, reason
