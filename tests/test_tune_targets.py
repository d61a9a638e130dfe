"""Targets and storages that misbehave: each is one sentence, costs nothing that was done, and gives no wrong answer."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw
from normwise import cli
from normwise.errors import StudyError
from normwise.experiments.tune import space as spaces
from normwise.experiments.tune import storage, tables, verdict
from normwise.experiments.tune.space import space_of
from normwise.experiments.tune.study import Budget, TuneOptions
from normwise.experiments.tune.target import Trial
from test_tune import FEW, alone, counselled, noise, sentence, stepped, tuned

__all__ = ["alone", "counselled", "noise"]    # the fixture, and targets


QUICK = ["--steps", "8", "--trials", "5", "--seeds", "6", "--only", "adam,max_norm", "--workers", "1"]


def ask(target: str, **more: Any) -> TuneOptions:
    return TuneOptions(f"test_tune_targets:{target}", only=FEW, steps=8, **more)


def heedless(trial: Trial) -> float:
    return float(trial.seed)


def ruleless(trial: Trial) -> float:
    return float(trial.optimizer(nn.Linear(2, 2)).param_groups[0]["lr"])


def falls(trial: Trial) -> float:
    """Takes its worker along where it has a bound, and tells how often."""
    model = nn.Linear(2, 2)
    if trial.policy(model).rules:
        with open("fallen.txt", "a") as file:
            file.write("x")
        os._exit(9)
    trial.optimizer(model).step()
    return 1.0 + 0.1 * trial.numbers["lr"] + 1e-3 * trial.seed


def leaves(trial: Trial) -> float:
    sys.exit(3)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def unspeakable(trial: Trial) -> float:
    raise Unspeakable


def wordier(trial: Trial) -> float:
    nn.Linear(2, 2).load_state_dict({"a": torch.zeros(1)})
    return 0.0


def takes_away(trial: Trial) -> float:
    model = nn.Linear(2, 2)
    rate = stepped(trial, model).param_groups[0]["lr"]
    model.to("meta")
    return float(rate)


def enormous(trial: Trial) -> float:
    return 1e101 * (1 + noise(trial))


def far_off(trial: Trial) -> float:
    trial.attach(nn.Linear(2, 2))
    trial.report(2**70, 1.0)
    return 1.0


async def later(trial: Trial) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("test_tune_targets:heedless", "never asked the trial for its optimizer (trial.attach, or trial.optimizer) and for its rules"),
        ("test_tune_targets:ruleless", "the target never asked the trial for its rules (trial.attach, or trial.policy)"),
        ("test_tune_targets:leaves", "failed in its first trial (SystemExit: 3 (test_tune_targets.py, line"),
        ("test_tune_targets:unspeakable", "failed in its first trial (Unspeakable: without a text (test_tune_targets.py, line"),
        ("test_tune_targets:wordier", "failed in its first trial (RuntimeError: Error(s) in loading state_dict for Linear: Missing key(s)"),
        ("test_tune_targets:takes_away", "the model cannot be looked at after the run"),
        ("test_tune_targets:enormous", "beyond 1e+100"),
        ("test_tune_targets:far_off", "report was given step 1180591620717411303424"),
        ("test_tune_targets:later", "is an async function"),
        ("tabular --tiny --maximize", "maximize is for functions of yours"),
        ("test_tune_targets:noise --seed 400001", "seed is 400001, but must be a whole number from 0 to 400000"),
        ("test_tune_targets:noise --name a?b", "cannot be a file's"),
        ("test_tune_targets:noise --name a/b", "cannot be a file's"),
        ("test_tune_targets:noise --lr 1e-3,1e308", "must go from a number above 0 to a larger one"),
        ("test_tune_targets:noise --storage sqlite:///:memory:", "a database in memory"),
        ("test_tune_targets:noise --storage p.db --policy p.db", "the policy and the finished runs cannot be written to one place"),
        ("test_tune_targets:noise --json p.yaml", "the policy and the results cannot be written to one place"),
        ("test_tune_targets:noise --storage postgresql+psycopg://127.0.0.1:1/x?user=me&password=secret", "psycopg://127.0.0.1:1/x cannot"),
        ("test_tune_targets:noise --storage postgresql+psycopg://me:very@secret@127.0.0.1:1/x", "the storage postgresql+psycopg://..."),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = sentence(capsys, *arguments.split(), *("--steps", "8"))
    assert said in found and "secret" not in found


broken: list[bool] = []


def mended(trial: Trial) -> float:
    """Best at the middle rate under plain Adam, by far; once broken it raises."""
    if broken:
        raise ValueError("a typo")
    stepped(trial)
    return 1 + math.log(3 * trial.numbers["lr"]) ** 2 + 1e-3 * trial.seed % 7 + (trial.numbers["optimizer"] != "adam")


def test_a_target_that_was_mended_has_all_its_first_trials() -> None:
    """As a study of one that never failed: nothing's middle rate, whose trial failed, is tried again."""
    broken.append(True)
    with pytest.raises(StudyError, match=r"failed in its first trial \(ValueError: a typo .*mend it"):
        tuned(ask("mended", name="one"))
    broken.clear()
    again, sound = tuned(ask("mended", name="one")), tuned(ask("mended", name="other"))
    rates = [sorted(t["lr"] for t in found["trials"] if t["label"] == "adam" and t["state"] == "done") for found in (again, sound)]
    assert set(rates[0]) >= {spaces.rate(one) for one in space_of(FEW).first()}
    assert again["answer"]["nothing"] >= 0 and [f["lr"] for f in again["finalists"] if f["nothing"]] == [
        f["lr"] for f in sound["finalists"] if f["nothing"]
    ]  # fmt: skip


