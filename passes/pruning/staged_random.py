"""Drop visual tokens at random at a few depths of the decoder: the control of every method that chooses them there.

before   merge -> layer 0 .. L-1 on S tokens
after    merge -> layers -> hash of (seed, image, place) -> keep -> layers on fewer tokens -> ...

One draw orders the tokens of an image, and each stage keeps the best of those that are left. The draw is a hash of the
place, not a random generator: the same in every runtime, at every step, in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.families.pruning.staged import StagedParams, StagedSelection
from tokcompile.families.scores import Scores
from tokcompile.registry import register
from tokcompile.rewrite.selection import random_scores


@register
class StagedRandom(StagedSelection):
    """Keep a random choice of the tokens of each image, at a few depths."""

    name = "staged_random"

    class Params(StagedParams):
        seed: int = Field(0, ge=0, lt=2**31, description="Seed of the draw.")

    def score(
        self,
        stage: int,
        tokens: Tensor,
        segment: Tensor,
        budget: Tensor,
        carried: Mapping[str, Tensor],
        *inputs: Tensor,
    ) -> Scores:
        values = carried["draw"] if stage else random_scores(segment, self.params.seed)
        return Scores(torch.where(segment >= 0, values, 0.0), carried={"draw": values})
