"""What region detection returns: plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tokcompile.kinds import STACKS


@dataclass(eq=False)
class Region:
    """A part of the graph with a known dataflow role.

    Attributes:
        kind: one of :data:`KINDS`.
        path: module path of the code that made it ("" when the graph has no module information).
        roles: role name -> node (for example ``query``, ``key``, ``value``, ``mask``, ``output``).
        shapes: dimension name -> size, an int or a SymInt (B, S, H, Hkv, Dh, D, F, N ...).
        variant: which alternative was taken (for example ``{"form": "sdpa", "heads": "gqa"}``).
        source: ``file:line``.
        layers: for the kinds of :data:`STACKS`: the layers along the residual stream, in order.
    """

    kind: str
    path: str
    roles: dict[str, fx.Node]
    shapes: dict[str, Any] = field(default_factory=dict)
    variant: dict[str, str] = field(default_factory=dict)
    source: str = ""
    layers: list[Layer] = field(default_factory=list)


@dataclass(eq=False)
class Layer:
    """One layer of a stack, delimited on the residual stream.

    Attributes:
        path: common module path prefix of the layer.
        index: position in the stack, from 0.
        input: residual-stream node that enters the layer (``[B, S, D]``).
        output: residual-stream node that leaves it: what the next layer, or the final norm, reads.
        attention: its (self-)attention region, if any.
        feed_forward: its feed-forward or MoE region, if any.
    """

    path: str
    index: int
    input: fx.Node
    output: fx.Node
    attention: Region | None = None
    feed_forward: Region | None = None


@dataclass(eq=False)
class NearMiss:
    """Something that looked like a region and is not one.

    Attributes:
        kind: the region kind that was tried.
        reason: what was expected and what was found.
        node: the offending node.
        path: its module path. source: its ``file:line``.
        score: how far the match got, 0..1; the highest is the nearest miss.
    """

    kind: str
    reason: str
    node: fx.Node
    path: str = ""
    source: str = ""
    score: float = 0.0


@dataclass(eq=False)
class Regions:
    """All regions of one graph, in graph order, and what nearly was one."""

    regions: list[Region] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)

    def of(self, kind: str) -> list[Region]:
        return [region for region in self.regions if region.kind == kind]

    @property
    def stacks(self) -> list[Region]:
        """The regions that have layers."""
        return [region for kind in STACKS for region in self.of(kind)]

    def nearest_miss(self, kind: str) -> NearMiss | None:
        misses = [miss for miss in self.near_misses if miss.kind == kind]
        return max(misses, key=lambda miss: miss.score, default=None)
