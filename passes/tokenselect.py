"""TokenSelect: all heads of a layer vote for keys, and attend to those that get most of the votes.

    before   softmax(q_h.k) over all T keys, in each head h
    after    votes of a key: sum over the heads of softmax(q_h.k) -> the best keys -> softmax(q_h.k) over these, exact

A vote by probability keeps a head with large products from deciding alone. One list serves all heads of a layer.

Source: "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV
Cache Selection", arXiv 2411.02886. The paper votes with keys that are not rotated, to go beyond the trained length;
here keys are as the model caches them, so this does not extrapolate.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.registry import about, register
from tokcompile.sparse_decode import SparseDecode, SparseDecodeParams


@register
class TokenSelect(SparseDecode):
    """Attend to the keys that the heads of a layer vote for, in decode steps."""

    name = "tokenselect"
    written = (0, 1)

    class Params(SparseDecodeParams):
        votes: Literal["attention", "raw"] = Field(
            "attention", description="Probabilities of the attention itself, or of the bare products.",
            json_schema_extra=about(source="arXiv 2411.02886 votes with bare products"))

    def score(self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, layer: int,
              *more: Tensor) -> Tensor:
        groups = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        product = torch.matmul(groups, key.transpose(-1, -2)).float()
        if self.params.votes == "attention":
            product = product * scale
            if softcap:
                product = torch.tanh(product / softcap) * softcap
        product = torch.where(candidate[:, None, None], product, -torch.inf)
        # a row without a candidate has nothing to vote on
        return torch.softmax(product, -1).nan_to_num(0.0).sum((1, 2)).unsqueeze(1)
