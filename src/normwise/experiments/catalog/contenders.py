"""Who races, under either protocol: each the same on every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.catalog.parts import axis
from normwise.experiments.framework.lattice import Axis, Point, Value, values
from normwise.experiments.framework.study import chosen
from normwise.experiments.tasks.initial_weights import KINDS
from normwise.optim.presets import UNDECAYED, factors_of, over_convolutions
from normwise.parameters.inventory import Entry, Inventory

Numbers = Mapping[str, Value]
Built = tuple[torch.optim.Optimizer | tuple[torch.optim.Optimizer, ...], Any]
BASELINES = ("adamw", "sgd")
"""Of which the better one sets a race's target."""

COMMON = (
    Axis("schedule", ("linear", "hold")),
    Axis("init", KINDS),
    Axis("batch", (0.5, 1.0, 2.0), 1),
    Axis("clip", (0.0, 1.0)),
)
"""What is no norm strategy of the weights or updates, or everybody's: each contender, the baselines too, could choose it in protocol 1."""
SMALL = tuple(Axis("batch", axis.values, 0) if axis.name == "batch" else axis for axis in COMMON)
"""The same choices, their search begun at half of the batch."""
AS_IT_IS = (Axis("schedule", ("hold",)), Axis("init", ("own",)), Axis("batch", (1.0,)), Axis("clip", (0.0,)))
"""For what stands for making no choice at all, with a rate that is held."""
LINEAR = (Axis("schedule", ("linear",)), *AS_IT_IS[1:])
"""The same with a rate that falls from the start."""


@dataclass(frozen=True)
class Contender:
    """label, about: for tables. own: the rate first, then what is the family's own. build: model and numbers to an optimizer and the
    control that is attached to it, if there is one. common: what everybody may choose. lacks: why it cannot race with a model, or on this
    machine; it gives None where it can. baseline: whether it is tuned at the whole horizon."""

    label: str
    about: str
    own: tuple[Axis, ...]
    build: Callable[[nn.Module, Numbers], Built]
    common: tuple[Axis, ...] = COMMON
    lacks: Callable[[nn.Module], str | None] | None = None
    baseline: bool = False

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.own, *self.common)

    @property
    def middle(self) -> dict[str, Value]:
        """The numbers that its search begins with."""
        return self.numbers((0,) * len(self.axes))

    def numbers(self, point: Point) -> dict[str, Value]:
        """What a point of the lattice stands for."""
        return values(self.axes, point)


def _rate(centre: float) -> Axis:
    return axis("lr", centre)


_REST = Axis("rest", (0.001, 0.002, 0.004, 0.008, 0.016), 2)
"""The learning rate of the AdamW that takes embeddings, heads, biases and gains."""
_DAMPING, _BETA2 = Axis("damping", (0.01, 0.03, 0.1), 1), Axis("beta2", (0.95, 0.99, 0.999), 1)
_RIDGE = (_rate(0.02), Axis("rest", (0.002, 0.004, 0.008, 0.016, 0.032), 2), _DAMPING)
_DECAY = Axis("decay", (0.0, 0.01, 0.1, 0.3), 2)


def _adamw(model: nn.Module, n: Numbers) -> Built:
    decayed = float(n["decay"])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decayed},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=float(n["lr"]), betas=(0.9, float(n["beta2"])), fused=True), None


def _sgd(model: nn.Module, n: Numbers) -> Built:
    momentum, decay = float(n["momentum"]), float(n["decay"])
    return torch.optim.SGD(model.parameters(), lr=float(n["lr"]), momentum=momentum, nesterov=True, weight_decay=decay), None


def _adamw_max_norm(model: nn.Module, n: Numbers) -> Built:
    optimizer, _ = _adamw(model, {**n, "decay": 0.0})
    return optimizer, nw.attach(model, optimizer, nw.max_norm(nw.radii.Init(float(n["radius"]))))


def _preset(name: str, *tuned: str, **columns: Any) -> Callable[..., Built]:
    """The preset with these columns, and those that are tuned, beside AdamW at a rate of its own for the rest."""

    def build(model: nn.Module, n: Numbers, **more: Any) -> Built:
        own = {_COLUMNS.get(axis, axis): float(n[axis]) for axis in tuned}
        rest = {"adamw": {"lr": float(n["rest"]), "betas": (0.9, 0.99)}} if "rest" in n else {}
        return getattr(nw.optim, name)(model, float(n["lr"]), **rest, **own, **columns, **more), None

    return build


