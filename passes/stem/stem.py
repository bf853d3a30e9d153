"""STEM: a table indexed by token id in the place of the up-projection of a gated feed-forward layer.

    before   x -> gate -> act --+
             x -> up ---------- * -> down
    after    x -> gate -> act --+
             id -> table[id] -- * -> down

A third of the multiply-adds of the layer go, and the up-projection is not read; what is read instead is one row per
token. A context-free table can only hold what depends on the token itself, so first layers fit best; which layers are
converted is decided by how much of the up-projection the table explains on held-out calibration sequences.

Tokens without a row (ids that calibration never met, images, empty slots) take the dense up-projection
(``fallback: dense``), or a mean row (``fallback: mean``; images stay dense). The first tokens of a text stay dense too
(``dense_first``): all others use them as attention sink, and what they carry depends on their place more than on their
id.

With ``table: host`` the tables stay in host memory wherever the model is moved. The ids of a call are copied to the
host once, each layer's rows start on their way as soon as the ids are known, and a layer waits for its own where it
needs them (``tokcompile.kernels.host_rows``). Such tables are not trained.

Source: "STEM: Scaling Transformers with Embedding Modules", arXiv 2601.10639, trains such models from scratch. Making
the tables from a trained model by calibration is this project's own (see ``tokcompile.token_table``); expect it to hurt
without training afterwards.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from tokcompile.capture.graph import erase
from tokcompile.errors import CalibrationError, UnprofitableError
from tokcompile.families.stem import token_table
from tokcompile.formulas import feed_forward as ffn
from tokcompile.formulas.token_ids import first_for, ids_for
from tokcompile.kernels.activation import activate
from tokcompile.kernels.embedding_gate import embedding_gate, rows
from tokcompile.kernels.host_rows import await_rows, fetch_rows, unique_ids
from tokcompile.kernels.linear_where import linear_where
from tokcompile.plan.pass_base import Pass, Seen
from tokcompile.plan.plan import Taken
from tokcompile.regions.model import FeedForwardRegion
from tokcompile.regions.places import layers_meant
from tokcompile.registry import PassParams, about, register
from tokcompile.rewrite.context import Context


@register
class Stem(Pass):
    """Replace up-projections of gated feed-forward layers by tables of token ids.

    One class: what is prepared is what the rewrite reads, and a method is one class.
    """

    name = "stem"
    regions = "feed_forward"
    calibration = "required"

    class Params(PassParams):
        convert: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)] = Field(
            1.0,
            description="Layers that are converted, of those that target.layers names: those whose table explains "
            "most of the up-projection.",
            json_schema_extra=about(unit="share, or number of layers", source="the paper trains 1/3, 1/2 and all"),
        )
        shrinkage: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
            "auto",
            description="Weight of the prior of a row; auto chooses it on held-out sequences.",
            json_schema_extra=about(unit="tokens"),
        )
        held_out: int = Field(8, ge=0, description="Every n-th calibration sequence scores the tables; 0: none does.")
        min_count: int = Field(
            1,
            ge=1,
            description="Ids that came less often in calibration get no row.",
            json_schema_extra=about(unit="tokens"),
        )
        vocabulary: Literal["seen", "all"] = Field(
            "seen", description="Rows for the ids that calibration met, or predicted rows for all others too."
        )
        max_rows: int = Field(65536, ge=1, description="Most ids that calibration keeps sums for, by first occurrence.")
        fallback: Literal["dense", "mean"] = Field(
            "dense", description="What a token without a row gets: its dense up-projection, or the mean row."
        )
        dense_first: int = Field(
            1,
            ge=0,
            description="First visible tokens of a row, which keep their dense up-projection.",
            json_schema_extra=about(unit="tokens"),
        )
        table: Literal["model", "host"] = Field(
            "model",
            description="Where the tables are: with the model, or in host memory, from where the rows of a "
            "call are copied while other layers compute; such tables cannot be trained.",
        )

    def observe(self, ctx: Context, region: FeedForwardRegion, seen: Seen) -> None:
        formula = self._formula(ctx, region)
        assert formula.gate is not None
        ids, table, _ = ids_for(ctx, region, formula.up.node)
        if self.params.dense_first:
            first_for(ctx, region, self.params.dense_first)  # refuses now what apply would refuse
        seen.weights = {"embedding": ctx.real(table), **formula.weights(ctx)}
        seen.facts["activation"] = formula.activation
        vocabulary, every = seen.weights["embedding"].shape[0], self.params.held_out
        gate, up = formula.gate, formula.up

        def add(ids: Tensor, gates: Tensor, ups: Tensor) -> None:
            sequences = ids.shape[0] if ids.ndim == 2 else 1
            number = seen.sums.get("sequences", 0) + torch.arange(sequences, device=ids.device)
            seen.sums["sequences"] = seen.sums.get("sequences", 0) + sequences
            held = number % every == every - 1 if every else number < 0
            held = held.repeat_interleave(ids.numel() // sequences)
            flat = [v.reshape(-1, v.shape[-1]).narrow(-1, p.start, p.size) for v, p in ((gates, gate), (ups, up))]
            token_table.accumulate(
                seen.sums,
                ids.reshape(-1),
                activate(flat[0], formula.activation),
                flat[1],
                held,
                vocabulary,
                self.params.max_rows,
            )

        ctx.observe(add, ids, gate.node, up.node)

    def prepare(self, seen: dict[str, Seen]) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        fitted = {}
        for key, layer in seen.items():
            try:
                fitted[key] = token_table.fit(
                    layer.sums,
                    layer.weights["embedding"],
                    layer.weights["down"],
                    least=self.params.min_count,
                    shrinkage=None if self.params.shrinkage == "auto" else self.params.shrinkage,
                    every_id=self.params.vocabulary == "all",
                )
            except ValueError as error:
                raise CalibrationError(f"stem: {key}: {error}; calibrate with text that runs through it") from error
        ranked = sorted(fitted, key=lambda key: (-_score(fitted[key]), seen[key].layer or 0))
        chosen = set(ranked[: layers_meant(self.params.convert, len(ranked))])
        result: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        for key, table in fitted.items():
            like = seen[key].weights["up"]
            facts: dict[str, Any] = {
                "explained": None if math.isnan(table.score) else round(table.score, 4),
                "prior": table.prior,
                "shrinkage": table.shrinkage,
                "tokens": table.tokens,
                "rows": len(table.rows),
                "converted": key in chosen,
                "of": len(chosen),
            }
            tensors: dict[str, Tensor] = {}
            if key in chosen:
                tensors = {
                    "table": nn.Parameter(table.rows.to(like)),
                    "remap": table.remap.to(like.device),
                    "mean": nn.Parameter(table.mean.to(like)),
                }
                if self.params.table == "host":
                    tensors |= {"table": table.rows.to("cpu", like.dtype), "remap": table.remap.cpu()}
                    facts["host"] = ["table", "remap"]
            result[key] = tensors, facts
        return result

    def plan(self, ctx: Context, region: FeedForwardRegion) -> Taken:
        self._check_converted(ctx, region, self._formula(ctx, region))
        return Taken()

    def _check_converted(self, ctx: Context, region: FeedForwardRegion, formula: ffn.Formula) -> None:
        """Refuse a layer that calibration left dense."""
        facts = ctx.facts(self.name, region)
        if not facts["converted"]:
            raise UnprofitableError(
                f"not among the {facts['of']} layers whose tables explain most of the up-projection (this one explains "
                f"{facts['explained']})",
                node=formula.up.node.name,
                path=region.path,
                source=region.source,
            )

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        formula = self._formula(ctx, region)
        ids, embedding, visual = self._ids(ctx, region, formula)
        self._check_converted(ctx, region, formula)
        state, facts = ctx.state(self.name, region)
        width, vocabulary = state["table"].meta["val"].shape[1], state["remap"].meta["val"].shape[0]
        if vocabulary != embedding.meta["val"].shape[0] or width != formula.width:
            raise ctx.refuse(
                formula.up.node,
                f"vocabulary mismatch: the table was made for {vocabulary} ids and "
                f"{width} neurons, this model has {embedding.meta['val'].shape[0]} and "
                f"{formula.width}; calibrate again with this model",
            )
        if "host" in facts:
            state |= self._fetched(ctx, state, ids)
        inner = self._emit(ctx, formula, state, ids, visual is not None or self.params.dense_first > 0)
        formula.down.node.replace_input_with(formula.inner, inner)
        erase(formula.inner)
        return {
            "fallback": self.params.fallback,
            "dense_first": self.params.dense_first,
            "table": "host" if "host" in facts else "model",
            **{name: facts[name] for name in ("explained", "rows", "tokens", "shrinkage", "prior")},
        }

    def _formula(self, ctx: Context, region: FeedForwardRegion) -> ffn.Formula:
        formula = ffn.read_formula(ctx, region)
        if formula.gate is None:
            raise ctx.refuse(
                formula.up.node,
                "a plain feed-forward layer has no up-projection beside an activated "
                "gate; STEM needs a gated one (moe_from_dense takes both)",
            )
        return formula

    def _ids(
        self, ctx: Context, region: FeedForwardRegion, formula: ffn.Formula
    ) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """As :func:`ids_for`; -1 at the first tokens too."""
        ids, table, visual = ids_for(ctx, region, formula.up.node)
        if self.params.dense_first == 0:
            return ids, table, visual
        first = first_for(ctx, region, self.params.dense_first)
        return ctx.emit_once("ids without first", _without, ids, first), table, visual

    def _fetched(self, ctx: Context, state: dict[str, fx.Node], ids: fx.Node) -> dict[str, fx.Node]:
        """``table`` and ``index``: rows that are on their way from where the ids are known, and which is whose."""
        nodes = [state["table"], state["remap"], *ctx.emit_once("unique ids", unique_ids, ids), ids]
        table, index = ctx.emit(fetch_rows, *nodes, before=ctx.after(*nodes))
        return {"table": table, "index": index}

    def _emit(
        self, ctx: Context, formula: ffn.Formula, state: dict[str, fx.Node], ids: fx.Node, dense: bool
    ) -> fx.Node:
        """The product of the activated gate and the rows, in front of the down-projection.

        ``dense``: some tokens take the dense up-projection whatever the fallback is.
        """
        gate, up, fallback = formula.gate, formula.up, self.params.fallback
        assert gate is not None
        fused, shape = gate.node is up.node, formula.inner.meta["val"].dim()
        nodes = {
            "x": up.input,
            "gate": gate.weight if fused else gate.node,
            "gate_bias": gate.bias if fused else None,
            "up": up.weight,
            "up_bias": up.bias,
            "ids": ids,
            **state,
        }
        if fallback == "mean" and not dense:
            del nodes["up"], nodes["up_bias"]
        given = {name: node for name, node in nodes.items() if node is not None}

        def block(*values: Tensor) -> Tensor:
            v = dict(zip(given, values, strict=True))
            value = v["gate"]
            if fused:
                value = nn.functional.linear(
                    v["x"], gate.matrix(value), gate.offset(v["gate_bias"]) if "gate_bias" in v else None
                )
            other: Tensor = v["mean"]
            index, remap = v["ids"], None if "index" in v else v["remap"]
            if "index" in v:
                index = await_rows(v["table"], v["index"]).view(index.shape)
            if "up" in v:
                place = rows(index, v["table"].shape[0], remap)
                mask = place < 0 if fallback == "dense" else v["ids"] < 0
                other = linear_where(
                    v["x"], up.matrix(v["up"]), up.offset(v["up_bias"]) if "up_bias" in v else None, mask
                )
                if fallback == "mean":
                    other = torch.where(mask.unsqueeze(-1), other, v["mean"])
            found = embedding_gate(value, v["table"], index, formula.activation, remap, other)
            if found.ndim == shape:
                return found
            return found.reshape(-1, found.shape[-1])  # the down-projection of some models reads a list of tokens

        return ctx.emit(block, *given.values(), before=formula.down.node)


def _without(ids: Tensor, first: Tensor) -> Tensor:
    """``ids``, [B, S] or its rows end to end, with -1 where ``first`` [B or 1, S] is true."""
    return torch.where(first, -1, ids.reshape(-1, first.shape[1])).reshape(ids.shape)


def _score(table: token_table.Table) -> float:
    return -math.inf if math.isnan(table.score) else table.score
