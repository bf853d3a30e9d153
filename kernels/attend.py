"""What the attention kernels share on the host: gathering rows, attention over gathered keys and its derivative.

Numbers are accumulated in fp32 (fp64 for fp64 inputs), whatever the type of the inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNEL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

#: Widest head that the Triton kernels hold in one tile.
MAX_HEAD_DIM = 256


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken."""
    return torch.promote_types(dtype, torch.float32)


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or 1 / sqrt(head_dim)."""
    return 1 / math.sqrt(head_dim) if scale is None else scale


def differ(left: Any, right: Any) -> bool:
    """Whether two sizes are numbers and differ; symbolic sizes get the benefit of the doubt and no guard."""
    return isinstance(left, int) and isinstance(right, int) and left != right


def shape_of(name: str, value: Tensor, dims: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless ``value`` has as many dimensions as ``dims`` has letters, and one of the types."""
    if value.ndim != len(dims.split()) or value.dtype not in dtypes:
        types = " or ".join(str(t).removeprefix("torch.") for t in dtypes)
        raise ValueError(
            f"{name} must be {types} [{', '.join(dims.split())}], "
            f"found {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        )


def check_heads(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Raise ValueError unless query [B, H, Q, D], key [B, Hkv, L, D] and value [B, Hkv, L, Dv] fit together."""
    shape_of("query", query, "B H Q D", FLOATS)
    for name, other in (("key", key), ("value", value)):
        if other is None:
            continue
        shape_of(name, other, "B Hkv L D", FLOATS)
        if other.dtype != query.dtype:
            raise ValueError(f"query and {name} must have one type, found {query.dtype} and {other.dtype}")
        if other.device != query.device:
            raise ValueError(f"query and {name} must be on one device, found {query.device} and {other.device}")
        if differ(other.shape[0], query.shape[0]):
            raise ValueError(f"query has {query.shape[0]} rows of the batch, {name} has {other.shape[0]}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads: the number does not divide")
    if differ(query.shape[3], key.shape[3]):
        raise ValueError(f"query has heads of width {query.shape[3]}, key of width {key.shape[3]}")
    if value is not None and (differ(value.shape[1], kv_heads) or differ(value.shape[2], key.shape[2])):
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must have the same heads and length")


def check_numbers(scale: float | None, softcap: float) -> None:
    """Raise ValueError unless the scale is finite and the soft cap is at least 0 (0: none)."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, found {scale}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be 0 (none) or a positive number, found {softcap}")


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless -1 <= index < size. Only on the host: a device would have to be waited for."""
    if isinstance(index, FakeTensor) or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(i) for i in index.aminmax())
    if low < -1 or high >= size:
        raise ValueError(f"{name} must lie in [-1, {size}) (-1: none), found {low if low < -1 else high}")


def kernel_limits(query: Tensor, value: Tensor) -> tuple[bool, str]:
    """Whether the attention kernels take this type and these head widths, and why not."""
    if query.dtype not in KERNEL_FLOATS:
        return False, f"the Triton kernel computes in fp32, fp16 and bf16, not in {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return False, f"heads of width {max(query.shape[-1], value.shape[-1])}; the Triton kernel holds {MAX_HEAD_DIM}"
    return True, ""


def take_rows(source: Tensor, batch: Tensor, head: Tensor, row: Tensor) -> Tensor:
    """``source[batch, head, row]`` of a [B, H, L, D] tensor, as copies of whole rows where its memory allows.

    Indexing with three tensors is 5 to 9 times slower on the host than one ``index_select`` over rows of D numbers.

    Args:
        source: [B, H, L, D], any strides.
        batch, head, row: int64, broadcast together to [...].

    Returns:
        [..., D]
    """
    width = source.shape[3]
    if source.numel() == 0 or source.stride(3) != 1 or any(s % width for s in source.stride()[:3]):
        source = source.contiguous()
    if source.numel() == 0:
        return source[batch, head, row]
    steps = [stride // width for stride in source.stride()[:3]]
    total = 1 + sum((size - 1) * step for size, step in zip(source.shape[:3], steps, strict=True))
    rows = source.as_strided((total, width), (width, 1), source.storage_offset())
    place = batch * steps[0] + head * steps[1] + row * steps[2]
    return rows.index_select(0, place.flatten()).view(*place.shape, width)


def logits(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """Scaled and capped products [..., M, N] of query [..., M, D] and key [..., N, D]; both in :func:`wide` type."""
    score = torch.matmul(query * scale, key.transpose(-1, -2))
    return score.div_(softcap).tanh_().mul_(softcap) if softcap else score


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys that are not hidden; rows without a key give 0 and a log-sum-exp of -inf.

    Args:
        query: [..., M, D]. key: [..., N, D]. value: [..., N, Dv]. All in :func:`wide` type.
        hidden: bool, broadcast to [..., M, N]; or None.

    Returns:
        output [..., M, Dv] and log-sum-exp [..., M].
    """
    if key.shape[-2] == 0:
        return query.new_zeros(*query.shape[:-1], value.shape[-1]), query.new_full(query.shape[:-1], -math.inf)
    score = logits(query, key, scale, softcap)
    if hidden is not None:
        score.masked_fill_(hidden, -math.inf)
    top = score.amax(dim=-1, keepdim=True)
    if hidden is not None:
        top.masked_fill_(top == -math.inf, 0)
    weight = score.sub_(top).exp_()
    total = weight.sum(dim=-1, keepdim=True)  # at least 1 where there is a key
    output = torch.matmul(weight, value).div_(total.clamp(min=1))
    return output, top.add_(total.log_()).squeeze(-1)


def attend_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of :func:`attend` for query, key and value; shapes as there."""
    score = logits(query, key, scale, softcap)
    weight = torch.exp(score - lse.masked_fill(lse == -math.inf, math.inf).unsqueeze(-1))
    if hidden is not None:
        weight.masked_fill_(hidden, 0)
    delta = (grad_output * output).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    delta = delta.masked_fill(lse == -math.inf, 0)
    grad_value = torch.matmul(weight.transpose(-1, -2), grad_output)
    grad_score = weight * (torch.matmul(grad_output, value.transpose(-1, -2)) - delta.unsqueeze(-1))
    if softcap:
        grad_score = grad_score * (1 - (score / softcap).square())
    grad_score = grad_score * scale
    return torch.matmul(grad_score, key), torch.matmul(grad_score.transpose(-1, -2), query), grad_value


def head_of(heads: int, kv_heads: int, device: torch.device) -> Tensor:
    """int64 [heads]: the key head that each head reads."""
    return torch.arange(heads, device=device) // (heads // kv_heads)


def attend_traceable(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`attend`, in differentiable operations that ONNX has and without a look at any value."""
    if isinstance(key.shape[-2], int) and key.shape[-2] == 0:
        return attend(query, key, value, scale, softcap, hidden)
    score = torch.matmul(query * scale, key.transpose(-1, -2))
    if softcap:
        score = torch.tanh(score / softcap) * softcap
    score = torch.where(hidden, -math.inf, score)
    top = score.amax(dim=-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    weight = torch.exp(score - top)
    total = weight.sum(dim=-1, keepdim=True)
    output = torch.matmul(weight, value) / total.clamp(min=1)
    return output, (top + torch.log(total)).squeeze(-1)


def register_derivative(operation: Any, backward: Any, extra: int) -> None:
    """The derivative of an attention operation by another operation, and the fake of that one.

    Args:
        operation: (query, key, value, ``extra`` tensors or None, numbers ...) -> output, log-sum-exp.
        backward: (gradients of both, query, key, value, output, log-sum-exp, the extra tensors, numbers ...)
            -> gradients of query, key and value.
    """
    rest = len(operation._opoverload._schema.arguments) - 3

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[3 + extra :]
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3 : 3 + extra])

    def derive(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.settings), *[None] * rest)

    def fake(
        grad_output: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    backward.register_fake(fake)
    operation.register_autograd(derive, setup_context=save)
