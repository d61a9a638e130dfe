"""The catalogue of the studies: what is trained, under which name, and what is tuned of it.

``CONTENDERS`` race, each the same on every task; ``GAN_STRATEGIES`` train a GAN; ``STRATEGIES`` are compared with ``OPTIMIZERS``. Another
one is one more row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.framework.lattice import Axis, Point, Value, values
from normwise.experiments.framework.study import chosen
from normwise.experiments.tasks.initial_weights import KINDS
from normwise.experiments.tasks.models.dcgan import Discriminator, Score, gradient_penalty, r1_penalty
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


def _axis(name: str, centre: float, ratio: float = 2.0, off: int = 0, most: float = math.inf) -> Axis:
    """An endless axis around a value."""
    return Axis(name, (centre,), ratio=ratio, off=off, most=most)


def _rate(centre: float) -> Axis:
    return _axis("lr", centre)


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
_ROLES = (_axis("tables", 1.0, 3.0), _axis("vectors", 1.0, 3.0))
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


# ----------------------------------------------------------------------------------------------------------------- a GAN


Strengths = Mapping[str, float]
Penalty = Callable[[Score, Tensor, Tensor, torch.Generator | None], Tensor]
Rules = Callable[[Strengths], list[Any]]

BASELINE = "nothing"
LR = _axis("lr", 0.004, 3.0)
"""Of both optimizers; a cell that looks for nothing else starts at a ninth of it to nine times it."""
TRACKED = 0.01
"""Tolerance of the caps: singular values at most 1.01 times the radius, at a small part of an exact cap's time."""

_RADIUS = _axis("radius", 2.0, off=1)
_PENALTY = _axis("penalty", 1.0, 10.0, off=-1)


def _rule(name: str, *strengths: str, **fixed: Any) -> Callable[..., list[Any]]:
    """The rule of this name, with these strengths as its first arguments."""

    def rules(numbers: Strengths, samples: int = 0) -> list[Any]:
        return [getattr(nw, name)(*(numbers[strength] for strength in strengths), **fixed)]

    return rules


_cap = _rule("spectral_cap", "radius", tolerance=TRACKED)


@dataclass(frozen=True)
class GanStrategy:
    """label, about: for tables. axes: strengths to search, beside the learning rate. rules, generator_rules: strengths to the rules
    of the discriminator, of the generator. penalty: what strengths["penalty"] times is added to the discriminator's loss. wrap: what
    is done to the discriminator before anything else, for what is no rule."""

    label: str
    about: str
    axes: tuple[Axis, ...] = ()
    rules: Rules = lambda strengths: []
    generator_rules: Rules = lambda strengths: []
    penalty: Penalty | None = None
    wrap: Callable[[Discriminator], None] = lambda discriminator: None

    @property
    def tuned(self) -> tuple[Axis, ...]:
        """What is searched: the learning rate, then the strategy's strengths."""
        return (LR, *self.axes)


def _parametrize(discriminator: Discriminator) -> None:
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.utils.parametrizations.spectral_norm(layer)


