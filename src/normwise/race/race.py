"""``normwise race TASK``: the whole protocol of docs/race.md, from the options to the results."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normwise.errors import StudyError
from normwise.race import figures, plans
from normwise.race.contenders import BASELINES, CONTENDERS, chosen
from normwise.race.drive import Driver
from normwise.race.protocol import PROTOCOL, SATURATED, TUNING_SEED, Budget, budget, first_horizon, rung
from normwise.race.run import RaceRun, batch_of
from normwise.race.timing import step_times
from normwise.study.pool import open_pool
from normwise.study.progress import Progress
from normwise.study.results import machine
from normwise.study.store import Store
from normwise.tasks.load import load_task
from normwise.tasks.task import Task


@dataclass(frozen=True)
class Options:
    """task: a name of ``load_task``. data: its ``--data``. budget: ``quick``, ``standard`` or ``long``. contenders: beside the
    baselines; None for the budget's. seeds: that are reported; None for the budget's. state: the file of finished runs.
    size: ``"tiny"`` for tests."""

    task: str
    data: Path | str | None = None
    budget: str = "standard"
    contenders: list[str] | None = None
    seeds: int | None = None
    workers: int = 1
    state: Path | None = None
    size: str = "standard"


def race(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the race, or goes on with it; plain data for the table, the JSON file and docs/results.md.

    Raises StudyError and DataError for options and data that cannot be used, before anything is trained.
    """
    plan = budget(options.budget)
    names = options.contenders if options.contenders is not None else plan.contenders
    contenders = chosen(names)
    if options.workers < 1 or (options.seeds is not None and options.seeds < 1):
        raise StudyError(f"workers and seeds must be whole numbers >= 1, given {options.workers} and {options.seeds}.")
    task = load_task(options.task, options.data, size=options.size)
    going = _Race(options, plan, task, Store(options.state), progress or Progress())
    try:
        return going.run(contenders)
    finally:
        going.progress.stop()


