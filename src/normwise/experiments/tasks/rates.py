"""Learning rates of the studies' runs, as shares of the first or the highest one."""

from __future__ import annotations

import math
from collections.abc import Callable

WARMING = 0.05
SHAPES: dict[str, Callable[[float], float]] = {
    "sqrt": lambda t: 1 - math.sqrt(t), "concave": lambda t: 1 - t * t, "cooldown": lambda t: 1 - math.sqrt(t)
}  # fmt: skip


def constant_then_linear(step: int, total: int) -> float:
    """The learning rate, as a share of its first value: constant for half of the run, then linearly to zero, so that the numbers
    at the end are those of settled weights and not of the last few batches."""
    return min(1.0, 2.0 * (1.0 - step / total))


def warmed_up(step: int, steps: int, family: str) -> float:
    """The rate as a share of its peak: a linear warm-up, then, with t from 0 to 1 over what follows, ``"sqrt"`` 1 − √t, ``"linear"`` 1 − t,
    ``"concave"`` 1 − t²; ``"hold"`` until half of the run and then linear, ``"cooldown"`` until four fifths and then 1 − √t (Hägele et al.,
    2024); or ``"flat"``."""
    warm = max(1, round(WARMING * steps))
    if step < warm:
        return (step + 1) / warm
    if family == "flat":
        return 1.0
    if family in SHAPES:
        begin = max(warm, round(0.8 * steps)) if family == "cooldown" else warm
        t = max(0, step - begin) / max(1, steps - begin)
        return max(0.0, SHAPES[family](t))
    start = warm if family == "linear" else max(warm, steps // 2)
    return min(1.0, max(0.0, (steps - step) / max(1, steps - start)))
