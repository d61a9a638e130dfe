"""The GAN study: strategies × losses, each tuned equally, judged by Fréchet distance, precision, recall and collapsed seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from normwise.errors import StudyError, nearest
from normwise.experiments.bench import runner
from normwise.experiments.compare import results
from normwise.experiments.compare.cells import TUNING_SEED, Cell
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.pool import one_thread, pool
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import NUMBER, Store
from normwise.experiments.gan import results as gan_results
from normwise.experiments.gan.cells import AGAIN_SEED, GanCell, GanLoop
from normwise.experiments.gan.results import BASELINE
from normwise.experiments.gan.strategies import STRATEGIES
from normwise.experiments.gan.trial import JudgedData, Run
from normwise.experiments.tasks.data.splits import ImageData, load
from normwise.experiments.tasks.fidelity import train_judge
from normwise.experiments.tasks.models.dcgan import LOSSES

# Raised by hand whenever a run's outcome changes for another reason than its settings: kept runs are then done again.
PROTOCOL = 1
_SMALL = 16


@dataclass(frozen=True)
class Budget:
    """What a study may spend: trials in every cell with the first tuning seed, how many of them again with the second, steps of every
    run, real images in a step, width of the networks, marks at which a run is judged, images drawn at a mark, rounds of the step-time
    measurement, the strategies and losses of a study that names none (None: all)."""

    trials: int
    again: int
    steps: int
    batch: int
    width: int
    marks: int
    drawn: int
    rounds: int
    strategies: tuple[str, ...] | None = None
    losses: tuple[str, ...] | None = None


# Images up to 16×16 (digits) and larger ones (MNIST), whose steps cost five times as much.
_FEW = ("nothing", "clip_value", "spectral_cap", "gradient_penalty")
BUDGETS: dict[str, tuple[Budget, Budget]] = {
    "quick": (Budget(9, 0, 150, 32, 16, 5, 400, 5, _FEW, ("hinge",)), Budget(9, 0, 150, 32, 16, 5, 400, 5, _FEW, ("hinge",))),
    "standard": (Budget(10, 3, 800, 32, 16, 10, 1000, 20), Budget(10, 3, 800, 32, 16, 10, 1000, 20)),
    "long": (Budget(13, 5, 4000, 32, 32, 20, 1000, 40), Budget(13, 5, 5000, 64, 32, 20, 2000, 40)),
}


@dataclass(frozen=True)
class Options:
    """What to compare. None means: scikit-learn's digits, the budget's strategies and losses, no file of finished runs.

    data: a folder of parquet or IDX files, or what else ``tasks.data.load`` takes. seeds: reported runs of each cell, none of which a
    choice was made on. state: finished runs, to go on from.
    """

    data: str | Path | None = None
    budget: str = "standard"
    strategies: Sequence[str] | None = None
    losses: Sequence[str] | None = None
    seeds: int = 5
    workers: int = 1
    state: Path | None = None


def run(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Runs the study by the protocol of docs/gan.md and gives its results as plain data.

    ``cells`` holds every number, ``rows`` the table, ``setting`` what to read it by in words, ``judge`` the classifier's accuracy and
    the distances of real images, ``cost`` the core-hours of all runs in it. budget: in place of the named one. Started again with the
    same ``state``, it goes on where it was. Raises StudyError and DataError for what cannot be run, before any run; StudyError, too,
    where another study works on ``options.state``.
    """
    _check(options)
    told = progress or Progress()
    with locked(options.state, told.note):
        store = Store(options.state)
        data = load(options.data)
        plan = budget or _budget(options.budget, data)
        cells = _cells(options, plan)
        with one_thread():
            judged = JudgedData.of(data, train_judge(data))
        study = _Study(options, plan, judged, store, told)
        try:
            return study.run(cells)
        finally:
            told.stop()


