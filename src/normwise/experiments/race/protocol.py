"""The numbers of docs/race.md: where horizons start, what a budget pays for, and which seeds are for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normwise.experiments.catalog.contenders import CATALOGUES, Contender
from normwise.experiments.framework.study import TUNING_SEED
from normwise.experiments.tasks.task import STEPS

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


_AT_STANDARD = ("schedulefree", "torch_muon", "muon", "normuon", "ridge_roles", "auto",
                "adamw_untuned", "sgd_untuned", "schedulefree_untuned", "muon_untuned")  # fmt: skip
BUDGETS_2 = {
    "quick": Budget(4, 2, 0, 0.1, ("muon", "auto"), 4),
    "standard": Budget(16, 5, 0, 1.0, _AT_STANDARD, 20),
    "long": Budget(32, 8, 2, 1.0, None, 40),
}


@dataclass(frozen=True)
class Protocol:
    """number: changes when a change of the code or of the rules would give a run other numbers; runs of two protocols are never mixed.
    contenders, budgets: by name. first_seed: of those that are reported. more: trials of some contenders, as multiples of the budget's.
    steps: of tasks whose first horizon is not their ordinary length."""

    number: int
    contenders: Mapping[str, Contender]
    budgets: Mapping[str, Budget]
    first_seed: int = 0
    more: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    def trials(self, name: str, budget: Budget) -> int:
        """Of a contender."""
        return round(budget.trials * self.more.get(name, 1.0))

    def reported(self, seeds: int) -> range:
        """The seeds of the figures, so many of them."""
        return range(self.first_seed, self.first_seed + seeds)


PROTOCOLS = {
    1: Protocol(1, CATALOGUES[1], BUDGETS),
    2: Protocol(2, CATALOGUES[2], BUDGETS_2, first_seed=10_000, more={"adamw": 1.5}, steps={"resnet": 300}),
}
PROTOCOL = 2
"""Of new races."""


def first_horizon(task: str, batch: int, scale: float, protocol: int = PROTOCOL) -> int:
    """H before any doubling, in samples."""
    return max(1, round(PROTOCOLS[protocol].steps.get(task, STEPS[task]) * scale)) * batch


def rung(horizon: int, k: int) -> int:
    """Samples of the k-th horizon of the ladder."""
    return max(1, round(horizon * RATIO**k))
