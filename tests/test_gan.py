"""The GAN study: a run equals the loop written out, bounds are seen in the weights, an interruption changes nothing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.experiments.catalog.gan import GAN_STRATEGIES as STRATEGIES
from normwise.experiments.cells import AGAIN_SEED, Cell, best_of, choice
from normwise.experiments.framework import lattice
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.store import key_of
from normwise.experiments.framework.study import TUNING_SEED, Options
from normwise.experiments.gan import run as gan_run
from normwise.experiments.gan import study, tables
from normwise.experiments.gan.run import GanRun, JudgedData, Training, batches, marks_of, score, train
from normwise.experiments.gan.study import BUDGETS, Budget
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.fidelity import train_judge
from normwise.experiments.tasks.models.dcgan import LOSSES, Discriminator, Generator

TINY = Budget(trials=9, again=2, steps=4, batch=16, width=4, marks=2, drawn=40, rounds=1)
ONE = Options("gan", only=("clip_value", "hinge"), seeds=2)
STRENGTHS = {"bound": 0.05, "radius": 0.8, "generator_radius": 0.7, "penalty": 3.0}


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data() -> JudgedData:
    with one_thread():
        thin = load().thinned(300)
        return JudgedData.of(thin, train_judge(thin, epochs=6))


@pytest.fixture(autouse=True)
def quick_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "train_judge", partial(train_judge, epochs=2))


def run_of(data: JudgedData, strategy: str = "nothing", loss: str = "non_saturating", **change: Any) -> GanRun:
    strengths = {axis.name: STRENGTHS[axis.name] for axis in STRATEGIES[strategy].axes}
    return replace(GanRun(strategy, loss, 2e-3, strengths, 3, 6, 16, 8, 3, 60, True, data.key), **change)


def trained(run: GanRun, data: JudgedData) -> Training:
    training = Training(run, data)
    for _, real in zip(range(run.steps), batches(run, data), strict=False):
        training.step(real)
    return training


# ------------------------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_is_the_loop_written_out(data: JudgedData, loss: str) -> None:
    run = run_of(data, "gradient_penalty", loss)
    torch.manual_seed(3)
    generator, discriminator = Generator(data.shape, 8), Discriminator(data.shape, 8)
    betas = (0.5, 0.999) if loss == "non_saturating" else (0.0, 0.9)
    generator_steps, discriminator_steps = (torch.optim.Adam(side.parameters(), 2e-3, betas) for side in (generator, discriminator))
    noise, between = torch.Generator().manual_seed(10_003), torch.Generator().manual_seed(30_003)
    for _, real in zip(range(run.steps), batches(run, data), strict=False):
        drawn = generator(torch.randn(16, 64, generator=noise))
        u = torch.rand(16, 1, 1, 1, generator=between)
        x = (u * real + (1 - u) * drawn.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        discriminator.zero_grad()
        (LOSSES[loss].discriminator(discriminator(real), discriminator(drawn.detach())) + 3 * penalty).backward()
        discriminator_steps.step()
        generator.zero_grad()
        LOSSES[loss].generator(discriminator(drawn)).backward()
        generator_steps.step()
    found = trained(run, data)
    for ours, theirs in ((found.generator, generator), (found.discriminator, discriminator)):
        assert torch.allclose(*map(nn.utils.parameters_to_vector, (ours.parameters(), theirs.parameters())), rtol=1e-4, atol=1e-5)


def spectral_norms(network: nn.Module) -> list[float]:
    """Of each layer as the matrix whose rows are its output channels."""
    found = []
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            found.append(torch.linalg.matrix_norm(layer.weight.detach().double().transpose(0, 1).flatten(1), 2).item())
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            found.append(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2).item())
    return found


def test_limits_are_seen_in_the_weights(data: JudgedData) -> None:
    free = trained(run_of(data), data)
    assert min(spectral_norms(free.discriminator)) > 0.9
    assert max(spectral_norms(trained(run_of(data, "spectral_cap"), data).discriminator)) <= 0.8 * 1.01
    both = trained(run_of(data, "spectral_cap+generator", strengths={"radius": 0.8, "generator_radius": 0.1}), data)
    assert max(spectral_norms(both.discriminator)) <= 0.8 * 1.01
    assert max(spectral_norms(both.generator)) <= 0.1 * 1.01 < min(spectral_norms(free.generator))
    unit = trained(run_of(data, "spectral_normalize"), data)
    assert spectral_norms(unit.discriminator) == pytest.approx([1.0] * 3, rel=1e-5)
    assert spectral_norms(unit.generator) != pytest.approx([1.0] * 3, rel=1e-2)
    clipped = trained(run_of(data, "clip_value"), data)
    assert max(parameter.abs().max().item() for parameter in clipped.discriminator.parameters()) == pytest.approx(0.05)
    reference = trained(run_of(data, "torch_spectral_norm"), data)
    assert all("original" in name for name, _ in reference.discriminator.named_parameters() if not name.endswith("bias"))


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "nothing"])
def test_every_strategy_changes_the_run_and_holds_its_bounds(data: JudgedData, strategy: str) -> None:
    baseline, result = train(run_of(data), data), train(run_of(data, strategy), data)
    assert result["curve"]["distance"] != baseline["curve"]["distance"]
    assert result["breaches"] == []
    assert result["samples"] == 96
    json.dumps(result, allow_nan=False)


def test_strategies_start_alike_and_see_the_same(data: JudgedData) -> None:
    """Whatever a strategy draws at random itself, its generator, its noise and its images are those of every other."""
    one, other = (Training(run_of(data, strategy), data) for strategy in ("nothing", "torch_spectral_norm"))
    assert torch.equal(*(nn.utils.parameters_to_vector(side.generator.parameters()) for side in (one, other)))
    assert torch.equal(one.noise.get_state(), other.noise.get_state())
    first, second = (next(batches(run_of(data, strategy), data)) for strategy in ("nothing", "r1"))
    assert torch.equal(first, second)


def test_batches_are_whole_and_pass_over_each_image_once_an_epoch(data: JudgedData) -> None:
    stream = batches(run_of(data, batch=100), data)
    epochs = [torch.cat([next(stream) for _ in range(3)]).flatten(1) for _ in range(2)]
    for epoch in epochs:
        assert len(epoch.unique(dim=0)) == len(torch.from_numpy(data.train.images).flatten(1).unique(dim=0))
    assert not torch.equal(*epochs)


def test_marks_are_even_and_a_trial_looks_at_the_last_three(data: JudgedData) -> None:
    run = run_of(data, steps=100, marks=5)
    assert marks_of(run) == [20, 40, 60, 80, 100]
    assert marks_of(replace(run, full=False)) == [60, 80, 100]
    result = train(run_of(data), data)
    assert result["distance"] == pytest.approx(sum(result["curve"]["distance"]) / 3)
    assert result["curve"]["samples"] == [32, 64, 96]


def test_what_is_drawn_to_be_judged_does_not_touch_the_training(data: JudgedData) -> None:
    training = Training(run_of(data), data)
    before = {name: value.clone() for name, value in training.generator.state_dict().items()}
    images, again = training.draw(30), training.draw(30)
    assert torch.equal(images, again) and images.shape == (30, 1, 8, 8)
    assert all(torch.equal(value, before[name]) for name, value in training.generator.state_dict().items())
    assert training.generator.training


def test_a_run_that_diverges_stops_and_is_worse_than_any_other(data: JudgedData) -> None:
    result = train(run_of(data, loss="wasserstein", lr=1e30), data)
    assert result["diverged"] and result["distance"] is None and result["steps"] < 6
    json.dumps(result, allow_nan=False)
    assert score([result]) < score([{"diverged": False, "distance": 1e9}])
    assert score([result, {"diverged": False, "distance": 0.1}]) < score([{"diverged": False, "distance": 9.0}] * 2)


def test_a_trial_is_judged_by_validation_and_a_reported_run_by_test(data: JudgedData) -> None:
    run = run_of(data)
    judge = data.judge
    swapped = {"validation": judge.references["test"], "test": judge.references["validation"]}
    other = replace(data, judge=replace(judge, references=swapped))
    trial, report = (train(replace(run, full=full), data)["distance"] for full in (False, True))
    assert trial != report
    assert (train(replace(run, full=True), other)["distance"], train(replace(run, full=False), other)["distance"]) == (trial, report)


def test_every_setting_is_in_the_key(data: JudgedData) -> None:
    run = run_of(data)
    others = {
        "strategy": "r1", "loss": "hinge", "lr": 0.2, "strengths": {"bound": 1.0}, "seed": 9, "steps": 9, "batch": 9, "width": 9,
        "marks": 9, "drawn": 9, "full": False, "data": "x", "versions": ("a", "b"),
    }  # fmt: skip
    assert others.keys() == asdict(run).keys()
    keys = {key_of(replace(run, **{name: value}).settings()) for name, value in others.items()}
    assert len(keys | {key_of(run.settings())}) == len(others) + 1


# ------------------------------------------------------------------------------------------------------------- results


def final(distances: list[float], **more: Any) -> dict[str, Any]:
    count = len(distances)
    curve = {"step": [10 * (k + 1) for k in range(count)], "distance": distances, "precision": [0.5] * count, "recall": [0.25] * count,
             "collapsed": [False] * count}  # fmt: skip
    return {"steps": 10 * count, "diverged": False, "breaches": [], "curve": curve} | more


def test_equal_time_is_the_last_mark_before_the_baselines_end() -> None:
    """Of 40 steps: at twice the time a step 20 are taken, at 1.4 times 28, whose last mark is 20; a cheaper step gains nothing."""
    run = final([4.0, 3.0, 2.0, 1.0])
    assert [tables.mark_in_time(run, ms, 5.0) for ms in (5.0, 10.0, 7.0, 4.0, 30.0)] == [3, 1, 1, 3, -1]


def test_a_cells_figures() -> None:
    gone = final([4.0], diverged=True, breaches=["w"])
    finals = [final([4.0, 3.0, 2.0, 1.0]), gone, final([4.0, 3.0, 2.5, 2.0])]
    trials = {(0.0, 0.0): [{"diverged": False, "distance": 1.0}]}
    cell = Cell("clip_value", "hinge", {"lr": 0.004, "bound": 0.05}, trials, finals, {})
    found = tables.cell_results(cell, 10.0, 5.0)
    assert found["distance"] == {"median": 2.0, "values": [1.0, None, 2.0]}
    assert found["distance_at_equal_time"] == {"median": 3.0, "values": [3.0, None, 3.0]}
    assert (found["collapsed"], found["diverged"], found["violations"]) == (1, 1, 1)
    assert found["precision"]["values"] == [0.5, 0.0, 0.5]
    assert "linf" in found["policy_yaml"] or "clip_weight_value" in found["policy_yaml"]
    row = tables.rows([found])[0]
    assert row["Fréchet, equal steps"] == "2.000 (1.000 to diverged)"
    assert row["strength"] == "bound 0.05"


def test_the_choice_is_the_best_mean_of_the_points_that_saw_both_seeds() -> None:
    def seen(*distances: float) -> list[dict[str, Any]]:
        return [{"diverged": False, "distance": distance} for distance in distances]

    trials = {(-1.0,): seen(1.0, 9.0), (0.0,): seen(2.0, 3.0), (1.0,): seen(4.0)}
    assert best_of({point: score(found[:1]) for point, found in trials.items()}, 2) == [(-1.0,), (0.0,)]
    assert choice(trials, score) == (0.0,)
    trials[0.0,][1] = {"diverged": True, "distance": None}
    assert choice(trials, score) == (-1.0,)


# ----------------------------------------------------------------------------------------------------------- the study


def lasting(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells without what is a time."""
    return [{k: v for k, v in cell.items() if k not in ("step_ms", "distance_at_equal_time")} for cell in found["cells"]]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train_judge", partial(train_judge, epochs=2))
        return study.study(ONE, budget=TINY)


