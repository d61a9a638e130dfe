"""The one search for learning rates and strengths: points of a lattice, tried until the trials are spent.

Two ways to walk on it, both in the manner of a compass search (Kolda, Lewis and Torczon, SIAM Review 45, 2003). ``compass`` starts in
the middle, brackets the learning rate and then moves along one axis at a time. ``widening`` starts with nine points spread over the
lattice, and then steps beyond the edge on which the best one lies, or into the widest gap beside it. What comes next depends on the
finished trials alone: an interrupted search resumes where it stopped, and any number of workers ends with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Point = tuple[float, ...]
Value = float | str
# By point; higher is better. Any order will do: a number, or a tuple that ranks failed runs last.
Scores = Mapping[Point, Any]

_OFFSETS = (-1.0, 0.0, 1.0)
_ONE_AXIS = tuple(step / 2 for step in range(-4, 5))


@dataclass(frozen=True)
class Axis:
    """A number or a name to choose.

    Args:
        name: what it is called in a run's numbers.
        values: from low to high, or in an order that makes sense. With a ``ratio`` only the first counts.
        centre: the index of the value that is tried first.
        ratio: makes the axis endless: position k stands for ``values[0] · ratio**k``, to three significant digits, so that what is tried
            is exactly what is printed.
        off: the direction, 1 or -1, in which a strength fades to nothing (a penalty of 0, a radius without end); 0 for others.
        most: no value is above it (a share, a percentile).
    """

    name: str
    values: tuple[Value, ...]
    centre: int = 0
    ratio: float = 0.0
    off: int = 0
    most: float = math.inf

    def value(self, position: float) -> Value:
        if self.ratio:
            return float(f"{min(self.most, float(self.values[0]) * self.ratio**position):.3g}")
        return self.values[self.centre + int(position)]

    def has(self, position: float) -> bool:
        return bool(self.ratio) or 0 <= self.centre + position < len(self.values)


# axes, scores of the finished trials, trials -> the next points, none at the end.
Walk = Callable[[Sequence[Axis], Scores, int], list[Point]]


def values(axes: Sequence[Axis], point: Point) -> dict[str, Any]:
    """The numbers that a point stands for, by the name of their axis."""
    return {axis.name: axis.value(position) for axis, position in zip(axes, point, strict=True)}


def best(scores: Scores) -> Point:
    """The point with the highest score; of equal ones the first tried."""
    return max(scores, key=lambda point: scores[point])


def search(
    walk: Walk, axes: Sequence[Axis], trials: int, make: Callable[[dict[str, Any]], Any], score: Callable[[Any], Any]
) -> Generator[list[Any], list[Any], tuple[dict[Point, Any], dict[Point, Any]]]:
    """A plan (see ``framework.driver``) that tries points until ``walk`` has no more; returns scores and results by point.

    Args:
        make: numbers to a run.
        score: a run's result to what ``walk`` ranks it by.
    """
    scores: dict[Point, Any] = {}
    results: dict[Point, Any] = {}
    while points := walk(axes, scores, trials):
        found = yield [make(values(axes, point)) for point in points]
        for point, result in zip(points, found, strict=True):
            scores[point], results[point] = score(result), result
    return scores, results


# ------------------------------------------------------------------------------------------------------------- compass


def compass(axes: Sequence[Axis], scores: Scores, trials: int) -> list[Point]:
    """The next point to try, none when ``trials`` are done or every neighbour of the best point was tried. The first axis is the rate."""
    if not scores:
        return [(0,) * len(axes)]
    if len(scores) >= trials:
        return []
    here, tried = best(scores), list(scores)
    free = {
        i: sides for i, axis in enumerate(axes)
        if (sides := [p for sign in (1, -1) if axis.has((p := _moved(here, i, sign))[i]) and p not in scores])
    }  # fmt: skip
    if not free:
        return []
    if 0 in free and not any(any(point[1:]) for point in tried):
        return free[0][:1]
    # A trial belongs to the axis in which it differs from a point tried before it; the axis with the fewest comes next.
    polls = dict.fromkeys(range(len(axes)), 0)
    for k, point in enumerate(tried):
        for earlier in reversed(tried[:k]):
            different = [i for i, (a, b) in enumerate(zip(point, earlier, strict=True)) if a != b]
            if len(different) == 1:
                polls[different[0]] += 1
                break
    return free[min(free, key=lambda i: (polls[i] + (i == 0), i))][:1]


# ------------------------------------------------------------------------------------------------------------ widening


def start(axes: int) -> list[Point]:
    """Nine points to begin with, so that nothing has a head start: two half-steps finer and wider on one axis, 3×3 on two,
    a Latin square on three (every pair of positions on any two axes once)."""
    if axes == 1:
        return [(position,) for position in _ONE_AXIS]
    grid = product(_OFFSETS, repeat=2)
    if axes == 2:
        return list(grid)
    return [(lr, first, (lr + first + 1) % 3 - 1) for lr, first in grid]


def widening(axes: Sequence[Axis], scores: Scores, trials: int) -> list[Point]:
    """All missing points of the first nine, then one at a time, none when ``trials`` are done."""
    missing = [point for point in start(len(axes)) if point not in scores]
    if missing or len(scores) >= trials:
        return missing
    here = lowest_best(scores)
    for axis, sign in edges(scores):
        return [_moved(here, axis, sign)]

    def gap(axis: int, sign: int) -> float:
        """Half way to the next point in this direction, all other positions equal; where there is none, a whole step, or less where
        the edge is nearer: half of that each time would never arrive there."""
        reach = {point: sign * (point[axis] - here[axis]) for point in scores}
        on_line = [far for point, far in reach.items() if far > 0 and _moved(here, axis, sign * far) == point]
        return min(on_line) / 2 if on_line else min(1.0, max(reach.values()))

    sides = [(axis, sign) for axis in range(len(here)) for sign in (-1, 1)]
    axis, sign = max(sides, key=lambda side: gap(*side))
    return [_moved(here, axis, sign * gap(axis, sign))]


def lowest_best(scores: Scores) -> Point:
    """The point with the highest score; of equal ones the lowest, which is the smallest learning rate."""
    return max(sorted(scores), key=lambda point: scores[point])


def edges(scores: Scores, here: Point | None = None) -> list[tuple[int, int]]:
    """The axes, with the direction, on which ``here``, by default the best point, lies at the end of what was tried."""
    centre = lowest_best(scores) if here is None else here
    sides = ((axis, sign) for axis in range(len(centre)) for sign in (-1, 1))
    return [(axis, sign) for axis, sign in sides if all(sign * (p[axis] - centre[axis]) <= 0 for p in scores)]


def at_the_end(axes: Sequence[Axis], scores: Scores) -> dict[str, list[str]]:
    """In words: ``on_edge``, axes whose best value is the last that was tried; ``fades_out``, strengths that are best at their weakest."""
    ends = [(axes[axis], sign) for axis, sign in edges(scores)]
    return {
        "on_edge": [f"{axis.name} {'high' if sign > 0 else 'low'}" for axis, sign in ends if sign != axis.off],
        "fades_out": [axis.name for axis, sign in ends if sign == axis.off],
    }


def _moved(point: Point, axis: int, by: float) -> Point:
    return tuple(x + by if index == axis else x for index, x in enumerate(point))
