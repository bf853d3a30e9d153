"""What passes that choose visual tokens have in common: budgets, and the cut at the merge point or in the encoder."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, fx

from tokcompile.capture.sizes import hint
from tokcompile.families.pruning.compact import Compact
from tokcompile.families.scores import Scores, read_scores
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import LayerCut, Taken
from tokcompile.recipes import Budget
from tokcompile.regions.model import DecoderStack, EncoderRegion, MergePoint
from tokcompile.regions.places import stack_below
from tokcompile.registry import PassParams, about
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.narrow import check
from tokcompile.rewrite.selection import budgets, budgets_count, keep_mask, kept_rows, segments
from tokcompile.rewrite.visual_mask import visual_mask


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

    def score(self, tokens: Tensor, segment: Tensor, budget: Tensor) -> Scores | Tensor:
        """Score visual tokens, in plain torch that can be traced.

        Args:
            tokens: ``[B, S, D]``, the merged embeddings.
            segment: int64 ``[B, S]``: number of the image in its row, -1 for text.
            budget: int64 ``[B, S]``: how many tokens that image keeps.

        Returns:
            ``values [B, S]``, larger is kept first, and ``tokens [B, S, D]`` if the method changes them. A bare tensor
            stands for ``Scores(values)``.
        """
        raise NotImplementedError

    def choose(self, tokens: Tensor, segment: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Score and choose: the tokens to go on with, and bool ``[B, S]``, which of them are kept (text always is).

        Both the graph and :func:`tokcompile.select` choose by this.
        """
        keep: Budget = self.params.keep
        budget = budgets_count(segment, keep.num) if keep.is_count else budgets(segment, keep.num, keep.den)
        scores = read_scores(self.score(tokens, segment, budget, *inputs), self.name, 2, "tokens")
        return tokens if scores.tokens is None else scores.tokens, keep_mask(scores.values, segment, budget)

    def outside(
        self, features: Tensor, grid: Tensor | None, text: Tensor | None, scores: Tensor | None
    ) -> list[Tensor]:
        """What :func:`tokcompile.select` hands to :meth:`score` in place of the ``inputs`` that :meth:`apply` makes.

        Args:
            features: ``[1, S, D]``, the images of one prompt, one after the other.
            grid, text, scores: what the engine gave; ``scores`` is ``[1, S]``.

        Raises:
            NoMatchError: something is missing that the choice needs.
        """
        return []

    def plan(self, ctx: Context, region: MergePoint) -> Taken:
        ctx.check(region.output, suffix=1)
        stack = stack_below(ctx.regions, region.output)
        return Taken(stack, self.cuts(ctx, region, stack))

    def cuts(self, ctx: Context, region: MergePoint, stack: DecoderStack | None) -> tuple[LayerCut, ...]:
        """Where :meth:`apply` removes tokens of ``stack``; a method that cuts again below says so here."""
        visual, tokens = visual_tokens(region)
        return (LayerCut(0, None if visual is None else tokens - visual + self.params.keep.count(visual)),)

    def cut_layers(self, depth: int) -> list[int]:
        return [0]

    def apply(self, ctx: Context, region: MergePoint) -> dict[str, Any]:
        return self.select(ctx, region)

    def select(self, ctx: Context, region: MergePoint, *inputs: fx.Node) -> dict[str, Any]:
        """Score (``inputs`` are handed to :meth:`score`), choose, and cut."""
        merged = region.output
        below = ctx.check(merged, suffix=1)
        mask = visual_mask(ctx, region)
        keep: Budget = self.params.keep
        compact = Compact(ctx, merged, below) if getattr(self.params, "positions", "keep") == "compact" else None

        def choose(tokens: Tensor, mask: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.choose(tokens, segments(mask), *inputs)

        def rows(mask: Tensor) -> Tensor:
            return kept_rows(mask, count=keep.num) if keep.is_count else kept_rows(mask, keep.num, keep.den)

        size, ragged = ctx.host_size(mask, rows, "kept")
        tokens, kept = ctx.emit(choose, merged, mask, *inputs, before=ctx.after(merged, mask, *inputs))
        if compact is not None:
            compact.move(kept)
        stack = stack_below(ctx.regions, merged)
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


def visual_tokens(region: MergePoint) -> tuple[int | None, int]:
    """How many tokens of a row are visual in the captured call (about: rows may differ), and how many there are.

    The first is None where the region does not show its features row by row.
    """
    rows, tokens = (hint(size) for size in region.output.meta["val"].shape[:2])
    value = region.features.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None, tokens
    count = math.prod(hint(size) for size in value.shape[:-1])
    return min(tokens, -(-count // max(rows, 1))), tokens


def check_rows(ctx: Context, encoder: EncoderRegion, features: fx.Node) -> None:
    """Raise unless ``features`` are, row by row, the patches of ``encoder`` (one image after the other)."""
    tokens, prefix = encoder.tokens, int(encoder.prefix)
    if int(encoder.suffix):
        raise ctx.refuse(tokens, "tokens stand behind the patches of the encoder, so scores of its tokens do not fit")
    flow = check(ctx.captured, tokens, prefix=prefix)
    dims = flow.labels.get(features)
    axes = [f.axis for d in dims[:-1] for f in d if f.axis is not None and f.axis.kind == "token"] if dims else []
    parts = [p for axis in axes for p in (axis.parts or (axis,))]
    fits = bool(parts) and all(
        getattr(p, "kind", "") == "token" and p.start == prefix and (prefix == 0 or p.base is not None) for p in parts
    )
    if not fits:
        raise ctx.refuse(
            features,
            "the image features are not one for each patch of the encoder, so scores of patches do not fit them",
        )
