"""``normwise tune``: the answer's promise on noise, equal trials after an interruption, bad input, and what is written."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normwise as nw
from normwise import cli
from normwise.errors import StudyError
from normwise.experiments.framework.figures import paired_interval
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.tune import space as spaces
from normwise.experiments.tune import storage, study, tables, verdict
from normwise.experiments.tune.space import CHOICES, SLOTS, WHERE, space_of
from normwise.experiments.tune.study import Budget, TuneOptions
from normwise.experiments.tune.target import Trial
from normwise.experiments.tune.verdict import Tried

SMALL = Budget(trials=8, scale=1.0, choosing=1, judging=2)
FEW = ("max_norm", "weight_decay", "adam")
calls: list[Trial] = []
stops: list[int] = []
"""After how many calls the next one is stopped."""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, with nothing remembered of another test's target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(storage, "STARTUP", 6)
    calls.clear()
    with one_thread():
        yield


def stepped(trial: Trial, model: nn.Module | None = None) -> torch.optim.Optimizer:
    """The trial's optimizer under its rules, after a step that moves nothing."""
    optimizer = trial.attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) if model is None else model)
    optimizer.step()
    return optimizer


def noise(trial: Trial, gain: float = 0.0) -> float:
    """A number that only the seed and the candidate decide."""
    rate, rules = stepped(trial).param_groups[0]["lr"], trial.policies[-1][1]
    calls.append(trial)
    drawn = np.random.default_rng([trial.seed, *json.dumps([rate, rules.to_yaml() if rules.rules else ""]).encode()]).normal()
    for part in (0.25, 0.5):
        if part > 0.25 and stops and len(calls) > stops[0]:
            calls.pop()
            stops.pop(0)
            raise KeyboardInterrupt
        trial.report(int(part * trial.steps), 3 - gain + drawn)
    return float(3 - gain + drawn)


def planted(trial: Trial) -> float:
    """Better by four deviations of the noise under any max-norm, whatever the rest is."""
    model = nn.Linear(2, 2)
    return noise(trial, 4.0 * any(rule.action == "clip_norm" for rule in trial.policy(model).rules))


def ask(target: str, **more: Any) -> TuneOptions:
    return TuneOptions(f"test_tune:{target}", only=FEW, steps=8, **more)


def tuned(options: TuneOptions, budget: Budget = SMALL) -> dict[str, Any]:
    return study.tune(options, budget=budget)


def lasting(results: dict[str, Any]) -> Any:
    """Without what time decides."""
    text = json.dumps({**results, "machine": 0, "seconds": 0})
    passing = {"step_ms", "seconds"}
    return json.loads(text, object_hook=lambda found: {key: value for key, value in found.items() if key not in passing})


# ------------------------------------------------------------------------------------------------------- the promise


SPACE = space_of(FEW)
CANDIDATES = [SPACE.nothing(1.0)] + [
    {**SPACE.nothing(1.0), "bound": bound, "pull": pull}
    for bound, pull in (("none", "weight_decay"), ("max_norm", "none"), ("max_norm", "weight_decay")) for _ in range(6)
]  # fmt: skip


def whole_study(rng: np.random.Generator, gain: float = 0.0) -> verdict.Verdict | None:
    """Trials, choice and judgement on normal noise; every rule is better than nothing by ``gain``."""
    # A row for each candidate: the search, three seeds to choose by, eight to judge by.
    drawn = rng.normal(1.0 - gain, 0.1, (len(CANDIDATES), 12))
    drawn[0] += gain
    tried = [Tried(k, numbers, value) for k, (numbers, value) in enumerate(zip(CANDIDATES, drawn[:, 0].tolist(), strict=True))]
    nothing, leaders = verdict.finalists(tried, SPACE, maximize=False)
    assert nothing is not None and nothing.number == 0 and len(leaders) == 3
    leader = verdict.chosen({k: drawn[k, 1:4].tolist() for k in (0, *(one.number for one in leaders))}, 0, maximize=False)
    return verdict.judged(*drawn[[leader, 0], 4:].tolist(), maximize=False) if leader else None


