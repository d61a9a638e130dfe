"""``normwise race TASK``: the whole protocol of docs/race.md, from the options to the table."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from normwise.errors import DataError, StudyError
from normwise.experiments.catalog.contenders import BASELINES, racing
from normwise.experiments.framework.driver import Driver, Replay
from normwise.experiments.framework.figures import finite, interval
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.framework.provenance import data_name, machine
from normwise.experiments.framework.store import Form, Store, fits
from normwise.experiments.framework.study import MOST_SEEDS, MOST_TIMES, Options, Outputs, command, deliver, opened
from normwise.experiments.race import plan as plans
from normwise.experiments.race import tables
from normwise.experiments.race.protocol import PROTOCOL, PROTOCOLS, Protocol, first_horizon, rung
from normwise.experiments.race.run import RaceRun, batch_of, step_times
from normwise.experiments.tasks.load import HELD_OUT, TASKS, load_task
from normwise.experiments.tasks.task import Task


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
    protocol: int
    scale: float = 1.0    # of the horizon

    def settings(self) -> dict[str, Any]:
        found = {"kind": "race facts", **asdict(self), "contenders": list(self.contenders)}
        return {name: value for name, value in found.items() if name != "scale" or value != 1.0}    # as of races before there was another


def run(options: Options, outputs: Outputs) -> bool:
    """The command: races, prints the table, writes the outputs; False where a bound is broken."""
    return command(race, show, options, outputs, f"race-{options.task}", tables.breaches)


def look(state: Path, outputs: Outputs) -> bool:
    """The command without a task: prints what the finished runs in ``state`` say, without training anything; False as for ``run``."""
    return deliver(lambda: replay(state, on_stderr()), show, outputs, complaints=tables.breaches, read=[state])


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
    protocol = PROTOCOLS[PROTOCOL]
    options.check(protocol.budgets)
    plan = protocol.budgets[options.budget]
    names = racing(options.only if options.only is not None else plan.contenders, protocol.contenders)
    with opened(options, progress) as driver:
        setup = partial(load_task, options.task, options.data, size=options.size)
        task = setup()
        if options.task in HELD_OUT:
            driver.progress.note(f"{options.task} is held out: whoever looks at its result has finished choosing (docs/race.md).")
        left_out = _left_out(names, task, protocol, options.only or (), driver.progress)
        names, seeds = [name for name in names if name not in left_out], options.seeds or plan.seeds
        facts = Facts(
            options.task, task.key, task.metric, task.batch, options.budget, seeds, tuple(names), protocol.number, options.horizon
        )  # fmt: skip
        about = {"machine": machine(), "data": data_name(options.data), "left_out": left_out}
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
        raise DataError(f"{state}: expected the runs of a race under protocol {' or '.join(map(str, PROTOCOLS))}, found none. "
                        f"Give the --state of such a race, or the *.runs.jsonl beside its --json.{f' {store.note}' if store.note else ''}")
    if store.note and progress is not None:
        progress.note(store.note)
    known = {name: settings[name] for name in Facts.__dataclass_fields__ if name in settings}
    facts = Facts(**{**known, "contenders": tuple(settings["contenders"])})
    about = {"machine": result["machine"], "data": result.get("data"), "left_out": result.get("left_out", {})}
    return _Race(facts, Replay(store), step_times, result["machine"]["torch"]).run() | about


def _left_out(names: Sequence[str], task: Task, protocol: Protocol, asked: Sequence[str], progress: Progress) -> dict[str, str]:
    """Contenders that cannot race with this model or on this machine, each with the reason, which is told; StudyError for one that was
    asked for by name."""
    asks = {n: lacks for n in names if (lacks := protocol.contenders[n].lacks) is not None}
    if not asks:
        return {}
    model = task.build()
    reasons = {n: reason for n, lacks in asks.items() if (reason := lacks(model)) is not None}
    for n, reason in reasons.items():
        if n in asked:
            raise StudyError(f"{n} cannot race here: {reason}.")
        progress.note(f"Left out: {n}, since {reason}.")
    return reasons


def _is_a_race(settings: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the facts kept in a file are those of a race that can be looked at here."""
    form: Form = {"name": str, "key": str, "metric": str, "batch": int, "budget": str, "seeds": int, "contenders": list, "protocol": int}
    found: Form = {"machine": dict.fromkeys(("cpu", "torch", "python", "date"), str) | {"cores": int}}
    protocol = PROTOCOLS.get(settings["protocol"]) if fits(settings, form) and fits(result, found) else None
    return (
        protocol is not None and settings["name"] in TASKS and settings["budget"] in protocol.budgets
        and all(isinstance(name, str) and name in protocol.contenders for name in settings["contenders"])
        and settings["batch"] > 0 and 0 < settings["seeds"] <= MOST_SEEDS and _is_a_factor(settings.get("scale", 1.0))
    )  # fmt: skip


