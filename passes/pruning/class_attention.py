"""Drop image patches that the class token attends to least, at a few depths of a vision encoder.

    before   [class | patches] -> layer 0 .. L-1
    after    [class | patches] -> layers -> score of the last layer -> keep -> layers on fewer tokens -> ...

The score of patch i is ``sum_h c[h, i] * r[h, i]``: the class token's attention in head h, weighted by the share that
head h has in the norm of the patch's own context. An encoder without a class token is scored by the attention that
each patch receives from all patches (mean over heads and queries). Kept ratios are fixed, so shapes stay static;
nothing is trained. Class and register tokens are always kept.

Source: score of "Adaptive Sparse ViT", IJCAI 2023, arXiv 2209.13802 (there with trained thresholds).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tokcompile.families.pruning.patches import PatchParams, PatchSelection
from tokcompile.families.scores import Scores
from tokcompile.formulas.attention_rows import attention_rows, rows_source
from tokcompile.regions.model import Layer
from tokcompile.registry import register
from tokcompile.rewrite.context import Context


@register
class ClassAttention(PatchSelection):
    """Keep the patches that the class token looks at."""

    name = "class_attention"

    class Params(PatchParams):
        pass

    def check_layer(self, ctx: Context, layer: Layer) -> None:
        rows_source(ctx, layer)
        assert layer.attention is not None
        context = layer.attention.output
        if context.meta["val"].dim() != 4:
            raise ctx.refuse(context, "attention with batch and heads flattened together cannot be scored")

    def inputs(self, ctx: Context, layer: Layer, prefix: int) -> list[fx.Node]:
        assert layer.attention is not None
        return [layer.attention.output, attention_rows(ctx, layer, 1 if prefix else None)]

    def score(
        self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int, *inputs: Tensor
    ) -> Scores:
        context, rows = inputs
        weights = rows.mean(2)[:, :, prefix:]  # [B, H, patches and what stands behind them]
        if prefix:
            norm = torch.linalg.vector_norm(context[:, :, prefix:].to(torch.float32), dim=-1)
            weights = weights * (norm / (norm.sum(1, keepdim=True) + 1e-8))
        scores = weights.sum(1)
        return Scores(torch.cat([scores.new_zeros(tokens.shape[0], prefix), scores], 1))
