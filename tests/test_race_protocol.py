"""Protocol 2 of the race: its contenders against their optimizers written out, its seeds and trials, and whole races on every task."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normwise import cli
from normwise.errors import StudyError
from normwise.experiments.catalog.contenders import CONTENDERS, EVERYBODY, SCHEDULES
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.progress import Lines
from normwise.experiments.framework.study import TUNING_SEED, Options
from normwise.experiments.race import protocol, study, tables
from normwise.experiments.race.protocol import PROTOCOL, PROTOCOLS
from normwise.experiments.race.run import Lane, RaceRun, lane, train
from normwise.experiments.race.study import race, replay
from normwise.experiments.tasks.load import TASKS, load_task
from normwise.experiments.tasks.task import HELD_OUT, Task
from normwise.optim.schedule import Rate

MICRO = protocol.Budget(trials=1, seeds=1, doublings=0, scale=0.01, contenders=("schedulefree", "torch_muon", "auto"), rounds=1)
NOW = PROTOCOLS[PROTOCOL]


@pytest.fixture(autouse=True)
def one() -> Any:
    with one_thread():
        yield


def run_of(name: str, task: Task, steps: int, **changed: Any) -> RaceRun:
    numbers = CONTENDERS[name].middle | changed
    return RaceRun(task.key, name, tuple(numbers.items()), steps * task.batch, 0, False, 2, "v")


def three_steps(going: Lane) -> list[nn.Parameter]:
    for _ in range(3):
        going.step()
    return list(going.model.parameters())


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_moves_every_parameter(name: str) -> None:
    task = load_task("decoder", size="tiny")
    torch.manual_seed(0)
    before = list(task.build().parameters())
    after = three_steps(lane(run_of(name, task, 20), task, 20))
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(after, before, strict=True))


def groups(model: nn.Module, names: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if names(n, p)]


def by_role(model: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """Of the LSTM task, by its names."""
    table = lambda n, p: n in ("tokens.weight", "head.weight")  # noqa: E731
    return [
        {"params": groups(model, lambda n, p: p.ndim > 1 and not table(n, p)), "lr": lr, "weight_decay": decay},
        {"params": groups(model, table), "lr": 3 * lr, "weight_decay": decay},
        {"params": groups(model, lambda n, p: p.ndim == 1), "lr": 0.333 * lr, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("name", ["adamw", "adamw ahead", "torch_muon"])
def test_a_baseline_is_torchs_own_with_rates_by_role(name: str) -> None:
    task = load_task("lstm", size="tiny")
    torch.manual_seed(0)
    model = task.build()
    if name == "torch_muon":
        changed: dict[str, Any] = {"momentum": 0.9}
        gates = groups(model, lambda n, p: "lstm.weight" in n)
        rest = [{"params": groups(model, lambda n, p: p.ndim > 1 and "lstm" not in n), "weight_decay": 0.1},
                {"params": groups(model, lambda n, p: p.ndim == 1), "weight_decay": 0.0}]  # fmt: skip
        wanted: list[torch.optim.Optimizer] = [
            torch.optim.Muon(gates, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=0.004, betas=(0.9, 0.99), fused=True),
        ]
    else:
        changed = {"tables": 3.0, "vectors": 0.333, "decay": 0.1, "beta1": 0.8, "beta2": 0.99, "nesterov": float("ahead" in name)}
        of = by_role(model, 3e-3, 0.1)
        wanted = [torch.optim.NAdam(of, betas=(0.8, 0.99), decoupled_weight_decay=True) if "ahead" in name
                  else torch.optim.AdamW(of, betas=(0.8, 0.99), fused=True)]  # fmt: skip
    going = lane(run_of(name.split()[0], task, 20, **changed), task, 20)
    after = three_steps(going)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in wanted]
    batches = task.batches(task.batch, 0)
    for step in range(3):
        model.zero_grad()
        task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        for optimizer, rates in zip(wanted, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * Rate(20, "linear")(step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters(), strict=True))


def test_schedule_free_is_scored_at_its_average_with_statistics_of_it() -> None:
    """Without weighting the average x is the mean of the iterates z; BatchNorm's means are those of fifty batches at x."""
    task = load_task("resnet", size="tiny")
    going = lane(run_of("schedulefree", task, 10), task, 10)
    for _ in range(4):
        going.step()
    [optimizer] = going.optimizers
    at_gradients = [p.detach().clone() for p in going.model.parameters()]
    before = {name: b.clone() for name, b in going.model.named_buffers() if "running_mean" in name}
    going.settle()
    for group in optimizer.param_groups:
        for p in group["params"]:
            y = next(old for old, new in zip(at_gradients, going.model.parameters(), strict=True) if new is p)
            z, beta = optimizer.state[p]["z"], group["betas"][0]
            torch.testing.assert_close(p.detach(), (y - (1 - beta) * z) / beta, rtol=1e-4, atol=1e-6)
    assert all(not torch.equal(b, before[name]) for name, b in going.model.named_buffers() if name in before)
    assert {int(b) for name, b in going.model.named_buffers() if "num_batches" in name} == {50}
    assert math.isfinite(train(run_of("schedulefree", task, 6), task)["loss"])


