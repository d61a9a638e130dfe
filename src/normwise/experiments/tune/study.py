"""``normwise tune TARGET``: searches, lets the leaders run on fresh seeds beside nothing, and says what may be said."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from normwise import files
from normwise.errors import StudyError
from normwise.experiments.framework import interrupts
from normwise.experiments.framework.driver import Driver
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.pool import WorkerKilled
from normwise.experiments.framework.printing import show_table
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.framework.provenance import machine, versions
from normwise.experiments.framework.store import Result
from normwise.experiments.framework.study import TUNING_SEED, Options, Outputs, deliver
from normwise.experiments.framework.study import opened as opened_driver
from normwise.experiments.tune import space as spaces
from normwise.experiments.tune import storage as kept
from normwise.experiments.tune import tables, verdict
from normwise.experiments.tune.run import DONE, FAILED, GIVEN_UP, LOST, REFUSED, TuneRun, Watched
from normwise.experiments.tune.storage import Trials
from normwise.experiments.tune.target import Target, load_target
from normwise.experiments.tune.verdict import Tried
from normwise.inspection.architecture import source_files

# Raised by hand whenever a run's outcome changes for another reason than its settings: kept trials are then refused.
PROTOCOL = 1
OBJECTIVES = {"metric": "value", "step_ms": "step_ms", "size": "size"}
FEWEST = 6
"""Seeds without which no interval of 95% exists."""
APART = 10_000
"""Between the seeds of two studies, so that they share none."""
MOST_SEED = 400_000
"""Of a study: those of its runs stay below 2**32, which NumPy and Lightning ask for."""
_POLL = 2.0


@dataclass(frozen=True)
class Budget:
    """trials: of the search. scale: of a task's steps. choosing, judging: seeds."""

    trials: int
    scale: float
    choosing: int
    judging: int


BUDGETS = {"quick": Budget(16, 0.2, 2, 6), "standard": Budget(40, 0.5, 3, 8), "long": Budget(120, 1.0, 4, 12)}


@dataclass(frozen=True)
class TuneOptions(Options):
    """What is asked beside the options of every study; ``seeds`` are those to judge with, ``task`` is the target.

    Args:
        storage: a file, or an URL of Optuna; by default ``NAME.db`` in this folder.
        name: of the study; by default from the target.
        trials, steps: in place of the budget's.
        seed: of the sampler, and which seeds are trained with.
        maximize: whether a function's metric is better when it is higher; a task knows.
        objectives: of ``OBJECTIVES``, the metric first.
        lr: lowest and highest rate of the first optimizer.
        policy: the file for the answer.
    """

    storage: str | None = None
    name: str | None = None
    trials: int | None = None
    steps: int | None = None
    seed: int = 0
    maximize: bool = False
    objectives: Sequence[str] = ("metric",)
    lr: tuple[float, float] | None = None
    policy: Path | None = None

    @property
    def called(self) -> str:
        return self.name or "tune-" + re.sub(r"[^\w.]+", "-", self.task)

    @property
    def url(self) -> str:
        return kept.url_of(self.storage or f"{self.called}.db")

    @property
    def file(self) -> Path | None:
        """The storage as a file that nobody else works on; None for an URL."""
        return None if self.storage and "://" in self.storage else Path(self.storage or f"{self.called}.db")

    def check(self, budgets: Mapping[str, Any]) -> None:
        super().check(budgets)
        if self.maximize and ":" not in self.task:
            raise StudyError(f"maximize is for functions of yours: of the task {self.task} the direction of the metric is known.")
        if self.size != "standard" and ":" in self.task:
            raise StudyError(f"--{self.size} is for built-in tasks; {self.task} makes its model itself.")
        if not 0 <= self.seed <= MOST_SEED:
            raise StudyError(f"seed is {self.seed}, but must be a whole number from 0 to {MOST_SEED}.")
        if not self.called.isprintable() or set(self.called) & set("/?#%"):
            raise StudyError(f"the name {self.called!r} cannot be a file's: leave out /, ?, #, % and what cannot be printed; give --name.")
        unknown = [one for one in self.objectives if one not in OBJECTIVES]
        if unknown or not self.objectives or self.objectives[0] != "metric" or len(set(self.objectives)) < len(self.objectives):
            raise StudyError(f"the objectives are {','.join(self.objectives)}, but must be metric, and then step_ms, size or both.")
        if self.seeds is not None and self.seeds < FEWEST:
            raise StudyError(f"seeds is {self.seeds}, but must be {FEWEST} or more: with fewer pairs there is no interval of 95%.")
        if self.trials is not None and self.trials < spaces.GRID:
            raise StudyError(f"trials is {self.trials}, but must be {spaces.GRID} or more: so many go to nothing at different rates.")


