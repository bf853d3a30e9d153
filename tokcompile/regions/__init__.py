"""Find the parts of a captured graph that a pass can act on, by dataflow alone."""

from __future__ import annotations

from tokcompile.kinds import KINDS

from .find import find_regions
from .model import (
    AttentionRegion,
    AudioEncoder,
    DecoderStack,
    EncoderRegion,
    FeedForwardRegion,
    Layer,
    MergePoint,
    MoeRegion,
    NearMiss,
    Region,
    Regions,
    StackRegion,
    VisionEncoder,
)

__all__ = [
    "KINDS",
    "AttentionRegion",
    "AudioEncoder",
    "DecoderStack",
    "EncoderRegion",
    "FeedForwardRegion",
    "Layer",
    "MergePoint",
    "MoeRegion",
    "NearMiss",
    "Region",
    "Regions",
    "StackRegion",
    "VisionEncoder",
    "find_regions",
]