@pytest.mark.parametrize("family", SCHEDULES)
def test_schedules_are_their_formulas_in_the_order_of_how_long_the_rate_stays_high(family: str) -> None:
    shapes = {
        "sqrt": lambda t: 1 - t**0.5, "linear": lambda t: 1 - t, "concave": lambda t: 1 - t * t, "hold": lambda t: min(1.0, 2 * (1 - t)),
        "cooldown": lambda t: 1.0 if t < 0.8 else 1 - ((t - 0.8) / 0.2) ** 0.5,
    }  # fmt: skip
    steps = 4000
    for step in range(200, steps, 97):
        t = (step - 200) / (steps - 200) if family in ("sqrt", "linear", "concave") else step / steps
        assert Rate(steps, family)(step) == pytest.approx(shapes[family](t), abs=2e-3)
    means = [sum(Rate(steps, one)(step) for step in range(steps)) for one in SCHEDULES]
    assert means == sorted(means) and Rate(steps, family)(steps) == pytest.approx(0.0, abs=1e-9)
    assert Rate(steps, "flat")(3999) == 1.0 and Rate(steps, "flat")(99) == 0.5


def test_nobody_has_more_trials_than_adamw_and_the_reported_seeds_are_fresh() -> None:
    for budget in NOW.budgets.values():
        trials = {name: NOW.trials(name, budget) for name in CONTENDERS}
        assert trials["adamw"] == max(trials.values()) == 1.5 * trials["muon"] and len({*trials.values()}) == 2
        reported = range(NOW.first_seed, NOW.first_seed + 1000)
        assert not {*range(1000), *range(TUNING_SEED, 4000)} & {*reported}
    tuned = [c for n, c in CONTENDERS.items() if len(c.axes) > 5 and n not in ("schedulefree", "ridge_small")]
    assert tuned and all(c.common == EVERYBODY for c in tuned)
    beta1 = next(axis for axis in CONTENDERS["adamw"].own if axis.name == "beta1")
    assert (min(beta1.values), max(beta1.values)) == (0.7, 0.95)


