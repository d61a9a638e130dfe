"""``normwise compare``: every strategy with every optimizer, each tuned equally, reported on images that no choice has seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from normwise.errors import StudyError, nearest
from normwise.experiments.compare import results, step_cost
from normwise.experiments.compare.cells import TUNING_SEED, Cell, Loop
from normwise.experiments.compare.optimizers import OPTIMIZERS, PRESETS, TORCH
from normwise.experiments.compare.strategies import ARTICLE, STRATEGIES, axes, chosen, why_not
from normwise.experiments.compare.trial import Run, steps_of
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.pool import pool
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import NUMBER, Store
from normwise.experiments.tasks.data.splits import ImageData, load

TASKS = ("cnn",)
# Raised by hand whenever a run's outcome changes for another reason than its settings: kept runs are then done again.
PROTOCOL = 3
_DIGITS_FLOOR = 0.9
_SMALL = 16


@dataclass(frozen=True)
class Budget:
    """What a study may spend: trials in every cell, epochs of every run, images in a batch, the network's channels, at most this
    many training images (None: all), marks on a learning curve, rounds of the step-time measurement."""

    trials: int
    epochs: int
    batch: int
    channels: tuple[int, int]
    train_most: int | None
    marks: int
    rounds: int


# Images up to 16×16 (digits) and larger ones (MNIST), whose steps cost ten times as much. Runs must be long enough for plain
# gradient descent to leave the plateau of the small initial weights: some 300 steps.
BUDGETS: dict[str, tuple[Budget, Budget]] = {
    "quick": (Budget(9, 12, 32, (16, 32), None, 12, 20), Budget(9, 4, 32, (8, 16), 4096, 8, 10)),
    "standard": (Budget(12, 15, 32, (16, 32), None, 15, 40), Budget(12, 3, 64, (16, 32), 8192, 10, 20)),
    "long": (Budget(25, 60, 32, (32, 64), None, 60, 200), Budget(20, 4, 64, (32, 64), None, 40, 60)),
}


@dataclass(frozen=True)
class Options:
    """What to compare. None means: the article's strategies, gd, momentum and adam, scikit-learn's digits, no file of finished runs.

    strategies, optimizers: names of ``STRATEGIES`` and ``OPTIMIZERS``, or ``("all",)``; the baseline "nothing" is always run.
    """

    task: str = "cnn"
    data: Path | None = None
    budget: str = "standard"
    strategies: Sequence[str] | None = None
    optimizers: Sequence[str] | None = None
    seeds: int = 3
    workers: int = 1
    state: Path | None = None


def compare(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Runs the study and gives its results as plain data.

    Each cell (strategy × optimizer, "nothing" included) spends the same number of trials on its learning rate and strengths,
    chosen by the validation accuracy of a run of full length with a seed of its own; an optimum on the edge of what was tried
    widens the grid, within those trials. The choice is then trained with ``options.seeds`` other seeds and measured on the
    test part. Step times come from a separate measurement in which all strategies of an optimizer take turns.
    budget: in place of the named one. Raises StudyError and DataError for what cannot be run, before any run;
    StudyError, too, where another study works on ``options.state``.
    """
    _check(options)
    strategies = [results.BASELINE, *_others(options)]
    optimizers = chosen(options.optimizers, OPTIMIZERS, TORCH, "optimizer")
    pairs, left_out = _sensible([(strategy, optimizer) for optimizer in optimizers for strategy in strategies])
    told = progress or Progress()
    with locked(options.state, told.note):
        store = Store(options.state)
        data = load(options.data)
        plan = budget or _budget(options.budget, data)
        study = _Study(options, plan, data.thinned(plan.train_most), store, told, left_out)
        try:
            return study.run([Cell(*pair) for pair in pairs])
        finally:
            told.stop()


def _others(options: Options) -> Iterable[str]:
    """The strategies beside the baseline, which is always run: two columns are measured against it."""
    return (name for name in chosen(options.strategies, STRATEGIES, ARTICLE, "strategy") if name != results.BASELINE)


