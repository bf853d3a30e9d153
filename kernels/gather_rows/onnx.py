"""How the two operations lower to ONNX: to standard operations, before export."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import head_of


def decompose_gather(source: Tensor, index: Tensor) -> Tensor:
    """``gather_rows`` as one GatherND; see ``reference.gather_rows_reference``."""
    number = torch.arange(index.shape[0], device=index.device)[:, None, None].expand_as(index)
    head = head_of(index.shape[1], source.shape[1], index.device)[None, :, None].expand_as(index)
    rows = source[number, head, index.clamp(min=0).to(torch.int64)]
    return torch.where((index < 0).unsqueeze(-1), 0, rows).to(source.dtype)


def decompose_scatter(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """``scatter_rows`` as one ScatterElements, with one row more for the empty slots."""
    place = torch.where(index < 0, length, index).to(torch.int64).unsqueeze(-1).expand_as(rows)
    empty = rows.new_zeros(rows.shape[0], rows.shape[1], length + 1, rows.shape[3])
    return empty.scatter(2, place, rows)[:, :, :length]


DECOMPOSITIONS = {"gather_rows": decompose_gather, "scatter_rows": decompose_scatter}
