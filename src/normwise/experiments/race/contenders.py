"""Who races: policy families, each the same on every task, with what is tuned of it beside what everybody may choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from normwise.errors import StudyError, nearest
from normwise.experiments.framework.lattice import Choice, Value
from normwise.experiments.race.initial_weights import KINDS

Numbers = Mapping[str, Value]
Built = tuple[torch.optim.Optimizer, Any]
BASELINES = ("adamw", "sgd")

COMMON = (
    Choice("schedule", ("linear", "hold")),
    Choice("init", KINDS),
    Choice("batch", (0.5, 1.0, 2.0), 1),
    Choice("clip", (0.0, 1.0)),
)
"""What is no norm strategy of the weights or updates, or everybody's: each contender, the baselines too, may choose it."""


SMALL = tuple(Choice("batch", axis.values, 0) if axis.name == "batch" else axis for axis in COMMON)
"""The same choices, their search begun at half of the batch."""
AS_IT_IS = (Choice("schedule", ("hold",)), Choice("init", ("own",)), Choice("batch", (1.0,)), Choice("clip", (0.0,)))
"""For what stands for making no choice at all, with a rate that is held."""
LINEAR = (Choice("schedule", ("linear",)), *AS_IT_IS[1:])
"""The same with a rate that falls from the start."""


@dataclass(frozen=True)
class Contender:
    """label, about: for tables. own: the rate first, then what is the family's own. build: model and numbers to an optimizer and the
    control that is attached to it, if there is one. common: what everybody may choose."""

    label: str
    about: str
    own: tuple[Choice, ...]
    build: Callable[[nn.Module, Numbers], Built]
    common: tuple[Choice, ...] = COMMON

    @property
    def axes(self) -> tuple[Choice, ...]:
        return (*self.own, *self.common)

    def numbers(self, point: Sequence[int]) -> dict[str, Value]:
        """What a point of the lattice stands for."""
        return {axis.name: axis.value(k) for axis, k in zip(self.axes, point, strict=True)}


def _rate(centre: float) -> Choice:
    return Choice("lr", (centre,), ratio=2.0)


_REST = Choice("rest", (0.001, 0.002, 0.004, 0.008, 0.016), 2)
"""The learning rate of the AdamW that takes embeddings, heads, biases and gains."""
_RIDGE = (_rate(0.02), Choice("rest", (0.002, 0.004, 0.008, 0.016, 0.032), 2), Choice("damping", (0.01, 0.03, 0.1), 1))
_DECAY = Choice("decay", (0.0, 0.01, 0.1, 0.3), 2)


def _adamw(model: nn.Module, n: Numbers) -> Built:
    decayed = float(n["decay"])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=float(n["lr"]), betas=(0.9, float(n["beta2"])), fused=True), None


def _sgd(model: nn.Module, n: Numbers) -> Built:
    momentum, decay = float(n["momentum"]), float(n["decay"])
    return torch.optim.SGD(model.parameters(), lr=float(n["lr"]), momentum=momentum, nesterov=True, weight_decay=decay), None


def _adamw_max_norm(model: nn.Module, n: Numbers) -> Built:
    import normwise as nw

    optimizer, _ = _adamw(model, {**n, "decay": 0.0})
    return optimizer, nw.attach(model, optimizer, nw.max_norm(nw.radii.Init(float(n["radius"]))))


def _preset(name: str, n: Numbers, model: nn.Module, **columns: Any) -> Built:
    import normwise as nw

    rest = {"lr": float(n["rest"]), "betas": (0.9, 0.99)}
    return getattr(nw.optim, name)(model, float(n["lr"]), adamw=rest, **columns), None


def _muon(model: nn.Module, n: Numbers) -> Built:
    return _preset("Muon", n, model, adjust="match_rms_adamw", weight_decay=float(n["decay"]), polar="fast")


def _normuon(model: nn.Module, n: Numbers) -> Built:
    return _preset("NorMuon", n, model, weight_decay=float(n["decay"]), polar="fast")


def _muonh(model: nn.Module, n: Numbers) -> Built:
    return _preset("MuonH", n, model, polar="fast")


def _adamh(model: nn.Module, n: Numbers) -> Built:
    return _preset("AdamH", n, model)


def _scion(model: nn.Module, n: Numbers) -> Built:
    import normwise as nw

    return nw.optim.Scion(model, float(n["lr"]), radius=float(n["radius"]), head_radius=float(n["head"]), polar="fast"), None