def _sensible(pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs of strategy and optimizer that say something, and why the others do not. StudyError where only baselines would be left
    of a study that asks for more."""
    reasons = {pair: f"{pair[0]} with {pair[1]}, which {why}" for pair in pairs if (why := why_not(*pair))}
    kept = [pair for pair in pairs if pair not in reasons]
    if reasons and all(strategy == results.BASELINE for strategy, _ in kept):
        raise StudyError(f"There is nothing to compare in {'; '.join(reasons.values())}. Name another strategy or optimizer.")
    return kept, list(reasons.values())


def _check(options: Options) -> None:
    if options.task not in TASKS:
        raise StudyError(f"Task {options.task!r} is not known.{nearest(options.task, TASKS)}")
    if options.budget not in BUDGETS:
        raise StudyError(f"Budget {options.budget!r} is not known.{nearest(options.budget, BUDGETS)}")
    for name, number in (("seeds", options.seeds), ("workers", options.workers)):
        if number < 1:
            raise StudyError(f"{name} is {number}, but must be a whole number >= 1.")


def _budget(name: str, data: ImageData) -> Budget:
    small, large = BUDGETS[name]
    return small if max(data.shape[1:]) <= _SMALL else large


class _Study:
    def __init__(
        self, options: Options, budget: Budget, data: ImageData, store: Store, progress: Progress, left_out: list[str]
    ) -> None:
        self.options, self.budget, self.data, self.store, self.progress = options, budget, data, store, progress
        self.left_out = left_out

    def run(self, cells: list[Cell]) -> dict[str, Any]:
        """All runs, then the step times, then the results."""
        loop = Loop(cells, self.make, self.budget.trials, self.options.seeds, self.store, self.progress)
        for reason in self.left_out:
            self.progress.note(f"Left out: {reason}.")
        self.progress.start(len(cells) * (self.budget.trials + self.options.seeds))
        loop.run(self.options.workers, self._pool)
        self.progress.note("Measuring step times, all strategies of an optimizer in turn.")
        costs = self.costs(cells)
        base = {cell.optimizer: cell for cell in cells if cell.strategy == results.BASELINE}
        samples = len(self.data.train)
        steps = steps_of(self.make(cells[0], cells[0].numbers(), 0, True), samples)
        adam = base.get("adam") if base.keys() & PRESETS.keys() else None    # the article's three need no further column
        lines = [results.cell_results(cell, base[cell.optimizer], adam, costs[id(cell)], samples) for cell in cells]
        return {
            "task": self.options.task, "data": results.describe(self.data), "machine": results.machine(),
            "budget": self.options.budget, "protocol": self.protocol(lines, steps), "cells": lines,
            "baseline_defects": self.defects(lines),
        }  # fmt: skip

    def _pool(self) -> AbstractContextManager[Executor]:
        return pool(self.options.workers, self.data)

    def make(self, cell: Cell, numbers: dict[str, float], seed: int, full: bool) -> Run:
        """The run of a cell at these numbers."""
        from normwise import __version__

        plan, strengths = self.budget, {name: value for name, value in numbers.items() if name != "lr"}
        return Run(
            cell.strategy, cell.optimizer, numbers["lr"], strengths, seed, plan.epochs, plan.batch, plan.channels,
            plan.marks, full, self.data.key, (f"{__version__}+{PROTOCOL}", torch.__version__),
        )  # fmt: skip

    def costs(self, cells: list[Cell]) -> dict[int, dict[str, float]]:
        """Step time and the control's share by cell, from a kept measurement where there is one."""
        costs: dict[int, dict[str, float]] = {}
        for optimizer in dict.fromkeys(cell.optimizer for cell in cells):
            group = [cell for cell in cells if cell.optimizer == optimizer]
            runs = [self.make(cell, cell.numbers(), 0, True) for cell in group]
            settings = step_cost.as_plain(runs, self.budget.rounds)
            kept = self.store.get(settings, {"costs": [{"step_ms": NUMBER, "control_share": NUMBER}] * len(runs)})
            if kept is None:
                kept = {"costs": step_cost.measure(runs, self.data, self.budget.rounds)}
                self.store.add(settings, kept)
            costs |= {id(cell): cost for cell, cost in zip(group, kept["costs"], strict=True)}
        return costs

    def protocol(self, lines: list[dict[str, Any]], steps: int) -> dict[str, Any]:
        """How the numbers came about, for the reader of the JSON."""
        return {
            **asdict(self.budget), "steps": steps, "seeds": self.options.seeds,
            "tuning_seed": TUNING_SEED, "widenings": sum(line["widenings"] for line in lines),
            "cells_on_edge": _listed(lines, "on_edge"), "cells_fading_out": _listed(lines, "fades_out"),
            "left_out": self.left_out, "optimizers": {name: OPTIMIZERS[name].about for name in {line["optimizer"]: 0 for line in lines}},
            "search": {f"{line['strategy']} with {line['optimizer']}": _grid(line) for line in lines},
            "notes": list(NOTES),
        }  # fmt: skip

    def defects(self, lines: list[dict[str, Any]]) -> list[str]:
        """Baselines that were not trained: a comparison with one of them would mean nothing."""
        floor = _DIGITS_FLOOR if self.options.data is None else min(2 * self.data.commonest, _DIGITS_FLOOR)
        bases = [line for line in lines if line["strategy"] == results.BASELINE]
        return [
            f"The baseline with {line['optimizer']} reaches {100 * line['test_accuracy']['mean']:.1f}% on the test part, "
            f"under the {100 * floor:.0f}% below which it counts as not trained."
            for line in bases if line["test_accuracy"]["mean"] < floor
        ]  # fmt: skip


def _listed(lines: list[dict[str, Any]], what: str) -> list[str]:
    return [f"{line['strategy']} with {line['optimizer']}: {', '.join(line[what])}" for line in lines if line[what]]


def _grid(line: dict[str, Any]) -> str:
    """Where the search of a cell began."""
    spans = [(axis, 2.0) for axis in axes(line["strategy"], line["optimizer"])]
    if len(spans) > 1:
        spans = [(axis, 1.0) for axis, _ in spans]
    return ", ".join(f"{axis.name} {axis.value(-wide):.3g} to {axis.value(wide):.3g}" for axis, wide in spans)


NOTES = (
    "Every cell spends the same number of trials, 'nothing' all of them on its learning rate; trials that widen the grid count.",
    "Chosen by validation accuracy, then by validation loss, at the last three marks of a run with a seed that is not reported; an "
    "optimum on the edge of what was tried widens the grid while trials are left, and cells_on_edge lists where they were not "
    "enough; cells_fading_out lists where the weakest strength tried is the best: there the strategy is better left out.",
    "Every run keeps its learning rate for half of its steps and then lowers it linearly to zero.",
    "Strengths l1 and l2 are λ/m, the factor beside the mean loss; the policy states the article's λ and m.",
    "steps_to_baseline: to the best validation accuracy of 'nothing' with the same optimizer and seed; null where it is missed. "
    "seconds_to_baseline is that many times step_ms. steps_to_adam: the same, to the baseline of adam, where presets are compared.",
    "step_ms and control_share are medians of bursts of steps in which all strategies of an optimizer take turns on one thread.",
    "spread is the sample standard deviation over seeds; the split into parts is the same for all of them.",
    "violations counts the bounds that do not hold when every one is measured again in float64 at the end of each reported run.",
)

