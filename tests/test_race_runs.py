"""Runs of a race that really train: contenders against their optimizers written out, initial weights, batches, times, the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import cli
from normwise.experiments.catalog.contenders import FIRST
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.study import Options
from normwise.experiments.framework.timing import WARM_UP
from normwise.experiments.race import protocol
from normwise.experiments.race import run as race_run
from normwise.experiments.race.run import RaceRun, batch_of, lane, train
from normwise.experiments.race.study import race, replay
from normwise.experiments.tasks.initial_weights import prepare
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.models.lstm import CharLSTM
from normwise.experiments.tasks.task import Task
from normwise.optim.schedule import Rate

MICRO = protocol.Budget(trials=2, seeds=2, doublings=0, scale=0.01, contenders=("muon",), rounds=1)
REST = {"lr": 0.004, "betas": (0.9, 0.99)}


@pytest.fixture(autouse=True)
def one() -> Any:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def cnn() -> Task:
    return load_task("cnn", size="tiny")


@pytest.fixture(scope="module")
def gpt() -> Task:
    return load_task("gpt", size="tiny")


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(protocol.BUDGETS, "quick", MICRO)
    monkeypatch.setitem(protocol.BUDGETS_2, "quick", MICRO)
    monkeypatch.setattr(protocol, "RATIO", 0.5)


def run_of(name: str, task: Task, steps: int, seed: int = 0, full: bool = False, **changed: Any) -> RaceRun:
    contender = FIRST[name]
    numbers = contender.numbers([0] * len(contender.axes)) | changed
    return RaceRun(task.key, name, tuple(numbers.items()), steps * batch_of(numbers, task.batch), seed, full, 1, "v")


# ------------------------------------------------------------------------------------------- what a contender's step really is

WRITTEN_OUT: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "muon": lambda m: nw.optim.Muon(m, 0.01, adamw=REST, adjust_lr_fn="match_rms_adamw", weight_decay=0.1, polar="fast"),
    "normuon": lambda m: nw.optim.NorMuon(m, 0.01, adamw=REST, weight_decay=0.1, polar="fast"),
    "muonh": lambda m: nw.optim.MuonH(m, 0.02, adamw=REST, polar="fast"),
    "adamh": lambda m: nw.optim.AdamH(m, 0.02, adamw=REST),
    "scion": lambda m: nw.optim.Scion(m, 1e-3, radius=10.0, head_radius=100.0, polar="fast"),
    "ridge": lambda m: nw.optim.Ridge(m, 0.02, damping=0.03, adamw={**REST, "lr": 0.008}),
    "ridge_roles": lambda m: nw.optim.Ridge(
        m, 0.02, damping=0.03, adamw={**REST, "lr": 0.008}, override={"*.[qk].weight": 3.0, "*.v.weight": 0.5, "*.out.weight": 0.5}),
    "adamw": lambda m: torch.optim.AdamW(
        [{"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.99), fused=True),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRITTEN_OUT))
def test_a_contender_is_its_optimizer_under_the_schedule(gpt: Task, name: str) -> None:
    """Three steps of twenty, which is a step of warm-up at full rate and two on the way down, by hand."""
    steps = 20
    going = lane(run_of(name, gpt, steps), gpt, steps)
    torch.manual_seed(0)
    model = gpt.build()
    optimizer, batches = WRITTEN_OUT[name](model), gpt.batches(gpt.batch, 0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        going.step()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * Rate(steps, "linear")(step)
        optimizer.zero_grad()
        gpt.loss(model, next(batches)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(going.model.parameters(), model.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "every parameter moves"


def test_by_role_is_told_by_gates_and_by_convolutions(cnn: Task) -> None:
    contender = FIRST["ridge_roles"]
    numbers = contender.numbers([0] * len(contender.axes))
    built = {task.name: contender.build(task.build(), numbers)[0] for task in (cnn, load_task("lstm", size="tiny"))}
    rows = {task: {name: g for g in optimizer.param_groups for name in g["param_names"]} for task, optimizer in built.items()}
    assert rows["cnn"]["head.weight"]["weight_decay"] == 1.0 and rows["cnn"]["head.weight"]["radius"] == 1.0
    gates = rows["lstm"]["lstm.weight_hh_l0"]
    assert (gates["momentum"], gates["weight_decay"], gates["lr"]) == (0.85, 0.1, 0.02)
    assert rows["lstm"]["head.weight"]["weight_decay"] == 0.1 and rows["lstm"]["head.weight"]["radius"] == 3.0


def test_adamw_decays_matrices_and_neither_biases_nor_gains() -> None:
    """Without a gradient, decay is all that is left: (1 - lr · decay) times each matrix."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, control = FIRST["adamw"].build(model, {"lr": 0.1, "decay": 0.3, "beta2": 0.99})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert control is None
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * 0.97 if old.ndim > 1 else old, rtol=1e-6, atol=0)


