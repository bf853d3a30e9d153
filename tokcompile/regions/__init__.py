"""Find the parts of a captured graph that a pass can act on, by dataflow alone."""

from __future__ import annotations

from tokcompile.kinds import KINDS

from .find import find_regions
from .model import Layer, NearMiss, Region, Regions

__all__ = ["KINDS", "Layer", "NearMiss", "Region", "Regions", "find_regions"]
