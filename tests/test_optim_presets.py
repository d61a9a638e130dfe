"""Presets are classes that trainers, configuration tools, type checkers and pickles take; and Muon is torch's by its own names."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.optim import PRESETS, AdamW, Muon, NormOptimizer, Ridge, auto
from test_optim_contract import loss_of, model, saved_and_loaded, train
from test_optim_parity import MATRICES, drive, gradients, weights

EVERY = {**PRESETS, "auto": auto}
every = pytest.mark.parametrize("preset", list(EVERY.values()), ids=list(EVERY))


def options(preset: type[NormOptimizer]) -> dict[str, inspect.Parameter]:
    """The arguments by name, ``self`` left out."""
    return dict(list(inspect.signature(preset.__init__).parameters.items())[1:])


# ---------------------------------------------------------------------------------------------------------- classes


@every
def test_a_preset_is_a_class_and_its_copies_are_of_it(preset: type[NormOptimizer]) -> None:
    net = model()
    optimizer = preset(net)
    assert type(optimizer) is preset and isinstance(optimizer, NormOptimizer) and isinstance(optimizer, torch.optim.Optimizer)
    train(net, optimizer, range(1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is preset and twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    again = type(optimizer)(model(), **({} if preset is auto else {"lr": 0.125}))
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert not isinstance(optimizer, Muon) or preset is Muon
    assert isinstance(optimizer, Ridge) == (preset in (Ridge, auto))


@every
def test_every_option_is_named_typed_and_documented(preset: type[NormOptimizer]) -> None:
    """One line or more of ``Args:`` for each argument and none for another, in the signature's order."""
    found = options(preset)
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in found.values()), "an option without a name"
    assert all(p.annotation not in (p.empty, "Any") for p in found.values())
    assert all(p.default is not p.empty for name, p in found.items() if name != "params")
    summary, _, rest = inspect.getdoc(preset).partition("\n\nArgs:\n")    # type: ignore[union-attr]
    assert re.findall(r"^    (\w+): \S", rest, re.MULTILINE) == list(found)
    assert preset in (nw.optim.SGD, Ridge, auto) or re.search(r"\d{4}", summary), "a source with its year"


@every
def test_a_misspelt_option_is_an_error_that_names_the_nearest(preset: type[NormOptimizer]) -> None:
    for name in options(preset):
        wrong = name[:-1] + name[-1] * 2
        with pytest.raises(nw.PolicyError, match=rf"{preset.__name__} has the unknown option '{wrong}'. Did you mean '{name}'\?"):
            preset(model(), **{wrong: 0})


@pytest.mark.parametrize("name", ["direction", "act", "norm", "scale"])
def test_what_makes_a_method_is_no_option_of_it(name: str) -> None:
    with pytest.raises(nw.PolicyError, match=rf"Muon has {name}='x', and its {name} is what makes it Muon: .*override="):
        Muon(model(), **{name: "x"})


# ---------------------------------------------------------------------------------------------------------- torch's Muon


def test_muons_signature_is_torchs() -> None:
    """Its names in its order, by position too; defaults are torch's but for two, which the page names."""
    theirs = list(inspect.signature(torch.optim.Muon.__init__).parameters.values())[1:]
    ours = list(options(Muon).values())[: len(theirs)]
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    other = {a.name: (a.default, b.default) for a, b in zip(ours, theirs, strict=True) if a.default != b.default}
    assert other == {"lr": (0.02, 1e-3), "weight_decay": (0.01, 0.1)}


TORCHS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "lr": {"lr": 0.1},
    "weight_decay": {"weight_decay": 0.9},
    "momentum": {"momentum": 0.3},
    "nesterov": {"nesterov": False},
    "ns_coefficients": {"ns_coefficients": (1.5, -0.5, 0.0)},
    "eps": {"eps": 0.5},
    "ns_steps": {"ns_steps": 1},
    "adjust_lr_fn": {"adjust_lr_fn": "match_rms_adamw"},
    "original": {"adjust_lr_fn": "original"},
    **({"unclamped": {"adjust_lr_fn": "spectral_unclamped"}} if "spectral_unclamped" in inspect.getsource(torch.optim._muon) else {}),
    "all": {
        "lr": 0.05, "weight_decay": 0.3, "momentum": 0.6, "nesterov": False, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 0.2,
        "ns_steps": 7, "adjust_lr_fn": "match_rms_adamw",
    },
}  # fmt: skip


