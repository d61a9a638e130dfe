"""The study: the search is fair and finds optima outside its grid, a run equals the loop written out, an interruption changes nothing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normwise.errors import DataError, StudyError
from normwise.experiments.catalog.optimizers import OPTIMIZERS, PRESETS, SPHERES, TORCH
from normwise.experiments.catalog.strategies import ARTICLE, STRATEGIES, axes_of, why_not
from normwise.experiments.compare import run as run_module
from normwise.experiments.compare import study, tables
from normwise.experiments.compare.run import CompareRun, train
from normwise.experiments.compare.study import BUDGETS, Budget, compare, pairs_of
from normwise.experiments.framework import figures, lattice, pool, progress
from normwise.experiments.framework.lattice import Axis, Point, widening
from normwise.experiments.framework.store import Store, key_of
from normwise.experiments.framework.study import TUNING_SEED, Options
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.load import TASKS, load_task
from normwise.experiments.tasks.models.cnn import CNN, kernels_for
from normwise.experiments.tasks.task import STEPS, Recipe

# CPR looks every 50 steps whether the growth of a matrix slows down, ZClip waits for its first 25 norms.
LATE: dict[str, dict[str, Any]] = {"cpr": {"optimizer": "adam", "lr": 0.01, "steps": 256, "batch": 16}, "zclip": {"steps": 64}}
TINY = Budget(trials=10, scale=0.01, marks=2, rounds=1)
ONE = Options(only=("max_norm", "adam"), seeds=2, size="tiny")
AXES = [Axis(name, (1.0,), ratio=2.0) for name in "abc"]
STRENGTHS = {
    "l2": 1e-3, "l1": 1e-3, "radius": 0.06, "bound": 0.03, "decay": 0.5, "multiple": 4.0, "scale": 0.5, "keep": 0.5, "percentile": 30.0,
    "z": 1.25, "strength": 0.1,
}  # fmt: skip


def task_of(images: int, channels: tuple[int, int] = (6, 8)) -> ImageTask:
    """The article's network on some digits, 64 a batch."""
    recipe = Recipe("cnn", True, "accuracy", 64, lambda: CNN((1, 8, 8), 10, channels))
    return ImageTask(recipe, load().thinned(images), augmented=False)


@pytest.fixture(scope="module")
def task() -> ImageTask:
    return task_of(512)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with pool.one_thread():
        yield


def run_of(task: ImageTask, strategy: str = "nothing", optimizer: str = "gd", lr: float = 0.3, **change: Any) -> CompareRun:
    strengths = {axis.name: STRENGTHS[axis.name] for axis in STRATEGIES[strategy].axes}
    run = CompareRun(task.key, strategy, optimizer, lr, strengths, 3, 32, 64, 4, True)
    return replace(run, **change)


# ---------------------------------------------------------------------------------------------------------- the search


def searched(trials: int, axes: int, score: Any) -> dict[Point, tuple[float, ...]]:
    scores: dict[Point, tuple[float, ...]] = {}
    while points := widening(AXES[:axes], scores, trials):
        assert not set(points) & set(scores)
        scores |= {point: (score(point),) for point in points}
    return scores


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("trials", [9, 12, 25])
def test_every_search_spends_exactly_its_trials(count: int, trials: int) -> None:
    scores = searched(trials, count, lambda p: -sum((x - 0.3) ** 2 for x in p))
    assert len(scores) == trials


@pytest.mark.parametrize("optimum", [(3.0,), (-4.2,), (2.6, -2.0), (0.2, 0.4), (1.5, -1.5, 2.0)])
def test_an_optimum_outside_the_grid_is_found_by_widening_it(optimum: tuple[float, ...]) -> None:
    scores = searched(60, len(optimum), lambda p: -sum((x - o) ** 2 for x, o in zip(p, optimum, strict=True)))
    assert max(abs(x - o) for x, o in zip(lattice.lowest_best(scores), optimum, strict=True)) <= 0.13
    assert not lattice.edges(scores)


