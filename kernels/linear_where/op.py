"""The operation ``torch.ops.tokcompile.linear_where``: a linear layer for some of the tokens.

    y_i = x_i @ weight.T + bias    where mask_i,    0 elsewhere

The dense way out for tokens without a row in a table. Only the tokens of the mask are multiplied; how many they are
stays inside the operation (on CUDA one number is copied to the host).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..precision import operation


@operation("tokcompile::linear_where", mutates_args=())
def linear_where(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """A linear layer for the tokens of ``mask``.

    Args:
        x: float [..., d].
        weight: [f, d], type of ``x``; under autocast any.
        bias: [f] or None.
        mask: bool [...].

    Returns:
        float [..., f], zero where the mask is false.
    """
    result = x.new_zeros(*x.shape[:-1], weight.shape[0])
    if bool(mask.any()):
        # under autocast the weight can be wider than x
        result[mask] = functional.linear(x[mask].to(weight.dtype), weight, bias).to(x.dtype)
    return result


@linear_where.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operation("tokcompile::linear_where_backward", mutates_args=())
def linear_where_backward(grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    result, above = torch.zeros_like(x), grad[mask].to(weight.dtype)  # under autocast x can be narrower than weight
    result[mask] = (above @ weight).to(x.dtype)
    return result, (above.T @ x[mask].to(weight.dtype)).to(weight.dtype), above.sum(0)


@linear_where_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mask = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.biased = bias is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias = linear_where_backward(grad, *ctx.saved_tensors)
    return of_x, of_weight, of_bias if ctx.biased else None, None


linear_where.register_autograd(_differentiate, setup_context=_keep)
