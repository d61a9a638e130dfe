"""``normwise race TASK``: the whole protocol of docs/race.md, from the options to the table."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from normwise.errors import DataError, StudyError
from normwise.experiments.catalog import BASELINES, CONTENDERS, racing
from normwise.experiments.framework import figures
from normwise.experiments.framework.driver import Driver, Replay
from normwise.experiments.framework.figures import finite
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.framework.provenance import data_name, machine
from normwise.experiments.framework.store import NUMBER, Form, Store, fits
from normwise.experiments.framework.study import MOST_SEEDS, Options, Outputs, deliver, opened
from normwise.experiments.race import plan as plans
from normwise.experiments.race import tables
from normwise.experiments.race.protocol import BUDGETS, PROTOCOL, first_horizon, rung
from normwise.experiments.race.run import RaceRun, batch_of, step_times
from normwise.experiments.tasks.load import TASKS, load_task


@dataclass(frozen=True)
class Facts:
    """What a race must know of its task; kept in the file of finished runs, so that figures can be had without the data."""

    name: str
    key: str
    metric: str
    batch: int
    budget: str
    seeds: int
    contenders: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        return {"kind": "race facts", "protocol": PROTOCOL, **asdict(self), "contenders": list(self.contenders)}


def run(options: Options, outputs: Outputs) -> bool:
    """The command: races, prints the table, writes the outputs; False where a bound is broken."""
    return deliver(
        lambda state: race(replace(options, state=state), on_stderr()), show, outputs.json,
        options.state or outputs.default_state(f"race-{options.task}"), outputs.report, complaints=tables.breaches,
    )  # fmt: skip


def look(state: Path, outputs: Outputs) -> bool:
    """The command without a task: prints what the finished runs in ``state`` say, without training anything; False as for ``run``."""
    return deliver(
        lambda _: replay(state, on_stderr()), show, outputs.json, None, outputs.report, keeps=False, complaints=tables.breaches
    )


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints who won, the target, and how long each contender needed for it."""
    out = stream or sys.stdout
    print(*filter(None, (tables.verdict(results), tables.title(results))), sep="\n", end="\n\n", file=out)
    show_table(tables.rows(results), out)
    if results["unfinished"]:
        print(f"Not finished: {', '.join(results['unfinished'])}.", file=out)


