"""The operation ``torch.ops.tokcompile.grouped_ffn``: routed experts as an opaque leaf in a graph.

How many tokens an expert gets is known only when the graph runs. As one operation that fact stays inside: shapes
outside depend on nothing. On the host each expert reads the tokens that chose it, and an expert that nobody chose is
not read at all. On CUDA the Triton kernels run, where :func:`supports` allows it, without a copy back to the host.

Gradients flow to tokens, weights of slots and weights of experts; the backward pass computes hidden values again
instead of keeping them. It works expert by expert with library products (on CUDA with one copy of E + 1 numbers to the
host).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from ..activation import activate, check_activation, slope
from ..launch import runs_on
from ..precision import operation
from . import triton as kernel
from .reference import is_gated


@operation("tokcompile::grouped_ffn", mutates_args=())
def grouped_ffn(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    """Every token through the experts of its slots; see ``reference.grouped_ffn_reference``.

    Args:
        x: float [N, d].
        index: int64 [N, k]; negative: empty slot. Kernels on CUDA take an expert that does not exist for an empty slot.
        weight: float [N, k].
        gate_up: [E, 2m, d] (gate rows, then up rows) or [E, m, d] for plain experts; type of ``x``.
        down: [E, d, m]; type of ``x``.
        activation: one of ``ACTIVATIONS``.
        bias: [E, 2m] or [E, m], or None; type of ``x``.

    Returns:
        float [N, d], type of ``x``.

    Raises:
        ValueError: unknown activation, shapes and types that do not fit together, or (on the host) an index >= E.
    """
    check(x, index, weight, gate_up, down, activation, bias)
    if x.is_cuda and supports(x, index, weight, gate_up, down, activation, bias)[0]:
        return kernel.grouped_ffn_triton(x, index, weight, gate_up, down, activation, bias)
    return grouped_ffn_host(x, index, weight, gate_up, down, activation, bias)


@grouped_ffn.register_fake
def _(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    check(x, index, weight, gate_up, down, activation, bias)
    return x.new_empty(x.shape)


def check(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None
) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    check_activation(activation)
    for name, value, sizes in (
        ("x", x, "[N, d]"),
        ("weight", weight, "[N, k]"),
        ("gate_up", gate_up, "[E, 2m, d]"),
        ("down", down, "[E, d, m]"),
    ):
        if value.ndim != sizes.count(",") + 1 or not value.is_floating_point():
            raise ValueError(f"{name} must be float {sizes}, found {value.dtype} {tuple(value.shape)}")
    if index.ndim != 2 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [N, k], found {index.dtype} {tuple(index.shape)}")
    _equal("x has width", x.shape[1], "the rows of gate_up", gate_up.shape[2])
    _equal("x has width", x.shape[1], "the height of down", down.shape[1])
    _equal("gate_up has experts", gate_up.shape[0], "those of down", down.shape[0])
    _equal("index has slots", index.shape[1], "those of weight", weight.shape[1])
    _equal("x has tokens", x.shape[0], "those of index", index.shape[0])
    _equal("x has tokens", x.shape[0], "those of weight", weight.shape[0])
    height, width = gate_up.shape[1], down.shape[2]
    if isinstance(height, int) and isinstance(width, int) and height not in (width, 2 * width):
        raise ValueError(f"gate_up must be twice as high as down is wide (gated) or as high (plain): {height}, {width}")
    if not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(f"x, gate_up and down must have one type, found {x.dtype}, {gate_up.dtype}, {down.dtype}")
    if bias is not None and (tuple(bias.shape) != tuple(gate_up.shape[:2]) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} {tuple(gate_up.shape[:2])}, found {bias.dtype} {tuple(bias.shape)}")


def _equal(what: str, value: Any, other: str, expected: Any) -> None:
    """Compare sizes, symbolic ones not at all: their comparison would add a guard."""
    if isinstance(value, int) and isinstance(expected, int) and value != expected:
        raise ValueError(f"{what} {value}, {other} {expected}")


def supports(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> tuple[bool, str]:
    """Whether the Triton kernels can run on these arguments, and why not."""
    ok, reason = runs_on(x)
    if not ok:
        return ok, reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"the Triton kernels take float32, float16 and bfloat16, the tokens are {x.dtype}"
    if gate_up.shape[0] > kernel.MAX_EXPERTS:
        return False, f"{gate_up.shape[0]} experts; the Triton kernels hold at most {kernel.MAX_EXPERTS}"
    return True, ""


def groups(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The experts that are chosen: (expert, tokens int64 [n], places in the flattened index int64 [n])."""
    flat = index.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(experts + 1, device=index.device)).tolist()
    if offsets[-1] < len(flat):
        raise ValueError(f"index holds expert {int(ordered[-1])}, there are {experts}")
    tokens = torch.div(order, max(1, index.shape[1]), rounding_mode="floor")
    for expert in range(experts):
        low, high = offsets[expert], offsets[expert + 1]
        if low < high:
            yield expert, tokens[low:high], order[low:high]


