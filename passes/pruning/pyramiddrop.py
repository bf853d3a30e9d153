"""PyramidDrop: fewer visual tokens at each of a few depths, chosen by the last token of the prompt.

    before   merge -> layer 0 .. L-1 on S tokens
    after    merge -> layers -> query of the last prompt token and keys of the next layer -> keep -> layers -> ...

The score of a token is the attention that the next layer would give it from the last token of the prompt, averaged
over heads; its query and keys are computed ahead on all tokens. Kept tokens keep their positions.

Source: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
2025, arXiv 2410.17247.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, fx

from tokcompile.families.pruning.staged import Depth, StagedCut, StagedParams, StagedSelection, attention_to_tokens
from tokcompile.families.scores import Scores
from tokcompile.recipes import Budget
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context


@register
class PyramidDrop(StagedSelection):
    """Keep, at a few depths, the visual tokens that the last token of the prompt would look at next."""

    name = "pyramiddrop"
    last_tokens_choose = True

    class Params(StagedParams):
        keep: list[Budget] = Field(
            [Budget.of(0.5), Budget.of(0.25), Budget.of(0.125)],
            min_length=1,
            description="Visual tokens of each image that are left behind each cut: a ratio of all that the image had, "
            "in (0, 1], or a count.",
            json_schema_extra=about(source="half at each stage, as in the paper"),
        )
        at: list[Depth] = Field(
            [0.25, 0.5, 0.75],
            min_length=1,
            description="Where each cut is, ascending: how many layers read the tokens above it.",
            json_schema_extra=about(unit="fraction of the depth, or number of layers", source="8, 16, 24 of 32"),
        )

    def inputs(self, ctx: Context, cut: StagedCut) -> list[fx.Node]:
        return [attention_to_tokens(ctx, cut.below, cut.text, 1)]

    def score(
        self,
        stage: int,
        tokens: Tensor,
        segment: Tensor,
        budget: Tensor,
        carried: Mapping[str, Tensor],
        *inputs: Tensor,
    ) -> Scores:
        return Scores(inputs[0])
