"""What passes that choose visual tokens have in common: budgets, and the cut at the merge point or in the encoder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, fx

from tokcompile.capture.sizes import hint
from tokcompile.families.pruning.compact import Compact
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Budget
from tokcompile.regions.model import MergePoint
from tokcompile.registry import PassParams, about
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import budgets, budgets_count, keep_mask, kept_rows, segments


class VisualParams(PassParams):
    """Parameters that every selection of visual tokens has; a method says anew what its ``keep`` counts."""

    keep: Budget = Field(description="Visual tokens kept of each image: a ratio in (0, 1], or a count.")
    positions: Literal["keep", "compact"] = Field(
        "keep",
        description="keep: a kept token has the position that it had. compact: the tokens left are without "
        "gaps, as if the prompt had been that short; for rotary embeddings of one axis.",
        json_schema_extra=about(source="compact: the code of VTC-CLS, VisionZip, DivPrune on LLaVA"),
    )


class VisualSelection(Pass):
    """Keeps a budget of the tokens of each image where image features enter the language model.

    A method is a subclass with parameters (:class:`VisualParams`) and :meth:`score`. Everything else is here: images
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

    def apply(self, ctx: Context, region: MergePoint) -> dict[str, Any]:
        return self.select(ctx, region)

    def select(self, ctx: Context, region: MergePoint, *inputs: fx.Node) -> dict[str, Any]:
        """Score (``inputs`` are handed to :meth:`score`), choose, and cut."""
        merged = region.output
        below = ctx.check(merged, suffix=1)
        mask = ctx.visual_mask(region)
        keep: Budget = self.params.keep
        compact = Compact(ctx, merged, below) if getattr(self.params, "positions", "keep") == "compact" else None

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
        if compact is not None:
            compact.move(kept)
        stack = ctx.stack_below(merged)
        ctx.cut(
            merged,
            kept,
            size,
            ragged=ragged,
            stack="decoder",
            layer=stack.layers[0] if stack else None,
            index=0,
            suffix=1,
            value=None if tokens is merged else tokens,
        )
        return {"tokens_before": hint(merged.meta["val"].shape[1]), "tokens_after": hint(size)}
