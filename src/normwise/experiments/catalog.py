"""The catalogue of the studies: what is trained, under which name, and what is tuned of it.

``CONTENDERS`` race, each the same on every task; ``GAN_STRATEGIES`` train a GAN. Another one is one more row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normwise.experiments.framework.lattice import Axis, Point, Value, values
from normwise.experiments.framework.study import chosen
from normwise.experiments.tasks.initial_weights import KINDS
from normwise.experiments.tasks.models.dcgan import Discriminator, Score, gradient_penalty, r1_penalty

Numbers = Mapping[str, Value]
Built = tuple[torch.optim.Optimizer, Any]
BASELINES = ("adamw", "sgd")

COMMON = (
    Axis("schedule", ("linear", "hold")),
    Axis("init", KINDS),
    Axis("batch", (0.5, 1.0, 2.0), 1),
    Axis("clip", (0.0, 1.0)),
)
"""What is no norm strategy of the weights or updates, or everybody's: each contender, the baselines too, may choose it."""


SMALL = tuple(Axis("batch", axis.values, 0) if axis.name == "batch" else axis for axis in COMMON)
"""The same choices, their search begun at half of the batch."""
AS_IT_IS = (Axis("schedule", ("hold",)), Axis("init", ("own",)), Axis("batch", (1.0,)), Axis("clip", (0.0,)))
"""For what stands for making no choice at all, with a rate that is held."""
LINEAR = (Axis("schedule", ("linear",)), *AS_IT_IS[1:])
"""The same with a rate that falls from the start."""


@dataclass(frozen=True)
class Contender:
    """label, about: for tables. own: the rate first, then what is the family's own. build: model and numbers to an optimizer and the
    control that is attached to it, if there is one. common: what everybody may choose."""

    label: str
    about: str
    own: tuple[Axis, ...]
    build: Callable[[nn.Module, Numbers], Built]
    common: tuple[Axis, ...] = COMMON

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
    return Axis("lr", (centre,), ratio=2.0)


