"""Norms are written while training goes on: to files and loggers, each step once, whatever a logger does."""

from __future__ import annotations

import csv
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw

Records = list[tuple[int, dict[str, float]]]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        torch.manual_seed(i)
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()


def logged(target: Any, steps: int = 12, rules: Any = None, **options: Any) -> nw.Control:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, rules or [nw.max_norm(0.5), nw.clip_grad_norm(0.1, name="clip")])
    control.log_to(target, **options)
    train(model, optimizer, range(steps))
    return control


def norm(tensors: Any) -> float:
    return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())


def test_a_record_has_the_norms_that_are_written_out_by_hand():
    """Before and after the rules, and of the update, on the steps that are due and no others."""
    seen: Records = []
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.5), nw.clip_grad_norm(0.1, name="clip")])
    control.log_to(lambda numbers, step: seen.append((step, dict(numbers))), every=3)
    by_hand = {}
    for i in range(7):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        torch.manual_seed(i)
        model(torch.randn(5, 6)).square().mean().backward()
        raw = norm(p.grad for p in model.parameters())
        optimizer.step()
        moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
        by_hand[i + 1] = {
            "norm/grad_before/total": raw, "norm/grad/total": norm(p.grad for p in model.parameters()), "norm/update/total": norm(moved),
            "norm/weight/total": norm(model.parameters()), "norm/weight_before/total": norm(before),
            "norm/weight/hidden": norm([model[0].weight]),
        }  # fmt: skip
    assert [step for step, _ in seen] == [3, 6]
    for step, numbers in seen:
        assert {name: numbers[name] for name in by_hand[step]} == pytest.approx(by_hand[step], rel=1e-6)
        assert numbers["changed/clip"] == 1 and numbers["changed/clip_norm_1"] >= 0
    assert "update" not in control.norms().total, "the update of step 6 was given for that of step 7"


def test_several_loggers_have_each_its_own_steps_and_log_true_stays_what_it_was():
    every_2, every_3 = [], []
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.5), log=5)
    control.log_to(lambda _, step: every_2.append(step), every=2)
    control.log_to(lambda _, step: every_3.append(step), every=3)
    train(model, optimizer, range(6))
    assert (every_2, every_3) == ([2, 4, 6], [3, 6])
    assert len(control.norms(history=True).history["update"]) == 5


@pytest.mark.parametrize("spanning", [False, True], ids=["each its own", "one norm over both"])
def test_two_optimizers_make_one_record_a_step(spanning: bool):
    model = net()
    optimizers = [SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    control = nw.attach(model, optimizers, [nw.clip_grad_norm(0.1)] if spanning else [nw.max_norm(0.3)])
    seen: Records = []
    control.log_to(lambda numbers, step: seen.append((step, dict(numbers))), every=2)
    for i in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(i)
        model.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        moved = norm(p.detach() - q for p, q in zip(model.parameters(), before, strict=True))
        if i % 2:
            assert seen[-1][0] == i + 1 and seen[-1][1]["norm/update/total"] == pytest.approx(moved, rel=1e-6)
    assert len(seen) == 2


def test_steps_that_are_not_logged_measure_nothing_and_read_nothing_back(monkeypatch: pytest.MonkeyPatch):
    """Every norm that the log measures, and every number that is read from a tensor, is of a step that is due."""
    from normwise.engine.norm_log import NormLog

    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.5), nw.clip_grad_norm(0.1)])
    now, measured, read = [0], [], []
    control.log_to(lambda *_: None, every=4)
    for name in ("before", "after"):
        real = getattr(NormLog, name)
        monkeypatch.setattr(NormLog, name, lambda self, *a, real=real, **k: (measured.append(now[0]), real(self, *a, **k))[1])
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, real=real: (read.append(now[0]), real(self, *a))[1])
    for i in range(1, 10):
        now[0] = i
        train(model, optimizer, range(i, i + 1))
    assert set(measured) == {4, 8} and set(read) <= {4, 8} and read


# ------------------------------------------------------------------------------------------------------------- files


def lines(path: Path) -> Records:
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(io.StringIO(path.read_text()))]
    return [(int(row.pop("step")), row) for row in rows]