_COLUMNS = {"decay": "weight_decay", "head": "head_radius"}
"""Axes whose column has a longer name."""
_ridge = _preset("Ridge", "damping")


def _ridge_roles(model: nn.Module, n: Numbers) -> Built:
    entries = Inventory(model).trainable
    by_role = {"recurrent": {"momentum": 0.85, "weight_decay": 0.1}}
    if over_convolutions(entries):
        by_role["head"] = {"weight_decay": 1.0}
    return _ridge(model, n, by_role=by_role, override=factors_of(entries))


def _auto(model: nn.Module, n: Numbers) -> Built:
    optimizer = nw.optim.auto(model)
    assert optimizer.routing is not None
    share = float(n["lr"]) / optimizer.routing.rows["ridge"]["lr"]    # 1 as tuned; only the robustness runs ask for other rates
    for group in optimizer.param_groups:
        group["lr"] *= share
    return optimizer, None


FIRST: dict[str, Contender] = {
    "adamw": Contender(
        "AdamW", "torch's, fused; biases and gains not decayed",
        (_rate(3e-3), _DECAY, _BETA2), _adamw, baseline=True,
    ),
    "sgd": Contender(
        "SGD", "torch's, Nesterov momentum",
        (_rate(0.1), Axis("decay", (0.0, 1e-4, 5e-4, 2e-3), 2), Axis("momentum", (0.8, 0.9, 0.95), 1)), _sgd, baseline=True,
    ),
    "adamw_max_norm": Contender(
        "AdamW + max-norm", "AdamW without decay, each unit's weights within radius times their initial norm",
        (_rate(3e-3), Axis("radius", (1.0, 1.5, 2.5, 4.0), 1), _BETA2), _adamw_max_norm,
    ),
    "muon": Contender(
        "Muon", "orthogonalised Nesterov momentum for matrices, RMS-matched; AdamW for the rest", (_rate(0.01), _REST, _DECAY),
        _preset("Muon", "decay", adjust_lr_fn="match_rms_adamw", polar="fast"),
    ),
    "normuon": Contender(
        "NorMuon", "Muon whose units take steps of equal size; AdamW for the rest", (_rate(0.01), _REST, _DECAY),
        _preset("NorMuon", "decay", polar="fast"),
    ),
    "muonh": Contender(
        "MuonH", "Muon on the sphere of each matrix's initial norm; AdamW for the rest", (_rate(0.02), _REST),
        _preset("MuonH", polar="fast"),
    ),
    "adamh": Contender(
        "AdamH", "Adam on the sphere of each parameter's initial norm; AdamW for the rest", (_rate(0.02), _REST), _preset("AdamH"),
    ),
    "scion": Contender(
        "Scion", "steepest descent under a norm per layer, unconstrained",
        (_rate(1e-3), Axis("radius", (3.0, 10.0, 30.0, 100.0), 1), Axis("head", (10.0, 100.0, 1000.0), 1)),
        _preset("Scion", "radius", "head", polar="fast"),
    ),
    "ridge": Contender("Ridge", "momentum through its damped pseudo-inverse, RMS-matched; AdamW for the rest", _RIDGE, _ridge),
    "ridge_small": Contender(
        "Ridge, small batch", "Ridge, its search begun at half of the batch and 0.7 of the rates; momentum 0.8 for gates too",
        (_rate(0.014), Axis("rest", (0.0014, 0.0028, 0.0056, 0.0112, 0.0224), 2), _DAMPING),
        partial(_ridge, by_role={"recurrent": {"momentum": 0.8}}), SMALL,
    ),
    "ridge_roles": Contender(
        "Ridge, by role", "Ridge with normwise.optim.role_factors(model); gates with momentum 0.85 and decay 0.1; a head over convolutions "
        "with decay 1", _RIDGE, _ridge_roles,
    ),
    "auto": Contender(
        "auto", "normwise.optim.auto(model), which has nothing to tune: one trial", (Axis("lr", (0.028,)),), _auto, LINEAR,
    ),
}  # fmt: skip
"""The contenders of protocol 1."""


