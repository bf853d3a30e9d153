"""Operations that are replaced before the exporter sees them, each for a measured reason.

``scaled_dot_product_attention``   a row of the mask without a key gives 0 as in torch; exported as it is, such a row is
                                   NaN or a mean, and padding tokens have such rows. The target "contrib" takes the
                                   fused operation of onnxruntime instead of plain ones.
``div(rounding_mode=)`` of integers  the exporter divides in fp32: wrong above 2 ** 24.
``masked_scatter``                 the exporter scatters element by element; here rows are gathered. It also works
                                   with no feature at all (a decode step).
``index_put`` with a bool mask     the same, as a merge of image features.
``scatter_reduce("mean")``         the exporter silently overwrites; sum and count are right.
``tokcompile::held``, ``visual_scores``  marks for the passes, which have done with them: what they mark stays.
``where``, ``masked_fill`` of bools  onnxruntime has Where for numbers only.
``_is_all_true``, ``_is_any_true``  what checks of a model ask, by their common names.
``sort(stable=)``                  ONNX breaks ties by the lower index already; the exporter has no stable form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tokcompile.capture import markers as _ops  # noqa: F401  registers the marker operators

aten = torch.ops.aten

#: (node, target) -> what to call instead with the arguments of the node, or None to leave it alone.
Repair = Callable[[fx.Node, str], Callable[..., Any] | None]

#: Operation that cannot be expressed -> what to do.
WAYS_OUT = {
    "multinomial": "sample outside the model: OnnxModel.generate does",
    "kthvalue": "use topk, or sort and select",
    "searchsorted": "compare with all boundaries and sum",
    "cummax": "use cumsum or a sort",
    "_cdist_forward": "write the distance with matmul",
    "cdist": "write the distance with matmul",
    "nonzero": "keep the shape and use a mask (torch.where)",
    "unique_consecutive": "compute it outside the model",
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` in plain operations; a query without a key gives 0."""
    width = query.shape[-1]
    factor = 1 / math.sqrt(width) if scale is None else scale
    key, value = _all_heads(query, key, value, enable_gqa)
    logits = torch.matmul(query * factor, key.transpose(-1, -2))
    mask = _causal(query, key) if is_causal else attn_mask
    if mask is None:
        return torch.matmul(torch.softmax(logits, -1), value)
    if mask.dtype != torch.bool:
        return torch.matmul(torch.softmax(logits + mask, -1), value)
    logits = torch.where(mask, logits, torch.finfo(logits.dtype).min)
    result = torch.matmul(torch.softmax(logits, -1), value)
    if is_causal:
        return result
    return torch.where(mask.any(-1, keepdim=True), result, 0.0)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same as ``com.microsoft::MultiHeadAttention``."""
    batch, heads, queries, width = query.shape
    key, value = _all_heads(query, key, value, enable_gqa)
    flat = [t.transpose(1, 2).reshape(batch, t.shape[2], heads * t.shape[3]) for t in (query, key, value)]
    mask = _causal(query, key) if is_causal else attn_mask
    bias = None
    if mask is not None:
        low = torch.finfo(query.dtype).min
        bias = torch.where(mask, 0.0, low).to(query.dtype) if mask.dtype == torch.bool else mask
        while bias.dim() < 4:
            bias = bias.unsqueeze(0)
    result = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (*flat, None, None, bias) if bias is not None else tuple(flat),
        {"num_heads": int(heads), "scale": float(1 / math.sqrt(width) if scale is None else scale)},
        dtype=query.dtype,
        shape=(batch, queries, heads * value.shape[3]),
        version=1,
    )
    result = result.reshape(batch, queries, heads, value.shape[3]).transpose(1, 2)
    if mask is None or is_causal or mask.dtype != torch.bool:
        return result
    return torch.where(mask.any(-1, keepdim=True), result, 0.0)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    rows = torch.arange(query.shape[-2], device=query.device)
    return torch.arange(key.shape[-2], device=query.device) <= rows.unsqueeze(-1)


def _all_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor]:
    if not enable_gqa or query.shape[1] == key.shape[1]:
        return key, value
    groups = query.shape[1] // key.shape[1]

    def repeat(t: Tensor) -> Tensor:
        batch, heads, length, width = t.shape
        return t.unsqueeze(2).expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)

    return repeat(key), repeat(value)


def _attention(node: fx.Node, target: str) -> Callable[..., Any] | None:
    fused = target == "contrib" and node.args[0].meta["val"].dim() == 4  # type: ignore[union-attr]
    return fused_attention if fused else attention


def _div(node: fx.Node, target: str) -> Callable[..., Any] | None:
    if node.meta["val"].dtype.is_floating_point:
        return None

    def divide(a: Any, b: Any, *, rounding_mode: str) -> Tensor:
        like = a if isinstance(a, Tensor) else b
        a, b = (t if isinstance(t, Tensor) else like.new_full((), t) for t in (a, b))
        quotient = aten.floor_divide.default(a, b)
        if rounding_mode == "floor":
            return quotient
        return quotient + torch.logical_and(quotient < 0, quotient * b != a).to(quotient.dtype)

    return divide


def _spread(base: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """Row i of ``rows [R, ...]`` to the i-th place where ``mask`` (leading dimensions of ``base``) is true."""
    place = torch.cumsum(mask.reshape(-1).to(torch.int64), 0) - 1
    rows = torch.cat([rows, rows.new_zeros([1, *rows.shape[1:]])])  # something to read where there is no row
    place = torch.minimum(place.clamp(min=0), torch.zeros_like(place) + (rows.shape[0] - 1))
    spread = rows.index_select(0, place).reshape(base.shape)
    while mask.dim() < base.dim():
        mask = mask.unsqueeze(-1)
    return torch.where(mask, spread, base)


def _masked_scatter(node: fx.Node, target: str) -> Callable[..., Any] | None:
    base, mask = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    whole = mask.dim() == base.dim() == 3 and (_one(mask.shape[2]) or _same_along_last(node.args[1]))  # type: ignore

    def scatter(base: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        if whole:
            mask = mask.select(2, 0).expand(base.shape[:2])
            return _spread(base, mask, source.reshape(-1, base.shape[2]))
        return _spread(base, mask.expand(base.shape), source.reshape(-1))

    return scatter


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _same_along_last(mask: fx.Node) -> bool:
    """Whether the mask was made by expanding ``[B, S, 1]``."""
    while mask.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default):
        mask = mask.args[0]  # type: ignore[assignment]
    source = mask.args[0] if mask.target in (aten.expand.default, aten.expand_as.default) else None
    if not isinstance(source, fx.Node):
        return False
    shape = source.meta["val"].shape
    return len(shape) == 3 and _one(shape[2])


def _index_put(node: fx.Node, target: str) -> Callable[..., Any] | None:
    indices: Any = node.args[1]
    accumulate = bool(node.args[3]) if len(node.args) > 3 else bool(node.kwargs.get("accumulate", False))
    if len(indices) != 1 or indices[0].meta["val"].dtype != torch.bool or accumulate:
        return None

    def put(base: Tensor, indices: list[Tensor], values: Tensor, *_: Any, **__: Any) -> Tensor:
        mask = indices[0]
        inner = base.shape[mask.dim() :]
        if values.dim() <= len(inner):  # one value for all places
            return torch.where(mask.reshape([*mask.shape, *[1] * len(inner)]), values, base)
        return _spread(base, mask, values)

    return put


def _scatter_reduce(node: fx.Node, target: str) -> Callable[..., Any] | None:
    if node.args[4] != "mean" or not node.meta["val"].dtype.is_floating_point:
        return None

    def mean(
        base: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
    ) -> Tensor:
        ones = torch.zeros_like(base).scatter_add(dim, index, torch.ones_like(source))
        total = torch.zeros_like(base).scatter_add(dim, index, source)
        if include_self:
            return (total + base) / (ones + 1)
        return torch.where(ones > 0, total / ones.clamp(min=1), base)

    return mean


def _sort(node: fx.Node, target: str) -> Callable[..., Any] | None:
    def sort(values: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        return aten.sort.default(values, dim, descending)

    return sort


def _choose(condition: Any, one: Any, other: Any) -> Tensor:
    """``where`` for truth values."""
    one, other = (t if isinstance(t, Tensor) else torch.full_like(condition, bool(t)) for t in (one, other))
    return torch.logical_or(torch.logical_and(condition, one), torch.logical_and(torch.logical_not(condition), other))


def _where(node: fx.Node, target: str) -> Callable[..., Any] | None:
    return _choose if node.meta["val"].dtype == torch.bool else None


def _masked_fill(node: fx.Node, target: str) -> Callable[..., Any] | None:
    if node.meta["val"].dtype != torch.bool:
        return None
    return lambda values, mask, fill: _choose(mask, fill, values)


def _marked(place: int) -> Repair:
    return lambda node, target: lambda *args: args[place]


REPAIRS: dict[Any, Repair] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten._is_all_true.default: lambda node, target: torch.all,
    aten._is_any_true.default: lambda node, target: torch.any,
    aten.div.Tensor_mode: _div,
    aten.div.Scalar_mode: _div,
    aten.masked_scatter.default: _masked_scatter,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.sort.stable: _sort,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    torch.ops.tokcompile.held.default: _marked(1),
    torch.ops.tokcompile.visual_scores.default: _marked(0),
}
