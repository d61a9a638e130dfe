"""A run that is cut and resumed is the uninterrupted one, bit for bit, whoever saves it: the rules' state travels with the optimizer's.

The code of a user here is ``nw.attach`` and nothing else. The whole run saves in its middle and goes on; another is built anew, from other
weights, loads that, and does the second half.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw
from normwise.policy import radii

CUT, STEPS = 5, 9

STATEFUL: dict[str, Callable[[], Any]] = {
    "schedule": lambda: nw.max_norm(nw.schedules.linear(0.6, 0.2, 8), params="*schedule.weight"),
    "window": lambda: nw.max_norm(0.3, params="*window.weight", every=3, start=2),
    "strength": lambda: nw.l2_penalty(nw.schedules.warmup(0.5, 8), params="*strength.weight"),
    "init": lambda: nw.unit_norm("init", params="*init.weight"),
    "scaled": lambda: nw.Rule(params="*scaled.weight", action="normalize", per="tensor", radius="1.1*init"),
    "center": lambda: nw.max_norm(0.05, params="*center.weight", center="init"),
    "decay_to": lambda: nw.decay_to_init(0.5, params="*decay_to.weight"),
    "multiplier": lambda: nw.cpr(0.01, params="*multiplier.weight", exclude=None),
    "warm_start": lambda: nw.cpr(radii.WarmStart(3), params="*warm_start.weight"),
    "inflection": lambda: nw.cpr(radii.Inflection(1), params="*inflection.weight"),
    "length": lambda: nw.Rule(
        params="*length.weight", action="normalize", on="update", radius=radii.StepLength("init", nw.schedules.linear(1, 0.1, 9)),
    ),
    "autoclip": lambda: nw.autoclip(percentile=40, window=7, params="*autoclip.*"),
    "zclip": lambda: nw.zclip(z=0.5, warmup=3, params="*zclip.*"),
    "cap": lambda: nw.spectral_cap(0.95, tolerance=0.02, params="*cap.weight"),
    "stochastic": lambda: nw.weight_decay(0.02, params="*stochastic.weight", rounding="stochastic"),
    "compensated": lambda: nw.weight_decay(0.02, params="*compensated.weight", rounding="compensated"),
}  # fmt: skip
"""Each on the layer that is called as it is."""
HALF = ("stochastic", "compensated")
LOGITS = nw.qk_clip(1e-3, params="*_proj.weight", heads=2)
STATELESS = [nw.Rule(params="*brake.weight", action="clip_norm", radius=radii.Brake(0.5)), LOGITS, nw.clip_grad_norm(5.0)]


class Net(nn.Module):
    """One layer a rule, in float32 or bf16; queries and keys report their logits."""

    def __init__(self, seed: int, names: tuple[str, ...] = (*STATEFUL, "brake")) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict({n: nn.Linear(*((40, 36) if n == "cap" else (6, 6))) for n in names})
        with torch.no_grad():
            for layer in self.layers.values():    # so that norms grow; the larger one is to reach its cap
                layer.weight.mul_(0.3 if layer.in_features == 6 else 1.0)
        for name in HALF:
            if name in self.layers:
                self.layers[name].bfloat16()
        self.q_proj, self.k_proj = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.control: Any = None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        loss = x.new_zeros(())
        for layer in self.layers.values():
            given = x.repeat(1, 7)[:, : layer.in_features].to(layer.weight.dtype)
            loss = loss + (layer(given).float() - 1).square().mean()
        logits = (self.q_proj(x).view(-1, 2, 3) * self.k_proj(x.flip(0)).view(-1, 2, 3)).sum(2)
        if isinstance(self.control, nw.Control) and self.training:
            for name in ("q_proj", "k_proj"):
                self.control.report_max_logits(getattr(self, name), logits.detach().amax(0))
        return {"loss": loss + logits.square().mean()}


@functools.cache
def data() -> list[Tensor]:
    """A batch of two for each step; those of the fifth and the eighth give spikes."""
    made = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, generator=made) * (4 if step in (4, 7) else 1) for step in range(STEPS)]


def policy() -> list[Any]:
    return [*(make() for make in STATEFUL.values()), *STATELESS]


def adamw(net: nn.Module) -> Optimizer:
    return AdamW(net.parameters(), lr=0.05, weight_decay=0.0)


def differences(whole: nn.Module, resumed: nn.Module) -> dict[str, float]:
    """By name, the largest difference of each parameter where there is one."""
    pairs = zip(whole.named_parameters(), resumed.parameters(), strict=True)
    return {n: d for (n, p), q in pairs if (d := float((p.detach().double() - q.detach().double()).abs().max())) != 0}


@pytest.fixture(autouse=True)
def no_warning_of_ours() -> Iterator[None]:
    """A resume that is complete has nothing to say."""
    with warnings.catch_warnings():
        for said in (".*start anew.*", ".*saved under other rules.*", ".*detached copy.*"):
            warnings.filterwarnings("error", said)
        yield


# ---------------------------------------------------------------------------------------------------------- without a library


def step(net: Net, optimizer: Optimizer, i: int) -> None:
    optimizer.zero_grad()
    net(data()[i])["loss"].backward()
    optimizer.step()


def attached(seed: int, rules: list[Any], make: Callable[[nn.Module], Any] = adamw, **options: Any) -> tuple[Net, Optimizer]:
    net = Net(seed)
    optimizer = make(net)
    net.control = nw.attach(net, optimizer, rules, **options)
    return net, optimizer


def torch_saved(state: Any) -> Any:
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def cut_and_resumed(rules: Callable[[], list[Any]], make: Callable[[nn.Module], Any] = adamw, **options: Any) -> dict[str, float]:
    whole, optimizer = attached(0, rules(), make, **options)
    for i in range(CUT):
        step(whole, optimizer, i)
    saved = torch_saved({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, again = attached(5, rules(), make, **options)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for i in range(CUT, STEPS):
        step(whole, optimizer, i)
        step(resumed, again, i)
    return differences(whole, resumed)


@pytest.mark.parametrize("name", STATEFUL)
def test_each_rule_goes_on_with_the_state_and_not_without_it(name: str) -> None:
    """The second half shows that the first is no empty statement: without the control's part that very layer ends elsewhere."""
    assert cut_and_resumed(lambda: [STATEFUL[name](), LOGITS]) == {}
    lost = cut_and_resumed(lambda: [STATEFUL[name](), LOGITS], in_optimizer_state=False)
    assert lost and all(f".{name}." in n for n in lost)