# ------------------------------------------------------------------------------------------------------------- protocol 2

SCHEDULES = ("sqrt", "linear", "concave", "hold", "cooldown")
"""In the order of how long the rate stays high."""
EVERYBODY = (Axis("schedule", SCHEDULES, 1), *COMMON[1:])
"""What everybody may choose in protocol 2."""
FLAT = (Axis("schedule", ("flat",)), *COMMON[1:])
"""The same for a method whose rate is held after the warm-up."""
_ROLES = (axis("tables", 1.0, 3.0), axis("vectors", 1.0, 3.0))
"""The rates of embeddings and heads, and of biases and gains, as multiples of that of matrices."""
_BETA1 = Axis("beta1", (0.7, 0.8, 0.9, 0.95), 2)
_AHEAD = Axis("nesterov", (0.0, 1.0), 1)
_SHORT = Axis("momentum", (0.8, 0.9, 0.95), 2)


def _by_role(model: nn.Module, n: Numbers) -> list[dict[str, Any]]:
    """Groups of matrices, of embeddings and heads, and of biases and gains, which are not decayed."""
    of: dict[str, list[Tensor]] = {"matrices": [], "tables": [], "vectors": []}
    for entry in Inventory(model).trainable:
        kind = "tables" if entry.role in ("embedding", "head") else "vectors" if entry.role in UNDECAYED else "matrices"
        of[kind].append(entry.param)
    lr, decay = float(n["lr"]), float(n["decay"])
    return [
        {"params": params, "lr": lr * float(n.get(kind, 1.0)), "weight_decay": 0.0 if kind == "vectors" else decay}
        for kind, params in of.items() if params
    ]  # fmt: skip


def _adamw_by_role(model: nn.Module, n: Numbers) -> Built:
    groups, betas = _by_role(model, n), (float(n["beta1"]), float(n["beta2"]))
    if n["nesterov"]:
        return torch.optim.NAdam(groups, betas=betas, decoupled_weight_decay=True), None
    return torch.optim.AdamW(groups, betas=betas, fused=True), None


def _sgd_ahead(model: nn.Module, n: Numbers) -> Built:
    momentum, decay, ahead = float(n["momentum"]), float(n["decay"]), bool(n["nesterov"])
    return torch.optim.SGD(model.parameters(), lr=float(n["lr"]), momentum=momentum, nesterov=ahead, weight_decay=decay), None


def _schedulefree(model: nn.Module, n: Numbers) -> Built:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(_by_role(model, n), betas=(float(n["beta1"]), float(n["beta2"])))
    optimizer.train()
    return optimizer, None


def _no_schedulefree(model: nn.Module) -> str | None:
    return None if find_spec("schedulefree") else "the package schedulefree is not installed; pip install 'normwise[study]' brings it"