def grouped_ffn_host(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    """As :func:`grouped_ffn`, expert by expert with library products."""
    gated, wide = is_gated(gate_up, down), torch.promote_types(x.dtype, torch.float32)
    result = torch.zeros(x.shape, dtype=wide, device=x.device)
    flat = weight.reshape(-1)
    for expert, token, place in groups(index, gate_up.shape[0]):
        hidden = functional.linear(x[token], gate_up[expert], None if bias is None else bias[expert])
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activate(gate, activation).mul_(up)
        else:
            hidden = activate(hidden, activation)
        part = functional.linear(hidden, down[expert]).to(wide)
        result.index_add_(0, token, part.mul_(flat[place].to(wide).unsqueeze(-1)))
    return result.to(x.dtype)


@operation("tokcompile::grouped_ffn_backward", mutates_args=())
def grouped_ffn_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    bias: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of :func:`grouped_ffn`.

    Args:
        grad: float [N, d], gradient of the result; the other arguments are those of the operation.
        needed: for x, weight, gate_up, down and bias: whether its gradient is wanted.

    Returns:
        five tensors; those that are not wanted have no elements. Weights of empty slots have gradient 0.
    """
    gated, wide = is_gated(gate_up, down), torch.promote_types(x.dtype, torch.float32)
    grad = grad.to(x.dtype)
    result = _gradients(x, weight, gate_up, down, bias, needed)
    of_x, of_weight, of_gate_up, of_down, of_bias = result
    total = torch.zeros(x.shape, dtype=wide, device=x.device) if needed[0] else of_x
    flat = weight.reshape(-1)
    for expert, token, place in groups(index, gate_up.shape[0]):
        tokens, above, scale = x[token], grad[token], flat[place].to(wide).unsqueeze(-1)
        hidden = functional.linear(tokens, gate_up[expert], None if bias is None else bias[expert]).to(wide)
        gate, up = hidden.chunk(2, dim=-1) if gated else (hidden, None)
        bent = activate(gate, activation)
        inner = bent if up is None else bent * up
        back = torch.mm(above, down[expert]).to(wide)  # gradient of ``inner``, before the weight
        if needed[1]:
            of_weight.view(-1)[place] = (back * inner).sum(-1).to(weight.dtype)
        if needed[3]:
            of_down[expert] = torch.mm((above * scale).to(x.dtype).T, inner.to(x.dtype))
        if not (needed[0] or needed[2] or needed[4]):
            continue
        back = back * scale
        bend = slope(gate, activation)
        below = back * bend if up is None else torch.cat([back * up * bend, back * bent], dim=-1)
        if needed[4]:
            of_bias[expert] = below.sum(0).to(x.dtype)
        below = below.to(x.dtype)
        if needed[2]:
            of_gate_up[expert] = torch.mm(below.T, tokens)
        if needed[0]:
            total.index_add_(0, token, torch.mm(below, gate_up[expert]).to(wide))
    result[0] = total.to(x.dtype)
    return result


@grouped_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    bias: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    return _gradients(x, weight, gate_up, down, bias, needed)


def _gradients(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None, needed: list[bool]
) -> list[Tensor]:
    """Zeros like each wanted argument, and nothing like the others."""
    values = (x, weight, gate_up, down, bias)
    return [
        value.new_zeros(value.shape) if wanted and value is not None else x.new_empty(0)
        for value, wanted in zip(values, needed, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weight, gate_up, down, ctx.activation, bias = inputs
    ctx.save_for_backward(x, index, weight, gate_up, down, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, weight, gate_up, down, bias = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad, False)  # a call without a bias has one entry less
    needed = [wanted[0], wanted[2], wanted[3], wanted[4], wanted[6]]
    parts = grouped_ffn_backward(grad, x, index, weight, gate_up, down, ctx.activation, bias, needed)
    of_x, of_weight, of_gate_up, of_down, of_bias = (p if n else None for p, n in zip(parts, needed, strict=True))
    return of_x, None, of_weight, of_gate_up, of_down, None, of_bias


grouped_ffn.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.tokcompile.grouped_ffn)
def _(
    x: list[int], index: list[int], weight: list[int], gate_up: list[int], down: list[int], *_: object, **__: object
) -> int:
    """Products of all slots; empty ones count too, since no shape shows them."""
    slots, width = index[0] * index[1], x[1]
    return 2 * slots * width * (gate_up[1] + down[2])
