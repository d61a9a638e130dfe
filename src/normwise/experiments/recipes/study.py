"""``normwise recipe NAME``: the arms of a recipe, each tuned equally, then trained with seeds that no choice has seen.

The protocols are in docs/recipes.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TextIO

from normwise.errors import StudyError, nearest
from normwise.experiments import cells
from normwise.experiments.cells import Cell
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.provenance import machine, versions
from normwise.experiments.framework.study import TUNING_SEED, Options, Outputs, chosen, command, opened
from normwise.experiments.recipes import tables
from normwise.experiments.recipes.finetune import FINETUNE
from normwise.experiments.recipes.plasticity import PLASTICITY
from normwise.experiments.recipes.quantise import QUANTISE
from normwise.experiments.recipes.recipe import CONTENDER, Recipe, RecipeRun
from normwise.experiments.recipes.spikes import SPIKES

# Raised by hand whenever a run's outcome changes for another reason than its settings: kept runs are then done again.
PROTOCOL = 1
RECIPES: dict[str, Recipe] = {"plasticity": PLASTICITY, "spikes": SPIKES, "finetune": FINETUNE, "quantise": QUANTISE}


@dataclass(frozen=True)
class Budget:
    """trials: of each arm and group, nine or more, since nine are where the search begins. share: of the recipe's own length of a run.
    seeds: reported."""

    trials: int
    share: float
    seeds: int


BUDGETS = {"quick": Budget(9, 0.1, 3), "standard": Budget(10, 1.0, 5), "long": Budget(18, 2.0, 10)}


def run(options: Options, outputs: Outputs) -> bool:
    """The command: runs the study, prints its tables, writes the outputs."""
    return command(study, show, options, outputs, f"recipe-{options.task}")


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the verdicts, the setting, and a table for each group."""
    out = stream or sys.stdout
    print(*tables.verdicts(results), tables.setting(results), sep="\n", end="\n\n", file=out)
    for rows in tables.groups(results).values():
        show_table(rows, out)
    print(*tables.remarks(results), sep="\n", file=out)


def study(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Runs a recipe by the protocol of docs/recipes.md and gives its results as plain data; started again it resumes where it stopped.

    Args:
        options: ``task`` names the recipe, ``only`` its arms beside the baselines.
        budget: in place of the named one.

    Raises:
        StudyError, DataError: for what cannot be run, before any run; StudyError, too, where another study works on ``options.state``.
    """
    options.check(BUDGETS)
    if options.task not in RECIPES:
        raise StudyError(f"There is no recipe {options.task!r}.{nearest(options.task, RECIPES)}")
    recipe, plan = RECIPES[options.task], budget or BUDGETS[options.budget]
    plan = replace(plan, seeds=options.seeds or plan.seeds)
    named = chosen(options.only, None, recipe.arms, "arm")
    arms = {name: arm for name, arm in recipe.arms.items() if arm.role != CONTENDER or name in named}
    with opened(options, progress) as driver:
        setup = partial(recipe.load, options.data)
        data = setup()
        driver.on(data, setup)
        size = max(1, round(plan.share * recipe.size))

        def make(arm: str, numbers: dict[str, float], seed: int, full: bool) -> RecipeRun:
            return recipe.run(arm, numbers, seed, size, full, data.key, versions(str(PROTOCOL)))

        driver.start(len(recipe.columns) * len(arms) * (plan.trials + plan.seeds))
        found: list[Cell] = []
        for group in recipe.columns:    # one after the other: groups share their first runs, which are then kept
            plans = {
                name: cells.tuned(name, group, (recipe.rate, *arm.axes), partial(make, name), partial(recipe.score, group),
                                  trials=plan.trials, seeds=plan.seeds)
                for name, arm in arms.items()
            }  # fmt: skip
            by_name = driver.run(plans)
            found += [by_name[name] for name in arms]
    # Groups share runs, each of which counts once.
    seconds = {id(run): run["seconds"] for cell in found for runs in [cell.finals, *cell.trials.values()] for run in runs}
    return {
        "recipe": options.task, "data": data.facts, "machine": machine(), "budget": options.budget,
        "protocol": {"number": PROTOCOL, **asdict(plan), "size": size, "unit": recipe.run.unit, "tuning_seed": TUNING_SEED},
        "question": recipe.question, "seconds": sum(seconds.values()), "cells": tables.results_of(recipe, found),
    }  # fmt: skip