def lives_under_rules(trial: Trial) -> float:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stepped(trial, model)
    return 1.0 + trial.numbers["lr"] if trial.policy(model).rules else math.nan


def test_a_training_that_lives_only_under_rules_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STARTUP", 10)
    results = tuned(ask("lives_under_rules"))
    done = [t for t in results["trials"] if t["state"] == "done"]
    assert done and results["answer"]["nothing"] == -1
    said = r"no answer, since adam without rules failed at every rate; of what trained, \S+ \+ .* was best"
    assert re.search(said, tables.headline(results))


def ties_but_for_rounding(trial: Trial) -> float:
    model = nn.Linear(2, 2)
    stepped(trial, model)
    slow = max(0.0, trial.numbers["lr"] - 0.4)
    return 1.0 + 0.1 * (trial.seed % 7) + slow - (4e-16 if trial.policy(model).rules else 0.0)


def test_a_tie_up_to_rounding_is_no_gain() -> None:
    results = tuned(ask("ties_but_for_rounding"))
    assert results["answer"]["number"] == results["answer"]["nothing"] and "no significant gain" in tables.headline(results)
    equal = verdict.judged([1.0 - 4e-16] * 6, [1.0] * 6, False)
    assert equal.gains == [0.0] * 6 and not equal.significant


def wanders(trial: Trial) -> float:
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere")
    return noise(trial)


def test_a_target_that_goes_elsewhere_takes_nothing_along(tmp_path: Path) -> None:
    here = Path.cwd()
    assert cli.main(["tune", "test_tune_targets:wanders", *QUICK, "--name", "w", "--json", "w.json"]) == 0
    assert Path.cwd() == here and {"w.json", "w.db", "w.yaml"} <= {p.name for p in here.iterdir()}
    assert list((here / "elsewhere").iterdir()) == []


def test_advice_outside_of_the_range_of_rates_is_not_judged_as_it_stands() -> None:
    inside = tuned(TuneOptions("test_tune_targets:counselled", only=(*FEW, "advised"), steps=8, name="inside"))
    outside = tuned(TuneOptions("test_tune_targets:counselled", only=(*FEW, "advised"), steps=8, name="outside", lr=(1e-4, 1e-3)))
    assert inside["advice"] is not None and outside["advice"] is None and tables.advice(outside) == ""


def two_models(trial: Trial) -> float:
    generator, critic = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [trial.attach(model) for model in (generator, critic)]
    for _ in range(4):
        for model, optimizer in zip((generator, critic), optimizers, strict=True):
            model(torch.ones(1, len(model[0].weight))).sum().backward()
            optimizer.step()
    assert len(trial.controls) == 2 * bool(trial.policy(critic).rules)
    return float(trial.numbers["lr"])


def test_each_of_two_models_has_its_optimizer_and_its_rules() -> None:
    results = tuned(ask("two_models"))
    ended = [t for t in results["trials"] if t["state"] == "done"]
    assert {t["size"] for t in ended} == {2 * 12 + 2 * 6} and all(t["step_ms"] is not None for t in ended)
    assert any("max_norm" in t["label"] for t in ended) and not [t for t in results["trials"] if t["state"] == "failed"]


def test_a_database_of_something_else_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect("app.db")) as database:
        database.executescript("create table trials (of_patients int); create table alembic_version (version_num text)")
    before = Path("app.db").read_bytes()
    said = sentence(capsys, "test_tune_targets:noise", "--steps", "8", "--storage", "app.db")
    assert "a database of something else" in said and Path("app.db").read_bytes() == before


