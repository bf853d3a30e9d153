"""What a recipe will do to one graph, before anything is rewritten: :class:`Plan`.

A plan is recipe x regions. It is pure: making it changes no node. The runtime rewrites by it, the report and
``explain`` show it, and the ONNX exporter reads off it which layers lose tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcompile.capture.flops import node_flops
from tokcompile.capture.sizes import hint
from tokcompile.errors import NarrowError
from tokcompile.regions.model import Region, Regions, StackRegion


@dataclass(frozen=True)
class LayerCut:
    """Where a step removes tokens.

    Attributes:
        layer: index of the first layer below the cut, in its stack.
        tokens: about how many tokens of a row are left there (the longest row of the call); None: not known before.
    """

    layer: int
    tokens: int | None = None


@dataclass(frozen=True)
class Taken:
    """What a pass will do to one region.

    Attributes:
        stack: the stack of layers whose tokens it removes; None for a pass that works in place.
        cuts: where, ascending by layer.
    """

    stack: StackRegion | None = None
    cuts: tuple[LayerCut, ...] = ()


@dataclass(eq=False)
class PlannedStep:
    """One step of the recipe on one graph.

    Attributes:
        index: its number in the recipe. name: the pass.
        taken: region -> what the pass will do to it.
        refused: region -> why not.
        state: region paths that have prepared state of this pass.
        reason: why the step has no region at all; "" where it has one.
    """

    index: int
    name: str
    taken: dict[Region, Taken] = field(default_factory=dict)
    refused: dict[Region, NarrowError] = field(default_factory=dict)
    state: list[str] = field(default_factory=list)
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON types, for the report."""
        reasons = [self.reason] if self.reason else []
        return {
            "step": self.index,
            "pass": self.name,
            "regions": [region.path for region in self.taken],
            "reason": "; ".join(dict.fromkeys([*reasons, *(str(error) for error in self.refused.values())])),
            "prepared": self.state,
        }


@dataclass(frozen=True)
class CutPlan:
    """Which layers of a stack lose tokens.

    Attributes:
        starts: the first layer below each cut, ascending, each once.
    """

    starts: tuple[int, ...] = ()

    @classmethod
    def of(cls, cuts: Iterable[LayerCut]) -> CutPlan:
        return cls(tuple(sorted({cut.layer for cut in cuts})))

    def groups(self, depth: int) -> list[list[int]]:
        """The layers below the first cut, put together where they hold the same tokens."""
        ends = [*self.starts[1:], depth] if self.starts else []
        return [list(range(a, b)) for a, b in zip(self.starts, ends, strict=True) if b > a]


@dataclass(eq=False)
class Plan:
    """What a recipe will do to one graph.

    Attributes:
        stage: of the graph. steps: one for each step of the recipe that has something to do in this stage.
        regions: what was found in the graph.
    """

    stage: str
    regions: Regions
    steps: list[PlannedStep] = field(default_factory=list)

    def cuts(self, stack: StackRegion) -> list[LayerCut]:
        """All cuts of one stack, ascending by layer."""
        found = [
            cut for step in self.steps for taken in step.taken.values() if taken.stack is stack for cut in taken.cuts
        ]
        return sorted(found, key=lambda cut: cut.layer)

    def flop_ratio(self, graph: fx.Graph) -> float | None:
        """FLOPs before / after of what the cuts leave; None where no step removes a known number of tokens.

        Layers below a cut run on fewer tokens: products with weights shrink with their number, attention with its
        square. Needs the graph as it was planned.
        """
        order = {node: number for number, node in enumerate(graph.nodes)}
        flops = {node: float(node_flops(node)) for node in order}
        whole, saved = sum(flops.values()), 0.0
        for stack in self.regions.stacks:
            cuts = [cut for cut in self.cuts(stack) if cut.tokens is not None]
            for number, layer in enumerate(stack.layers):
                above = [cut for cut in cuts if cut.layer <= number]
                tokens = hint(layer.output.meta["val"].shape[-2])
                if not above or not tokens:
                    continue
                share = min(float(cut.tokens or 0) for cut in above) / tokens
                # the head of a language model reads what leaves the last layer
                is_last = number == len(stack.layers) - 1 and stack.kind == "decoder_stack"
                end = len(order) if is_last else order[layer.output]
                for node, place in order.items():
                    if order[layer.input] < place <= end and (place <= order[layer.output] or _rows(node) == tokens):
                        saved += flops[node] * (1 - share ** (2 if _is_square(node) else 1))
        return whole / max(whole - saved, 1.0) if saved else None

    def as_dict(self, graph: fx.Graph) -> dict[str, Any]:
        """JSON types, for the report."""
        cuts = [
            {"stack": stack.path, "layer": cut.layer, "tokens": cut.tokens}
            for stack in self.regions.stacks
            for cut in self.cuts(stack)
        ]
        ratio = self.flop_ratio(graph)
        return {
            "stage": str(self.stage),
            "steps": [step.as_dict() for step in self.steps],
            "cuts": cuts,
            "predicted_flop_ratio": None if ratio is None else round(ratio, 3),
        }


def _rows(node: fx.Node) -> int | None:
    """How many rows the result has: the size of its last dimension but one."""
    value = node.meta.get("val")
    return hint(value.shape[-2]) if isinstance(value, torch.Tensor) and value.dim() >= 2 else None


def _is_square(node: fx.Node) -> bool:
    """Whether a product is of tokens with tokens: both operands are computed, none is a weight."""
    operands: Sequence[Any] = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    return len(operands) == 2 and all(
        a.op != "placeholder" and isinstance(a.meta.get("val"), torch.Tensor) and a.meta["val"].dim() >= 3
        for a in operands
    )
