"""Rows of a table for the ids of a call: the definition, in plain torch.

    unique, place = unique_ids(ids)                                  once for all tables
    rows, index   = fetch_rows(table, remap, unique, place, ids)     once for each table
    rows[index_i] is table[remap[ids_i]]

Sizes follow the number of ids alone, so that nothing in a graph depends on how many of them differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedding_gate.reference import rows as rows_of


def unique_ids_reference(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids that differ, and where each id is among them.

    Args:
        ids: int64 [...], N in all; negative: there is none.

    Returns:
        int64 [N]: every id once, ascending, then -1; int64 [N]: ``unique[place_i]`` is the i-th id, -1 where there is
        none.
    """
    flat = ids.reshape(-1)
    inside = flat >= 0
    found, inverse = torch.unique(flat[inside], return_inverse=True)
    unique, place = torch.full_like(flat, -1), torch.full_like(flat, -1)
    unique[: len(found)] = found
    place[inside] = inverse
    return unique, place


def fetch_rows_reference(table: Tensor, remap: Tensor, unique: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of some ids, each once.

    Args:
        table: [R, f]. remap: int [V]: id -> row, -1: none.
        unique, place: int64 [N], see :func:`unique_ids_reference`.

    Returns:
        [N, f]: rows of the ids that have one, then zeros; int64 [N]: which of these belongs to the i-th id, -1: none.
    """
    wanted, index = wanted_rows(table, remap, unique, place)
    result = table.new_zeros(len(unique), table.shape[1])
    torch.index_select(table, 0, wanted, out=result[: len(wanted)])
    return result, index


def wanted_rows(table: Tensor, remap: Tensor, unique: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the table that are needed, int64 [U]; and which of these belongs to the i-th id, int64 [N], -1: none."""
    found = rows_of(unique, table.shape[0], remap)
    has = found >= 0
    number = torch.where(has, has.cumsum(0) - 1, -1)
    return found[has], torch.where(place >= 0, number[place.clamp(min=0)], -1)
