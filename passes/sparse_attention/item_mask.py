"""Items of several tokens whose order does not matter: the tokens of an item do not see one another.

    before   softmax(q.k) over all tokens up to one's own
    after    softmax(q.k) over all tokens in front of one's own item, and oneself

An item is a run of tokens with one number in an input of the model (-1: text, where each token is on its own). The
first part is attention over blocks in which a query stands right in front of its item; the token itself is one more
term of the softmax. This changes what the model computes: it is for models that were trained so. For the same result
in whatever order, the tokens of an item also need one position, which is the caller's part.

Source: the mask of SETRec, arXiv 2502.10833 (decoder-only form; the query tokens at the end are one more item).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tokcompile.capture.sizes import equal
from tokcompile.families.sparse_attention.blocks.arguments import argument
from tokcompile.families.sparse_attention.blocks.lists import blocks_of, filled, visible_of
from tokcompile.formulas.attention import AttentionForm, read_attention, with_sink
from tokcompile.formulas.mask import MaskForm, read_mask
from tokcompile.kernels.attend import wide
from tokcompile.kernels.block_list_attention import block_list_attention
from tokcompile.kernels.precision import as_autocast
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import Taken
from tokcompile.regions.model import AttentionRegion
from tokcompile.registry import PassParams, about, register
from tokcompile.rewrite.context import Context


@register
class ItemMask(Pass):
    """Hide the tokens of an item from one another."""

    name = "item_mask"
    regions = "attention"
    stage = "prefill"

    class Params(PassParams):
        segments: str = Field(
            description="The argument of the model that holds the number of each token's item, int [B, L]; -1: none."
        )
        block: int = Field(
            128,
            ge=1,
            description="Tokens of a block; a multiple of 16 for the Triton kernel.",
            json_schema_extra=about(unit="tokens"),
        )

    def plan(self, ctx: Context, region: AttentionRegion) -> Taken:
        self._checked(ctx, region)
        return Taken()

    def apply(self, ctx: Context, region: AttentionRegion) -> dict[str, Any]:
        form, mask = self._checked(ctx, region)
        named = {"visible": mask.keys, "sink": form.sink}
        names = [name for name, node in named.items() if node is not None]
        block = self.params.block

        def attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, *values: Tensor) -> Tensor:
            query, key, value = as_autocast(query, key, value)
            given = dict(zip(names, values, strict=True))
            return item_attention(
                query, key, value, segments, form.scale, form.softcap, block, given.get("visible"), given.get("sink")
            )

        segments = argument(ctx, region, self.params.segments, "segments")
        nodes = [node for node in named.values() if node is not None]
        form.replace(ctx, attention, form.query, form.key, form.value, segments, *nodes)
        return {"segments": self.params.segments}

    def _checked(self, ctx: Context, region: AttentionRegion) -> tuple[AttentionForm, MaskForm]:
        output = region.output
        if region.cross:
            raise ctx.refuse(output, "attention to another sequence, in which the items are not")
        form = read_attention(ctx, region)
        mask = read_mask(ctx, form)
        queries, keys = form.query.meta["val"].shape[2], form.key.meta["val"].shape[2]
        if not equal(queries, keys):
            raise ctx.refuse(output, "keys of a cache, of which the input of items does not tell the items")
        if not mask.causal or mask.rest is not None or mask.window is not None:
            raise ctx.refuse(output, "expected a mask that hides later tokens and padding, and nothing else")
        segments = argument(ctx, region, self.params.segments, "segments").meta["val"]
        if segments.dim() != 2 or segments.is_floating_point() or not equal(segments.shape[1], keys):
            raise ctx.refuse(output, f"expected a number for each of {keys} tokens, found {list(segments.shape)}")
        return form, mask


def item_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    scale: float,
    softcap: float = 0.0,
    block: int = 128,
    visible: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention ``[B, H, L, Dv]`` of each token to those in front of its item, and to itself.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv].
        segments: int [B or 1, L]. visible: bool [B or 1, L]: the keys that are there; None: all.
    """
    batch, heads, length, _ = query.shape
    kv_heads, device = key.shape[1], key.device
    there = visible_of(length, visible, device).expand(batch, length)
    place = torch.where(there, torch.arange(length, device=device), -1)
    front = (item_starts(segments) - 1).expand(batch, length)  # -1: nothing is in front
    # The kernel takes places of queries from the last keys: copies of the keys, in no list, carry them.
    places = torch.cat([place, front.new_full((batch, blocks_of(length, block) * block - length), -1), front], 1)
    keys, values = (torch.cat([filled(t, block), t], 2) for t in (key, value))
    number = torch.arange(blocks_of(length, block), device=device)
    index = number.expand(batch, kv_heads, number.shape[0], number.shape[0])
    count = (number + 1).expand(batch, kv_heads, number.shape[0])
    output, lse = block_list_attention(
        query, keys, values, index, count, places.unsqueeze(1), block, block, scale, True, 0, softcap
    )
    group = heads // kv_heads
    own, mine = (t.repeat_interleave(group, 1).to(wide(t.dtype)) for t in (key, value))
    itself = (query.to(own.dtype) * own).sum(-1) * scale
    if softcap:
        itself = softcap * torch.tanh(itself / softcap)
    share = torch.sigmoid(lse.to(itself.dtype) - itself).unsqueeze(-1)
    result = torch.where(share > 0, output.to(own.dtype) * share, 0.0) + mine * (1 - share)
    result = torch.where(there[:, None, :, None], result, 0.0)
    if sink is not None:
        result = with_sink(result, torch.logaddexp(lse.to(itself.dtype), itself), sink)
    return result.to(query.dtype)


def item_starts(segments: Tensor) -> Tensor:
    """int64 [B, L]: where the item of each token begins; a token without an item is its own."""
    first = torch.ones_like(segments[:, :1], dtype=torch.bool)
    begins = torch.cat([first, (segments[:, 1:] != segments[:, :-1]) | (segments[:, 1:] < 0)], 1)
    number = torch.arange(segments.shape[1], device=segments.device)
    return torch.cummax(torch.where(begins, number, 0), 1).values
