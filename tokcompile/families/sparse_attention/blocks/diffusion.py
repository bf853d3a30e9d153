"""What choices of blocks for diffusion transformers share: the text of joint sequences, dense first steps."""

from __future__ import annotations

from pydantic import Field
from torch import fx

from tokcompile.families.sparse_attention.blocks.arguments import argument
from tokcompile.families.sparse_attention.blocks.base import BlockParams, BlockSelection
from tokcompile.families.sparse_attention.blocks.joint import find_text
from tokcompile.formulas.attention import AttentionForm
from tokcompile.regions.model import AttentionRegion
from tokcompile.registry import about
from tokcompile.rewrite.context import Context


class DiffusionParams(BlockParams):
    """What every choice of blocks for diffusion transformers has to be told."""

    text_tokens: int | None = Field(
        None,
        ge=0,
        description="Tokens of a joint sequence that are text, always attended to; left out: found in the graph, where "
        "text and picture are joined.",
        json_schema_extra=about(unit="tokens"),
    )
    text_first: bool = Field(False, description="With text_tokens: the text stands in front of the picture.")
    timestep: str = Field("timestep", description="The argument of the model that holds the noise level or timestep.")
    dense_from: float | None = Field(
        None,
        description="Steps whose timestep is at least this attend to everything: the first ones, where the picture "
        "takes shape; left out: none does.",
        json_schema_extra=about(unit="timestep", source="the first 10 to 20 % of the steps in the papers"),
    )


class DiffusionBlocks(BlockSelection):
    """Base of the passes: :class:`BlockSelection` for attention in both directions, with text that is always kept."""

    stage = "any"
    direction = "both"

    def text(
        self, ctx: Context, region: AttentionRegion, form: AttentionForm
    ) -> tuple[fx.Node | int, int, bool] | None:
        p = self.params
        if p.text_tokens is not None:
            if bool(form.key.meta["val"].shape[2] <= p.text_tokens):
                raise ctx.refuse(form.output, f"all tokens of this sequence are text (text_tokens: {p.text_tokens})")
            return (p.text_tokens, 0, p.text_first) if p.text_tokens else None
        found = find_text(ctx, form)
        return None if found is None else (found.node, found.axis, found.first)

    def dense_when(self, ctx: Context, region: AttentionRegion) -> fx.Node | None:
        p = self.params
        if p.dense_from is None:
            return None
        named = argument(ctx, region, p.timestep, "dense_from")
        if named.meta["val"].dim() > 1:
            raise ctx.refuse(named, f"expected one timestep, or one for each row, found {named.meta['val'].shape}")
        start = p.dense_from
        node: fx.Node = ctx.emit_once(f"dense from {start}", lambda t: t >= start, named)
        return node
