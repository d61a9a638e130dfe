"""One run of ``normwise tune``: what counts as one, what it leaves behind, what its reports cost, what is said when it went wrong."""

from __future__ import annotations

import random
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import normwise as nw
from normwise.experiments.tune import storage
from normwise.experiments.tune.apart import apart
from normwise.experiments.tune.run import TuneRun, Watched
from normwise.experiments.tune.space import space_of
from normwise.experiments.tune.target import Target, Trial
from test_tune import alone, stepped

__all__ = ["alone"]    # the fixture
NOTHING = space_of(["adam", "max_norm"]).nothing(1.0)
BOUND = {**NOTHING, "bound": "max_norm", "max_norm radius": 1.0, "max_norm on": "weights"}


def ran(call: Callable[[Trial], Any], numbers: Any = NOTHING, steps: int = 8, watched: Watched | None = None) -> dict[str, Any]:
    target = Target(call, f"mine:{getattr(call, '__name__', 'train')}", "metric", "mine", {}, steps)
    return TuneRun("mine", numbers, 3, steps, False, 0, watched).train(target)


# ------------------------------------------------------------------------------------------------------ what counts as a run


def never_steps(trial: Trial) -> float:
    trial.attach(nn.Linear(2, 2))
    return 1.0


def never_attaches(trial: Trial) -> float:
    model = nn.Linear(2, 2)
    trial.policy(model)
    trial.optimizer(model).step()
    return 1.0


def attaches_to_another(trial: Trial) -> float:
    model = nn.Linear(2, 2)
    trial.optimizer(model).step()
    nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), trial.policy(model))
    return 1.0


def takes_off(trial: Trial) -> float:
    model = nn.Linear(2, 2)
    optimizer = trial.optimizer(model)
    control = nw.attach(model, optimizer, trial.policy(model))
    optimizer.step()
    control.remove()
    return 1.0


def test_a_run_that_never_stepped_or_never_had_its_rules_fails() -> None:
    assert ran(never_steps)["state"] == "failed" and ran(never_steps)["reason"] == "the trial's optimizer was never stepped"
    for call in (never_attaches, attaches_to_another):
        found = ran(call, BOUND)
        assert found["state"] == "failed" and "rules were never attached to its optimizer" in found["reason"]
        assert ran(call)["state"] == "done", "without rules there is nothing to attach"
    assert ran(takes_off, BOUND)["state"] == ran(stepping, BOUND)["state"] == "done"


def stepping(trial: Trial) -> float:
    stepped(trial)
    return 1.0


# ---------------------------------------------------------------------------------------------------- what one leaves behind


LEFT: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "grad": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(3)),
    "determinism": (torch.get_deterministic_debug_mode, lambda: torch.use_deterministic_algorithms(True, warn_only=True)),
    "precision": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("medium")),
    "cudnn": (
        lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        lambda: (setattr(torch.backends.cudnn, "benchmark", True), setattr(torch.backends.cudnn, "deterministic", True)),
    ),
    "checks": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "errors": (np.geterr, lambda: np.seterr(all="raise")),
    "folder": (Path.cwd, lambda: Path("there").mkdir(exist_ok=True) or __import__("os").chdir("there")),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("raises", [False, True])
def test_what_a_run_sets_does_not_reach_the_next_one(name: str, raises: bool) -> None:
    read, leave = LEFT[name]
    before = read()

    def untidy(trial: Trial) -> float:
        optimizer = stepped(trial)
        leave()
        assert read() != before
        if raises:
            raise ValueError("in the middle")
        return float(optimizer.param_groups[0]["lr"])

    assert ran(untidy)["state"] == ("failed" if raises else "done")
    assert read() == before


def test_a_default_device_that_was_set_stays() -> None:
    with torch.device("meta"), apart(0):
        pass
    torch.set_default_device("meta")
    try:
        with apart(0):
            torch.set_default_device(None)
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_runs_that_forget_a_generator_are_paired_and_take_nothing_from_others() -> None:
    def forgetful(trial: Trial) -> float:
        stepped(trial)
        return random.random() + float(np.random.rand()) + torch.rand(()).item()

    state = random.getstate(), torch.get_rng_state()
    values = [ran(forgetful)["value"] for _ in range(2)]
    assert values[0] == values[1]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


# ------------------------------------------------------------------------------------------------------- what reports cost