def test_an_optimum_on_the_edge_is_called_so_and_the_next_trial_lies_outside() -> None:
    scores = searched(9, 2, lambda p: 2 * p[0] - abs(p[1]))
    assert lattice.edges(scores) == [(0, 1)]
    assert widening(AXES[:2], scores, 10) == [(2.0, 0.0)]
    assert lattice.edges(searched(11, 2, lambda p: -abs(p[0] - 1) - abs(p[1]))) == []


def test_the_first_grid_of_three_axes_shows_every_pair_once() -> None:
    points = lattice.start(3)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len({(point[first], point[second]) for point in points}) == 9


def test_the_next_trial_does_not_depend_on_the_order_in_which_trials_ended() -> None:
    scores = searched(14, 2, lambda p: -(p[0] ** 2) - (p[1] - 0.5) ** 2)
    assert widening(AXES[:2], scores, 15) == widening(AXES[:2], dict(reversed(scores.items())), 15)


def test_of_equal_scores_the_smallest_learning_rate_is_taken() -> None:
    assert lattice.lowest_best({(1.0,): (0.9,), (-1.0,): (0.9,), (0.0,): (0.8,)}) == (-1.0,)


def test_positions_are_factors() -> None:
    assert Axis("lr", (0.4,), ratio=3.0).value(2) == pytest.approx(3.6)
    assert [Axis("keep", (0.5,), ratio=2.0, off=1, most=1.0).value(position) for position in (0, 1, 3)] == [0.5, 1, 1]
    assert lattice.values((Axis("a", (1.0,), ratio=10.0), Axis("b", (2.0,), ratio=4.0)), (-1.0, 0.5)) == {"a": 0.1, "b": 4.0}