def test_max_norm_bounds_hold_after_every_step_and_are_measured(cnn: Task) -> None:
    run = run_of("adamw_max_norm", cnn, 6, full=True, lr=0.5, radius=1.5)
    going = lane(run, cnn, 6)
    first = {n: p.detach().double().flatten(1).norm(dim=1) for n, p in going.model.named_parameters() if p.ndim > 1}
    for _ in range(3):
        going.step()
        for name, p in going.model.named_parameters():
            if p.ndim > 1:
                assert (p.detach().double().flatten(1).norm(dim=1) <= 1.5 * first[name] * (1 + 1e-6)).all(), name
    assert train(run, cnn)["breaches"] == []


def test_muonh_keeps_every_matrix_at_its_initial_norm(gpt: Task) -> None:
    going = lane(run_of("muonh", gpt, 10), gpt, 10)
    matrices = [block.attention.q.weight for block in going.model.blocks]
    first = [w.detach().norm().item() for w in matrices]
    for _ in range(4):
        going.step()
    assert [w.detach().norm().item() for w in matrices] == pytest.approx(first, rel=1e-4)


def test_clipping_is_of_the_global_norm_and_only_where_chosen(cnn: Task) -> None:
    norms = {}
    for clip in (0.0, 1.0):
        going = lane(run_of("sgd", cnn, 10, clip=clip), cnn, 10)
        loss = cnn.loss
        going.task = SimpleNamespace(loss=lambda model, batch, loss=loss: 100 * loss(model, batch))  # type: ignore[assignment]
        going.step()
        norms[clip] = math.hypot(*(p.grad.norm().item() for p in going.model.parameters()))
    assert norms[0.0] > 2 and norms[1.0] == pytest.approx(1.0, rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- whole runs


def test_a_horizon_is_samples_whatever_the_batch(cnn: Task) -> None:
    seen: list[int] = []

    def count(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        seen.append(len(batch[1]))
        return cnn.loss(model, batch)

    task = SimpleNamespace(**{name: getattr(cnn, name) for name in ("build", "batches", "evaluate", "batch", "metric", "key")}, loss=count)
    for factor, steps in ((0.5, 16), (1.0, 8), (2.0, 4)):
        seen.clear()
        run = run_of("sgd", cnn, 1, batch=factor)
        result = train(RaceRun(**(vars(run) | {"samples": 8 * cnn.batch})), task)  # type: ignore[arg-type]
        assert result["steps"] == steps == len(seen) and set(seen) == {round(factor * cnn.batch)} and sum(seen) == 8 * cnn.batch


def test_a_seed_gives_all_contenders_the_same_start_and_the_same_data(cnn: Task) -> None:
    lanes = [lane(run_of(name, cnn, 5, seed=3, batch=1.0), cnn, 5) for name in FIRST]
    other = lane(run_of("sgd", cnn, 5, seed=4), cnn, 5)
    batches = [next(going.stream) for going in lanes]
    for going, batch in zip(lanes[1:], batches[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(going.model.parameters(), lanes[0].model.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(batch, batches[0], strict=True))
    assert not torch.equal(next(other.stream)[0], batches[0][0])
    assert not torch.equal(next(other.model.parameters()), next(lanes[0].model.parameters()))


def test_a_run_is_the_same_twice_and_a_full_one_only_says_more(gpt: Task) -> None:
    short, full = (train(run_of("muon", gpt, 4, full=full), gpt) for full in (False, True))
    assert {**full, "seconds": 0} == {**full, **short, "seconds": 0} and full["spikes"] == 0
    assert set(full) - set(short) == {"test", "train", "sparsity", "breaches"}
    assert short["result"] == short["loss"] != full["test"]["loss"] and full["sparsity"] == 0.0


def test_a_run_that_diverges_ends_there_and_says_so_in_plain_numbers(cnn: Task) -> None:
    result = train(run_of("sgd", cnn, 30, full=True, lr=1e30), cnn)
    assert result["diverged"] and result["loss"] is None and result["seconds"] < 5
    assert result["result"] in (None, 0.0) and result["test"] == {"loss": None, "accuracy": 0.0}
    json.dumps(result, allow_nan=False)


# --------------------------------------------------------------------------------------------------------- initial weights


class Fused(nn.Module):
    """A convolution, a fused q/k/v, an LSTM of two layers, with an embedding before and a head behind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(3, 6, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = CharLSTM(11, 8, 12).lstm
        self.head = nn.Linear(12, 11)


def matrices(name: str, p: Tensor) -> list[Tensor]:
    """Each matrix that the module applies."""
    pieces = 3 if "in_proj" in name else 4 if "lstm" in name else 1
    return [piece.detach().double().flatten(1) for piece in p.chunk(pieces)]


def test_orthogonal_weights_have_equal_singular_values_at_their_own_norm_gate_by_gate() -> None:
    torch.manual_seed(0)
    model, changed = Fused(), set()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepare(model, "orthogonal")
    for name, p in model.named_parameters():
        if torch.equal(p, before[name]):
            continue
        changed.add(name)
        for old, new in zip(matrices(name, before[name]), matrices(name, p), strict=True):
            sigma = torch.linalg.svdvals(new)
            torch.testing.assert_close(sigma, sigma.mean().expand_as(sigma), rtol=1e-5, atol=0)
            torch.testing.assert_close(new.norm(), old.norm(), rtol=1e-5, atol=0)
            u, _, v = torch.linalg.svd(old, full_matrices=False)
            torch.testing.assert_close(new, sigma.mean() * u @ v, rtol=0, atol=1e-5 * sigma.mean().item(), msg="the polar factor")
    lstm = {f"lstm.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1)}
    assert changed == {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", *lstm}, "no bias, embedding or head"


def test_own_weights_are_left_alone() -> None:
    model = Fused()
    before = [p.detach().clone() for p in model.parameters()]
    prepare(model, "own")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_initial_weights_are_a_choice_of_the_run(gpt: Task) -> None:
    going = lane(run_of("adamw", gpt, 5, init="orthogonal"), gpt, 5)
    sigma = torch.linalg.svdvals(going.model.blocks[0].up.weight.detach().double())
    torch.testing.assert_close(sigma, sigma.mean().expand_as(sigma), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------------- times


def test_step_times_are_interleaved_and_in_the_order_of_the_runs(cnn: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, turns = [0.0], list[str]()

    def fake(run: RaceRun, task: Task, steps: int) -> SimpleNamespace:
        def step() -> None:
            turns.append(run.contender)
            slow = 100 if len(turns) <= 4 * 3 * WARM_UP else 1
            clock[0] += slow * {"adamw": 0.002, "muon": 0.005, "sgd": 0.001}[run.contender]

        return SimpleNamespace(step=step)

    names = ["adamw", "muon", "sgd"]
    runs = [run_of(name, cnn, 5) for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(race_run, "lane", fake)
        patch.setattr("normwise.experiments.framework.timing.time.perf_counter", lambda: clock[0])
        assert race_run.step_times(runs, cnn, 2) == pytest.approx([2.0, 5.0, 1.0]), "the slow first bursts are warm-up"
    assert turns == [name for _ in range(WARM_UP + 2) for name in names for _ in range(race_run.BURST)]
    real = race_run.step_times(runs, cnn, 1)
    assert len(real) == 3 and all(0 < ms < 1000 for ms in real)


# ------------------------------------------------------------------------------------------------------------- the command


def timeless(results: dict[str, Any]) -> Any:
    """Everything but what a clock says."""
    timed = {"machine", "data", "step_ms", "ms_a_sample", "seconds_share", "tuning_cost", "within_cost", "seconds"}

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items() if key not in timed}
        return [bare(item) for item in value] if isinstance(value, list) else value

    return bare(json.loads(json.dumps(results)))


@pytest.mark.parametrize("task", ["cnn", pytest.param("gpt", marks=pytest.mark.long)])
def test_the_command_races_tells_and_writes(micro: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    out = tmp_path / f"{task}.json"
    given = ["race", task, "--tiny", "--budget", "quick", "--workers", "1", "--json", str(out)]
    assert cli.main(given) == 0
    told = capsys.readouterr()
    assert "the target is a validation" in told.out and "Muon" in told.out and "AdamW" in told.out and f"Results: {out}" in told.out
    assert "Tuning adamw, sgd, muon: 2 trials each (adamw: 3)" in told.err and " of 0 runs" not in told.err
    results = json.loads(out.read_text())
    assert {line["name"] for line in results["contenders"]} == {"adamw", "sgd", "muon"} and results["unfinished"] == []
    assert sorted(results["protocol"]["contenders"]) == ["adamw", "muon", "sgd"], "those that raced, not the budget's"
    assert results["protocol"]["seeds"] == 2 and all(line["step_ms"] > 0 for line in results["contenders"])
    state = out.with_suffix(".runs.jsonl")
    written = state.read_text()
    assert json.loads(json.dumps(replay(state))) == results
    assert cli.main(["race", "--state", str(state)]) == 0
    assert capsys.readouterr().out == told.out.replace(f"Results: {out}\n", "")
    assert cli.main(given) == 0 and len(state.read_text().splitlines()) == len(written.splitlines()) + 1, "only the facts anew"


def test_real_runs_come_out_the_same_cut_off_or_with_two_workers(micro: None, tmp_path: Path) -> None:
    class Interrupting(Progress):
        left = 12

        def advance(self, text: str) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def options(**changed: Any) -> Options:
        return Options(**({"task": "lstm", "budget": "quick", "size": "tiny", "seeds": 1, "only": []} | changed))

    whole = timeless(race(options(state=tmp_path / "whole.jsonl")))
    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        race(options(state=cut), Interrupting())
    with cut.open("a") as file:
        file.write('\n{"key": "0123456789", "settings": {"ki')
    assert timeless(race(options(state=cut, workers=2))) == whole == timeless(replay(cut))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("race", "name a TASK to race, or the finished runs to look at with --state FILE"),
        ("race cn", "There is no task 'cn'. Did you mean 'cnn'?"),
        ("race cnn --only muom", "There is no contender 'muom'. Did you mean 'muon'?"),
        ("race cnn --budget quik", "There is no budget 'quik'. Did you mean 'quick'?"),
        ("race cnn --seeds 0", "'0' is not a whole number >= 1"),
        ("race cnn --workers two", "'two' is not a whole number >= 1"),
        ("race cnn --data /no/such/folder", "/no/such/folder"),
        ("race --state /no/such/file.jsonl", "/no/such/file.jsonl: expected the runs of a race"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_another_kind_of_file_is_not_written_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("dear diary\n")
    for arguments in (["race", "cnn", "--tiny", "--state", str(other)], ["race", "--state", str(other)]):
        assert cli.main(arguments) == 2
        assert "notes.txt: expected the runs kept by an earlier study" in capsys.readouterr().err
    assert other.read_text() == "dear diary\n"