def test_noise_is_called_a_gain_in_a_fortieth_of_studies_at_most_and_a_loss_is_never_shipped() -> None:
    rng = np.random.default_rng(3)
    found = [whole_study(rng) for _ in range(3000)]
    gains = sum(one is not None and one.significant for one in found)
    # Of 3000 studies, 75 are allowed; three deviations of chance above that are 100.
    assert 0 < gains <= 75 + 3 * math.sqrt(75)
    harmful = [whole_study(rng, gain=-0.1) for _ in range(300)]
    assert not any(one is not None and one.significant for one in harmful)
    planted = [whole_study(rng, gain=0.3) for _ in range(100)]
    assert sum(one is not None and one.significant for one in planted) >= 95


def test_the_interval_is_that_of_all_subsets_and_keeps_its_promise_where_the_bootstrap_does_not() -> None:
    rng = np.random.default_rng(0)
    given = rng.normal(size=6)
    means = sorted(float(np.mean(part)) for size in range(1, 7) for part in itertools.combinations(given, size))
    assert paired_interval(given) == pytest.approx((means[0], means[-1]))
    given = rng.normal(size=9)
    means = sorted(float(np.mean(part)) for size in range(1, 10) for part in itertools.combinations(given, size))
    assert paired_interval(given) == pytest.approx((means[11], means[-12]))    # 0.025 · 512 = 12.8
    assert paired_interval(given[:5]) == (-math.inf, math.inf)
    assert paired_interval([-math.inf, *given])[0] == -math.inf
    many = rng.normal(0.3, 1.0, 200)
    low, high = paired_interval(many)
    normal = 1.96 * many.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((many.mean() - normal, many.mean() + normal), abs=0.03)

    samples = rng.normal(size=(4000, 8))
    ours = np.mean([paired_interval(row)[0] > 0 for row in samples])
    weights = rng.multinomial(8, [1 / 8] * 8, 400) / 8    # how often each of the eight is drawn
    bootstrap = np.mean(np.quantile(samples @ weights.T, 0.025, axis=1) > 0)
    assert ours <= 0.025 + 3 * math.sqrt(0.025 / 4000)
    assert bootstrap > 0.04


def test_failures_claim_nothing_and_nothing_wins_ties() -> None:
    assert verdict.chosen({0: [1.0, 1.0], 1: [1.0, 1.0]}, 0, maximize=False) == 0
    assert verdict.chosen({0: [1.0, 1.0], 1: [0.5, None]}, 0, maximize=False) == 0
    assert verdict.chosen({0: [1.0], 1: [2.0], 2: [3.0]}, 0, maximize=True) == 2
    good = [0.9, 0.8, 0.9, 0.7, 0.9, 0.8, 0.9, 0.8]
    assert verdict.judged(good, [1.0] * 8, maximize=False).significant
    assert not verdict.judged(good, [1.0] * 8, maximize=True).significant
    assert not verdict.judged([None, *good[1:]], [1.0] * 8, maximize=False).significant
    assert not verdict.judged([None] * 8, [None] * 8, maximize=False).significant
    found = verdict.judged(good, [1.0] * 8, maximize=False)
    assert found.mean == pytest.approx(0.1625) and found.relative == pytest.approx(0.1625)


