"""Paired differences between figures of the same items, with bootstrap intervals. Plain numpy, no models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokcompile.errors import TokcompileError
from tokcompile.reporting.quantile import quantile

Array = npt.NDArray[np.float64]
#: Statistics of items ``[n, k]`` -> the figure. A mean, a ratio of sums, a correlation.
Score = Callable[[Array], float]


def mean_percent(stats: Array) -> float:
    """100 x the mean of the first column."""
    return 100 * float(stats[:, 0].mean())


def ratio_percent(stats: Array) -> float:
    """100 x sum of column 0 / sum of column 1 (errors / words)."""
    return 100 * float(stats[:, 0].sum() / stats[:, 1].sum())


def perplexity(stats: Array) -> float:
    """exp(sum of column 0 / sum of column 1): negative log-likelihoods in nats, and tokens."""
    return math.exp(float(stats[:, 0].sum() / stats[:, 1].sum()))


def bootstrap(
    difference: Callable[[npt.NDArray[np.int64]], float],
    items: int,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``difference(rows)`` over samples of ``items`` rows drawn with replacement.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.
    """
    generator = np.random.default_rng(seed)
    found = sorted(difference(generator.integers(0, items, items)) for _ in range(resamples))
    finite = [value for value in found if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    return quantile(finite, (1 - level) / 2), quantile(finite, (1 + level) / 2)


def interval(
    score: Score, stats: Array, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of one figure over its items."""
    return bootstrap(lambda rows: score(stats[rows]), len(stats), resamples=resamples, level=level, seed=seed)


@dataclass(frozen=True)
class Difference:
    """A paired difference of figures, first minus second, with its interval."""

    value: float
    low: float
    high: float

    def verdict(self, higher_is_better: bool = True) -> str:
        """ "better" or "worse" where the interval leaves out 0, else "same"."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.low > 0) == higher_is_better else "worse"


def compare(
    score: Score, first: Array, others: Sequence[Array], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Difference:
    """``score(first)`` minus the mean of ``score`` over ``others`` (the seeds of a control) on the same items.

    Args:
        first: ``[n, k]``. others: arrays of the same ``n``, item by item.
        resamples, level, seed: of the bootstrap over items.

    Raises:
        TokcompileError: not the same number of items.
    """
    if not others or any(len(other) != len(first) for other in others):
        raise TokcompileError(
            f"a paired comparison needs the same items: {len(first)} and {[len(other) for other in others]}"
        )

    def difference(rows: npt.NDArray[np.int64]) -> float:
        return score(first[rows]) - sum(score(other[rows]) for other in others) / len(others)

    low, high = bootstrap(difference, len(first), resamples=resamples, level=level, seed=seed)
    return Difference(difference(np.arange(len(first))), low, high)
