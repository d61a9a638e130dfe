"""``normwise gan``: strategies × losses, each tuned equally, judged by Fréchet distance, precision, recall and collapsed seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from normwise.errors import StudyError
from normwise.experiments import cells
from normwise.experiments.catalog.gan import GAN_STRATEGIES
from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.cells import Cell
from normwise.experiments.framework.driver import Driver
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.provenance import describe, machine, versions
from normwise.experiments.framework.study import TUNING_SEED, Options, Outputs, chosen, command, opened
from normwise.experiments.gan import tables
from normwise.experiments.gan.run import GanRun, JudgedData, score, step_times
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.fidelity import Judge, train_judge
from normwise.experiments.tasks.models.dcgan import LOSSES

# Raised by hand whenever a run's outcome changes for another reason than its settings: kept runs are then done again.
PROTOCOL = 1
_SMALL = 16


@dataclass(frozen=True)
class Budget:
    """What a study may spend: trials in every cell with the first tuning seed, how many of them again with the second, steps of every
    run, real images in a step, width of the networks, marks at which a run is judged, images drawn at a mark, rounds of the step-time
    measurement, the strategies and losses of a study that names none (None: all), reported seeds."""

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
    seeds: int = 5


BUDGETS = {
    "quick": Budget(9, 0, 150, 32, 16, 5, 400, 5, ("nothing", "clip_value", "spectral_cap", "gradient_penalty"), ("hinge",)),
    "standard": Budget(10, 3, 800, 32, 16, 10, 1000, 20),
    "long": Budget(13, 5, 4000, 32, 32, 20, 1000, 40),
}
# What differs for images larger than 16×16 (MNIST), whose steps cost five times as much.
LARGE: dict[str, dict[str, int]] = {"long": {"steps": 5000, "batch": 64, "drawn": 2000}}


def run(options: Options, outputs: Outputs) -> bool:
    """The command: runs the study, prints its table, writes the outputs; False where a bound is broken."""
    return command(study, show, options, outputs, "gan", cells.breaches)


def study(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Runs the study by the protocol of docs/gan.md and gives its results as plain data.

    ``cells`` holds every number, ``rows`` the table, ``setting`` what to read it by in words, ``judge`` the classifier's accuracy and
    the distances of real images, ``cost`` the core-hours of all runs in it. Started again with the same ``state`` it resumes where it
    stopped.

    Args:
        options: ``only`` names strategies, losses, or both.
        budget: in place of the named one.

    Raises:
        StudyError, DataError: for what cannot be run, before any run; StudyError, too, where another study works on ``options.state``.
    """
    options.check(BUDGETS)
    known = {**GAN_STRATEGIES, **LOSSES}
    if options.only is not None and not options.only:
        raise StudyError(f"No strategy or loss was given; name one or more of {', '.join(known)}.")
    named = [] if options.only is None else chosen(options.only, None, known, "strategy or loss")
    with opened(options, progress) as driver:
        data = load(options.data)
        large = LARGE.get(options.budget, {}) if max(data.shape[1:]) > _SMALL else {}
        plan = budget or replace(BUDGETS[options.budget], **large)    # type: ignore[arg-type]
        plan = replace(plan, seeds=options.seeds or plan.seeds)
        pairs = cells_of(named, plan)
        with one_thread():
            judge = train_judge(data)
        driver.on(JudgedData.of(data, judge), partial(_judged, options.data, judge))
        return _run(options, plan, driver, pairs)


def _judged(data: str | Path | None, judge: Judge) -> JudgedData:
    """The judge is trained once, and travels: an accuracy in its last bit must not depend on the machine of a run."""
    return JudgedData.of(load(data), judge)


def cells_of(named: Sequence[str], plan: Budget) -> list[tuple[str, str]]:
    """Strategy and loss of each cell, each loss with the baseline first: every other figure of the loss is read beside it."""
    losses = chosen([name for name in named if name in LOSSES] or None, plan.losses, LOSSES, "loss")
    strategies = chosen([name for name in named if name in GAN_STRATEGIES] or None, plan.strategies, GAN_STRATEGIES, "strategy")
    return [(strategy, loss) for loss in losses for strategy in [BASELINE, *(name for name in strategies if name != BASELINE)]]


def _run(options: Options, plan: Budget, driver: Driver, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    data: JudgedData = driver.context
    again = min(plan.again, plan.trials)

    def make(strategy: str, loss: str, numbers: Mapping[str, float], seed: int, full: bool) -> GanRun:
        return GanRun(
            strategy, loss, numbers["lr"], cells.strengths_of(numbers), seed, plan.steps, plan.batch, plan.width, plan.marks, plan.drawn,
            full, data.key, versions(f"gan{PROTOCOL}"),
        )  # fmt: skip

    driver.start(len(pairs) * (plan.trials + again + plan.seeds))
    found: dict[str, Cell] = driver.run({
        f"{s} {loss}": cells.tuned(s, loss, GAN_STRATEGIES[s].tuned, partial(make, s, loss), score, trials=plan.trials, again=again,
                                   seeds=plan.seeds)
        for s, loss in pairs
    })  # fmt: skip
    lines = []
    for loss in dict.fromkeys(loss for _, loss in pairs):
        group = [found[f"{strategy} {loss}"] for strategy, other in pairs if other == loss]
        runs = [make(cell.strategy, loss, cell.numbers, 0, True) for cell in group]
        times = driver.timed(runs, plan.rounds, partial(step_times, runs, data, plan.rounds),
                             f"Measuring step times, all strategies of the loss {loss} in turn.")  # fmt: skip
        lines += [tables.cell_results(cell, ms, times[0]) for cell, ms in zip(group, times, strict=True)]
    judge, samples = data.judge, plan.steps * min(plan.batch, len(data.train))
    protocol = {**asdict(plan), "samples": samples, "tuning_seeds": [TUNING_SEED, cells.AGAIN_SEED]}
    results = {
        "task": "gan", "data": describe(data), "machine": machine(), "budget": options.budget,
        "judge": {"accuracy": judge.accuracy, "floor": judge.floor, "one_class": judge.references["test"].one_class},
        "protocol": protocol, "cost": sum(cell.seconds for cell in found.values()) / 3600, "cells": lines, "rows": tables.rows(lines),
    }  # fmt: skip
    return {**results, "setting": tables.setting(results)}


def show(found: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints who is best, what it was judged by, the table, and what to know about it."""
    out = stream or sys.stdout
    print(*tables.verdict(found["cells"]), found["setting"], sep="\n", end="\n\n", file=out)
    show_table(tables.rows(sorted(found["cells"], key=tables.rank)), out)
    if said := tables.remarks(found["cells"]):
        print(*said, sep="\n", file=out)
