"""From raw runs to figures: medians over seeds and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the median (Efron 1979); values may be inf, which a missed target is."""
    draws = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (RESAMPLES, len(values)))
    medians = np.sort(np.median(draws, axis=1))
    tail = (1 - level) / 2
    return float(medians[int(tail * RESAMPLES)]), float(medians[int((1 - tail) * RESAMPLES) - 1])


def median(values: Sequence[float]) -> float:
    """Of an even number the mean of the two middle values, so inf where half of the runs missed."""
    return statistics.median(values)


def geometric_mean(values: Sequence[float]) -> float:
    """inf where one is."""
    return math.inf if any(math.isinf(v) for v in values) else math.exp(statistics.fmean(math.log(v) for v in values))
