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
from tokcompile.families.pruning.visual import VisualParams, VisualSelection, visual_tokens
from tokcompile.families.scores import Scores
from tokcompile.kernels.greedy_select import op as _op  # noqa: F401  registers the operator
from tokcompile.plan.plan import LayerCut
from tokcompile.recipes import Budget
from tokcompile.regions.model import DecoderStack, MergePoint
from tokcompile.regions.places import stack_below
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
            description="Layer after which no visual token is left, for the text has read them by then: a fraction "
            "of the layers (0.875: after 28 of 32) or a layer number; null keeps them to the end.",
            json_schema_extra=about(unit="fraction of the depth, or layer number from 0", source="paper: 7/8"),
        )

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Scores:
        order = torch.ops.tokcompile.greedy_select(tokens, segment, budget, self.params.criterion)
        return Scores(-order.to(torch.float32))

    def late_layer(self, depth: int) -> int | None:
        """The layer behind which no visual token is left; None: they stay to the end."""
        at = self.params.drop_layer
        return int(at * depth) if isinstance(at, float) else at

    def cut_layers(self, depth: int) -> list[int]:
        layer = self.late_layer(depth)
        return [0] if layer is None or layer >= depth - 1 else [0, layer + 1]

    def cuts(self, ctx: Context, region: MergePoint, stack: DecoderStack | None) -> tuple[LayerCut, ...]:
        found = super().cuts(ctx, region, stack)
        layer = None if stack is None else self.late_layer(len(stack.layers))
        if stack is None or layer is None:
            return found
        depth = len(stack.layers)
        if layer >= depth - 1:
            if isinstance(self.params.drop_layer, int):
                raise ctx.refuse(
                    region.output,
                    f"drop_layer {layer}: the decoder has {depth} layers, so at most "
                    f"{depth - 2} leaves a layer after the drop; or give a fraction",
                )
            return found
        ctx.check(stack.layers[layer].output, suffix=1)  # both stages, or none
        visual, tokens = visual_tokens(region)
        return (*found, LayerCut(layer + 1, None if visual is None else tokens - visual))

    def apply(self, ctx: Context, region: MergePoint) -> dict[str, Any]:
        stack = stack_below(ctx.regions, region.output)
        layer = None if stack is None else self.late_layer(len(stack.layers))
        details = super().apply(ctx, region)
        if stack is None or layer is None:
            return details
        if layer >= len(stack.layers) - 1:
            return {**details, "late_layer": f"none: layer {layer} of {len(stack.layers)} has no layer after it"}
        return {**details, **drop_visual(ctx, region, stack, layer)}
