"""``normwise prune``: from a smaller norm to a smaller model. Protocol: docs/pruning.md, written before the first result."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TextIO

from normwise.errors import StudyError, nearest
from normwise.experiments.framework.driver import Plan
from normwise.experiments.framework.figures import spread
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.provenance import machine, versions
from normwise.experiments.framework.store import NUMBER, Form
from normwise.experiments.framework.study import TUNING_SEED, Options, Outputs, command, opened
from normwise.experiments.prune import step_cost, tables
from normwise.experiments.prune.run import FINE_TUNING_RATE, LASSO_AFTER, MOMENTUM, PruneRun
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import Task

ALLOWED_LOSS = 0.01  # of validation accuracy, for the smaller network to count as good enough
RATES = (0.01, 0.03, 0.1, 0.3)
# Half decades. A gain starts at 1 and a filter of the article's network near 0.1 to 0.6, and each step takes rate · strength away.
STRENGTHS = {"cnn": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "resnet": (1e-2, 3e-2, 1e-1, 3e-1, 1.0)}
BETWEEN = (1.5, 2.0)  # times the best of those: where the accuracy breaks off, half a decade is a long way
_STEP = 10**0.5
_WIDENINGS = 3
_PROTOCOL = 1  # one more whenever equal settings would give another run


@dataclass(frozen=True)
class Budget:
    """steps: of training. fine_tuning: steps after it. rounds: of the timing. size: of the task's model. seeds: reported."""

    steps: int
    fine_tuning: int
    rounds: int
    size: str = "standard"
    seeds: int = 3


# By task; what each takes is in docs/pruning.md.
BUDGETS: dict[str, dict[str, Budget]] = {
    "quick": {"cnn": Budget(600, 200, 20), "resnet": Budget(200, 100, 10)},
    "standard": {"cnn": Budget(1000, 500, 40), "resnet": Budget(600, 300, 20)},
    "long": {"cnn": Budget(4000, 2000, 100), "resnet": Budget(3000, 1500, 40)},
}


# lr, strength, seed, full, units -> run.
Make = Callable[..., PruneRun]


def run(options: Options, outputs: Outputs) -> bool:
    """The command: runs the study, prints its tables, writes the outputs."""
    return command(study, show, options, outputs, f"prune-{options.task}")


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints what came of it, the networks side by side, every strength that was tried, and how exact the surgery was."""
    out = stream or sys.stdout
    where = f"{results['task']} on {results['data']}: learning rate {results['lr']:.3g}, strength {results['strength']:.3g}"
    print(tables.verdict(results), where, sep="\n", end="\n\n", file=out)
    show_table(tables.networks(results), out)
    show_table([tables.trial(line) for line in results["strengths"]], out)
    print(f"Removing the units changed no output by more than {results['summary']['difference']:.1e} (in float64).", file=out)


def study(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Tunes, trains, shrinks, measures; gives results as plain data.

    With a seed of its own the learning rate of the full network is chosen by validation accuracy, then the strength of the group
    lasso: the one that leaves the fewest parameters among those whose smaller network, fine-tuned, is at most a percentage point
    below the full one. Then, with every reported seed: the full network; the same under the group lasso, shrunk; and a network of
    that smaller shape from fresh weights. All have the same steps, then the same fine-tuning.

    Args:
        options: ``hold`` says whether weights under the lasso keep their layer's norm.
        budget: in place of the named one.

    Raises:
        StudyError, DataError: for what cannot be run, before any run; StudyError, too, where another study works on ``options.state``.
        MissingExtraError: without torch-pruning.
    """
    options.check(BUDGETS)
    if options.task not in BUDGETS[options.budget]:
        raise StudyError(f"Task {options.task!r} cannot be pruned.{nearest(options.task, BUDGETS[options.budget])}")
    plan = budget or BUDGETS[options.budget][options.task]
    plan = replace(plan, seeds=options.seeds or plan.seeds)
    with opened(options, progress) as driver:
        setup = partial(load_task, options.task, options.data, size=plan.size)
        task = setup()
        driver.on(task, setup)
        driver.start(None)
        make = maker(task, plan, options.hold)
        lr, strength, rates, strengths = driver.run({"tuning": tuned(make, options.task)})["tuning"]
        found = driver.run({str(seed): one_seed(make, seed, lr, strength) for seed in range(plan.seeds)})
        seeds = [found[str(seed)] for seed in range(plan.seeds)]
        shapes = [seed["smaller"]["removed"] for seed in seeds]
        settings = {"kind": "prune timing", "task": task.key, "shapes": shapes, "rounds": plan.rounds}
        times: Form = dict.fromkeys(step_cost.KINDS, NUMBER)
        timing = driver.measured(
            settings | ({"hold": True} if options.hold else {}),
            {"full": times, "smaller": [times] * len(shapes), "ratio": [times] * len(shapes)},
            lambda: step_cost.measure(task, shapes, plan.rounds, options.hold),
            "Measuring times, full and smaller networks in turn.",
        )  # fmt: skip
        protocol = {
            **asdict(plan), "tuning_seed": TUNING_SEED, "batch": task.batch, "allowed_loss": ALLOWED_LOSS, "momentum": MOMENTUM,
            "fine_tuning_rate": FINE_TUNING_RATE, "lasso_after": LASSO_AFTER, "hold": options.hold,
        }  # fmt: skip
        return {
            "task": task.name, "data": task.facts["name"], "key": task.key,
            "machine": machine(), "budget": options.budget, "lr": lr, "strength": strength, "protocol": protocol,
            "test_images": task.facts["test"], "rates": [_line("lr", rate, found) for rate, found in sorted(rates.items())],
            "strengths": [_line("strength", s, found) for s, found in sorted(strengths.items())],
            "seeds": seeds, "summary": summary(seeds), "timing": timing,
        }  # fmt: skip


