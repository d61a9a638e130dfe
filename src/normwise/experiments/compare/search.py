"""The search for a cell's learning rate and strengths: a coarse log grid, then one trial at a time, their number fixed.

In the manner of a compass search (Kolda, Lewis and Torczon, SIAM Review 45, 2003): where the best point lies on the edge of what
was tried, the next one lies a full step outside; else in the widest gap beside it. The next point depends on the
finished trials only, so an interrupted search goes on where it was, and every cell spends exactly as many trials as every other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

Point = tuple[float, ...]
Scores = Mapping[Point, tuple[float, ...]]

_OFFSETS = (-1.0, 0.0, 1.0)
_ONE_AXIS = tuple(step / 2 for step in range(-4, 5))


@dataclass(frozen=True)
class Axis:
    """A positive number searched by factors: position k stands for ``centre · ratio**k``.

    off: the direction, 1 or -1, in which a strength fades to nothing (a penalty of 0, a radius without end); 0 for others.
    most: no value is above it (a share, a percentile).
    """

    name: str
    centre: float
    ratio: float
    off: int = 0
    most: float = math.inf

    def value(self, position: float) -> float:
        """Three significant digits: what is tried is exactly what is printed."""
        return float(f"{min(self.most, self.centre * self.ratio**position):.3g}")


def values(axes: Iterable[Axis], point: Point) -> dict[str, float]:
    """The numbers that a point stands for, by the name of their axis."""
    return {axis.name: axis.value(position) for axis, position in zip(axes, point, strict=True)}


def start(axes: int) -> list[Point]:
    """Nine points to begin with, so that no cell has a head start: two half-steps finer and wider on one axis, 3×3 on two,
    a Latin square on three (every pair of positions on any two axes once)."""
    if axes == 1:
        return [(position,) for position in _ONE_AXIS]
    grid = product(_OFFSETS, repeat=2)
    if axes == 2:
        return list(grid)
    return [(lr, first, (lr + first + 1) % 3 - 1) for lr, first in grid]


def best(scores: Scores) -> Point:
    """The point with the highest score; of equal ones the lowest, which is the smallest learning rate."""
    return max(sorted(scores), key=lambda point: scores[point])


def propose(axes: int, trials: int, scores: Scores) -> list[Point]:
    """What to try next: all missing points of the first grid, then one point at a time, none when ``trials`` are done."""
    missing = [point for point in start(axes) if point not in scores]
    if missing:
        return missing
    return [] if len(scores) >= trials else [_next(scores)]


def _next(scores: Scores) -> Point:
    """One step beyond the edge on which the best point lies, else into the widest gap beside it."""
    centre = best(scores)
    for axis, sign in edges(scores):
        return _moved(centre, axis, sign)
    sides = ((axis, sign) for axis in range(len(centre)) for sign in (-1, 1))
    length, axis, sign = max(((_step(scores, axis, sign), axis, sign) for axis, sign in sides), key=lambda side: side[0])
    return _moved(centre, axis, sign * length)


def _step(scores: Scores, axis: int, sign: int) -> float:
    """Half way to the next point tried in this direction, all other positions equal; where none was, a whole step, or less where
    the edge is nearer: half of that each time would never arrive there. No trial has been at the end of such a step."""
    here = best(scores)
    reach = {point: sign * (point[axis] - here[axis]) for point in scores}
    on_line = [far for point, far in reach.items() if far > 0 and _moved(here, axis, sign * far) == point]
    return min(on_line) / 2 if on_line else min(1.0, max(reach.values()))


def edges(scores: Scores) -> list[tuple[int, int]]:
    """The axes, with the direction, on which the best point lies at the end of what was tried."""
    centre = best(scores)
    sides = ((axis, sign) for axis in range(len(centre)) for sign in (-1, 1))
    return [(axis, sign) for axis, sign in sides if all(sign * (p[axis] - centre[axis]) <= 0 for p in scores)]


def widenings(scores: Scores) -> int:
    """How many of the points tried lie outside the first grid."""
    grid = start(len(next(iter(scores), ())))
    ends = [(min(column), max(column)) for column in zip(*grid, strict=True)]
    return sum(any(not low <= x <= high for x, (low, high) in zip(point, ends, strict=True)) for point in scores)


def _moved(point: Point, axis: int, by: float) -> Point:
    return tuple(x + by if index == axis else x for index, x in enumerate(point))