@pytest.mark.parametrize("make", [
    adamw, lambda net: SGD(net.parameters(), lr=0.05), lambda net: SGD(net.parameters(), lr=0.05, momentum=0.9),
    lambda net: nw.optim.Signum(net, lr=0.01),
], ids=["adamw", "sgd", "momentum", "signum"])  # fmt: skip
def test_all_rules_together_by_torch_save(make: Callable[[nn.Module], Any]) -> None:
    assert cut_and_resumed(policy, make) == {}


def test_a_preset_with_its_policy_and_a_control_beside_it() -> None:
    """Two controls on one optimizer: each finds its own part."""
    inside, beside = ["schedule", "init", "autoclip", "length"], ["center", "zclip", "cap", "warm_start"]

    def built(seed: int) -> tuple[Net, Any]:
        net = Net(seed)
        optimizer = nw.optim.Muon(net, lr=0.02, weight_decay=0.0, policy=[STATEFUL[n]() for n in inside])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nw.attach(net, optimizer, [STATEFUL[n]() for n in beside])
        return net, optimizer

    whole, optimizer = built(0)
    for i in range(CUT):
        step(whole, optimizer, i)
    saved = torch_saved([whole.state_dict(), optimizer.state_dict()])
    resumed, again = built(5)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.control.steps == CUT
    for i in range(CUT, STEPS):
        step(whole, optimizer, i)
        step(resumed, again, i)
    assert differences(whole, resumed) == {}