@pytest.mark.parametrize(("gains", "low", "mean", "high"), [
    ([math.inf] * 6, math.inf, math.inf, math.inf),
    ([-math.inf] * 6, -math.inf, -math.inf, -math.inf),
    ([math.inf, *[-0.1] * 5], -0.1, math.inf, math.inf),    # once is no proof: half of the subsets are without it
    ([-math.inf, *[0.1] * 5], -math.inf, -math.inf, 0.1),
    ([math.inf] * 2 + [-math.inf] * 4, -math.inf, -math.inf, math.inf),
    ([math.inf, -math.inf, 0.0, 0.0, 0.0, 0.0], -math.inf, 0.0, math.inf),    # they balance each other
    ([math.inf] * 5 + [0.2], 0.2, math.inf, math.inf),
])  # fmt: skip
def test_a_run_that_fails_is_worse_than_any_that_does_not(gains: list[float], low: float, mean: float, high: float) -> None:
    leader = [None if gain == -math.inf else 1.0 - (gain if math.isfinite(gain) else 0) for gain in gains]
    nothing = [None if gain == math.inf else 1.0 for gain in gains]
    found = verdict.judged(leader, nothing, maximize=False)
    for value, sign, wanted in zip((found.interval[0], found.mean, found.interval[1]), found.beyond, (low, mean, high), strict=True):
        assert (value is None, sign) == ((True, np.sign(wanted)) if math.isinf(wanted) else (False, 0))
        assert value is None or value == pytest.approx(wanted)
    assert found.significant == (low > 0) and found.failed == (gains.count(-math.inf), gains.count(math.inf))


def test_only_the_best_trial_of_a_combination_counts() -> None:
    space = space_of(FEW)
    nothing = space.nothing(1.0)
    tried = [
        Tried(0, nothing, 1.0), Tried(1, space.nothing(0.5), 0.9), Tried(2, {**nothing, "bound": "max_norm"}, 0.8),
        Tried(3, {**nothing, "bound": "max_norm"}, 0.7), Tried(4, {**nothing, "pull": "weight_decay"}, 0.95),
    ]  # fmt: skip
    base, leaders = verdict.finalists(tried, space, maximize=False)
    assert base is not None and base.number == 1 and [one.number for one in leaders] == [3, 4]
    assert verdict.finalists(tried[2:], space, maximize=True)[0] is None


# ------------------------------------------------------------------------------------------------------------ the space


