"""Average neighbouring image patches inside a vision encoder: the control that keeps a little of every patch.

    before   [class | patches] -> layer 0 .. L-1
    after    [class | patches] -> layers -> means of consecutive patches -> layers on one token for each group -> ...

Consecutive patches (along the rows of the image) are averaged in the residual stream.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tokcompile.families.pruning.patches import PatchParams, PatchSelection
from tokcompile.families.scores import Scores
from tokcompile.registry import register
from tokcompile.rewrite.selection import pooled


@register
class PatchPool(PatchSelection):
    """Replace groups of neighbouring patches by their mean."""

    name = "patch_pool"
    changes_tokens = True

    class Params(PatchParams):
        restore: bool = Field(False, description="Give each patch the token it is in where tokens leave the layers.")

    def score(
        self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int, *inputs: Tensor
    ) -> Scores:
        means, middle, into = pooled(tokens, segment, budget)
        return Scores(middle, tokens=means, into=into)