def show(found: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints what was judged by, the table, and what to know about it."""
    out = stream or sys.stdout
    print(found["setting"], file=out)
    runner.show(found, out)
    for remark, cells in _remarks(found).items():
        print(f"{remark}: {'; '.join(cells)}.", file=out)


def setting(found: Mapping[str, Any]) -> str:
    """Data, judge, protocol, cost and machine in a few sentences."""
    data, judge, protocol, machine = (found[name] for name in ("data", "judge", "protocol", "machine"))
    return (
        f"{data['name']}: {data['train']} images to train, {data['validation']} to choose on, {data['test']} to test. The judging "
        f"classifier is right on {100 * judge['accuracy']:.1f}% of the test images; the Fréchet distance between real validation and real "
        f"test images is {judge['floor']:.4f}, that of perfect images of the best single class {judge['one_class']:.3f}. Each cell: "
        f"{protocol['trials']} + {protocol['again']} trials, {protocol['seeds']} seeds (median, lowest to highest; means), "
        f"{protocol['steps']} steps of {protocol['batch']} images ({protocol['samples']} samples). {found['cost']:.2f} core-hours, budget "
        f"{found['budget']}; {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['date'][:10]}."
    )


def _remarks(found: Mapping[str, Any]) -> dict[str, list[str]]:
    remarks = {
        "Best at the edge of what was tried, so that more trials may find better (--budget long)": "on_edge",
        "Best at the weakest strength tried, so perhaps better left out": "fades_out",
        "BOUNDS BROKEN": "breaches",
    }
    listed = {
        text: [f"{cell['label']} with the loss {cell['loss']} ({', '.join(cell[name])})" for cell in found["cells"] if cell[name]]
        for text, name in remarks.items()
    }
    return {text: cells for text, cells in listed.items() if cells}


def _cells(options: Options, plan: Budget) -> list[GanCell]:
    """Each loss with the baseline first: every other figure of the loss is read beside it."""
    losses = _chosen(options.losses, plan.losses, LOSSES, "loss")
    named = _chosen(options.strategies, plan.strategies, STRATEGIES, "strategy")
    strategies = [BASELINE, *(name for name in named if name != BASELINE)]
    return [GanCell(strategy, loss) for loss in losses for strategy in strategies]


def _chosen(names: Sequence[str] | None, usual: Sequence[str] | None, table: Mapping[str, Any], what: str) -> list[str]:
    """The names in the table's order; where None are given the usual ones, where those are None all."""
    names = usual if names is None else names
    if names is None:
        return list(table)
    unknown = next((name for name in names if name not in table), None)
    if unknown is not None:
        raise StudyError(f"The {what} {unknown!r} is not known.{nearest(unknown, table)}")
    if not names:
        raise StudyError(f"No {what} was given; name one or more of {', '.join(table)}.")
    return [name for name in table if name in names]


def _check(options: Options) -> None:
    if options.budget not in BUDGETS:
        raise StudyError(f"Budget {options.budget!r} is not known.{nearest(options.budget, BUDGETS)}")
    for name, number in (("seeds", options.seeds), ("workers", options.workers)):
        if number < 1:
            raise StudyError(f"{name} is {number}, but must be a whole number >= 1.")
    _chosen(options.losses, None, LOSSES, "loss")
    _chosen(options.strategies, None, STRATEGIES, "strategy")


def _budget(name: str, data: ImageData) -> Budget:
    small, large = BUDGETS[name]
    return small if max(data.shape[1:]) <= _SMALL else large


class _Study:
    def __init__(self, options: Options, budget: Budget, data: JudgedData, store: Store, progress: Progress) -> None:
        self.options, self.budget, self.data, self.store, self.progress = options, budget, data, store, progress

    def run(self, cells: list[GanCell]) -> dict[str, Any]:
        """All runs, then the step times, then the results."""
        plan, seeds = self.budget, self.options.seeds
        again = min(plan.again, plan.trials)
        loop = GanLoop(cells, self.make, plan.trials, again, seeds, self.store, self.progress)
        self.progress.start(len(cells) * (plan.trials + again + seeds))
        loop.run(self.options.workers, self._workers)
        self.progress.note("Measuring step times, all strategies of a loss in turn.")
        times = {loss: self.times([cell for cell in cells if cell.loss == loss]) for loss in dict.fromkeys(cell.loss for cell in cells)}
        lines = [gan_results.cell_results(cell, times[cell.loss][cell.strategy], times[cell.loss][BASELINE]) for cell in cells]
        found = {
            "task": "gan", "data": results.describe(self.data), "machine": results.machine(), "budget": self.options.budget,
            "judge": self.judge(), "protocol": self.protocol(), "cost": _core_hours(cells),
            "cells": lines, "rows": gan_results.rows(lines),
        }  # fmt: skip
        return {**found, "setting": setting(found)}

    def _workers(self) -> AbstractContextManager[Executor]:
        return pool(self.options.workers, self.data)

    def make(self, cell: Cell, numbers: dict[str, float], seed: int, full: bool) -> Run:
        """The run of a cell at these numbers."""
        from normwise import __version__

        plan, strengths = self.budget, {name: value for name, value in numbers.items() if name != "lr"}
        return Run(
            cell.strategy, cell.optimizer, numbers["lr"], strengths, seed, plan.steps, plan.batch, plan.width, plan.marks,
            plan.drawn, full, self.data.key, (f"{__version__}+gan{PROTOCOL}", torch.__version__),
        )  # fmt: skip

    def times(self, group: list[GanCell]) -> dict[str, float]:
        """Milliseconds a step by strategy, from a kept measurement where there is one."""
        runs = [self.make(cell, cell.numbers(), 0, True) for cell in group]
        settings = {"kind": "gan timing", "rounds": self.budget.rounds, "runs": [run.settings() for run in runs]}
        kept = self.store.get(settings, {"step_ms": [NUMBER] * len(runs)})
        if kept is None:
            kept = {"step_ms": gan_results.step_times(runs, self.data, self.budget.rounds)}
            self.store.add(settings, kept)
        return {cell.strategy: step_ms for cell, step_ms in zip(group, kept["step_ms"], strict=True)}

    def judge(self) -> dict[str, float]:
        """What the distances are to be read by."""
        judge = self.data.judge
        return {"accuracy": judge.accuracy, "floor": judge.floor, "one_class": judge.references["test"].one_class}

    def protocol(self) -> dict[str, Any]:
        """How the numbers came about, for the reader of the JSON; docs/gan.md says it in words."""
        plan = self.budget
        samples = plan.steps * min(plan.batch, len(self.data.train))
        return {**asdict(plan), "samples": samples, "seeds": self.options.seeds, "tuning_seeds": [TUNING_SEED, AGAIN_SEED]}


def _core_hours(cells: Sequence[GanCell]) -> float:
    tried = [result for cell in cells for by_seed in cell.trials.values() for result in by_seed.values()]
    reported = [result for cell in cells for result in cell.finals.values()]
    return sum(float(result["seconds"]) for result in [*tried, *reported]) / 3600