def race(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the race, or resumes it; plain data for the table, the JSON file and docs/results.md.

    Raises StudyError and DataError for options and data that cannot be used, before anything is trained; StudyError, too, where
    another race works on ``options.state``.
    """
    options.check(BUDGETS)
    plan = BUDGETS[options.budget]
    names = racing(options.only if options.only is not None else plan.contenders)
    with opened(options, progress) as driver:
        setup = partial(load_task, options.task, options.data, size=options.size)
        task = setup()
        facts = Facts(options.task, task.key, task.metric, task.batch, options.budget, options.seeds or plan.seeds, tuple(names))
        about = {"machine": machine(), "data": data_name(options.data)}
        driver.store.add(facts.settings(), about)
        driver.on(task, setup)
        driver.start(None)
        return _Race(facts, driver, partial(step_times, task=task)).run() | about


def replay(state: Path, progress: Progress | None = None) -> dict[str, Any]:
    """The results of the newest race in a file of finished runs, without its data.

    Of a race that is under way: what can be said already. A contender stands in ``contenders`` as soon as all its seeds are through the
    ladder, and in ``unfinished`` as long as anything of it is missing. DataError for a file without a race under this protocol.
    """
    store = Store(state)
    settings, result = store.newest("race facts")
    if settings is None or result is None or not _is_a_race(settings, result):
        raise DataError(f"{state}: expected the runs of a race under protocol {PROTOCOL}, found none. "
                        f"Give the --state of such a race, or the *.runs.jsonl beside its --json.{f' {store.note}' if store.note else ''}")
    if store.note and progress is not None:
        progress.note(store.note)
    known = {name: settings[name] for name in Facts.__dataclass_fields__}
    facts = Facts(**{**known, "contenders": tuple(settings["contenders"])})
    about = {"machine": result["machine"], "data": result.get("data")}
    return _Race(facts, Replay(store), step_times, result["machine"]["torch"]).run() | about


def _is_a_race(settings: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the facts kept in a file are those of a race that can be looked at here."""
    form: Form = {"name": str, "key": str, "metric": str, "batch": int, "budget": str, "seeds": int, "contenders": list}
    found: Form = {"machine": dict.fromkeys(("cpu", "torch", "python", "date"), str) | {"cores": int}}
    return (
        fits(settings, form) and fits(result, found) and settings.get("protocol") == PROTOCOL and settings["name"] in TASKS
        and all(isinstance(name, str) and name in CONTENDERS for name in settings["contenders"])
        and settings["batch"] > 0 and 0 < settings["seeds"] <= MOST_SEEDS
    )  # fmt: skip


class _Race:
    """times: measures the steps of some runs. version: the torch of the runs."""

    def __init__(
        self, facts: Facts, driver: Driver, times: Callable[..., list[float]], version: str | None = None
    ) -> None:
        self.facts, self.driver, self.measure, self.seeds = facts, driver, times, facts.seeds
        self.version = version or torch.__version__
        self.plan, self.progress = BUDGETS[facts.budget], driver.progress
        self.accuracy = facts.metric == "accuracy"

    def run(self) -> dict[str, Any]:
        told = {
            "race": self.facts.name, "task": self.facts.key, "metric": self.facts.metric,
            "budget": self.facts.budget, "protocol": {"number": PROTOCOL, **asdict(self.plan), "seeds": self.seeds},
        }  # fmt: skip
        horizon = self._horizon()
        if horizon is None:
            return told | {"horizon": None, "target": None, "contenders": [], "unfinished": list(self.facts.contenders)}
        rules = plans.Rules(self._make, self.accuracy, horizon["samples"])
        told["horizon"] = horizon | {"steps": round(horizon["samples"] / self.facts.batch)}
        tuned = self._tune(rules, list(self.facts.contenders))
        finals = self.driver.run(
            {b: plans.reported(rules, b, tuned[b]["numbers"], rules.horizon, self.seeds) for b in BASELINES if b in tuned}
        )
        if len(finals) < len(BASELINES):
            return told | {"target": None, "contenders": [], "unfinished": list(self.facts.contenders), "tuned": tuned}
        leader, target = self._target(rules, finals)
        lines = self._lines(plans.Rules(self._make, self.accuracy, rules.horizon, target), leader, tuned, finals)
        done = [line["name"] for line in lines if line["robustness"] and line["step_ms"] is not None]
        return told | {
            "leader": leader, "target": target, "contenders": lines, "unfinished": [n for n in self.facts.contenders if n not in done],
        }  # fmt: skip

    def _lines(self, rules: plans.Rules, leader: str, tuned: dict[str, Any], finals: dict[str, Any]) -> list[dict[str, Any]]:
        rest = [name for name in tuned if name != leader]
        starts = self.driver.run({name: plans.bracket(rules, name, tuned[name]["numbers"]) for name in rest})
        climbed = self._climb(rules, tuned, starts)
        sturdy = self.driver.run({n: plans.robustness(rules, n, t["numbers"], self._tuning_horizon(rules, n)) for n, t in tuned.items()})
        ready = {n: t["numbers"] for n, t in tuned.items() if n in climbed or n == leader}
        times = self._times(rules, ready)
        lines = [
            self._line(rules, n, tuned[n], climbed.get(n), finals.get(n), times.get(n)) | {"robustness": sturdy.get(n, [])} for n in ready
        ]
        pace = next((line["ms_a_sample"] for line in lines if line["name"] == leader), None)
        for line in lines:
            known = line["share"] is not None and line["ms_a_sample"] is not None and pace is not None
            line["seconds_share"] = line["share"] * line["ms_a_sample"] / pace if known else None
        return lines

    # ------------------------------------------------------------------------------------------------ the phases

    def _horizon(self) -> dict[str, Any] | None:
        """H in samples, doubled while that pays and the budget allows."""
        samples = first_horizon(self.facts.name, self.facts.batch, self.plan.scale)
        rules = plans.Rules(self._make, self.accuracy, samples)
        seen = self.driver.run({"horizon": plans.doubling(rules, CONTENDERS["adamw"].middle, samples, self.plan.doublings)}).get("horizon")
        if seen is None:
            return None
        told = [[of, finite(result)] for of, result in seen]
        return {"samples": seen[-2][0], "results": told, "saturated": not plans.pays(seen[-2][1], seen[-1][1], self.accuracy)}

    def _tune(self, rules: plans.Rules, names: list[str]) -> dict[str, Any]:
        most = self.plan.trials * sum(self._tuning_horizon(rules, n) for n in names)
        self.progress.note(f"Tuning {', '.join(names)}: {self.plan.trials} trials each, {most} samples at most.")
        found = self.driver.run({n: plans.tune(rules, n, self._tuning_horizon(rules, n), self.plan.trials) for n in names})
        return {n: found[n] for n in names if n in found}

    def _climb(self, rules: plans.Rules, tuned: dict[str, Any], starts: dict[str, int]) -> dict[str, list[Any]]:
        """Every reported seed of every contender on the ladder."""
        self.progress.note("Looking for the shortest horizon of each contender and seed.")
        jobs = {(n, s): plans.ladder(rules, n, tuned[n]["numbers"], start, s) for n, start in starts.items() for s in range(self.seeds)}
        found = self.driver.run({f"{n} {s}": plan for (n, s), plan in jobs.items()})
        of = {n: [found[f"{n} {s}"] for s in range(self.seeds) if f"{n} {s}" in found] for n in starts}
        return {n: climbs for n, climbs in of.items() if len(climbs) == self.seeds}

    def _times(self, rules: plans.Rules, numbers: dict[str, Any]) -> dict[str, float]:
        """Milliseconds a step by contender, from a kept measurement where there is one."""
        runs = [self._make(name, n, rules.horizon, 0, False) for name, n in numbers.items()]
        settings = {"kind": "race timing", "rounds": self.plan.rounds, "runs": [run.settings() for run in runs]}
        kept = self.driver.measured(
            settings, {"step_ms": [NUMBER] * len(runs)},
            lambda: {"step_ms": self.measure(runs, rounds=self.plan.rounds)}, "Measuring step times, all contenders in turn.",
        )  # fmt: skip
        return dict(zip(numbers, kept["step_ms"], strict=True)) if kept else {}

    # --------------------------------------------------------------------------------------------------- details

    def _make(self, name: str, numbers: dict[str, Any], samples: int, seed: int, full: bool) -> RaceRun:
        return RaceRun(self.facts.key, name, tuple(numbers.items()), samples, seed, full, PROTOCOL, self.version)

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
        self, rules: plans.Rules, name: str, tuned: dict[str, Any], climbed: list[Any] | None, finals: list[Any] | None, ms: float | None
    ) -> dict[str, Any]:
        """One contender in plain data; climbed is None for the baseline that set the target. None stands for a target missed, and for a
        step's time that is not measured yet."""
        shares = [1.0] * self.seeds if climbed is None else [_share(rules, c["rung"]) for c in climbed]
        low, high = figures.interval(shares)
        batch = batch_of(tuned["numbers"], self.facts.batch)
        ends = (finals or []) if climbed is None else [_end(c) for c in climbed]
        return {
            "name": name, "label": CONTENDERS[name].label, "about": CONTENDERS[name].about,
            "baseline": name in BASELINES, "sets_target": climbed is None, "tuned": tuned,
            "batch": batch, "step_ms": ms, "ms_a_sample": None if ms is None else ms / batch,
            "share": finite(figures.median(shares)), "low": finite(low), "high": finite(high),
            "missed": sum(math.isinf(s) for s in shares), "shares": [finite(s) for s in shares],
            "at_horizon": [r["result"] for r in finals or []], "ends": ends,
            "ladder": _at_horizons(rules, climbed, finals or []),
        }  # fmt: skip


def _share(rules: plans.Rules, k: int | None) -> float:
    return math.inf if k is None else rung(rules.horizon, k) / rules.horizon


def _end(climbed: dict[str, Any]) -> dict[str, Any]:
    """The run at a seed's shortest horizon; at the longest tried where it missed."""
    tried: dict[int, Any] = climbed["tried"]
    end: dict[str, Any] = tried[min(tried) if climbed["rung"] is None else climbed["rung"]]
    return end


def _at_horizons(rules: plans.Rules, climbed: list[Any] | None, finals: list[Any]) -> list[dict[str, Any]]:
    """Every reported run: its seed, its horizon as a share of H, and its result. The leader has those at H alone."""
    seen = {(seed, 0): run for seed, run in enumerate(finals)}
    seen |= {(c["seed"], k): run for c in climbed or [] for k, run in c["tried"].items()}
    return [{"seed": seed, "share": _share(rules, k), "result": seen[seed, k]["result"]} for seed, k in sorted(seen)]

