"""Block-sparse attention of diffusion transformers, put right by what pooled blocks say about the rest.

    before   softmax(q.k) over all tokens of the picture, and of the text where both are one sequence
    after    pooled queries and keys of blocks -> P, the attention among blocks (a pooled key counts as many times as it
             has tokens, a text key once) -> critical blocks: the most of P -> R * attention over these and the text
             + (the rest of P) * pooled values

Attention over a part of the keys gives that part all the mass. R is the mass that pooling finds for it, and the pooled
values stand in for the others. A pair of blocks whose pooled product is smaller than what pooling may have lost is not
trusted: it gives nothing, and its mass stays with the exact part.

Source: Rectified SpaAttn (Isolated-Pooling Attention Reallocation, Gain-Aware Pooling Rectification), arXiv 2511.19835.
Means over the tokens that are there, true sizes of blocks, and blocks in the order of the sequence instead of along a
curve through the picture are this project's.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.families.sparse_attention.blocks.attend import BlockForm
from tokcompile.families.sparse_attention.blocks.diffusion import DiffusionBlocks, DiffusionParams
from tokcompile.families.sparse_attention.blocks.lists import (
    BlockLists,
    blank,
    block_means,
    block_sizes,
    in_blocks,
    visible_of,
)
from tokcompile.kernels.precision import matmul
from tokcompile.registry import about, register


@register
class RectifiedSpa(DiffusionBlocks):
    """Attend to the blocks that matter, scale by their mass, and let pooled values stand in for the others."""

    name = "rectified_spa"
    rectifies = True

    class Params(DiffusionParams):
        keep: float = Field(
            0.2,
            gt=0,
            le=1,
            description="Fewest blocks that a block of queries attends to, rounded down; at least one.",
            json_schema_extra=about(unit="share of the blocks", source="0.2 HunyuanVideo, 0.25 Wan 2.1, 0.1 Flux"),
        )
        share: float = Field(
            0.3,
            ge=0,
            le=1,
            description="More blocks are kept as long as those before them hold at most this share of the attention.",
            json_schema_extra=about(unit="share of the attention", source="0.3 in the paper"),
        )
        neighbours: int = Field(
            1,
            ge=0,
            description="Blocks next to a block of queries, on both sides, that are always kept.",
            json_schema_extra=about(unit="blocks", source="this project; the paper takes neighbours in the picture"),
        )
        rectify: bool = Field(True, description="False: plain attention over the same blocks (a control).")

    def density(self) -> float:
        return float(self.params.keep)

    def lists(self, query: Tensor, key: Tensor, value: Tensor, form: BlockForm, *more: Tensor) -> BlockLists:
        size, group = form.block, query.shape[1] // key.shape[1]
        means = [block_means(t, size, form.visible) for t in (query, key, value)]
        queries, keys, values = (m if i == 0 else m.repeat_interleave(group, 1) for i, m in enumerate(means))
        count = block_sizes(key.shape[2], size, form.visible, key.device)
        mass = self._mass(queries, keys, count, form, group)  # [B, H, n, n], without the text
        keep = self._critical(mass)
        if not self.params.rectify:
            return BlockLists(keep)
        spread = [_spread(t, m, size, form.visible) for t, m in zip((query, key), means, strict=False)]
        gain = matmul(queries, keys.mT).abs()
        lost = matmul(spread[0], keys.mT).abs() + matmul(queries, spread[1].repeat_interleave(group, 1).mT).abs()
        rest = torch.where(keep | (gain <= lost), 0.0, mass)
        return BlockLists(keep, 1 - rest.sum(-1), matmul(rest, values))

    def _mass(self, queries: Tensor, keys: Tensor, count: Tensor, form: BlockForm, group: int) -> Tensor:
        """Attention ``[B, H, n, n]`` among blocks; with that of the text, which is left out, a row has the sum 1."""
        count = count[:, None, None, :]
        logits = _capped(matmul(queries, keys.mT) * form.scale, form.softcap)
        logits = torch.where(count > 0, logits + count.clamp(min=1).to(logits.dtype).log(), -math.inf)
        if form.text is not None:
            words = blank(form.text.key, form.text.visible).repeat_interleave(group, 1)
            others = _capped(matmul(queries, words.mT) * form.scale, form.softcap)
            if form.text.visible is not None:
                others = others.masked_fill(~form.text.visible[:, None, None, :], -math.inf)
            return torch.cat([logits, others], 3).softmax(-1).nan_to_num(0.0)[..., : logits.shape[3]]
        return logits.softmax(-1).nan_to_num(0.0)

    def _critical(self, mass: Tensor) -> Tensor:
        """bool [B, H, n, n]: the most of each row, and the blocks around its own."""
        p, blocks = self.params, mass.shape[3]
        ordered, order = torch.sort(mass, dim=-1, descending=True, stable=True)
        least = (blocks * round(p.keep * (1 << 20))) >> 20
        count = (torch.cumsum(ordered, -1) <= p.share).sum(-1, keepdim=True) + 1
        place = torch.arange(blocks, device=mass.device)
        taken = (place < count) | (place < least)
        keep = torch.zeros_like(taken).scatter(-1, order, taken)
        near: Tensor = (place[:, None] - place).abs() <= p.neighbours
        return keep | near


def _capped(logits: Tensor, softcap: float) -> Tensor:
    capped: Tensor = softcap * torch.tanh(logits / softcap) if softcap else logits
    return capped


def _spread(x: Tensor, means: Tensor, size: int, visible: Tensor | None) -> Tensor:
    """How far the tokens of each block are from their mean, by number of the width: ``[B, H, n, D]``."""
    away = (in_blocks(blank(x, None), size) - means.unsqueeze(3)).abs()
    there = in_blocks(visible_of(x.shape[2], visible, x.device), size, 1)
    away = torch.where(there[:, None, :, :, None], away, 0.0)
    mean: Tensor = away.sum(3) / there.sum(-1).clamp(min=1)[:, None, :, None]
    return mean