_REST = Axis("rest", (0.001, 0.002, 0.004, 0.008, 0.016), 2)
"""The learning rate of the AdamW that takes embeddings, heads, biases and gains."""
_RIDGE = (_rate(0.02), Axis("rest", (0.002, 0.004, 0.008, 0.016, 0.032), 2), Axis("damping", (0.01, 0.03, 0.1), 1))
_DECAY = Axis("decay", (0.0, 0.01, 0.1, 0.3), 2)


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
        (_rate(3e-3), _DECAY, Axis("beta2", (0.95, 0.99, 0.999), 1)), _adamw,
    ),
    "sgd": Contender(
        "SGD", "torch's, Nesterov momentum",
        (_rate(0.1), Axis("decay", (0.0, 1e-4, 5e-4, 2e-3), 2), Axis("momentum", (0.8, 0.9, 0.95), 1)), _sgd,
    ),
    "adamw_max_norm": Contender(
        "AdamW + max-norm", "AdamW without decay, each unit's weights within radius times their initial norm",
        (_rate(3e-3), Axis("radius", (1.0, 1.5, 2.5, 4.0), 1), Axis("beta2", (0.95, 0.99, 0.999), 1)), _adamw_max_norm,
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
        (_rate(1e-3), Axis("radius", (3.0, 10.0, 30.0, 100.0), 1), Axis("head", (10.0, 100.0, 1000.0), 1)), _scion,
    ),
    "ridge": Contender("Ridge", "momentum through its damped pseudo-inverse, RMS-matched; AdamW for the rest", _RIDGE, _ridge),
    "ridge_small": Contender(
        "Ridge, small batch", "Ridge, its search begun at half of the batch and 0.7 of the rates; momentum 0.8 for gates too",
        (_rate(0.014), Axis("rest", (0.0014, 0.0028, 0.0056, 0.0112, 0.0224), 2), Axis("damping", (0.01, 0.03, 0.1), 1)),
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


def racing(names: Sequence[str] | None) -> list[str]:
    """The baselines and the named contenders, all of them for None. StudyError for an unknown name."""
    return chosen(None if names is None else [*BASELINES, *names], None, CONTENDERS, "contender")


# ----------------------------------------------------------------------------------------------------------------- a GAN


Strengths = Mapping[str, float]
Penalty = Callable[[Score, Tensor, Tensor, torch.Generator | None], Tensor]
Rules = Callable[[Strengths], list[Any]]

BASELINE = "nothing"
LR = Axis("lr", (0.004,), ratio=3.0)
"""Of both optimizers; a cell that looks for nothing else starts at a ninth of it to nine times it."""
TRACKED = 0.01
"""Tolerance of the caps: singular values at most 1.01 times the radius, at a small part of an exact cap's time."""

_BOUND = Axis("bound", (0.05,), ratio=3.0, off=1)
_RADIUS = Axis("radius", (2.0,), ratio=2.0, off=1)
_GENERATOR_RADIUS = Axis("generator_radius", (2.0,), ratio=2.0, off=1)
_PENALTY = Axis("penalty", (1.0,), ratio=10.0, off=-1)


def _no_rules(strengths: Strengths) -> list[Any]:
    return []


def _no_wrapping(discriminator: Discriminator) -> None:
    pass


@dataclass(frozen=True)
class GanStrategy:
    """label, about: for tables. axes: strengths to search, beside the learning rate. rules, generator_rules: strengths to the rules
    of the discriminator, of the generator. penalty: what strengths["penalty"] times is added to the discriminator's loss. wrap: what
    is done to the discriminator before anything else, for what is no rule."""

    label: str
    about: str
    axes: tuple[Axis, ...] = ()
    rules: Rules = _no_rules
    generator_rules: Rules = _no_rules
    penalty: Penalty | None = None
    wrap: Callable[[Discriminator], None] = _no_wrapping

    @property
    def tuned(self) -> tuple[Axis, ...]:
        """What is searched: the learning rate, then the strategy's strengths."""
        return (LR, *self.axes)


def _clip(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.clip_weight_value(strengths["bound"], params="role:all")]


def _cap(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.spectral_cap(strengths["radius"], tolerance=TRACKED)]


def _generator_cap(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.spectral_cap(strengths["generator_radius"], tolerance=TRACKED)]


def _unit_spectral_norm(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.spectral_normalize(1.0)]


def _parametrize(discriminator: Discriminator) -> None:
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.utils.parametrizations.spectral_norm(layer)


GAN_STRATEGIES: dict[str, GanStrategy] = {
    "nothing": GanStrategy("nothing", "no limit, no penalty: the baseline"),
    "clip_value": GanStrategy(
        "weight clipping", "the discriminator's entries in ±bound after its step, as in WGAN (Arjovsky et al., 2017)",
        (_BOUND,), _clip,
    ),
    "spectral_cap": GanStrategy("spectral cap", "singular values of the discriminator's layers at most the radius", (_RADIUS,), _cap),
    "spectral_normalize": GanStrategy(
        "spectral normalisation", "largest singular value of each layer 1 after each step, by a rule", rules=_unit_spectral_norm
    ),
    "torch_spectral_norm": GanStrategy(
        "torch's spectral_norm", "the parametrization of Miyato et al. (2018) as torch has it: the outside reference", wrap=_parametrize
    ),
    "gradient_penalty": GanStrategy(
        "gradient penalty", "strength · E (‖∇D‖ - 1)² between real and drawn images (Gulrajani et al., 2017)",
        (_PENALTY,), penalty=gradient_penalty,
    ),
    "r1": GanStrategy("R1", "strength · ½ E ‖∇D‖² at real images (Mescheder et al., 2018)", (_PENALTY,), penalty=r1_penalty),
    "spectral_cap+gradient_penalty": GanStrategy(
        "cap + gradient penalty", "the spectral cap and the gradient penalty", (_RADIUS, _PENALTY), _cap, penalty=gradient_penalty
    ),
    "spectral_cap+generator": GanStrategy(
        "cap on both", "the spectral cap on the generator too, with a radius of its own", (_RADIUS, _GENERATOR_RADIUS), _cap, _generator_cap
    ),
}  # fmt: skip
