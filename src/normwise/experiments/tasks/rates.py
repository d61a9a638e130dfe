"""Learning rates of the studies' runs, as shares of the first or the highest one."""

from __future__ import annotations

WARMING = 0.05


def constant_then_linear(step: int, total: int) -> float:
    """The learning rate, as a share of its first value: constant for half of the run, then linearly to zero, so that the numbers
    at the end are those of settled weights and not of the last few batches."""
    return min(1.0, 2.0 * (1.0 - step / total))


def warmed_up(step: int, steps: int, family: str) -> float:
    """The rate as a share of its peak: a linear warm-up, then ``"linear"`` to zero, or ``"hold"`` until half of the run and then linear."""
    warm = max(1, round(WARMING * steps))
    if step < warm:
        return (step + 1) / warm
    start = warm if family == "linear" else max(warm, steps // 2)
    return min(1.0, max(0.0, (steps - step) / max(1, steps - start)))