def test_every_cell_has_the_same_trials_and_every_number_is_there(uninterrupted: dict[str, Any]) -> None:
    cells = uninterrupted["cells"]
    assert [(cell["strategy"], cell["loss"]) for cell in cells] == [("nothing", "hinge"), ("clip_value", "hinge")]
    assert {cell["trials"] for cell in cells} == {11}
    for cell in cells:
        assert len(cell["distance"]["values"]) == len(cell["curves"]) == 2
        assert cell["violations"] == 0 and cell["step_ms"] > 0
    assert json.loads(json.dumps(uninterrupted, allow_nan=False)) == json.loads(json.dumps(uninterrupted))
    assert 0.3 < uninterrupted["judge"]["accuracy"] <= 1
    assert uninterrupted["cost"] > 0
    stream = io.StringIO()
    study.show(uninterrupted, stream)
    for word in ("classifier is right on", "Fréchet, equal time", "weight clipping", "none", "64 samples"):
        assert word in stream.getvalue()


def test_a_study_that_is_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, Any]
) -> None:
    options, calls = replace(ONE, state=tmp_path / "state.jsonl"), []

    def interrupted_at(call: int) -> Any:
        def run(*given: Any) -> Any:
            calls.append(given[0])
            if len(calls) == call:
                raise KeyboardInterrupt
            return train(*given)

        return run

    for call in (4, 17):  # within the first grid, and in the second round
        calls.clear()
        monkeypatch.setattr(gan_run, "train", interrupted_at(call))
        with pytest.raises(KeyboardInterrupt):
            study.study(options, budget=TINY)
        assert len(calls) == call
    calls.clear()
    monkeypatch.setattr(gan_run, "train", interrupted_at(-1))
    assert lasting(study.study(options, budget=TINY)) == lasting(uninterrupted)
    assert len(calls) == 2 * (9 + 2 + 2) - 3 - 16  # what was finished before is not done again
    lines = [json.loads(line) for line in options.state.read_text().splitlines() if line] if options.state else []
    runs = [line["settings"] for line in lines if line["settings"]["kind"] == "gan"]
    assert len(runs) == 26
    assert {run["seed"] for run in runs if run["full"]} == {0, 1}
    assert [sum(run["seed"] == seed for run in runs) for seed in (TUNING_SEED, AGAIN_SEED)] == [18, 4]