GAN_STRATEGIES: dict[str, GanStrategy] = {
    "nothing": GanStrategy("nothing", "no limit, no penalty: the baseline"),
    "clip_value": GanStrategy(
        "weight clipping", "the discriminator's entries in ±bound after its step, as in WGAN (Arjovsky et al., 2017)",
        (_axis("bound", 0.05, 3.0, off=1),), _rule("clip_weight_value", "bound", params="role:all"),
    ),
    "spectral_cap": GanStrategy("spectral cap", "singular values of the discriminator's layers at most the radius", (_RADIUS,), _cap),
    "spectral_normalize": GanStrategy(
        "spectral normalisation", "largest singular value of each layer 1 after each step, by a rule",
        rules=_rule("spectral_normalize", radius=1.0),
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
        "cap on both", "the spectral cap on the generator too, with a radius of its own", (_RADIUS, _axis("generator_radius", 2.0, off=1)),
        _cap, _rule("spectral_cap", "generator_radius", tolerance=TRACKED),
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------- strategies and optimizers to compare


@dataclass(frozen=True)
class Strategy:
    """A policy of given strengths, to attach to any optimizer.

    Args:
        label: for tables.
        about: one line.
        axes: the strengths to search, beside the learning rate.
        rules: strengths and the number of training samples to rules.
        lr: where to look for the learning rate in the place of the optimizer's own axis, for rules that say themselves what it means.
    """

    label: str
    about: str
    axes: tuple[Axis, ...]
    rules: Callable[[Strengths, int], list[Any]]
    lr: Axis | None = None


def _penalty(name: str, strength: str) -> Callable[[Strengths, int], list[Any]]:
    # Searched as λ/m, the factor on ½‖θ‖² or on ‖θ‖₁ beside the mean loss: unlike λ it means the same for every number of samples m.
    # The rule gets λ, as the article writes it.
    return lambda numbers, m: _rule(name, "λ", samples=m)({"λ": float(f"{numbers[strength] * m:.6g}")}, m)


def _both(label: str, about: str, first: Strategy, second: Strategy) -> Strategy:
    return Strategy(label, about, first.axes + second.axes, lambda numbers, m: [*first.rules(numbers, m), *second.rules(numbers, m)])


_L1 = _axis("l1", 1e-4, 10.0, off=-1)
_LIMIT = _axis("radius", 2.0, off=1)
_SPHERE = _axis("radius", 1.0)
_L2_PENALTY = Strategy(
    "L2 penalty", "the article's λ/2m Σθ² over all parameters", (_axis("l2", 1e-3, 10.0, off=-1),), _penalty("l2_penalty", "l2")
)
_L1_PENALTY = Strategy("L1 penalty", "the article's λ/m Σ|θ| over all parameters", (_L1,), _penalty("l1_penalty", "l1"))
_TENSOR = Strategy(
    "clip by tensor norm", "the L2 norm of each weight tensor at most the radius", (_axis("radius", 4.0, off=1),),
    _rule("clip_weight_norm", "radius"),
)  # fmt: skip
_MAX_NORM = Strategy("max-norm", "each unit's weight vector at most the radius", (_LIMIT,), _rule("max_norm", "radius"))

ARTICLE: dict[str, Strategy] = {
    BASELINE: Strategy("nothing", "no decay, no limit: the baseline", (), lambda numbers, samples: []),
    "l2": _L2_PENALTY,
    "l1": _L1_PENALTY,
    "clip_value": Strategy(
        "clip by value", "every parameter's entries in ±bound", (_axis("bound", 0.5, off=1),),
        _rule("clip_weight_value", "bound", params="role:all"),
    ),
    "clip_tensor_norm": _TENSOR,
    "normalise": Strategy(
        "normalise units", "each unit's weight vector to the radius, at every step", (_SPHERE,), _rule("unit_norm", "radius")
    ),
    "max_norm": _MAX_NORM,
    "spectral_cap": Strategy("spectral cap", "singular values at most the radius", (_LIMIT,), _rule("spectral_cap", "radius")),
    "soft_threshold": Strategy("soft threshold", "the L1 prox after the step: exact zeros", (_L1,), _rule("l1_prox", "l1")),
    "weight_decay": Strategy(
        "decoupled decay", "θ ← (1 − ηλ)θ before the step, as AdamW does",
        (_axis("decay", 0.1, 10.0, off=-1),), _rule("weight_decay", "decay"),
    ),
    "l2+max_norm": _both("L2 + max-norm", "the penalty and the limit per unit", _L2_PENALTY, _MAX_NORM),
    "l1+clip_tensor_norm": _both("L1 + tensor norm", "the penalty and the limit per tensor", _L1_PENALTY, _TENSOR),
}  # fmt: skip
"""The article's strategies and what they are made of: those that are compared where none are named."""

PUBLISHED: dict[str, Strategy] = {
    "hyperball": Strategy(
        # The article's weights start at a deviation of 0.02, a tenth and less of what layers of this size need: a sphere of their own norm
        # would keep them from learning. Sixteen times as much is near He's initialisation, which the method's authors start from.
        "Hyperball", "matrices on a sphere of a multiple of their initial norm, steps of the length lr × radius",
        (_axis("multiple", 16.0, 4.0),), lambda numbers, samples: [*nw.hyperball(f"{numbers['multiple']:g}*init")],
        lr=_axis("lr", 0.02, 3.0),
    ),
    "relative_update": Strategy(
        "relative update", "steps of matrices of the length scale × lr × ‖w‖",
        (_axis("scale", 1.0, 8.0),), _rule("relative_update", "scale"),
    ),
    "radial_brake": Strategy(
        "radial brake", "of what a step adds to a matrix's norm the share keep is kept",
        (_axis("keep", 0.5, off=1, most=1.0),), _rule("radial_brake", "keep"),
    ),
    "cpr": Strategy("CPR", "each matrix bounded from where its growth slows down, by a decay of its own", (), _rule("cpr")),
    "autoclip": Strategy(
        "AutoClip", "the gradient at most a percentile of its norms so far",
        (_axis("percentile", 30.0, 3.0, off=1, most=100.0),), _rule("autoclip", "percentile"),
    ),
    "zclip": Strategy(
        "ZClip", "gradients clipped that lie more than z deviations above their mean norm",
        (_axis("z", 2.5, off=1),), _rule("zclip", "z"),
    ),
    "orthogonal": Strategy(
        "orthogonal", "matrices made orthogonal after the step, all singular values the radius", (_SPHERE,), _rule("orthogonal", "radius")
    ),
    "orthogonal_penalty": Strategy(
        "orthogonality penalty", "strength/4 · ‖WWᵀ − I‖² of matrices beside the loss",
        (_axis("strength", 0.1, 10.0, off=-1),), _rule("orthogonal_penalty", "strength"),
    ),
}  # fmt: skip
"""Published methods (docs/published-methods.md) as strategies, on what each acts on by default."""

STRATEGIES: dict[str, Strategy] = {**ARTICLE, **PUBLISHED}


@dataclass(frozen=True)
class Optimizer:
    """label, about: for tables. lr: where to look for the learning rate. build: model and learning rate to an optimizer that decays
    nothing by itself, so that every strategy starts from the same one."""

    label: str
    lr: Axis
    build: Callable[[nn.Module, float], torch.optim.Optimizer]
    about: str


TORCH: dict[str, Optimizer] = {
    "gd": Optimizer("gradient descent", _axis("lr", 0.4, 3.0), lambda m, lr: torch.optim.SGD(m.parameters(), lr), "torch's SGD"),
    "momentum": Optimizer(
        "momentum", _axis("lr", 0.06, 3.0), lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9), "torch's SGD with momentum 0.9"
    ),
    "adam": Optimizer(
        "Adam", _axis("lr", 0.005, 3.0), lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=0.0),
        "torch's AdamW without decay",
    ),
}
"""The article's optimizers: those that are compared where none are named."""


