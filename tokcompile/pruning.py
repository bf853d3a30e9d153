"""What passes that choose visual tokens have in common: budgets per image, the cut at the merge point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tokcompile.plan import Context, Pass
from tokcompile.recipes import Budget
from tokcompile.regions.model import Region
from tokcompile.selection import budgets, budgets_count, keep_mask, kept_rows, segments


class VisualSelection(Pass):
    """Keeps a budget of the tokens of each image where image features enter the language model.

    A method is a subclass with parameters (``keep`` among them) and :meth:`score`. Everything else is here: images
    are told apart, each keeps its own budget, rows of a batch keep different tokens, text is never touched.

        before   ids -> embedding -> merge(mask, features) -> layers
        after    ids -> embedding -> merge(mask, features) -> score -> keep -> narrow -> layers on fewer tokens
    """

    regions = "merge_point"

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Score visual tokens, in plain torch that can be traced.

        Args:
            tokens: ``[B, S, D]``, the merged embeddings.
            segment: int64 ``[B, S]``: number of the image in its row, -1 for text.
            budget: int64 ``[B, S]``: how many tokens that image keeps.

        Returns:
            ``[B, S]``, larger is kept first; or ``(new tokens, scores)`` for a method that changes tokens.
        """
        raise NotImplementedError

    def apply(self, ctx: Context, region: Region) -> dict[str, Any]:
        return self.select(ctx, region)

    def select(self, ctx: Context, region: Region, *inputs: fx.Node) -> dict[str, Any]:
        """Score (``inputs`` are handed to :meth:`score`), choose, and cut."""
        merged = region.roles["output"]
        ctx.check(merged, suffix=1)
        mask = ctx.visual_mask(region)
        keep: Budget = self.params.keep

        def choose(tokens: Tensor, mask: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            segment = segments(mask)
            budget = budgets_count(segment, keep.num) if keep.is_count else budgets(segment, keep.num, keep.den)
            result = self.score(tokens, segment, budget, *inputs)
            tokens, scores = result if isinstance(result, tuple) else (tokens, result)
            return tokens, keep_mask(scores, segment, budget)

        def rows(mask: Tensor) -> Tensor:
            return kept_rows(mask, count=keep.num) if keep.is_count else kept_rows(mask, keep.num, keep.den)

        size, ragged = ctx.host_size(mask, rows, "kept")
        tokens, kept = ctx.emit(choose, merged, mask, *inputs, before=ctx.after(merged, mask, *inputs))
        stack = ctx.stack_below(merged)
        ctx.cut(merged, kept, size, ragged=ragged, stack="decoder", layer=stack.layers[0] if stack else None, index=0,
                suffix=1, value=None if tokens is merged else tokens)
        return {"tokens_before": _hint(merged.meta["val"].shape[1]), "tokens_after": _hint(size)}


def drop_visual(ctx: Context, merge: Region, stack: Region, layer: int) -> dict[str, Any]:
    """Remove all visual tokens of ``merge`` from the output of ``stack.layers[layer]``."""
    node = stack.layers[layer].output
    ctx.check(node, suffix=1)
    mask = ctx.visual_mask(merge)
    size, ragged = ctx.host_size(mask, lambda visual: (~visual).sum(1), "text")
    at = ctx.after(node, mask)
    visual = ctx.surviving(mask, "decoder", True, at)  # empty slots go with the visual tokens
    keep = ctx.emit(torch.logical_not, visual, before=at)
    ctx.cut(node, keep, size, ragged=ragged, stack="decoder", layer=stack.layers[layer + 1], index=layer + 1, suffix=1)
    return {"late_layer": layer + 1, "tokens_late": _hint(size)}


def _hint(size: Any) -> int:
    size = size.meta["val"] if isinstance(size, fx.Node) else size
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