def test_what_cannot_race_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(protocol.BUDGETS_2, "quick", MICRO)
    stream, state = io.StringIO(), tmp_path / "runs.jsonl"
    results = race(Options("plain", budget="quick", size="tiny", state=state), Lines(stream))
    assert list(results["left_out"]) == ["torch_muon"] and "torch.optim.Muon takes tensors of two dimensions" in stream.getvalue()
    assert "plain is held out: whoever looks at its result has finished choosing" in stream.getvalue()
    assert {line["name"] for line in results["contenders"]} == {"adamw", "sgd", "schedulefree", "auto"} and not results["unfinished"]
    assert json.loads(json.dumps(replay(state))) == json.loads(json.dumps(results))
    runs = [json.loads(line)["settings"] for line in state.read_text().splitlines() if line]
    assert {run["seed"] for run in runs if run.get("full")} == {10_000} and {run["protocol"] for run in runs if "protocol" in run} == {2}
    with pytest.raises(StudyError, match="torch_muon cannot race here: torch"):
        race(Options("plain", budget="quick", size="tiny", only=["torch_muon"]))
    monkeypatch.setattr("normwise.experiments.catalog.contenders.find_spec", lambda name: None)
    with pytest.raises(StudyError, match="schedulefree cannot race here: the package schedulefree is not installed"):
        race(Options("plain", budget="quick", size="tiny", only=["schedulefree"]))


def test_contenders_are_told_apart_in_pairs_of_seeds() -> None:
    """Each seed a rung sooner is a difference, though the intervals of the two medians overlap; two that missed alike are none."""
    slow = {"shares": [0.4, 0.5, 0.6, 0.7, 0.8]}
    fast = {"shares": [0.87 * share for share in slow["shares"]]}
    assert tables.differ_in_pairs(fast, slow) and tables.differ_in_pairs(slow, fast)
    missed: dict[str, Any] = {"shares": [0.4, None, None, None, 0.5]}
    assert not tables.differ_in_pairs(slow, slow) and not tables.differ_in_pairs(missed, missed)
    assert not tables.differ_in_pairs(slow, {"shares": [0.8, 0.7, 0.6, 0.5, 0.4]})