# --------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("shape", "kernels"), [((1, 28, 28), (5, 5)), ((1, 8, 8), (3, 2)), ((3, 32, 32), (5, 5)), ((1, 7, 12), (2, 2))])
def test_the_network_is_the_articles(shape: tuple[int, int, int], kernels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = CNN(shape, 10, (6, 8)).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    w = dict(model.named_parameters())
    hidden = nn.functional.conv2d(x, w["conv1.weight"]) + w["conv1.bias"][:, None, None]
    hidden = hidden.clamp(min=0)
    hidden = hidden[..., : hidden.shape[2] // 2 * 2, : hidden.shape[3] // 2 * 2]
    hidden = hidden.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    hidden = (nn.functional.conv2d(hidden, w["conv2.weight"]) + w["conv2.bias"][:, None, None]).clamp(min=0)
    hidden = hidden[..., : hidden.shape[2] // 2 * 2, : hidden.shape[3] // 2 * 2].unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    expected = hidden.reshape(3, -1) @ w["head.weight"].T + w["head.bias"]
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert kernels_for(min(shape[1:])) == kernels == (w["conv1.weight"].shape[-1], w["conv2.weight"].shape[-1])


def test_the_initial_weights_are_a_normal_of_002_cut_at_two_deviations_and_the_biases_01() -> None:
    torch.manual_seed(0)
    for name, parameter in CNN((1, 28, 28), 10).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0.1).all()
        else:
            assert parameter.abs().max() <= 0.04
            if parameter.numel() > 5000:  # the deviation of a standard normal cut at ±2 is 0.8796
                assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)


def test_an_image_that_is_too_small_is_refused() -> None:
    with pytest.raises(StudyError, match="6 pixels are too small"):
        CNN((1, 6, 6), 10)


# ------------------------------------------------------------------------------------------------------------- one run


def written_out(run: CompareRun, task: ImageTask, optimizer: Any) -> dict[str, list[float]]:
    """The L2 norms at every mark of the plain loop; ``optimizer`` takes the model."""
    torch.manual_seed(run.seed)
    model = CNN((1, 8, 8), 10, (6, 8))
    steps, stream = optimizer(model), task.batches(run.batch, run.seed)
    norms: dict[str, list[float]] = {name: [] for name, _ in model.named_parameters()}
    for taken in range(run.steps):
        for group in steps.param_groups:
            group["lr"] = run.lr if taken < run.steps / 2 else run.lr * (run.steps - taken) / (run.steps / 2)
        model.zero_grad()
        images, labels = next(stream)
        nn.functional.cross_entropy(model(images), labels).backward()
        steps.step()
        if (taken + 1) % (run.steps // run.marks) == 0:
            for name, parameter in model.named_parameters():
                norms[name].append(parameter.norm().item())
    return norms


def close(curve: dict[str, Any], expected: dict[str, list[float]]) -> bool:
    return all(np.allclose(curve["norms"][name], expected[name], rtol=1e-5) for name in expected)


@pytest.mark.parametrize(
    ("optimizer", "lr", "plain"),
    [
        ("gd", 0.3, lambda p: torch.optim.SGD(p, 0.3)),
        ("momentum", 0.05, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
        ("adam", 0.01, lambda p: torch.optim.Adam(p, 0.01)),
    ],
)
def test_nothing_is_torchs_optimizer_and_no_decay(task: ImageTask, optimizer: str, lr: float, plain: Any) -> None:
    run = run_of(task, optimizer=optimizer, lr=lr)
    assert close(train(run, task)["curve"], written_out(run, task, lambda model: plain(model.parameters())))


def test_the_l2_strategy_is_torchs_coupled_decay_of_all_parameters(task: ImageTask) -> None:
    run = run_of(task, "l2", strengths={"l2": 0.02})
    expected = written_out(run, task, lambda model: torch.optim.SGD(model.parameters(), 0.3, weight_decay=0.02))
    assert close(train(run, task)["curve"], expected)


def test_the_decay_strategy_is_torchs_adamw_on_the_weights(task: ImageTask) -> None:
    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        groups = [{"params": [p for n, p in named if n.endswith("weight") is on], "weight_decay": 3.0 * on} for on in (True, False)]
        return torch.optim.AdamW(groups, lr=0.01)

    run = run_of(task, "weight_decay", "adam", 0.01, strengths={"decay": 3.0})
    assert close(train(run, task)["curve"], written_out(run, task, adamw))


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "nothing"])
def test_every_strategy_changes_the_run_and_holds_its_bounds(task: ImageTask, strategy: str) -> None:
    change = LATE.get(strategy, {})
    baseline, result = (train(run_of(task, name, **{"lr": 0.5, **change}), task) for name in ("nothing", strategy))
    assert result["curve"]["norms"] != baseline["curve"]["norms"]
    assert result["breaches"] == []
    json.dumps(result, allow_nan=False)


def test_limits_are_seen_in_the_final_norms(task: ImageTask) -> None:
    def final(strategy: str, kind: str, names: str = "weight") -> list[float]:
        norms = train(run_of(task, strategy, lr=1.5), task)["norms"]    # all limits bind, whatever the initial weights
        return [norm[kind] for name, norm in norms.items() if name.endswith(names)]

    assert max(final("max_norm", "max_unit")) == pytest.approx(0.06, rel=1e-5)
    assert final("normalise", "max_unit") == pytest.approx([0.06] * 3, rel=1e-5)
    assert max(final("clip_tensor_norm", "l2")) == pytest.approx(0.06, rel=1e-5)
    assert max(final("spectral_cap", "spectral")) == pytest.approx(0.06, rel=1e-4)


def test_only_the_soft_threshold_gives_exact_zeros(task: ImageTask) -> None:
    assert train(run_of(task, "soft_threshold", strengths={"l1": 0.01}), task)["sparsity"] > 0.2
    assert train(run_of(task, "l1", strengths={"l1": 0.01}), task)["sparsity"] < 0.05


def test_a_trial_looks_neither_at_the_test_part_nor_beyond_validation(task: ImageTask, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    evaluate = task.evaluate
    monkeypatch.setattr(task, "evaluate", lambda model, part: looked.append(part) or evaluate(model, part))
    result = train(run_of(task, full=False), task)
    assert set(looked) == {"validation"}
    assert set(result) == {"validation", "steps", "diverged", "seconds"}


def test_two_equal_runs_are_equal_and_another_seed_is_another_run(task: ImageTask) -> None:
    one, two, other = (train(run_of(task, seed=seed), task) for seed in (3, 3, 4))
    assert one["curve"] == two["curve"] != other["curve"]


def test_a_run_that_diverges_stops_and_is_worse_than_any_other(task: ImageTask) -> None:
    result = train(run_of(task, lr=1e38), task)
    assert result["diverged"]
    assert result["steps"] < 32
    json.dumps(result, allow_nan=False)
    assert study._score(task, [result]) < study._score(task, [{"diverged": False, "validation": {"accuracy": 0.0, "loss": 99.0}}])


def test_runs_are_ranked_by_what_their_task_is_judged_by(task: ImageTask) -> None:
    sure = {"diverged": False, "validation": {"accuracy": 0.6, "loss": 1.0}}
    right = {"diverged": False, "validation": {"accuracy": 0.7, "loss": 2.0}}
    assert study._score(task, [right]) > study._score(task, [sure])
    words = load_task("gpt", size="tiny")
    assert study._score(words, [right]) < study._score(words, [sure])


REST = sorted(set(TASKS) - {"cnn", "lstm", "tabular"})    # two steps on a table teach a little, and no defect is told


@pytest.mark.parametrize("name", ["cnn", "lstm", *(pytest.param(name, marks=pytest.mark.long) for name in REST)])
def test_every_task_can_be_compared_on_the_network_of_the_race(name: str) -> None:
    task = load_task(name, size="tiny")
    found = compare(replace(ONE, task=name, seeds=1), budget=Budget(trials=9, scale=2 / STEPS[name], marks=2, rounds=1))
    assert name in TASKS and found["metric"] == task.metric
    assert [cell["strategy"] for cell in found["cells"]] == ["nothing", "max_norm"]
    assert set(found["cells"][0]["norms"]) == {key for key, _ in task.build().named_parameters()}
    assert len(found["baseline_defects"]) == 1, "two steps teach nobody"
    study.show(found, stream := io.StringIO())
    assert stream.getvalue().startswith(f"On {found['data']['name']}, nothing can be said yet about Adam.\n")
    assert max(map(len, stream.getvalue().split("\n\n")[1].splitlines())) <= 80


# --------------------------------------------------------------------------------- presets and published methods


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(o, marks=() if o in ("adam", "muon", "muonh", "scion") else pytest.mark.long) for o in OPTIMIZERS],
)
def test_every_pair_trains_and_holds_its_bounds(task: ImageTask, optimizer: str) -> None:
    few = task_of(128)
    for strategy in [name for name in STRATEGIES if why_not(name, optimizer) is None]:
        run = run_of(few, strategy, optimizer, float(axes_of(strategy, optimizer)[0].value(0)), steps=4, marks=2)
        result = train(run, few)
        assert (result["diverged"], result["breaches"], result["steps"]) == (False, [], 4), strategy
        assert all(math.isfinite(norm["l2"]) for norm in result["norms"].values()), strategy


