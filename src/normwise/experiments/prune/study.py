"""``normwise prune``: from a smaller norm to a smaller model. Protocol: docs/pruning.md, written before the first result."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from normwise.errors import StudyError, nearest
from normwise.experiments.compare.results import machine
from normwise.experiments.compare.tables import spread
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import NUMBER, Form, Store
from normwise.experiments.prune import step_cost
from normwise.experiments.prune.run import FINE_TUNING_RATE, LASSO_AFTER, MOMENTUM, Run, execute
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import Task

TUNING_SEED = 1000  # none of the seeds that are reported
ALLOWED_LOSS = 0.01  # of validation accuracy, for the smaller network to count as good enough
RATES = (0.01, 0.03, 0.1, 0.3)
STRENGTHS = {"cnn": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "resnet": (1e-2, 3e-2, 1e-1, 3e-1, 1.0)}
"""Half decades. A gain starts at 1 and a filter of the article's network near 0.1 to 0.6, and each step takes rate · strength away."""
BETWEEN = (1.5, 2.0)  # times the best of those: where the accuracy breaks off, half a decade is a long way
_STEP = 10**0.5
_WIDENINGS = 3
_PROTOCOL = 1  # one more whenever equal settings would give another run


@dataclass(frozen=True)
class Budget:
    """steps: of training. fine_tuning: steps after it. rounds: of the timing. size: of the task's model."""

    steps: int
    fine_tuning: int
    rounds: int
    size: str = "standard"


BUDGETS: dict[str, dict[str, Budget]] = {
    "quick": {"cnn": Budget(600, 200, 20), "resnet": Budget(200, 100, 10)},
    "standard": {"cnn": Budget(1000, 500, 40), "resnet": Budget(600, 300, 20)},
    "long": {"cnn": Budget(4000, 2000, 100), "resnet": Budget(3000, 1500, 40)},
}
"""By task; what each takes is in docs/pruning.md."""


@dataclass(frozen=True)
class Options:
    """What to run. task: cnn or resnet. data: a folder of images, None for scikit-learn's digits. state: the file of finished runs,
    kept in memory only for None. seeds: reported runs of each network. hold: whether weights under the lasso keep their layer's norm."""

    task: str = "cnn"
    data: Path | str | None = None
    budget: str = "standard"
    seeds: int = 3
    state: Path | None = None
    hold: bool = False