class _Race:
    def __init__(self, options: Options, plan: Budget, task: Task, store: Store, progress: Progress) -> None:
        self.options, self.plan, self.task, self.store, self.progress = options, plan, task, store, progress
        self.seeds = options.seeds or plan.seeds
        setup = partial(load_task, options.task, options.data, size=options.size)
        capacity = 1 if options.workers == 1 else options.workers + 1
        self.driver = Driver(store, progress, lambda: open_pool(options.workers, setup), capacity)
        self.accuracy = task.metric == "accuracy"

    def run(self, names: list[str]) -> dict[str, Any]:
        horizon = self._horizon()
        rules = plans.Rules(self._make, self.accuracy, horizon["samples"])
        tuned = self._tune(rules, names)
        finals = self._drive({b: plans.reported(rules, b, tuned[b]["numbers"], rules.horizon, self.seeds) for b in BASELINES})
        leader, target = self._target(rules, finals)
        rules = plans.Rules(self._make, self.accuracy, rules.horizon, target)
        rest = [name for name in names if name != leader]
        starts = self._drive({name: plans.bracket(rules, name, tuned[name]["numbers"]) for name in rest})
        climbed = self._climb(rules, rest, tuned, starts)
        sturdy = self._drive({n: plans.robustness(rules, n, tuned[n]["numbers"], self._tuning_horizon(rules, n)) for n in names})
        times = self._times(rules, {name: tuned[name]["numbers"] for name in names})
        lines = [self._line(rules, n, tuned[n], climbed.get(n), finals.get(n), times[n]) | {"robustness": sturdy[n]} for n in names]
        pace = next(line["ms_a_sample"] for line in lines if line["name"] == leader)
        for line in lines:
            line["seconds_share"] = None if line["share"] is None else line["share"] * line["ms_a_sample"] / pace
        return {
            "race": self.options.task, "task": self.task.key, "metric": self.task.metric, "machine": machine(),
            "budget": self.options.budget, "protocol": {"number": PROTOCOL, **asdict(self.plan), "seeds": self.seeds},
            "horizon": horizon | {"steps": round(horizon["samples"] / self.task.batch)}, "leader": leader, "target": target,
            "contenders": lines,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------ the phases

    def _horizon(self) -> dict[str, Any]:
        """H in samples, doubled while that pays and the budget allows."""
        samples = first_horizon(self.options.task, self.task.samples, self.task.batch, self.plan.scale)
        middle = CONTENDERS["adamw"].numbers([0] * len(CONTENDERS["adamw"].axes))
        rules = plans.Rules(self._make, self.accuracy, samples)
        seen = self._drive({"horizon": _doubling(rules, middle, samples, self.plan.doublings)})["horizon"]
        return {"samples": seen[-2][0], "results": seen, "saturated": not _pays(seen[-2][1], seen[-1][1], self.accuracy)}

    def _tune(self, rules: plans.Rules, names: list[str]) -> dict[str, Any]:
        self.progress.note(f"Tuning {', '.join(names)}: {self.plan.trials} trials each.")
        return self._drive({n: plans.tune(rules, n, self._tuning_horizon(rules, n), self.plan.trials) for n in names})

    def _climb(self, rules: plans.Rules, names: list[str], tuned: dict[str, Any], starts: dict[str, int]) -> dict[str, list[Any]]:
        """Every reported seed of every contender on the ladder."""
        self.progress.note("Looking for the shortest horizon of each contender and seed.")
        jobs = {(n, s): plans.ladder(rules, n, tuned[n]["numbers"], starts[n], s) for n in names for s in range(self.seeds)}
        found = self._drive({f"{n} {s}": plan for (n, s), plan in jobs.items()})
        return {n: [found[f"{n} {s}"] for s in range(self.seeds)] for n in names}

    def _times(self, rules: plans.Rules, numbers: dict[str, Any]) -> dict[str, float]:
        """Milliseconds a step by contender, from a kept measurement where there is one."""
        self.progress.note("Measuring step times, all contenders in turn.")
        runs = [self._make(name, n, rules.horizon, 0, False) for name, n in numbers.items()]
        settings = {"kind": "race timing", "rounds": self.plan.rounds, "runs": [run.settings() for run in runs]}
        kept = self.store.get(settings)
        if kept is None:
            kept = {"step_ms": step_times(runs, self.task, self.plan.rounds)}
            self.store.add(settings, kept)
        return dict(zip(numbers, kept["step_ms"], strict=True))

    # --------------------------------------------------------------------------------------------------- details

    def _drive(self, what: dict[str, plans.Plan]) -> dict[str, Any]:
        return self.driver.run(what)

    def _make(self, name: str, numbers: dict[str, Any], samples: int, seed: int, full: bool) -> RaceRun:
        return RaceRun(self.task.key, name, tuple(numbers.items()), samples, seed, full, PROTOCOL, torch.__version__)

    def _tuning_horizon(self, rules: plans.Rules, name: str) -> int:
        return rules.horizon if name in BASELINES else rules.horizon // 2

    def _target(self, rules: plans.Rules, finals: dict[str, Any]) -> tuple[str, float]:
        """The better baseline and the median of its results."""
        scores = {b: figures.median([rules.score(r) for r in finals[b]]) for b in BASELINES}
        leader = max(scores, key=lambda b: scores[b])
        if math.isinf(scores[leader]):
            raise StudyError("Both baselines diverged with half of the reported seeds: there is no target. See the finished runs.")
        return leader, scores[leader] if self.accuracy else -scores[leader]

    def _line(
        self, rules: plans.Rules, name: str, tuned: dict[str, Any], climbed: list[Any] | None, finals: list[Any] | None, step_ms: float
    ) -> dict[str, Any]:
        """One contender in plain data; climbed is None for the baseline that set the target. None stands for a target missed."""
        shares = [1.0] * self.seeds if climbed is None else [_share(rules, c["rung"]) for c in climbed]
        low, high = figures.interval(shares)
        batch = batch_of(tuned["numbers"], self.task)
        ends = (finals or []) if climbed is None else [_end(c) for c in climbed]
        return {
            "name": name, "label": CONTENDERS[name].label, "about": CONTENDERS[name].about, "baseline": name in BASELINES,
            "tuned": tuned, "batch": batch, "step_ms": step_ms, "ms_a_sample": step_ms / batch,
            "share": _plain(figures.median(shares)), "low": _plain(low), "high": _plain(high),
            "missed": sum(math.isinf(s) for s in shares), "shares": [_plain(s) for s in shares],
            "at_horizon": [r["result"] for r in finals or []], "ends": ends,
        }  # fmt: skip


def _doubling(rules: plans.Rules, middle: dict[str, Any], samples: int, doublings: int) -> plans.Plan:
    """(samples, result) of the horizons tried: the last but one is H, the last shows what one more doubling would have given."""
    seen: list[tuple[int, float]] = []
    for k in range(doublings + 2):
        [result] = yield [rules.make("adamw", middle, samples << k, TUNING_SEED, False)]
        seen.append((samples << k, rules.score(result) * (1 if rules.accuracy else -1)))
        if k and not _pays(seen[-2][1], seen[-1][1], rules.accuracy):
            break
    return seen


def _pays(before: float, after: float, accuracy: bool) -> bool:
    """Whether a doubling took more than 2% of the loss, or of the error, away."""
    old, new = (1 - before, 1 - after) if accuracy else (before, after)
    return new < (1 - SATURATED) * old


def _share(rules: plans.Rules, k: int | None) -> float:
    return math.inf if k is None else rung(rules.horizon, k) / rules.horizon


def _end(climbed: dict[str, Any]) -> dict[str, Any]:
    """The run at a seed's shortest horizon; at the longest tried where it missed."""
    tried: dict[int, Any] = climbed["tried"]
    end: dict[str, Any] = tried[min(tried) if climbed["rung"] is None else climbed["rung"]]
    return end


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