@pytest.fixture
def study() -> Iterator[tuple[str, optuna.Study]]:
    url = storage.url_of("reports.db")
    with storage.in_reach(url, None) as found:
        yield url, storage.study_of(found, "s", {}, ["minimize"])


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_reports_are_written_where_it_is_asked_and_at_the_end(study: tuple[str, optuna.Study], monkeypatch: pytest.MonkeyPatch) -> None:
    """And trials are given up as if each report had been: compared with Optuna's own answer to every single one."""
    url, kept = study
    drawn, states = np.random.default_rng(0).normal(size=(24, 40)), []
    asked: list[int] = []
    prune = optuna.trial.Trial.should_prune
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: asked.append(1) or prune(trial))

    other = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=10, reduction_factor=2))
    for k, values in enumerate(drawn.tolist()):
        steps = [step for step in range(1, 41) if step % (1 + k % 7) == 0]

        def reporting(trial: Trial, steps: list[int] = steps, values: list[float] = values) -> float:
            stepped(trial)
            for step in steps:
                trial.report(step, values[step - 1])
            return values[-1]

        mine, theirs = kept.ask(), other.ask()
        asked.clear()
        found = ran(reporting, steps=40, watched=Watched(url, "s", mine._trial_id, k < 5))
        states.append(found["state"])
        assert len(asked) <= 2
        given_up = None
        for step in steps:
            theirs.report(values[step - 1], step)
            if step < 40 and prune(theirs) and k >= 5:
                given_up = step
                break
        assert found["state"] == ("done" if given_up is None else "given up"), k
        written = optuna.trial.Trial(kept, mine._trial_id)._cached_frozen_trial.intermediate_values
        assert len(written) <= 4 and max(written) == (given_up or steps[-1])
        for one, trial in ((kept, mine), (other, theirs)):
            one.tell(trial, None if given_up else values[-1], optuna.trial.TrialState.PRUNED if given_up else None)
    assert {"done", "given up"} <= set(states)


def test_the_time_of_reports_is_no_part_of_a_step() -> None:
    def slowly(step: int, value: float) -> bool:
        time.sleep(0.05)
        return False

    trial = Trial(NOTHING, 0, 6, watch=slowly)
    optimizer = trial.attach(nn.Linear(2, 2))
    for step in range(6):
        optimizer.step()
        trial.report(step, 1.0)
    found = trial.step_ms()
    assert found is not None and found < 25


# --------------------------------------------------------------------------------------------- what is said of one that failed


async def later(trial: Trial) -> float:
    return 1.0


def bit_by_bit(trial: Trial) -> Any:
    yield 1.0


async def both(trial: Trial) -> Any:
    yield 1.0


class Unsure:
    def __float__(self) -> float:
        raise RuntimeError("no number")


RETURNED: list[tuple[Any, str]] = [
    (None, "train returned None: return one number"),
    ("0.5", "train returned the text '0.5': return one number"),
    (b"0.5", "train returned the text b'0.5': return one number"),
    ((0.5, 1), "train returned a tuple that is no float: return one number"),
    ({"loss": 0.5}, "train returned a dict that is no float: return one number"),
    (1j, "train returned a complex that is no float: return one number"),
    (10**400, "train returned an int that is no float: return one number"),
    (torch.ones(2, 3), "train returned a Tensor of shape (2, 3): return one number"),
    (np.ones(2), "train returned a ndarray of shape (2,): return one number"),
    (Unsure(), "train returned a Unsure that is no float: return one number"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "said"), RETURNED)
def test_a_wrong_return_value_is_named(value: Any, said: str) -> None:
    def train(trial: Trial) -> Any:
        stepped(trial)
        return value

    found = ran(train)
    assert (found["state"], found["reason"]) == ("failed", said)


@pytest.mark.filterwarnings("error")
def test_coroutines_and_generators_are_named() -> None:
    class Called:
        async def __call__(self, trial: Trial) -> float:
            return 1.0

    for call in (later, Called()):
        assert "returned a coroutine, as an async function does: return one number" in ran(call)["reason"]    # type: ignore[arg-type]
    for call in (bit_by_bit, both):
        assert "returned a generator, as a function with yield does: return one number" in ran(call)["reason"]


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor([[0.5]], requires_grad=True), True])
def test_what_is_one_number_counts(value: Any) -> None:
    def train(trial: Trial) -> Any:
        stepped(trial)
        return value

    assert ran(train)["value"] in (0.5, 1.0)


def test_a_run_that_was_given_up_may_return_nothing() -> None:
    def swallows(trial: Trial) -> None:
        stepped(trial)
        try:
            trial.report(1, float("nan"))
        except Exception:
            return

    assert ran(swallows)["reason"] == "the metric is nan at step 1"


def test_the_place_of_an_error_is_told_also_beneath_a_folder_named_normwise(tmp_path: Path) -> None:
    place = tmp_path / "my_normwise_study" / "mine.py"
    place.parent.mkdir()
    place.write_text("def helper(x):\n    raise ValueError('boom')\n\n\ndef train(trial):\n    helper(trial)\n")
    found = ran(runpy.run_path(str(place))["train"])
    assert found["reason"] == "ValueError: boom (mine.py, line 2)"

    def beyond(trial: Trial) -> None:
        trial.report(0, "high")    # type: ignore[arg-type]

    line = beyond.__code__.co_firstlineno + 1
    assert ran(beyond)["reason"].endswith(f"(test_tune_runs.py, line {line})")
