"""A compass search on a lattice of choices: the learning rate until it is bracketed, then the other axes in turn, one step at a time.

Kolda, Lewis and Torczon, SIAM Review 45, 2003. The next point depends on the finished trials only, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[int, ...]
Value = float | str
Scores = Mapping[Point, float]


@dataclass(frozen=True)
class Choice:
    """One axis. values: from low to high, or in an order that makes sense; centre: the index of the first one tried.

    A ``ratio`` makes the axis endless: position k stands for ``values[0] · ratio**k``, to three significant digits.
    """

    name: str
    values: tuple[Value, ...]
    centre: int = 0
    ratio: float = 0.0

    def value(self, position: int) -> Value:
        if self.ratio:
            return float(f"{float(self.values[0]) * self.ratio**position:.3g}")
        return self.values[self.centre + position]

    def has(self, position: int) -> bool:
        return bool(self.ratio) or 0 <= self.centre + position < len(self.values)


def best(scores: Scores) -> Point:
    """The point with the highest score; of equal ones the first tried."""
    return max(scores, key=lambda point: scores[point])


def propose(axes: Sequence[Choice], scores: Scores, trials: int) -> Point | None:
    """The next point to try, None when ``trials`` are done or every neighbour of the best point was tried. The first axis is the rate."""
    if not scores:
        return (0,) * len(axes)
    if len(scores) >= trials:
        return None
    here = best(scores)
    open_axes = {i: free for i, axis in enumerate(axes) if (free := _untried(here, i, axis, scores))}
    if not open_axes:
        return None
    others_polled = any(_differing(p) - {0} for p in scores)
    if 0 in open_axes and not others_polled:
        return open_axes[0][0]
    polls = _polls(list(scores))
    axis = min(open_axes, key=lambda i: (polls.get(i, 0) + (1 if i == 0 else 0), i))
    return open_axes[axis][0]


def on_edge(scores: Scores) -> bool:
    """Whether the best point's rate lies at the end of the rates tried; of a single trial nothing is said."""
    rates = [p[0] for p in scores]
    return len(scores) > 1 and best(scores)[0] in (min(rates), max(rates))


def _untried(here: Point, axis: int, choice: Choice, scores: Scores) -> list[Point]:
    sides = [tuple(x + s if i == axis else x for i, x in enumerate(here)) for s in (1, -1)]
    return [p for p in sides if choice.has(p[axis]) and p not in scores]


def _differing(point: Point) -> set[int]:
    return {i for i, x in enumerate(point) if x}


def _polls(points: Sequence[Point]) -> dict[int, int]:
    """How many trials each axis has had: a trial belongs to the axis in which it differs from a point tried before it."""
    polls: dict[int, int] = {}
    for k, point in enumerate(points[1:], start=1):
        for earlier in reversed(points[:k]):
            different = [i for i, (a, b) in enumerate(zip(point, earlier, strict=True)) if a != b]
            if len(different) == 1:
                polls[different[0]] = polls.get(different[0], 0) + 1
                break
    return polls
