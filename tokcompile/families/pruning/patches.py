"""What passes share that remove or merge image patches inside an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from tokcompile.capture.sizes import hint
from tokcompile.errors import NarrowError
from tokcompile.families.pruning.restore import Restored
from tokcompile.families.scores import Scores, read_scores
from tokcompile.formulas.attention import read_attention
from tokcompile.formulas.mask import is_hidden
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import LayerCut, Taken
from tokcompile.recipes import Budget
from tokcompile.regions.model import EncoderRegion, Layer
from tokcompile.registry import PassParams, about
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import budgets, budgets_count, keep_mask, segments


class PatchParams(PassParams):
    """Parameters that every selection of patches (or frames) inside an encoder has."""

    keep: list[Budget] = Field(
        min_length=1, description="Patches kept at each stage: ratio of those before the stage, in (0, 1], or a count."
    )
    at: list[float] = Field(
        min_length=1,
        description="Depth of each stage, in (0, 1), ascending.",
        json_schema_extra=about(unit="fraction of the depth", source="the paper uses 1/3, 7/12, 5/6"),
    )

    @model_validator(mode="after")
    def _stages(self) -> PatchParams:
        if len(self.keep) != len(self.at):
            raise ValueError(f"keep has {len(self.keep)} stages and at has {len(self.at)}; they need as many")
        if sorted(set(self.at)) != self.at or not all(0 < f < 1 for f in self.at):
            raise ValueError("at needs ascending fractions between 0 and 1")
        return self


class PatchSelection(Pass):
    """Keeps a budget of the patches at a few depths of an encoder. Class and register tokens always stay.

    Patches of an image, or frames of an audio encoder: an axis of tokens, with or without class tokens in front.

        before   [class | patches] -> layer 0 .. L-1 -> head
        after    [class | patches] -> layers -> score -> keep -> layers on fewer tokens -> ... -> head
        restored                                                 ... -> each patch takes the token it is in -> head

    A method is a subclass with parameters (:class:`PatchParams`) and :meth:`score`, and :meth:`inputs` where it reads
    more than the tokens. Kept ratios are fixed, so shapes stay static. A method that puts several patches into one
    token can have a parameter ``restore``: what leaves the layers has all patches then.
    """

    regions = "vision_encoder"
    also = ("audio_encoder",)
    protects_leading = True
    #: Whether :meth:`score` gives new tokens, which padding among the frames of a signal would spoil.
    changes_tokens: ClassVar[bool] = False

    def inputs(self, ctx: Context, layer: Layer, prefix: int) -> list[fx.Node]:
        """What :meth:`score` reads besides the tokens, from the layer above the cut."""
        return []

    def score(
        self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int, *inputs: Tensor
    ) -> Scores | Tensor:
        """Score patches, in plain torch that can be traced.

        Args:
            tokens: ``[B, S, D]``, the residual stream. segment: int64 ``[B, S]``, 0 for patches, -1 for the ``prefix``
            tokens in front and for tokens behind the patches. budget: int64 ``[B, S]``. stage: number of the layer
            that follows.

        Returns:
            ``values [B, S]``, larger is kept first; ``tokens`` if the method changes them, ``into`` if it puts patches
            into others, and what :meth:`below` needs, ``carried``. A bare tensor stands for ``Scores(values)``.
        """
        raise NotImplementedError

    def below(
        self,
        ctx: Context,
        region: EncoderRegion,
        layers: Sequence[Layer],
        kept: fx.Node,
        carried: Mapping[str, fx.Node],
    ) -> None:
        """Change the ``layers`` between a cut and the next one, when all of it is narrowed.

        Called where :meth:`score` gave ``into`` or ``carried``.

        Args:
            kept: int64 ``[B, K]``, the places of the tokens that are left.
            carried: what :meth:`score` gave for this, over the tokens above the cut.
        """

    def plan(self, ctx: Context, region: EncoderRegion) -> Taken:
        stages, prefix = self._stages(ctx, region), int(region.prefix)
        first = region.layers[stages[0] - 1].output
        front, behind = self._ends(ctx, first, prefix, int(region.suffix))
        tokens = hint(first.meta["val"].shape[1])
        cuts = []
        for stage, keep in zip(stages, self.params.keep, strict=True):
            self.check_layer(ctx, region.layers[stage - 1])
            if not getattr(self.params, "restore", False):  # else what leaves the layers keeps all of its tokens
                ctx.check(region.layers[stage - 1].output, prefix=front, suffix=behind)
            tokens = keep.count(tokens - front - behind) + front + behind
            cuts.append(LayerCut(stage, tokens))
        return Taken(region, tuple(cuts))

    def _stages(self, ctx: Context, region: EncoderRegion) -> list[int]:
        """The first layer below each cut."""
        if region.tokens.meta["val"].dim() == 2:
            raise ctx.refuse(
                region.tokens,
                "the encoder has the patches of all images one behind the other in one row, and each image would need "
                "a cut of its own; choose visual tokens where they enter the language model (todre and others)",
            )
        depth = len(region.layers)
        stages = [max(1, min(depth - 1, round(f * depth))) for f in self.params.at]
        if len(set(stages)) != len(stages):
            raise ctx.refuse(
                region.tokens,
                f"{len(stages)} stages do not fit into {depth} layers; give fewer, or depths further apart",
            )
        return stages

    def apply(self, ctx: Context, region: EncoderRegion) -> dict[str, Any]:
        stages, depth, prefix = self._stages(ctx, region), len(region.layers), int(region.prefix)
        ends = self._ends(ctx, region.layers[stages[0] - 1].output, prefix, int(region.suffix))
        restored = Restored(ctx, region, stages[0]) if getattr(self.params, "restore", False) else None
        try:
            for stage in stages:
                self.check_layer(ctx, region.layers[stage - 1])
                if self.changes_tokens and region.kind == "audio_encoder" and _mask(ctx, region.layers[stage - 1]):
                    raise ctx.refuse(
                        region.layers[stage - 1].output,
                        "the frames have a mask, and means would mix "
                        "padding into them; give clips of one length without attention_mask, or use "
                        "class_attention",
                    )
                ctx.check(region.layers[stage - 1].output, prefix=ends[0], suffix=ends[1])
        except NarrowError:
            if restored is not None:
                restored.take_back()
            raise
        counts = [hint(region.layers[stages[0] - 1].output.meta["val"].shape[1])]
        for stage, end, keep in zip(stages, [*stages[1:], depth], self.params.keep, strict=True):
            counts.append(self._cut(ctx, region, stage, end, keep, prefix, ends, restored))
        details = {
            "tokens_before": counts[0],
            "tokens_after": counts[-1],
            "tokens_by_layer": dict(zip(stages, counts[1:], strict=True)),
        }
        if restored is not None:
            restored.finish()
            details["restored_to"] = counts[0]
        return details

    def check_layer(self, ctx: Context, layer: Layer) -> None:
        """Refuse a layer that cannot be scored, before anything is cut."""

    def _ends(self, ctx: Context, node: fx.Node, prefix: int, suffix: int) -> tuple[int, int]:
        """How many tokens in front and behind are kept: all that are no patches, or as many as protected."""
        tokens = node.meta["val"].shape[1]
        found = []
        for name, place, given, known in (
            ("leading_tokens", "class and register tokens in front", ctx.leading_tokens, prefix),
            ("trailing_tokens", "tokens behind the patches", ctx.trailing_tokens, suffix),
        ):
            if given is not None and given < known:
                raise ctx.refuse(
                    node, f"protect.{name} is {given}, and the {known} {place} are always kept; leave it out"
                )
            found.append(known if given is None else given)
        if bool(tokens <= sum(found)):
            both = f"protect.leading_tokens is {found[0]}" + (
                f" and protect.trailing_tokens {found[1]}" if found[1] else ""
            )
            raise ctx.refuse(node, f"{both}, of {hint(tokens)} tokens in all; no patch is left to choose from")
        return found[0], found[1]

    def _cut(
        self,
        ctx: Context,
        region: EncoderRegion,
        stage: int,
        end: int,
        keep: Budget,
        prefix: int,
        ends: tuple[int, int],
        restored: Restored | None,
    ) -> int:
        (front, behind), layer = ends, region.layers[stage - 1]
        node, inputs = layer.output, self.inputs(ctx, layer, prefix)
        mask = _mask(ctx, layer) if region.kind == "audio_encoder" else None
        padding = () if mask is None else (mask,)

        def choose(x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            inputs, padding = inputs[:given], inputs[given:]
            position = torch.arange(x.shape[1], device=x.device)
            patch = torch.logical_and(position >= front, position < x.shape[1] - behind)
            segment = segments(patch[None].expand(x.shape[0], x.shape[1]))
            budget = budgets_count(segment, keep.num) if keep.is_count else budgets(segment, keep.num, keep.den)
            result = self.score(x, segment, budget, prefix, stage, *inputs)
            scores = read_scores(result, self.name, 2, "tokens", "carried", "into")
            values, into = scores.values, [] if scores.into is None else [scores.into]
            carried = scores.carried or {}
            for mask in padding:
                values = values.masked_fill(_unseen(mask).expand(x.shape[0], x.shape[1]), torch.finfo(values.dtype).min)
            old_form[:], names[:] = [isinstance(result, tuple)], carried
            return (
                x if scores.tokens is None else scores.tokens,
                keep_mask(values, segment, budget),
                *into,
                *carried.values(),
            )

        given, names, old_form = len(inputs), list[str](), list[bool]()
        tokens, chosen, *more = ctx.emit(choose, node, *inputs, *padding, before=ctx.after(node, *inputs, *padding))
        size = _kept_count(ctx, node, keep, front + behind)
        kept = ctx.cut(
            node,
            chosen,
            size,
            stack=region.path or "encoder",
            layer=region.layers[stage],
            index=stage,
            prefix=front,
            suffix=behind,
            value=None if tokens is node else tokens,
        )
        into, values = (more[0], more[1:]) if len(more) > len(names) else (None, more)
        if more and old_form[0]:  # goes with the tuples: see read_scores
            self.below(ctx, region, region.layers[stage:end], kept, *values)
        elif more:
            self.below(ctx, region, region.layers[stage:end], kept, dict(zip(names, values, strict=True)))
        if restored is not None:
            if into is None:
                raise TypeError(
                    f"{self.name}.score: restore needs the field into: the token that each patch is part of"
                )
            restored.stage(kept, into, range(stage, end))
        return hint(size)


def _kept_count(ctx: Context, node: fx.Node, keep: Budget, protected: int) -> Any:
    """How many tokens a cut of ``node [B, S, D]`` leaves, ``protected`` ones among them: a number or a node."""
    count = node.meta["val"].shape[1]
    if isinstance(count, int):
        return keep.count(count - protected) + protected
    return ctx.emit(lambda x: keep.count(x.shape[1] - protected) + protected, node, before=ctx.after(node))


def _mask(ctx: Context, layer: Layer) -> fx.Node | None:
    """The mask of a layer's attention as it is in the graph now."""
    return (
        None if layer.attention is None or layer.attention.mask is None else read_attention(ctx, layer.attention).mask
    )


def _unseen(mask: Tensor) -> Tensor:
    """bool ``[B or 1, S]``: tokens that no query of any head looks at, from a mask of ``[B, H, S, S]``: padding."""
    return is_hidden(mask).all(2).all(1)
