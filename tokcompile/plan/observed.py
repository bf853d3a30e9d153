"""What calibration saw, step by step and region by region: :class:`Observed`."""

from __future__ import annotations

from typing import Any

from tokcompile.plan.pass_base import Seen
from tokcompile.regions.model import Region
from tokcompile.rewrite.context import Context


class Observed:
    """Collects :class:`Seen` objects.

    Attributes:
        seen: step -> region key -> what was seen there.
        resumed: (step, region key) -> sums of an earlier run that was broken off.
    """

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Seen]] = {}
        self.resumed: dict[tuple[int, str], dict[str, Any]] = {}

    def of(self, ctx: Context, region: Region) -> Seen:
        """What was seen of ``region``; :meth:`note` it once the pass takes the region."""
        key = ctx.key(region)
        seen = self.seen.get(ctx.step, {}).get(key)
        if seen is None:
            layer, depth = ctx.layer(region) or (None, None)
            seen = Seen(key, region.path, layer, depth, sums=self.resumed.pop((ctx.step, key), {}))
        return seen

    def note(self, ctx: Context, seen: Seen) -> None:
        self.seen.setdefault(ctx.step, {})[seen.key] = seen

    def forget(self, ctx: Context, region: Region) -> None:
        """A region that was refused before anything was noted of it was not seen."""
        regions, key = self.seen.get(ctx.step, {}), ctx.key(region)
        seen = regions.get(key)
        if seen is not None and not (seen.sums or seen.weights or seen.facts):
            del regions[key]