def run(options: TuneOptions, outputs: Outputs) -> bool:
    """The command: tunes, prints, writes the outputs and the policy. False where a bound is broken."""
    options.check(BUDGETS)
    beside = Path(str(outputs.default_state(options.called)).removesuffix(".runs.jsonl"))
    policy = options.policy or Path(f"{beside}.yaml")
    options = replace(options, storage=options.storage or f"{beside}.db")

    def work() -> Mapping[str, Any]:
        interrupts.say(lambda: f"Interrupted: finished trials are in {kept.shown(options.url)}; the same command resumes there.")
        results = tune(options, on_stderr("trials"))
        files.replace(policy, tables.policy_file(results).encode())
        return results | {"policy_file": str(policy)}

    return deliver(work, show, outputs, options.file, complaints=lambda results: results["answer"]["breaches"], units="trials",
                   more={"the policy": policy}, read=[*options.read(), *source_files(options.task)])  # fmt: skip


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the answer, the finalists, what mattered, the best trials, what failed and what to try next."""
    out = stream or sys.stdout
    print(tables.headline(results), tables.setting(results), sep="\n", end="\n\n", file=out)
    best = tables.trial_rows(results, 10)
    for rows in (tables.finalist_rows(results), tables.importance_rows(results), best, tables.front_rows(results)):
        show_table(rows, out)
    print(*filter(None, [tables.advice(results)]), *tables.remarks(results), *results["next"], sep="\n", file=out)
    if "policy_file" in results:
        print(f"Policy: {results['policy_file']}", file=out)


def tune(options: TuneOptions, progress: Progress | None = None, budget: Budget | None = None) -> dict[str, Any]:
    """Runs the study by the protocol of docs/tune.md, or goes on with it, and gives its results as plain data.

    Args:
        budget: in place of the named one.

    Raises:
        StudyError, DataError: for what cannot be run, or a target whose metric says nothing; finished trials are kept.
    """
    options.check(BUDGETS)
    space = spaces.space_of(options.only, options.lr)
    plan = budget or BUDGETS[options.budget]
    plan = replace(plan, trials=options.trials or plan.trials, judging=options.seeds or plan.judging)
    setup = partial(load_target, options.task, options.data, options.size)
    target = setup()
    target = replace(target, maximize=target.maximize or options.maximize)
    steps = options.steps or max(1, round(target.steps * (plan.scale if ":" not in options.task else 1)))
    with _opened(options, progress) as (driver, storage):
        driver.on(target, setup)
        return _Search(options, plan, space, target, steps, driver, storage).results()


@contextmanager
def _opened(options: TuneOptions, progress: Progress | None) -> Iterator[tuple[Driver, Any]]:
    note = (progress or Progress()).note
    # The driver is inside: its workers, which have the storage open, end first.
    with (
        locked(options.file, note, "--storage"), kept.in_reach(options.url, options.file) as storage,
        opened_driver(replace(options, state=None), progress) as driver,
    ):  # fmt: skip
        yield driver, storage


@dataclass
class _Search:
    """A study at work."""

    options: TuneOptions
    plan: Budget
    space: spaces.Space
    target: Target
    steps: int
    driver: Driver
    storage: Any

    def __post_init__(self) -> None:
        name, self.alone = self.options.called, self.options.file is not None
        first = "maximize" if self.target.maximize else "minimize"
        asked = {
            "target": self.target.key, "space": self.space.plain(), "seed": self.options.seed, "steps": self.steps,
            "objectives": self.options.objectives, "direction": first, "version": versions(str(PROTOCOL)),
        }  # fmt: skip
        asked = json.loads(json.dumps(asked))    # as it is read again
        directions = [first, *["minimize"] * (len(self.options.objectives) - 1)]
        self.first = Trials(kept.study_of(self.storage, name, asked, directions), LOST, self.alone)
        self._check_source()
        self.second = Trials(kept.study_of(self.storage, f"{name}, fresh seeds", asked, [first]), LOST, self.alone)
        self.first.study.sampler = kept.sampler(self.options.seed)

    def _check_source(self) -> None:
        """StudyError where the target's file is another one than when the study was begun, if one of its trials has told anything.

        A study of which no trial has waits for a target that is mended. One that never had a hash, or no file, goes on as it is."""
        study, source = self.first.study, self.target.source
        before = study.user_attrs.get("source")
        if not source or source == before or (before is None and study.get_trials(deepcopy=False)):
            return
        if any(trial.user_attrs["result"]["state"] in (DONE, GIVEN_UP) for trial in self.first.finished()):
            raise StudyError(f"the file of {self.options.task} has changed since the study {self.options.called!r} was begun, whose trials "
                             "are of the function as it was; give another --name or --storage, or undo the change.")  # fmt: skip
        study.set_user_attr("source", source)

    def results(self) -> dict[str, Any]:
        """All of it, one part after the other."""
        judged = 2 + (spaces.ADVISED in self.space.optimizers)
        finals = verdict.LEADERS + (verdict.LEADERS + 1) * self.plan.choosing + judged * self.plan.judging
        self.driver.start(self.plan.trials + finals)
        if done := len(self.first.finished()) + len(self.second.finished()):
            self.driver.progress.advance("kept from before", done)
        nothing, leaders = self._searched()
        seed = TUNING_SEED + APART * self.options.seed + 1
        every = {one.number: one for one in ([nothing] if nothing else []) + leaders}
        choosing = self._fresh(every, range(seed, seed + self.plan.choosing), False)
        base = nothing.number if nothing else -1
        number = verdict.chosen(choosing, base, self.target.maximize)
        judging: dict[int, list[Any]] = {}
        advice = self._advice()
        compared = {one.number: one for one in (nothing, every.get(number), advice) if one is not None}
        if nothing is not None and len(compared) > 1:
            seeds = range(APART * self.options.seed, APART * self.options.seed + self.plan.judging)
            judging = self._fresh(compared, seeds, True)
        return self._told(every, base, number, choosing, judging, advice)

    # ------------------------------------------------------------------------------------------------------- the search

    def _searched(self) -> tuple[Tried | None, list[Tried]]:
        """Nothing, tuned, and the leaders."""
        if not self._tried() and (self.alone or self.first.begins()):
            # Also after a target was mended: what failed by its fault is tried again, what waits is not doubled.
            waiting = self.first.waiting()
            self._enqueue([one for one in self.space.first() if one not in waiting], again=True)
        self._work(self.first, self.plan.trials, self._run_of)
        self._sound(over=True)
        # A leader's gain may be its rate's, or its optimizer's alone: both are tried without its rules.
        leaders = [one.numbers for one in self._finalists()[1] if one.numbers["optimizer"] != spaces.ADVISED]
        self._enqueue([self.space.nothing(numbers["lr"], numbers["optimizer"]) for numbers in leaders])
        self._work(self.first, 0, self._run_of)
        return self._finalists()

    def _finalists(self) -> tuple[Tried | None, list[Tried]]:
        return verdict.finalists(self._tried(), self.space, self.target.maximize)

    def _advice(self) -> Tried | None:
        """What was advised, as it was advised; None where it was not tried, at another rate for want of range, or failed."""
        asked = self.space.advised()
        as_advised = asked is not None and asked["lr"] == spaces.START
        return next((one for one in self._tried() if as_advised and one.numbers == asked), None)

    def _tried(self) -> list[Tried]:
        return [
            Tried(trial.number, trial.params, result["value"]) for trial in self.first.finished()
            if (result := trial.user_attrs["result"])["state"] == DONE
        ]  # fmt: skip

    def _enqueue(self, candidates: Sequence[dict[str, Any]], again: bool = False) -> None:
        for numbers in candidates:
            self.first.study.enqueue_trial(numbers, {"spared": True}, skip_if_exists=not again)

    def _run_of(self, trial: Any) -> TuneRun:
        numbers = self.space.suggested(trial)
        single = len(self.options.objectives) == 1
        spared = bool(trial.user_attrs.get("spared"))
        watched = Watched(self.options.url, self.first.study.study_name, trial._trial_id, spared) if single else None
        seed = TUNING_SEED + APART * self.options.seed
        return TuneRun(self.target.key, numbers, seed, self.steps, False, trial.number, watched)

    def _outcome(self, objectives: Sequence[str], result: Result) -> tuple[Any, Any]:
        """For Optuna: its state and values. What the sampler should keep away from is pruned, which it learns from; it forgets failures."""
        from optuna.trial import TrialState

        values = [result[OBJECTIVES[one]] for one in objectives]
        if result["state"] == DONE and None not in values:
            return TrialState.COMPLETE, values
        pruned = result["state"] in (GIVEN_UP, REFUSED) and len(values) == 1
        return TrialState.PRUNED if pruned else TrialState.FAIL, None

    def _work(self, trials: Trials, wanted: int, run_of: Callable[[Any], TuneRun]) -> None:
        """Until enough are finished, also those that run elsewhere."""
        outcome = partial(self._outcome, self.options.objectives if trials is self.first else ("metric",))
        sound = self._sound if trials is self.first else lambda: None
        with trials.alive():
            while True:
                lanes = {str(k): trials.lane(wanted, run_of, outcome, sound) for k in range(self.options.workers)}
                try:
                    self.driver.run(lanes)
                except WorkerKilled:
                    trials.killed()
                    raise
                if not trials.elsewhere():
                    return
                time.sleep(_POLL)

    def _sound(self, over: bool = False) -> None:
        """StudyError where trials show that the target cannot be tuned. over: whether no more will come."""
        results = [trial.user_attrs["result"] for trial in self.first.finished()]
        values = [result["value"] for result in results if result["state"] == DONE]
        failed = [result for result in results if result["state"] in (FAILED, REFUSED)]
        name = self.options.task
        if results and all(result["state"] == FAILED for result in results):
            raise StudyError(f"{name} failed in its first trial ({failed[-1]['reason']}); mend it and start the same command again.")
        # The first trials are nothing at all rates: that a training lives only under rules must be seen.
        if results and not values and (over or len(failed) == len(results) >= kept.STARTUP):
            why = failed[-1]["reason"] if failed else "all were given up"
            raise StudyError(f"{name} gave no metric in any of {len(results)} trials: {why}.")
        if len(values) >= (2 if over else kept.STARTUP) and len(set(values)) == 1:
            raise StudyError(f"the metric of {name} was {values[0]:g} in all of {len(values)} trials, so there is nothing to choose by; "
                             "return a number that training changes.")  # fmt: skip

    # ------------------------------------------------------------------------------------------------- on fresh seeds

    def _fresh(self, finalists: Mapping[int, Tried], seeds: Sequence[int], final: bool) -> dict[int, list[Any]]:
        """The results of each finalist with each of these seeds."""
        study = self.second.study
        for seed in seeds:
            for number in finalists:
                study.enqueue_trial({"finalist": number, "seed": seed}, skip_if_exists=True)

        def run_of(trial: Any) -> TuneRun:
            number, seed = (trial.suggest_int(name, 0, 1 << 40) for name in ("finalist", "seed"))
            numbers = dict(self.first.study.get_trials(deepcopy=False)[number].params)
            # Asked for by what is written: on a resume, or on another machine, a waiting trial may be of either kind.
            judges = seed % APART < TUNING_SEED
            return TuneRun(self.target.key, numbers, seed, self.steps, judges, trial.number, None)

        self._work(self.second, 0, run_of)
        found = {(t.params["finalist"], t.params["seed"]): t.user_attrs["result"] for t in self.second.finished()}
        return {number: [found.get((number, seed), {}).get("value") for seed in seeds] for number in finalists}

    # ------------------------------------------------------------------------------------------------------- as plain data

    def _told(
        self, every: Mapping[int, Tried], base: int, number: int, choosing: Mapping[int, list[Any]], judging: Mapping[int, list[Any]],
        advice: Tried | None,
    ) -> dict[str, Any]:  # fmt: skip
        gains = {n: verdict.judged(judging[n], judging[base], self.target.maximize) for n in judging if n != base}
        found = gains.get(number)
        winner = number if found is not None and found.significant else base
        finals = self.second.finished()
        what = {t.number: tables.candidate_of(t.params, t.user_attrs["result"]) for t in self.first.finished()
                if t.number in every or t.number in gains}  # fmt: skip
        breaches = {b for t in finals if t.params["finalist"] == winner for b in t.user_attrs["result"]["breaches"]}
        results: dict[str, Any] = {
            "tune": self.options.called, "target": self.target.name, "metric": self.target.metric, "maximize": self.target.maximize,
            "data": self.target.facts, "machine": machine(), "budget": self.options.budget,
            "protocol": {
                "number": PROTOCOL, **asdict(self.plan), "steps": self.steps, "seed": self.options.seed, "notes": list(NOTES)
            },
            "objectives": list(self.options.objectives), "space": self.space.plain(),
            "trials": [tables.trial_of(trial) for trial in self.first.finished()],
            "finalists": [
                {"number": n, **what[n], "nothing": n == base, "search": one.value, "choosing": choosing[n], "judging": judging.get(n)}
                for n, one in every.items()
            ],
            "answer": {
                "number": winner, "leader": number, "nothing": base, "breaches": sorted(breaches),
                "verdict": None if found is None else asdict(found),
                **what.get(winner, {}),
            },
            "advice": None if advice is None or advice.number not in gains else {
                "number": advice.number, **what[advice.number], "judging": judging[advice.number],
                "verdict": asdict(gains[advice.number]),
            },
            "fresh_failures": tables.fresh_failures(finals, {n: str(one["label"]) for n, one in what.items()}),
            "importances": tables.importances(self.first.study, list(self.space.slots), self.target.maximize),
            "seconds": sum(t.user_attrs["result"]["seconds"] for t in [*self.first.finished(), *finals]),
        }  # fmt: skip
        return json.loads(json.dumps(results | {"next": tables.next_steps(results)}))


NOTES = (
    "All trials have one seed; of each combination of optimizer and rules the best trial counts.",
    "The leader has the best mean over nothing's and the leaders' fresh seeds; nothing wins ties.",
    "Leader and nothing are judged on further seeds that had no part in the choice, a built-in task on its test part; so is the advice.",
    "The interval is that of typical values (Hartigan, 1969): the means of all subsets of the paired differences.",
)
