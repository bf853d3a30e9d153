"""Controls of sparse decoding: keys at random, or the most recent ones, at the budget of the method that they check.

    random   the rest of the budget is drawn anew in each layer and step, by a hash of position, length, layer and seed
    window   the rest of the budget goes to the keys before the recent ones

Source: the window with sinks is StreamingLLM's mask, "Efficient Streaming Language Models with Attention Sinks",
arXiv 2309.17453, with positions as they are; random choice is the project's own control.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.families.scores import Scores
from tokcompile.families.sparse_attention.decode.base import SparseDecode, SparseDecodeParams
from tokcompile.registry import register


@register
class DecodeControl(SparseDecode):
    """Attend to sinks, recent keys and random or further recent ones: what every choice of keys has to beat."""

    name = "decode_control"
    written = (1, 0)
    reads_keys = False

    class Params(SparseDecodeParams):
        choose: Literal["random", "window"] = Field(description="How the rest of the budget is spent.")
        seed: int = Field(0, ge=0, description="Seed of the random choice.")

    def score(
        self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, layer: int, *more: Tensor
    ) -> Scores:
        length = key.shape[2]
        position = torch.arange(length, device=key.device)
        if self.params.choose == "window":
            return Scores(position.to(torch.float32)[None, None])
        number = position * 2654435761 + length * 2246822519 + (layer * 1000003 + self.params.seed * 3266489917)
        for factor in (73244475, 668265263):  # integers only: the same keys in every runtime
            number = ((number & 0xFFFFFFFF) ^ ((number & 0xFFFFFFFF) >> 16)) * factor
        return Scores(((number & 0xFFFFFFFF) >> 8).to(torch.float32)[None, None])