def test_every_option_of_torchs_muon_is_compared() -> None:
    assert set(TORCHS) >= set(inspect.signature(torch.optim.Muon.__init__).parameters) - {"self", "params"}


BASE = {"lr": 0.02, "weight_decay": 0.1}


@pytest.mark.parametrize("name", TORCHS)
def test_muon_is_torchs_step_for_step_under_every_option(name: str) -> None:
    """fp32 weights, both iterations in bf16, whose rounding is what is left between them: up to a tenth of a step."""
    ours, theirs = weights(MATRICES, torch.float32), weights(MATRICES, torch.float32)
    a, b = Muon(ours, **BASE | TORCHS[name]), torch.optim.Muon(theirs, **BASE | TORCHS[name])
    for step in gradients(MATRICES, 8, torch.float32):
        before = [p.detach().clone() for p in theirs]
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q.data)    # each step by itself, so that differences do not add up
        for x, y, w in zip(drive(a, ours, [step]), drive(b, theirs, [step]), before, strict=True):
            assert (x - y).norm() < 0.12 * (y - w).norm(), name


@pytest.mark.parametrize("name", TORCHS)
def test_without_rounding_to_bf16_muon_is_torchs_to_the_last_digits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own code, its cast to bf16 left out, in float64; and every option does something."""
    cast = Tensor.to    # torch 2.15's way
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    monkeypatch.setattr(Tensor, "to", lambda t, *a, **k: t.clone() if k.get("dtype") is torch.bfloat16 else cast(t, *a, **k))
    grads, (ours, theirs, usual) = gradients(MATRICES, 8), [weights(MATRICES) for _ in range(3)]
    want = drive(torch.optim.Muon(theirs, **BASE | TORCHS[name]), theirs, grads)
    for x, y in zip(drive(Muon(ours, **BASE | TORCHS[name]), ours, grads), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    other = drive(torch.optim.Muon(usual, **BASE), usual, grads)
    apart = sum(float((y - z).norm()) for y, z in zip(want, other, strict=True))
    assert apart > (0.03 if name == "unclamped" else 0.05) or name in ("as it is", "original")


def test_what_newer_torchs_call_unclamped_is_known_to_all() -> None:
    ours, same = weights(MATRICES), weights(MATRICES)
    grads = gradients(MATRICES, 3)
    steps = [drive(Muon(w, 0.02, adjust_lr_fn=name), w, grads) for w, name in ((ours, "spectral_unclamped"), (same, "rms_rms"))]
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_steps_and_coefficients_are_the_iteration_to_the_last_digit() -> None:
    """In float64, where nothing but the order of sums is left."""
    w = weights([(6, 4)])[0]
    start, g = w.detach().clone(), gradients([(6, 4)], 1)[0][0]
    a, b, c = 2.0, -1.5, 0.5
    y = 0.05 * (1 + 0.95) * g
    y = y / max(float(y.norm()), 0.7)
    for _ in range(3):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    drive(Muon([w], 0.1, 0.0, ns_coefficients=(a, b, c), eps=0.7, ns_steps=3), [w], [[g]])
    torch.testing.assert_close(w.detach(), start - 0.1 * (6 / 4) ** 0.5 * y, rtol=1e-12, atol=1e-12)


def test_an_iteration_of_ones_own_is_a_column_and_survives_a_checkpoint() -> None:
    net, other = model(), model()
    optimizer = Muon(net, ns_steps=2)
    assert optimizer.param_groups[0]["polar"] == ((3.4445, -4.775, 2.0315),) * 2
    train(net, optimizer, range(2))
    resumed = Muon(other)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    other.load_state_dict(net.state_dict())
    train(net, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ns_steps": 0}, "ns_steps=0: three numbers are needed, and 1 to 99 steps"),
        ({"ns_steps": 100}, "ns_steps=100"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients=\(1.0, 2.0\)"),
        ({"ns_steps": 3, "polar": "fast"}, "polar='fast' has steps of its own"),
        ({"eps": 0.1, "polar": "fast"}, "eps=0.1, which no part of it uses"),
        ({"polar": ((1.0, 2.0),)}, "polar="),
        ({"adjust_lr_fn": "match"}, "adjust_lr_fn is 'match'. Did you mean 'match_rms_adamw'"),
    ],
)
def test_options_of_muon_that_mean_nothing_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Muon(model(), **given)


def test_a_step_of_ones_own_may_stand_in_polar() -> None:
    a, b = model(), model()
    train(a, Muon(a, polar=((3.4445, -4.775, 2.0315),) * 3), range(2))
    train(b, Muon(b, ns_steps=3), range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------- trainers


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x.sum()}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.head(self.norm(self.up(x)).relu())[:, 0]
        return {"loss": (out - labels).square().mean(), "logits": out}


@pytest.mark.parametrize("preset", [Muon, *(pytest.param(build, marks=pytest.mark.long) for build in (auto, AdamW))])
def test_the_trainer_of_transformers_takes_class_and_options(preset: type[NormOptimizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = Regression()
    given = {} if preset is auto else {"lr": 0.01}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=net, args=args, train_dataset=Rows(), optimizer_cls_and_kwargs=(preset, {"params": net, **given})
    )
    before = copy.deepcopy(net)
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(inner) is preset and inner.routing.of["up.weight"] in ("muon", "ridge", "adamw")
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))


def test_the_trainer_of_transformers_gives_its_groups_where_no_model_is_given(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    net = Regression()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, weight_decay=0.25
    )
    trainer = transformers.Trainer(model=net, args=args, train_dataset=Rows(), optimizer_cls_and_kwargs=(AdamW, {"lr": 0.01}))
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(inner) is AdamW and sorted({g["weight_decay"] for g in inner.param_groups}) == [0.0, 0.25]


LIGHTNING = """
import sys, torch, lightning
from torch import nn
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
import normwise as nw

