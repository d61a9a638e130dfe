"""The race without training: the search against brute force, the plans, the figures, and a whole race on made-up results."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import normwise as nw
from normwise.errors import DataError, StudyError
from normwise.experiments.catalog.contenders import BASELINES, COMMON, FIRST, racing
from normwise.experiments.framework import driver
from normwise.experiments.framework.figures import geometric_mean, interval
from normwise.experiments.framework.lattice import Axis, Point, best, compass
from normwise.experiments.framework.progress import Bar, Lines, Progress
from normwise.experiments.framework.store import Store
from normwise.experiments.framework.study import TUNING_SEED, Options
from normwise.experiments.race import plan as plans
from normwise.experiments.race import study, tables
from normwise.experiments.race.protocol import (
    BUDGETS,
    LADDER_SEED,
    PROTOCOLS,
    RATIO,
    ROBUST_AT,
    RUNGS,
    first_horizon,
    rung,
)
from normwise.experiments.race.run import RaceRun, is_spike
from normwise.experiments.race.study import race, replay
from normwise.optim.schedule import Rate
from race_cases import STEP_MS, made_up, made_up_times

AXES = (Axis("lr", (0.01,), ratio=2.0), Axis("a", (1.0, 2.0, 3.0, 4.0), 2), Axis("b", ("x", "y")), Axis("c", (0.0, 1.0, 2.0), 1))
Score = Callable[[Point], float]

# ---------------------------------------------------------------------------------------------------------------- the search


def searched(score: Score, trials: int, axes: tuple[Axis, ...] = AXES) -> list[Point]:
    """The points tried, in order."""
    scores: dict[Point, float] = {}
    while points := compass(axes, scores, trials):
        [point] = points
        assert point not in scores, "a point was tried twice"
        assert all(axis.has(k) for axis, k in zip(axes, point, strict=True)), f"{point} lies off an axis"
        scores[point] = score(point)
    return list(scores)


def bowl(seed: int) -> Score:
    """A concave quadratic whose top lies somewhere on the lattice or between its points."""
    rng = random.Random(seed)
    top = [rng.uniform(-5, 5), *(rng.uniform(-2, 2) for _ in AXES[1:])]
    steep = [rng.uniform(0.5, 3) for _ in AXES]
    return lambda point: -sum(s * (x - t) ** 2 for s, x, t in zip(steep, point, top, strict=True))


def lattice(reach: int) -> Iterator[Point]:
    sides = [range(-reach, reach + 1), *(range(-axis.centre, len(axis.values) - axis.centre) for axis in AXES[1:])]
    return itertools.product(*sides)


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_what_brute_force_finds_on_a_concave_score(seed: int) -> None:
    score = bowl(seed)
    points = searched(score, 200)
    assert max(points, key=score) == max(lattice(8), key=score)
    assert len(points) < 40, "it ends when every neighbour of the best point was tried, long before 200 trials"


@pytest.mark.parametrize("seed", range(20))
def test_the_rate_is_bracketed_before_anything_else_is_touched(seed: int) -> None:
    score = bowl(seed)
    points = searched(score, 200)
    first = next(k for k, point in enumerate(points) if any(point[1:]))
    rates = [point[0] for point in points[:first]]
    top = max(points[:first], key=score)[0]
    assert min(rates) < top < max(rates)
    assert not any(any(p[1:]) for p in searched(score, first)), "with no more trials than that, the rate is all that is searched"


@pytest.mark.parametrize("trials", [1, 2, 6, 12, 24])
def test_the_search_spends_exactly_its_trials_where_there_is_something_left(trials: int) -> None:
    assert len(searched(lambda point: float(point[0]), trials)) == trials
    assert len(searched(bowl(3), trials)) <= trials


def test_the_search_depends_on_finished_trials_alone() -> None:
    score = bowl(7)
    points = searched(score, 24)
    for k in range(len(points)):
        assert compass(AXES, {p: score(p) for p in points[:k]}, 24) == [points[k]]


def test_trials_that_diverged_are_no_better_than_any_other() -> None:
    """Everything above the rate of the centre diverges; the best lies two steps below."""
    points = searched(lambda p: -math.inf if p[0] > 0 else -((p[0] + 2) ** 2) - sum(map(abs, p[1:])), 24)
    scores = {p: -float(p[0] > 0) for p in points}
    assert min(p[0] for p in points) == -3 and max(p[0] for p in points) <= 1 and best(scores)[0] <= 0


def test_of_equal_scores_the_first_tried_stays_the_best() -> None:
    assert best({(0, 0): 1.0, (1, 0): 1.0}) == (0, 0)


def test_a_best_rate_at_the_end_of_those_tried_is_told() -> None:
    def found(top: int, trials: int) -> bool:
        plan = plans.tune(rules(), "auto" if trials == 1 else "sgd", 500, trials)
        return followed(plan, lambda run: abs(math.log2(dict(run.numbers)["lr"] / 0.1) - top))[0]["on_edge"]

    assert found(9, 3) and not found(0, 9) and not found(1, 9)
    assert not found(0, 1), "of a single trial nothing is said"


def test_axes_say_what_their_positions_stand_for() -> None:
    rate, listed = AXES[:2]
    assert [rate.value(k) for k in (-1, 0, 3)] == [0.005, 0.01, 0.08] and rate.has(-40)
    assert [k for k in range(-5, 6) if listed.has(k)] == [-2, -1, 0, 1]
    assert [listed.value(k) for k in (-2, 0, 1)] == [1.0, 3.0, 4.0]


def test_every_contender_has_the_common_axes_and_few_of_its_own() -> None:
    for name, contender in ((n, c) for n, c in FIRST.items() if n != "auto"):
        assert contender.axes[0].name == "lr" and contender.axes[0].ratio == 2.0
        shared = contender.axes[-len(COMMON):]
        assert [(axis.name, axis.values) for axis in shared] == [(axis.name, axis.values) for axis in COMMON] and len(contender.own) <= 3
        names = [axis.name for axis in contender.axes]
        assert len(set(names)) == len(names), name
        middle = contender.numbers([0] * len(names))
        assert (middle["schedule"], middle["init"], middle["clip"]) == ("linear", "own", 0.0)
        assert middle["batch"] == (0.5 if name == "ridge_small" else 1.0)


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)),
    nn.Sequential(nn.Embedding(4, 3), nn.LSTM(3, 3), nn.Linear(3, 2)),
])  # fmt: skip
def test_auto_has_no_choice_and_is_the_preset_without_arguments(model: nn.Module) -> None:
    """Also where the model has no parameter of auto's main row."""
    axes = FIRST["auto"].axes
    assert [axis.name for axis in axes] == ["lr", *(axis.name for axis in COMMON)]
    middle = (0,) * len(axes)
    assert compass(axes, {}, 12) == [middle] and compass(axes, {middle: 1.0}, 12) == []
    numbers = FIRST["auto"].numbers(middle)
    assert numbers["schedule"] == "linear"
    built, plain = FIRST["auto"].build(model, numbers)[0], nw.optim.auto(model)
    assert [g["lr"] for g in built.param_groups] == [g["lr"] for g in plain.param_groups]
    tenth = FIRST["auto"].build(model, {**numbers, "lr": 0.0028})[0]
    assert [g["lr"] for g in tenth.param_groups] == pytest.approx([g["lr"] / 10 for g in plain.param_groups])