@pytest.mark.parametrize("optimizer", [pytest.param(p, marks=() if p == "muon" else pytest.mark.long) for p in PRESETS])
def test_a_preset_learns_digits_at_the_centre_of_its_axis(optimizer: str) -> None:
    whole = task_of(2000, (16, 32))
    run = run_of(whole, "nothing", optimizer, float(OPTIMIZERS[optimizer].lr.value(0)), batch=32, steps=396)
    assert train(run, whole)["validation"]["accuracy"] > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_decays_nothing_by_itself(optimizer: str) -> None:
    torch.manual_seed(0)
    model = CNN((1, 8, 8), 10, (6, 8))
    steps = OPTIMIZERS[optimizer].build(model, 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, old, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", SPHERES)
def test_the_spheres_have_the_norms_that_he_gives_and_are_kept(task: ImageTask, optimizer: str) -> None:
    norms = train(run_of(task, "nothing", optimizer, 0.02), task)["norms"]
    assert norms["conv1.weight"]["l2"] == pytest.approx(math.sqrt(2 * 6), rel=1e-5)
    assert norms["conv2.weight"]["l2"] == pytest.approx(math.sqrt(2 * 8), rel=1e-5)


class WrittenOut(torch.optim.Optimizer):
    """w ← step(w, g, lr), with what it wants to remember of each parameter in a dictionary."""

    def __init__(self, parameters: Any, lr: float, step: Any) -> None:
        super().__init__(parameters, {"lr": lr})
        self.rule = step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.rule(parameter, parameter.grad, group["lr"], self.state[parameter]))


