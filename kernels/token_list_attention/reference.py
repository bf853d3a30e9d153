"""Attention over listed keys: the definition, in plain torch; also what runs on the host.

Every list of keys serves the H / M query heads that belong to it. The listed rows of keys and values are gathered,
``B * M * C`` rows each, and attended to exactly. Work and memory follow the lists, not the length of the cache.

Sources: the selected-token attention of FASA (arXiv 2602.03152) and TokenSelect (arXiv 2411.02886).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import attend, attend_backward, softmax_scale, take_rows, wide


def token_list_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys in its list.

    Args:
        query: float [B, H, Q, D].
        key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv]. Query head h reads head ``h // (H / Hkv)``.
        index: int32 or int64 [B, M, C]: the keys of list m, in any order, -1 where there is none. M is a multiple of
            Hkv and divides H: one list for each key head, or for each query head. A key that is listed twice counts
            twice.
        count: int32 or int64 [B, M]: only the first ``count`` entries of a list are read. None: all C.
        scale: of the dot products; None: 1 / sqrt(D).
        causal: query i sees keys up to position L - Q + i only.
        softcap: c > 0: dot products become c * tanh(product / c), as in Gemma 2.

    Returns:
        output [B, H, Q, Dv] in the type of query, and log-sum-exp fp32 [B, H, Q] (fp64 for fp64). A query without a
        key gives 0 and -inf.
    """
    state = _gathered(query, key, value, index, count, causal)
    output, lse = attend(*state[:3], softmax_scale(scale, query.shape[3]), softcap, state[3])
    return output.view(*query.shape[:3], -1).to(query.dtype), lse.view(query.shape[:3])


def backward_reference(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float | None,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives for query, key and value."""
    queries, keys, values, hidden = _gathered(query, key, value, index, count, causal)
    rows, numbers = queries.shape[:3], queries.dtype
    grads = attend_backward(
        grad_output.to(numbers).reshape(*rows, -1),
        grad_lse.to(numbers).reshape(rows),
        queries,
        keys,
        values,
        output.to(numbers).reshape(*rows, -1),
        lse.reshape(rows),
        softmax_scale(scale, query.shape[3]),
        softcap,
        hidden,
    )
    batch, head, row = _places(key, index, keys.shape[2])
    result = [grads[0].reshape(query.shape).to(query.dtype)]
    for grad, source in zip(grads[1:], (key, value), strict=True):
        total = torch.zeros(source.shape, dtype=numbers, device=source.device)
        result.append(total.index_put_((batch, head, row), grad, accumulate=True).to(source.dtype))
    return result[0], result[1], result[2]


def _places(key: Tensor, index: Tensor, listed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batch, head and row of the keys in the first ``listed`` slots; row 0 for an empty slot."""
    batch, lists = index.shape[:2]
    row = index[:, :, :listed].clamp(min=0).to(torch.int64)
    number = torch.arange(batch, device=index.device)[:, None, None].expand(row.shape)
    head = (torch.arange(lists, device=index.device) // max(1, lists // key.shape[1]))[:, None].expand(row.shape)
    return number, head, row


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, count: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries [B, M, R, D] with R = H / M * Q, keys and values [B, M, C, .], hidden bool [B, M, R or 1, C] or None."""
    batch, heads, queries, width = query.shape
    lists = index.shape[1]
    slot = torch.arange(index.shape[2], device=index.device)
    empty = index < 0
    if count is not None:
        longest = int(count.max()) if count.numel() else 0
        index, slot, empty = index[:, :, :longest], slot[:longest], empty[:, :, :longest]
        empty = empty | (slot >= count.unsqueeze(-1))
    places = _places(key, index, index.shape[2])
    numbers = wide(query.dtype)
    grouped = query.reshape(batch, lists, -1, width).to(numbers)
    keys, values = take_rows(key, *places).to(numbers), take_rows(value, *places).to(numbers)
    hidden = None
    if bool(empty.any()):
        values = values.masked_fill_(empty.unsqueeze(-1), 0)  # 0 * NaN would be NaN
        hidden = empty.unsqueeze(2)
    if causal:
        last = torch.arange(queries, device=index.device) + (key.shape[2] - queries)
        later = index.unsqueeze(2) > last.repeat(heads // lists).unsqueeze(-1)
        hidden = later if hidden is None else hidden | later
    return grouped, keys, values, hidden
