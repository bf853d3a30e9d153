"""Keep visual tokens at even distances: a control that covers the whole picture.

    before   merge -> layers on S tokens
    after    merge -> every n-th token of each image -> layers on fewer tokens

Of the n tokens of an image, token i is kept where ``i * k // n`` steps up, so that exactly k are kept and the
distances between them differ by at most one. Nothing is computed from the tokens themselves.

Source: a common control; no paper of its own.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.authoring import Scores, VisualParams, VisualSelection, about, segment_positions, segment_sizes


class Uniform(VisualSelection):
    """Keep visual tokens at even distances along the sequence of each image."""

    name = "uniform"

    class Params(VisualParams):
        offset: int = Field(
            0, ge=0, description="Shift of the first kept token.", json_schema_extra=about(unit="tokens")
        )

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Scores:
        size = segment_sizes(segment).clamp(min=1)
        place = torch.remainder(segment_positions(segment) + self.params.offset, size)

        def steps(place: Tensor) -> Tensor:
            return torch.div(place * budget, size, rounding_mode="floor")

        return Scores((steps(place + 1) - steps(place)).to(torch.float32))
