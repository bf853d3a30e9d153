"""Token Sparse Attention: in chosen layers every head attends among tokens of its own choice (prefill).

    before   query, key, value [B, H, L, D] -> causal attention -> output
    after    the last `window` queries score all keys -> each head keeps the best K tokens and the window
             query, key, value of these -> causal attention [B, H, K + window, D] -> back to their places, 0 elsewhere

A token that a head did not choose passes the layer through the residual stream. The cache is filled in full before, so
decoding stays dense. Which layers: the calmest half by relative change of the residual stream, if calibration
measured it, else the upper half of the stack. Short inputs run dense, where choosing costs more than it saves.

Source: "Token Sparse Attention", arXiv 2602.03216. The dense gate and batches of more than one are this project's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tokcompile.capture.sizes import equal
from tokcompile.errors import CalibrationError, UnprofitableError
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.formulas.mask import MaskForm, read_mask
from tokcompile.kernels.precision import as_autocast
from tokcompile.kernels.token_sparse_attention import op as _ops  # noqa: F401  registers the operation
from tokcompile.plan.pass_base import Pass, Seen
from tokcompile.plan.plan import Taken
from tokcompile.regions.model import AttentionRegion, DecoderStack, Layer
from tokcompile.regions.places import layers_meant
from tokcompile.registry import PassParams, about, register
from tokcompile.rewrite.context import Context

#: Share of the tokens that the paper's coverage keeps in a sparse layer, for the prediction of the gain. Its attention
#: maps lose 17 % at 4K and 54 % at 128K, a share of 0.91 and 0.68 of the tokens; the gate takes that of short inputs.
EXPECTED = 0.91
#: Cost of gathering and scattering one number, in multiply-adds, with all else that is not a product: measured on a CPU
#: (docs/kernels.md: 4,096 tokens, 68 % kept, 9 heads of width 64, fp32, one thread: 257 ms against 425 ms dense, where
#: the products alone would take 242 ms). Not measured on CUDA. ``min_length`` overrides what follows from it.
OVERHEAD = 32.0


def break_even(width: int, window: int, least: int, keep: float) -> int:
    """The length from which on a sparse layer does less work than a dense one.

    Causal attention costs ``2 L^2 D`` for each head. Sparse: two passes of the window, ``4 window L D`` and half of
    that again; ``2 K^2 D``; and the moves, ``OVERHEAD`` multiply-adds x 2 for each of the ``5 L D`` numbers.
    """
    length = least + window + 1
    while length < 1 << 22:
        kept = max(least, (keep or EXPECTED) * (length - window)) + window
        sparse = 6 * window * length + 2 * kept * kept + 2 * OVERHEAD * 5 * length
        if sparse < 2 * length * length:
            return length
        length = math.ceil(length * 1.02)
    return length


@register
class TokenSparse(Pass):
    """Let each head of chosen layers attend among the tokens that the last queries look at most."""

    name = "token_sparse"
    regions = "attention"
    stage = "prefill"
    calibration = "optional"
    last_tokens_choose = True

    class Params(PassParams):
        coverage: float = Field(
            0.005,
            ge=0,
            lt=1,
            description="Share of the last queries' attention that the dropped tokens may hold.",
            json_schema_extra=about(unit="share of the attention", source="0.005 for Llama 3.1 8B; 0.010 aggressive"),
        )
        keep: float | None = Field(
            None,
            gt=0,
            le=1,
            description="Share of the tokens that each head keeps, instead of coverage.",
            json_schema_extra=about(unit="share of the tokens"),
        )
        window: int = Field(
            128,
            ge=1,
            description="Last tokens: they choose, and are kept.",
            json_schema_extra=about(unit="tokens", source="the paper's code"),
        )
        least: int = Field(
            1024,
            ge=0,
            description="Fewest tokens that a head keeps besides the window.",
            json_schema_extra=about(unit="tokens", source="the paper's code"),
        )
        pool: int = Field(
            7,
            ge=1,
            description="Width of the average over neighbouring scores; odd.",
            json_schema_extra={**about(unit="tokens", source="the paper's code"), "not": {"multipleOf": 2}},
        )
        calm: float = Field(
            0.5,
            gt=0,
            le=1,
            description="Share of the layers that become sparse: those that change the residual "
            "stream least; without calibration the upper ones.",
            json_schema_extra=about(unit="share of the layers", source="the paper's quantile of 0.5"),
        )
        select: Literal["attention", "random"] = Field(
            "attention", description="What chooses the tokens: the attention of the window, or chance (a baseline)."
        )
        min_length: int | None = Field(
            None,
            ge=0,
            description="Shortest input that runs sparse; left out: from which it costs less than dense.",
            json_schema_extra=about(unit="tokens"),
        )

        @field_validator("pool")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError(f"should be odd, so that the average has a middle, found {value}")
            return value

    def observe(self, ctx: Context, region: AttentionRegion, seen: Seen) -> None:
        layer = _layer(ctx, region)
        if layer is None:
            raise ctx.refuse(region.output, "the attention is in no stack of layers, so its layer cannot be measured")
        if not _is_prefill(ctx, region):
            raise ctx.refuse(region.output, "a step with a cache is no prefill; calibrate with whole inputs")

        def add(before: Tensor, after: Tensor) -> None:
            one, other = before.float(), after.float()
            drift = (other - one).norm(dim=-1) / (one.norm(dim=-1) + 1e-8)
            seen.sums["drift"] = seen.sums.get("drift", 0.0) + float(drift.double().sum())
            seen.sums["tokens"] = seen.sums.get("tokens", 0) + drift.numel()

        ctx.observe(add, layer.input, layer.output)

    def prepare(self, seen: dict[str, Seen]) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        drift = {key: s.sums["drift"] / s.sums["tokens"] for key, s in seen.items() if s.sums.get("tokens")}
        if not drift:
            raise CalibrationError("token_sparse: no prefill was seen; calibrate with whole inputs")
        limit = float(torch.tensor(list(drift.values()), dtype=torch.float64).quantile(self.params.calm))
        return {key: ({}, {"drift": value, "limit": limit}) for key, value in drift.items()}

    def plan(self, ctx: Context, region: AttentionRegion) -> Taken:
        self._checked(ctx, region)
        return Taken()

    def _checked(self, ctx: Context, region: AttentionRegion) -> tuple[AttentionForm, MaskForm, int, float | None]:
        """The attention, its mask, the length from which on it runs sparse, and the drift of its layer.

        Raises:
            NarrowError, UnprofitableError: it stays dense.
        """
        output = region.output
        if region.cross or not _is_prefill(ctx, region):
            raise ctx.refuse(
                output,
                "expected an attention within one sequence, all of it in this call; with keys of "
                "a cache, or of another sequence, it stays dense",
            )
        drift = self._choose(ctx, region)
        form = read_attention(ctx, region)
        shape = read_mask(ctx, form)
        if not shape.causal and shape.rest is None:
            raise ctx.refuse(
                output, "a bidirectional attention: what the last queries look at says nothing about the others"
            )
        if not shape.causal and not _under_pruning(ctx, region):
            raise ctx.refuse(output, "the mask does not show that later tokens are hidden")
        if form.sink is not None:
            raise ctx.refuse(output, "the softmax has sinks, which this pass does not carry over")
        p, width = self.params, int(form.query.meta["val"].shape[3])
        least = p.min_length
        if least is None:
            least = break_even(width, p.window, p.least, p.keep or 0.0)
        length = form.query.meta["val"].shape[2]
        if bool(length < least):  # a symbolic length: the graph is compiled anew on the other side
            raise UnprofitableError(
                f"inputs shorter than {least} tokens run dense: choosing would cost more than it saves (min_length "
                "overrides)",
                node=output.name,
                path=region.path,
                source=region.source,
            )
        return form, shape, least, drift

    def apply(self, ctx: Context, region: AttentionRegion) -> dict[str, Any]:
        p, (form, shape, least, drift) = self.params, self._checked(ctx, region)
        settings = (
            form.scale,
            form.softcap,
            shape.window or 0,
            p.coverage,
            p.keep or 0.0,
            p.least,
            p.window,
            p.pool,
            (ctx.layer(region) or (0, 0))[0] if p.select == "random" else -1,
            shape.causal,
        )
        names = [n for n, node in (("keys", shape.keys), ("mask", shape.rest)) if node is not None]
        extra = [node for node in (shape.keys, shape.rest) if node is not None]

        def sparse(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
            given = dict(zip(names, masks, strict=True))
            query, key, value = as_autocast(query, key, value)
            return torch.ops.tokcompile.token_sparse_attention(  # type: ignore[no-any-return]
                query, key, value, given.get("keys"), given.get("mask"), *settings
            )

        form.replace(ctx, sparse, form.query, form.key, form.value, *extra)
        return {"min_length": least, "select": p.select, **({} if drift is None else {"drift": drift})}

    def _choose(self, ctx: Context, region: AttentionRegion) -> float | None:
        """Raise unless this layer is among the sparse ones; its drift where calibration measured it."""
        where = ctx.key(region)
        if ctx.prepared is not None and ctx.prepared.has(self.name, where):
            facts = ctx.prepared.facts[self.name, where]
            if facts["drift"] > facts["limit"]:
                raise UnprofitableError(
                    f"its layer changes the residual stream by {facts['drift']:.3g} of its norm, "
                    f"more than the {facts['limit']:.3g} of the calm ones; it stays dense",
                    path=region.path,
                    source=region.source,
                )
            return float(facts["drift"])
        place = ctx.layer(region)
        if place is not None and place[0] < place[1] - layers_meant(self.params.calm, place[1]):
            raise UnprofitableError(
                f"layer {place[0]} of {place[1]} is not among the upper {self.params.calm:g}, "
                "which become sparse without calibration; it stays dense",
                path=region.path,
                source=region.source,
            )
        return None


def _layer(ctx: Context, region: AttentionRegion) -> Layer | None:
    return next(
        (layer for stack in ctx.regions.of(DecoderStack) for layer in stack.layers if layer.attention is region),
        None,
    )


def _is_prefill(ctx: Context, region: AttentionRegion) -> bool:
    """As many queries as keys, and more than one."""
    return equal(region.queries, region.keys) and not equal(region.queries, 1)


def _under_pruning(ctx: Context, region: AttentionRegion) -> bool:
    """Whether an earlier step removed tokens here: its mask is cut out of a causal one."""
    return bool(ctx.cuts.kept) and region.mask is not None and region.causal
