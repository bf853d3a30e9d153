"""Blocks chosen by sums along antidiagonals: every query and key of a block has its say, at a small part of the cost.

    before   softmax(q.k) over all L keys, later ones hidden
    after    stride x stride tiles of the scores: the sum of one antidiagonal each -> softmax over the tiles of a row ->
             sums for blocks -> the fewest blocks that hold `share` of the row -> attention over these, exact

The antidiagonal of a tile is one product of vectors: queries of the tile in reversed order, keys in order, each laid
end to end. It meets every query, every key, and every vertical or slanted line of scores that crosses the tile.

Source: XAttention, "Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428, written from a description.
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
    top_share,
    visible_of,
)
from tokcompile.kernels.precision import matmul
from tokcompile.registry import about, register


@register
class Antidiagonal(BlockSelection):
    """Attend to the blocks of keys whose antidiagonal sums hold most of a row's attention."""

    name = "antidiagonal"
    per_pair = 1 / 16

    class Params(BlockParams):
        share: float = Field(
            0.9,
            gt=0,
            le=1,
            description="Share of the attention of a block of queries, by the sums, that the kept blocks hold.",
            json_schema_extra=about(unit="share of the attention", source="0.9 in the paper"),
        )
        stride: int = Field(
            16,
            ge=1,
            description="Side of a tile; divides the block.",
            json_schema_extra=about(unit="tokens", source="8 or 16 in the paper"),
        )
        last: int = Field(
            128,
            ge=0,
            description="Last queries, which attend to everything.",
            json_schema_extra=about(unit="tokens", source="this project"),
        )

        def model_post_init(self, context: object) -> None:
            if self.block % self.stride:
                raise ValueError(f"a block of {self.block} tokens is no multiple of a stride of {self.stride}")

    def last(self) -> int:
        return int(self.params.last)

    def lists(self, query: Tensor, key: Tensor, value: Tensor, form: BlockForm, *more: Tensor) -> BlockLists:
        return BlockLists(top_share(antidiagonal_sums(query, key, self.params.stride, form), self.params.share))


def antidiagonal_sums(query: Tensor, key: Tensor, stride: int, form: BlockForm) -> Tensor:
    """Attention of each block of queries to each block of keys, by antidiagonals: ``[B, H, n, n]``.

    Tokens that are not there count as zeros, tiles without a token as hidden. A tile of later keys is hidden.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    visible = visible_of(query.shape[2], form.visible, key.device)
    tiles = in_blocks(blank(query, form.visible), stride).flip(3).flatten(3)  # [B, H, t, stride * D]
    keys = in_blocks(blank(key, form.visible), stride).flatten(3)
    tiles = tiles.unflatten(1, (kv_heads, heads // kv_heads))
    logits = matmul(tiles, keys.unsqueeze(2).mT).flatten(1, 2) * (form.scale / stride)
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    number = torch.arange(logits.shape[2], device=key.device)
    there = in_blocks(visible, stride, 1).any(-1)  # [B or 1, t]
    seen = there[:, None, None, :]
    if form.causal:
        seen = seen & (number[:, None] >= number)
    if form.window:
        seen = seen & ((number + 1) * stride > number[:, None] * stride - form.window + 1)
    weight = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    weight = weight * there[:, None, :, None]
    size = form.block // stride
    sums: Tensor = in_blocks(in_blocks(weight, size, 2).sum(3), size, 3).sum(4)
    return sums
