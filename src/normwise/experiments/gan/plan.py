"""One cell of the GAN study, strategy × loss, as a plan: equal trials, the best of them once more, the choice then reported."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normwise.experiments.catalog import GAN_STRATEGIES
from normwise.experiments.framework.driver import Plan, Result
from normwise.experiments.framework.lattice import Point, at_the_end, lowest_best, search, values, widening
from normwise.experiments.framework.study import TUNING_SEED
from normwise.experiments.gan.run import GanRun

AGAIN_SEED = TUNING_SEED + 1
# strategy, loss, numbers, seed, full -> run.
Make = Callable[[str, str, Mapping[str, float], int, bool], GanRun]


@dataclass(frozen=True)
class Cell:
    """What came of a cell. numbers: the choice. trials: results by point, those of the first tuning seed first. finals: by seed."""

    strategy: str
    loss: str
    numbers: dict[str, float]
    trials: dict[Point, list[Result]]
    finals: list[Result]

    @property
    def ends(self) -> dict[str, list[str]]:
        """Whether the best of the first seed lies at the end of what was tried."""
        return at_the_end(GAN_STRATEGIES[self.strategy].tuned, {point: score(found[:1]) for point, found in self.trials.items()})

    @property
    def seconds(self) -> float:
        """Of training, over all runs."""
        return sum(float(result["seconds"]) for result in [*self.finals, *(r for found in self.trials.values() for r in found)])


def tuned(make: Make, strategy: str, loss: str, trials: int, again: int, seeds: int) -> Plan:
    """``trials`` points with one tuning seed, the ``again`` best of them with another, then the choice with ``seeds`` others."""
    axes = GAN_STRATEGIES[strategy].tuned
    scores, results = yield from search(
        widening, axes, trials, lambda numbers: make(strategy, loss, numbers, TUNING_SEED, False), lambda result: score([result])
    )
    found = {point: [result] for point, result in results.items()}
    second = best_of(scores, again)
    more = yield [make(strategy, loss, values(axes, point), AGAIN_SEED, False) for point in second]
    for point, result in zip(second, more, strict=True):
        found[point].append(result)
    numbers = values(axes, choice(found))
    finals = yield [make(strategy, loss, numbers, seed, True) for seed in range(seeds)]
    return Cell(strategy, loss, numbers, found, finals)


def best_of(scores: Mapping[Point, Any], count: int) -> list[Point]:
    """The best points, of equal ones the lowest first."""
    return sorted(sorted(scores), key=lambda point: scores[point], reverse=True)[:count]


def choice(found: Mapping[Point, Sequence[Result]]) -> Point:
    """The best mean over the seeds among the points that saw the most seeds."""
    most = max(map(len, found.values()))
    return lowest_best({point: score(results) for point, results in found.items() if len(results) == most})


def score(results: Sequence[Result]) -> tuple[float, float]:
    """Higher is better: the share of runs that did not diverge, then minus their mean distance."""
    distances = [result["distance"] for result in results if not result["diverged"]]
    return len(distances) / len(results), -statistics.fmean(distances) if distances else float("-inf")
