"""The votes of attention heads for the keys of a cache: the definition, in plain torch.

    vote_j = sum over the heads h of softmax_j(scale * q_h . k_j) over the candidates j

A vote by probability keeps a head with large products from deciding alone. Source: the soft vote of TokenSelect
(arXiv 2411.02886).
"""

from __future__ import annotations

import torch
from torch import Tensor


def votes(query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float) -> Tensor:
    """Votes of all rows; traceable. Arguments as of :func:`token_votes_reference`.

    Returns:
        fp32 [B, T], 0 where no candidate is. A row without one has nothing to vote on: zeros.
    """
    groups = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    product = torch.matmul(groups, key.transpose(-1, -2)).float() * scale
    if softcap:
        product = torch.tanh(product / softcap) * softcap
    product = torch.where(candidate[:, None, None], product, -torch.inf)
    return torch.softmax(product, -1).nan_to_num(0.0).sum((1, 2))


def token_votes_reference(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    skip: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Votes of the rows that are not skipped; keys of the others are not read.

    Args:
        query: float [B, H, 1, D].
        key: [B, Hkv, T, D]. Query head h reads head ``h // (H / Hkv)``.
        candidate: bool [B or 1, T]: the keys that can be voted for.
        skip: bool [B]: rows without a vote.
        scale: of the dot products.
        softcap: c > 0: dot products become c * tanh(product / c), as in Gemma 2.

    Returns:
        fp32 [B, T], see :func:`votes`; zeros in skipped rows.
    """
    rows = torch.nonzero(~skip).squeeze(1)
    if len(rows) == len(skip):
        return votes(query, key, candidate, scale, softcap)
    result = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for row in rows.tolist():  # a copy of the keys of several rows would cost as much as the votes
        seen = candidate if candidate.shape[0] == 1 else candidate[row : row + 1]
        result[row : row + 1] = votes(query[row : row + 1], key[row : row + 1], seen, scale, softcap)
    return result
