"""Which positions of a sequence hold image features, read off a merge point."""

from __future__ import annotations

import torch
from torch import fx

from tokcompile.capture.graph import ancestors
from tokcompile.regions.model import MergePoint
from tokcompile.rewrite.context import Context

aten = torch.ops.aten


def visual_mask(ctx: Context, region: MergePoint) -> fx.Node:
    """bool ``[B, S]``: the positions that a merge point fills with image features, except the last of a row.

    The last position is what the next token is read from, so it is never up for removal.
    """
    return ctx.emit_once(  # type: ignore[no-any-return]
        "visual mask",
        lambda m: m & (torch.arange(m.shape[1], device=m.device) < m.shape[1] - 1),
        feature_mask(ctx, region),
    )


def feature_mask(ctx: Context, region: MergePoint) -> fx.Node:
    """bool ``[B, S]``: the positions that a merge point fills with image features."""
    merged = region.output
    mask = region.mask
    if mask is None:
        mask = _span(ctx, region)
    rank = mask.meta["val"].dim()

    def visual(mask: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        mask = mask.to(torch.bool)
        if rank == 3:
            mask = mask.select(2, 0)
        return mask.expand(merged.shape[0], merged.shape[1])

    return ctx.emit_once("feature mask", visual, mask, merged)  # type: ignore[no-any-return]


def _span(ctx: Context, region: MergePoint) -> fx.Node:
    """The mask of a merge by concatenation: the span of the image features along the sequence."""
    merged, features = region.output, region.features
    if merged.target not in (aten.cat.default, aten.concat.default):
        raise ctx.refuse(merged, "the positions of the visual tokens cannot be read off this merge point")
    tensors = list(merged.args[0])  # type: ignore[arg-type]
    below = [i for i, t in enumerate(tensors) if t is features or features in ancestors([t])]
    if len(below) != 1:
        raise ctx.refuse(merged, "image features enter the concatenation in several places")
    which = below[0]

    def mask(merged: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        start = sum(p.shape[1] for p in parts[:which])
        position = torch.arange(merged.shape[1], device=merged.device)
        inside = (position >= start) & (position < start + parts[which].shape[1])
        return inside[None].expand(merged.shape[0], merged.shape[1])

    return ctx.emit_once("feature span", mask, merged, *tensors)  # type: ignore[no-any-return]