@pytest.mark.parametrize("name", ["norms.jsonl", "norms.csv"])
def test_a_resumed_run_has_each_step_once_and_the_numbers_of_the_uninterrupted_one(name: str, tmp_path: Path):
    """Cut at step 9 after a checkpoint at step 6, in the middle of a line; the checkpoint's run goes on in the same file."""
    whole, cut = tmp_path / f"whole.{name}", tmp_path / name
    logged(whole, 12, every=2)
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    rules = [nw.max_norm(0.5), nw.clip_grad_norm(0.1, name="clip")]
    nw.attach(model, optimizer, rules).log_to(cut, every=2)
    train(model, optimizer, range(6))
    saved = [{k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()]
    train(model, optimizer, range(6, 9))
    with cut.open("ab") as file:
        file.write(cut.read_bytes().splitlines(True)[-1][:20])
    resumed = net(5)
    again = SGD(resumed.parameters(), lr=0.1)
    nw.attach(resumed, again, rules).log_to(str(cut), every=2)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert [step for step, _ in lines(cut)[:4]] == [2, 4, 6, 8] if name.endswith("csv") else True
    train(resumed, again, range(6, 12))
    assert lines(cut) == lines(whole) and len(lines(cut)) == 6


@pytest.mark.parametrize("name", ["norms.jsonl", "norms.csv"])
def test_another_run_does_not_write_into_the_file_nor_over_it(name: str, tmp_path: Path):
    logged(tmp_path / name, 4, every=2)
    first = (tmp_path / name).read_bytes()
    for number in (1, 2):
        with pytest.warns(UserWarning, match=rf"are in .*norms\.{number}\."):
            logged(tmp_path / name, 6, every=2)
    kind = name.partition(".")[2]
    assert (tmp_path / f"norms.1.{kind}").read_bytes() == first
    assert [step for step, _ in lines(tmp_path / name)] == [2, 4, 6]


@pytest.mark.parametrize("name", ["norms.jsonl", "norms.csv"])
def test_a_file_that_a_kill_left_with_half_a_line_alone_is_not_written_on(name: str, tmp_path: Path):
    (tmp_path / name).write_text('{"step": 2, "no' if name.endswith("jsonl") else "step,norm/wei")
    with pytest.warns(UserWarning, match=r"are in .*norms\.1\."):
        logged(tmp_path / name, 4, every=2)
    assert [step for step, _ in lines(tmp_path / name)] == [2, 4]


def test_a_column_that_comes_later_is_added_to_the_table(tmp_path: Path):
    from normwise.logs import logger_of

    write = logger_of(tmp_path / "n.csv", 1, False)
    write(1, {"a": 1.5}, {})
    write(2, {"a": float("nan"), "b, with a comma": 2.0}, {})
    write(3, {"b, with a comma": 3.0}, {})
    assert lines(tmp_path / "n.csv")[0] == (1, {"a": 1.5}) and lines(tmp_path / "n.csv")[2] == (3, {"b, with a comma": 3.0})
    rows = list(csv.reader(io.StringIO((tmp_path / "n.csv").read_text())))
    assert rows[0] == ["step", "a", "b, with a comma"] and rows[2] == ["2", "nan", "2.0"]


def test_what_is_not_finite_is_null_since_json_has_no_number_for_it(tmp_path: Path):
    from normwise.logs import logger_of

    logger_of(tmp_path / "n.jsonl", 1, False)(1, {"a": float("inf"), "b": 2.0}, {})
    text = (tmp_path / "n.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": 2.0}


# ------------------------------------------------------------------------------------------------------------- bad input


class Down:
    """A logger whose server is away."""

    def __init__(self) -> None:
        self.calls = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


def test_a_logger_that_raises_costs_one_warning_and_no_step():
    down, seen = Down(), []
    with pytest.warns(UserWarning, match="did not take the norms of step 2 .*no route to host.* Training goes on") as told:
        control = logged(down, 8, every=2)
    assert len(told) == 1 and down.calls == 4 and control.steps == 8
    alone = net()
    optimizer = SGD(alone.parameters(), lr=0.1)
    nw.attach(alone, optimizer, control.policy).log_to(lambda _, step: seen.append(step), every=2)
    train(alone, optimizer, range(8))
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), control._model.parameters(), strict=True))


def test_a_disk_that_fills_up_costs_one_warning(tmp_path: Path):
    folder = tmp_path / "logs"
    control = nw.attach(model := net(), optimizer := SGD(model.parameters(), lr=0.1), nw.max_norm(0.5))
    control.log_to(folder / "norms.jsonl", every=1)
    folder.rmdir()
    folder.write_text("")
    with pytest.warns(UserWarning, match="Training goes on") as told:
        train(model, optimizer, range(4))
    assert len(told) == 1


@pytest.mark.parametrize("target", [
    logging.getLogger("x"), 7, None, net(), Down, lambda numbers: None, "norms.txt", Path("norms"),
], ids=["logging", "number", "None", "module", "class", "one argument", "txt", "no suffix"])  # fmt: skip
def test_what_is_no_logger_is_refused_before_the_first_step(target: Any):
    control = nw.attach(model := net(), SGD(model.parameters(), lr=0.1), nw.max_norm(0.5))
    with pytest.raises(nw.PolicyError, match=r"(no place to log norms to|cannot be logged to).*\.jsonl.*\.csv"):
        control.log_to(target)
    assert not control._loggers and control._log is None


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_whole_number_of_steps(every: Any, tmp_path: Path):
    control = nw.attach(model := net(), SGD(model.parameters(), lr=0.1), nw.max_norm(0.5))
    with pytest.raises(nw.PolicyError, match="whole number of steps"):
        control.log_to(tmp_path / "n.csv", every=every)


