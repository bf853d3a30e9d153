"""Merge image patches that are alike inside a vision encoder, at a few depths: nothing is lost, it is averaged.

    before   [class | patches] -> layer 0 .. L-1
    after    [class | patches] -> layers -> each even patch finds its likest odd one -> the likest pairs become their
             mean -> layers on fewer tokens -> ...

Likeness is the cosine of the keys of the last attention, averaged over heads. Patches with an even number may merge
into patches with an odd number, and several into one, so a stage keeps at least half. Later layers attend to a merged
patch as to any other: there is no bias by the number of patches in it, and a mean over the tokens that are left weighs
each token once. Kept ratios are fixed, so shapes stay static; nothing is trained.

Source: bipartite matching of "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461 (there with sizes).
"""

from __future__ import annotations

import torch
from pydantic import model_validator
from torch import Tensor, fx

from tokcompile.plan import Context
from tokcompile.pruning import PatchParams, PatchSelection
from tokcompile.regions.model import Layer
from tokcompile.registry import register
from tokcompile.selection import keep_mask, segment_positions


@register
class PatchMerge(PatchSelection):
    """Replace pairs of patches that are alike by their mean."""

    name = "patch_merge"

    class Params(PatchParams):
        @model_validator(mode="after")
        def _half(self) -> PatchMerge.Params:
            if any(not keep.is_count and 2 * keep.num < keep.den for keep in self.keep):
                raise ValueError("a stage of patch_merge keeps at least half (0.5): use more stages")
            return self

    def check_layer(self, ctx: Context, layer: Layer) -> None:
        if layer.attention is None:
            raise ctx.refuse(layer.output, f"layer {layer.index} has no attention whose keys tell what is alike")

    def inputs(self, ctx: Context, layer: Layer, prefix: int) -> list[fx.Node]:
        assert layer.attention is not None
        key = layer.attention.roles["key"]
        if key.meta["val"].dim() != 4:
            raise ctx.refuse(key, "attention with batch and heads flattened together gives no keys to compare")
        return [key]

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int,
              *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return merged(tokens, inputs[0].to(torch.float32).mean(1), segment, budget)


def merged(tokens: Tensor, like: Tensor, segment: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """``tokens [B, S, D]`` with what is to go averaged into what stays, and scores ``[B, S]``: larger is kept first.

    Args:
        tokens: ``[B, S, D]``. like: ``[B, S, E]``, compared by cosine. segment, budget: as in ``PatchSelection.score``.
    """
    like = like / (torch.linalg.vector_norm(like, dim=-1, keepdim=True) + 1e-8)
    odd = torch.remainder(segment_positions(segment), 2)
    gives, takes = torch.logical_and(segment >= 0, odd == 0), torch.logical_and(segment >= 0, odd == 1)
    cosine = torch.matmul(like, like.transpose(1, 2)).masked_fill(torch.logical_not(takes)[:, None], -2.0)
    best = cosine.amax(2)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    partner = torch.where(cosine == best[..., None], index, tokens.shape[1] - 1).amin(2)  # of equals, the first
    scores = torch.where(gives, -best, 2.0)
    goes = torch.logical_not(keep_mask(scores, segment, budget))
    goes = torch.logical_and(goes, gives)
    weight = goes.to(torch.float32)
    target = torch.where(goes, partner, index)
    total = tokens.to(torch.float32).scatter_add(
        1, target[..., None].expand_as(tokens), tokens.to(torch.float32) * weight[..., None])
    members = torch.ones_like(weight).scatter_add(1, target, weight)
    return torch.where((members > 1)[..., None], (total / members[..., None]).to(tokens.dtype), tokens), scores
