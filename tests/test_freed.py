"""What nobody holds any more is freed: models, optimizers and controls, whatever was done with them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw

Work = Callable[[nn.Module, Path], Any]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(3, 1, 8, 8)).square().mean().backward()
        optimizer.step()


def attached(*rules: Any, **options: Any) -> Work:
    def work(model: nn.Module, folder: Path) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        control = nw.attach(model, optimizer, list(rules), **options)
        steps(model, optimizer)
        control.verify(), control.norms(), control.receipt(), control.radii(), control.zeros()
        return optimizer, control

    return work


def logged(model: nn.Module, folder: Path) -> Any:
    optimizer, control = attached(nw.max_norm(1.0), log=10)(model, folder)
    control.log_to(folder / "norms.jsonl", every=1)
    steps(model, optimizer)
    return optimizer, control


def resumed(model: nn.Module, folder: Path) -> Any:
    optimizer, control = attached(nw.max_norm("init"))(model, folder)
    saved = optimizer.state_dict()
    other = torch.optim.AdamW(model.parameters(), lr=0.01)
    other.load_state_dict(saved)
    again = nw.attach(model, other, nw.max_norm("init"))
    other.load_state_dict(saved)
    return optimizer, control, other, again


def taken_off(model: nn.Module, folder: Path) -> Any:
    optimizer, control = attached(nw.max_norm(1.0))(model, folder)
    control.remove()
    again = nw.attach(model, optimizer, nw.max_norm(1.0))
    third = nw.attach(model, optimizer, nw.max_norm(1.0), replace=True)
    return optimizer, control, again, third


def bound_anew(model: nn.Module, folder: Path) -> Any:
    optimizer, control = attached(nw.max_norm("init"), nw.clip_grad_norm(1.0))(model, folder)
    for p in model[0].parameters():
        p.requires_grad_(False)
    steps(model, optimizer)
    model.double().float()
    steps(model, optimizer)
    return optimizer, control


def several(model: nn.Module, folder: Path) -> Any:
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[4].parameters())]
    model[1].requires_grad_(False)
    return optimizers, nw.attach(model, optimizers, [nw.clip_grad_norm(1.0), nw.max_norm(1.0)])


def closure(model: nn.Module, folder: Path) -> Any:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2)
    control = nw.attach(model, optimizer, nw.max_norm(1.0))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(3, 1, 8, 8)).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return optimizer, control


def parametrized(model: nn.Module, folder: Path) -> Any:
    torch.nn.utils.parametrizations.weight_norm(model[4])
    return attached(nw.max_norm("init"))(model, folder)


def preset(name: str) -> Work:
    def work(model: nn.Module, folder: Path) -> Any:
        optimizer = getattr(nw.optim, name)(model, policy=nw.max_norm(1.0))
        steps(model, optimizer)
        return optimizer, nw.optim.schedule(optimizer, 10), copy.deepcopy(optimizer.state_dict())

    return work


def clipped(model: nn.Module, folder: Path) -> Any:
    model(torch.ones(3, 1, 8, 8)).sum().backward()
    return nw.clip_grad_norm_(model.parameters(), 1.0)


def advised(model: nn.Module, folder: Path) -> Any:
    batches = [torch.randn(3, 1, 8, 8) for _ in range(8)]
    advice = nw.advise(model, batches=batches, loss=lambda m, x: m(x).square().mean(), steps=8)
    return advice, advice.optimizer.build(model)


def shrunk(model: nn.Module, folder: Path) -> Any:
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 0
    return nw.prune.shrink(model, torch.ones(1, 1, 8, 8))


def saved(model: nn.Module, folder: Path) -> Any:
    optimizer, control = attached(nw.max_norm("init"))(model, folder)
    nw.checkpoints.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
    return optimizer, control, nw.checkpoints.load(folder / "state.pt")


WORKS: dict[str, Work] = {
    "attached": attached(nw.max_norm(1.0), nw.clip_grad_norm(1.0), nw.weight_decay(0.1), nw.spectral_cap(1.0), nw.l1_prox(1e-4)),
    "first norms, apart": attached(nw.max_norm("init"), nw.decay_to_init(0.1), in_optimizer_state=False),
    "from history": attached(nw.autoclip(50), nw.zclip(), on_nonfinite="skip", timed=True),
    "logged": logged, "resumed": resumed, "taken off": taken_off, "bound anew": bound_anew, "several": several, "closure": closure,
    "parametrized": parametrized, "clipped": clipped, "advised": advised, "shrunk": shrunk, "saved": saved,
    **{name: preset(name) for name in ("SGD", "AdamW", "Muon", "Scion", "Ridge", "auto")},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WORKS)
def test_nothing_outlives_its_last_reference(what: str, tmp_path: Path) -> None:
    """Models and optimizers of a search, or of a notebook's cells, would fill the memory one by one."""
    model = network()
    made = WORKS[what](model, tmp_path)
    things = [model, *model.parameters(), *(one for one in (made if isinstance(made, tuple) else [made]) if hasattr(one, "__weakref__"))]
    refs = [weakref.ref(one) for one in things]
    kinds = [type(one).__name__ for one in things]
    del model, made, things
    gc.collect()
    gc.collect()
    assert [kind for kind, one in zip(kinds, refs, strict=True) if one() is not None] == []
