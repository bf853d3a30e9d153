"""How ``tokcompile::token_votes`` lowers to ONNX: MatMul, Softmax and ReduceSum. All rows are voted on."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import votes


def decompose(
    query: Tensor,
    key: Tensor,
    candidate: Tensor,
    skip: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """``token_votes`` in operations that ONNX has; arguments as in ``reference.token_votes_reference``."""
    return torch.where(skip.unsqueeze(1), 0.0, votes(query, key, candidate, scale, softcap))


DECOMPOSITIONS = {"token_votes": decompose}