def test_the_baselines_always_race_and_unknown_names_are_told() -> None:
    assert racing(["muon"]) == ["adamw", "sgd", "muon"] and racing(None, FIRST) == list(FIRST)
    with pytest.raises(StudyError, match=r"no contender 'mouon'\. Did you mean 'muon'\?"):
        racing(["mouon"])
    with pytest.raises(StudyError, match=r"no budget 'quik'\. Did you mean 'quick'\?"):
        race(Options("gpt", budget="quik"))


# ----------------------------------------------------------------------------------------------------------------- the plans


def made(name: str, numbers: dict[str, Any], samples: int, seed: int, full: bool) -> RaceRun:
    return RaceRun("task", name, tuple(numbers.items()), samples, seed, full, 1, "v")


def rules(target: float = 2.0, accuracy: bool = False, horizon: int = 1000) -> plans.Rules:
    return plans.Rules(made, accuracy, horizon, PROTOCOLS[1], target)


def told(value: float | None) -> dict[str, Any]:
    return {"result": value, "diverged": value is None}


def followed(plan: plans.Plan, result: Callable[[RaceRun], float | None]) -> tuple[Any, list[RaceRun]]:
    """What a plan returns, and the runs that it asked for."""
    asked: list[RaceRun] = []
    try:
        batch = next(plan)
        while True:
            asked += batch
            batch = plan.send([told(result(run)) for run in batch])
    except StopIteration as stop:
        return stop.value, asked