@pytest.mark.long
@pytest.mark.parametrize("task", sorted(TASKS))
def test_quick_races_every_task_from_end_to_end(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: Any) -> None:
    out = tmp_path / "race.json"
    assert cli.main(["race", task, "--tiny", "--budget", "quick", "--workers", "1", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["unfinished"] == [] and {line["name"] for line in results["contenders"]} == {"adamw", "sgd", "muon", "auto"}
    assert results["protocol"]["number"] == 2 and "the target is a validation" in capsys.readouterr().out


def told(shares: dict[str, float | None], **more: Any) -> dict[str, Any]:
    """A race's results as the tables of all tasks read them; who has a share of 1 and no trials beside it sets the target."""
    lines = [
        {"name": name, "label": name.upper(), "baseline": name == "adamw", "sets_target": name == "adamw", "share": share,
         "seconds_share": share and 2 * share, "tuned": {"trials": 1 if "untuned" in name or name == "auto" else 16}}
        for name, share in shares.items()
    ]  # fmt: skip
    return {"contenders": lines, "unfinished": [], **more}


def test_a_hit_counts_by_task_and_a_mean_needs_all_of_them() -> None:
    found = {
        "cnn": told({"adamw": 1.0, "auto": 0.5, "muon": 0.25, "adamw_untuned": None}),
        "plain": told({"adamw": 1.0, "auto": 0.2, "muon": 1.0, "adamw_untuned": 1.0}),
        "gpt": told({"adamw": 1.0, "auto": 0.25, "adamw_untuned": None}, unfinished=["muon"]),
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.hits(found).splitlines()]
    assert rows[0][1:] == ["trials", "all", "development", "held out"]
    assert rows[2:] == [
        ["AUTO", "1", "3 of 3: 0.29 / 0.58", "2 of 2: 0.35 / 0.71", "1 of 1: 0.20 / 0.40"],    # (0.5 · 0.2 · 0.25)^(1/3)
        ["ADAMW_UNTUNED", "1", "1 of 3", "0 of 2", "1 of 1: 1.00 / 2.00"],
        ["MUON", "16", "2 of 2: 0.50 / 1.00", "1 of 1: 0.25 / 0.50", "1 of 1: 1.00 / 2.00"],
    ]
    every = tables.by_task(found)
    assert "| `plain` (held out) | 0.20 / 0.40 | 1.00 / 2.00 | 1.00 / 2.00 | 1.00 / 2.00 |" in every
    assert every.splitlines()[5] == "| hits | 3 of 3 | 1 of 3 | 3 of 3 | 2 of 2 |"    # AdamW sets the target; Muon is not raced everywhere
    assert "MUON" in every and "MUON" not in tables.front(found, everywhere=True)
    assert "gpt (muon)" in every and "resnet_gn (no runs)" in every and "cnn (" not in every
    assert set(tables.TWELVE[6:]) == HELD_OUT and set(tables.TWELVE) == set(TASKS)
    assert tables.hits({}) == "No task is raced yet."


def test_what_tuning_cost_is_told_in_adamws_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice AdamW's time a step, half of its horizon, two trials where it has three: two thirds. At 9 times: 3, so the first trial."""
    more = protocol.Budget(trials=2, seeds=1, doublings=0, scale=0.01, contenders=("muon",), rounds=1)
    monkeypatch.setitem(NOW.budgets, "quick", more)
    for pace, cost in ((2.0, 2 / 3), (9.0, 3.0)):
        times = {"adamw": 1.0, "sgd": 0.5, "muon": pace}
        monkeypatch.setattr(study, "step_times", lambda runs, task=None, rounds=0, times=times: [times[run.contender] for run in runs])
        results = race(Options("tabular", budget="quick", size="tiny", state=tmp_path / f"{pace}.jsonl"))
        lines = {line["name"]: line for line in results["contenders"]}
        assert {line["batch"] for line in lines.values()} == {lines["adamw"]["batch"]}
        assert lines["muon"]["tuning_cost"] == pytest.approx(cost) and lines["adamw"]["tuning_cost"] == pytest.approx(1.0)
        tried = [trial["result"] for trial in lines["muon"]["tuned"]["tried"]]
        assert lines["muon"]["within_cost"] == (tried[0] if cost > 1 else lines["muon"]["tuned"]["result"])
        assert f"| {cost:.2f} |" in tables.page(results)


def test_another_batch_or_width_is_told_beside_the_race() -> None:
    """Of a race with other batches the rows of ``auto`` at them, not ``auto`` itself, which is the race's; of half a network ``auto``."""
    def line(name: str, share: float | None) -> dict[str, Any]:
        return {"name": name, "share": share, "low": share, "high": share, "seconds_share": share, "sets_target": False}

    def told(task: str, *lines: dict[str, Any]) -> dict[str, Any]:
        return {"race": "vit", "task": task, "scale": 1.0, "leader": "adamw", "target": 0.5, "contenders": list(lines)}

    ordinary = told("vit-bf16-x-2", line("auto", 0.25), line("muon", 0.4))
    batches = told("vit-bf16-x-2", line("auto", 0.25), line("auto_half_batch", 0.25 * 0.87), line("auto_double_batch", None))
    half = told("vit-half-bf16-x-2", line("auto", 0.25 / 0.87**2))
    table = tables.elsewhere([batches, half], {"vit": ordinary}).splitlines()[2:]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    assert [(row[1], row[-1]) for row in rows] == [("half the batch", "-1.0"), ("twice the batch", "-"), ("half the width", "+2.0")]
    assert [row[3].split()[0] for row in rows] == ["0.22", "missed", "0.33"]


def test_auto_at_another_batch_is_auto_but_for_its_batch() -> None:
    task = load_task("decoder", size="tiny")
    sizes = {name: next(lane(run_of(name, task, 20), task, 20).stream) for name in ("auto", "auto_half_batch", "auto_double_batch")}
    found = {name: len(batch[0]) for name, batch in sizes.items()}
    assert found == {"auto": task.batch, "auto_half_batch": task.batch // 2, "auto_double_batch": 2 * task.batch}
    numbers = [CONTENDERS[name].middle for name in sizes]
    assert all({**one, "batch": 1.0} == numbers[0] for one in numbers)
