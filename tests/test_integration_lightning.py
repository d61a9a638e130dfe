"""Lightning trains under rules: automatic and manual optimization, several optimizers, AMP, accumulation, checkpoints, its CLI."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw

lightning = pytest.importorskip("lightning", reason="needs lightning")
Callback = nw.integrations.lightning.NormwiseCallback
STEPS, CUT = 8, 4
long = pytest.mark.long


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


def batches(rows: int = 5) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=made) for _ in range(STEPS)]


class Module(lightning.LightningModule):    # type: ignore[misc]
    """One network, one optimizer; the batch of a step is told by its number, since a resumed fit begins its data anew."""

    def __init__(self, seed: int = 0, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.automatic_optimization = automatic
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self.net(batches()[self.global_step % STEPS]) - 1).square().mean() * 30
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.05)


class GAN(lightning.LightningModule):    # type: ignore[misc]
    """Two networks that are trained in turn, each by an optimizer of its own; the other one is frozen meanwhile."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.g = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
        self.d = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        real = batches()[(self.global_step // 2) % STEPS]
        for optimizer, sign in zip(self.optimizers(), (-1, 1), strict=True):
            self.toggle_optimizer(optimizer)
            loss = sign * (self.d(self.g(real[:, :3])) - self.d(real)).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.g.parameters(), lr=0.05), torch.optim.Adam(self.d.parameters(), lr=0.05)]


def rules() -> list[Any]:
    bounds = [nw.max_norm(0.4, params="*0.weight"), nw.unit_norm("init", params="*2.weight")]
    return [nw.clip_grad_norm(0.5, name="clip"), nw.autoclip(percentile=50), *bounds]