@pytest.mark.long
def test_two_workers_give_what_one_gives(uninterrupted: dict[str, Any]) -> None:
    assert lasting(study.study(replace(ONE, workers=2), budget=TINY)) == lasting(uninterrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "quik"}, "There is no budget 'quik'. Did you mean 'quick'?"),
        ({"only": ("spectralcap",)}, "There is no strategy or loss 'spectralcap'. Did you mean 'spectral_cap'?"),
        ({"only": ("hinges",)}, "There is no strategy or loss 'hinges'. Did you mean 'hinge'?"),
        ({"only": ()}, "No strategy or loss was given; name one or more of nothing, "),
        ({"seeds": 0}, "seeds is 0"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_run(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(study, "train_judge", lambda *given: pytest.fail("work was begun"))
    with pytest.raises(StudyError, match=message.replace("?", r"\?")):
        study.study(replace(Options(), **change))


def test_the_budgets_fill_the_first_grid_and_the_issue_is_covered() -> None:
    for budget in BUDGETS.values():
        assert budget.trials >= len(lattice.start(1)) == len(lattice.start(3))
    standard = study.cells_of([], BUDGETS["standard"])
    assert len(standard) == len(LOSSES) * len(STRATEGIES) == 27
    assert BUDGETS["standard"].seeds >= 5
    assert {"nothing", "clip_value", "spectral_cap", "spectral_normalize", "gradient_penalty", "spectral_cap+gradient_penalty"} <= set(
        STRATEGIES
    )
    assert all(math.isfinite(float(axis.values[0])) and len({a.name for a in one.tuned}) == len(one.tuned) for one in STRATEGIES.values()
               for axis in one.tuned)  # fmt: skip


def test_the_page_tells_the_protocol_that_is_run() -> None:
    page = (Path(__file__).parent.parent / "docs" / "gan.md").read_text()
    for strategy in STRATEGIES.values():
        assert f"\n| {strategy.label} |" in page
    for loss in LOSSES.values():
        assert f"\n| {loss.label} |" in page
        assert f"| {loss.betas[0]:g}, {loss.betas[1]:g} |" in page
    plan = BUDGETS["standard"]
    assert f"{plan.trials} + {plan.again} trials, {plan.steps} steps of {plan.batch} images" in page


def test_gradients_of_the_generators_step_leave_the_discriminator_alone(data: JudgedData) -> None:
    training = Training(run_of(data), data)
    seen: list[Tensor] = []
    generate = training._generate

    def watched(drawn: Tensor) -> float:
        before = [p.grad.clone() for p in training.discriminator.parameters() if p.grad is not None]
        value = generate(drawn)
        seen.extend(b - p.grad for b, p in zip(before, training.discriminator.parameters(), strict=True) if p.grad is not None)
        return value

    training._generate = watched  # type: ignore[method-assign]
    training.step(next(batches(run_of(data), data)))
    assert seen and all(bool((difference == 0).all()) for difference in seen)