def run(options: Options, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Tunes, trains, shrinks, measures; gives results as plain data.

    With a seed of its own the learning rate of the full network is chosen by validation accuracy, then the strength of the group
    lasso: the one that leaves the fewest parameters among those whose smaller network, fine-tuned, is at most a percentage point
    below the full one. Then, with every reported seed: the full network; the same under the group lasso, shrunk; and a network of
    that smaller shape from fresh weights. All have the same steps, then the same fine-tuning. budget: in place of the named one.
    Raises StudyError and DataError for what cannot be run, before any run, StudyError, too, where another
    study works on ``options.state``, and MissingExtraError without torch-pruning.
    """
    plan = budget or _budget(options)
    task = load_task(options.task, options.data, size=plan.size)
    told = progress or Progress()
    with locked(options.state, told.note):
        study = _Study(options, plan, task, Store(options.state), told)
        try:
            with one_thread():
                return study.run()
        finally:
            told.stop()


def _budget(options: Options) -> Budget:
    if options.budget not in BUDGETS:
        raise StudyError(f"Budget {options.budget!r} is not known.{nearest(options.budget, BUDGETS)}")
    if options.task not in BUDGETS[options.budget]:
        raise StudyError(f"Task {options.task!r} cannot be pruned.{nearest(options.task, BUDGETS[options.budget])}")
    if options.seeds < 1:
        raise StudyError(f"seeds is {options.seeds}, but must be a whole number >= 1.")
    return BUDGETS[options.budget][options.task]


class _Study:
    def __init__(self, options: Options, plan: Budget, task: Task, store: Store, progress: Progress) -> None:
        self.options, self.plan, self.task, self.store, self.progress = options, plan, task, store, progress

    def run(self) -> dict[str, Any]:
        if self.store.note:
            self.progress.note(self.store.note)
        self.progress.start(len(RATES) + len(STRENGTHS[self.options.task]) + len(BETWEEN) + 3 * self.options.seeds)
        rates = self.rates()
        lr = max(rates, key=lambda rate: _rank(rates[rate]))
        strengths = self.strengths(lr, rates[lr])
        strength = chosen(strengths, rates[lr])
        seeds = [self.seed(seed, lr, strength) for seed in range(self.options.seeds)]
        self.progress.note("Measuring times, full and smaller networks in turn.")
        return {
            "task": self.task.name, "data": Path(self.options.data).name if self.options.data else "digits", "key": self.task.key,
            "machine": machine(), "budget": self.options.budget, "lr": lr, "strength": strength, "protocol": self.protocol(),
            "rates": [_line("lr", rate, found) for rate, found in sorted(rates.items())],
            "strengths": [_line("strength", s, found) for s, found in sorted(strengths.items())],
            "seeds": seeds, "summary": summary(seeds), "timing": self.timing(seeds),
        }  # fmt: skip

    def rates(self) -> dict[float, dict[str, Any]]:
        """The full network at each rate; while the best is at an end of them, one more beyond it, three at most."""
        found = {rate: self.trial(rate, 0.0) for rate in RATES}
        for _ in range(_WIDENINGS):
            best = max(found, key=lambda rate: _rank(found[rate]))
            beyond = {min(found): best / _STEP, max(found): best * _STEP}.get(best)
            if beyond is None:
                break
            found[beyond] = self.trial(beyond, 0.0)
        return found

    def strengths(self, lr: float, full: Mapping[str, Any]) -> dict[float, dict[str, Any]]:
        """The smaller network at each strength of the grid; beyond it, three times at most, while the strongest is the choice; and at
        some between the choice and the next."""
        found = {strength: self.trial(lr, strength) for strength in STRENGTHS[self.options.task]}
        for _ in range(_WIDENINGS):
            best = chosen(found, full)
            if best < max(found):
                break
            found[best * _STEP] = self.trial(lr, best * _STEP)
        best = chosen(found, full)
        return found | {times * best: self.trial(lr, times * best) for times in BETWEEN}

    def trial(self, lr: float, strength: float) -> dict[str, Any]:
        return self.result(self.make(lr, strength, TUNING_SEED, full=False))

    def seed(self, seed: int, lr: float, strength: float) -> dict[str, Any]:
        full = self.result(self.make(lr, 0.0, seed))
        smaller = self.result(self.make(lr, strength, seed))
        if "failed" in full or "failed" in smaller:
            raise StudyError(f"seed {seed}: {full.get('failed') or smaller['failed']}")
        fresh = self.result(self.make(lr, 0.0, seed, units=smaller["removed"]))
        return {"seed": seed, "full": full, "smaller": smaller, "fresh": fresh}

    def make(self, lr: float, strength: float, seed: int, full: bool = True, units: Mapping[str, list[int]] | None = None) -> Run:
        from normwise import __version__

        versions = f"{__version__}+{_PROTOCOL}", torch.__version__
        hold = self.options.hold and strength > 0    # a run without a lasso is the same run
        return Run(self.task.key, self.plan.steps, self.plan.fine_tuning, lr, strength, seed, full, dict(units or {}), versions, hold)

    def result(self, wanted: Run) -> dict[str, Any]:
        """From the file of finished runs, or run now and kept there."""
        kept = self.store.get(wanted.settings(), {"failed": str}) or self.store.get(wanted.settings(), wanted.form)
        if kept is None:
            kept = execute(wanted, self.task)
            self.store.add(wanted.settings(), kept)
        self.progress.advance(f"rate {wanted.lr:g}, strength {wanted.strength:g}, seed {wanted.seed}")
        return kept

    def timing(self, seeds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        shapes = [seed["smaller"]["removed"] for seed in seeds]
        settings = {"kind": "prune timing", "task": self.task.key, "shapes": shapes, "rounds": self.plan.rounds}
        settings |= {"hold": True} if self.options.hold else {}
        times: Form = dict.fromkeys(step_cost.KINDS, NUMBER)
        form: Form = {"full": times, "smaller": [times] * len(shapes), "ratio": [times] * len(shapes)}
        kept = self.store.get(settings, form)
        if kept is None:
            kept = step_cost.measure(self.task, shapes, self.plan.rounds, self.options.hold)
            self.store.add(settings, kept)
        return kept

    def protocol(self) -> dict[str, Any]:
        """How the numbers came about, for the reader of the JSON."""
        return {
            **asdict(self.plan), "seeds": self.options.seeds, "tuning_seed": TUNING_SEED, "batch": self.task.batch,
            "allowed_loss": ALLOWED_LOSS, "momentum": MOMENTUM, "fine_tuning_rate": FINE_TUNING_RATE, "lasso_after": LASSO_AFTER,
            "hold": self.options.hold,
        }  # fmt: skip


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
    networks = {name: [seed[name] for seed in seeds] for name in ("full", "smaller", "fresh")}
    return {
        name: {
            "trained": _over(runs, "trained"), "fine_tuned": _over(runs, "fine_tuned"),
            "parameters": statistics.fmean(run["parameters"] for run in runs),
            "multiplications": statistics.fmean(run["multiplications"] for run in runs),
        } for name, runs in networks.items()
    } | {"difference": max(seed["smaller"]["difference"] for seed in seeds), "before": _over(networks["smaller"], "before")}  # fmt: skip


def _over(runs: list[dict[str, Any]], when: str) -> dict[str, Any]:
    return spread([run[when]["test"] for run in runs])


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
