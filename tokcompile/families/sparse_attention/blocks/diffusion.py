"""What choices of blocks for diffusion transformers share: the text of joint sequences, dense first steps."""

from __future__ import annotations

import re

from pydantic import Field
from torch import Tensor, fx

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
        named = [n for n in ctx.captured.placeholders if _argument(n) == p.timestep]
        if len(named) != 1 or not isinstance(named[0].meta.get("val"), Tensor):
            known = sorted({_argument(n) for n in ctx.captured.placeholders} - {""})
            raise ctx.refuse(
                region.output,
                f"no tensor argument {p.timestep!r}, which dense_from needs; this graph takes "
                f"{', '.join(known) or 'none'}",
            )
        if named[0].meta["val"].dim() > 1:
            raise ctx.refuse(
                named[0], f"expected one timestep, or one for each row, found {named[0].meta['val'].shape}"
            )
        start = p.dense_from
        node: fx.Node = ctx.emit_once(f"dense from {start}", lambda t: t >= start, named[0])
        return node


def _argument(node: fx.Node) -> str:
    """The name of the model's argument that an input of the graph is; "" for weights and sizes."""
    found = re.fullmatch(r"l_(?:kwargs_|args_)?(\w+?)_*", str(node.meta.get("argument", "")).lower())
    return found[1] if found and not re.search("(_parameters|_buffers|_modules)_", found[1]) else ""
