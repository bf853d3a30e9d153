"""What passes share that remove visual tokens between the layers of a decoder, in stages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from tokcompile.capture.sizes import hint, shape_of
from tokcompile.families.pruning.visual import visual_tokens
from tokcompile.families.scores import Scores, read_scores
from tokcompile.formulas.attention import AttentionForm
from tokcompile.formulas.attention_rows import attention_rows, last_places, rows_source
from tokcompile.kernels.hidden import is_visible
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import LayerCut, Taken
from tokcompile.recipes import Budget
from tokcompile.regions.model import DecoderStack, Layer, MergePoint
from tokcompile.regions.places import stack_below
from tokcompile.registry import PassParams, about
from tokcompile.rewrite.above import check_above, compute_above
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import budgets, budgets_count, keep_mask, segment_positions, segments
from tokcompile.rewrite.visual_mask import visual_mask

Depth = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]


class StagedParams(PassParams):
    """Parameters that every choice inside the decoder has; a method says anew where its defaults come from."""

    keep: list[Budget] = Field(
        min_length=1,
        description="Visual tokens of each image that are left behind each cut: a ratio of all that the image had, in "
        "(0, 1], or a count.",
    )
    at: list[Depth] = Field(
        min_length=1,
        description="Where each cut is, ascending: how many layers read the tokens above it.",
        json_schema_extra=about(unit="fraction of the depth, or number of layers"),
    )

    @model_validator(mode="after")
    def _stages(self) -> StagedParams:
        if len(self.keep) != len(self.at):
            raise ValueError(f"keep has {len(self.keep)} stages and at has {len(self.at)}; they need as many")
        for kind in (int, float):
            given = [at for at in self.at if isinstance(at, kind)]
            if sorted(set(given)) != given:
                raise ValueError("at needs ascending depths")
        for before, after in itertools.pairwise(self.keep):
            if before.is_count == after.is_count and after.num * before.den > before.num * after.den:
                raise ValueError("keep cannot grow from cut to cut: tokens that are gone do not come back")
        return self


@dataclass(frozen=True, eq=False)
class StagedCut:
    """One of the cuts, for :meth:`StagedSelection.inputs`.

    Attributes:
        number: from 0. index: of the first layer below the cut.
        merge, stack: the merge point, and the layers.
        text: bool ``[B, S]``: text behind the last image of its row. S: the tokens above this cut.
        count: the most such tokens that a row has, a number or a size in the graph.
        since: index of the first layer below the cut before.
    """

    number: int
    index: int
    merge: MergePoint
    stack: DecoderStack
    text: fx.Node
    count: int | fx.Node
    since: int

    @property
    def above(self) -> Layer:
        """The last layer above the cut."""
        return self.stack.layers[self.index - 1]

    @property
    def below(self) -> Layer:
        """The first layer below it."""
        return self.stack.layers[self.index]

    @property
    def layers(self) -> list[Layer]:
        """The layers above this cut and below the one before."""
        return self.stack.layers[self.since : self.index]

    @property
    def node(self) -> fx.Node:
        """``[B, S, D]``: what loses tokens."""
        return self.above.output


class StagedSelection(Pass):
    """Keeps a budget of the tokens of each image at a few depths of the decoder.

        before   merge -> layer 0 .. L-1 on S tokens
        after    merge -> layers -> score -> keep -> layers on fewer tokens -> score -> keep -> ... on still fewer

    A method is a subclass with parameters (:class:`StagedParams`) and :meth:`score`, and :meth:`inputs` where it reads
    more than the tokens. All stages are checked before anything is changed. Budgets are those of the images as they
    came, whatever earlier stages left. Kept tokens keep their positions; text is never removed.
    """

    regions = "merge_point"

    def inputs(self, ctx: Context, cut: StagedCut) -> list[fx.Node]:
        """What :meth:`score` reads besides the tokens: values over the tokens above ``cut``.

        They may come from the layer below as well (its queries and keys, say): that is then computed twice, once for
        the score on all tokens, once for the model on those that are left.

        Raises:
            NarrowError: a layer is not of the form that the method reads. Asked for all stages before any cut.
        """
        return []

    def score(
        self,
        stage: int,
        tokens: Tensor,
        segment: Tensor,
        budget: Tensor,
        carried: Mapping[str, Tensor],
        *inputs: Tensor,
    ) -> Scores | Tensor:
        """Score visual tokens, in plain torch that can be traced.

        Args:
            stage: number of the cut, from 0.
            tokens: ``[B, S, D]``, the residual stream above the cut.
            segment: int64 ``[B, S]``: number of the image in its row, -1 for text.
            budget: int64 ``[B, S]``: how many tokens of that image are left behind the cut.
            carried: what the stage before gave as ``carried``, over the tokens that it kept; empty at the first.

        Returns:
            ``values [B, S]``, larger is kept first; ``tokens [B, S, D]`` if the method changes them; ``carried``, for
            the next stage. A bare tensor stands for ``Scores(values)``.
        """
        raise NotImplementedError

    def budgets(self, segment: Tensor) -> list[Tensor]:
        """int64 ``[B, S]`` for each stage: how many tokens of an image are left, of all that it has in ``segment``.

        A stage never keeps more than the stage before. Traceable: counted on the host before each call, too.
        """
        found: list[Tensor] = []
        for keep in self.params.keep:
            budget = budgets_count(segment, keep.num) if keep.is_count else budgets(segment, keep.num, keep.den)
            found.append(torch.minimum(budget, found[-1]) if found else budget)
        return found

    # .. plan

    def plan(self, ctx: Context, region: MergePoint) -> Taken:
        stack, starts = self._stages(ctx, region)
        if "decoder" in ctx.cuts.positions:
            raise ctx.refuse(
                region.output,
                f"an earlier step has removed visual tokens, and {self.name} counts all that an image has; put it into "
                "a recipe of its own",
            )
        for start in starts:
            ctx.check(stack.layers[start - 1].output, suffix=1)
        self._try(ctx, region, stack, starts)
        visual, tokens = visual_tokens(region)
        left, cuts = visual, []
        for start, keep in zip(starts, self.params.keep, strict=True):
            left = None if left is None or visual is None else min(left, keep.count(visual))
            cuts.append(LayerCut(start, None if left is None or visual is None else tokens - visual + left))
        return Taken(stack, tuple(cuts))

    def cut_layers(self, depth: int) -> list[int]:
        return self._starts(depth)

    def _starts(self, depth: int) -> list[int]:
        return [max(1, min(depth - 1, round(at * depth))) if isinstance(at, float) else at for at in self.params.at]

    def _stages(self, ctx: Context, region: MergePoint) -> tuple[DecoderStack, list[int]]:
        """The stack, and the first layer below each cut."""
        merged = region.output
        stack = stack_below(ctx.regions, merged)
        if stack is None:
            raise ctx.refuse(merged, "no stack of decoder layers is recognised below this merge point")
        depth = len(stack.layers)
        starts = self._starts(depth)
        if sorted(set(starts)) != starts or not starts or starts[-1] >= depth:
            raise ctx.refuse(
                merged,
                f"cuts at layers {', '.join(map(str, starts))} do not fit into {depth} layers: they need to ascend and "
                f"to end before layer {depth}; give layer numbers, fewer stages, or depths further apart",
            )
        return stack, starts

    def _try(self, ctx: Context, region: MergePoint, stack: DecoderStack, starts: list[int]) -> None:
        """Ask for the inputs of all stages, and take what that put into the graph out again."""
        graph, shared = ctx.captured.graph, dict(ctx.shared)
        there = set(graph.nodes)
        try:
            text = _text(ctx, visual_mask(ctx, region))
            for number, start in enumerate(starts):
                cut = StagedCut(number, start, region, stack, text, 2, starts[number - 1] if number else 0)
                values = self.inputs(ctx, cut)
                if values:
                    check_above(cut.node, values)
        finally:
            ctx.shared = shared
            for node in reversed(list(graph.nodes)):
                if node not in there:
                    graph.erase_node(node)

    # .. rewrite

    def apply(self, ctx: Context, region: MergePoint) -> dict[str, Any]:
        stack, starts = self._stages(ctx, region)
        before = hint(region.output.meta["val"].shape[1])
        mask = visual_mask(ctx, region)
        text = _text(ctx, mask)
        count, _ = ctx.host_size(mask, _behind, "questions", padded=True)
        carried: dict[str, fx.Node] = {}
        left: dict[int, Any] = {}
        for number, start in enumerate(starts):
            node = stack.layers[start - 1].output
            here = ctx.surviving(text, "decoder", False, ctx.after(text, *self._positions(ctx)))
            cut = StagedCut(number, start, region, stack, here, count, starts[number - 1] if number else 0)
            inputs = self.inputs(ctx, cut)
            carried, left[start] = self._cut(ctx, cut, mask, compute_above(node, inputs), carried)
        return {
            "tokens_before": before,
            "tokens_after": hint(left[starts[-1]]),
            "tokens_by_layer": {start: hint(size) for start, size in left.items()},
        }

    def _positions(self, ctx: Context) -> list[fx.Node]:
        """int64 ``[B, S]``: where the tokens that are left were in the unpruned sequence; nothing before any cut."""
        return [p for p in [ctx.cuts.positions.get("decoder")] if p is not None]

    def _cut(
        self, ctx: Context, cut: StagedCut, mask: fx.Node, inputs: list[fx.Node], carried: dict[str, fx.Node]
    ) -> tuple[dict[str, fx.Node], Any]:
        """Make one cut; what the method carries on, over the tokens that are left, and their number."""
        node, positions, number = cut.node, self._positions(ctx), cut.number
        named, new = list(carried), list[str]()

        def choose(tokens: Tensor, mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            place, rest = rest[: len(positions)], rest[len(positions) :]
            given = dict(zip(named, rest, strict=False))
            segment = segments(mask)
            budget, alive = self.budgets(segment)[number], torch.ones_like(mask)
            for p in place:
                alive = p >= 0
                segment, budget = (
                    torch.where(alive, x.gather(1, p.clamp(min=0)), x0) for x, x0 in ((segment, -1), (budget, 0))
                )
            result = self.score(number, tokens, segment, budget, given, *rest[len(named) :])
            scores = read_scores(result, self.name, 2, "tokens", "carried")
            more = dict(scores.carried or {})
            new[:] = more
            kept = torch.logical_and(keep_mask(scores.values, segment, budget), alive)
            return tokens if scores.tokens is None else scores.tokens, kept, *more.values()

        def rows(mask: Tensor) -> Tensor:
            segment = segments(mask)
            first = torch.logical_and(segment >= 0, segment_positions(segment) == 0)
            return torch.logical_not(mask).sum(1) + (self.budgets(segment)[number] * first).sum(1)

        size, ragged = ctx.host_size(mask, rows, f"kept_{number}")
        values = [node, mask, *positions, *carried.values(), *inputs]
        tokens, chosen, *more = ctx.emit(choose, *values, before=ctx.after(*values))
        kept = ctx.cut(
            node,
            chosen,
            size,
            ragged=ragged,
            stack="decoder",
            layer=cut.below,
            index=cut.index,
            suffix=1,
            value=None if tokens is node else tokens,
            aside=more,
        )
        after = {
            name: ctx.emit(_left, value, kept, before=ctx.after(value, kept))
            for name, value in zip(new, more, strict=True)
        }
        return after, size


def _left(value: Tensor, kept: Tensor) -> Tensor:
    """``value [B, S, ...]`` at the places ``kept [B, K]``."""
    place = kept.clamp(min=0)
    while place.dim() < value.dim():
        place = place.unsqueeze(-1)
    return value.gather(1, place.expand(-1, -1, *value.shape[2:]))


def _text(ctx: Context, mask: fx.Node) -> fx.Node:
    """bool ``[B, S]``: the tokens behind the last image of their row."""

    def behind(mask: Tensor) -> Tensor:
        index = torch.arange(mask.shape[1], device=mask.device)[None]
        last = torch.where(mask, index, -1).amax(1, keepdim=True)
        return torch.logical_and(last >= 0, index > last)

    return ctx.emit_once("text behind images", behind, mask)  # type: ignore[no-any-return]


def _behind(mask: Tensor) -> Tensor:
    """int64 ``[B]``: how many tokens stand behind the last image of each row, at least 1."""
    index = torch.arange(mask.shape[1], device=mask.device)[None]
    last = torch.where(mask, index, -1).amax(1)
    return torch.where(last >= 0, mask.shape[1] - 1 - last, 1)


def attention_to_tokens(ctx: Context, layer: Layer, queries: fx.Node, most: int | fx.Node) -> fx.Node:
    """How much some queries of ``layer`` attend to each token: fp32 ``[B, S]``, the mean over heads and queries.

    As :func:`attention_rows`, which says what is taken into account: the rows alone are computed. A query that does not
    see itself is padding, and is left out.

    Args:
        queries: bool ``[B, S]``. most: how many of them are read, the last ones.

    Raises:
        NarrowError: the layer has no attention, or one whose formula is not known.
    """
    source = rows_source(ctx, layer)
    if isinstance(source, AttentionForm) and source.mask is not None and len(shape_of(source.mask)) > 1:
        queries = ctx.emit(_no_padding, queries, source.mask, before=ctx.after(queries, source.mask))
    places = last_places(ctx, queries, most)
    rows = attention_rows(ctx, layer, places)

    def mean(rows: Tensor, places: Tensor, queries: Tensor) -> Tensor:
        there = (places >= 0).sum(1, keepdim=True).clamp(min=1)
        found = rows.mean(1).sum(1) / there
        tokens = torch.arange(queries.shape[1], device=rows.device) - queries.shape[1] + found.shape[1]
        return found.gather(1, tokens[None].expand(found.shape[0], -1))  # a cache may hold keys in front

    return ctx.emit(mean, rows, places, queries, before=ctx.after(rows, places, queries))  # type: ignore[no-any-return]


def _no_padding(queries: Tensor, mask: Tensor) -> Tensor:
    """``queries [B, S]`` without those whose own key ``mask`` (broadcasts to [B, H, S, T]) hides."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(queries.shape[0], mask.shape[1], queries.shape[1], mask.shape[3])
    own = torch.arange(queries.shape[1], device=mask.device) - queries.shape[1] + mask.shape[3]
    own = mask.gather(3, own.clamp(min=0)[None, None, :, None].expand(mask.shape[0], mask.shape[1], -1, 1))
    return torch.logical_and(queries, is_visible(own).any(1)[..., 0])