class Fixed:
    """An Optuna trial that takes what it is told, or the lowest."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.given.get(name, choices[0])

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        assert log and 0 < low < high
        return self.given.get(name, math.sqrt(low * high))


ONE_OF_EACH = [
    (slot, name, on) for slot, options in SLOTS.items() for name, option in options.items() for on in (WHERE if option.placed else ("",))
]


@pytest.mark.parametrize(("slot", "name", "on"), ONE_OF_EACH)
def test_every_rule_attaches_acts_and_goes_to_yaml_and_back(slot: str, name: str, on: str, tmp_path: Path) -> None:
    """At the end of its range where it is strongest, after three steps: other weights than without it."""
    space = space_of([name, "adam"])
    ends = {f"{name} {axis}": low if slot != "pull" else high for axis, (low, high) in SLOTS[slot][name].axes.items()}
    numbers = space.suggested(Fixed(**{slot: name, f"{name} on": on, **ends}))
    without = {**space.nothing(numbers["lr"])}

    def after(candidate: Any) -> tuple[list[torch.Tensor], Trial]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        trial = Trial(candidate, 0, 3)
        optimizer = trial.attach(model)
        for _ in range(4):
            optimizer.zero_grad()
            (-10 * model(torch.randn(2, 1, 4, 4)).square().mean()).backward()    # so that weights grow
            optimizer.step()
        assert trial.step_ms() is not None and trial.size() == sum(int((p != 0).sum()) for p in model.parameters())
        return [p.detach().clone() for p in model.parameters()], trial

    with_rule, trial = after(numbers)
    assert any(not torch.equal(a, b) for a, b in zip(with_rule, after(without)[0], strict=True))
    [control] = trial.controls
    assert not control.verify().breaches
    (tmp_path / "p.yaml").write_text(trial.rules)
    assert nw.Policy.load(tmp_path / "p.yaml") == spaces.policy(numbers, nn.Module())
    assert name in spaces.label(numbers)


@pytest.mark.parametrize("name", [*spaces.USUAL[:-1], "gd"])
def test_every_optimizer_is_built_at_the_rate_that_is_printed(name: str) -> None:
    space = space_of([name])
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    rates = [max(group["lr"] for group in Trial(space.nothing(lr), 0, 3).optimizer(model).param_groups) for lr in (1.0, 0.5)]
    assert rates[1] == pytest.approx(rates[0] / 2, rel=0.01)
    assert name == "auto" or rates[0] == pytest.approx(CHOICES[name].lr.values[0])


def test_what_is_advised_is_tried_as_it_is_and_its_rates_are_multiplied() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    advice, space = nw.advise(model), space_of(["max_norm", "adam", "advised"])
    advised = space.first()[-1]
    assert space.suggested(Fixed(**advised)) == advised and len(space.first()) == 6

    def rates(trial: Trial) -> list[float]:
        return [group["lr"] for group in trial.optimizer(model).param_groups]

    as_it_is, half = Trial(advised, 0, 3), Trial({**advised, "lr": advised["lr"] / 2}, 0, 3)
    assert rates(as_it_is) == pytest.approx([group["lr"] for group in advice.optimizer.build(model).param_groups])
    assert rates(half) == pytest.approx([rate / 2 for rate in rates(as_it_is)])
    assert as_it_is.policy(model) == advice.policy and as_it_is.stepper == str(advice.optimizer)


def blows_up(trial: Trial) -> float:
    """Without a clip it fails on every seed that judges."""
    stepped(trial)
    clipped = bool(trial.rules) and "clip" in trial.rules
    if trial.final and not clipped:
        raise FloatingPointError("the loss is no number")
    return 1.0 + 1e-3 * trial.seed + 0.1 * trial.numbers["lr"] - 0.5 * clipped


def test_nothing_that_failed_on_every_seed_is_not_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    options = TuneOptions("test_tune:blows_up", only=("adam", "clip_grad_norm"), steps=8)
    results = tuned(options, Budget(trials=10, scale=1.0, choosing=1, judging=6))
    answer = results["answer"]
    assert "clip_grad_norm" in answer["label"] and answer["number"] == answer["leader"] != answer["nothing"]
    assert answer["verdict"]["significant"] and answer["verdict"]["failed"] == [0, 6]
    study.show(results)
    said = capsys.readouterr().out
    assert "gain in metric +inf, 95% interval +inf to +inf over 6 pairs of seeds; its runs failed on 0 of the seeds" in said
    assert "Failed on 6 fresh seeds: adam: " in said and "the loss is no number" in said


def reports_alone(trial: Trial) -> float:
    """What it reports is sound, and what it returns is not: half of the trials are given up before that is seen."""
    stepped(trial)
    trial.report(trial.steps // 2, 1.0 + 0.1 * trial.numbers["lr"])
    return math.nan


def test_a_study_without_any_metric_ends_in_one_sentence_though_some_trials_were_given_up() -> None:
    options = TuneOptions("test_tune:reports_alone", only=FEW, steps=8)
    with pytest.raises(StudyError, match=r"reports_alone gave no metric in any of \d+ trials: the metric is nan"):
        tuned(options, Budget(trials=8, scale=1.0, choosing=1, judging=6))


def counselled(trial: Trial) -> float:
    """Better under the advised optimizer, the more so the larger its rates; what is its own comes from the seed alone."""
    stepped(trial)
    gain = 1.0 + trial.numbers["lr"] if trial.stepper else 0.0
    trial.report(trial.steps // 2, 3 - gain)
    return 3 - gain + 1e-6 * trial.seed * (1 + trial.numbers["lr"])


def test_the_advice_is_judged_as_it_stands_beside_the_leader(capsys: pytest.CaptureFixture[str]) -> None:
    options = TuneOptions("test_tune:counselled", only=(*FEW, "advised"), steps=8)
    results = tuned(options, Budget(trials=30, scale=1.0, choosing=1, judging=6))
    advice, answer = results["advice"], results["answer"]
    search = {t["number"]: t["numbers"] for t in results["trials"]}
    assert advice["number"] != answer["leader"] and search[advice["number"]]["lr"] == spaces.START
    assert search[answer["leader"]]["optimizer"] == "advised" and search[answer["leader"]]["lr"] > spaces.START
    # The gains, by calling the target again.
    seeds = range(6)
    nothing, own, leader = (
        [counselled(Trial(search[number], seed, 8, final=True)) for seed in seeds]
        for number in (answer["nothing"], advice["number"], answer["leader"])
    )
    gains = [base - value for base, value in zip(nothing, own, strict=True)]
    assert advice["judging"] == pytest.approx(own) and advice["verdict"]["gains"] == pytest.approx(gains)
    assert advice["verdict"]["interval"] == pytest.approx(paired_interval(gains)) and advice["verdict"]["significant"]
    kept = np.mean(gains) / np.mean([base - value for base, value in zip(nothing, leader, strict=True)])
    assert tables.share_kept(results) == pytest.approx(kept) and 0.3 < kept < 0.9
    study.show(results)
    assert f"nw.advise as it stands, {advice['optimizer']}: gain" in (said := capsys.readouterr().out) and f"; {100 * kept:.0f}% of" in said
    assert f"{100 * kept:.0f}% of the gain" in tables.summary_rows(results)[0]["advice as it stands"]


def test_the_advice_is_judged_where_nothing_wins_and_is_told_to_be_worse() -> None:
    options = TuneOptions("test_tune:ill_advised", only=(*FEW, "advised"), steps=8)
    results = tuned(options, Budget(trials=8, scale=1.0, choosing=1, judging=6))
    answer = results["answer"]
    assert answer["number"] == answer["leader"] == answer["nothing"] and answer["verdict"] is None
    assert results["advice"]["verdict"]["mean"] == pytest.approx(-1.0) and not results["advice"]["verdict"]["significant"]
    assert "worse than nothing" in tables.summary_rows(results)[0]["advice as it stands"] and "of the leader" not in tables.advice(results)


def ill_advised(trial: Trial) -> float:
    """Worse by one under whatever is not plain Adam."""
    stepped(trial, model := nn.Linear(2, 2))
    return 3.0 + bool(trial.stepper or trial.policy(model).rules) + 0.01 * trial.seed


def test_the_range_of_rates_is_that_of_the_first_optimizer_and_the_others_move_along() -> None:
    space = space_of(["muon", "adam"], (1e-3, 1e-1))
    assert space.optimizers == ("muon", "adam") and space.is_nothing(space.nothing(3.0))
    assert sorted(map(spaces.rate, space.first())) == pytest.approx([1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1], rel=0.01)
    adam = {**space.nothing(space.high), "optimizer": "adam"}
    assert spaces.rate(adam) == pytest.approx(0.1 * 0.005 / 0.01, rel=0.01) and not space.is_nothing(adam)


# ------------------------------------------------------------------------------------------------------------ the study


def test_an_interrupted_study_tries_what_the_uninterrupted_one_tries() -> None:
    """Stopped in the middle of a trial, before the first, among those of the sampler and on fresh seeds."""
    whole = tuned(ask("noise", storage="whole.db"))
    count = len(calls)
    calls.clear()
    stops.extend((1, 6, count - 2))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tuned(ask("noise", storage="parts.db"))
    parts = tuned(ask("noise", storage="parts.db"))
    assert stops == [] and len(calls) == count, "no finished trial was done again"
    assert lasting({**parts, "tune": ""}) == lasting({**whole, "tune": ""})
    assert lasting(tuned(ask("noise", storage="parts.db"))) == lasting(parts) and len(calls) == count


def test_another_seed_asks_for_other_trials_and_the_same_for_the_same() -> None:
    import optuna

    def asked(seed: int) -> list[Any]:
        study = optuna.create_study(sampler=storage.sampler(seed))
        found = []
        for k in range(10):
            trial = study.ask()
            found.append(space_of(FEW).suggested(trial))
            study.tell(trial, float(k))
        return found

    one, same, other = asked(3), asked(3), asked(4)
    assert one == same and all(a != b for a, b in zip(one, other, strict=True))


def test_a_trial_that_raises_or_is_not_finite_fails_and_the_study_goes_on() -> None:
    results = tuned(ask("fails"))
    states = {t["state"] for t in results["trials"]}
    assert {"done", "refused", "failed"} <= states
    [said] = [line for line in tables.remarks(results) if "ValueError" in line]
    assert "the rule is too much (test_tune.py, line" in said
    assert any("the metric is nan" in line for line in tables.remarks(results))
    assert "decay" not in results["answer"]["label"]


def fails(trial: Trial) -> float:
    model = nn.Linear(2, 2)
    actions = {rule.action for rule in trial.policy(model).rules}
    if "weight_decay" in actions:
        raise ValueError("the rule is too much")
    return math.nan if actions else noise(trial)


def test_the_front_has_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    drawn = enumerate(rng.integers(0, 5, (30, 2)).tolist())
    done = [{"number": k, "state": "done", "value": value, "step_ms": ms, "size": 5} for k, (value, ms) in drawn]
    trials = [*done, {"number": 30, "state": "failed", "value": None, "step_ms": None, "size": None}]
    for maximize, sign in ((False, 1), (True, -1)):
        asked = {"maximize": maximize, "objectives": ["metric", "size", "step_ms"], "trials": trials}
        found = {t["number"] for t in tables.front(asked)}
        points = {t["number"]: (sign * t["value"], t["step_ms"]) for t in done}
        beaten = {k for k, (v, ms) in points.items() if any(a <= v and b <= ms and (a, b) != (v, ms) for a, b in points.values())}
        assert found == set(points) - beaten and 0 < len(found) < 30


@pytest.mark.long
def test_several_objectives_have_a_front() -> None:
    results = tuned(ask("sized", objectives=("metric", "size")))
    points = {t["number"]: (t["value"], t["size"]) for t in results["trials"] if t["state"] == "done"}
    front = {t["number"] for t in tables.front(results)}
    for number, (value, size) in points.items():
        beaten = any(v <= value and s <= size and (v, s) != (value, size) for v, s in points.values())
        assert (number in front) is not beaten
    assert len(points) == len(results["trials"]), "none is given up"


def sized(trial: Trial) -> float:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = trial.attach(model)
    for _ in range(4):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    model[0].weight.data[: len(trial.policy(model).rules)] = 0.0
    return float(optimizer.param_groups[0]["lr"])


# ---------------------------------------------------------------------------------------------------------- the command


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["tune", *arguments, "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("normwise: ") and "Traceback" not in err
    return last


def two(one: Any, other: Any) -> float:
    return 0.0


def raises(trial: Trial) -> float:
    raise RuntimeError("no such data")


def constant(trial: Trial) -> float:
    stepped(trial)
    return 0.5


def undefined(trial: Trial) -> float:
    return math.nan


def wordy(trial: Trial) -> Any:
    return "better"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gtp", "There is no task 'gtp'"),
        ("no_such_module:train", "cannot be imported: ModuleNotFoundError"),
        ("test_tune:no_such", "cannot be imported: AttributeError"),
        ("test_tune:calls", "is a list: give a function"),
        ("test_tune:two", "takes (one: 'Any', other: 'Any') -> 'float', but must take one argument"),
        ("test_tune:noise --data x", "--data is for built-in tasks"),
        ("test_tune:raises", "failed in its first trial (RuntimeError: no such data (test_tune.py, line"),
        ("test_tune:wordy", "failed in its first trial (wordy returned the text 'better': return one number)"),
        ("test_tune:undefined", "gave no metric in any of 6 trials: the metric is nan"),
        ("test_tune:constant", "was 0.5 in all of 6 trials"),
        ("test_tune:noise --seeds 5", "must be 6 or more"),
        ("test_tune:noise --trials 4", "must be 5 or more"),
        ("test_tune:noise --only max_nrm", "Did you mean 'max_norm'?"),
        ("test_tune:noise --only advised", "name yours before it"),
        ("test_tune:noise --only ,", "No rule or optimizer was given"),
        ("test_tune:noise --objectives size", "but must be metric, and then"),
        ("test_tune:noise --lr 1e-2,1e-3", "must go from a number above 0 to a larger one"),
        ("test_tune:noise --lr fast", "is no range"),
        ("test_tune:noise --budget slow", "There is no budget 'slow'"),
        ("test_tune:noise --storage nonsense://x", "the storage nonsense://"),
        ("test_tune:noise --storage postgresql+psycopg://me:secret@127.0.0.1:1/x", "the storage postgresql+psycopg://me:***@127.0.0.1:1/x"),
        ("test_tune:noise --storage words.txt", "the storage"),
        ("test_tune:noise --storage /proc/no/x.db", "cannot be written"),
        ("test_tune:noise --policy /proc/no/x.yaml", "cannot be written"),
        ("test_tune:noise --executor dask://x", "is no address of a cluster"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words.txt").write_text("shopping list\nmilk\n" * 100)
    found = sentence(capsys, *arguments.split(), *("--steps", "8") * ("--steps" not in arguments))
    assert said in found and "secret" not in found
    assert Path("words.txt").read_text() == "shopping list\nmilk\n" * 100


def test_a_storage_of_another_version_and_a_study_of_another_space_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    same = ("test_tune:noise", "--steps", "8", "--trials", "5", "--seeds", "6", "--storage", "s.db", "--name", "mine")
    assert cli.main(["tune", *same, "--only", "max_norm,adam", "--workers", "1"]) == 0
    before = sqlite3.connect("s.db").execute("select count(*) from trials").fetchone()
    capsys.readouterr()
    assert "the study 'mine' was begun with another space; give another --name" in sentence(capsys, *same, "--only", "max_norm,muon")
    assert "another steps" in sentence(capsys, *same, "--only", "max_norm,adam", "--steps", "9")
    assert sqlite3.connect("s.db").execute("select count(*) from trials").fetchone() == before
    with sqlite3.connect("s.db") as database:
        database.execute("update alembic_version set version_num = 'v9.9.9.a'")
    assert "no longer compatible" in sentence(capsys, *same, "--only", "max_norm,adam")


def test_a_planted_gain_is_found_and_the_command_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Judged on seeds of its own; table, page, results, and a policy that attaches."""
    arguments = ["tune", "test_tune:planted", "--steps", "8", "--trials", "12", "--only", ",".join(FEW), "--workers", "1", "--json",
                 "out/r.json", "--report", "out/page"]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "test_tune:planted: adam + max_norm (" in out and "95% interval" in out
    assert "mattered" in out and "Policy: out/r.yaml" in out
    results = json.loads(Path("out/r.json").read_text())
    page = Path("out/page/index.html").read_text()
    assert results["answer"]["label"] in page and "What mattered" in page and "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert results["answer"]["verdict"]["mean"] > 1 and results["importances"]
    judges, others = ({t.seed for t in calls if t.final is final} for final in (True, False))
    assert judges == set(range(8)) and others == {1000, 1001, 1002, 1003}
    nothing = [t for t in results["trials"] if (t["numbers"]["bound"], t["numbers"]["pull"]) == ("none", "none")]
    assert len(nothing) >= 5 and all(t["state"] == "done" for t in nothing[:5]) and any(t["state"] == "given up" for t in results["trials"])
    leader = next(t for t in results["trials"] if t["number"] == results["answer"]["leader"])
    assert any(t["lr"] == leader["lr"] for t in nothing), "nothing is tried at the leader's rate"
    policy = nw.Policy.load("out/r.yaml")
    assert [rule.action for rule in policy][:1] == ["clip_norm"]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), results["answer"]["lr"], weight_decay=0.0)
    control = nw.attach(model, optimizer, policy)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert control.verify()
    text = Path("out/r.yaml").read_text()
    assert sorted(path.suffix for path in Path("out").iterdir() if path.is_file()) == [".db", ".json", ".yaml"]
    assert f"learning rate {results['answer']['lr']:g}" in text and text.startswith("# test_tune:planted: adam + max_norm")