def maker(task: Task, plan: Budget, hold: bool) -> Make:
    """The runs of a study."""

    def make(lr: float, strength: float, seed: int, full: bool = True, units: Mapping[str, list[int]] | None = None) -> PruneRun:
        held = hold and strength > 0    # a run without a lasso is the same run
        return PruneRun(
            task.key, plan.steps, plan.fine_tuning, lr, strength, seed, full, dict(units or {}), versions(str(_PROTOCOL)), held
        )

    return make


# ----------------------------------------------------------------------------------------------------------- the plans


def tuned(make: Make, task: str) -> Plan:
    """Rate and strength, with what led there. While the best rate is at an end of those tried, there is one more beyond it, three at
    most; so it is while the strongest lasso is the choice, and then some are tried between the choice and the next."""
    rates = yield from _tried(RATES, lambda rate: make(rate, 0.0, TUNING_SEED, False))
    for _ in range(_WIDENINGS):
        best = max(rates, key=lambda rate: _rank(rates[rate]))
        beyond = {min(rates): best / _STEP, max(rates): best * _STEP}.get(best)
        if beyond is None:
            break
        rates |= yield from _tried([beyond], lambda rate: make(rate, 0.0, TUNING_SEED, False))
    lr = max(rates, key=lambda rate: _rank(rates[rate]))

    def under(strength: float) -> PruneRun:
        return make(lr, strength, TUNING_SEED, False)

    strengths = yield from _tried(STRENGTHS[task], under)
    for _ in range(_WIDENINGS):
        best = chosen(strengths, rates[lr])
        if best < max(strengths):
            break
        strengths |= yield from _tried([best * _STEP], under)
    best = chosen(strengths, rates[lr])
    strengths |= yield from _tried([times * best for times in BETWEEN], under)
    return lr, chosen(strengths, rates[lr]), rates, strengths


def _tried(numbers: Iterable[float], make: Callable[[float], PruneRun]) -> Plan:
    """Results by number."""
    tried = list(numbers)
    results = yield [make(number) for number in tried]
    return dict(zip(tried, results, strict=True))


def one_seed(make: Make, seed: int, lr: float, strength: float) -> Plan:
    """The three networks of one seed."""
    full, smaller = yield [make(lr, 0.0, seed), make(lr, strength, seed)]
    if "failed" in full or "failed" in smaller:
        raise StudyError(f"seed {seed}: {full.get('failed') or smaller['failed']}")
    [fresh] = yield [make(lr, 0.0, seed, units=smaller["removed"])]
    return {"seed": seed, "full": full, "smaller": smaller, "fresh": fresh}


# --------------------------------------------------------------------------------------------------------- the results


def chosen(strengths: Mapping[float, Mapping[str, Any]], full: Mapping[str, Any]) -> float:
    """The strength with the fewest parameters among those at most ``ALLOWED_LOSS`` below the full network on validation, fine-tuned;
    the best on validation where there is none. StudyError where every run failed."""
    sound = {strength: found for strength, found in strengths.items() if "failed" not in found}
    if not sound:
        raise StudyError(f"the group lasso failed at every strength: {next(iter(strengths.values()))['failed']}")
    floor = full["fine_tuned"]["validation"] - ALLOWED_LOSS
    good = [strength for strength, found in sound.items() if found["fine_tuned"]["validation"] >= floor]
    if good:
        return min(good, key=lambda strength: (sound[strength]["parameters"], strength))
    return max(sound, key=lambda strength: _rank(sound[strength]))


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds, by network: test accuracy trained and fine-tuned, parameters, multiplications; and the largest output difference."""
    found: dict[str, Any] = {}
    for name in ("full", "smaller", "fresh"):
        runs = [seed[name] for seed in seeds]
        found[name] = {when: spread([run[when]["test"] for run in runs]) for when in ("trained", "fine_tuned")}
        found[name] |= {what: statistics.fmean(run[what] for run in runs) for what in ("parameters", "multiplications")}
    before = spread([seed["smaller"]["before"]["test"] for seed in seeds])
    return found | {"difference": max(seed["smaller"]["difference"] for seed in seeds), "before": before}


def _rank(found: Mapping[str, Any]) -> tuple[float, float]:
    if "failed" in found:
        return -1.0, 0.0
    return found["fine_tuned"]["validation"], -found["fine_tuned"]["validation_loss"]


def _line(name: str, value: float, found: Mapping[str, Any]) -> dict[str, Any]:
    """One trial, as the table of trials has it."""
    if "failed" in found:
        return {name: value, "failed": found["failed"]}
    scores = {when: found[when]["validation"] for when in ("trained", "fine_tuned")}
    return {name: value, **scores, "parameters": found["parameters"], "multiplications": found["multiplications"]}
