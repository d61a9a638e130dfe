"""A rebuild of the source tree changes no number, no state, no policy's text and no error: ``unchanged.py`` says how it is recorded.

A test's name says how it compared: ``exact``, bit for bit, on the kind of machine that made the record; ``near``, within a tolerance, on
any other; ``text``, names and words.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import unchanged
from normwise.policy import NAMED
from unchanged import RACERS, RECORDS, RULES, TEXTS, differences, found_now, machine, recorded

NARROW = ("compensated", "stochastic")
"""States of weights in bf16, which are compared bit for bit only."""


OTHER_WEIGHTS = ("race_cnn", "compare", "prune")
"""Of networks whose initial weights torch's trunc_normal_ draws, which does so in another way since 2.13."""


def how(name: str) -> str:
    """How a record is compared here."""
    return "text" if name in TEXTS else "exact" if recorded(name)[0] == machine() else "near"


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"{name}-{how(name)}", marks=pytest.mark.long if name == "sharded" else ()) for name in RECORDS]
)
def test_nothing_has_changed(name: str) -> None:
    if name in OTHER_WEIGHTS and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip(f"trunc_normal_ of torch {torch.__version__} draws other weights than that of the record")
    lines = differences(recorded(name)[1], found_now(name), name, exact=how(name) != "near")
    shown = "\n".join(lines[:40])
    meant = f"Where they are meant: python tests/unchanged.py record {name}"
    assert not lines, f"{len(lines)} differences ({how(name)}; made on {recorded(name)[0]}, here is {machine()}). {meant}\n{shown}"


# ------------------------------------------------------------------------------------------------ the comparison sees a change


@pytest.mark.parametrize("contender", [pytest.param(r, marks=() if r == "muon" else pytest.mark.long) for r in RACERS])
def test_a_race_with_a_learning_rate_a_little_off_is_seen(contender: str) -> None:
    """By 0.1%, under both comparisons; by 1% within the tolerance of what is computed in bf16."""
    was, slightly, more = (on_one_thread(partial(unchanged.race, "lstm", factor, [contender])) for factor in (1.0, 1.001, 1.01))
    more = more if contender in unchanged.RACERS_IN_BF16 else slightly
    for off, exact in ((slightly, True), (more, False)):
        assert any("/first:" in line for line in differences(was, off, "race_lstm", exact))
    assert differences(was, was, "race_lstm", True) == []


@pytest.mark.parametrize("name", [pytest.param("states", marks=pytest.mark.long), "loaded"])
def test_steps_after_a_state_with_a_learning_rate_a_little_off_are_seen(name: str) -> None:
    """In every state: by 0.1% under both comparisons, by 1% within the tolerance of bf16."""
    was = found_now(name)
    slightly, more = (on_one_thread(partial(getattr(unchanged, name), factor)) for factor in (1.001, 1.01))
    for key in was:
        assert differences(was[key], slightly[key], f"{name}/{key}", True), key
        near = differences(was[key], (more if key in unchanged.STATES_IN_BF16 else slightly)[key], f"{name}/{key}", False)
        assert near or key in NARROW, key


def test_split_models_with_a_learning_rate_a_little_off_are_seen() -> None:
    """The record holds such a run beside the others."""
    _, kept = recorded("sharded")
    was, off = kept["rows"], kept[unchanged.PLANTED]
    for key in was:
        assert differences(was[key], off[key], f"sharded/rows/{key}", True), key
        assert differences(was[key], off[key], f"sharded/rows/{key}", False) or key == "NorMuon", key


@pytest.mark.parametrize(
    "change",
    [
        {"a": [1, 1.0], "b": "x", "c": "sha256:0"}, {"a": [1]}, {"b": "y"}, {"b": None}, {"a": [1, 1.1]},
        {"a": [2, 1.0]}, {"a": [1, "1.0"]}, {"a": [1, float("nan")]}, {"a": [1, float("inf")]}, {"c": "0"}, {"d": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_counts_as_a_difference(change: dict[str, Any]) -> None:
    was: dict[str, Any] = {"a": [1, 1.0], "b": "x", "c": "sha256:0"}
    for exact in (True, False):
        assert bool(differences(was, was | change, "", exact)) == (was | change != was)
    assert differences(was, {"a": [1, 1.0], "b": "x"}, "", False) == ["/c: is gone"]


def test_bits_count_only_where_the_comparison_is_exact() -> None:
    was = {"weights": "sha256:0", "loss": 1.0, "nothing": float("nan")}
    now = {"weights": "sha256:1", "loss": 1.0 + 1e-15, "nothing": float("nan")}
    assert differences(was, now, "", False) == []
    assert len(differences(was, now, "", True)) == 2


def test_a_tensors_bits_type_shape_and_places_are_told() -> None:
    t = torch.tensor([1.0, -2.0, 3.0])
    others = [t.double(), t[None], torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, -2.0, 1.0]), t * (1 + 1e-2)]
    for other in others:
        assert differences(unchanged.told(t), unchanged.told(other), "", False), other
    assert differences(unchanged.told(t), unchanged.told(t.nextafter(t + 1)), "", True)


# ------------------------------------------------------------------------------------------------------------- what is covered


def test_every_named_rule_is_recorded() -> None:
    assert set(RULES) == set(NAMED)


def test_every_error_is_one() -> None:
    assert [name for name, text in found_now("errors").items() if ": " not in text] == []
    assert len(unchanged.ERRORS) >= 25


def test_every_placement_and_an_uneven_one_is_recorded() -> None:
    rows = [p.shape[0] for name, p in unchanged.Wide().named_parameters() if name.endswith("weight")]
    assert {n % unchanged.WORLD > 0 for n in rows} == {True, False} and min(rows) < unchanged.WORLD
    assert set(recorded("sharded")[1]) == {*unchanged.WHERE, unchanged.PLANTED}


@pytest.mark.long
def test_importing_normwise_costs_little_beside_torch(tmp_path: Path) -> None:
    """A tenth of torch's own time at most (0.1 s where that takes one), the median of seven processes, once all is compiled."""
    code = (
        "import time; start = time.process_time(); import torch; torchs = time.process_time() - start; import normwise; "
        "print((time.process_time() - start - torchs) / torchs)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment) for _ in range(8)]
    shares = [float(run.stdout) for run in runs[1:]]
    assert statistics.median(shares) <= 0.1, shares


def on_one_thread(make: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make()
    finally:
        torch.set_num_threads(before)
