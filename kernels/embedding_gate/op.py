"""The operation ``torch.ops.tokcompile.embedding_gate``: rows of a table and a gated product in one pass.

No tensor of gathered rows is kept. Gradients flow to the gate, the table and the fallback. That of the table is summed
in fp32 over the rows that occur, one sum for each, before it is rounded; all other rows are zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activation import activate, check_activation, slope
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import rows


@operation("tokcompile::embedding_gate", mutates_args=())
def embedding_gate(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    """Activate the gate and multiply it by the row of each token; see ``reference.embedding_gate_reference``.

    Args:
        gate: float [..., f].
        table: float [R, f], same device.
        index: int64 [...].
        activation: one of ``ACTIVATIONS``.
        remap: int32 or int64 [V], or None.
        fallback: float [f] or [..., f], or None.

    Returns:
        float [..., f], type of ``gate``.

    Raises:
        ValueError: unknown activation, or shapes and types that do not fit together.
    """
    check(gate, table, index, activation, remap, fallback)
    if gate.is_cuda and supports(gate, table, index, activation, remap, fallback)[0]:
        return kernel.embedding_gate_triton(gate, table, index, activation, remap, fallback)
    return embedding_gate_host(gate, table, index, activation, remap, fallback)


@embedding_gate.register_fake
def _(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    check(gate, table, index, activation, remap, fallback)
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def check(
    gate: Tensor, table: Tensor, index: Tensor, activation: str, remap: Tensor | None, fallback: Tensor | None
) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    check_activation(activation)
    if gate.ndim == 0 or not gate.is_floating_point():
        raise ValueError(f"gate must be float [..., f], found {gate.dtype} {tuple(gate.shape)}")
    if table.ndim != 2 or not table.is_floating_point() or _differ(table.shape[1], gate.shape[-1]):
        raise ValueError(f"table must be float [R, {gate.shape[-1]}], found {table.dtype} {tuple(table.shape)}")
    if index.dtype != torch.int64 or _other_shape(index, gate, 1):
        raise ValueError(f"index must be int64 {tuple(gate.shape[:-1])}, found {index.dtype} {tuple(index.shape)}")
    if remap is not None and (remap.ndim != 1 or remap.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"remap must be int32 or int64 [V], found {remap.dtype} {tuple(remap.shape)}")
    if fallback is not None:
        one = fallback.ndim == 1 and not _differ(fallback.shape[0], gate.shape[-1])
        if not fallback.is_floating_point() or not (one or not _other_shape(fallback, gate, 0)):
            raise ValueError(
                f"fallback must be float [{gate.shape[-1]}] or {tuple(gate.shape)}, "
                f"found {fallback.dtype} {tuple(fallback.shape)}"
            )


def _differ(one: Any, other: Any) -> bool:
    """Whether sizes differ; symbolic ones are taken for equal: their comparison would add a guard."""
    return isinstance(one, int) and isinstance(other, int) and one != other


def _other_shape(value: Tensor, gate: Tensor, less: int) -> bool:
    """Whether the shape differs from that of the gate without its last ``less`` axes."""
    sizes = gate.shape[: gate.ndim - less]
    return value.ndim != len(sizes) or any(_differ(a, b) for a, b in zip(value.shape, sizes, strict=True))


def supports(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> tuple[bool, str]:
    """Whether the Triton kernel can run on these arguments, and why not."""
    ok, reason = runs_on(gate)
    if not ok:
        return ok, reason
    if gate.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"the Triton kernel takes float32, float16 and bfloat16, the gate is {gate.dtype}"
    if remap is not None and remap.shape[0] == 0:
        return False, "the Triton kernel cannot read an empty remap"
    for name, value in (("table", table), ("index", index), ("remap", remap), ("fallback", fallback)):
        if value is not None and value.device != gate.device:
            return False, f"{name} is on {value.device}, the gate on {gate.device}"
    return True, ""


def embedding_gate_host(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    """As :func:`embedding_gate`, with library operations."""
    value = _values(gate, table, rows(index, table.shape[0], remap), fallback)
    return activate(gate, activation).mul_(value).contiguous()


def _values(gate: Tensor, table: Tensor, place: Tensor, fallback: Tensor | None) -> Tensor:
    """``u`` of the definition, [..., f] in the type of the gate."""
    if table.shape[0] == 0:
        value = torch.zeros_like(gate)
    else:
        value = table.index_select(0, place.clamp(min=0).reshape(-1)).to(gate.dtype).view(gate.shape)
    missing = (place < 0).unsqueeze(-1)
    if fallback is None:
        return value.masked_fill_(missing, 0)
    return torch.where(missing, fallback.to(gate.dtype), value)


@operation("tokcompile::embedding_gate_backward", mutates_args=())
def embedding_gate_backward(
    grad: Tensor,
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None,
    fallback: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of :func:`embedding_gate`.

    Args:
        grad: float [..., f], gradient of the result; the other arguments are those of the operation.
        needed: for gate, table and fallback: whether its gradient is wanted.

    Returns:
        three tensors; those that are not wanted have no elements.
    """
    result = _gradients(gate, table, fallback, needed)
    wide, width = torch.promote_types(gate.dtype, torch.float32), gate.shape[-1]
    place = rows(index, table.shape[0], remap)
    grad, gate = grad.to(wide), gate.to(wide)
    if needed[0]:
        result[0] = (grad * _values(gate, table, place, fallback) * slope(gate, activation)).to(result[0].dtype)
    if not needed[1] and not needed[2]:
        return result
    above = grad * activate(gate, activation)
    if needed[1]:
        flat = place.reshape(-1)
        present, inverse = torch.unique(flat[flat >= 0], return_inverse=True)
        sums = above.new_zeros(len(present), width).index_add_(0, inverse, above.reshape(-1, width)[flat >= 0])
        result[1][present] = sums.to(table.dtype)
    if needed[2] and fallback is not None:
        above = above.masked_fill((place >= 0).unsqueeze(-1), 0)
        above = above if fallback.ndim == gate.ndim else above.reshape(-1, width)
        result[2] = (above if above.shape == fallback.shape else above.sum(0)).to(fallback.dtype)
    return result


@embedding_gate_backward.register_fake
def _(
    grad: Tensor,
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None,
    fallback: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    return _gradients(gate, table, fallback, needed)


def _gradients(gate: Tensor, table: Tensor, fallback: Tensor | None, needed: list[bool]) -> list[Tensor]:
    """Zeros like each wanted argument, and nothing like the others."""
    return [
        value.new_zeros(value.shape) if wanted and value is not None else gate.new_empty(0)
        for value, wanted in zip((gate, table, fallback), needed, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, table, index, ctx.activation, remap, fallback = inputs
    ctx.save_for_backward(gate, table, index, remap, fallback)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, table, index, remap, fallback = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad, False, False)  # a call without the last arguments has fewer entries
    needed = [wanted[0], wanted[1], wanted[5]]
    parts = embedding_gate_backward(grad, gate, table, index, ctx.activation, remap, fallback, needed)
    of_gate, of_table, of_fallback = (p if n else None for p, n in zip(parts, needed, strict=True))
    return of_gate, of_table, None, None, None, of_fallback


embedding_gate.register_autograd(_differentiate, setup_context=_keep)
