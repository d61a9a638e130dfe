"""Who leads after the search, and what may be said of the leader on seeds that had no part in choosing it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normwise.experiments.framework.figures import finite, paired_interval
from normwise.experiments.tune.space import Numbers, Space, combination

LEADERS = 3
Value = float | None
"""A metric; None of a run that failed, which is worse than every other."""


@dataclass(frozen=True)
class Tried:
    """A trial that is done: its number, its candidate and its metric."""

    number: int
    numbers: Numbers
    value: float


@dataclass(frozen=True)
class Verdict:
    """The mean gain of the leader over nothing, in the metric's unit and above zero where it is better, with its 95% interval; per pair of
    seeds in ``gains``. relative: the gain over the size of nothing's mean. None is infinite: a run of one of the two failed.
    failed: on how many seeds the leader did, and nothing. beyond: of lower end, mean and upper end the sign where it is infinite, or 0."""

    mean: Value
    interval: tuple[Value, Value]
    relative: Value
    gains: list[Value]
    significant: bool
    failed: tuple[int, int] = (0, 0)
    beyond: tuple[int, int, int] = (0, 0, 0)


def finalists(tried: Sequence[Tried], space: Space, maximize: bool) -> tuple[Tried | None, list[Tried]]:
    """The best "nothing", None where it failed throughout, and the leaders of the other combinations, by the best trial of each, the best
    first; of equal ones the first tried."""
    found: dict[tuple[str, ...], Tried] = {}
    for one in sorted(tried, key=lambda one: (-one.value if maximize else one.value, one.number)):
        found.setdefault(combination(one.numbers), one)
    nothing = next((one for one in found.values() if space.is_nothing(one.numbers)), None)
    return nothing, [one for one in found.values() if one is not nothing][:LEADERS]


def chosen(values: Mapping[int, Sequence[Value]], nothing: int, maximize: bool) -> int:
    """The finalist with the best mean over the seeds for choosing; nothing where none is better."""
    means = {number: _mean(found, maximize) for number, found in values.items()}
    best = max(values, key=lambda number: (means[number], number == nothing))
    return nothing if nothing in means and _equal(means[best], means[nothing]) else best


def _equal(one: float, other: float) -> bool:
    """Up to rounding: what differs in the last bits is no gain."""
    return math.isclose(one, other, rel_tol=1e-9)


def judged(leader: Sequence[Value], nothing: Sequence[Value], maximize: bool) -> Verdict:
    """The leader against nothing, seed by seed. Who trains where the other fails is better by more than any number."""
    gains = [_gain(one, other, maximize) for one, other in zip(leader, nothing, strict=True)]
    # Failures on either side balance each other, which infinities do not: a number stands for them that no gain comes near.
    far = 1e6 * max([1.0, *(abs(gain) for gain in gains if math.isfinite(gain))])
    held = [gain if math.isfinite(gain) else math.copysign(far, gain) for gain in gains]
    ends = paired_interval(held)
    low, mean, high = (_beyond(one, far / (2 * len(held))) for one in (ends[0], statistics.fmean(held), ends[1]))
    known = [value for value in nothing if value is not None]
    scale = abs(statistics.fmean(known)) if known else 0.0
    failed = leader.count(None), nothing.count(None)
    relative = finite(mean / scale) if scale else None
    signs = _sign(low), _sign(mean), _sign(high)
    return Verdict(finite(mean), (finite(low), finite(high)), relative, [finite(gain) for gain in gains], low > 0, failed, signs)


def _beyond(value: float, limit: float) -> float:
    """Infinite where failures decide it. Below six pairs the ends of an interval are infinite anyway."""
    return value if abs(value) < limit else math.copysign(math.inf, value)


def _sign(value: float) -> int:
    return round(math.copysign(1, value)) if math.isinf(value) else 0


def _gain(leader: Value, nothing: Value, maximize: bool) -> float:
    if leader is None or nothing is None:
        return 0.0 if leader is nothing else math.inf if nothing is None else -math.inf
    return 0.0 if _equal(leader, nothing) else (leader - nothing) * (1 if maximize else -1)


def _mean(values: Sequence[Value], maximize: bool) -> float:
    """Higher is better."""
    return statistics.fmean(-math.inf if value is None else value if maximize else -value for value in values)
