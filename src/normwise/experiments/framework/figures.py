"""From raw runs to figures: what is typical over seeds, how sure it is, and when a difference may be claimed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
Interval = tuple[float, float]
NO_DIFFERENCE = "no difference"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The percentile bootstrap interval of the median (Efron 1979); values may be inf, which a missed target is."""
    draws = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (RESAMPLES, len(values)))
    medians = np.sort(np.median(draws, axis=1))
    tail = (1 - level) / 2
    return float(medians[int(tail * RESAMPLES)]), float(medians[int((1 - tail) * RESAMPLES) - 1])


def ratio_interval(above: Sequence[float], below: Sequence[float], level: float = 0.95) -> Interval:
    """The percentile bootstrap interval of median(above) / median(below), of values that were taken in pairs: rounds are drawn, not values.

    Where a median of ``below`` is not above 0, the ratio is inf: times that cannot be told from nothing prove nothing.
    """
    pairs = np.asarray([above, below], dtype=float)
    drawn = pairs[:, np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))]
    top, bottom = np.median(drawn, axis=2)
    ratios = np.sort(np.divide(top, bottom, out=np.full_like(top, np.inf), where=bottom > 0))
    tail = (1 - level) / 2
    return float(ratios[int(tail * RESAMPLES)]), float(ratios[int((1 - tail) * RESAMPLES) - 1])


def paired_interval(differences: Sequence[float]) -> Interval:
    """The 95% interval of the mean of paired differences by typical values (Hartigan, 1969): the means of all their subsets, without 2.5%
    at either end.

    Where differences are symmetric around a centre, as those of two equal contenders on the same seeds are, it misses the centre in at most
    that share of cases at either end, however few there are: the percentile bootstrap of eight misses twice as often. Below six no
    interval of 95% exists, and the ends are infinite. Beyond 14 differences a drawn 10,000 of the subsets stand for all. A difference may
    be -inf: a run that failed.
    """
    given = np.asarray(differences, dtype=float)
    if len(given) <= 14:
        inside = np.arange(1, 2 ** len(given))[:, None] >> np.arange(len(given)) & 1
    else:
        inside = np.random.default_rng(0).integers(0, 2, (RESAMPLES, len(given)))
        inside = inside[inside.any(axis=1)]
    means = np.sort(np.where(inside, given, 0.0).sum(axis=1) / inside.sum(axis=1))
    cut = (len(means) + 1) // 40
    return (float(means[cut - 1]), float(means[-cut])) if cut else (-math.inf, math.inf)


def share_interval(shares: Sequence[float], count: int) -> Interval:
    """The 95% interval of the mean of accuracies, or other shares, that were each measured on the same ``count`` images.

    Two things are uncertain, and more seeds help against one of them only: which images happen to be in the part (Wilson 1927, which has
    a width at 0 and 1, too), and the seed (1.96 standard errors of the mean). Their half-widths are added as variances are.
    """
    z, p = 1.96, statistics.fmean(shares)
    scale = 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    by_images = z / scale * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    by_seed = z * statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    half = math.hypot(by_images, by_seed)
    return max(0.0, middle - half), min(1.0, middle + half)


def differ(one: Interval, other: Interval) -> bool:
    """Whether a difference may be claimed: only where the intervals do not overlap."""
    return one[1] < other[0] or other[1] < one[0]


def median_reached(numbers: Sequence[float | None]) -> dict[str, Any]:
    """The median in which a None, a seed that missed, counts as later than every other; None where that is the median."""
    middle = statistics.median([math.inf if number is None else number for number in numbers])
    return {"median": middle if math.isfinite(middle) else None, "values": list(numbers)}


def spread(numbers: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of a single value) and the values."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": statistics.fmean(numbers), "std": deviation, "values": list(numbers)}


def geometric_mean(values: Sequence[float]) -> float:
    """inf where one is."""
    return math.inf if any(math.isinf(v) for v in values) else math.exp(statistics.fmean(math.log(v) for v in values))


def finite(value: float) -> float | None:
    """As JSON can hold it: None in place of what is not finite."""
    return value if math.isfinite(value) else None