def _torch_muon(model: nn.Module, n: Numbers) -> Built:
    entries = Inventory(model).trainable
    matrices = [e.param for e in entries if _is_matrix(e)]
    decay, rest = float(n["decay"]), [e for e in entries if not _is_matrix(e)]
    groups = [
        {"params": [e.param for e in rest if e.role not in UNDECAYED], "weight_decay": decay},
        {"params": [e.param for e in rest if e.role in UNDECAYED], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        matrices, lr=float(n["lr"]), weight_decay=decay, momentum=float(n["momentum"]), nesterov=bool(n["nesterov"]),
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return (muon, torch.optim.AdamW(groups, lr=float(n["rest"]), betas=(0.9, 0.99), fused=True)), None


def _is_matrix(entry: Entry) -> bool:
    return entry.role in ("hidden", "recurrent") and entry.param.ndim == 2


def _no_matrices(model: nn.Module) -> str | None:
    if any(_is_matrix(entry) for entry in Inventory(model).trainable):
        return None
    return "torch.optim.Muon takes tensors of two dimensions, and this model has none between embedding and head"


def _muon(name: str, **columns: Any) -> Callable[[nn.Module, Numbers], Built]:
    build = _preset(name, "decay", "momentum", polar="fast", **columns)
    return lambda model, n: build(model, n, nesterov=bool(n["nesterov"]))


def _untuned(label: str, about: str, lr: float, build: Callable[[nn.Module, Numbers], Built]) -> Contender:
    return Contender(f"{label}, untuned", f"{about}: one trial", (Axis("lr", (lr,)),), build, LINEAR)


def _batches(times: float) -> tuple[Axis, ...]:
    """No choice but the batch, as a multiple of the task's."""
    return tuple(Axis("batch", (times,)) if axis.name == "batch" else axis for axis in LINEAR)


def _again(name: str) -> Contender:
    """A contender of protocol 1 with the choices that everybody has now."""
    old = FIRST[name]
    if old.common is LINEAR:
        return old
    smaller = old.common is SMALL
    return replace(old, common=tuple(replace(axis, centre=0) if smaller and axis.name == "batch" else axis for axis in EVERYBODY))


_MUON = (_rate(0.01), _REST, _DECAY, _SHORT, _AHEAD)
_DEFAULTS = {"decay": 0.0, "beta1": 0.9, "beta2": 0.999}
"""Schedule-free AdamW's."""
CONTENDERS: dict[str, Contender] = {
    "adamw": Contender(
        "AdamW", "torch's, rates by role; with Nesterov's look ahead torch's NAdam with decoupled decay; biases and gains not decayed",
        (_rate(3e-3), *_ROLES, _DECAY, _BETA1, _BETA2, replace(_AHEAD, centre=0)), _adamw_by_role, EVERYBODY, baseline=True,
    ),
    "sgd": Contender("SGD", "torch's", (*FIRST["sgd"].own, _AHEAD), _sgd_ahead, EVERYBODY, baseline=True),
    "schedulefree": Contender(
        "Schedule-free AdamW", "the authors' (Defazio et al., 2024), rates by role, held after the warm-up; scored at the average",
        (_rate(3e-3), *_ROLES, _DECAY, Axis("beta1", (0.8, 0.9, 0.95, 0.98), 1), _BETA2), _schedulefree, FLAT, _no_schedulefree, True,
    ),
    "torch_muon": Contender(
        "torch's Muon", "torch.optim.Muon, RMS-matched, the gates of a layer as one matrix; AdamW for the rest", _MUON, _torch_muon,
        EVERYBODY, _no_matrices, True,
    ),
    "muon": Contender("Muon", FIRST["muon"].about, _MUON, _muon("Muon", adjust_lr_fn="match_rms_adamw"), EVERYBODY),
    "normuon": Contender("NorMuon", FIRST["normuon"].about, _MUON, _muon("NorMuon"), EVERYBODY),
    **{name: _again(name) for name in FIRST if name not in (*BASELINES, "muon", "normuon")},
    "adamw_untuned": _untuned(
        "AdamW", "torch's defaults", 1e-3, lambda model, n: (torch.optim.AdamW(model.parameters(), lr=float(n["lr"]), fused=True), None)
    ),
    "sgd_untuned": _untuned(
        "SGD", "Nesterov momentum 0.9", 0.1,
        lambda model, n: (torch.optim.SGD(model.parameters(), lr=float(n["lr"]), momentum=0.9, nesterov=True), None),
    ),
    "schedulefree_untuned": replace(
        _untuned("Schedule-free AdamW", "its defaults", 2.5e-3, lambda model, n: _schedulefree(model, {**n, **_DEFAULTS})),
        common=(FLAT[0], *AS_IT_IS[1:]), lacks=_no_schedulefree,
    ),
    "auto_half_batch": replace(FIRST["auto"], label="auto, half the batch", common=_batches(0.5)),
    "auto_double_batch": replace(FIRST["auto"], label="auto, twice the batch", common=_batches(2.0)),
    "muon_untuned": _untuned("Muon", "normwise.optim.Muon's defaults", 0.02, lambda model, n: (nw.optim.Muon(model, float(n["lr"])), None)),
}  # fmt: skip
"""The contenders of protocol 2."""
CATALOGUES = {1: FIRST, 2: CONTENDERS}
"""Contenders by the number of the protocol."""


def racing(names: Sequence[str] | None, table: Mapping[str, Contender] = CONTENDERS) -> list[str]:
    """The baselines and the named contenders, all of them for None. StudyError for an unknown name."""
    return chosen(None if names is None else [*BASELINES, *names], None, table, "contender")
