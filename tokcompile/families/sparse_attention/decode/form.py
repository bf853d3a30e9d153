"""The form of an attention in a decode step."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.formulas.mask import read_mask
from tokcompile.regions.model import AttentionRegion
from tokcompile.rewrite.context import Context


def decode_form(ctx: Context, region: AttentionRegion) -> AttentionForm:
    """The formula of the self-attention of one new token over a cache.

    Raises:
        NarrowError: the region is something else.
    """
    output = region.output
    if not (isinstance(region.queries, int) and region.queries == 1):
        raise ctx.refuse(output, "the attention of several queries at a time; keys are chosen in decode steps only")
    if not region.cached or region.cross:
        raise ctx.refuse(output, "not the self-attention of a token over a cache of keys; cross-attention stays dense")
    form = read_attention(ctx, region)
    heads, kv_heads = form.heads
    if heads % kv_heads:
        raise ctx.refuse(output, f"{heads} query heads cannot share {kv_heads} key heads: the number does not divide")
    return form


def visible_keys(ctx: Context, form: AttentionForm) -> fx.Node | None:
    """bool [B or 1, T]: the keys that the query of a decode step sees; None: all.

    Raises:
        NarrowError: the mask adds numbers (ALiBi, relative positions), or differs between heads.
    """
    mask = read_mask(ctx, form)
    if mask.rest is not None:
        raise ctx.refuse(
            form.output,
            "the mask adds a bias to the scores (ALiBi, relative positions), or differs "
            "between heads; the attention over listed keys knows only visible and hidden",
        )
    window = mask.window
    if window is None:
        return mask.keys
    nodes = [form.key] if mask.keys is None else [form.key, mask.keys]

    def inside(key: Tensor, *keys: Tensor) -> Tensor:
        length = key.shape[2]
        seen = (torch.arange(length, device=key.device) >= length - window).unsqueeze(0)
        return seen & keys[0] if keys else seen

    return ctx.emit(inside, *nodes, before=ctx.after(*nodes))  # type: ignore[no-any-return]
