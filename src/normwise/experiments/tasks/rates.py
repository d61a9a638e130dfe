"""Learning rates of the studies' runs, as shares of the first one."""

from __future__ import annotations


def constant_then_linear(step: int, total: int) -> float:
    """The learning rate, as a share of its first value: constant for half of the run, then linearly to zero, so that the numbers
    at the end are those of settled weights and not of the last few batches."""
    return min(1.0, 2.0 * (1.0 - step / total))
