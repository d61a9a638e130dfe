"""``normwise race TASK``: the whole protocol of docs/race.md, from the options to the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normwise.errors import DataError, StudyError
from normwise.experiments.compare.results import machine
from normwise.experiments.framework.driver import Driver, Replay
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.pool import open_pool
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import NUMBER, Form, Store, fits
from normwise.experiments.race import figures, plans
from normwise.experiments.race.contenders import BASELINES, CONTENDERS, chosen
from normwise.experiments.race.protocol import PROTOCOL, SATURATED, STEPS, TUNING_SEED, budget, first_horizon, rung
from normwise.experiments.race.run import RaceRun, batch_of
from normwise.experiments.race.step_cost import step_times
from normwise.experiments.tasks.load import load_task

_MOST_SEEDS = 1000    # that a kept race may claim


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


def race(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the race, or goes on with it; plain data for the table, the JSON file and docs/results.md.

    Raises StudyError and DataError for options and data that cannot be used, before anything is trained; StudyError, too, where
    another race works on ``options.state``.
    """
    plan = budget(options.budget)
    names = chosen(options.contenders if options.contenders is not None else plan.contenders)
    if options.workers < 1 or (options.seeds is not None and options.seeds < 1):
        raise StudyError(f"workers and seeds must be whole numbers >= 1, given {options.workers} and {options.seeds}.")
    told = progress or Progress()
    with locked(options.state, told.note):
        task = load_task(options.task, options.data, size=options.size)
        first_horizon(options.task, task.batch, plan.scale)    # a task that the protocol does not know is refused before any work
        store = Store(options.state)
        seeds = options.seeds or plan.seeds
        facts = Facts(options.task, task.key, task.metric, task.batch, options.budget, seeds, tuple(names))
        about = {"machine": machine(), "data": _data_name(options.data)}
        store.add(facts.settings(), about)
        setup = partial(load_task, options.task, options.data, size=options.size)
        capacity = 1 if options.workers == 1 else options.workers + 1
        driver = Driver(store, told, partial(open_pool, options.workers, setup), capacity)
        told.start(None)
        if store.note:
            told.note(store.note)
        try:
            return _Race(facts, driver, partial(step_times, task=task)).run() | about
        finally:
            driver.close()
            told.stop()


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
    return _Race(facts, Replay(store), None, result["machine"]["torch"]).run() | {"machine": result["machine"], "data": result.get("data")}


def _is_a_race(settings: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the facts kept in a file are those of a race that can be looked at here."""
    form: Form = {"name": str, "key": str, "metric": str, "batch": int, "budget": str, "seeds": int, "contenders": list}
    found: Form = {"machine": dict.fromkeys(("cpu", "torch", "python", "date"), str) | {"cores": int}}
    return (
        fits(settings, form) and fits(result, found) and settings.get("protocol") == PROTOCOL and settings["name"] in STEPS
        and all(isinstance(name, str) and name in CONTENDERS for name in settings["contenders"])
        and settings["batch"] > 0 and 0 < settings["seeds"] <= _MOST_SEEDS
    )  # fmt: skip


class _Race:
    """times: measures the steps of some runs; None where only what was kept is looked at. version: the torch of the runs."""

    def __init__(
        self, facts: Facts, driver: Driver, times: Callable[..., list[float]] | None, version: str | None = None
    ) -> None:
        self.facts, self.driver, self.measure, self.seeds = facts, driver, times, facts.seeds
        self.version = version or torch.__version__
        self.plan, self.store, self.progress = budget(facts.budget), driver.store, driver.progress
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
        middle = CONTENDERS["adamw"].numbers([0] * len(CONTENDERS["adamw"].axes))
        rules = plans.Rules(self._make, self.accuracy, samples)
        seen = self.driver.run({"horizon": _doubling(rules, middle, samples, self.plan.doublings)}).get("horizon")
        if seen is None:
            return None
        told = [[of, _plain(result)] for of, result in seen]
        return {"samples": seen[-2][0], "results": told, "saturated": not _pays(seen[-2][1], seen[-1][1], self.accuracy)}

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
        kept = self.store.get(settings, {"step_ms": [NUMBER] * len(runs)})
        if kept is None and self.measure is None:
            return {}
        if kept is None:
            assert self.measure is not None
            self.progress.note("Measuring step times, all contenders in turn.")
            kept = {"step_ms": self.measure(runs, rounds=self.plan.rounds)}
            self.store.add(settings, kept)
        return dict(zip(numbers, kept["step_ms"], strict=True))

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
            "share": _plain(figures.median(shares)), "low": _plain(low), "high": _plain(high),
            "missed": sum(math.isinf(s) for s in shares), "shares": [_plain(s) for s in shares],
            "at_horizon": [r["result"] for r in finals or []], "ends": ends,
            "ladder": _at_horizons(rules, climbed, finals or []),
        }  # fmt: skip


def _data_name(data: Path | str | None) -> str:
    """What may stand in a table: never where a folder lies."""
    if data is None:
        return "bundled data"
    return str(data) if str(data).startswith("hf:") else Path(data).name


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


def _at_horizons(rules: plans.Rules, climbed: list[Any] | None, finals: list[Any]) -> list[dict[str, Any]]:
    """Every reported run: its seed, its horizon as a share of H, and its result. The leader has those at H alone."""
    seen = {(seed, 0): run for seed, run in enumerate(finals)}
    seen |= {(c["seed"], k): run for c in climbed or [] for k, run in c["tried"].items()}
    return [{"seed": seed, "share": _share(rules, k), "result": seen[seed, k]["result"]} for seed, k in sorted(seen)]


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