def test_two_commands_that_begin_at_once_share_the_first_candidates() -> None:
    """On an empty database, whose tables both would make, and whose first trials both would put in."""
    shared = ["--storage", f"sqlite:///{Path.cwd()}/shared.db", "--name", "both"]
    command = [sys.executable, "-m", "normwise", "tune", "test_tune_targets:noise", *QUICK, "--trials", "8", *shared]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    both = [
        subprocess.Popen([*command, "--policy", f"{k}.yaml", "--json", f"{k}.json"], env=around,
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for k in range(2)
    ]  # fmt: skip
    ends = [(one.communicate(timeout=240)[1], one.returncode) for one in both]
    assert [code for _, code in ends] == [0, 0], ends
    results = [json.loads(Path(f"{k}.json").read_text()) for k in range(2)]
    assert results[0]["answer"] == results[1]["answer"]
    firsts = [t["numbers"]["lr"] for t in results[0]["trials"][:5]]
    assert len({round(rate, 6) for rate in firsts}) == 5, firsts
    assert any("max_norm" in t["label"] for t in results[0]["trials"])


@pytest.mark.long
def test_a_trial_that_takes_its_worker_along_does_not_block_the_study(capfd: pytest.CaptureFixture[str]) -> None:
    """After three times it counts as failed, and the study goes on."""
    options = replace(ask("falls"), workers=2)
    for _ in range(40):
        try:
            results = tuned(options, Budget(trials=6, scale=1.0, choosing=1, judging=6))
        except StudyError as error:
            assert "worker process was killed" in str(error)
        else:
            break
    else:
        raise AssertionError("the study never ended")
    lost = [t for t in results["trials"] if t["state"] == "failed"]
    assert lost and all("worker process was killed" in t["reason"] for t in lost)
    assert len(Path("fallen.txt").read_text()) <= 2 * 3 * len(lost)    # two are under way at a time


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def test_of_several_models_each_one_s_advice_is_told() -> None:
    space = space_of(["adam", "advised"])
    trial = Trial(space.first()[-1], 0, 3)
    for model in (Generator(), Discriminator()):
        trial.attach(model)
    assert trial.stepper.startswith("Generator: nw.optim.auto(model); Discriminator: nw.optim.AdamW(model")
    bounded = Trial(space.first()[0], 0, 3)
    one, other = Generator(), Discriminator()
    for model in (one, other):
        bounded.policies.append((type(model).__name__, nw.Policy([nw.max_norm(2.0, params=[f"layers.{3 * (model is one)}.weight"])])))
    assert re.findall("^# (.*)", bounded.rules, re.MULTILINE) == ["Generator", "Discriminator"]
    assert len(nw.Policy.from_yaml(bounded.rules)) == 2


def test_the_advised_optimizer_takes_sparse_tables_as_the_advice_says() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = Trial(space_of(["adam", "advised"]).first()[-1], 0, 3).attach(model)
    model(torch.arange(5)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("more", "says"), [
    (["--tiny"], "--tiny is for built-in tasks"), (["--name", "a/b"], "cannot be a file's"),
])  # fmt: skip
def test_what_means_nothing_for_a_function_is_refused_and_leaves_nothing(more: list[str], says: str, capfd: Any) -> None:
    before = sorted(Path().iterdir())
    assert cli.main(["tune", "test_tune_targets:ruleless", *QUICK, *more]) == 2
    assert says in capfd.readouterr().err and sorted(Path().iterdir()) == before


def test_a_busy_file_names_the_option_that_tune_has(capfd: pytest.CaptureFixture[str]) -> None:
    from normwise.experiments.framework.lock import locked

    with locked(Path("busy.db")):
        assert cli.main(["tune", "test_tune_targets:heedless", *QUICK, "--storage", "busy.db"]) == 2
    assert "give another --storage" in capfd.readouterr().err


WRITTEN = """
from torch import nn

def train(trial):
    model = nn.Linear(2, 2)
    trial.attach(model).step()
    return {value}
"""


def test_an_edited_function_gets_no_answer_of_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in one sentence, also where it goes on after an interruption; under another name it is a study of its own."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    options = TuneOptions("edited_target:train", only=FEW, steps=8)

    def written(value: str) -> None:
        Path("edited_target.py").write_text(WRITTEN.format(value=value))
        sys.modules.pop("edited_target", None)
        importlib.invalidate_caches()
        shutil.rmtree("__pycache__", ignore_errors=True)

    written("1 / 0")
    with pytest.raises(StudyError, match="ZeroDivisionError"):
        tuned(options)
    written("3 + trial.numbers['lr']    # mended, as the sentence asks for")
    mended = tuned(options)
    assert mended["answer"]["nothing"] >= 0
    assert tuned(options)["answer"] == mended["answer"]
    written("-3 + trial.numbers['lr']")
    with pytest.raises(StudyError, match=r"file of edited_target:train has changed since the study .* give another --name or --storage"):
        tuned(options)
    assert tuned(replace(options, name="anew"))["trials"][0]["value"] < 0


def test_a_study_from_before_hashes_goes_on() -> None:
    import optuna

    options = ask("noise", name="old")
    tuned(options)
    study = optuna.load_study(study_name="old", storage="sqlite:///old.db")
    assert len(study.user_attrs["source"]) == 64
    with closing(sqlite3.connect("old.db")) as database:
        database.execute("delete from study_user_attributes where key = 'source'")
        database.commit()
    tuned(options)
    attributes = optuna.load_study(study_name="old", storage="sqlite:///old.db").user_attrs
    assert "asked" in attributes and "source" not in attributes
