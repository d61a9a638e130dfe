"""A training run that may be killed at any moment; see test_kills.py."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise import checkpoints
from normwise.optim import Muon

EVERY = 3
BATCHES = 7


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.2), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def rules(hold: bool) -> list[Any]:
    """Every kind of state: singular vectors, multipliers, histories of gradients, initial norms and weights, schedules, carries."""
    return [
        *([nw.hyperball(params="5.weight")] if hold else []),
        nw.zclip(params="0.*"), nw.autoclip(params="3.*"), nw.clip_grad_norm(nw.schedules.linear(2.0, 0.5, 30)),
        nw.cpr(0.05, params="0.weight"),
        nw.weight_decay(1e-3, params="role:bias", rounding="compensated"),
        nw.spectral_cap(0.9, params="3.weight", tolerance=0.01), nw.max_norm(0.6, params="0.weight", center="init"),
    ]    # fmt: skip


class Run:
    """Two models under the same rules: a preset with rules inside and a control of its own, and torch's AdamW."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        ours, theirs = net(), net()
        ours[3].to(torch.bfloat16)
        inside = [nw.Rule(params="5.weight", action="normalize", radius="init")]
        muon = Muon(ours, lr=0.01, weight_decay=0.0, rounding="stochastic", policy=inside, override={"5.weight": {"direction": "ema"}})
        adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
        self.parts: dict[str, Any] = {"ours": ours, "theirs": theirs, "muon": muon, "adamw": adamw}
        self.parts |= {"muon control": nw.attach(ours, muon, rules(False)), "adamw control": nw.attach(theirs, adamw, rules(True))}
        self.parts |= {f"{name} plan": torch.optim.lr_scheduler.CosineAnnealingLR(self.parts[name], 50) for name in ("muon", "adamw")}
        self.order, self.left, self.step = torch.Generator().manual_seed(1), torch.empty(0, dtype=torch.int64), 0

    def state(self) -> dict[str, Any]:
        return {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "step": self.step, "left": self.left.clone(), "order": self.order.get_state(), "torch": torch.get_rng_state(),
        }    # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.left = state["step"], state["left"]
        self.order.set_state(state["order"])
        torch.set_rng_state(state["torch"])

    def next_batch(self) -> Tensor:
        if not len(self.left):
            self.left = torch.randperm(BATCHES, generator=self.order)
        batch, self.left = int(self.left[0]), self.left[1:]
        return torch.randn(8, 6, generator=torch.Generator().manual_seed(batch))

    def advance(self) -> None:
        x = self.next_batch()
        for model, name in (("ours", "muon"), ("theirs", "adamw")):
            optimizer = self.parts[name]
            optimizer.zero_grad()
            (forward(self.parts[model], x) - x[:, :3]).square().mean().backward()
            optimizer.step()
            self.parts[f"{name} plan"].step()
        self.step += 1


def forward(model: nn.Sequential, x: Tensor) -> Tensor:
    for layer in model:
        x = layer(x.to(next(layer.parameters(), x).dtype))
    return x.float()


def die_while_saving(at: int, run: Run) -> None:
    """Dies with half of the file written."""
    genuine = torch.save

    def half(state: Any, file: Any) -> None:
        genuine(state, file)
        if run.step >= at:
            file.flush()
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def main(directory: Path, steps: int, dies: int | None, told: Connection) -> None:
    """Goes on from what is in ``directory``. dies: the step to die at while saving."""
    torch.set_num_threads(1)
    path, run = directory / "run.pt", Run()
    if path.exists():
        run.load(checkpoints.load(path))
    if dies is not None:
        die_while_saving(dies, run)
    told.send(f"from {run.step}")
    while run.step < steps:
        run.advance()
        told.send(f"step {run.step}")
        if run.step % EVERY == 0:
            checkpoints.save(run.state(), path)
    checkpoints.save(run.state(), directory / "end.pt")
    told.send(f"ok {all(bool(run.parts[c].verify()) for c in ('muon control', 'adamw control'))}")
