"""``normwise compare TASK``: every strategy with every optimizer, each tuned equally, reported on data that no choice has seen."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TextIO

from normwise.errors import StudyError, nearest
from normwise.experiments import cells
from normwise.experiments.catalog.optimizers import OPTIMIZERS, PRESETS, TORCH
from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.catalog.strategies import ARTICLE, STRATEGIES, axes_of, why_not
from normwise.experiments.cells import Cell
from normwise.experiments.compare import tables
from normwise.experiments.compare.run import CompareRun, step_costs
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.provenance import machine, versions
from normwise.experiments.framework.store import NUMBER, Result
from normwise.experiments.framework.study import TUNING_SEED, Options, Outputs, command, opened
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import STEPS, Task

# Raised by hand whenever a run's outcome changes for another reason than its settings: kept runs are then done again.
PROTOCOL = 4
ALL = "all"
SEEDS = 3
_BUNDLED_FLOOR = 0.9  # accuracy on digits under which a baseline counts as not trained
_NEEDS_ATTENTION = "qk_clip"


@dataclass(frozen=True)
class Budget:
    """What a study may spend: trials in every cell; steps of every run, as a share of the task's; marks on a learning curve; rounds of the
    step-time measurement."""

    trials: int
    scale: float
    marks: int
    rounds: int


# Runs must be long enough for plain gradient descent to leave the plateau of the article's small initial weights: some 300 steps of 800.
BUDGETS = {"quick": Budget(9, 0.4, 10, 20), "standard": Budget(12, 0.5, 15, 40), "long": Budget(25, 2.0, 40, 100)}


def run(options: Options, outputs: Outputs) -> bool:
    """The command: compares, prints, writes the outputs. False where a bound is broken or a baseline is not trained."""
    return command(
        compare, show, options, outputs, f"compare-{options.task}",
        complaints=lambda results: [*results["baseline_defects"], *cells.breaches(results)],
    )  # fmt: skip


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints who is better than the baseline, what was compared, a table for each optimizer, and what to know."""
    out = stream or sys.stdout
    print(tables.headline(results), tables.title(results), sep="\n", end="\n\n", file=out)
    for optimizer in dict.fromkeys(cell["optimizer"] for cell in results["cells"]):
        show_table(tables.rows(results, optimizer), out)
    print(*tables.remarks(results), sep="\n", file=out)


