"""How the operations lower to ONNX: the rows are gathered by id, each as often as its id comes. Nothing is awaited."""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedding_gate.reference import rows as rows_of


def unique_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids as they are."""
    flat = ids.reshape(-1)
    return flat, torch.where(flat >= 0, torch.arange(flat.shape[0], device=flat.device), -1)


def fetch_rows(table: Tensor, remap: Tensor, unique: Tensor, place: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A Gather."""
    found = rows_of(unique, table.shape[0], remap)
    return torch.nn.functional.embedding(found.clamp(min=0), table), torch.where(found >= 0, place, -1)


def await_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Nothing."""
    return index.clone()


DECOMPOSITIONS = {"unique_ids": unique_ids, "fetch_rows": fetch_rows, "await_rows": await_rows}
