"""Hugging Face's Trainer trains under rules and by presets: attached before states load, logged in its own loggers, never clipped twice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import normwise as nw
import trainer_cases
from trainer_cases import CUT, STEPS, difference, gpt2, trained, trainer

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
attach, optimizer = nw.integrations.transformers.attach, nw.integrations.transformers.optimizer
long = pytest.mark.long


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("preset", "options"), [
    pytest.param("", {}, id="adamw", marks=long),
    pytest.param("auto", {"gradient_accumulation_steps": 2, "bf16": True}, id="auto, accumulation, bf16"),
    pytest.param("Muon", {"logging_strategy": "epoch"}, id="Muon", marks=long),
    pytest.param("", {"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="compiled", marks=long),
    pytest.param("", {"optim": "adamw_torch"}, id="not fused", marks=long),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(preset: str, options: dict[str, Any], tmp_path: Path) -> None:
    def run(seed: int, resume: bool) -> tuple[Any, Any]:
        return trained(tmp_path, seed, resume, optimizer=optimizer(preset) if preset else None, **options)

    whole, rules = run(0, False)
    resumed, again = run(5, True)
    assert difference(whole.model, resumed.model) == 0.0
    assert rules.control.steps == again.control.steps == STEPS and rules.control.verify() and again.control.verify()


@long
@pytest.mark.parametrize(("how", "preset"), [("ddp", ""), ("fsdp2", ""), ("fsdp2", "auto"), ("fsdp2", "MuonH")])
def test_on_two_processes(how: str, preset: str, tmp_path: Path) -> None:
    """By gloo. Accelerate replaces the parameters in the optimizer when it shards a model: rules and rows act on the new ones."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", trainer_cases.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, how, preset, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["difference"] == 0.0 and found["held"] and found["steps"] == [STEPS, STEPS]
    assert found["sharded"] == (how == "fsdp2") and (how == "fsdp2" or found["wrapped"] == "DistributedDataParallel")
    assert len(found["logged"]) == STEPS // 2 and found["logged"][-1] == pytest.approx(found["total"], rel=1e-6)
    if preset:
        assert "8 matrices" in found["receipt"] or preset == "auto"
        assert "2 embeddings, 1 head" in found["receipt"]


def test_train_twice_goes_on_under_the_same_control_and_a_new_model_gets_a_new_one(tmp_path: Path) -> None:
    made, rules = trained(tmp_path, given=[nw.max_norm(0.3)], save_strategy="no", max_steps=2)
    first = rules.control
    made.train()
    assert rules.control is first and first.steps == 4 and first.verify()
    made, rules = trained(tmp_path, given=[nw.max_norm(0.3)], kind="model_init", save_strategy="no", max_steps=2)
    first = rules.control
    made.train()
    assert rules.control is not first and rules.control.steps == 2 and rules.control.verify() and not first._handles


@long
def test_rules_that_are_removed_do_not_act(tmp_path: Path) -> None:
    made, rules = trained(tmp_path, given=[nw.max_norm(0.3)], save_strategy="no", max_steps=2)
    rules.remove()
    made.train()
    assert rules.control.steps == 2 and rules not in made.callback_handler.callbacks
    attach(made, nw.max_norm(0.2))


# ------------------------------------------------------------------------------------------------------------- presets


def test_a_preset_gets_the_model_and_so_its_roles(tmp_path: Path) -> None:
    """Lists of parameters, which the Trainer's own optimizers get, tell no roles. A run is the loop by hand with the model given."""

    class InOrder(transformers.Trainer):    # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    options = {"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    exact = {"lr": 0.01, "polar": "exact"}    # an iteration in bf16 makes much of the last bit of a gradient
    made = trainer(tmp_path, optimizer=optimizer("Muon", **exact), kind=InOrder, **options)
    made.train()
    model = gpt2()
    by_hand = nw.optim.Muon(model, **exact)
    assert type(made.optimizer.optimizer) is nw.optim.Muon and str(made.optimizer.optimizer.routing) == str(by_hand.routing)
    for i in range(STEPS):
        by_hand.zero_grad()
        batch = torch.stack([row["input_ids"] for row in trainer_cases.rows()[2 * i : 2 * i + 2]])
        model(input_ids=batch, labels=batch).loss.backward()
        by_hand.step()
    assert difference(made.model, model) < 1e-5 < difference(made.model, gpt2())


# ------------------------------------------------------------------------------------------------------------- logs


def norms_in(logs: list[dict[str, Any]]) -> list[int]:
    return [entry["step"] for entry in logs if "norm/update/total" in entry]


def test_norms_are_in_the_trainers_own_logs(tmp_path: Path) -> None:
    """Raw gradients' total is what the Trainer itself calls grad_norm; callbacks that report see them; evaluations have none."""
    seen = []

    class Reports(transformers.TrainerCallback):    # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append({**logs, "step": state.global_step})

    options = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 4, "logging_first_step": True, "save_strategy": "no"}
    made = trainer(tmp_path, callbacks=[Reports()], max_grad_norm=0.0, **options)
    rules = attach(made, [nw.clip_grad_norm(0.1, name="clip")])
    made.train()
    assert norms_in(made.state.log_history) == norms_in(seen) == [1, 4, 8]
    for entry in seen:
        if entry["step"] in (1, 4, 8) and "loss" in entry:
            assert entry["norm/grad_before/total"] == pytest.approx(entry["grad_norm"], rel=1e-5)
            assert entry["norm/grad/total"] == pytest.approx(0.1, rel=1e-5) and entry["changed/clip"] == 1
    assert "update" not in rules.control.norms().total


