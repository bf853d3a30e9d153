"""Control of choices of blocks: as many blocks of a row, at random.

    before   softmax(q.k) over all L keys
    after    a hash of query block, key block, head and layer -> `keep` of the blocks that a row sees -> attention over
             these and what every choice of blocks attends to, exact

Source: a control of this project.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.families.sparse_attention.blocks.attend import BlockForm, seen_of
from tokcompile.families.sparse_attention.blocks.base import BlockParams, BlockSelection
from tokcompile.families.sparse_attention.blocks.lists import BlockLists, top_count
from tokcompile.registry import about, register


@register
class RandomBlocks(BlockSelection):
    """Attend to blocks of keys at random: what every choice of blocks has to beat."""

    name = "random_blocks"

    class Params(BlockParams):
        keep: float = Field(
            gt=0,
            le=1,
            description="Share of the blocks that a block of queries sees, rounded up.",
            json_schema_extra=about(unit="share of the blocks"),
        )
        seed: int = Field(0, ge=0, lt=2**31, description="Seed of the draw.")
        last: int = Field(
            0, ge=0, description="Last queries, which attend to everything.", json_schema_extra=about(unit="tokens")
        )

    def density(self) -> float:
        return float(self.params.keep)

    def last(self) -> int:
        return int(self.params.last)

    def lists(self, query: Tensor, key: Tensor, value: Tensor, form: BlockForm, *more: Tensor) -> BlockLists:
        seen = seen_of(query, form)
        count = seen.shape[2]
        head = torch.arange(query.shape[1], device=key.device)[:, None, None]
        row, column = (torch.arange(count, device=key.device).view(shape) for shape in ((-1, 1), (1, -1)))
        number = row * 2654435761 + column * 2246822519 + head * 3266489917
        number = number + (form.layer * 1000003 + self.params.seed * 668265263)
        for factor in (73244475, 668265263):  # integers only: the same blocks in every runtime
            number = ((number & 0xFFFFFFFF) ^ ((number & 0xFFFFFFFF) >> 16)) * factor
        drawn = ((number & 0xFFFFFFFF) >> 8).to(torch.float32)[None]  # [1, H, n, n]
        parts = round(self.params.keep * (1 << 20))
        wanted = (seen.sum(-1, keepdim=True) * parts + (1 << 20) - 1) >> 20
        return BlockLists(top_count(torch.where(seen, drawn, -1.0), wanted) & seen)
