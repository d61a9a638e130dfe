"""``normwise prune``: what it chooses, what it counts, that it resumes where it stopped, and that its networks are what it says."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import normwise as nw
from normwise import cli
from normwise.errors import StudyError
from normwise.experiments.prune import run as prune_run
from normwise.experiments.prune import step_cost
from normwise.experiments.prune import study as prune
from normwise.experiments.prune.run import PruneRun as Run
from normwise.experiments.prune.run import example, execute, rules, size_of
from normwise.experiments.prune.study import Budget, chosen
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.models.cnn import CNN
from normwise.experiments.tasks.models.resnet import ResNet
from normwise.experiments.tasks.task import Task
from normwise.prune import cut, targets

TINY = Budget(steps=40, fine_tuning=4, rounds=2, size="tiny")


@pytest.fixture(scope="module")
def cnn() -> Task:
    return load_task("cnn", size="tiny")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prune.BUDGETS, "quick", {"cnn": TINY, "resnet": TINY})
    monkeypatch.setattr(prune, "RATES", (0.03, 0.1))
    monkeypatch.setattr(prune, "_WIDENINGS", 0)
    monkeypatch.setattr(prune, "STRENGTHS", {"cnn": (1e-3, 1e-2), "resnet": (1e-3, 1e-2)})


def trial(validation: float, parameters: int) -> dict[str, Any]:
    return {"fine_tuned": {"validation": validation, "validation_loss": 0.1}, "parameters": parameters}


def test_the_choice_is_the_smallest_network_within_a_point_of_the_full_one():
    full = trial(0.950, 1000)
    tried = {1e-3: trial(0.951, 900), 1e-2: trial(0.941, 300), 2e-2: trial(0.939, 200), 1e-1: {"failed": "all gone"}}
    assert chosen(tried, full) == 1e-2
    assert chosen({1e-2: trial(0.90, 300), 2e-2: trial(0.92, 500)}, full) == 2e-2, "the best where none is good enough"
    assert chosen({1e-3: trial(0.95, 1000), 1e-4: trial(0.95, 1000)}, full) == 1e-4, "the weaker of two that remove the same"
    with pytest.raises(StudyError, match="failed at every strength: all gone"):
        chosen({1e-1: {"failed": "all gone"}}, full)


def test_sizes_as_counted_by_hand():
    """8×8 images: conv 3 gives 6×6, pooled 3×3, conv 2 gives 2×2, pooled 1×1."""
    found = size_of(CNN((1, 8, 8), 10, (4, 8)), torch.zeros(2, 1, 8, 8))
    assert found == {"parameters": (4 * 9 + 4) + (8 * 16 + 8) + (80 + 10), "multiplications": 36 * 36 + 4 * 128 + 80}


def test_the_lasso_falls_on_rows_and_behind_a_batch_norm_on_gains_and_shifts():
    plain = CNN((1, 8, 8), 10, (4, 8))
    assert targets(plain, torch.zeros(1, 1, 8, 8)) == {"conv1.weight": 9, "conv2.weight": 16}
    strengths = {rule.params: rule.strength for rule in rules(plain, torch.zeros(1, 1, 8, 8), 0.1)}
    assert strengths == {("conv1.weight",): pytest.approx(0.3), ("conv2.weight",): pytest.approx(0.4)}
    found = targets(ResNet(3, 10, (4, 8), depth=1), torch.zeros(1, 3, 8, 8))
    norms = {f"blocks.{block}.norm{norm}.{kind}": 1 for block in (0, 1) for norm in (1, 2) for kind in ("weight", "bias")}
    assert found == {"stem.weight": 27, "blocks.1.shortcut.weight": 4} | norms, "no filter behind a BatchNorm, not the head"


def test_a_run_shrinks_to_the_network_whose_units_it_names():
    """The strength lies where some units go and some stay; the counts are those of the same cut from fresh weights."""
    cnn = load_task("cnn")
    found = execute(Run(cnn.key, 300, 2, 0.1, 0.01, seed=0, full=True), cnn)
    assert found["trained"]["test"] > 0.9
    assert found["removed"] and found["difference"] < 1e-6
    assert found["before"]["test"] == found["trained"]["test"], "shrinking changes no prediction"
    torch.manual_seed(1)
    smaller = cut(cnn.build(), example(cnn), found["removed"])
    assert sum(p.numel() for p in smaller.parameters()) == found["parameters"] < 9226
    fresh = execute(Run(cnn.key, 3, 2, 0.1, 0.0, seed=0, full=True, units=found["removed"]), cnn)
    assert fresh["parameters"] == found["parameters"] and fresh["multiplications"] == found["multiplications"]


def test_held_norms_keep_a_layer_alive_under_a_lasso_that_takes_all_of_it():
    """One step of the rules on gains of 1 and 0.5 with nothing to learn: soft threshold, then back to the norm, as written out."""
    model, given = ResNet(3, 10, (4, 8), depth=1), torch.zeros(1, 3, 8, 8)
    gains = model.blocks[0].norm1.weight
    with torch.no_grad():
        model.blocks[1].norm1.weight.mul_(2.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nw.attach(model, optimizer, rules(model, given, 3.0, hold=True))
    with torch.no_grad():
        gains[:2] = 0.25    # less than the threshold of 0.3
        gains[2:] = torch.tensor([1.0, 2.0])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    cut_off = torch.tensor([0.0, 0.0, 0.7, 1.7])
    torch.testing.assert_close(gains.detach(), cut_off * (2.0 / cut_off.norm()))    # 2: the norm of four ones
    torch.testing.assert_close(model.blocks[1].norm1.weight.norm(), torch.tensor(2.0 * 8**0.5))
    for _ in range(200):
        optimizer.step()
    assert (gains != 0).sum() == 1 and gains.detach().norm() == pytest.approx(2.0)


def test_runs_without_held_norms_have_the_keys_that_they_always_had(cnn: Task):
    plain, held = (Run(cnn.key, 3, 2, 0.1, 0.01, 0, True, hold=hold).settings() for hold in (False, True))
    assert "hold" not in plain and held == plain | {"hold": True}


def test_a_run_is_decided_by_its_settings(cnn: Task):
    run = Run(cnn.key, 20, 5, 0.1, 0.001, seed=3, full=True)
    first, again = execute(run, cnn), execute(run, cnn)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(("lr", "strength", "why"), [(1e30, 0.0, "not finite"), (0.1, 1e3, "every unit")])
def test_a_run_that_fails_says_so(cnn: Task, lr: float, strength: float, why: str):
    assert why in execute(Run(cnn.key, 40, 2, lr, strength, seed=0, full=False), cnn)["failed"]


@pytest.mark.parametrize("task", ["cnn", *(pytest.param(task, marks=pytest.mark.long) for task in ("resnet --hold", "resnet"))])
def test_the_command_writes_results_and_goes_on_where_it_was(
    task: str, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "results.json"
    command = ["prune", *task.split(), "--budget", "quick", "--seeds", "2", "--workers", "1", "--json", str(file)]
    assert cli.main(command) == 0
    first, table = json.loads(file.read_text()), capsys.readouterr().out
    assert "smaller / full" in table and str(file) in table
    assert [seed["seed"] for seed in first["seeds"]] == [0, 1] and len(first["strengths"]) == 4 and len(first["rates"]) == 2
    assert len(first["timing"]["smaller"]) == 2 and first["timing"]["full"]["step_ms"] > 0
    assert first["summary"]["difference"] < 1e-6
    monkeypatch.setattr(prune_run, "execute", lambda *given: pytest.fail("a finished run was done again"))
    monkeypatch.setattr(step_cost, "measure", lambda *given: pytest.fail("times were measured again"))
    assert cli.main(command) == 0
    again = json.loads(file.read_text())
    assert {**first, "machine": 0} == {**again, "machine": 0}


def test_a_rate_at_the_end_of_the_grid_widens_it(tiny: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prune, "_WIDENINGS", 2)
    score = {0.03: 0.5, 0.1: 0.7, 0.3: 0.9, 1.0: 0.8}
    plan, asked = prune.tuned(prune.maker(load_task("cnn", size="tiny"), TINY, False), "cnn"), []
    results = None
    with suppress(StopIteration):
        while True:
            runs = plan.send(results)    # type: ignore[arg-type]
            asked += [run.lr for run in runs if not run.strength]
            results = [trial(score[round(run.lr, 1) if run.lr > 0.05 else 0.03], 1) for run in runs]
    assert sorted(asked) == pytest.approx([0.03, 0.1, 0.1 * 10**0.5, 1.0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("lstm", "Task 'lstm' cannot be pruned. Allowed: cnn, resnet."), ("cnn --budget quik", "Did you mean 'quick'?"),
     ("cnn --data /no/such", "found nothing"), ("cnn --seeds 0", "whole number")],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["prune", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
