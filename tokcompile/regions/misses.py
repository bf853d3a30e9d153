"""Collect what looked like a region and is not one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from tokcompile.capture.graph import module_path, source_line

from .model import NearMiss


@dataclass
class Misses:
    """Near misses in the order in which they were noticed, one for each kind and node."""

    found: list[NearMiss] = field(default_factory=list)

    def add(self, kind: str, node: fx.Node, score: float, reason: str) -> None:
        """Note that ``node`` is no ``kind``: ``reason`` says what was expected and what was found."""
        if not any(miss.kind == kind and miss.node is node for miss in self.found):
            self.found.append(NearMiss(kind, reason, node, module_path(node), source_line(node), score))
