"""A quantile of measured values."""

from __future__ import annotations

from collections.abc import Sequence

# ------------------------------------------------------------------------------------------------------- measuring


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values: 0.5 is the median."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
