"""Average pooling of visual tokens: the second control, which keeps a little of every token.

    before   merge -> layers on S tokens
    after    merge -> means of neighbouring tokens -> layers on one token for each group

Consecutive tokens of an image are averaged; the mean stands at the position of the middle token of its group.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tokcompile.families.pruning.visual import VisualParams, VisualSelection
from tokcompile.families.scores import Scores
from tokcompile.recipes import Budget
from tokcompile.registry import register
from tokcompile.rewrite.selection import pooled


@register
class Pool(VisualSelection):
    """Replace groups of neighbouring visual tokens by their mean."""

    name = "pool"

    class Params(VisualParams):
        keep: Budget = Field(description="Groups of each image: a ratio of its tokens in (0, 1], or a count.")

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Scores:
        means, middle, _ = pooled(tokens, segment, budget)
        return Scores(middle, tokens=means)