@pytest.mark.parametrize("text", ["not json\n", '{"loss": 3}\n', "[1]\n", '"step"\n', "\xff\n"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_of_another_kind_is_refused_and_stays_as_it_is(text: str, kind: str, tmp_path: Path):
    path = tmp_path / f"n.{kind}"
    path.write_text(text, encoding="latin-1")
    control = nw.attach(model := net(), SGD(model.parameters(), lr=0.1), nw.max_norm(0.5))
    with pytest.raises(nw.PolicyError, match="no log of norms"):
        control.log_to(path)
    assert path.read_text(encoding="latin-1") == text


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path):
    (tmp_path / "n.csv").mkdir()
    control = nw.attach(model := net(), SGD(model.parameters(), lr=0.1), nw.max_norm(0.5))
    with pytest.raises(nw.DataError, match="folder"):
        control.log_to(tmp_path / "n.csv")


# ------------------------------------------------------------------------------------------------------------- loggers


def test_histograms_are_of_the_units_norms_and_quantiles_where_a_logger_has_none():
    seen: Records = []
    control = logged(lambda numbers, step: seen.append((step, dict(numbers))), 2, every=2, histograms=True)
    units = control._model[0].weight.detach().double().norm(dim=1)
    found = seen[0][1]
    expected = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1}
    for name, at in expected.items():
        assert found[f"units/0.weight/{name}"] == pytest.approx(float(units.quantile(at)), rel=1e-6)
    assert not any(k.startswith("units/0.bias") for k in found)


def test_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    seen: Records = []
    writer = SummaryWriter(str(tmp_path))
    control = logged(writer, 6, every=3, histograms=True)
    writer.close()
    logged(lambda numbers, step: seen.append((step, dict(numbers))), 6, every=3)
    events = EventAccumulator(str(tmp_path), {"scalars": 0, "histograms": 0})
    events.Reload()
    for name in seen[0][1]:
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(s, pytest.approx(n[name], rel=1e-6)) for s, n in seen]
    last = events.Histograms("units/0.weight")[-1]
    assert last.step == 6 and last.histogram_value.num == 8
    assert last.histogram_value.max == pytest.approx(float(control._model[0].weight.detach().norm(dim=1).max()), rel=1e-6)


@pytest.mark.long
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("norms")
    seen: Records = []
    logged(lambda numbers, step: seen.append((step, dict(numbers))), 6, every=3, histograms=True)
    with mlflow.start_run() as run, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not take.*")
        logged(mlflow, 6, every=3, histograms=True)
    client = mlflow.MlflowClient()
    for name in seen[0][1]:
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == [(s, n[name]) for s, n in seen]


@pytest.mark.long
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for as_module in (False, True):
        run = wandb.init(mode="offline", dir=str(tmp_path), project="p")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*did not take.*")
            control = logged(wandb if as_module else run, 6, every=3, histograms=True)
        run.log({"loss": 1.0}, step=7)    # until then W&B waits for more of step 6
        assert run.summary["norm/weight/total"] == pytest.approx(control.norms().total["weight"], rel=1e-6)
        assert sum(run.summary["units/0.weight"]["values"]) == 8
        run.finish()


@pytest.mark.parametrize("library", ["lightning.fabric", "accelerate"])
def test_fabric_and_accelerate_write_them_to_their_own_loggers(library: str, tmp_path: Path):
    """With what their set-up returns, as the page says; they pass the records on to the loggers that they were given."""
    there = pytest.importorskip(library, reason=f"needs {library}")
    model, seen = net(), []

    class Tracker:
        name, requires_logging_directory, main_process_only, root_dir, tracker, version = "own", False, True, None, None, ""

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            seen.append((step, metrics))

        def log(self, values: dict[str, float], step: int, **_: Any) -> None:
            self.log_metrics(values, step)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

    if library == "accelerate":
        of_accelerate = type("Own", (Tracker, there.tracking.GeneralTracker), {})
        trainer = there.Accelerator(cpu=True, log_with=of_accelerate(_blank=True))
        trainer.init_trackers("run")
        wrapped, optimizer = trainer.prepare(model, SGD(model.parameters(), lr=0.1))
    else:
        trainer = there.Fabric(accelerator="cpu", devices=1, loggers=Tracker())
        wrapped, optimizer = trainer.setup(model, SGD(model.parameters(), lr=0.1))
    control = nw.attach(wrapped, optimizer, [nw.max_norm(0.5)])
    control.log_to(trainer, every=4)
    train(wrapped, optimizer, range(8))
    assert [step for step, _ in seen] == [4, 8] and control.verify()
    assert seen[-1][1]["norm/weight/total"] == pytest.approx(norm(model.parameters()), rel=1e-6)
