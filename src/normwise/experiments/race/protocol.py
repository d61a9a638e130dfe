"""The numbers of docs/race.md: where horizons start, what a budget pays for, and which seeds are for what."""

from __future__ import annotations

from dataclasses import dataclass

from normwise.experiments.framework.study import TUNING_SEED
from normwise.experiments.tasks.task import STEPS

PROTOCOL = 1
"""Changes when a change of the code or of the rules would give a run other numbers; kept runs of another protocol are not used."""
LADDER_SEED = TUNING_SEED + 1
RUNGS, RATIO = 17, 0.87
SATURATED = 0.02
ROBUST_AT = (0.1, 0.316, 3.16, 10.0)


@dataclass(frozen=True)
class Budget:
    """trials: of every contender. seeds: that are reported. doublings: of the baseline's horizon, at most. scale: of the first horizon.
    contenders: by default; None for all. rounds: of the interleaved timing."""

    trials: int
    seeds: int
    doublings: int
    scale: float
    contenders: tuple[str, ...] | None
    rounds: int


BUDGETS = {
    "quick": Budget(6, 2, 0, 0.25, ("muon", "muonh"), 8),
    "standard": Budget(12, 5, 0, 1.0, ("muon", "normuon", "muonh", "scion", "ridge", "ridge_small", "ridge_roles", "auto"), 20),
    "long": Budget(24, 8, 2, 1.0, None, 40),
}


def first_horizon(task: str, batch: int, scale: float) -> int:
    """H before any doubling, in samples."""
    return max(1, round(STEPS[task] * scale)) * batch


def rung(horizon: int, k: int) -> int:
    """Samples of the k-th horizon of the ladder."""
    return max(1, round(horizon * RATIO**k))
