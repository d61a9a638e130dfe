"""``normwise recipe``: figures against what they are said to be, equal trials, an interruption that changes nothing, tables, bad input."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normwise as nw
from normwise import cli
from normwise.experiments.cells import Cell
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.study import TUNING_SEED, Options
from normwise.experiments.recipes import finetune, plasticity, quantise, spikes, study, tables
from normwise.experiments.recipes.finetune import FinetuneRun, Texts, texts
from normwise.experiments.recipes.plasticity import PlasticityRun, Shuffled, shuffled
from normwise.experiments.recipes.quantise import Pictures, QuantiseRun, pictures, quantised
from normwise.experiments.recipes.recipe import BASELINE, CONTENDER
from normwise.experiments.recipes.spikes import SpikesRun
from normwise.experiments.recipes.study import RECIPES, Budget
from normwise.experiments.tasks.text import TextTask

TINY = Budget(trials=9, share=0.02, seeds=2)
STRENGTHS = {"strength": 0.1, "k": 1.0, "max_norm": 0.05, "z": 0.5, "percentile": 10.0, "tau": 1e-3, "r": 1e-3, "c": 1.0}


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "PRETRAINING", 4)
    monkeypatch.setattr(finetune, "LOOKS", 2)
    monkeypatch.setattr(plasticity, "EPOCHS", 2)


@pytest.fixture(scope="module")
def digits() -> Shuffled:
    return shuffled(None)


@pytest.fixture(scope="module")
def both() -> Texts:
    """Judged by little text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "JUDGED", 200)
        return texts(None)


@pytest.fixture(scope="module")
def text(both: Texts) -> TextTask:
    return both.first


@pytest.fixture(scope="module")
def full(both: Texts) -> dict[str, Any]:
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "PRETRAINING", 4)
        patch.setattr(finetune, "LOOKS", 2)
        return FinetuneRun("full", {"lr": 3e-3}, 1, 4, False, both.key).train(both)


def numbers(arms: Any, arm: str, lr: float = 3e-3) -> dict[str, float]:
    return {"lr": lr} | {axis.name: STRENGTHS[axis.name] for axis in arms[arm].axes}


# ------------------------------------------------------------------------------------------------------------ the runs


def test_plasticity_is_the_loop_written_out(digits: Shuffled) -> None:
    found = PlasticityRun("l2_init", {"lr": 0.01, "strength": 0.1}, 3, 3, True, digits.key).train(digits)
    torch.manual_seed(3)
    chance = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    start = [p.detach().clone() for p in model.parameters()]
    adam, seen, ends = torch.optim.Adam(model.parameters(), 0.01), [], []
    for _ in range(3):
        labels, right = torch.randint(10, (256,), generator=chance), 0
        for _ in range(2):
            for rows in torch.randperm(256, generator=chance).split(32):
                logits = model(digits.images[rows])
                right += int((logits.argmax(1) == labels[rows]).sum())
                model.zero_grad()
                pull = sum(((p - s) ** 2).sum() for p, s in zip(model.parameters(), start, strict=True))
                (nn.functional.cross_entropy(logits, labels[rows]) + 0.05 * pull).backward()
                adam.step()
        seen.append(right / 512)
        ends.append((model(digits.images).argmax(1) == labels).double().mean().item())
    assert found["first"] == pytest.approx(seen[0], abs=0.01)
    assert found["last"] == pytest.approx(np.mean(seen), abs=0.01)
    assert found["end"] == pytest.approx(np.mean(ends), abs=0.02)
    hidden = model[:2](digits.images), model[:4](digits.images)
    assert found["dead"] == pytest.approx(np.mean([(h.amax(0) == 0).double().mean().item() for h in hidden]), abs=0.02)
    length, before = (sum(p.double().square().sum().item() for p in side) ** 0.5 for side in (model.parameters(), start))
    assert found["norm"] == pytest.approx(length / before, rel=1e-3)


