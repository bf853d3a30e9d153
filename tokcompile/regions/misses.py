"""Collect what looked like a region and is not one, and how far each match got."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from tokcompile.capture.graph import module_path, source_line

from .model import NearMiss

#: What a region of each kind has to have. The kinds that are not here are looked for without such steps.
STEPS = {
    "attention": (
        "softmax",
        "query x key",
        "weights x value",
        "two tensors in each product",
        "weights from the softmax",
        "parts of its own",
    ),
    "feed_forward": ("projection out", "projections in", "activation", "residual"),
    "moe": ("router", "choice", "experts on the residual stream"),
    "vision_encoder": ("convolution over pixels", "one vector for each patch", "layers over the patches"),
    "audio_encoder": ("convolution along time", "layers over the frames", "every frame sees all others"),
    "merge_point": ("values put among others", "start of a decoder stack", "features and embeddings"),
}


@dataclass
class Attempt:
    """One match that is being tried: its steps are noted as they pass."""

    misses: Misses
    kind: str
    passed: list[str] = field(default_factory=list)

    def passes(self, *steps: str) -> Attempt:
        """Note steps of :data:`STEPS` that the match has passed."""
        assert set(steps) <= set(STEPS[self.kind]), (self.kind, steps)
        self.passed += steps
        return self

    def fails(self, node: fx.Node, reason: str) -> None:
        """``node`` makes it none; ``reason`` says what was expected and what was found. One for each kind and node."""
        found = self.misses.found
        if not any(miss.kind == self.kind and miss.node is node for miss in found):
            where = module_path(node), source_line(node)
            found.append(NearMiss(self.kind, reason, node, *where, STEPS[self.kind], tuple(self.passed)))


@dataclass
class Misses:
    """Near misses in the order in which they were noticed."""

    found: list[NearMiss] = field(default_factory=list)

    def attempt(self, kind: str, *passed: str) -> Attempt:
        """Try to match a ``kind``, with the steps that have ``passed`` already."""
        return Attempt(self, kind).passes(*passed)
