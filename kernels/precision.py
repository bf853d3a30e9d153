"""What kernels and scores compute is computed in the precision of its operands, whatever ``torch.autocast`` says.

A choice of tokens that was made in another precision is another choice. :func:`operation` makes an operation of
torch.library that runs with autocast off; :func:`matmul` and
:func:`linear` are the products for code that is traced into a graph.
:func:`as_autocast` is for the opposite: operands of what stands in for a part of the model, which autocast would cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def operation(name: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op`` for a function that runs with autocast off."""

    def make(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def alone(*args: Any, **kwargs: Any) -> Any:
            with torch._C._DisableAutocast():  # type: ignore[attr-defined]
                return function(*args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=kwargs["mutates_args"])
        return torch.library.custom_op(name, alone, mutates_args=kwargs["mutates_args"], schema=schema)

    return make


@operation("tokcompile::exact_matmul", mutates_args=())
def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with autocast off; both ``[..., n, m]``, with at least two dimensions."""
    return torch.matmul(a, b)


@exact_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    sizes = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*sizes, a.shape[-2], b.shape[-1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    of_a, of_b = ctx.needs_input_grad
    return (
        exact_matmul(grad, b.mT).sum_to_size(a.shape) if of_a else None,
        exact_matmul(a.mT, grad).sum_to_size(b.shape) if of_b else None,
    )


exact_matmul.register_autograd(_differentiate, setup_context=_keep)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the precision of its operands. Traceable; autocast that is off costs nothing."""
    return exact_matmul(a, b) if torch.is_autocast_enabled(a.device.type) else torch.matmul(a, b)  # type: ignore


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` in the precision of its operands, as :func:`matmul`."""
    if not torch.is_autocast_enabled(x.device.type):
        return torch.nn.functional.linear(x, weight, bias)
    value = exact_matmul(x, weight.mT)
    return value if bias is None else value + bias  # type: ignore[no-any-return]


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast hands them to a product: in its type, where it is on. Traceable."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
