"""Drop image patches at random inside a vision encoder: the control of every method that chooses them.

before   [class | patches] -> layer 0 .. L-1
after    [class | patches] -> layers -> hash of (seed, stage, place) -> keep -> layers on fewer tokens -> ...
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tokcompile.families.pruning.patches import PatchParams, PatchSelection
from tokcompile.families.scores import Scores
from tokcompile.registry import register
from tokcompile.rewrite.selection import random_scores


@register
class PatchRandom(PatchSelection):
    """Keep a random choice of the patches."""

    name = "patch_random"

    class Params(PatchParams):
        seed: int = Field(0, ge=0, lt=2**31, description="Seed of the draw.")

    def score(
        self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int, *inputs: Tensor
    ) -> Scores:
        return Scores(random_scores(segment, self.params.seed * 1000 + stage))  # another draw at each stage
