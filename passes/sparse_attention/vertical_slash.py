"""Blocks chosen by columns and diagonals of the scores: what the last queries look at, and how far back.

    before   softmax(q.k) over all L keys, later ones hidden
    after    attention of the last `window` queries -> its sum for each key (verticals) and for each distance (slashes)
             -> the fewest keys and distances that hold `share` of it, as numbers of blocks
             -> columns of blocks and diagonals of blocks, for each head -> attention over these, exact

Many heads look at a few keys from everywhere, or at fixed distances; both show in the last rows. What the last
queries do not look at, earlier ones may miss.

Source: the vertical-slash pattern of MInference, arXiv 2407.02490, for each head anew, with FlexPrefill's budget by
share, arXiv 2502.20766. A chosen range of distances is covered for every query of a block, which takes two diagonals.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.families.sparse_attention.blocks.attend import BlockForm
from tokcompile.families.sparse_attention.blocks.base import BlockParams, BlockSelection
from tokcompile.families.sparse_attention.blocks.lists import (
    BlockLists,
    blank,
    in_blocks,
    top_count,
    top_share,
    visible_of,
)
from tokcompile.kernels.precision import matmul
from tokcompile.registry import about, register
from tokcompile.rewrite.selection import keep_index


@register
class VerticalSlash(BlockSelection):
    """Attend to the columns and the diagonals of blocks that the last queries attend to, head by head."""

    name = "vertical_slash"
    direction = "causal"

    class Params(BlockParams):
        share: float = Field(
            0.95,
            gt=0,
            le=1,
            description="Share of the last queries' attention that the columns hold, and that the diagonals hold.",
            json_schema_extra=about(unit="share of the attention", source="0.95 or 0.9 in FlexPrefill"),
        )
        window: int = Field(
            64,
            ge=1,
            description="Last queries, whose attention chooses.",
            json_schema_extra=about(unit="tokens", source="64 in MInference, 128 in FlexPrefill"),
        )
        least: int = Field(
            1024,
            ge=0,
            description="Fewest keys in the chosen columns, and in the chosen diagonals.",
            json_schema_extra=about(unit="tokens", source="1,024 in FlexPrefill, for both together"),
        )
        last: int = Field(
            128,
            ge=0,
            description="Last queries, which attend to everything.",
            json_schema_extra=about(unit="tokens", source="this project"),
        )

    def last(self) -> int:
        return int(self.params.last)

    def lists(self, query: Tensor, key: Tensor, value: Tensor, form: BlockForm, *more: Tensor) -> BlockLists:
        p, size = self.params, form.block
        weights, distance = last_rows(query, key, p.window, form)
        verticals = weights.sum(2)  # [B, H, L]
        slashes = torch.zeros_like(verticals).scatter_add(
            2, distance.clamp(min=0).flatten(2).expand(*verticals.shape[:2], -1), weights.flatten(2)
        )
        columns, diagonals = (self._blocks(t, size) for t in (verticals, slashes))
        number = torch.arange(columns.shape[2], device=key.device)
        back = (number[:, None] - number).clamp(min=0)
        nearer = (back - 1).clamp(min=0)
        keep = columns.unsqueeze(2) | diagonals[:, :, back] | diagonals[:, :, nearer] & (back > 0)
        return BlockLists(keep)

    def _blocks(self, mass: Tensor, size: int) -> Tensor:
        """bool [B, H, n]: as many blocks as the fewest tokens that hold the share would fill, the heaviest first."""
        tokens = top_share(mass, self.params.share).sum(-1, keepdim=True)
        count = (tokens // size + 1).clamp(min=-(-self.params.least // size))
        return top_count(in_blocks(mass, size).sum(-1), count)


def last_rows(query: Tensor, key: Tensor, rows: int, form: BlockForm) -> tuple[Tensor, Tensor]:
    """Attention ``[B, H, rows, L]`` of the last visible queries; how far back each key is, int64 [B or 1, 1, rows, L].

    Rows of a sequence that has fewer tokens are zeros.
    """
    batch, heads, length, _ = query.shape
    visible = visible_of(length, form.visible, key.device)
    place = keep_index(visible, rows)  # [B or 1, rows], -1 in front
    index = place.clamp(min=0)[:, None, :, None].expand(batch, heads, rows, query.shape[3])
    last = blank(query.gather(2, index), None).unflatten(1, (key.shape[1], heads // key.shape[1]))
    logits = matmul(last, blank(key, form.visible).unsqueeze(2).mT).flatten(1, 2) * form.scale
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    distance = (place[:, :, None] - torch.arange(length, device=key.device))[:, None]
    seen = (distance >= 0) & visible[:, None, None, :]
    if form.window:
        seen = seen & (distance < form.window)
    seen = seen & (place >= 0)[:, None, :, None]
    return logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0), distance