def test_no_gain_is_said_and_the_policy_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "tune test_tune:noise --steps 8 --trials 5 --seeds 6 --only max_norm,weight_decay,adam --workers 1 --name n"
    assert cli.main(arguments.split()) == 0
    assert "no significant gain over nothing" in capsys.readouterr().out
    policy = nw.Policy.load("n.yaml")
    assert len(policy) == 0
    model = nn.Linear(2, 2)
    nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), policy)
    assert "Optimizer: Adam" in Path("n.yaml").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "tune.md").read_text(), re.DOTALL)


def trials() -> list[Trial]:
    """Nothing, and a bound that is felt at once."""
    space = space_of(["max_norm", "adam"])
    bound = space.suggested(Fixed(**{"bound": "max_norm", "max_norm radius": 0.5, "max_norm on": "weights"}))
    return [Trial(numbers, 0, 4) for numbers in (space.nothing(1 / 3), bound)]


def test_the_function_of_the_page_trains() -> None:
    space: dict[str, Any] = {}
    exec(BLOCKS[0], space)
    losses = [space["train"](trial) for trial in trials()]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses))
    assert len(BLOCKS[0].splitlines()) <= 21, "an example of fifteen lines, and its imports"


@pytest.mark.long
def test_the_trainers_of_the_page_train(tmp_path: Path) -> None:
    """As they stand there, with a small model and quiet trainers: the rules act, and the metric is another one."""
    transformers, lightning = pytest.importorskip("transformers"), pytest.importorskip("lightning")
    import trainer_cases

    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "per_device_train_batch_size": 2}
    rows = trainer_cases.rows()
    hugging: dict[str, Any] = {
        "nw": nw, "Trainer": transformers.Trainer, "TrainingArguments": functools.partial(transformers.TrainingArguments, **quiet),
        "make_model": trainer_cases.gpt2, "data": rows, "held_out": rows[:4],
    }  # fmt: skip

    class MyModule(lightning.LightningModule):    # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = (self.layers(batch) - 1).square().mean()
            self.log("val_loss", loss)
            return loss

    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    seed = functools.partial(lightning.seed_everything, verbose=False)
    fabric = SimpleNamespace(Trainer=lambda **given: lightning.Trainer(**given, **off, accelerator="cpu"), seed_everything=seed)
    data = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)
    for block, space in ((BLOCKS[1], hugging), (BLOCKS[2], {"nw": nw, "lightning": fabric, "MyModule": MyModule, "data": data})):
        exec(block, space)
        tried = trials()
        losses = [space["train"](trial) for trial in tried]
        assert losses[0] != losses[1] and all(map(math.isfinite, losses))
        assert all(len(trial.ticks) == 4 and trial.missed() == "" for trial in tried)
        norms = [[w.norm(dim=1).max().item() for w in trial.models[0].parameters() if w.ndim == 2] for trial in tried if trial.models]
        assert all(bounded < free for free, bounded in zip(*norms, strict=True))


@pytest.mark.long
def test_a_built_in_task_with_two_workers_that_is_killed_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "normwise", "tune", "tabular", "--tiny", "--steps", "20", "--trials", "8", "--only", "max_norm,adam",
               "--workers", "2", "--json", "r.json"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.05)
        if Path("r.db").exists() and done() >= 2:
            process.kill()
    assert process.wait() == -9
    before = done()
    assert 2 <= before < 8
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    results = json.loads(Path("r.json").read_text())
    assert len(results["trials"]) >= 8 and results["metric"] == "loss"
    numbers = [trial["number"] for trial in results["trials"]]
    assert numbers == list(range(len(numbers))), "those under way were taken up again"


def done() -> int:
    try:
        with sqlite3.connect("r.db") as database:
            return int(database.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED')").fetchone()[0])
    except sqlite3.Error:
        return 0
