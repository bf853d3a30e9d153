"""Merge image patches that are alike inside a vision encoder, at a few depths: nothing is lost, it is averaged.

    before   [class | patches] -> layer 0 .. L-1
    after    [class | patches] -> layers -> each even patch finds its likest odd one -> the likest pairs become their
             mean -> layers on fewer tokens -> ... -> each patch takes the token it is in

Likeness is the cosine of the keys of the last attention, averaged over heads. Patches with an even number may merge
into patches with an odd number, and several into one, so a stage keeps at least half; with ``reach: 1`` into neighbours
only (frames of speech, say). A merged token is the mean of all patches in it, and with ``size_bias`` later layers
attend to it as to that many: the logarithm of the number is added to its logits. With ``restore`` what leaves the
layers has all patches, each with the token it is in: maps keep their grid, and a mean over patches, or the cross
attention of a decoder, weighs each of them once. Kept ratios are fixed, so shapes stay static; nothing is trained.

Source: bipartite matching and proportional attention of "Token Merging: Your ViT But Faster", ICLR 2023, arXiv
2210.09461; neighbours only as in "Accelerating Transducers through Adjacent Token Merging", arXiv 2306.16009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from tokcompile.families.pruning.patches import PatchParams, PatchSelection
from tokcompile.families.scores import Scores
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.kernels.precision import matmul
from tokcompile.regions.model import AttentionRegion, EncoderRegion, Layer
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import keep_mask, segment_positions


@register
class PatchMerge(PatchSelection):
    """Replace pairs of patches that are alike by their mean."""

    name = "patch_merge"
    changes_tokens = True

    class Params(PatchParams):
        size_bias: bool = Field(True, description="Attend to a merged token as to the number of patches in it.")
        restore: bool = Field(
            True,
            description="Give each patch the token it is in where tokens leave the layers; else fewer tokens leave.",
        )
        reach: int | None = Field(
            None,
            ge=1,
            description="Merge with patches at most so many places away, along the "
            "axis as it is at that stage; left out, with any.",
            json_schema_extra=about(unit="places", source="1 in arXiv 2306.16009, for speech"),
        )

        @model_validator(mode="after")
        def _half(self) -> PatchMerge.Params:
            if any(not keep.is_count and 2 * keep.num < keep.den for keep in self.keep):
                raise ValueError("a stage of patch_merge keeps at least half (0.5): use more stages")
            return self

    def apply(self, ctx: Context, region: EncoderRegion) -> dict[str, Any]:
        if self.params.size_bias:
            for layer in region.layers:
                if layer.attention is not None:
                    self._form(ctx, layer.attention)
        return super().apply(ctx, region)

    def _form(self, ctx: Context, attention: AttentionRegion) -> AttentionForm:
        form = read_attention(ctx, attention)
        if form.softcap or form.sink is not None or form.causal:
            raise ctx.refuse(
                form.output,
                "attention with a soft cap, sinks or a causal order cannot be told how many "
                "patches a token stands for; set size_bias: false",
            )
        return form

    def check_layer(self, ctx: Context, layer: Layer) -> None:
        if layer.attention is None:
            raise ctx.refuse(layer.output, f"layer {layer.index} has no attention whose keys tell what is alike")

    def inputs(self, ctx: Context, layer: Layer, prefix: int) -> list[fx.Node]:
        assert layer.attention is not None
        key = layer.attention.key
        if key.meta["val"].dim() != 4:
            raise ctx.refuse(key, "attention with batch and heads flattened together gives no keys to compare")
        return [key, *ctx.shared.get((self, layer.output), ())]

    def score(
        self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int, *inputs: Tensor
    ) -> Scores:
        key, *sizes = inputs
        like = key.to(torch.float32).mean(1)
        means, values, into, members = merged(tokens, like, segment, budget, *sizes, reach=self.params.reach)
        return Scores(values, tokens=means, carried={"sizes": members}, into=into)

    def below(
        self,
        ctx: Context,
        region: EncoderRegion,
        layers: Sequence[Layer],
        kept: fx.Node,
        carried: Mapping[str, fx.Node],
    ) -> None:
        sizes = carried["sizes"]
        sizes = ctx.emit(lambda size, index: size.gather(1, index), sizes, kept, before=ctx.after(sizes, kept))
        ctx.shared[self, layers[-1].output] = (sizes,)  # the next stage goes on from these
        for layer in layers:
            if self.params.size_bias and layer.attention is not None:
                _bias(ctx, self._form(ctx, layer.attention), sizes)


def _bias(ctx: Context, form: AttentionForm, sizes: fx.Node) -> None:
    """Add the logarithm of ``sizes [B, S]`` to the logits of each key."""

    def attend(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = torch.log(sizes).to(query.dtype)[:, None, None]
        if mask is not None:
            bias = bias.masked_fill(torch.logical_not(mask), float("-inf")) if mask.dtype == torch.bool else bias + mask
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, bias, scale=form.scale, enable_gqa=query.shape[1] != key.shape[1]
        )

    mask = () if form.mask is None else (form.mask,)
    form.replace(ctx, attend, form.query, form.key, form.value, sizes, *mask)


def merged(
    tokens: Tensor,
    like: Tensor,
    segment: Tensor,
    budget: Tensor,
    sizes: Tensor | None = None,
    *,
    reach: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average what is to go into what stays.

    Args:
        tokens: ``[B, S, D]``. like: ``[B, S, E]``, compared by cosine. segment, budget: as in ``PatchSelection.score``.
        sizes: fp32 ``[B, S]``, how many patches each token stands for; default: one.
        reach: partners are at most so many places apart; default: any.

    Returns:
        The new tokens; scores ``[B, S]``, larger is kept first; int64 ``[B, S]``, the place of the token that each is
        in; the new sizes (of those that go: as before).
    """
    like = like / (torch.linalg.vector_norm(like, dim=-1, keepdim=True) + 1e-8)
    odd = torch.remainder(segment_positions(segment), 2)
    gives, takes = torch.logical_and(segment >= 0, odd == 0), torch.logical_and(segment >= 0, odd == 1)
    cosine = matmul(like, like.transpose(1, 2)).masked_fill(torch.logical_not(takes)[:, None], -2.0)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    if reach is not None:
        cosine = cosine.masked_fill((index[:, None] - index).abs() > reach, -2.0)
    best = cosine.amax(2)
    partner = torch.where(cosine == best[..., None], index, tokens.shape[1] - 1).amin(2)  # of equals, the first
    scores = torch.where(gives, -best, 2.0)
    goes = torch.logical_not(keep_mask(scores, segment, budget))
    goes = torch.logical_and(goes, gives)
    sizes = torch.ones_like(best) if sizes is None else sizes
    given = torch.where(goes, sizes, 0.0)
    target = torch.where(goes, partner, index)
    weighed = tokens.to(torch.float32) * sizes[..., None]
    total = weighed.scatter_add(1, target[..., None].expand_as(tokens), tokens.to(torch.float32) * given[..., None])
    members = sizes.scatter_add(1, target, given)
    new = torch.where((members > sizes)[..., None], (total / members[..., None]).to(tokens.dtype), tokens)
    return new, scores, target, members
