"""How ``tokcompile::token_list_attention`` lowers to ONNX: to standard operations, before export.

    program.run_decompositions({torch.ops.tokcompile.token_list_attention.default: decompose})

Keys and values of the lists become two GatherND, the rest is MatMul and Softmax over C columns. Results are computed in
fp32, as everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import attend_traceable, head_of, softmax_scale, wide


def decompose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``token_list_attention`` in operations that ONNX has; see ``reference.token_list_attention_reference``."""
    batch, heads, queries, width = query.shape
    lists, capacity = index.shape[1], index.shape[2]
    numbers = wide(query.dtype)
    index = index.to(torch.int64)
    empty = index < 0
    if count is not None:
        empty = torch.logical_or(empty, torch.arange(capacity, device=index.device) >= count.unsqueeze(-1))
    row = index.clamp(min=0)
    number = torch.arange(batch, device=index.device)[:, None, None].expand_as(row)
    head = head_of(lists, key.shape[1], index.device)[None, :, None].expand_as(row)
    keys, values = key[number, head, row].to(numbers), value[number, head, row].to(numbers)
    values = torch.where(empty.unsqueeze(-1), 0.0, values)
    hidden = empty.unsqueeze(2)
    if causal:
        last = torch.arange(queries, device=index.device) + (key.shape[2] - queries)
        hidden = torch.logical_or(hidden, index.unsqueeze(2) > last.repeat(heads // lists).unsqueeze(-1))
    grouped = query.reshape(batch, lists, heads // lists * queries, width).to(numbers)
    output, lse = attend_traceable(grouped, keys, values, softmax_scale(scale, width), softcap, hidden)
    return output.reshape(batch, heads, queries, value.shape[3]).to(query.dtype), lse.reshape(batch, heads, queries)


DECOMPOSITIONS = {"token_list_attention": decompose}
