"""FastV: behind an early layer, keep the visual tokens that the end of the prompt attends to.

    before   merge -> layer 0 .. L-1 on S tokens
    after    merge -> layers 0 .. k-1 -> attention row of the last prompt token in layer k-1 -> keep -> layers k .. L-1

One row of the attention is computed beside it, and averaged over heads. Tokens are removed once, in the prefill: the
cache of the layers below holds those that are left. Kept tokens keep their positions.

Source: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764.
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
class FastV(StagedSelection):
    """Keep the visual tokens that the last token of the prompt looks at in an early layer."""

    name = "fastv"
    last_tokens_choose = True

    class Params(StagedParams):
        keep: list[Budget] = Field(
            [Budget.of(0.5)],
            min_length=1,
            description="Visual tokens of each image that are left: a ratio in (0, 1], or a count.",
            json_schema_extra=about(source="the paper uses 0.5, and 0.25"),
        )
        at: list[Depth] = Field(
            [2],
            min_length=1,
            description="Where the cut is: how many layers read all tokens.",
            json_schema_extra=about(unit="fraction of the depth, or number of layers", source="the paper's K = 2"),
        )

    def inputs(self, ctx: Context, cut: StagedCut) -> list[fx.Node]:
        return [attention_to_tokens(ctx, cut.above, cut.text, 1)]

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
