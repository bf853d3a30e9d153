"""The place of a region: its key in every graph of the model, and its layer."""

from __future__ import annotations

import math

from torch import fx

from tokcompile.capture.graph import ancestors
from tokcompile.kinds import KINDS
from tokcompile.regions.model import DecoderStack, Region, Regions


def region_keys(regions: Regions) -> dict[Region, str]:
    """region -> a name that is the same in every graph of the model: module path, numbered where it is not unique."""
    keys: dict[Region, str] = {}
    for kind in KINDS:
        count: dict[str, int] = {}
        for region in regions.of(kind):
            number = count[region.path] = count.get(region.path, -1) + 1
            keys[region] = f"{region.path}#{number}" if number else region.path
    return keys


def layer_of(regions: Regions, region: Region) -> tuple[int, int] | None:
    """Which layer of its stack ``region`` is in: -> (index, number of layers), or None outside of stacks."""
    near: tuple[int, tuple[int, int]] | None = None
    for stack in regions.stacks:
        for layer in stack.layers:
            place = layer.index, len(stack.layers)
            if region is layer.attention or region is layer.feed_forward:
                return place
            # cross attention, say: the layer does not list it
            if (
                layer.path
                and f"{region.path}.".startswith(f"{layer.path}.")
                and (near is None or len(layer.path) > near[0])
            ):
                near = len(layer.path), place
    return None if near is None else near[1]


def stack_below(regions: Regions, node: fx.Node) -> DecoderStack | None:
    """The stack of layers whose residual stream starts at ``node``, or as near below it as any does."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    stacks = [
        s
        for s in regions.of(DecoderStack)
        if s.layers and (s.layers[0].input is node or node in ancestors([s.layers[0].input]))
    ]
    return min(stacks, key=lambda s: order[s.layers[0].input], default=None)


def layers_meant(given: float | int, layers: int) -> int:
    """How many of ``layers`` a share of them, or a number, means: at least one, at most all."""
    return min(given, layers) if isinstance(given, int) else max(1, math.floor(given * layers + 0.5))
