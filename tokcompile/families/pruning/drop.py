"""Drop all visual tokens below a late layer."""

from __future__ import annotations

from typing import Any

import torch

from tokcompile.capture.sizes import hint
from tokcompile.regions.model import DecoderStack, MergePoint
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.visual_mask import visual_mask


def drop_visual(ctx: Context, merge: MergePoint, stack: DecoderStack, layer: int) -> dict[str, Any]:
    """Remove all visual tokens of ``merge`` from the output of ``stack.layers[layer]``."""
    node = stack.layers[layer].output
    ctx.check(node, suffix=1)
    mask = visual_mask(ctx, merge)
    size, ragged = ctx.host_size(mask, lambda visual: (~visual).sum(1), "text")
    at = ctx.after(node, mask)
    visual = ctx.surviving(mask, "decoder", True, at)  # empty slots go with the visual tokens
    keep = ctx.emit(torch.logical_not, visual, before=at)
    ctx.cut(node, keep, size, ragged=ragged, stack="decoder", layer=stack.layers[layer + 1], index=layer + 1, suffix=1)
    return {"late_layer": layer + 1, "tokens_late": hint(size)}
