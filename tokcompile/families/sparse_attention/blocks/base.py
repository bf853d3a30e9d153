"""Attention of each block of queries over some blocks of keys: what the passes that choose them share.

::

    before   query, keys and values [B, H, L, D] -> attention over all keys, causal or in both directions
    after    blocks of queries x blocks of keys -> which are kept -> attention over these, exact (times a mass, plus a
             stand-in for the rest, where the method has them)

A pass is a way to choose blocks. A block always attends to itself; with later keys hidden it attends to the first block
too, and the last queries to all that they see. Hidden keys (padding) are never attended to, in a list or not.

Choosing costs time, and so does going through lists: short inputs run dense. That is decided by the length alone, once
for each compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, fx

from tokcompile.capture.sizes import equal
from tokcompile.errors import UnprofitableError
from tokcompile.families.sparse_attention.blocks.attend import BlockForm, block_attention, joint_attention
from tokcompile.families.sparse_attention.blocks.lists import BlockLists
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.formulas.mask import MaskForm, read_mask
from tokcompile.kernels.precision import as_autocast
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import Taken
from tokcompile.regions.model import AttentionRegion
from tokcompile.registry import PassParams, about
from tokcompile.rewrite.context import Context

#: Time of a product in a listed block, in products of dense attention. CPU, measured (docs/kernels.md: 9 heads of width
#: 64, fp32, two threads): all blocks by list take 1.5 to 1.7 times as long as dense attention. Not measured on CUDA.
LISTED = 1.7
#: The shortest length at which lists were measured; below it ``dense_below: auto`` stays dense whatever is predicted.
MEASURED = 4096


class BlockParams(PassParams):
    """What every choice of blocks has to be told."""

    block: int = Field(
        128,
        ge=1,
        description="Tokens of a block; a multiple of 16 for the Triton kernel.",
        json_schema_extra=about(unit="tokens", source="XAttention, FlexPrefill and Rectified SpaAttn: 128"),
    )
    dense_below: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Shorter inputs run dense; auto: those for which choosing and going through lists is predicted to "
        f"cost as much, and all below {MEASURED}.",
        json_schema_extra=about(unit="tokens"),
    )
    dense_layers: int = Field(
        0, ge=0, description="First layers that stay dense.", json_schema_extra=about(unit="layers")
    )


class BlockSelection(Pass):
    """Base of the passes: a subclass chooses blocks (:meth:`lists`)."""

    regions = "attention"
    last_tokens_choose = True  # the last queries are dense, or vote
    stage: ClassVar[Literal["any", "decode", "prefill"]] = "prefill"
    #: The attention that the choice is for: "causal", "both" (bidirectional), or "any".
    direction: ClassVar[Literal["causal", "both", "any"]] = "any"
    #: Whether :meth:`lists` gives a mass or a rest, which no attention with sinks can take.
    rectifies: ClassVar[bool] = False
    #: Whether a block of queries always attends to the keys of the same tokens.
    own: ClassVar[bool] = True
    #: Multiply-adds of the choice for each pair of tokens, in widths of a head: for the prediction of the gain.
    per_pair: ClassVar[float] = 0.0

    params: Any

    def lists(self, query: Tensor, key: Tensor, value: Tensor, form: BlockForm, *more: Tensor) -> BlockLists:
        """The blocks of keys that each block of queries attends to. Traceable.

        Args:
            query: [B, H, L, D]. key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv]. Of a joint sequence only the picture.
            form: see :class:`BlockForm`. Its ``visible`` must be heeded: hidden tokens hold anything.
            more: values of :meth:`inputs`.
        """
        raise NotImplementedError

    def inputs(
        self, ctx: Context, region: AttentionRegion, form: AttentionForm
    ) -> tuple[Sequence[fx.Node], dict[str, Any]]:
        """Nodes that :meth:`lists` takes beside query, key and value, and details for the report."""
        return (), {}

    def text(
        self, ctx: Context, region: AttentionRegion, form: AttentionForm
    ) -> tuple[fx.Node | int, int, bool] | None:
        """The text of a joint sequence: its length as a number, or a node and the axis that has it; whether it is
        first. None: there is none.
        """
        return None

    def dense_when(self, ctx: Context, region: AttentionRegion) -> fx.Node | None:
        """Node, bool of one element or [B]: whether this call attends to everything; None: it never does."""
        return None

    def last(self) -> int:
        """How many last queries attend to all that they see."""
        return 0

    def density(self) -> float:
        """The share of the blocks that is expected to be kept, for the prediction of the gain."""
        return 0.25

    def plan(self, ctx: Context, region: AttentionRegion) -> Taken:
        self._checked(ctx, region)
        return Taken()

    def apply(self, ctx: Context, region: AttentionRegion) -> dict[str, Any]:
        form, mask, least = self._checked(ctx, region)
        more, details = self.inputs(ctx, region, form)
        text, when = self.text(ctx, region, form), self.dense_when(ctx, region)
        if text is not None and form.sink is not None:
            raise ctx.refuse(form.output, "the softmax of a joint sequence has sinks, which this pass does not divide")
        place = ctx.layer(region)
        settings = BlockForm(
            form.scale,
            form.softcap,
            mask.causal,
            mask.window or 0,
            self.params.block,
            place[0] if place else 0,
            self.last(),
            self.own,
        )
        length = text[0] if text is not None and isinstance(text[0], fx.Node) else None
        named = {"visible": mask.keys, "sink": form.sink, "text": length, "dense": when}
        names = [name for name, node in named.items() if node is not None]

        def attention(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=False))
            others = values[len(names) :]
            query, key, value = as_autocast(query, key, value)
            dense = given.get("dense")
            inner = replace(
                settings,
                visible=given.get("visible"),
                dense=None if dense is None else dense.reshape(-1, 1, 1, 1),
            )

            def choose(query: Tensor, key: Tensor, value: Tensor, form: BlockForm) -> BlockLists:
                return self.lists(query, key, value, form, *others)

            if text is None:
                return block_attention(query, key, value, inner, choose, given.get("sink"))
            size = given["text"].shape[text[1]] if "text" in given else text[0]
            return joint_attention(query, key, value, inner, choose, size, text[2], given.get("sink"))

        nodes = [node for node in named.values() if node is not None]
        form.replace(ctx, attention, form.query, form.key, form.value, *nodes, *more)
        return {"block": self.params.block, "dense_below": least, **details}

    def _checked(self, ctx: Context, region: AttentionRegion) -> tuple[AttentionForm, MaskForm, int]:
        """The attention, its mask, and the length from which on it runs sparse.

        Raises:
            NarrowError, UnprofitableError: it stays dense.
        """
        output, place = region.output, ctx.layer(region)
        alone = (
            "expected an attention within one sequence, all of it in this call; with keys of a cache, or of another "
        )
        if region.cross or equal(region.queries, 1):
            raise ctx.refuse(output, alone + "sequence, it stays dense")
        form = read_attention(ctx, region)
        if not equal(form.query.meta["val"].shape[2], form.key.meta["val"].shape[2]):
            raise ctx.refuse(output, alone + "sequence, it stays dense")
        heads, kv_heads = form.heads
        if heads % kv_heads:
            raise ctx.refuse(output, f"{heads} query heads cannot share {kv_heads} key heads")
        mask = read_mask(ctx, form)
        if mask.rest is not None:
            raise ctx.refuse(
                output,
                "the mask adds a bias to the scores (ALiBi, relative positions), or hides other pairs than later keys, "
                "a window and padding; the attention over blocks knows only these",
            )
        self._check_direction(ctx, output, mask)
        if form.sink is not None and self.rectifies:
            raise ctx.refuse(output, "the softmax has sinks, and this method scales what it gives")
        least = self._gate(region, form, mask.causal)
        if place is not None and place[0] < self.params.dense_layers:
            raise UnprofitableError(
                f"layer {place[0]} is among the first {self.params.dense_layers}, which stay dense (dense_layers)",
                path=region.path,
                source=region.source,
            )
        return form, mask, least

    def _check_direction(self, ctx: Context, output: fx.Node, mask: MaskForm) -> None:
        if mask.causal and self.direction == "both":
            raise ctx.refuse(output, "later keys are hidden here; this choice of blocks is for attention both ways")
        if not mask.causal and self.direction == "causal":
            raise ctx.refuse(
                output, "a bidirectional attention; this choice of blocks is for attention that hides later keys"
            )

    def _gate(self, region: AttentionRegion, form: AttentionForm, causal: bool) -> int:
        """Raise where dense attention serves inputs of this length better; puts a guard on the length."""
        least, output = self.params.dense_below, form.output
        if least == "auto":
            seen = 1.0 if causal else 2.0  # widths of a head for each pair of tokens, both products
            saved = seen * (1 - LISTED * self.density()) - self.per_pair
            if saved <= 0:
                raise UnprofitableError(
                    f"choosing blocks and attending to {self.density():.0%} of them is predicted to cost as much as "
                    "dense attention at any length; set dense_below to run it all the same",
                    node=output.name,
                    path=region.path,
                    source=region.source,
                )
            least = MEASURED
        if bool(form.query.meta["val"].shape[2] < least):  # a symbolic length: compiled anew on the other side
            raise UnprofitableError(
                f"inputs shorter than {least} tokens run dense, where choosing blocks is not expected to pay "
                f"(dense_below: {self.params.dense_below})",
                node=output.name,
                path=region.path,
                source=region.source,
            )
        return int(least)