def _plain(
    name: str, own_rest: bool = False, on_spheres: bool = False, **columns: Any
) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The preset with these columns.

    Args:
        own_rest: with AdamW at the same learning rate for what it does not take: one rate is searched, as with every optimizer.
        on_spheres: from convolutions of the size that He et al. (2015) give them, which it then keeps: the article's 0.02 is a tenth of
            that and less, and on spheres so small the network does not learn.
    """

    def build(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        for w in (module.weight for module in model.modules() if on_spheres and isinstance(module, nn.Conv2d)):
            w.data *= (2 / w[0].numel()) ** 0.5 / w.detach().square().mean().sqrt()
        rest: dict[str, Any] = {"adamw": {"lr": lr}} if own_rest else {}
        optimizer: torch.optim.Optimizer = getattr(nw.optim, name)(model, lr, **rest, **columns)
        return optimizer

    return build


# What each learning rate means differs from preset to preset; the centres are from a first look at digits.
PRESETS: dict[str, Optimizer] = {
    "normalized_sgd": Optimizer(
        "normalised SGD", _axis("lr", 0.06, 3.0), _plain("NormalizedSGD"), "each tensor's averaged gradient at length lr"
    ),
    "signum": Optimizer("Signum", _axis("lr", 0.003, 3.0), _plain("Signum"), "the signs of the averaged gradient"),
    "lion": Optimizer("Lion", _axis("lr", 0.003, 3.0), _plain("Lion"), "the signs of a mix of gradient and average"),
    "lars": Optimizer(
        "LARS", _axis("lr", 0.3, 3.0), _plain("LARS", trust=0.02),
        "momentum with steps relative to each tensor's norm, trust 0.02: with the paper's 0.001 a rate that moves the weights would "
        "throw the biases, which have no ratio",
    ),
    "lamb": Optimizer("LAMB", _axis("lr", 0.03, 3.0), _plain("LAMB"), "Adam with steps relative to each tensor's norm"),
    "muon": Optimizer(
        "Muon", _axis("lr", 0.01, 3.0), _plain("Muon", own_rest=True, adjust_lr_fn="match_rms_adamw", weight_decay=0.0),
        "orthogonalised momentum for hidden matrices and convolutions, RMS-matched; AdamW at the same rate for the rest",
    ),
    "normuon": Optimizer(
        "NorMuon", _axis("lr", 0.01, 3.0), _plain("NorMuon", own_rest=True, weight_decay=0.0),
        "Muon with units of equal step; AdamW at the same rate for the rest",
    ),
    "scion": Optimizer(
        "Scion", _axis("lr", 0.01, 3.0), _plain("Scion", radius=8.0, head_radius=1.0),
        "unconstrained; radius 8 for convolutions, as in the paper, and 1 for the head: its 128 is for layers that are wider",
    ),
    "adamh": Optimizer(
        "AdamH", _axis("lr", 0.01, 3.0), _plain("AdamH", own_rest=True, on_spheres=True),
        "Adam on spheres, of convolutions those of He's initial norm; AdamW at the same rate for the rest",
    ),
    "muonh": Optimizer(
        "MuonH", _axis("lr", 0.02, 3.0), _plain("MuonH", own_rest=True, on_spheres=True),
        "Muon on spheres, of convolutions those of He's initial norm; AdamW at the same rate for the rest",
    ),
}  # fmt: skip
"""Presets of ``normwise.optim`` as optimizers, without weight decay. Their SGD and AdamW are torch's, and so gd, momentum and adam."""

OPTIMIZERS: dict[str, Optimizer] = {**TORCH, **PRESETS}
SPHERES = ("adamh", "muonh")
"""Those that keep their matrices on a sphere."""
_ON_A_SPHERE = ("hyperball", "relative_update", "radial_brake")


def why_not(strategy: str, optimizer: str) -> str | None:
    """Why a strategy says nothing with this optimizer, in words that follow its name; None where it does."""
    if optimizer in SPHERES and strategy in _ON_A_SPHERE:
        return "already keeps its matrices on a sphere and sets the length of their steps"
    if optimizer == "lamb" and strategy == "relative_update":
        return "already takes steps of the length lr × ‖w‖"
    return None


def axes_of(strategy: str, optimizer: str) -> tuple[Axis, ...]:
    """What is searched of a pair: the learning rate, then the strategy's strengths."""
    own = STRATEGIES[strategy]
    return (own.lr or OPTIMIZERS[optimizer].lr, *own.axes)