def averaged(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    state["average"] = 0.9 * state.get("average", 0) + 0.1 * gradient
    average: torch.Tensor = state["average"]
    return average


def hyperball_of_four(w: torch.Tensor, g: torch.Tensor, lr: float, state: dict[str, Any]) -> torch.Tensor:
    if w.ndim < 4:
        return w - lr * g
    radius = state.setdefault("radius", 4 * w.norm())
    moved = w - lr * radius * g / g.norm()
    return radius * moved / moved.norm()


@pytest.mark.parametrize(
    ("strategy", "optimizer", "formula"),
    [
        ("nothing", "signum", lambda w, g, lr, state: w - lr * averaged(g, state).sign()),
        ("nothing", "normalized_sgd", lambda w, g, lr, state: w - lr * averaged(g, state) / averaged_norm(state)),
        ("hyperball", "gd", hyperball_of_four),
    ],
)
def test_a_preset_and_a_rule_are_their_formulas(task: ImageTask, strategy: str, optimizer: str, formula: Any) -> None:
    run = run_of(task, strategy, optimizer, 0.01)
    expected = written_out(run, task, lambda model: WrittenOut(model.parameters(), run.lr, formula))
    assert close(train(run, task)["curve"], expected)


def averaged_norm(state: dict[str, Any]) -> torch.Tensor:
    norm: torch.Tensor = state["average"].norm()
    return norm


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_policy_of_every_strategy_is_read_again_as_it_was_written(strategy: str) -> None:
    import normwise as nw

    strengths = {axis.name: float(axis.value(0)) for axis in STRATEGIES[strategy].axes}
    text = tables.policy_yaml(strategy, strengths, 1000)
    assert bool(text) == (strategy != "nothing")
    if text:
        assert nw.Policy.from_yaml(text) == nw.Policy(STRATEGIES[strategy].rules(strengths, 1000))


def test_the_article_is_compared_where_nothing_is_named_and_all_is_everything() -> None:
    assert pairs_of(None) == ([(strategy, optimizer) for optimizer in ("gd", "momentum", "adam") for strategy in ARTICLE], [])
    every = [(strategy, optimizer) for optimizer in OPTIMIZERS for strategy in STRATEGIES]
    kept, left_out = pairs_of(("all",))
    assert kept == [pair for pair in every if why_not(*pair) is None] and len(left_out) == 7
    assert [optimizer for _, optimizer in pairs_of(("lion", "gd"))[0]] == 12 * ["gd"] + 12 * ["lion"]
    assert pairs_of(("l2",))[0] == [(strategy, optimizer) for optimizer in TORCH for strategy in ("nothing", "l2")]
    assert not set(STRATEGIES) & set(OPTIMIZERS)


def test_the_help_names_every_strategy_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    from normwise import cli

    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    told = set(capsys.readouterr().out.translate(dict.fromkeys(map(ord, ",;:)'"), " ")).split())
    assert {*STRATEGIES, *OPTIMIZERS, "all"} <= told


@pytest.fixture(scope="module")
def with_presets() -> dict[str, Any]:
    few = replace(TINY, trials=9)
    with pool.one_thread():
        return compare(Options(only=("hyperball", "cpr", "adam", "muonh"), seeds=1, size="tiny"), budget=few)


def test_what_says_nothing_is_left_out_and_told(with_presets: dict[str, Any]) -> None:
    assert [(cell["strategy"], cell["optimizer_label"]) for cell in with_presets["cells"]] == [
        ("nothing", "Adam"), ("hyperball", "Adam"), ("cpr", "Adam"), ("nothing", "MuonH"), ("cpr", "MuonH"),
    ]  # fmt: skip
    (reason,) = with_presets["protocol"]["left_out"]
    assert reason.startswith("hyperball with muonh, which already keeps its matrices on a sphere")
    assert set(with_presets["protocol"]["optimizers"]) == {"adam", "muonh"}
    stream = io.StringIO()
    study.show(with_presets, stream)
    assert f"Left out: {reason}." in stream.getvalue()
    assert "Adam's" in stream.getvalue()


def test_steps_to_adam_are_to_what_nothing_with_adam_reached(with_presets: dict[str, Any]) -> None:
    cells = with_presets["cells"]
    goal = max(cells[0]["curves"][0]["validation_accuracy"])
    for cell in cells:
        assert cell["steps_to_adam"]["values"] == [tables.steps_to(cell["curves"][0], goal)]
    assert cells[0]["steps_to_adam"] == cells[0]["steps_to_baseline"]


# ------------------------------------------------------------------------------------------------------ kept runs


def test_kept_runs_are_found_again_and_a_line_cut_off_is_dropped(tmp_path: Path, task: ImageTask) -> None:
    path = tmp_path / "state.jsonl"
    first, second = run_of(task).settings(), run_of(task, lr=0.1).settings()
    Store(path).add(first, {"validation": 0.5})
    with path.open("a") as file:
        file.write('\n{"key": "abc", "settings": {"lr"')
    assert Store(path).get(second) is None
    Store(path).add(second, {"validation": 0.25})
    store = Store(path)
    assert (store.get(first), store.get(second)) == ({"validation": 0.5}, {"validation": 0.25})


def test_another_file_is_not_taken_for_kept_runs(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("my notes\nand more")
    with pytest.raises(DataError, match="another kind of file"):
        Store(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "my notes\nand more"


def test_every_setting_is_in_the_key(task: ImageTask) -> None:
    run = run_of(task)
    others = {
        "task": "x", "strategy": "l2", "optimizer": "adam", "lr": 0.2, "strengths": {"l2": 1.0}, "seed": 9, "steps": 9, "batch": 9,
        "marks": 9, "full": False, "versions": ("a", "b"),
    }  # fmt: skip
    assert others.keys() == asdict(run).keys()
    keys = {key_of(replace(run, **{name: value}).settings()) for name, value in others.items()}
    assert len(keys | {key_of(run.settings())}) == len(others) + 1


# -------------------------------------------------------------------------------------------------------- statistics


def test_the_spread_is_the_sample_deviation() -> None:
    numbers = [0.9, 0.95, 0.97]
    found = figures.spread(numbers)
    assert found["mean"] == pytest.approx(np.mean(numbers), abs=1e-15)
    assert found["std"] == pytest.approx(np.std(numbers, ddof=1), abs=1e-15)
    assert figures.spread([0.5])["std"] == 0


@pytest.mark.parametrize(
    ("values", "median"), [([3, 1, 2], 2), ([3, None, 2], 3), ([None, None, 2], None), ([1, None], None), ([None], None)]
)
def test_a_seed_that_missed_counts_as_later_than_every_other(values: list[float | None], median: float | None) -> None:
    assert figures.median_reached(values) == {"median": median, "values": values}


def test_steps_to_the_baseline_are_the_first_that_reach_it() -> None:
    curve = {"step": [10, 20, 30], "validation_accuracy": [0.5, 0.8, 0.7]}
    assert [tables.steps_to(curve, goal) for goal in (0.1, 0.8, 0.75, 0.9)] == [10, 20, 20, None]


# ---------------------------------------------------------------------------------------------------------- the study

MEASURED = {"step_ms", "control_share", "seconds_to_baseline"}


def lasting(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells without what is a time."""
    return [{name: value for name, value in cell.items() if name not in MEASURED} for cell in found["cells"]]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    with pool.one_thread():
        return compare(ONE, budget=TINY)


def test_every_cell_has_the_same_trials_and_every_number_is_there(uninterrupted: dict[str, Any]) -> None:
    cells = uninterrupted["cells"]
    assert [(cell["strategy"], cell["optimizer"]) for cell in cells] == [("nothing", "adam"), ("max_norm", "adam")]
    assert {cell["trials"] for cell in cells} == {10}
    assert json.loads(json.dumps(uninterrupted, allow_nan=False)) is not None
    for cell in cells:
        assert len(cell["test_accuracy"]["values"]) == len(cell["curves"]) == 2
        gaps = [a - b for a, b in zip(cell["train_accuracy"]["values"], cell["test_accuracy"]["values"], strict=True)]
        assert cell["generalisation_gap"]["values"] == gaps
        assert cell["violations"] == 0
        assert math.isfinite(cell["step_ms"])
    assert cells[0]["policy_yaml"] == "" and cells[0]["control_share"] == 0
    assert 0 < cells[1]["control_share"] < 1


def test_the_policys_yaml_is_the_policy_that_was_trained(uninterrupted: dict[str, Any]) -> None:
    import normwise as nw

    cell = uninterrupted["cells"][1]
    assert nw.Policy.from_yaml(cell["policy_yaml"]) == nw.Policy([nw.max_norm(cell["strengths"]["radius"])])
    assert list(nw.Policy.from_yaml(tables.policy_yaml("l2", {"l2": 0.01}, 1000))) == [nw.l2_penalty(10.0, samples=1000)]


def test_the_choice_is_the_best_on_validation(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    found = compare(replace(ONE, state=state), budget=TINY)
    lines = [json.loads(line) for line in state.read_text().splitlines() if line]
    for cell in found["cells"]:
        trials = [
            line for line in lines
            if line["settings"].get("strategy") == cell["strategy"] and not line["settings"]["full"]
        ]  # fmt: skip
        assert len(trials) == 10
        assert {line["settings"]["seed"] for line in trials} == {TUNING_SEED}
        best = max(line["result"]["validation"]["accuracy"] for line in trials)
        chosen = [line for line in trials if (line["settings"]["lr"], line["settings"]["strengths"]) == (cell["lr"], cell["strengths"])]
        assert [line["result"]["validation"]["accuracy"] for line in chosen] == [best]


def test_a_study_that_is_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, Any]
) -> None:
    options = replace(ONE, state=tmp_path / "state.jsonl")
    real, calls = run_module.train, []

    def interrupted_at(call: int) -> Any:
        def run(*given: Any) -> Any:
            calls.append(given[0])
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*given)

        return run

    for call in (4, 17):  # within the first grid, and later
        calls.clear()
        monkeypatch.setattr(run_module, "train", interrupted_at(call))
        with pytest.raises(KeyboardInterrupt):
            compare(options, budget=TINY)
        assert len(calls) == call
    calls.clear()
    monkeypatch.setattr(run_module, "train", interrupted_at(-1))
    assert lasting(compare(options, budget=TINY)) == lasting(uninterrupted)
    assert len(calls) == 2 * (10 + 2) - 3 - 16  # what was finished before is not done again
    calls.clear()
    monkeypatch.setattr(run_module, "train", interrupted_at(1))
    again = compare(options, budget=TINY)  # everything is kept, the step times too
    assert lasting(again) == lasting(uninterrupted)
    assert not calls


@pytest.mark.long    # by default a race shows it: the pool is the same
def test_two_workers_give_what_one_gives(uninterrupted: dict[str, Any]) -> None:
    assert lasting(compare(replace(ONE, workers=2), budget=TINY)) == lasting(uninterrupted)


def test_the_baseline_is_always_run_and_one_that_did_not_learn_is_a_defect(uninterrupted: dict[str, Any]) -> None:
    assert uninterrupted["cells"][0]["strategy"] == "nothing"
    accuracy = uninterrupted["cells"][0]["test_accuracy"]["mean"]
    assert accuracy < 0.9
    assert [f"reaches {100 * accuracy:.1f}%" in defect for defect in uninterrupted["baseline_defects"]] == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "cn"}, "There is no task 'cn'. Did you mean 'cnn'?"),
        ({"budget": "quik"}, "There is no budget 'quik'. Did you mean 'quick'?"),
        ({"only": ("maxnorm",)}, "strategy or optimizer 'maxnorm' is not known. Did you mean 'max_norm'?"),
        ({"only": ("adamm",)}, "strategy or optimizer 'adamm' is not known. Did you mean 'adam'?"),
        ({"only": ()}, "No strategy or optimizer was given"),
        ({"seeds": 0}, "seeds is 0"),
        ({"only": ("moun",)}, "strategy or optimizer 'moun' is not known. Did you mean 'muon'?"),
        ({"only": ("cpr", "qk_clip")}, "strategy 'qk_clip' scales the queries and keys of attention heads, and the networks"),
        ({"only": ("hyperball", "muonh")}, "nothing to compare in hyperball with muonh, which already keeps its"),
        ({"only": ("relative_update", "lamb", "adamh")}, "relative_update with lamb, which already takes steps"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_run(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(run_module, "train", lambda *given: pytest.fail("a run was started"))
    with pytest.raises(StudyError, match=message.replace("?", r"\?").replace("(", r"\(")):
        compare(replace(Options(), **change))


def test_every_strategy_of_the_article_is_there_with_every_optimizer() -> None:
    assert {
        "nothing", "l2", "l1", "clip_value", "clip_tensor_norm", "normalise", "max_norm", "spectral_cap", "soft_threshold",
        "weight_decay", "l2+max_norm", "l1+clip_tensor_norm",
    } == set(ARTICLE)  # fmt: skip
    assert list(TORCH) == ["gd", "momentum", "adam"]
    for strategy in STRATEGIES:
        for optimizer in OPTIMIZERS:
            assert axes_of(strategy, optimizer)[0].name == "lr"


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_fills_the_first_grid(name: str) -> None:
    assert BUDGETS[name].trials >= len(lattice.start(2)) == len(lattice.start(1)) == len(lattice.start(3))


# ------------------------------------------------------------------------------------------------------------ progress


def test_lines_tell_of_runs_at_most_every_ten_seconds_and_of_every_note(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 9.0, 11.0, 12.0])
    monkeypatch.setattr("normwise.experiments.framework.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = progress.Lines(stream)
    lines.start(7)
    for run in "abcd":
        lines.advance(run)
    lines.note("done")
    assert stream.getvalue().splitlines() == ["3 of 7 runs after 11 s; c", "done"]


def test_a_bar_ends_at_its_total() -> None:
    bar = progress.Bar(io.StringIO())
    bar.start(2)
    for run in ("a", "[b]"):
        bar.advance(run)
    bar.note("a [note] stays")
    bar.stop()
    assert bar.bar.finished
    assert "a [note] stays" in bar.bar.console.file.getvalue()  # type: ignore[attr-defined]


@contextmanager
def killed_pool() -> Iterator[Any]:
    from concurrent.futures import Executor, Future
    from concurrent.futures.process import BrokenProcessPool

    class Broken(Executor):
        def submit(self, *given: Any, **more: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

    yield Broken()


def test_a_worker_that_was_killed_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.experiments.framework.driver.open_pool", lambda *given: killed_pool())
    with pytest.raises(StudyError, match="A worker process was killed"):
        compare(ONE, budget=TINY)
