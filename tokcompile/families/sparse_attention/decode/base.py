"""Attention of a decode step over some of the keys in the cache: what the passes that choose them share.

::

    before   query [B, H, 1, D], keys and values [B, Hkv, T, .] -> attention over all T keys
    after    scores of the keys -> list of C keys: the first, the best, the last -> attention over the list

A pass is a way to score keys. The first visible keys of a row (attention sinks) and the last ones (the token of this
step among them) are always in the list; padding never is. Nothing leaves the cache: the next step chooses anew.

Choosing reads keys too, so a short cache is served by the dense attention. That is decided by the length alone, once
for each compiled graph: one graph serves shorter caches, one the longer ones, and a guard on the length tells them
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, fx

from tokcompile.errors import UnprofitableError
from tokcompile.families.scores import Scores, read_scores
from tokcompile.families.sparse_attention.decode.form import decode_form, visible_keys
from tokcompile.families.sparse_attention.decode.lists import chosen, ends, joined, least_length, width_of
from tokcompile.formulas.attention import AttentionForm, with_sink
from tokcompile.kernels.precision import as_autocast
from tokcompile.kernels.token_list_attention import token_list_attention
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import Taken
from tokcompile.recipe.budget import Budget
from tokcompile.regions.model import AttentionRegion
from tokcompile.registry import PassParams, about
from tokcompile.rewrite.context import Context

#: Bytes that dense attention moves in the time that a choice takes whatever its length (a dozen small operations), by
#: device. CPU, measured (docs/kernels.md: 9 query heads, 3 key heads of width 64, fp32, 256 keys, one thread): fasa is
#: even with dense attention at about 4,800 tokens and tokenselect at 5,800; with this constant 5,700 and 6,400 are
#: predicted, without it 1,600 and 1,800. CUDA, not measured: twelve launches of 3 us at 3 TB/s.
FIXED = {"cpu": 3_000_000, "cuda": 108_000_000}


class SparseDecodeParams(PassParams):
    """What every choice of keys has to be told."""

    budget: Budget = Field(description="Keys that a query attends to, sinks and recent ones included.")
    sinks: int = Field(
        4, ge=0, description="First visible keys of a row, always attended to.", json_schema_extra=about(unit="tokens")
    )
    recent: int = Field(
        1,
        ge=1,
        description="Last visible keys, always attended to; the last is the token itself.",
        json_schema_extra=about(unit="tokens"),
    )
    dense_below: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Shorter caches are served by the dense attention; auto: those for which choosing and "
        "attending to the chosen is predicted to move as many bytes.",
        json_schema_extra=about(unit="tokens"),
    )

    def model_post_init(self, context: Any) -> None:
        if self.budget.is_count and self.budget.num <= self.sinks + self.recent:
            raise ValueError(
                f"budget {self.budget} leaves nothing to choose beside {self.sinks} sinks and "
                f"{self.recent} recent keys; raise it above {self.sinks + self.recent}"
            )


class SparseDecode(Pass):
    """Base of the passes: a subclass scores the keys (:meth:`score`)."""

    regions = "attention"
    stage = "decode"
    #: Whether a layer has one list for all its heads (else one for each key head).
    one_list: ClassVar[bool] = False
    #: float32 numbers written for each key and row of the batch, in key heads and in query heads.
    written: ClassVar[tuple[int, int]] = (1, 0)
    #: Whether scoring reads the keys.
    reads_keys: ClassVar[bool] = True

    def inputs(
        self, ctx: Context, region: AttentionRegion, form: AttentionForm
    ) -> tuple[Sequence[fx.Node], dict[str, Any]]:
        """Nodes that :meth:`score` takes beside query, keys and candidates, and details for the report.

        Raises:
            NarrowError: keys of this region cannot be scored.
        """
        return (), {}

    def score(
        self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, layer: int, *more: Tensor
    ) -> Scores | Tensor:
        """Scores of keys: the higher, the sooner chosen. Traceable.

        Args:
            query: [B, H, 1, D]. key: [B, Hkv, T, D].
            candidate: bool [B or 1, T]: the keys that can be chosen; scores of others are not used.
            scale, softcap: of the attention. layer: its number in the stack, 0 outside of one.
            more: values of :meth:`inputs`.

        Returns:
            ``values`` float [B or 1, M, T], M = Hkv (a list for each key head) or 1 (one list for all heads). A bare
            tensor stands for ``Scores(values)``.
        """
        raise NotImplementedError

    def plan(self, ctx: Context, region: AttentionRegion) -> Taken:
        self._gate(ctx, region, decode_form(ctx, region))
        return Taken()

    def apply(self, ctx: Context, region: AttentionRegion) -> dict[str, Any]:
        form = decode_form(ctx, region)
        more, details = self.inputs(ctx, region, form)
        visible = visible_keys(ctx, form)
        threshold = self._gate(ctx, region, form)
        ends = _ends(ctx, form, visible, self.params.sinks, self.params.recent)
        sink = [] if form.sink is None else [form.sink]
        best, choice = self.choose(ctx, region, form, ends, more)

        def attention(
            query: Tensor, key: Tensor, value: Tensor, best: Tensor, oldest: Tensor, newest: Tensor, *sink: Tensor
        ) -> Tensor:
            index = joined(best, oldest, newest)
            query, key, value = as_autocast(query, key, value)
            index = index.expand(query.shape[0], key.shape[1], index.shape[2])
            output, lse = token_list_attention(query, key, value, index, None, form.scale, False, form.softcap)
            return with_sink(output, lse, sink[0]) if sink else output

        form.replace(ctx, attention, form.query, form.key, form.value, best, *ends[1:], *sink)
        return {"budget": str(self.params.budget), "dense_below": threshold, **details, **choice}

    def choose(
        self,
        ctx: Context,
        region: AttentionRegion,
        form: AttentionForm,
        ends: tuple[fx.Node, ...],
        more: Sequence[fx.Node],
    ) -> tuple[fx.Node, dict[str, Any]]:
        """Node of the best candidates, int64 [B or 1, M, .], and details for the report.

        Args:
            ends: nodes of :func:`ends`. more: of :meth:`inputs`.
        """
        layer = (ctx.layer(region) or (0, 0))[0]

        def best(
            query: Tensor, key: Tensor, candidate: Tensor, oldest: Tensor, newest: Tensor, *more: Tensor
        ) -> Tensor:
            given = self.score(query, key, candidate, form.scale, form.softcap, layer, *more)
            scores = read_scores(given, self.name, 3)
            return chosen(scores.values, candidate, self.params.budget.count(key.shape[2]) - width_of(oldest, newest))

        return ctx.emit(best, form.query, form.key, *ends, *more, before=form.output), {}

    def _gate(self, ctx: Context, region: AttentionRegion, form: AttentionForm) -> int:
        """Raise where the dense attention serves caches of this length better; puts a guard on the length.

        Returns:
            The length from which on keys are chosen.
        """
        params = self.params
        part = ctx.part_of_rank(form.query) if self.one_list else None
        if part is not None:
            raise ctx.refuse(
                part,
                f"{self.name} makes one list for all heads of a layer, and these are divided between processes (tensor "
                "parallelism), so each would make another; fasa makes one for each key head",
            )
        least = least_length(params.budget, params.sinks, params.recent)
        threshold = self._even(form) if params.dense_below == "auto" else params.dense_below
        if threshold is None:
            raise UnprofitableError(
                f"choosing keys and attending to {params.budget} of them is predicted to move as many bytes as dense "
                "attention at any length; lower the budget, or set dense_below",
                node=form.output.name,
                path=region.path,
                source=region.source,
            )
        threshold = max(threshold, least)
        if form.key.meta["val"].shape[2] < threshold:
            raise UnprofitableError(
                f"the dense attention serves caches of less than {threshold} tokens, where choosing keys and attending "
                f"to {params.budget} of them is not expected to pay (dense_below: {params.dense_below})",
                node=form.output.name,
                path=region.path,
                source=region.source,
            )
        return threshold

    def _even(self, form: AttentionForm) -> int | None:
        """The length at which both move as many bytes; None: the dense attention never moves more.

        Keys are read once for the scores (the cache stores whole rows), scores are written and read twice (softmax or
        comparison, choice); the kernel reads listed rows in place, the host copies them first; and :data:`FIXED`.
        """
        key, value = form.key.meta["val"], form.value.meta["val"]
        heads, kv_heads = form.heads
        size, width, value_width = key.element_size(), int(key.shape[3]), int(value.shape[3])
        scoring = (kv_heads * width * size if self.reads_keys else 0) + 12 * (
            self.written[0] * kv_heads + self.written[1] * heads
        )
        row = (1 if key.device.type == "cuda" else 3) * kv_heads * (width + value_width) * size
        saved = kv_heads * (width + value_width) * size - scoring
        budget, fixed = self.params.budget, FIXED["cuda" if key.device.type == "cuda" else "cpu"]
        if budget.is_count:
            return None if saved <= 0 else -(-(budget.num * row + fixed) // saved)
        left = saved * budget.den - row * budget.num
        return None if left <= 0 else -(-fixed * budget.den // left)


def _ends(ctx: Context, form: AttentionForm, visible: fx.Node | None, sinks: int, recent: int) -> tuple[fx.Node, ...]:
    """Nodes of :func:`ends`; once for all layers that see the same keys."""
    if visible is None:
        return tuple(
            ctx.emit(lambda key: ends(None, key.shape[2], sinks, recent, key.device), form.key, before=form.output)
        )
    return tuple(
        ctx.emit_once(f"ends {sinks} {recent}", lambda v: ends(v, v.shape[1], sinks, recent, v.device), visible)
    )