def _is_a_factor(scale: Any) -> bool:
    return isinstance(scale, int | float) and 1 / MOST_TIMES <= scale <= MOST_TIMES


class _Race:
    """times: measures the steps of some runs. version: the torch of the runs."""

    def __init__(
        self, facts: Facts, driver: Driver, times: Callable[..., list[float]], version: str | None = None
    ) -> None:
        self.facts, self.driver, self.measure, self.seeds = facts, driver, times, facts.seeds
        self.version = version or torch.__version__
        self.protocol = PROTOCOLS[facts.protocol]
        self.plan, self.progress = self.protocol.budgets[facts.budget], driver.progress
        self.reported = self.protocol.reported(self.seeds)
        self.accuracy = facts.metric == "accuracy"

    def run(self) -> dict[str, Any]:
        told = {
            "race": self.facts.name, "task": self.facts.key, "scale": self.facts.scale, "metric": self.facts.metric,
            "budget": self.facts.budget, "protocol": {
                "number": self.protocol.number, **asdict(self.plan), "seeds": self.seeds, "contenders": list(self.facts.contenders)
            },
        }  # fmt: skip
        horizon = self._horizon()
        nothing_yet = {"target": None, "contenders": [], "unfinished": list(self.facts.contenders)}
        if horizon is None:
            return told | {"horizon": None} | nothing_yet
        rules = self._rules(horizon["samples"])
        told["horizon"] = horizon | {"steps": round(horizon["samples"] / self.facts.batch)}
        names, trials = self.facts.contenders, {n: self.protocol.trials(n, self.plan) for n in self.facts.contenders}
        most = sum(trials[n] * self._tuned_at(rules, n) for n in names)
        more = "".join(f" ({n}: {count})" for n, count in trials.items() if count != self.plan.trials)
        self.progress.note(f"Tuning {', '.join(names)}: {self.plan.trials} trials each{more}, {most} samples at most.")
        tuned = self.driver.run({n: plans.tune(rules, n, self._tuned_at(rules, n), trials[n]) for n in names})
        tuned = {n: tuned[n] for n in names if n in tuned}
        finals = self.driver.run(
            {b: plans.reported(rules, b, tuned[b]["numbers"], rules.horizon, self.seeds) for b in BASELINES if b in tuned}
        )
        if len(finals) < len(BASELINES):
            return told | nothing_yet | {"tuned": tuned}
        # The better baseline and the median of its results set the target.
        scores = {b: statistics.median([rules.score(r) for r in finals[b]]) for b in BASELINES}
        leader = max(scores, key=lambda b: scores[b])
        if math.isinf(scores[leader]):
            raise StudyError("Both baselines diverged with half of the reported seeds: there is no target. See the finished runs.")
        target = scores[leader] if self.accuracy else -scores[leader]
        lines = self._lines(replace(rules, target=target), leader, tuned, finals)
        done = [line["name"] for line in lines if line["robustness"] and line["step_ms"] is not None]
        return told | {
            "leader": leader, "target": target, "contenders": lines, "unfinished": [n for n in self.facts.contenders if n not in done],
        }  # fmt: skip

    def _lines(self, rules: plans.Rules, leader: str, tuned: dict[str, Any], finals: dict[str, Any]) -> list[dict[str, Any]]:
        rest = [name for name in tuned if name != leader]
        starts = self.driver.run({name: plans.bracket(rules, name, tuned[name]["numbers"]) for name in rest})
        self.progress.note("Looking for the shortest horizon of each contender and seed.")
        jobs = {f"{n} {s}": plans.ladder(rules, n, tuned[n]["numbers"], start, s) for n, start in starts.items() for s in self.reported}
        found = self.driver.run(jobs)
        climbed = {n: [found[f"{n} {s}"] for s in self.reported] for n in starts if all(f"{n} {s}" in found for s in self.reported)}
        sturdy = self.driver.run({
            n: plans.robustness(rules, n, t["numbers"], self._tuned_at(rules, n)) for n, t in tuned.items()
        })  # fmt: skip
        ready = {n: t["numbers"] for n, t in tuned.items() if n in climbed or n == leader}
        runs = [self._make(name, numbers, rules.horizon, self.protocol.first_seed, False) for name, numbers in ready.items()]
        measured = self.driver.timed(runs, self.plan.rounds, partial(self.measure, runs, rounds=self.plan.rounds),
                                     "Measuring step times, all contenders in turn.")  # fmt: skip
        times = dict(zip(ready, measured, strict=False))    # none where they are not measured yet
        lines = [
            self._line(rules, n, tuned[n], climbed.get(n), finals.get(n), times.get(n)) | {"robustness": sturdy.get(n, [])} for n in ready
        ]
        pace = next((line["ms_a_sample"] for line in lines if line["name"] == leader), None)
        for line in lines:
            known = line["share"] is not None and line["ms_a_sample"] is not None and pace is not None
            line["seconds_share"] = line["share"] * line["ms_a_sample"] / pace if known else None
            line |= self._tuning(rules, line, lines)
        return lines

    def _tuning(self, rules: plans.Rules, line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a contender's tuning cost as a share of AdamW's, in seconds; where it cost more, the best result among as many of its first
        trials as AdamW's seconds pay for. None of what is not timed yet, and of what is not tuned."""
        def seconds(one: Mapping[str, Any]) -> float:
            return float(one["tuned"]["trials"] * self._tuned_at(rules, one["name"]) * one["ms_a_sample"])

        adamw = next((one for one in lines if one["name"] == "adamw"), None)
        if adamw is None or line["tuned"]["trials"] < 2 or None in (adamw["ms_a_sample"], line["ms_a_sample"]):
            return {"tuning_cost": None, "within_cost": None}
        cost = seconds(line) / seconds(adamw)
        paid = line["tuned"]["tried"][: max(1, int(line["tuned"]["trials"] / cost))]
        results = [trial["result"] for trial in paid if trial["result"] is not None]
        within = (max if self.accuracy else min)(results, default=None) if cost > 1 else line["tuned"]["result"]
        return {"tuning_cost": cost, "within_cost": within}

    # ------------------------------------------------------------------------------------------------ the phases

    def _horizon(self) -> dict[str, Any] | None:
        """H in samples, doubled while that pays and the budget allows."""
        samples = first_horizon(self.facts.name, self.facts.batch, self.plan.scale * self.facts.scale, self.protocol.number)
        rules = self._rules(samples)
        middle = self.protocol.contenders["adamw"].middle
        seen = self.driver.run({"horizon": plans.doubling(rules, middle, samples, self.plan.doublings)}).get("horizon")
        if seen is None:
            return None
        told = [[of, finite(result)] for of, result in seen]
        return {"samples": seen[-2][0], "results": told, "saturated": not plans.pays(seen[-2][1], seen[-1][1], self.accuracy)}

    # --------------------------------------------------------------------------------------------------- details

    def _rules(self, samples: int) -> plans.Rules:
        return plans.Rules(self._make, self.accuracy, samples, self.protocol)

    def _tuned_at(self, rules: plans.Rules, name: str) -> int:
        return rules.horizon if self.protocol.contenders[name].baseline else rules.horizon // 2

    def _make(self, name: str, numbers: dict[str, Any], samples: int, seed: int, full: bool) -> RaceRun:
        return RaceRun(self.facts.key, name, tuple(numbers.items()), samples, seed, full, self.protocol.number, self.version)

    def _line(
        self, rules: plans.Rules, name: str, tuned: dict[str, Any], climbed: list[Any] | None, finals: list[Any] | None, ms: float | None
    ) -> dict[str, Any]:
        """One contender in plain data; climbed is None for the baseline that set the target. None stands for a target missed, and for a
        step's time that is not measured yet."""
        contender = self.protocol.contenders[name]
        shares = [1.0] * self.seeds if climbed is None else [_share(rules, c["rung"]) for c in climbed]
        low, high = interval(shares)
        batch = batch_of(tuned["numbers"], self.facts.batch)
        # Of each seed the run at its shortest horizon; at the longest tried where it missed.
        ends = (finals or []) if climbed is None else [c["tried"][min(c["tried"]) if c["rung"] is None else c["rung"]] for c in climbed]
        seen = {(seed, 0): run for seed, run in zip(self.reported, finals or [], strict=False)}
        seen |= {(c["seed"], k): run for c in climbed or [] for k, run in c["tried"].items()}
        return {
            "name": name, "label": contender.label, "about": contender.about,
            "baseline": contender.baseline, "sets_target": climbed is None, "tuned": tuned,
            "batch": batch, "step_ms": ms, "ms_a_sample": None if ms is None else ms / batch,
            "share": finite(statistics.median(shares)), "low": finite(low), "high": finite(high),
            "missed": sum(math.isinf(s) for s in shares), "shares": [finite(s) for s in shares],
            "at_horizon": [r["result"] for r in finals or []], "ends": ends,
            "ladder": [{"seed": seed, "share": _share(rules, k), "result": seen[seed, k]["result"]} for seed, k in sorted(seen)],
        }  # fmt: skip


def _share(rules: plans.Rules, k: int | None) -> float:
    return math.inf if k is None else rung(rules.horizon, k) / rules.horizon
