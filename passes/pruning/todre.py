"""ToDRE: keep a diverse set of visual tokens, and drop the rest of them late in the decoder.

    before   merge -> layer 0 .. L-1 on S tokens
    after    merge -> greedy diverse choice -> layer 0 .. l on fewer tokens -> drop visual -> layer l+1 .. on text

Stage 1 chooses tokens one by one, each the least similar (cosine, in the embedding space of the language model) to
those chosen before: ``max_sum`` looks at the sum of similarities, ``k_center`` at the largest one. ``herding``, an
addition of this project, chooses instead so that the mean of the chosen stays near the mean of all: tokens that are
many keep their share, background among them. Stage 2 removes every visual token from the output of a late layer: by
then the text has read them (the paper finds 7/8 of the depth lossless, and less than 5 % of the attention on them). The
drop is static: it does not depend on the input.

Source: "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.families.pruning.drop import drop_visual
from tokcompile.families.pruning.visual import VisualParams, VisualSelection
from tokcompile.kernels.greedy_select import op as _op  # noqa: F401  registers the operator
from tokcompile.recipes import Budget
from tokcompile.regions.model import MergePoint
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context


@register
class ToDRE(VisualSelection):
    """Diverse visual tokens, then none in the last layers."""

    name = "todre"

    class Params(VisualParams):
        keep: Budget = Field(
            description="Visual tokens kept of each image: a ratio in (0, 1], or a count.",
            json_schema_extra=about(source="the paper uses 0.25 and 0.10"),
        )
        criterion: Literal["max_sum", "k_center", "herding"] = Field(
            "max_sum",
            description="Least sum of similarities to the chosen tokens, least largest one, or the "
            "mean nearest to the mean of all.",
            json_schema_extra=about(source="max_sum: version 2 of the paper; herding: not in the paper"),
        )
        drop_layer: Annotated[float, Field(ge=0, le=1)] | Annotated[int, Field(ge=0)] | None = Field(
            0.875,
            description="Layer after which no visual token is left; null keeps them to the end.",
            json_schema_extra=about(unit="fraction of the depth, or layer number from 0", source="paper: 7/8"),
        )

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
        order = torch.ops.tokcompile.greedy_select(tokens, segment, budget, self.params.criterion)
        return -order.to(torch.float32)

    def apply(self, ctx: Context, region: MergePoint) -> dict[str, Any]:
        merged = region.output
        stack, at = ctx.stack_below(merged), self.params.drop_layer
        layer = None
        if at is not None and stack is not None:
            layer = int(at * len(stack.layers)) if isinstance(at, float) else at
            if isinstance(at, int) and layer >= len(stack.layers) - 1:
                raise ctx.refuse(
                    merged,
                    f"drop_layer {layer}: the decoder has {len(stack.layers)} layers, so at most "
                    f"{len(stack.layers) - 2} leaves a layer after the drop; or give a fraction",
                )
            if layer < len(stack.layers) - 1:
                ctx.check(stack.layers[layer].output, suffix=1)  # both stages, or none
        details = super().apply(ctx, region)
        if stack is None or layer is None:
            return details
        if layer >= len(stack.layers) - 1:
            return {**details, "late_layer": f"none: layer {layer} of {len(stack.layers)} has no layer after it"}
        return {**details, **drop_visual(ctx, region, stack, layer)}
