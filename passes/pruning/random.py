"""Keep visual tokens at random: the control that every other method has to beat.

    before   merge -> layers on S tokens
    after    merge -> hash of (seed, image, place) -> keep -> layers on fewer tokens

The draw is a hash of the place, not a random generator: the same in every runtime, at every step, in every batch.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tokcompile.families.pruning.visual import VisualParams, VisualSelection
from tokcompile.families.scores import Scores
from tokcompile.registry import register
from tokcompile.rewrite.selection import random_scores


@register
class Random(VisualSelection):
    """Keep a random choice of the tokens of each image."""

    name = "random"

    class Params(VisualParams):
        seed: int = Field(0, ge=0, lt=2**31, description="Seed of the draw.")

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Scores:
        return Scores(random_scores(segment, self.params.seed))