def fit(module: Any, callback: Any = None, resume: Path | None = None, saves: Path | None = None, **options: Any) -> Any:
    quiet_ones = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    kept = [] if saves is None else [lightning.pytorch.callbacks.ModelCheckpoint(saves, every_n_train_steps=CUT, save_top_k=-1)]
    options = {"max_steps": STEPS, "enable_checkpointing": bool(kept), **quiet_ones, **options}
    trainer = lightning.Trainer(callbacks=[*([callback] if callback else []), *kept], **options)
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=1), ckpt_path=resume)
    return trainer


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("kind", "options"), [
    pytest.param(Module, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_epochs": 4}, id="bf16 and accumulation"),
    pytest.param(lambda seed: Module(seed, automatic=False), {}, id="manual"),
    pytest.param(GAN, {"max_steps": 2 * STEPS}, id="gan"),
    pytest.param(Module, {}, id="automatic", marks=long),
])  # fmt: skip
def test_a_resumed_fit_is_the_uninterrupted_one(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed, first, again = kind(0), kind(5), Callback(rules()), Callback(rules())
    fit(whole, first, saves=tmp_path, **options)
    [middle] = tmp_path.glob(f"*step={STEPS if kind is GAN else CUT}.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(start|saved under other).*")
        fit(resumed, again, resume=middle, **options)
    assert difference(whole, resumed) == 0.0
    assert first.control.steps == again.control.steps == STEPS and first.control.verify() and again.control.verify()
    assert first.control.verify().blocks == (8 + 6 + 8 + 1 if kind is GAN else 8 + 6)    # the network that was frozen last is measured too


def test_rules_act_under_lightning_as_in_a_loop_by_hand() -> None:
    module, by_hand = Module(), Module()
    fit(module, Callback(rules()))
    optimizer = by_hand.configure_optimizers()
    nw.attach(by_hand, optimizer, rules())
    for batch in batches():
        optimizer.zero_grad()
        ((by_hand.net(batch) - 1).square().mean() * 30).backward()
        optimizer.step()
    assert difference(module, by_hand) == 0.0 < difference(module, Module())


def test_a_second_fit_has_its_own_control() -> None:
    callback, module = Callback(nw.max_norm(0.4)), Module()
    fit(module, callback, max_steps=2)
    first = callback.control
    fit(module, callback, max_steps=3)
    assert callback.control is not first and not first._handles and callback.control.verify()


# ------------------------------------------------------------------------------------------------------------- its own clipping


@pytest.mark.parametrize(("given", "own", "said", "after"), [
    ([nw.clip_grad_norm(0.5)], {"gradient_clip_val": 0.1}, "is off, since rule", 0.5),
    ([nw.clip_grad_norm(0.5)], {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, "clips gradients first", None),
    ([nw.l2_penalty(0.1)], {"gradient_clip_val": 0.1}, "clips gradients first .*rule 'penalty", None),
    ([nw.max_norm(0.4)], {"gradient_clip_val": 0.1}, "", 0.1),
    ([nw.clip_grad_norm(0.5)], {}, "", 0.5),
], ids=["norm", "value", "penalty", "weights", "none"])  # fmt: skip
def test_gradients_are_not_clipped_twice_without_a_word(given: Any, own: dict[str, Any], said: str, after: float | None) -> None:
    """What is left of a gradient, after the step, is what the one that clips says."""
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, Callback(given), max_steps=3, **own)
    told = [str(w.message) for w in caught if "clip" in str(w.message)]
    assert len(told) == bool(said) and trainer.gradient_clip_val == own.get("gradient_clip_val")
    if said:
        with pytest.warns(UserWarning, match=said):
            fit(Module(), Callback(given), max_steps=1, **own)
    if after is not None:
        assert module.norms[-1] == pytest.approx(after, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- logs


def test_norms_go_to_the_trainers_loggers(tmp_path: Path) -> None:
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    callback = Callback(rules(), log_every_n_steps=2)
    fit(Module(), callback, logger=logger)
    logger.save()
    import csv

    found = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    logged = [row for row in found if row.get("norm/update/total")]
    assert [int(row["step"]) for row in logged] == [2, 4, 6, 8]
    assert float(logged[-1]["norm/weight/total"]) == pytest.approx(callback.control.norms().total["weight"], rel=1e-6)
    assert all(0.0 <= float(row["changed/clip"]) <= 1.0 for row in logged)


@pytest.mark.parametrize(("every", "expected"), [(None, [3, 6]), (0, [])])
def test_they_are_logged_as_often_as_the_trainer_logs_or_not_at_all(every: int | None, expected: list[int]) -> None:
    steps: list[int] = []

    class Logger(lightning.pytorch.loggers.logger.DummyLogger):    # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "norm/update/total" in metrics:
                steps.append(step)

    fit(GAN() if every is None else Module(), Callback(nw.max_norm(0.4), every), logger=Logger(), log_every_n_steps=3, max_steps=16)
    assert steps == expected


# ------------------------------------------------------------------------------------------------------------- rules as data


POLICY = "- max_norm: 0.4\n- {clip_grad_norm: 0.5, }\n"


def test_rules_are_read_from_a_file_and_from_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    expected = nw.Policy([nw.max_norm(0.4), nw.clip_grad_norm(0.5)])
    for given in (path, str(path), [{"max_norm": 0.4}, {"clip_grad_norm": 0.5}], {"rules": [{"max_norm": 0.4}, {"clip_grad_norm": 0.5}]}):
        assert Callback(given).policy == expected
    assert len(Callback([nw.max_norm(0.4), nw.Policy(nw.clip_grad_norm(0.5))]).policy) == 2


def test_lightnings_command_line_reads_rules_from_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse", reason="needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(
        "trainer:\n  max_steps: 3\n  accelerator: cpu\n  logger: false\n  enable_checkpointing: false\n  enable_progress_bar: false\n"
        "  enable_model_summary: false\n  callbacks:\n  - class_path: normwise.integrations.lightning.NormwiseCallback\n    init_args:\n"
        "      rules:\n      - max_norm: 0.4\n      - clip_grad_norm: {max_norm: 0.5, name: clip}\n      log_every_n_steps: 2\n"
    )

    class Data(lightning.LightningDataModule):    # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches(), batch_size=1)

    monkeypatch.setattr(sys, "argv", ["train", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Module, Data, save_config_callback=None)
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, Callback)]
    assert callback.control.steps == 3 and callback.control.verify() and callback.log_every_n_steps == 2
    assert [rule.label() for rule in callback.policy] == ["clip_norm l2/unit <= 0.4", "clip"]


# ------------------------------------------------------------------------------------------------------------- bad input


class NoOptimizer(Module):
    def configure_optimizers(self) -> None:
        return None


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(nw.PolicyError, match=r"NoOptimizer\.configure_optimizers\(\) returned no optimizer"):
        fit(NoOptimizer(), Callback(nw.max_norm(0.4)))
    with pytest.raises(nw.PolicyError, match=r"nothing\.like\.this"):
        fit(Module(), Callback(nw.max_norm(0.4, params="nothing.like.this")))
    with pytest.raises(nw.PolicyError, match=r"No such file"):
        Callback("nowhere.yaml")
    with pytest.raises(nw.PolicyError, match=r"unknown named rule 'max_nrm'"):
        Callback([{"max_nrm": 0.4}])
    for mixed in ([nw.max_norm(0.4), {"max_norm": 0.4}], [{"max_norm": nw.schedules.linear(1, 2, 3)}]):
        with pytest.raises(nw.PolicyError, match=r"not JSON serializable\): give all as data, or all as rules"):
            Callback(mixed)
    with pytest.raises(nw.PolicyError, match=r"log_every_n_steps is -1"):
        Callback(nw.max_norm(0.4), -1)