@pytest.mark.parametrize(("options", "steps"), [
    ({"log": False}, []), ({"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}, [4, 8]),
], ids=["off", "by epoch"])  # fmt: skip
def test_norms_are_logged_as_the_trainer_is_told_to_log(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    log = options.pop("log", True)
    made = trainer(tmp_path, max_grad_norm=0.0, save_strategy="no", **options)
    made.train_dataset = trainer_cases.rows()[:8]
    attach(made, nw.max_norm(0.3), log=log)
    made.train()
    assert norms_in(made.state.log_history) == steps


@long
def test_its_tensorboard_callback_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    made = trainer(tmp_path, report_to=["tensorboard"], max_grad_norm=0.0, save_strategy="no")
    attach(made, nw.max_norm(0.3))
    made.train()
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/norm/update/total")] == [2, 4, 6, 8]


# ------------------------------------------------------------------------------------------------------------- its own clipping


@pytest.mark.parametrize(("rules", "said", "left"), [
    ([nw.clip_grad_norm(0.1)], "is off, since rule 'clip_norm grad", 0.0),
    ([nw.l2_penalty(0.1), nw.autoclip()], "is off, since rule 'clip_norm grad", 0.0),
    ([nw.agc(0.1)], "clips gradients first .*max_grad_norm=1.0.*clip_norm grad l2/unit", 1.0),
    ([nw.clip_grad_norm(0.1, params="*mlp*")], "clips gradients first", 1.0),
    ([nw.l2_penalty(0.1)], "clips gradients first .*rule 'penalty", 1.0),
    ([nw.max_norm(0.3)], "", 1.0),
], ids=["clip", "autoclip", "agc", "clip of a part", "penalty", "weights"])  # fmt: skip
def test_gradients_are_not_clipped_twice_without_a_word(rules: list[Any], said: str, left: float, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = attach(made, rules)
    assert [w.filename for w in caught] == [__file__] * bool(said) and made.args.max_grad_norm == left
    attached.remove()
    assert made.args.max_grad_norm == 1.0
    if said:
        with pytest.warns(UserWarning, match=said):
            attach(trainer(tmp_path), rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(trainer(tmp_path, max_grad_norm=0.0), rules)


# ------------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_told_before_training(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    load = made._load_optimizer_and_scheduler
    with pytest.raises(nw.PolicyError, match=r"nothing\.like\.this"):
        attach(made, nw.max_norm(0.3, params="nothing.like.this"))
    with pytest.raises(nw.PolicyError, match=r"takes a transformers\.Trainer, given a GPT2LMHeadModel"):
        attach(gpt2(), nw.max_norm(0.3))
    assert made._load_optimizer_and_scheduler == load
    attach(made, nw.max_norm(0.3))
    with pytest.raises(nw.PolicyError, match="has rules already"):
        attach(made, nw.max_norm(0.2))
    other = trainer(tmp_path)
    other.is_deepspeed_enabled = True
    with pytest.raises(nw.PolicyError, match="DeepSpeed"):
        attach(other, nw.max_norm(0.2))


@pytest.mark.parametrize(("preset", "options", "match"), [
    ("muon", {}, "'muon' is no preset. Did you mean 'Muon'"), ("Muon", {"learning_rate": 0.1}, "unknown option 'learning_rate'"),
    ("auto", {"lr": 0.1}, "auto has lr=0.1"), (None, {}, "no preset"),
])  # fmt: skip
def test_a_preset_that_is_none_and_an_option_that_it_lacks(preset: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(nw.PolicyError, match=match):
        optimizer(preset, **options)


@pytest.mark.parametrize(("found", "there"), [("5.1.9", "version 5.1.9 is installed"), (None, "it is not installed")])
@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_an_older_library_is_one_sentence_with_versions(
    name: str, found: str | None, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normwise.errors import need_version

    def version(package: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(nw.MissingExtraError, match=rf"needs {name} 5\.2 or newer, and {there}: pip install '{name}>=5\.2'"):
        need_version(name, "5.2", "this")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "5.10.0.dev0")
    need_version(name, "5.2", "this")


def test_a_trainer_without_what_attach_needs_is_one_sentence_with_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    monkeypatch.delattr(transformers.Trainer, "_load_optimizer_and_scheduler")
    with pytest.raises(nw.PolicyError, match=rf"transformers {transformers.__version__} does not have; 5\.24 does"):
        attach(made, nw.max_norm(0.3))


def test_integrations_are_there_without_an_import_of_their_own() -> None:
    """That ``import normwise`` brings none of them, tests/test_layers.py holds."""
    assert nw.integrations.transformers is sys.modules["normwise.integrations.transformers"]
    with pytest.raises(AttributeError, match=r"there are .*transformers"):
        _ = nw.integrations.tensorflow


@long
def test_a_logger_of_the_users_own_beside_the_trainers(tmp_path: Path) -> None:
    """What a callback attaches to the control once it is there."""

    class Own(transformers.TrainerCallback):    # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            rules.control.log_to(tmp_path / "norms.jsonl", every=CUT)

    made = trainer(tmp_path, callbacks=[Own()], max_grad_norm=0.0, save_strategy="no")
    rules = attach(made, nw.max_norm(0.3))
    made.train()
    assert [json.loads(line)["step"] for line in (tmp_path / "norms.jsonl").read_text().splitlines()] == [CUT, STEPS]
    assert torch.isfinite(next(made.model.parameters())).all()
