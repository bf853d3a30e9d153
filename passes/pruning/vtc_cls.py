"""VTC-CLS: keep the visual tokens that the class token of the vision encoder attends to.

    before   encoder -> projector -> merge -> layers on S tokens
    after    encoder -> [class row of the attention, summed over layers] -> keep -> merge -> layers on fewer tokens

The attention of the class token is averaged over heads and summed over the layers from ``first_layer`` of the depth up
to the layer that the features are taken from. Only that one row is computed, beside the fused attention. Needs an
encoder with a class token, and one feature for each patch (no pixel shuffle or tile layout in between).

Source: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from tokcompile.capture.graph import ancestors
from tokcompile.errors import NoMatchError
from tokcompile.families.pruning.visual import VisualParams, VisualSelection, check_rows
from tokcompile.families.scores import Scores
from tokcompile.formulas.attention_rows import class_row
from tokcompile.recipes import Budget
from tokcompile.regions.model import MergePoint, VisionEncoder
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.visual_mask import feature_mask


@register
class VtcCls(VisualSelection):
    """Keep the patches that the class token of the encoder looks at."""

    name = "vtc_cls"
    scores_features = True

    class Params(VisualParams):
        keep: Budget = Field(
            description="Visual tokens kept of each image: a ratio in (0, 1], or a count.",
            json_schema_extra=about(source="the paper uses 256, 128 and 64 of 576"),
        )
        first_layer: float = Field(
            0.6667,
            ge=0,
            lt=1,
            description="First encoder layer of the sum.",
            json_schema_extra=about(unit="fraction of the depth", source="the paper's code: layer 16 of 24"),
        )

    def score_features(self, ctx: Context, features: fx.Node) -> fx.Node:
        encoder = self._encoder(ctx, features)
        prefix = int(encoder.prefix)
        if prefix == 0:
            raise ctx.refuse(
                encoder.tokens,
                "the vision encoder has no class token to score patches with; "
                "use todre, or another selection without one",
            )
        check_rows(ctx, encoder, features)
        above = ancestors([features])
        layers = [layer for layer in encoder.layers if layer.output in above]
        first = min(len(layers) - 1, math.ceil(self.params.first_layer * len(layers) - 0.01))
        rows = [class_row(ctx, layer) for layer in layers[first:]]

        def total(*rows: Tensor) -> Tensor:
            return torch.stack([r[:, :, prefix:].mean(1) for r in rows]).sum(0).reshape(-1)

        return ctx.emit(total, *rows, before=ctx.after(features, *rows))  # type: ignore[no-any-return]

    def _encoder(self, ctx: Context, features: fx.Node) -> VisionEncoder:
        above = ancestors([features])
        found = [e for e in ctx.regions.of(VisionEncoder) if e.tokens in above]
        if len(found) != 1:
            raise ctx.refuse(features, f"{len(found)} vision encoders feed the image features; one is needed")
        return found[0]

    def apply(self, ctx: Context, region: MergePoint) -> dict[str, Any]:
        marked = ctx.captured.graph.find_nodes(op="call_function", target=torch.ops.tokcompile.visual_scores.default)
        if marked:
            rows = next(iter(marked))
        elif ctx.regions.of(VisionEncoder):
            rows = self.score_features(ctx, region.features)
        else:
            raise ctx.refuse(
                region.output,
                "the image encoder gave no scores: it was not captured, has no "
                "class token, or its features are not one for each patch",
            )
        mask = feature_mask(ctx, region)
        scores = ctx.emit(
            lambda m, s: torch.zeros(m.shape, dtype=s.dtype, device=s.device).masked_scatter(m, s),
            mask,
            rows,
            before=ctx.after(mask, rows),
        )
        return self.select(ctx, region, scores)

    def outside(
        self, features: Tensor, grid: Tensor | None, text: Tensor | None, scores: Tensor | None
    ) -> list[Tensor]:
        if scores is None:
            raise NoMatchError(
                "vtc_cls chooses by the attention of the class token, which is not in the features; give it as scores, "
                "or use todre"
            )
        return [scores]

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor, scores: Tensor) -> Scores:  # type: ignore[override]
        return Scores(scores)
