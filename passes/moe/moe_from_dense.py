"""Shared and routed experts in the place of a trained feed-forward layer, without training.

    before   x -> gate, up [f neurons] -> act * -> down
    after    x -> shared expert (always) ------------------------------+
             x -> router -> chosen experts -> grouped_ffn ------------ + -> (+ bias of down)

The neurons are split, not changed: with all experts active the layer computes what it did. Calibration keeps inputs of
the layer. The energy of a neuron at a token is the square of what it adds to the output; the neurons of most energy are
shared, the others are put into experts of equal size such that a linear router, fitted to the energies of the experts
by ridge regression, chooses much of it (``tokcompile.moe_split``). Plain (ungated) layers are split in the same way.

``split: activity`` and ``choice: analytic`` are CMoE's: neurons that are among the most active ones of a token again
and again are shared, the others are clustered by the tokens that they are active for; an expert is chosen by how
active its most typical neuron is, so the router is made of the weights of these neurons.

Router ``top_k`` activates the same number of experts for every token. Router ``relu`` activates those whose logit is
above a threshold (set so that calibration activates as many on average): more for some tokens, fewer for others. Both
give a chosen expert the weight ``1 + scale * share``, ``scale`` [E] a parameter that starts at zero; ``share`` is the
softmax of the logits, or, as in BlockFFN, their ReLU divided by its root mean square.

Sources: CMoE, "Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis", arXiv 2502.04416 (form, weights,
second split and router; there the layers are converted one after the other, here all from one run of the dense model);
BlockFFN, arXiv 2507.08771 (ReLU and RMSNorm router; it trains such models from scratch). Energy and fit are this
project's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokcompile.capture.graph import erase
from tokcompile.errors import CalibrationError, UnprofitableError
from tokcompile.families.moe import experts
from tokcompile.families.moe import split as moe_split
from tokcompile.formulas import feed_forward as ffn
from tokcompile.plan.pass_base import Pass, Seen
from tokcompile.plan.plan import Taken
from tokcompile.regions.model import FeedForwardRegion
from tokcompile.regions.places import layers_meant
from tokcompile.registry import PassParams, about, register
from tokcompile.rewrite.context import Context

#: Tokens of the longer of the two calls that the gate times.
_TIMED = 1024


@register
class MoeFromDense(Pass):
    """Split feed-forward layers into shared and routed experts.

    One class: what is prepared is what the rewrite reads, and a method is one class.
    """

    name = "moe_from_dense"
    regions = "feed_forward"
    calibration = "required"

    class Params(PassParams):
        experts: int = Field(
            8,
            ge=2,
            description="Experts that a layer is split into, shared ones included.",
            json_schema_extra=about(source="CMoE: 8 at 25 % sparsity, 16 at 75 %"),
        )
        shared: int = Field(
            3,
            ge=0,
            description="Experts that every token uses (they become one).",
            json_schema_extra=about(source="CMoE, S3A3E8"),
        )
        active: int = Field(
            3,
            ge=1,
            description="Routed experts that a token uses (with router relu: on average).",
            json_schema_extra=about(source="CMoE, S3A3E8"),
        )
        router: Literal["top_k", "relu"] = Field(
            "top_k", description="A fixed number of experts for each token, or those above a threshold."
        )
        split: Literal["energy", "activity", "random"] = Field(
            "energy",
            description="Which neurons form an expert: by what they add to the output, or (CMoE) by how "
            "often they are among the most active; random is the control.",
            json_schema_extra=about(source="own; activity: CMoE"),
        )
        choice: Literal["fitted", "analytic", "random"] = Field(
            "fitted",
            description="What the router is made of: a regression of the energy of the experts, or (CMoE) "
            "the weights of a typical neuron; random weights are the control.",
            json_schema_extra=about(source="own; analytic: CMoE"),
        )
        convert: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)] = Field(
            1.0,
            description="Layers that are converted, of those that target.layers names: those whose output the "
            "conversion changes least on calibration data.",
            json_schema_extra=about(unit="share, or number of layers"),
        )
        top: int = Field(
            10,
            ge=1,
            description="Neurons that count as active, for each token (split: activity).",
            json_schema_extra=about(unit="neurons", source="CMoE"),
        )
        rounds: int = Field(8, ge=1, description="Rounds of clustering, at most; CMoE's code has 1.")
        tokens: int = Field(
            16384,
            ge=1,
            description="Tokens, spread over the calibration data, whose active neurons are kept (split: activity).",
            json_schema_extra=about(unit="tokens", source="CMoE"),
        )
        samples: int = Field(
            4096,
            ge=1,
            description="Tokens whose input is kept, to fit split and router, to set "
            "thresholds and to measure the error of each layer.",
            json_schema_extra=about(unit="tokens"),
        )
        gate: Literal["auto", "off"] = Field(
            "auto", description="auto: leave a layer dense where the experts cost more than they save on this device."
        )
        seed: int = Field(0, ge=0, description="Of the controls.")

        @model_validator(mode="after")
        def _fits(self) -> MoeFromDense.Params:
            routed = self.experts - self.shared
            if routed < 1:
                raise ValueError(f"shared ({self.shared}) must be less than experts ({self.experts})")
            if self.active > routed:
                raise ValueError(f"active ({self.active}) must be at most experts - shared ({routed})")
            return self

    def observe(self, ctx: Context, region: FeedForwardRegion, seen: Seen) -> None:
        formula = self._formula(ctx, region)
        seen.weights, seen.facts["activation"] = formula.weights(ctx), formula.activation
        gate, up = formula.gate, formula.up

        def add(x: Tensor, ups: Tensor, gates: Tensor) -> None:
            x, ups, gates = (v.reshape(-1, v.shape[-1]) for v in (x, ups, gates))
            experts.sample(seen.sums, "x", x.cpu(), self.params.samples)
            if self.params.split != "activity":
                return
            inner = experts.hidden(
                ups.narrow(-1, up.start, up.size),
                None if gate is None else gates.narrow(-1, gate.start, gate.size),
                formula.activation,
            )
            top = inner.abs().topk(min(self.params.top, formula.width), dim=-1).indices.to(torch.int32)
            experts.sample(seen.sums, "top", top.cpu(), self.params.tokens)

        ctx.observe(add, up.input, up.node, (gate or up).node)

    def prepare(self, seen: dict[str, Seen]) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        made = {}
        for number, (key, layer) in enumerate(seen.items()):
            if not len(layer.sums.get("x", ())):
                raise CalibrationError(f"moe_from_dense: no token came through {key}; calibrate with inputs that do")
            with torch.no_grad():
                made[key] = self._convert(layer, self.params.seed + number)
        ranked = sorted(made, key=lambda key: (made[key][1]["error"], seen[key].layer or 0))
        chosen = set(ranked[: layers_meant(self.params.convert, len(ranked))])
        for key, (_, facts) in made.items():
            facts |= {"converted": key in chosen, "of": len(chosen)}
        return {key: (tensors if key in chosen else {}, facts) for key, (tensors, facts) in made.items()}

    def _convert(self, layer: Seen, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of one layer."""
        params, weights, activation = self.params, layer.weights, layer.facts["activation"]
        width, routed = weights["up"].shape[0], params.experts - params.shared
        generator = torch.Generator().manual_seed(seed)
        x = layer.sums["x"].to(weights["up"])
        routers = moe_split.Routers(x.cpu(), experts.energy(x, weights, activation).cpu())
        if params.split == "energy":
            found = moe_split.energy_split(routers, params.experts, params.shared, params.active, params.rounds)
        elif params.split == "activity":
            keys = weights.get("gate", weights["up"]).detach().float().cpu()
            found = moe_split.split(layer.sums["top"], width, params.experts, params.shared, keys, params.rounds)
        else:
            found = moe_split.random_split(width, params.experts, params.shared, generator)
        fitted = routers.fit(found.experts) if params.choice == "fitted" else None
        t = experts.parts(weights, found, fitted)
        if params.choice == "random":
            noise = torch.randn(t["router_in"].shape, generator=generator) * float(t["router_in"].float().std())
            t["router_in"] = noise.to(t["router_in"])
        t["threshold"] = experts.thresholds(x, t, activation, params.active / routed)
        how = activation, params.router, params.active
        exact = experts.dense(x, weights, activation).float()
        error = float((experts.run(x, t, *how) - exact).square().sum() / exact.square().sum().clamp(min=1e-30))
        used = float((experts.route(x, t, *how)[0] >= 0).sum(-1).float().mean())
        facts = {
            "split": f"S{params.shared}A{params.active}E{params.experts}",
            "error": round(error, 6),
            "neurons_active": round((len(found.shared) + used * found.experts.shape[1]) / width, 4),
        }
        if params.gate == "auto":
            facts["speedup"] = {
                str(n): round(experts.speedup(x[:n], t, weights, *how), 2) for n in {1, min(len(x), _TIMED)}
            }
        return {name: nn.Parameter(value) for name, value in t.items()}, facts

    def plan(self, ctx: Context, region: FeedForwardRegion) -> Taken:
        self._check_converted(ctx, region, self._formula(ctx, region))
        return Taken()

    def _check_converted(self, ctx: Context, region: FeedForwardRegion, formula: ffn.Formula) -> None:
        """Refuse a layer that calibration left dense, or where experts were measured to be slower."""
        facts = ctx.facts(self.name, region)
        where = {"node": formula.up.node.name, "path": region.path, "source": region.source}
        if not facts["converted"]:
            raise UnprofitableError(
                f"not among the {facts['of']} layers that the conversion changes least (this one "
                f"by {facts['error']:.3g} of its output's square)",
                **where,
            )
        measured = facts.get("speedup", {})
        if measured and max(measured.values()) <= 1:
            times = ", ".join(f"{value} times as fast with {n} tokens" for n, value in measured.items())
            raise UnprofitableError(
                f"the dense layer runs: experts were measured {times}; params.gate: off converts "
                "the layer all the same",
                **where,
            )

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        formula = self._formula(ctx, region)
        self._check_converted(ctx, region, formula)
        state, facts = ctx.state(self.name, region)
        down, x = formula.down, formula.up.input
        rank = down.node.meta["val"].dim()
        size = (
            state["gate_up"].meta["val"].shape[2],
            state["down"].meta["val"].shape[0] * state["down"].meta["val"].shape[2]
            + (state["shared_out"].meta["val"].shape[1] if "shared_out" in state else 0),
        )
        if size != (x.meta["val"].shape[-1], formula.width):
            raise ctx.refuse(
                formula.up.node,
                f"the experts were made for width {size[0]} and {size[1]} neurons, this "
                f"layer has {x.meta['val'].shape[-1]} and {formula.width}; calibrate "
                "again",
            )
        names, given = list(state), [x, *([] if down.bias is None else [down.bias])]

        def block(x: Tensor, *values: Tensor) -> Tensor:
            bias, tensors = values[: len(given) - 1], dict(zip(names, values[len(given) - 1 :], strict=True))
            value = experts.run(
                x.reshape(-1, x.shape[-1]), tensors, formula.activation, self.params.router, self.params.active
            )
            value = value + bias[0] if bias else value
            return value if rank == 2 else value.reshape(*x.shape[:-1], value.shape[-1])

        new = ctx.emit(block, *given, *state.values(), before=down.node)
        down.node.replace_all_uses_with(new)
        erase(down.node)
        return {name: facts[name] for name in ("split", "neurons_active", "error", "speedup") if name in facts}

    def _formula(self, ctx: Context, region: FeedForwardRegion) -> ffn.Formula:
        formula, params = ffn.read_formula(ctx, region), self.params
        routed, node = params.experts - params.shared, formula.up.node
        if params.experts > formula.width:
            raise ctx.refuse(node, f"{params.experts} experts do not divide {formula.width} neurons; choose fewer")
        if not params.shared and formula.width % params.experts:
            raise ctx.refuse(
                node,
                f"{params.experts} experts do not divide {formula.width} neurons, and no shared "
                "expert takes the remainder; set shared, or experts to a divisor of the width",
            )
        if formula.up.input.meta["val"].dim() < formula.down.node.meta["val"].dim():
            raise ctx.refuse(node, "the layer gives its result another shape than its input has")
        assert 0 < params.active <= routed
        return formula