# ---------------------------------------------------------------------------------------------------------- distributed checkpoints

no_dist = pytest.mark.filterwarnings("ignore:.*no-dist:UserWarning", "ignore:.*assuming:UserWarning", "ignore:.*is set to be:UserWarning")


def preset(net: nn.Module) -> Any:
    return nw.optim.Muon(net, lr=0.02, weight_decay=0.0, policy=policy())


@no_dist
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    "make", [adamw, pytest.param(lambda net: SGD(net.parameters(), lr=0.05), marks=pytest.mark.long), preset],
    ids=["adamw", "sgd", "preset"],
)
def test_distributed_checkpoint(tmp_path: Path, make: Callable[[nn.Module], Any], flat: bool) -> None:
    """Both ways of torch's: the optimizer's state nested, and flattened; also of an optimizer without a state of its own."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def built(seed: int) -> tuple[Net, Any]:
        if make is not preset:
            return attached(seed, policy(), make)
        net = Net(seed)
        optimizer = preset(net)
        net.control = optimizer.control
        return net, optimizer

    def state(net: Net, optimizer: Any) -> dict[str, Any]:
        weights, own = get_state_dict(net, optimizer, options=options)
        return {"model": weights, "optimizer": own}

    whole, optimizer = built(0)
    for i in range(CUT):
        step(whole, optimizer, i)
    dcp.save(state(whole, optimizer), checkpoint_id=tmp_path, no_dist=True)
    resumed, again = built(5)
    fresh = state(resumed, again)
    dcp.load(fresh, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, again, model_state_dict=fresh["model"], optim_state_dict=fresh["optimizer"], options=options)
    assert resumed.control.steps == CUT
    for i in range(CUT, STEPS):
        step(whole, optimizer, i)
        step(resumed, again, i)
    assert differences(whole, resumed) == {}


# ---------------------------------------------------------------------------------------------------------- trainers


def names_of(name: str) -> tuple[str, ...]:
    return (*STATEFUL, "brake") if name == "all" else (name,)


RULES = [pytest.param("all"), *(pytest.param(name, marks=pytest.mark.long) for name in STATEFUL)]


def rules_of(name: str) -> list[Any]:
    return policy() if name == "all" else [STATEFUL[name](), LOGITS]


@pytest.mark.parametrize("where", [pytest.param("callback", marks=pytest.mark.long), "create_optimizer"])
@pytest.mark.parametrize("name", RULES)
def test_hugging_face_trainer(tmp_path: Path, name: str, where: str) -> None:
    """Attached in a callback, after the Trainer has loaded the optimizer's state; and as the optimizer is made, before."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    transformers.utils.logging.set_verbosity_error()

    class Trainer(transformers.Trainer):    # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = adamw(self.model)
            if where == "create_optimizer":
                self.model.control = nw.attach(self.model, self.optimizer, rules_of(name))
            return self.optimizer

    class Attach(transformers.TrainerCallback):    # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
            if where == "callback":
                model.control = nw.attach(model, optimizer, rules_of(name))

    def train(seed: int, resume: str | None) -> Net:
        net = Net(seed, names_of(name))
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=STEPS, save_steps=CUT, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
            max_grad_norm=0.0, lr_scheduler_type="constant", remove_unused_columns=False, logging_strategy="no", seed=3,
        )
        rows = [{"x": row, "labels": row} for batch in data() for row in batch]
        Trainer(net, options, train_dataset=rows, callbacks=[Attach()]).train(resume_from_checkpoint=resume)
        assert net.control.steps == STEPS
        return net

    whole = train(0, None)
    assert differences(whole, train(5, str(tmp_path / f"checkpoint-{CUT}"))) == {}