def test_a_bad_batch_is_one_character_with_ten_times_the_loss(text: TextTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the loss: all good until a tenth of the run, then about as many bad ones as stated, none without bad batches."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    loss = text.loss

    def watched(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch)
        return loss(model, batch)

    monkeypatch.setattr(text, "loss", watched)
    monkeypatch.setattr(spikes, "SHARE", 0.5)
    SpikesRun("nothing", {"lr": 1e-3}, 5, 40, False, text.key).train(text)
    given = list(itertools.islice(text.batches(spikes.BATCH, 5), 40))
    bad = [not torch.equal(answers, given[k][1]) for k, (_, answers) in enumerate(seen)]
    assert not any(bad[:4]) and 10 <= sum(bad) <= 26
    assert all(len(answers.unique()) == 1 for (_, answers), is_bad in zip(seen, bad, strict=True) if is_bad)
    assert all(torch.equal(inputs, given[k][0]) for k, (inputs, _) in enumerate(seen))
    seen.clear()
    SpikesRun("clean", {"lr": 1e-3}, 5, 40, False, text.key).train(text)
    assert all(torch.equal(answers, given[k][1]) for k, (_, answers) in enumerate(seen))


def test_skipping_is_its_formula_and_forgets_what_it_skipped() -> None:
    layer, skips = nn.Linear(3, 1, bias=False), spikes.Skipping({"z": 3.0})
    lengths = [*np.random.default_rng(0).uniform(1, 2, 40), 50.0, 1.5, 60.0]
    taken: list[float] = []
    for length in lengths:
        layer.weight.grad = torch.tensor([[length, 0.0, 0.0]], dtype=torch.float32)
        past = taken[-128:]
        wanted = len(past) < 25 or length <= np.mean(past) + 3.0 * np.std(past, ddof=1)
        assert skips.takes(layer) == wanted
        taken += [length] if wanted else []
    assert skips.count == 2


def test_the_reported_logits_are_those_of_the_attention(text: TextTask) -> None:
    torch.manual_seed(0)
    model = text.build()
    control = nw.attach(model, torch.optim.SGD(model.parameters(), 1.0), spikes.ARMS["qk_clip"].rules({"tau": 1e-9}))
    told: dict[Any, torch.Tensor] = {}
    control.report_max_logits = lambda attention, maxima: told.update({attention: maxima})    # type: ignore[method-assign]
    spikes.reports(model, control)
    inputs, _ = next(text.batches(4, 0))
    model(inputs)
    first = model.blocks[0]
    x = first.norm1(model.tokens(inputs) + model.places.weight[: inputs.shape[1]]).double()
    for head in range(4):
        rows = slice(12 * head, 12 * head + 12)
        q, k = (x @ layer.weight[rows].double().T for layer in (first.attention.q, first.attention.k))
        largest = max((q[n, i] @ k[n, j]).item() for n in range(4) for i in range(48) for j in range(i + 1)) / math.sqrt(12)
        assert told[first.attention][head].item() == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("arm", [name for name, arm in spikes.ARMS.items() if name not in ("nothing", "clean")])
def test_every_arm_against_spikes_acts(text: TextTask, arm: str) -> None:
    given = numbers(spikes.ARMS, arm) | ({"z": 1.0} if arm == "skip" else {})
    # Enough steps lie behind the warm-up of the averages, some of them spoilt, and under zclip_update while the rate is still high.
    found = SpikesRun(arm, given, 1, 120 if arm == "zclip_update" else 80, False, text.key).train(text)
    assert found["acted"] > 0


@pytest.mark.parametrize("arm", [name for name, arm in plasticity.ARMS.items() if arm.role == CONTENDER])
def test_every_arm_for_plasticity_acts(digits: Shuffled, arm: str) -> None:
    found = PlasticityRun(arm, numbers(plasticity.ARMS, arm, 0.03), 1, 1, False, digits.key).train(digits)
    assert found["acted"] > 0


@pytest.fixture(scope="module")
def parts() -> Pictures:
    return pictures(None)


@pytest.mark.parametrize("arm", quantise.ARMS)
def test_quantisation_is_the_loop_written_out(parts: Pictures, arm: str) -> None:
    """An arm's accuracies are those of a network that is trained by hand under the same rules, its entries rounded one by one."""
    given = {"lr": 0.02, "k": 1.0, "strength": 1.0}
    given = {"lr": 0.02} | {axis.name: given[axis.name] for axis in quantise.ARMS[arm].axes}
    found = QuantiseRun(arm, given, 5, 20, True, parts.key).train(parts)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = parts.parts.tensors("train")
    adam = torch.optim.Adam(model.parameters(), 0.02)
    if rules := quantise.ARMS[arm].rules(given):
        nw.attach(model, adam, rules)
    for _ in range(20):
        rows = torch.randint(len(images), (32,))
        model.zero_grad()
        nn.functional.cross_entropy(model(images[rows].flatten(1)), labels[rows]).backward()
        adam.step()
    tests, true = parts.parts.tensors("test")
    assert found["before"] == pytest.approx(float((model(tests.flatten(1)).argmax(1) == true).double().mean()), abs=0.006)
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    kept = [w.detach().clone().double() for w in weights]
    for most, figure in ((3, "three"), (7, "four")) if arm != "scale" else ():
        for p, w in zip(weights, kept, strict=True):
            levels = torch.arange(-most, most + 1).double() * w.abs().max() / most
            p.data = levels[(w.unsqueeze(-1) - levels).abs().argmin(-1)].float()
        assert found[figure] == pytest.approx(float((model(tests.flatten(1)).argmax(1) == true).double().mean()), abs=0.006)
    if arm != "scale":
        off = torch.cat([(p.detach().double() - w).flatten() for p, w in zip(weights, kept, strict=True)]).norm()
        assert found["error"] == pytest.approx(float(off / torch.cat([w.flatten() for w in kept]).norm()), rel=1e-3)
    assert (found["acted"] > 0) == (quantise.ARMS[arm].role == CONTENDER)


def test_a_searched_scale_rounds_no_worse_and_levels_are_as_many_as_bits_allow() -> None:
    w = torch.randn(40, 30) * torch.randn(40, 1).exp()
    for bits in (3, 4):
        plain, searched = quantised(w, bits), quantised(w, bits, searched=True)
        assert len(plain.unique()) <= 2**bits - 1 and len(searched.unique()) <= 2**bits - 1
        assert (searched - w).norm() < (plain - w).norm()


@pytest.mark.parametrize("arm", [name for name in finetune.ARMS if name != "full"])
def test_every_arm_of_fine_tuning_changes_the_run(both: Texts, full: dict[str, Any], arm: str) -> None:
    found = FinetuneRun(arm, numbers(finetune.ARMS, arm), 1, 4, False, both.key).train(both)
    assert found["second 0.05"] != full["second 0.05"]
    assert found["acted"] > 0 or finetune.ARMS[arm].role == BASELINE


def test_a_level_of_forgetting_takes_the_best_point_within_it(both: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two looks; from the start where the first look is beyond; after a look beyond, where the run comes back."""
    looks = [(2.0, 5.0), (2.02, 4.0), (2.08, 3.0), (2.3, 1.0)]
    told, asked = iter(looks), []

    def losses(context: Texts, model: nn.Module, part: str) -> tuple[float, float]:
        asked.append(part)
        return next(told)

    monkeypatch.setattr(finetune, "LOOKS", 3)
    monkeypatch.setattr(finetune, "losses", losses)
    found = FinetuneRun("full", {"lr": 1e-3}, 0, 3, True, both.key).train(both)
    assert [found[name] for name in FinetuneRun.figures] == pytest.approx([3.5, 0.05, 3.0 - 2 * 0.02 / 0.22, 0.1])
    assert asked == ["test"] * 4
    assert finetune.best_within(looks, 2.1) == pytest.approx((2.1, 3.0 - 2 * 0.02 / 0.22))
    assert finetune.best_within([(0.0, 5.0), (0.5, 1.0)], 0.05) == pytest.approx((0.05, 4.6))
    assert finetune.best_within([(0.0, 5.0), (0.5, 1.0), (0.02, 2.0)], 0.05)[1] == pytest.approx(1.0 + 0.45 / 0.48)
    assert finetune.best_within([(0.0, 5.0), (0.02, 2.0), (0.04, 3.0)], 0.05) == (0.02, 2.0)
    assert finetune.best_within([(0.0, 5.0), (-0.1, 6.0)], 0.05) == (0.0, 5.0)


def test_every_arm_starts_from_the_same_weights_and_leaves_them_alone(both: Texts) -> None:
    before = nn.utils.parameters_to_vector(both.start(2).parameters()).clone()
    FinetuneRun("full", {"lr": 0.1}, 2, 2, False, both.key).train(both)
    FinetuneRun("lora", {"lr": 0.1}, 2, 2, False, both.key).train(both)
    assert torch.equal(nn.utils.parameters_to_vector(both.start(2).parameters()), before)
    code = "".join(both.first.data.vocabulary[k] for k in both.second.data.train[:2000])
    assert "# Author: Steven J. Bethard" in code, "the second text is spelt in the first one's vocabulary"


def test_a_run_is_decided_by_its_settings_alone(both: Texts) -> None:
    """LoRA draws its A, which must not depend on what was drawn before."""
    run = FinetuneRun("lora", {"lr": 0.01}, 4, 2, False, both.key)
    first = run.train(both)
    torch.rand(7)
    assert {**run.train(both), "seconds": 0} == {**first, "seconds": 0}


# ----------------------------------------------------------------------------------------------------------- the study


def lasting(results: dict[str, Any]) -> dict[str, Any]:
    return {**results, "machine": 0, "seconds": 0}


def test_a_stopped_study_ends_as_the_command_that_was_not_with_equal_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plasticity, "EPOCHS", 1)
    ask = Options("plasticity", only=("project",), state=tmp_path / "runs.jsonl")
    train, done = PlasticityRun.train, []

    def stops(self: PlasticityRun, context: Any) -> Any:
        done.append(self)
        if len(done) == 20:
            raise KeyboardInterrupt
        return train(self, context)

    monkeypatch.setattr(PlasticityRun, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        study.study(ask, budget=TINY)
    results = study.study(ask, budget=TINY)
    assert len(done) == 5 * 11 + 1, "the one that was stopped, and no other, was done again"
    assert {cell["trials"] for cell in results["cells"]} == {9}
    assert [cell["arm"] for cell in results["cells"]] == ["nothing", "l2_init", "shrink", "layer_norm", "project"]
    monkeypatch.setattr(PlasticityRun, "train", train)
    monkeypatch.setitem(study.BUDGETS, "quick", TINY)
    assert lasting(commanded("plasticity", "project", tmp_path, capsys)) == lasting({**results, "budget": "quick"})
    assert {run.seed for run in done if run.full} == {0, 1} and {run.seed for run in done if not run.full} == {TUNING_SEED}


def commanded(name: str, only: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The results of the command on a quick budget, whose table, file and page are looked at."""
    command = ["recipe", name, "--budget", "quick", "--only", only, "--workers", "1", "--json", str(folder / "r.json"),
               "--report", str(folder / "page")]  # fmt: skip
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "the best baseline" in out and "2 others" in out
    assert RECIPES[name].arms[only].label in (folder / "page" / "index.html").read_text()
    results: dict[str, Any] = json.loads((folder / "r.json").read_text())
    assert {len(figure["values"]) for one in results["cells"] for figure in one["figures"].values()} == {2}
    return results


def cell(arm: str, losses: list[float | None], group: str = "") -> Cell:
    finals = [{"loss": loss, "worst": 3.0, "acted": 1, "seconds": 1.0} for loss in losses]
    return Cell(arm, group, numbers(spikes.ARMS, arm), {(0.0,): [finals[0]]}, finals, {"on_edge": [], "fades_out": []})


def test_tables_say_what_was_undone_and_claim_only_what_does_not_overlap() -> None:
    cells = [cell("nothing", [3.0, 3.2, 3.4]), cell("clean", [2.0, 2.0, 2.0]), cell("clip", [2.5, 2.6, 2.7]),
             cell("zclip", [2.1, 2.2, 2.3]), cell("qk_clip", [3.5, None, None])]  # fmt: skip
    results = {"recipe": "spikes", "cells": tables.results_of(RECIPES["spikes"], cells)}
    [said] = tables.verdicts(results)
    assert said == "test loss: 2.200 (2.100 to 2.300) with ZClip, 2.600 (2.500 to 2.700) with clipping, the best baseline."
    rows = {row["arm"]: row for row in tables.groups(results)[""]}
    assert list(rows) == ["no bad batches", "ZClip", "clipping", "nothing", "QK-clip"]
    assert rows["clipping"]["of the harm undone"] == "0.50 (0.50 to 0.50)"
    assert rows["nothing"]["of the harm undone"] == "0.00 (0.00 to 0.00)"
    assert rows["no bad batches"]["of the harm undone"] == "1.00 (1.00 to 1.00)"
    assert rows["QK-clip"]["test loss"] == "diverged"
    json.dumps(results, allow_nan=False)
    cells[3] = cell("zclip", [2.1, 2.2, 2.6])
    assert "no difference" in tables.verdicts({"cells": tables.results_of(RECIPES["spikes"], cells)})[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["plasticity", "spikes"])
def test_two_workers_give_what_one_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()    # the other worker's epochs are not shortened
    one, two = (study.study(Options(name, only=("zclip" if name == "spikes" else "spectral_cap",), workers=n), budget=TINY) for n in (1, 2))
    assert lasting(one) == lasting(two)


@pytest.mark.long
@pytest.mark.parametrize("name", ["spikes", "finetune"])
def test_the_command_writes_table_results_and_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(study.BUDGETS, "quick", TINY)
    only = next(arm for arm in RECIPES[name].arms if RECIPES[name].arms[arm].role == CONTENDER)
    assert commanded(name, only, tmp_path, capsys)["recipe"] == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("plastic", "There is no recipe 'plastic'. Did you mean 'plasticity'?"), ("spikes --budget quik", "Did you mean 'quick'?"),
     ("spikes --only zclop", "There is no arm 'zclop'. Did you mean 'zclip'?"), ("plasticity --data /no/such", "found nothing"),
     ("spikes --seeds 0", "whole number")],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipe", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_the_page_has_every_arm_as_it_is_run() -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    for recipe in RECIPES.values():
        assert len([arm for arm in recipe.arms.values() if arm.role == BASELINE]) >= 3
        for arm in recipe.arms.values():
            assert f"\n| {arm.label} |" in page
    assert study.BUDGETS["standard"].seeds >= 5 and plasticity.PLASTICITY.size >= 50
    assert study.BUDGETS["standard"].trials == 10, "the page says ten points"
