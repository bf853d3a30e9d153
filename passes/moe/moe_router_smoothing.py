"""Routing that couples the tokens of a sequence, in models that are mixtures of experts already.

    before   router -> softmax = r [N, E] -> top-k -> experts
    after    router -> softmax = r -> r + strength * (S r - r) -> top-k -> experts

``S`` [N, N] says which other tokens a token listens to: ``attention``: the weights of the attention of the same layer,
mean over its heads; ``similarity``: the softmax of the cosines between the inputs of the router, divided by a
temperature, over the tokens that the attention lets it see. So masks, padding and causality are those of the attention.
The weights of the chosen experts follow the model's own convention, on the smoothed probabilities. S r is an attention
with r as values, so ``S`` need not be stored.

Nothing gets smaller. Tokens that resemble each other choose more alike; a model that was trained without this needs
fine-tuning, and at strength 0 it is what it was. Only tokens of the same call are coupled: a decode step with a cache
routes as before, because the routing of earlier tokens is not kept, so cached decoding differs from one forward.

Source: "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv 2505.00792, as far as its abstract
says: the formulas above are this project's reading of it, not the paper's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional

from tokcompile.capture.ops import LAYOUT, SOFTMAX, TRIVIAL
from tokcompile.capture.sizes import dims_of, equal
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.kernels.precision import matmul
from tokcompile.plan.pass_base import Pass
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import AttentionRegion, MoeRegion
from tokcompile.registry import PassParams, about, register
from tokcompile.rewrite.context import Context


@register
class MoeRouterSmoothing(Pass):
    """Mix the routing probabilities of tokens that attend to each other, or resemble each other."""

    name = "moe_router_smoothing"
    regions = "moe"

    class Params(PassParams):
        by: Literal["similarity", "attention"] = Field("similarity", description="What couples the tokens.")
        strength: float = Field(0.5, ge=0, le=1, description="Share of the smoothed routing; 0: the model as it is.")
        temperature: float = Field(
            0.1,
            gt=0,
            description="Of the cosines (similarity only).",
            json_schema_extra=about(unit="cosine", source="this project's choice"),
        )

    def apply(self, ctx: Context, region: MoeRegion) -> dict[str, Any]:
        top = region.top_k
        probabilities = self._is_softmax(ctx, region, top)
        form = read_attention(ctx, self._attention(ctx, region))
        self._check(ctx, form, region)
        by, strength, temperature = self.params.by, self.params.strength, self.params.temperature
        operands: dict[str, fx.Node] = {"scores": top.args[0], "x": region.input}  # type: ignore[dict-item]
        if by == "attention":
            operands |= {"query": form.query, "key": form.key}
        if form.mask is not None:
            operands["mask"] = form.mask

        def smooth(*values: Tensor) -> Tensor:
            v = dict(zip(operands, values, strict=True))
            x = v["x"]
            scores = v["scores"].reshape(*x.shape[:2], v["scores"].shape[-1])
            own = scores.float() if probabilities else scores.float().softmax(-1)
            if by == "attention":
                query, key, scale, softcap = v["query"], v["key"], form.scale, form.softcap
            else:
                query = key = functional.normalize(x.float(), dim=-1).unsqueeze(1)
                scale, softcap = 1 / temperature, 0.0
            other = coupled(query.float(), key.float(), own, v.get("mask"), form.causal, scale, softcap)
            mixed = own + strength * (other - own)
            return (mixed if probabilities else mixed.log()).to(scores.dtype).reshape(v["scores"].shape)

        top.replace_input_with(operands["scores"], ctx.emit(smooth, *operands.values(), before=top))
        return {"by": by, "strength": strength, "decode": "steps with a cache route as before"}

    def _is_softmax(self, ctx: Context, region: MoeRegion, top: fx.Node) -> bool:
        """Whether the choice is made among probabilities, not logits."""
        flow, node = Flow(ctx.captured.graph), top.args[0]
        while node is not region.router:
            if flow.op[node] in SOFTMAX:
                return True
            if flow.op[node] not in TRIVIAL | LAYOUT or len(flow.inputs[node]) != 1:  # type: ignore[index]
                raise ctx.refuse(
                    node,  # type: ignore[arg-type]
                    "expected a choice among logits of the router or their softmax, found "
                    f"{flow.op[node]} in between (sigmoid scores, a bias, groups)",
                )
            node = flow.inputs[node][0]  # type: ignore[index]
        return False

    def _attention(self, ctx: Context, region: MoeRegion) -> AttentionRegion:
        for stack in ctx.regions.stacks:
            for layer in stack.layers:
                if layer.feed_forward is region and layer.attention is not None:
                    return layer.attention
        raise ctx.refuse(
            region.router,
            "no attention is known in the layer of this mixture of experts; it says which tokens belong together",
        )

    def _check(self, ctx: Context, form: AttentionForm, region: MoeRegion) -> None:
        x, node = region.input, region.router
        batch, length = form.query.meta["val"].shape[0], form.query.meta["val"].shape[2]
        if not equal(form.key.meta["val"].shape[2], length):
            raise ctx.refuse(
                node, "the attention reads keys of a cache, whose routing is not kept; this call routes as before"
            )
        if x.meta["val"].dim() != 3 or dims_of(x.meta["val"].shape[:2]) != dims_of((batch, length)):
            raise ctx.refuse(node, f"expected tokens [B, S, D] as in the attention, found {tuple(x.meta['val'].shape)}")
        if form.sink is not None:
            raise ctx.refuse(node, "attention sinks take a part of the weights")
        if form.mask is not None and self.params.by == "similarity":
            mask = form.mask.meta["val"]
            if mask.dim() == 4 and mask.shape[1] != 1:
                raise ctx.refuse(node, "the mask differs from head to head; use by: attention")


def coupled(
    query: Tensor, key: Tensor, own: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
) -> Tensor:
    """S r, mean over heads: [B, S, E]; what attends to nothing keeps its own.

    Args:
        query: [B, H, S, D]. key: [B, Hkv, S, D]. own: [B, S, E], rows that sum to 1.
        mask: bool or float, broadcast to [B, H, S, S].
    """
    heads = query.shape[1]
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    values = own.unsqueeze(1).expand(-1, heads, -1, -1)
    if softcap:
        logits = softcap * torch.tanh(matmul(query.to(key.dtype), key.transpose(-1, -2)) * (scale / softcap))
        if mask is not None:
            logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -torch.inf)
        found = matmul(logits.softmax(-1).to(values.dtype), values)
    else:
        found = functional.scaled_dot_product_attention(query, key, values, mask, is_causal=causal, scale=scale)
    mean = found.mean(1)
    return torch.where(mean.sum(-1, keepdim=True) > 0.5, mean, own)