@pytest.mark.parametrize("last", [0, 1, 7, RUNGS - 1])
@pytest.mark.parametrize("start", [-1, 0, 6, RUNGS - 1])
def test_the_ladder_finds_the_last_rung_that_reaches_the_target(last: int, start: int) -> None:
    """Of a loss that falls with the horizon: as trying every rung would."""
    needed = rung(1000, last)
    found, asked = followed(plans.ladder(rules(), "muon", {"lr": 1.0}, start, 3), lambda run: 2.0 * needed / run.samples)
    reaching = [k for k in range(RUNGS) if needed / rung(1000, k) <= 1.0]
    assert found["rung"] == last == max(reaching)
    assert len({run.samples for run in asked}) == len(asked) == len(found["tried"]) <= abs(last - start) + 2
    assert all(run.seed == 3 and run.full for run in asked)


def test_a_seed_that_does_not_get_there_at_the_full_horizon_missed() -> None:
    for value in (2.001, None):
        found, asked = followed(plans.ladder(rules(), "muon", {"lr": 1.0}, 4, 0), lambda run, value=value: value)
        assert found["rung"] is None and [run.samples for run in asked] == [rung(1000, k) for k in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("seed", range(30))
def test_a_noisy_ladder_ends_on_a_rung_that_was_reached_next_to_one_that_was_not(seed: int) -> None:
    rng = random.Random(seed)
    outcome = [rng.random() < 0.5 for _ in range(RUNGS)]
    at = {rung(1000, k): k for k in range(RUNGS)}
    plan = plans.ladder(rules(), "muon", {"lr": 1.0}, seed % RUNGS, 0)
    found, asked = followed(plan, lambda run: 1.0 if outcome[at[run.samples]] else 3.0)
    assert len(asked) == len(found["tried"]) <= RUNGS
    reached = [k for k in found["tried"] if outcome[k]]
    assert found["rung"] == max(reached, default=None)
    end = -1 if found["rung"] is None else found["rung"]
    assert end + 1 == RUNGS or not outcome[end + 1]


@pytest.mark.parametrize("accuracy", [False, True])
@pytest.mark.parametrize("last", range(-1, RUNGS))
def test_bisection_finds_the_rung_that_trying_all_would(last: int, accuracy: bool) -> None:
    def result(run: RaceRun) -> float:
        enough = last >= 0 and run.samples >= rung(1000, last)
        return (0.9 if enough else 0.5) if accuracy else (1.0 if enough else 3.0)

    found, asked = followed(plans.bracket(rules(0.9 if accuracy else 2.0, accuracy), "muon", {"lr": 1.0}), result)
    assert found == last and len(asked) <= 5
    assert all(run.seed == LADDER_SEED and not run.full for run in asked)


def test_tuning_uses_its_own_seed_and_keeps_every_trial() -> None:
    def loss(run: RaceRun) -> float | None:
        lr = dict(run.numbers)["lr"]
        return None if lr > 0.03 else 2.0 + (math.log2(lr / 0.02)) ** 2

    found, asked = followed(plans.tune(rules(), "muon", 500, 9), loss)
    assert found["numbers"]["lr"] == 0.02 and found["result"] == 2.0 and not found["on_edge"]
    assert found["trials"] == len(asked) == len(found["tried"]) == 9
    assert {(run.seed, run.full, run.samples) for run in asked} == {(TUNING_SEED, False, 500)}
    assert None in [trial["result"] for trial in found["tried"]], "a trial that diverged is kept"


def test_reported_seeds_are_for_nothing_else() -> None:
    results, asked = followed(plans.reported(rules(), "adamw", {"lr": 1.0}, 1000, 3), lambda run: 1.0)
    assert [run.seed for run in asked] == [0, 1, 2] and len(results) == 3 and all(run.full for run in asked)
    assert min(TUNING_SEED, LADDER_SEED) >= 1000 > max(plan.seeds for plan in BUDGETS.values())


def test_robustness_spans_two_decades_around_the_tuned_rate() -> None:
    found, asked = followed(plans.robustness(rules(), "muon", {"lr": 0.02}, 500), lambda run: dict(run.numbers)["lr"])
    assert [one["lr"] for one in found] == [0.002, 0.00632, 0.02, 0.0632, 0.2] == [one["result"] for one in found]
    assert ROBUST_AT[0] * 100 == ROBUST_AT[-1] and all(run.seed == TUNING_SEED for run in asked)


def test_a_result_that_is_not_finite_is_the_worst() -> None:
    for accuracy in (False, True):
        of = rules(0.5, accuracy)
        assert of.score(told(None)) == -math.inf and not of.reached(told(None))
        assert of.reached(told(0.5)), "reaching it exactly is reaching it"
        assert of.reached(told(0.6)) is accuracy


def test_horizons() -> None:
    assert [rung(1000, k) for k in (0, 1, 16)] == [1000, 870, round(1000 * RATIO**16)]
    assert first_horizon("gpt", 16, 1.0) == 8000 and first_horizon("gpt", 16, 0.25) == 2000
    assert [plans.pays(2.0, 1.95, False), plans.pays(2.0, 1.97, False)] == [True, False]
    assert [plans.pays(0.9, 0.91, True), plans.pays(0.9, 0.901, True)] == [True, False], "of the error, not of the accuracy"


# --------------------------------------------------------------------------------------------------------------- the figures


def exact(values: list[float], level: float) -> tuple[float, float]:
    """The interval from all resamples there are, each as likely as any other."""
    medians = sorted(sorted(draw)[len(values) // 2] for draw in itertools.product(values, repeat=len(values)))
    tail = (1 - level) / 2
    return medians[int(tail * len(medians))], medians[math.ceil((1 - tail) * len(medians)) - 1]


@pytest.mark.parametrize("level", [0.95, 0.6, 0.4])
@pytest.mark.parametrize("values", [[0.4, 0.5, 0.9], [0.5, 0.5, 0.7], [0.5, 0.7, math.inf], [0.5, math.inf, math.inf]])
def test_the_bootstrap_is_the_enumeration_of_all_resamples_of_three_seeds(values: list[float], level: float) -> None:
    assert interval(values, level) == exact(values, level)


def test_the_bootstrap_of_five_seeds_is_near_the_enumeration() -> None:
    values = [0.43, 0.5, 0.57, 0.66, 0.76]
    assert interval(values) == exact(values, 0.95) and interval(values, 0.5) == exact(values, 0.5)
    assert interval([0.5, 0.6, math.inf, math.inf]) == (0.5, math.inf)


def test_means() -> None:
    assert geometric_mean([0.25, 1.0]) == pytest.approx(0.5) and geometric_mean([0.5, math.inf]) == math.inf
    assert median([0.5, 0.7, math.inf]) == 0.7 and median([0.5, math.inf]) == math.inf


@pytest.mark.parametrize("family", ["linear", "hold"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40, 500])
def test_schedules_warm_up_peak_and_end_at_zero(steps: int, family: str) -> None:
    warm = max(1, round(0.05 * steps))
    shares = [Rate(steps, family)(step) for step in range(steps)]
    assert shares[0] == 1 / warm and max(shares) == 1.0 and Rate(steps, family)(steps) == 0.0
    assert all(0 < share <= 1 for share in shares), "no step is wasted"
    assert shares[warm - 1:] == sorted(shares[warm - 1:], reverse=True)


def test_hold_keeps_the_rate_for_half_of_the_run_and_linear_does_not() -> None:
    hold, linear = ([Rate(100, family)(step) for step in range(100)] for family in ("hold", "linear"))
    assert hold[4:51] == [1.0] * 47 and hold[75] == pytest.approx(0.5)
    assert linear[4:6] == [1.0, 1.0] and linear[6] < 1 and linear[52] == pytest.approx(48 / 95)


def test_spikes_stand_out_of_the_last_32_losses() -> None:
    calm = np.random.default_rng(0).normal(2.0, 0.1, 32).tolist()
    edge = float(np.mean(calm) + 5 * np.std(calm))
    assert is_spike(edge + 1e-6, deque(calm)) and not is_spike(edge - 1e-6, deque(calm))
    assert not is_spike(edge - 100, deque(calm)), "a drop is none"
    assert not is_spike(99.0, deque(calm[:31])), "too few to say"


# -------------------------------------------------------------------------------------------------------------- whole races


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Made-up results, instantly; counts the runs of each contender."""
    calls: Counter[str] = Counter()

    def counted(run: RaceRun) -> dict[str, Any]:
        calls[run.contender] += 1
        return made_up(run, accuracy=run.task in ("cnn", "resnet"))

    metrics = {"gpt": "loss", "lstm": "loss", "cnn": "accuracy", "resnet": "accuracy"}
    monkeypatch.setattr(study, "load_task", lambda name, *_, **__: SimpleNamespace(key=name, metric=metrics[name], batch=16))
    monkeypatch.setattr(study, "step_times", made_up_times)
    monkeypatch.setattr(study, "PROTOCOL", 1)    # whose contenders the formula knows
    monkeypatch.setattr(driver, "call", counted)
    return calls


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in results.items() if key not in ("machine", "data")}))


@pytest.mark.parametrize("task", ["gpt", "cnn"])
def test_a_race_says_what_the_formula_says(no_training: Counter[str], task: str) -> None:
    """The made-up loss falls with the square root of the samples, PACE times as fast: its inverse is the share, up to noise."""
    results = race(Options(task))
    lines = {line["name"]: line for line in results["contenders"]}
    assert results["leader"] == "adamw" and results["unfinished"] == [] and set(lines) == {*BASELINES, *BUDGETS["standard"].contenders}
    assert lines["adamw"]["share"] == lines["adamw"]["seconds_share"] == 1.0 and lines["adamw"]["sets_target"]
    for name, share in (("muon", 0.5), ("normuon", 0.47), ("muonh", 0.55), ("scion", 0.62)):
        line = lines[name]
        assert line["low"] <= line["share"] <= line["high"] and line["missed"] == 0
        assert share / RATIO**0.5 * 0.85 <= line["share"] <= share / RATIO * 1.15, name
        assert line["seconds_share"] == pytest.approx(line["share"] * STEP_MS[name] / STEP_MS["adamw"])
        assert {run["seed"] for run in line["ladder"]} == set(range(5))
    assert lines["sgd"]["share"] is None and lines["sgd"]["missed"] == 5 and lines["sgd"]["seconds_share"] is None
    assert results["target"] == sorted(lines["adamw"]["at_horizon"])[2]
    assert results["horizon"]["steps"] == {"gpt": 500, "cnn": 800}[task] and not results["horizon"]["saturated"]


def test_a_long_race_doubles_the_horizon_while_that_pays(no_training: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = race(Options("gpt", budget="long", only=["muon"], seeds=1))
    assert results["horizon"]["samples"] == 4 * 8000 and [of for of, _ in results["horizon"]["results"]] == [8000, 16000, 32000, 64000]
    flat = {1: 2.0, 2: 1.5, 4: 1.49}
    monkeypatch.setattr(driver, "call", lambda run: made_up(run) | {"result": flat.get(run.samples // 8000, 2.0)})
    saturated = race(Options("gpt", budget="long", only=["muon"], seeds=1))["horizon"]
    assert saturated["saturated"] and saturated["samples"] == 16000 and saturated["results"] == [[8000, 2.0], [16000, 1.5], [32000, 1.49]]


def test_a_race_at_another_horizon_is_told_beside_the_ordinary_one(no_training: Counter[str], tmp_path: Path) -> None:
    """At twice the steps the formula's shares are the same; the file of its runs says how long it was, an ordinary one does not."""
    ordinary, doubled = (
        race(Options("gpt", only=["auto"], state=tmp_path / f"{times}.jsonl", horizon=times)) for times in (1.0, 2.0)
    )  # fmt: skip
    assert doubled["horizon"]["samples"] == 2 * ordinary["horizon"]["samples"] and (ordinary["scale"], doubled["scale"]) == (1.0, 2.0)
    assert timeless(study.replay(tmp_path / "2.0.jsonl")) == timeless(doubled)
    assert '"scale"' not in (tmp_path / "1.0.jsonl").read_text(), "races from before there was another horizon go on"
    table = tables.elsewhere([ordinary, doubled], {"gpt": ordinary})
    [row] = [line for line in table.splitlines() if "`gpt`" in line]
    apart = float(row.split("|")[-2])
    mine, home = (next(line["share"] for line in one["contenders"] if line["name"] == "auto") for one in (doubled, ordinary))
    assert "horizon × 2" in row and mine == pytest.approx(home * RATIO**-apart, rel=0.01) and abs(apart) <= 2


@pytest.mark.parametrize("times", [0.0, -1.0, 17.0, 0.06, math.nan, math.inf])
def test_a_horizon_that_is_none_is_refused(no_training: Counter[str], times: float) -> None:
    with pytest.raises(StudyError, match="must be a number from 1/16 to 16"):
        race(Options("gpt", horizon=times))
    assert not no_training


def test_the_same_seeds_trials_and_horizons_for_everybody(no_training: Counter[str], tmp_path: Path) -> None:
    race(Options("gpt", state=tmp_path / "runs.jsonl", only=["muon", "scion"]))
    runs = [json.loads(line)["settings"] for line in (tmp_path / "runs.jsonl").read_text().splitlines() if line]
    runs = [run for run in runs if run["kind"] == "race"]
    for name in ("adamw", "sgd", "muon", "scion"):
        own = [run for run in runs if run["contender"] == name]
        assert {run["seed"] for run in own if run["full"]} == {0, 1, 2, 3, 4}
        assert {run["seed"] for run in own if not run["full"]} <= {TUNING_SEED, LADDER_SEED}
        tuned_at = 8000 if name in BASELINES else 4000
        assert len([run for run in own if run["seed"] == TUNING_SEED and run["samples"] == tuned_at]) >= 12
    assert len(runs) == len({json.dumps(run) for run in runs}), "no run was done twice"


def test_a_replay_equals_the_race_and_trains_nothing(no_training: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "runs.jsonl"
    results = race(Options("gpt", "/somewhere/poems", state=state))
    before = sum(no_training.values())
    monkeypatch.setattr("torch.__version__", "99.0")
    again = replay(state)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(results)), "whatever torch looks at it"
    assert again["data"] == "poems" and sum(no_training.values()) == before


@pytest.mark.parametrize("after", [1, 80, *(pytest.param(after, marks=pytest.mark.long) for after in (0, 5, 40, 110))])
def test_an_interrupted_race_goes_on_to_the_same_results(no_training: Counter[str], tmp_path: Path, after: int) -> None:
    class Interrupting(Progress):
        left = after

        def advance(self, text: str) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    whole = race(Options("gpt", state=tmp_path / "whole.jsonl"))
    runs = sum(no_training.values())
    state = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        race(Options("gpt", state=state), Interrupting())
    assert sum(no_training.values()) - runs == after + 1
    assert timeless(race(Options("gpt", state=state))) == timeless(whole) == timeless(replay(state))
    assert sum(no_training.values()) == 2 * runs, "what was kept is not done again"


@pytest.mark.parametrize("lines", [2, 30, 90, -1])
def test_a_race_that_was_killed_in_the_middle_of_a_line_goes_on(no_training: Counter[str], tmp_path: Path, lines: int) -> None:
    state = tmp_path / "runs.jsonl"
    whole = race(Options("gpt", state=state))
    kept = state.read_text().splitlines(keepends=True)
    state.write_text("".join(kept[:lines]) + kept[lines][: len(kept[lines]) // 2])
    partly = replay(state)
    assert lines == -1 or partly["unfinished"]
    assert timeless(race(Options("gpt", state=state))) == timeless(whole)


def test_a_race_under_way_says_what_is_finished_already(no_training: Counter[str], tmp_path: Path) -> None:
    """Line by line more is known, nothing that was said is taken back, and every stage can be told and drawn."""
    state, cut = tmp_path / "runs.jsonl", tmp_path / "cut.jsonl"
    whole = race(Options("gpt", state=state, only=["muon", "scion"]))
    lines = state.read_text().splitlines(keepends=True)
    finished: set[str] = set()
    stages = set()
    for k in [*range(2, len(lines), 7), len(lines)]:
        cut.write_text("".join(lines[:k]))
        partly = replay(cut)
        now = {line["name"] for line in partly["contenders"]}
        assert finished <= now
        finished = now
        assert partly["target"] in (None, whole["target"]) and tables.page(partly) and tables.summary({"gpt": partly})
        stages.add((partly["target"] is None, len(now), len(partly["unfinished"])))
        for line in partly["contenders"]:
            [same] = [one for one in whole["contenders"] if one["name"] == line["name"]]
            assert line["shares"] == same["shares"] and line["ends"] == same["ends"]
            assert line["step_ms"] in (None, same["step_ms"]) and line["robustness"] in ([], same["robustness"])
    assert {(True, 0, 4), (False, 4, 0)} <= stages and len(stages) > 3


def test_the_order_in_which_workers_finish_changes_nothing(
    no_training: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import threading
    import time

    class Slowly(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            wait = random.Random(len(started)).random() * 0.004
            started.append(wait)
            return super().submit(lambda: (time.sleep(wait), fn(*args, **kwargs))[1])

    @contextmanager
    def threads(workers: int, setup: Callable[[], Any], context: Any) -> Iterator[ThreadPoolExecutor]:
        with Slowly(workers) as executor:
            yield executor

    started: list[float] = []
    alone = race(Options("gpt", state=tmp_path / "one.jsonl"))
    monkeypatch.setattr(driver, "open_pool", threads)
    state = tmp_path / "four.jsonl"
    assert timeless(race(Options("gpt", workers=4, state=state))) == timeless(alone) and len(started) > 100
    orders = [[json.loads(line)["key"] for line in path.read_text().splitlines() if line] for path in (tmp_path / "one.jsonl", state)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1], "the same runs, in another order"
    assert threading.active_count() < 20


def test_a_contender_that_diverges_is_kept_and_missed(no_training: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def result(run: RaceRun) -> dict[str, Any]:
        worst = {"loss": None, "accuracy": 0.0}
        gone = {"result": None, "loss": None, "diverged": True, "test": worst, "train": worst}
        return made_up(run) | (gone if run.contender == "muon" else {})

    monkeypatch.setattr(driver, "call", result)
    results = race(Options("gpt", only=["muon"], state=tmp_path / "runs.jsonl"))
    [muon] = [line for line in results["contenders"] if line["name"] == "muon"]
    assert muon["share"] is None and muon["missed"] == 5 and muon["tuned"]["result"] is None
    json.dumps(results, allow_nan=False)
    assert "| Muon | missed | - | 5 of 5 | - | - |" in tables.page(results)
    monkeypatch.setattr(driver, "call", lambda run: made_up(run) | {"result": None, "diverged": True})
    with pytest.raises(StudyError, match="Both baselines diverged"):
        race(Options("gpt"))


@pytest.mark.parametrize("wrong", [{"budget": "quik"}, {"only": ["mun"]}, {"workers": 0}, {"seeds": 0}])
def test_what_cannot_be_raced_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    monkeypatch.setattr(study, "load_task", lambda *_, **__: pytest.fail("data was loaded"))
    with pytest.raises(StudyError):
        race(Options("gpt", **wrong))


def test_a_file_without_a_race_is_told(no_training: Counter[str], tmp_path: Path) -> None:
    other, damaged, older = (tmp_path / name for name in ("other.jsonl", "damaged.jsonl", "older.jsonl"))
    other.write_text('{"key": "a", "settings": {"kind": "gan"}, "result": {}}\n')
    damaged.write_text("no JSON at all\n")
    race(Options("gpt", only=[], state=older))
    older.write_text(older.read_text().replace('"protocol": 1', '"protocol": 0'))
    for path in (other, damaged, older, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match=path.name):
            replay(path)


# ------------------------------------------------------------------------------------------------------- telling and drawing


def test_progress_is_counted_in_samples_without_a_total_that_nobody_knows(no_training: Counter[str], tmp_path: Path) -> None:
    class Told(Lines):
        def advance(self, text: str) -> None:
            self.last = -1e9  # a line for every run
            super().advance(text)

    def say() -> list[str]:
        stream = io.StringIO()
        race(Options("gpt", state=tmp_path / "runs.jsonl", only=["muon"], seeds=1), Told(stream))
        return stream.getvalue().splitlines()

    lines = say()
    assert lines[0].startswith("1 runs after 0 s; 8000 samples in all; adamw 8000 samples, seed 1000: ")
    assert lines[1].startswith("2 runs after 0 s; 24000 samples in all; adamw 16000 samples")
    assert "Tuning adamw, sgd, muon: 12 trials each, 240000 samples at most." in lines and not any(" of 0 " in line for line in lines)
    assert not any(line.startswith("1 runs") for line in say()), "nothing is left to do"
    bar = Bar(io.StringIO())
    bar.start(None)
    bar.advance("a run")
    bar.stop()


def test_tables_say_losses_as_plainly_as_wins(no_training: Counter[str]) -> None:
    results = race(Options("gpt", only=["muon", "adamw_max_norm"]))
    page = tables.page(results)
    assert page.startswith(tables.title(results)) and "validation loss of" in page
    body = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")]
    order = [name.strip() for name, _ in body[1 : 1 + len(results["contenders"])]]
    assert order[0] == "Muon" and set(order[2:]) == {"AdamW + max-norm", "SGD"} and order[1] == "AdamW"
    assert "| AdamW | 1 (sets the target) | 1.00 |" in page and page.count("| SGD | missed | - | 5 of 5 |") == 1
    muon = next(line for line in results["contenders"] if line["name"] == "muon")
    numbers = [f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in muon["tuned"]["numbers"].items()]
    assert ", ".join(numbers) in page and len(numbers) == 7
    assert "torch" in page and "reported seeds 0 to 4" in page and "budget standard" in page


def test_the_summary_has_means_only_where_all_tasks_were_reached(no_training: Counter[str]) -> None:
    found = {task: race(Options(task, only=["muon"])) for task in ("cnn", "resnet", "lstm", "gpt")}
    every = tables.summary(found)
    shares = [one["share"] for results in found.values() for one in results["contenders"] if one["name"] == "muon"]
    [row] = [line for line in every.splitlines() if line.startswith("| Muon |")]
    assert row.split("|")[-3].strip() == f"{math.prod(shares) ** 0.25:.2f}" and "All four races are finished." in every
    assert [line for line in every.splitlines() if line.startswith("| SGD |")] == ["| SGD | missed | missed | missed | missed | - | - |"]
    without = tables.summary({task: one for task, one in found.items() if task != "lstm"})
    assert "Not finished: lstm (no runs)." in without and "| AdamW | 1.00 / 1.00 | 1.00 / 1.00 | - | 1.00 / 1.00 | - | - |" in without


def drawn(spec: dict[str, Any]) -> list[dict[str, Any]]:
    [rows] = spec["datasets"].values()
    return rows


def test_pictures_hold_every_run(no_training: Counter[str], tmp_path: Path) -> None:
    from normwise.experiments.report import picture
    from normwise.experiments.report.race import ladders, shares

    found = {task: race(Options(task)) for task in ("cnn", "gpt")}
    for task, results in found.items():
        rows = drawn(ladders(results))
        others = [line for line in results["contenders"] if not line["sets_target"]]
        assert len(rows) == sum(len(line["ladder"]) for line in others) + 5 * len(others)
        far = [row for row in rows if row["panel"] == "SGD: missed" and row["kind"] == "misses it"]
        assert len(far) == 5 and all(row["beyond"] for row in far)
        text = picture(results, tmp_path / f"{task}.svg").read_text()
        assert all(line["label"] in text for line in others) and "beyond the axis" in text
    rows = drawn(shares(found))
    assert len([row for row in rows if row["of"] == "samples"]) == 2 * len(BUDGETS["standard"].contenders or ()) + 4
    assert len([row for row in rows if row["what"] == "missed"]) == 2
    assert "NorMuon" in picture(found, tmp_path / "race.svg").read_text()
    with pytest.raises(DataError, match=r"\.png or \.svg"):
        picture(found, tmp_path / "race.gif")
    with pytest.raises(DataError, match="no finished contender"):
        picture(found["gpt"] | {"contenders": []}, tmp_path / "none.svg")


def test_the_page_is_written_from_raw_runs(no_training: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make", Path(__file__).parents[1] / "docs" / "make.py")
    assert spec and spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "RESULTS", tmp_path)
    monkeypatch.setattr(make, "IMAGES", tmp_path)
    empty = "".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in ("race", "race cnn", "race gpt"))
    assert make.filled(empty).count("Not yet measured.") == 3
    race(Options("gpt", state=tmp_path / "race-gpt.runs.jsonl"))
    make.pictures()
    text = make.filled(empty)
    assert text.count("Not yet measured.") == 1 and "gpt: the target is a validation loss" in text and make.filled(text) == text
    for image in ("race.svg", "race-gpt.svg"):
        assert f"(images/{image})" in text and (tmp_path / image).exists()


def test_a_record_of_a_race_without_its_facts_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "race.runs.jsonl"
    Store(path).add({"kind": "race facts", "protocol": 1}, {"machine": {}})
    with pytest.raises(DataError, match="expected the runs of a race"):
        replay(path)
