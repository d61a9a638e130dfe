"""What ``normwise tune`` says that it ran is what it ran, and every pair that it may ask for can run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.experiments.tune import space as spaces
from normwise.experiments.tune import tables
from normwise.experiments.tune.space import CHOICES, SLOTS, space_of
from normwise.experiments.tune.target import Trial

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def network(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    table = nn.Embedding(12, 64, sparse=sparse)
    layers = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    return nn.Sequential(table, *layers)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    model(torch.arange(12)).square().mean().backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def file_of(numbers: Any, trial: Trial) -> str:
    """The answer's file, had this trial won."""
    result = {"stepper": trial.stepper, "rules": trial.rules, "code": trial.code}
    answer = {"number": 0, "nothing": 0, "leader": 0, "verdict": None, **tables.candidate_of(numbers, result)}
    machine = {"cpu": "one", "cores": 1, "torch": "2", "python": "3", "date": "2026-01-01T00:00:00+00:00"}
    return tables.policy_file({"answer": answer, "protocol": {"steps": 3}, "machine": machine, "target": "mine", "finalists": []})


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_the_code_in_the_file_builds_what_ran(name: str, sparse: bool) -> None:
    """Groups, weights and a step: not at the rate that the optimizer has by itself, and for auto under a bound that takes its decay."""
    space = space_of(["adam", *dict.fromkeys(["hyperball", name]), "advised"])
    asked = [space.nothing(0.5, name) if name != spaces.ADVISED else {"optimizer": name, "lr": 0.5}]
    if name == "auto":
        asked.append({**asked[0], "bound": "hyperball", "hyperball radius": 1.0})
    for numbers in asked:
        ran, model = network(sparse), network(sparse)
        trial = Trial(numbers, 0, 3)
        made = trial.optimizer(ran)
        code = "\n".join(re.findall("^#     (.*)", file_of(numbers, trial), re.MULTILINE))
        known: dict[str, Any] = {"model": model, "torch": torch, "nw": nw}
        exec(code, known)
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in one.param_groups] for one in (made, known["optimizer"])]
        assert groups[0] == groups[1] and type(made) is type(known["optimizer"])
        assert [len(g["params"]) for g in made.param_groups] == [len(g["params"]) for g in known["optimizer"].param_groups]
        if sparse and not trial.stepper:
            continue    # only the advice says what to do about sparse gradients
        pairs = zip(stepped(ran, made), stepped(model, known["optimizer"]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_file_claims_no_lack_of_decay_and_tells_the_unit_of_the_rate() -> None:
    trial = Trial(numbers := space_of(["adam", "auto"]).nothing(1 / 3, "auto"), 0, 3)
    assert {g["weight_decay"] for g in trial.optimizer(network()).param_groups} != {0.0}
    text = file_of(numbers, trial)
    assert "no decay" not in text and "0.028 is auto as it stands" in text and '#         group["lr"] *= 0.00933 / 0.028\n' in text


def test_the_studies_of_before_are_read() -> None:
    files = sorted(RESULTS.glob("tune-*.json"))
    assert len(files) > 20
    for file in files:
        results = json.loads(file.read_text())
        assert nw.Policy.from_yaml(tables.policy_file(results)) is not None and "Optimizer: " in tables.policy_file(results)
        assert tables.summary_rows(results)


@pytest.mark.parametrize("optimizer", [name for name in CHOICES if name != spaces.ADVISED])
def test_every_rule_attaches_to_every_optimizer(optimizer: str) -> None:
    for slot, options in SLOTS.items():
        for name, option in options.items():
            numbers = {"optimizer": optimizer, "lr": 1 / 3, slot: name, f"{name} on": "weights"}
            numbers |= {f"{name} {axis}": (low * high) ** 0.5 for axis, (low, high) in option.axes.items()}
            model, trial = network(), Trial(numbers, 0, 3)
            stepped(model, trial.attach(model))
            [control] = trial.controls
            assert not control.verify().breaches, (optimizer, name)