def _ridge(model: nn.Module, n: Numbers, **columns: Any) -> Built:
    return _preset("Ridge", n, model, damping=float(n["damping"]), **columns)


def _ridge_roles(model: nn.Module, n: Numbers) -> Built:
    from normwise.optim.depth_scale import factors_of, over_convolutions
    from normwise.parameters.inventory import Inventory

    entries = Inventory(model).trainable
    by_role = {"recurrent": {"momentum": 0.85, "weight_decay": 0.1}}
    if over_convolutions(entries):
        by_role["head"] = {"weight_decay": 1.0}
    return _ridge(model, n, by_role=by_role, override=factors_of(entries))


def _auto(model: nn.Module, n: Numbers) -> Built:
    import normwise as nw

    optimizer = nw.optim.auto(model)
    assert optimizer.routing is not None
    share = float(n["lr"]) / optimizer.routing.rows["ridge"]["lr"]    # 1 as tuned; only the robustness runs ask for other rates
    for group in optimizer.param_groups:
        group["lr"] *= share
    return optimizer, None


CONTENDERS: dict[str, Contender] = {
    "adamw": Contender(
        "AdamW", "torch's, fused; biases and gains not decayed",
        (_rate(3e-3), _DECAY, Choice("beta2", (0.95, 0.99, 0.999), 1)), _adamw,
    ),
    "sgd": Contender(
        "SGD", "torch's, Nesterov momentum",
        (_rate(0.1), Choice("decay", (0.0, 1e-4, 5e-4, 2e-3), 2), Choice("momentum", (0.8, 0.9, 0.95), 1)), _sgd,
    ),
    "adamw_max_norm": Contender(
        "AdamW + max-norm", "AdamW without decay, each unit's weights within radius times their initial norm",
        (_rate(3e-3), Choice("radius", (1.0, 1.5, 2.5, 4.0), 1), Choice("beta2", (0.95, 0.99, 0.999), 1)), _adamw_max_norm,
    ),
    "muon": Contender(
        "Muon", "orthogonalised Nesterov momentum for matrices, RMS-matched; AdamW for the rest", (_rate(0.01), _REST, _DECAY), _muon,
    ),
    "normuon": Contender(
        "NorMuon", "Muon whose units take steps of equal size; AdamW for the rest", (_rate(0.01), _REST, _DECAY), _normuon,
    ),
    "muonh": Contender(
        "MuonH", "Muon on the sphere of each matrix's initial norm; AdamW for the rest", (_rate(0.02), _REST), _muonh,
    ),
    "adamh": Contender(
        "AdamH", "Adam on the sphere of each parameter's initial norm; AdamW for the rest", (_rate(0.02), _REST), _adamh,
    ),
    "scion": Contender(
        "Scion", "steepest descent under a norm per layer, unconstrained",
        (_rate(1e-3), Choice("radius", (3.0, 10.0, 30.0, 100.0), 1), Choice("head", (10.0, 100.0, 1000.0), 1)), _scion,
    ),
    "ridge": Contender("Ridge", "momentum through its damped pseudo-inverse, RMS-matched; AdamW for the rest", _RIDGE, _ridge),
    "ridge_small": Contender(
        "Ridge, small batch", "Ridge, its search begun at half of the batch and 0.7 of the rates; momentum 0.8 for gates too",
        (_rate(0.014), Choice("rest", (0.0014, 0.0028, 0.0056, 0.0112, 0.0224), 2), Choice("damping", (0.01, 0.03, 0.1), 1)),
        partial(_ridge, by_role={"recurrent": {"momentum": 0.8}}), SMALL,
    ),
    "ridge_roles": Contender(
        "Ridge, by role", "Ridge with normwise.optim.role_factors(model); gates with momentum 0.85 and decay 0.1; a head over convolutions "
        "with decay 1", _RIDGE, _ridge_roles,
    ),
    "auto": Contender(
        "auto", "normwise.optim.auto(model), which has nothing to tune: one trial", (Choice("lr", (0.028,)),), _auto, LINEAR,
    ),
}  # fmt: skip


def chosen(names: Sequence[str] | None) -> list[str]:
    """The baselines and the named contenders, all of them for None. StudyError for an unknown name."""
    for name in names or ():
        if name not in CONTENDERS:
            raise StudyError(f"There is no contender {name!r}.{nearest(name, CONTENDERS)}")
    return [name for name in CONTENDERS if names is None or name in names or name in BASELINES]