class Net(lightning.LightningModule):
    def __init__(self, optimizer: OptimizerCallable = nw.optim.auto):
        super().__init__()
        self.net, self.make = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)), optimizer
    def training_step(self, x, _):
        return self.net(x[0]).square().mean()
    def configure_optimizers(self):
        return self.make(self.net)

class Plain(Net):
    def __init__(self):
        super().__init__()
    configure_optimizers = lightning.LightningModule.configure_optimizers

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), 4)
quiet = dict(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
cli = LightningCLI(PLAIN and Plain or Net, trainer_defaults={**quiet, "accelerator": "cpu"}, save_config_callback=None,
                   run=False, args=ARGS)
cli.trainer.fit(cli.model, data)
[made] = cli.trainer.optimizers
print(type(made).__name__, made.param_groups[0]["lr"], made.param_groups[0]["eps"], made.routing is not None)
"""


@pytest.mark.parametrize(
    ("plain", "args", "says"),
    [
        pytest.param(
            False, ["--model.optimizer=normwise.optim.Muon", "--model.optimizer.lr=0.5", "--model.optimizer.eps=0.25"],
            "Muon 0.5 0.25 True", marks=pytest.mark.long,
        ),
        pytest.param(
            True, ["--optimizer=normwise.optim.AdamW", "--optimizer.lr=0.125"], "AdamW 0.125 1e-08 False", marks=pytest.mark.long,
        ),
    ],
)
def test_the_command_line_of_lightning_reads_the_signature(plain: bool, args: list[str], says: str) -> None:
    pytest.importorskip("jsonargparse")
    pytest.importorskip("lightning")
    script = LIGHTNING.replace("PLAIN", str(plain)).replace("ARGS", repr(args))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [says], done.stdout + done.stderr


@every
def test_jsonargparse_reads_every_option_and_its_help(preset: type[NormOptimizer]) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(preset, "o", skip={"params"})
    text = " ".join(parser.format_help().split())
    for name in options(preset).keys() - {"params"}:
        assert f"--o.{name}" in text
    assert "rules that run inside the step" in text
    if preset is not auto:
        assert parser.parse_args(["--o.lr=0.5"]).o.lr == 0.5


def test_hydra_instantiates_a_preset() -> None:
    utils = pytest.importorskip("hydra.utils")
    net = model()
    made = utils.instantiate({"_target_": "normwise.optim.Muon", "lr": 0.5, "adamw": {"lr": 0.25}}, net)
    assert type(made) is Muon and [g["lr"] for g in made.param_groups] == [0.5, 0.25, 0.25]
    part = utils.instantiate({"_target_": "normwise.optim.auto", "_partial_": True})
    loss_of(net, 0).backward()
    part(net).step()
