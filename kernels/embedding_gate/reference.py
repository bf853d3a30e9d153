"""A gated product with rows of a table: the definition, in plain torch (STEM, arXiv 2601.10639).

    y_i = act(gate_i) * u_i        u_i = table[r_i]      if 0 <= r_i < R
                                         fallback_i      otherwise (0 without a fallback)
    r_i = remap[index_i] where a remap is given (-1 outside it), else index_i

With ``act(gate)`` the activated gate of a feed-forward layer and ``index`` the ids of its tokens, ``u`` stands for the
up projection that the table replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import activate


def rows(index: Tensor, count: int, remap: Tensor | None) -> Tensor:
    """int64 like ``index``: the row of the table, -1 where there is none."""
    if remap is not None:
        if remap.shape[0] == 0:
            return torch.full_like(index, -1)
        known = torch.logical_and(index >= 0, index < remap.shape[0])
        index = torch.where(known, remap[torch.where(known, index, 0)].to(torch.int64), -1)
    return torch.where(torch.logical_and(index >= 0, index < count), index, -1)


def embedding_gate_reference(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    """Activate the gate and multiply it by the row of each token.

    Args:
        gate: float [..., f], before the activation.
        table: float [R, f].
        index: int64 [...]: token ids (with a remap) or rows.
        activation: one of ``ACTIVATIONS``.
        remap: int32 or int64 [V], id -> row, -1: no row; or None.
        fallback: float [f] (one row for all) or [..., f] (a value for each token), for tokens without a row; or None.

    Returns:
        float [..., f], type of ``gate``.
    """
    place = rows(index, table.shape[0], remap)
    if fallback is None:
        fallback = torch.zeros_like(gate)
    found = torch.cat([table, table.new_zeros(1, table.shape[1])])[place].to(gate.dtype)  # -1 is the zero row
    value = torch.where((place >= 0).unsqueeze(-1), found, fallback.to(gate.dtype))
    return activate(gate, activation) * value