@pytest.mark.parametrize("early", [False, True], ids=["after prepare", "before prepare"])
@pytest.mark.parametrize("name", RULES)
def test_accelerate(tmp_path: Path, name: str, early: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def built(seed: int) -> tuple[Any, Net, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        net = Net(seed, names_of(name))
        optimizer = adamw(net)
        if early:
            net.control = nw.attach(net, optimizer, rules_of(name))
        model, optimizer = accelerator.prepare(net, optimizer)
        if not early:
            net.control = nw.attach(model, optimizer, rules_of(name))
        return accelerator, net, optimizer

    accelerator, whole, optimizer = built(0)
    for i in range(CUT):
        step(whole, optimizer, i)
    accelerator.save_state(str(tmp_path))
    for i in range(CUT, STEPS):
        step(whole, optimizer, i)
    other, resumed, again = built(5)
    other.load_state(str(tmp_path))
    assert resumed.control.steps == CUT
    for i in range(CUT, STEPS):
        step(resumed, again, i)
    assert differences(whole, resumed) == {}


@pytest.mark.parametrize("name", RULES)
def test_lightning(tmp_path: Path, name: str) -> None:
    """Attached in ``configure_optimizers``, the control an attribute of the module, which can be copied and saved whole."""
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):    # type: ignore[misc]
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = Net(seed, names_of(name))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(data()[self.global_step])["loss"]    # Lightning begins the data anew

        def configure_optimizers(self) -> Optimizer:
            optimizer = adamw(self)
            self.control = self.net.control = nw.attach(self, optimizer, rules_of(name))
            return optimizer

    def train(seed: int, resume: str | None) -> Any:
        module = Module(seed)
        keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", callbacks=[keep], logger=False, enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=1), ckpt_path=resume)
        assert module.control.steps == STEPS
        return module

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|GPU|mid-epoch|Checkpoint directory|isn't stateful).*")
        whole = train(0, None)
        [path] = tmp_path.glob(f"*{CUT}.ckpt")
        assert differences(whole, train(5, str(path))) == {}


@pytest.mark.parametrize("name", RULES)
def test_fabric(tmp_path: Path, name: str) -> None:
    fabric_of = pytest.importorskip("lightning.fabric", reason="needs lightning").Fabric

    def built(seed: int) -> tuple[Any, Net, Any, Any]:
        fabric = fabric_of(accelerator="cpu", devices=1)
        net = Net(seed, names_of(name))
        model, optimizer = fabric.setup(net, adamw(net))
        net.control = nw.attach(model, optimizer, rules_of(name))
        assert all(m.name.startswith(("layers.", "q_proj", "k_proj")) for b in net.control.engine.rules for m in b.members)
        return fabric, net, model, optimizer

    def run(net: Net, model: Any, fabric: Any, optimizer: Any, steps: range) -> None:
        for i in steps:
            optimizer.zero_grad()
            fabric.backward(model(data()[i])["loss"])
            optimizer.step()

    fabric, whole, model, optimizer = built(0)
    run(whole, model, fabric, optimizer, range(CUT))
    fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    run(whole, model, fabric, optimizer, range(CUT, STEPS))
    fabric, resumed, model, optimizer = built(5)
    fabric.load(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    run(resumed, model, fabric, optimizer, range(CUT, STEPS))
    assert differences(whole, resumed) == {} and whole.control.steps == resumed.control.steps == STEPS


def test_a_lightning_module_with_its_control_is_copied_and_saved(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    module = lightning.LightningModule()
    module.net = Net(0)
    module.control = nw.attach(module, adamw(module), policy())
    with pytest.warns(UserWarning, match="detached copy"):
        twin = copy.deepcopy(module)
    with pytest.warns(UserWarning, match="detached copy"):
        torch.save(module, tmp_path / "whole.pt")
        loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    for other in (twin, loaded):
        assert differences(module, other) == {} and not other.control and "no rule acts" in repr(other.control)
