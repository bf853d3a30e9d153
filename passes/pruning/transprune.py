"""TransPrune: keep the visual tokens that the middle layers change most, and that the question attends to.

    before   merge -> layer 0 .. L-1 on S tokens
    after    merge -> layers -> change of each token + attention of the question in the next layer -> keep -> ...

A module (attention, feed-forward) gives y for x, both without the residual. Its change of a token is ``|y| / |x|``,
weighted by the softmax of ``1 - |cos(x, y)|`` over the tokens of the image (``form: paper``), or of ``1 - cos(x, y)``
over the row (``form: code``). Changes of both modules are added up over layers, from ``first_layer`` on, also over the
cuts. The attention is that of the text behind the images, in the layer below the cut, on the tokens above it: mean over
heads and queries. Both are shares of the image's sum; ``alpha`` weighs the change, ``1 - alpha`` the attention. Kept
tokens keep their positions, where the released code counts them anew behind each cut.

Source: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from tokcompile.families.pruning.staged import Depth, StagedCut, StagedParams, StagedSelection, attention_to_tokens
from tokcompile.families.scores import Scores
from tokcompile.kernels.segments import segment_sum
from tokcompile.recipes import Budget
from tokcompile.regions.model import Layer
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context


@register
class TransPrune(StagedSelection):
    """Keep the visual tokens that layers change most and that the question looks at, in stages."""

    name = "transprune"
    last_tokens_choose = True

    class Params(StagedParams):
        keep: list[Budget] = Field(
            [Budget.of(0.875), Budget.of(0.625), Budget.of(0.125)],
            min_length=1,
            description="Visual tokens of each image that are left behind each cut: a ratio of all that the image had, "
            "in (0, 1], or a count.",
            json_schema_extra=about(source="every script of the paper's code"),
        )
        at: list[Depth] = Field(
            [0.21875, 0.28125, 0.375],
            min_length=1,
            description="Where each cut is, ascending: how many layers read the tokens above it.",
            json_schema_extra=about(unit="fraction of the depth, or number of layers", source="7, 9, 12 of 32"),
        )
        first_layer: float = Field(
            0.1875,
            ge=0,
            lt=1,
            description="First layer whose changes count.",
            json_schema_extra=about(unit="fraction of the depth", source="the seventh of 32"),
        )
        alpha: float = Field(
            0.5, ge=0, le=1, description="Weight of the change; the attention has the rest.", json_schema_extra=about()
        )
        form: Literal["paper", "code"] = Field("paper", description="Which of the two formulas of the change.")

    def inputs(self, ctx: Context, cut: StagedCut) -> list[fx.Node]:
        first = min(round(self.params.first_layer * len(cut.stack.layers)), cut.index - 1 if not cut.number else 10**6)
        pairs = [pair for layer in cut.layers if layer.index >= first for pair in self._modules(ctx, layer)]
        return [attention_to_tokens(ctx, cut.below, cut.text, cut.count), *(node for pair in pairs for node in pair)]

    def _modules(self, ctx: Context, layer: Layer) -> list[tuple[fx.Node, fx.Node]]:
        """What enters and what leaves the attention and the feed-forward part of a layer."""
        first, second = layer.attention, layer.feed_forward
        if first is None or second is None or first.query_source is None or first.output_proj is None:
            raise ctx.refuse(layer.output, f"layer {layer.index} has no attention and feed-forward part in sequence")
        return [(first.query_source, first.output_proj), (second.input, second.output)]

    def score(
        self,
        stage: int,
        tokens: Tensor,
        segment: Tensor,
        budget: Tensor,
        carried: Mapping[str, Tensor],
        *inputs: Tensor,
    ) -> Scores:
        attention, *values = inputs
        inside = segment >= 0
        change = carried["change"] if stage else torch.zeros_like(attention)
        for x, y in zip(values[::2], values[1::2], strict=True):
            x, y = (v.reshape(*segment.shape, -1).to(torch.float32) for v in (x, y))
            long, short = (torch.linalg.vector_norm(v, dim=-1).clamp(min=1e-8) for v in (y, x))
            cosine = (x * y).sum(-1) / (long * short)
            if self.params.form == "paper":
                weight = torch.where(inside, torch.exp(1 - cosine.abs()), 0.0)
                weight = weight / segment_sum(weight, segment).clamp(min=1e-8)
            else:
                weight = torch.softmax(1 - cosine, dim=1)
            change = change + weight * long / short
        share, attended = (
            torch.where(inside, v, 0.0) / (segment_sum(torch.where(inside, v, 0.0), segment) + 1e-8)
            for v in (change, attention)
        )
        alpha = self.params.alpha
        return Scores(alpha * share + (1 - alpha) * attended, carried={"change": change})