def compare(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Runs the study, or resumes it, and gives its results as plain data.

    Each cell (strategy × optimizer, "nothing" included) spends the same number of trials on its learning rate and strengths, chosen on
    validation by a run of full length with a seed of its own; an optimum on the edge of what was tried widens the grid, within these
    trials. The choice is then trained with every reported seed and measured on the test part. Step times come from a separate
    measurement in which all strategies of an optimizer take turns.

    Args:
        options: ``only`` names strategies, optimizers or both, or is ``("all",)``; of what is not named the article's are compared.
        budget: in place of the named one.

    Raises:
        StudyError, DataError: for what cannot be run, before any run; StudyError, too, where another study works on ``options.state``.
    """
    options.check(BUDGETS)
    pairs, left_out = pairs_of(options.only)
    plan, seeds = budget or BUDGETS[options.budget], options.seeds or SEEDS
    with opened(options, progress) as driver:
        setup = partial(load_task, options.task, options.data, size=options.size)
        task = setup()
        driver.on(task, setup)
        for reason in left_out:
            driver.progress.note(f"Left out: {reason}.")
        steps = max(1, round(plan.scale * STEPS[task.name]))

        def make(strategy: str, optimizer: str, numbers: Mapping[str, float], seed: int, full: bool) -> CompareRun:
            return CompareRun(
                task.key, strategy, optimizer, numbers["lr"], cells.strengths_of(numbers), seed, steps, task.batch, plan.marks, full,
                versions(str(PROTOCOL)),
            )  # fmt: skip

        driver.start(len(pairs) * (plan.trials + seeds))
        found: dict[str, Cell] = driver.run({
            f"{s} with {o}": cells.tuned(s, o, axes_of(s, o), partial(make, s, o), partial(_score, task), trials=plan.trials, seeds=seeds)
            for s, o in pairs
        })  # fmt: skip
        lines = []
        for optimizer in dict.fromkeys(optimizer for _, optimizer in pairs):
            group = [found[f"{s} with {o}"] for s, o in pairs if o == optimizer]
            runs = [make(cell.strategy, optimizer, cell.numbers, 0, True) for cell in group]
            costs = driver.timed(
                runs, plan.rounds, partial(step_costs, runs, task, plan.rounds),
                f"Measuring step times, all strategies with {optimizer} in turn.", "costs", {"step_ms": NUMBER, "control_share": NUMBER},
            )  # fmt: skip
            # The article's three optimizers need no column that compares presets with Adam.
            adam = found.get(f"{BASELINE} with adam") if any(o in PRESETS for _, o in pairs) else None
            lines += [tables.cell_results(cell, group[0], adam, cost, task) for cell, cost in zip(group, costs, strict=True)]
    protocol = {
        "number": PROTOCOL, **asdict(plan), "steps": steps, "batch": task.batch, "seeds": seeds, "tuning_seed": TUNING_SEED,
        "left_out": left_out,
        "optimizers": {name: OPTIMIZERS[name].about for name in dict.fromkeys(line["optimizer"] for line in lines)}, "notes": list(NOTES),
    }  # fmt: skip
    return {
        "task": task.name, "metric": task.metric, "data": task.facts, "machine": machine(), "budget": options.budget, "protocol": protocol,
        "cells": lines, "baseline_defects": _defects(lines, task, bundled=options.data is None),
    }  # fmt: skip


def pairs_of(names: Sequence[str] | None) -> tuple[list[tuple[str, str]], list[str]]:
    """Strategy and optimizer of each cell, each optimizer with the baseline first; and why the pairs that would say nothing are left out.

    Raises StudyError for an unknown name, for none, and where only baselines would be left of a study that asks for more.
    """
    known = {**STRATEGIES, **OPTIMIZERS}
    if names is not None and not names:
        raise StudyError(f"No strategy or optimizer was given; name one or more of {', '.join(known)}, or {ALL}.")
    for name in names or ():
        if name == _NEEDS_ATTENTION:
            raise StudyError(
                f"strategy {name!r} scales the queries and keys of attention heads, and the networks compared here report none."
            )
        if name not in known and name != ALL:
            raise StudyError(f"strategy or optimizer {name!r} is not known.{nearest(name, [*known, ALL])}")

    def named(table: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
        return [name for name in table if ALL in (names or ()) or name in (names or ())] or list(usual)

    strategies = [BASELINE, *(name for name in named(STRATEGIES, ARTICLE) if name != BASELINE)]
    pairs = [(strategy, optimizer) for optimizer in named(OPTIMIZERS, TORCH) for strategy in strategies]
    reasons = {pair: f"{pair[0]} with {pair[1]}, which {why}" for pair in pairs if (why := why_not(*pair))}
    kept = [pair for pair in pairs if pair not in reasons]
    if reasons and all(strategy == BASELINE for strategy, _ in kept):
        raise StudyError(f"There is nothing to compare in {'; '.join(reasons.values())}. Name another strategy or optimizer.")
    return kept, list(reasons.values())


def _score(task: Task, results: Sequence[Result]) -> tuple[float, ...]:
    """What the task is judged by, then the other; a run that diverged comes after every run that did not."""
    [result] = results
    accuracy, loss = result["validation"]["accuracy"], result["validation"]["loss"]
    below = float("-inf") if loss is None else -loss
    return (0.0 if result["diverged"] else 1.0, *((accuracy, below) if task.metric == "accuracy" else (below, accuracy)))


def _defects(lines: Sequence[Mapping[str, Any]], task: Task, bundled: bool) -> list[str]:
    """Baselines that were not trained: a comparison with one of them would mean nothing."""
    said = []
    for line in (line for line in lines if line["strategy"] == BASELINE):
        accuracy, loss = line["test_accuracy"]["mean"], line["test_loss"]["mean"]
        floor = _BUNDLED_FLOOR if bundled else min(2 * task.guess, _BUNDLED_FLOOR)
        if task.metric == "accuracy" and accuracy < floor:
            said.append(f"The baseline with {line['optimizer']} reaches {100 * accuracy:.1f}% on the test part, "
                        f"under the {100 * floor:.0f}% below which it counts as not trained.")  # fmt: skip
        elif task.metric == "loss" and (loss is None or loss > _BUNDLED_FLOOR * task.guess):
            ended = tables.MISSING if loss is None else f"{loss:.2f}"
            said.append(f"The baseline with {line['optimizer']} ends at a test loss of {ended}, over the "
                        f"{_BUNDLED_FLOOR * task.guess:.2f} above which it counts as not trained.")  # fmt: skip
    return said


NOTES = (
    "Every cell spends the same number of trials, 'nothing' all of them on its learning rate; trials that widen the grid count.",
    "Chosen on validation, by what the task is judged by, at the last three marks of a run with a seed that is not reported; an optimum on "
    "the edge of what was tried widens the grid while trials are left, and on_edge lists where they were not enough; fades_out lists where "
    "the weakest strength tried is the best: there the strategy is better left out.",
    "Every run keeps its learning rate for half of its steps and then lowers it linearly to zero.",
    "Strengths l1 and l2 are λ/m, the factor beside the mean loss; the policy states the article's λ and m.",
    "steps_to_baseline: to the best validation result of 'nothing' with the same optimizer and seed; null where it is missed. "
    "seconds_to_baseline is that many times step_ms. steps_to_adam: the same, to the baseline of adam, where presets are compared.",
    "step_ms and control_share are medians of bursts of steps in which all strategies of an optimizer take turns on one thread.",
    "spread is the sample standard deviation over seeds; the split into parts is the same for all of them.",
    "violations counts the bounds that do not hold when every one is measured again in float64 at the end of each reported run.",
)
