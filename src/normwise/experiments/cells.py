"""What ``compare`` and ``gan`` share: cells of a strategy within a group (an optimizer, a loss), each tuned equally and then reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normwise.experiments.framework.driver import Plan
from normwise.experiments.framework.lattice import Axis, Point, at_the_end, lowest_best, search, values, widening
from normwise.experiments.framework.store import Result, Run
from normwise.experiments.framework.study import TUNING_SEED

AGAIN_SEED = TUNING_SEED + 1
Score = Callable[[Sequence[Result]], Any]
"""Results of one point with several seeds to what points are ranked by: higher is better."""


@dataclass(frozen=True)
class Cell:
    """What came of a strategy in a group. numbers: the choice. trials: results by point, those of the first tuning seed first. finals: by
    reported seed. ends: see ``lattice.at_the_end``, by the first tuning seed."""

    strategy: str
    group: str
    numbers: dict[str, float]
    trials: dict[Point, list[Result]]
    finals: list[Result]
    ends: dict[str, list[str]]

    @property
    def seconds(self) -> float:
        """Of training, over all runs."""
        return sum(float(result["seconds"]) for results in [self.finals, *self.trials.values()] for result in results)

    def told(self, label: str, about: str, policy_yaml: str) -> dict[str, Any]:
        """What every study says of a cell, as plain data."""
        return {
            "strategy": self.strategy, "label": label, "about": about, "lr": self.numbers["lr"], "strengths": strengths_of(self.numbers),
            "policy_yaml": policy_yaml, "trials": sum(map(len, self.trials.values())), **self.ends,
            "violations": sum(len(final["breaches"]) for final in self.finals),
            "breaches": sorted({breach for final in self.finals for breach in final["breaches"]}),
            "curves": [{"seed": seed, **final["curve"]} for seed, final in enumerate(self.finals)],
        }  # fmt: skip


def strengths_of(numbers: Mapping[str, float]) -> dict[str, float]:
    """What is chosen beside the learning rate."""
    return {name: value for name, value in numbers.items() if name != "lr"}


def tuned(
    strategy: str, group: str, axes: Sequence[Axis], make: Callable[[dict[str, float], int, bool], Run], score: Score, *,
    trials: int, again: int = 0, seeds: int,
) -> Plan:  # fmt: skip
    """A cell: ``trials`` points with one tuning seed, the ``again`` best of them with another, then the choice with ``seeds`` others.

    make: numbers, seed, whether the run is one to report -> run.
    """
    scores, results = yield from search(
        widening, axes, trials, lambda numbers: make(numbers, TUNING_SEED, False), lambda result: score([result])
    )
    found = {point: [result] for point, result in results.items()}
    second = best_of(scores, again)
    more = yield [make(values(axes, point), AGAIN_SEED, False) for point in second]
    for point, result in zip(second, more, strict=True):
        found[point].append(result)
    numbers = values(axes, choice(found, score))
    finals = yield [make(numbers, seed, True) for seed in range(seeds)]
    return Cell(strategy, group, numbers, found, finals, at_the_end(axes, scores))


def best_of(scores: Mapping[Point, Any], count: int) -> list[Point]:
    """The best points, of equal ones the lowest first."""
    return sorted(sorted(scores), key=lambda point: scores[point], reverse=True)[:count]


def choice(found: Mapping[Point, Sequence[Result]], score: Score) -> Point:
    """The best score among the points that saw the most seeds."""
    most = max(map(len, found.values()))
    return lowest_best({point: score(results) for point, results in found.items() if len(results) == most})


def breaches(results: Mapping[str, Any]) -> list[str]:
    """Every bound that a reported run was found to break."""
    return [breach for cell in results["cells"] for breach in cell["breaches"]]


def remarks(cells: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str], **more: Sequence[str]) -> list[str]:
    """What to know about single cells. more: further lists, by the words that they follow."""
    edge = "Best at the edge of what was tried, so that more trials may find better (--budget long)"
    found = {
        text: [f"{name(cell)} ({', '.join(cell[key])})" for cell in cells if cell.get(key)]
        for text, key in ((edge, "on_edge"), ("Best at the weakest strength tried, so better left out", "fades_out"))
    }
    return [f"{text}: {'; '.join(told)}." for text, told in (found | more).items() if told]
