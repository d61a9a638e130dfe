"""What ``tune`` searches over: a bound, a pull and a clip at a time, on which weights and how strongly, an optimizer and its rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.advice.facts import Facts
from normwise.errors import StudyError, nearest
from normwise.experiments.catalog.contenders import CONTENDERS
from normwise.experiments.catalog.optimizers import OPTIMIZERS, Optimizer
from normwise.experiments.framework.lattice import Axis
from normwise.policy.rule import MATRICES

Numbers = Mapping[str, Any]
"""A candidate: ``optimizer``, ``lr`` (a multiple of the optimizer's rate), the choice of each slot, and the choice's own numbers."""
NONE = "none"
LOWEST, HIGHEST = 1 / 27, 3.0
"""Of the learning rate, in multiples of the optimizer's rate."""
GRID = 5
MOST_RATE = 1e100
"""The highest learning rate that a range may have: multiples of it are still numbers."""
WHERE: dict[str, dict[str, Any]] = {"matrices": {"params": MATRICES, "optional": True}, "weights": {}}


@dataclass(frozen=True)
class Option:
    """A rule that a slot may take.

    about: for tables. axes: the strengths, by name with the lowest and the highest; searched on a logarithmic scale. rules: strengths, and
    the selector as keywords, to rules. placed: whether it is searched on which weights it acts. lr: what stands for the optimizer's rate
    under rules that say themselves how long a step is.
    """

    about: str
    axes: Mapping[str, tuple[float, float]]
    rules: Callable[..., Any]
    placed: bool = True
    lr: float | None = None


def _times_init(name: str, **fixed: Any) -> Callable[..., Any]:
    return lambda radius, **where: getattr(nw, name)(f"{radius:g}*init", **where, **fixed)


SLOTS: dict[str, dict[str, Option]] = {
    "bound": {
        "max_norm": Option("each unit's norm at most radius × its first", {"radius": (0.5, 8.0)}, _times_init("max_norm")),
        "spectral_cap": Option(
            "singular values at most radius × the first largest", {"radius": (0.5, 8.0)}, _times_init("spectral_cap", tolerance=0.01)
        ),
        "unit_norm": Option("each unit's norm always radius × its first", {"radius": (0.5, 4.0)}, _times_init("unit_norm")),
        "hyperball": Option(
            "matrices on a sphere of radius × their first norm, steps of length rate × radius", {"radius": (0.5, 4.0)},
            _times_init("hyperball"), placed=False, lr=0.06,
        ),
        "radial_brake": Option(
            "of what a step adds to a matrix's norm only the share keep", {"keep": (0.05, 0.95)},
            nw.radial_brake, placed=False,
        ),
    },
    "pull": {
        "weight_decay": Option("decoupled decay", {"strength": (0.003, 3.0)}, nw.weight_decay),
        "l2_penalty": Option("strength/2 · ‖w‖² beside the loss", {"strength": (1e-5, 1e-2)}, nw.l2_penalty),
        "l1_prox": Option("soft threshold: zeros", {"strength": (1e-6, 1e-3)}, nw.l1_prox),
    },
    "clip": {
        "clip_grad_norm": Option("the norm of all gradients", {"limit": (0.1, 10.0)}, lambda limit: nw.clip_grad_norm(limit), placed=False),
        "agc": Option(
            "each unit's gradient, in multiples of its weights' norm", {"clipping": (0.003, 0.3)}, nw.agc, placed=False,
        ),
        "autoclip": Option(
            "the gradient at a percentile of its norms so far", {"percentile": (10.0, 99.0)}, nw.autoclip, placed=False,
        ),
    },
}  # fmt: skip


def _auto(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    built = CONTENDERS["auto"].build(model, {"lr": lr})[0]
    assert isinstance(built, torch.optim.Optimizer)
    return built


def _advised(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    for path in Facts.of(model).sparse:    # as the advice says
        model.get_submodule(path).sparse = False    # type: ignore[assignment]
    made = nw.advise(model).optimizer.build(model)
    for group in made.param_groups:
        group["lr"] *= lr
    return made


ADVISED = "advised"
CHOICES: dict[str, Optimizer] = {
    **OPTIMIZERS,
    "auto": Optimizer(
        "auto", CONTENDERS["auto"].own[0], _auto, "normwise.optim.auto with its decays, all rates multiplied; 0.028 is auto as it stands"
    ),
    ADVISED: Optimizer(ADVISED, Axis("lr", (3.0,)), _advised, "nw.advise's optimizer and rules; the rate multiplies its own"),
}  # fmt: skip
_MULTIPLIED = """
for group in optimizer.param_groups:
    group["lr"] *= """
_ON_SPHERES = """for w in (module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)):
    w.data *= (2 / w[0].numel()) ** 0.5 / w.detach().square().mean().sqrt()
"""
_CODES = {
    "gd": "optimizer = torch.optim.SGD(model.parameters(), lr={lr})",
    "momentum": "optimizer = torch.optim.SGD(model.parameters(), lr={lr}, momentum=0.9)",
    "adam": "optimizer = torch.optim.AdamW(model.parameters(), lr={lr}, weight_decay=0.0)",
    "normalized_sgd": "optimizer = nw.optim.NormalizedSGD(model, lr={lr})",
    "signum": "optimizer = nw.optim.Signum(model, lr={lr})",
    "lion": "optimizer = nw.optim.Lion(model, lr={lr})",
    "lars": "optimizer = nw.optim.LARS(model, lr={lr}, trust=0.02)",
    "lamb": "optimizer = nw.optim.LAMB(model, lr={lr})",
    "muon": 'optimizer = nw.optim.Muon(model, lr={lr}, adamw={{"lr": {lr}}}, adjust_lr_fn="match_rms_adamw", weight_decay=0.0)',
    "normuon": 'optimizer = nw.optim.NorMuon(model, lr={lr}, adamw={{"lr": {lr}}}, weight_decay=0.0)',
    "scion": "optimizer = nw.optim.Scion(model, lr={lr}, radius=8.0, head_radius=1.0)",
    "adamh": _ON_SPHERES + 'optimizer = nw.optim.AdamH(model, lr={lr}, adamw={{"lr": {lr}}})',
    "muonh": _ON_SPHERES + 'optimizer = nw.optim.MuonH(model, lr={lr}, adamw={{"lr": {lr}}})',
    "auto": "optimizer = nw.optim.auto(model)" + _MULTIPLIED + "{lr} / 0.028",
}
"""What the entries of ``CHOICES`` build, as a user would write it; the advised optimizer's depends on the model."""
USUAL = ("adam", "momentum", "muon", "auto", ADVISED)
START = 1 / 3
"""Where the advised rates are as they are advised."""


@dataclass(frozen=True)
class Space:
    """optimizers: the first is the user's. slots: names of rules by slot. low, high: of the rate, in multiples of an optimizer's."""

    optimizers: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]
    low: float = LOWEST
    high: float = HIGHEST

    def suggested(self, trial: Any) -> dict[str, Any]:
        """The numbers of an Optuna trial: what it has fixed, and what its sampler suggests for the rest."""
        numbers = {"optimizer": trial.suggest_categorical("optimizer", self.optimizers)}
        numbers["lr"] = trial.suggest_float("lr", self.low, self.high, log=True)
        for slot, names in self.slots.items() if numbers["optimizer"] != ADVISED else ():
            name = numbers[slot] = trial.suggest_categorical(slot, (NONE, *names))
            if name == NONE:
                continue
            option = SLOTS[slot][name]
            for axis, (low, high) in option.axes.items():
                numbers[f"{name} {axis}"] = trial.suggest_float(f"{name} {axis}", low, high, log=True)
            if option.placed:
                numbers[f"{name} on"] = trial.suggest_categorical(f"{name} on", tuple(WHERE))
        return numbers

    def nothing(self, lr: float, optimizer: str = "") -> dict[str, Any]:
        """The user's optimizer, or another one, without rules, at a multiple of its rate."""
        return {"optimizer": optimizer or self.optimizers[0], "lr": lr, **dict.fromkeys(self.slots, NONE)}

    def first(self) -> list[dict[str, Any]]:
        """What is tried before the sampler is asked: nothing over the range of rates, the middle one first, and what is advised."""
        ratio = (self.high / self.low) ** (1 / (GRID - 1))
        found = [self.nothing(min(self.high, self.low * ratio**k)) for k in (2, 3, 1, 4, 0)]
        advised = self.advised()
        return [*found, *([advised] if advised is not None else [])]

    def advised(self) -> dict[str, Any] | None:
        """What ``nw.advise`` says, at its own rates as far as they lie in the range; None where it is left out."""
        return {"optimizer": ADVISED, "lr": min(max(START, self.low), self.high)} if ADVISED in self.optimizers else None

    def is_nothing(self, numbers: Numbers) -> bool:
        return combination(numbers) == combination(self.nothing(1.0))

    def plain(self) -> dict[str, Any]:
        """As data, with the ranges: two studies of equal spaces may share their trials."""
        axes = {name: dict(SLOTS[slot][name].axes) for slot, names in self.slots.items() for name in names}
        rates = {name: CHOICES[name].lr.values[0] for name in self.optimizers}
        # In studies from before, auto kept its decays under these rules and was refused each time.
        lengths = [name for slot, names in self.slots.items() for name in names if SLOTS[slot][name].lr is not None]
        undecayed = {"undecayed": lengths} if lengths and "auto" in self.optimizers else {}
        return {**asdict(self), "axes": axes, "rates": rates, **undecayed}


def space_of(names: Sequence[str] | None, lr: tuple[float, float] | None = None) -> Space:
    """The space of these rules and optimizers, of all rules and the usual optimizers where none of them is named.

    Args:
        names: of rules and optimizers; the order of the optimizers counts.
        lr: lowest and highest rate of the first optimizer.

    Raises:
        StudyError: for an unknown name, no name, or a range that is none.
    """
    rules = {name: slot for slot, options in SLOTS.items() for name in options}
    if names is not None and not names:
        raise StudyError(f"No rule or optimizer was given; name one or more of {', '.join([*rules, *CHOICES])}.")
    for name in names or ():
        if name not in rules and name not in CHOICES:
            raise StudyError(f"rule or optimizer {name!r} is not known.{nearest(name, [*rules, *CHOICES])}")
    optimizers = tuple(dict.fromkeys(name for name in names or () if name in CHOICES)) or USUAL
    if optimizers[0] == ADVISED:
        raise StudyError(f"{ADVISED} cannot be your own optimizer: name yours before it, as --only adam,{ADVISED}.")
    named = [name for name in names or () if name in rules] or list(rules)
    slots = {slot: tuple(name for name in options if name in named) for slot, options in SLOTS.items()}
    kept = {slot: chosen for slot, chosen in slots.items() if chosen}
    if lr is None:
        return Space(optimizers, kept)
    rate = float(CHOICES[optimizers[0]].lr.values[0])
    if not 0 < lr[0] < lr[1] <= MOST_RATE:
        raise StudyError(f"the range of learning rates is {lr[0]:g} to {lr[1]:g}, but must go from a number above 0 to a larger one, at "
                         f"most {MOST_RATE:g}.")  # fmt: skip
    return Space(optimizers, kept, lr[0] / rate, lr[1] / rate)


# ----------------------------------------------------------------------------------------------------------- a candidate


def combination(numbers: Numbers) -> tuple[str, ...]:
    """Optimizer and choices, without their strengths."""
    return (numbers["optimizer"], *(numbers.get(slot, NONE) for slot in SLOTS))


def rate(numbers: Numbers) -> float:
    """The learning rate, to three digits."""
    own = float(CHOICES[numbers["optimizer"]].lr.values[0])
    instead = [option.lr for option in _chosen(numbers).values() if option.lr is not None]
    return _short((instead[0] if instead else own) * numbers["lr"])


def built(numbers: Numbers, model: nn.Module) -> torch.optim.Optimizer:
    """The candidate's optimizer for a model. Only auto and what is advised decay by themselves; a rule's decay comes on top of that."""
    made = CHOICES[numbers["optimizer"]].build(model, rate(numbers))
    for group in made.param_groups if _undecayed(numbers) else ():
        group["weight_decay"] = 0.0
    return made


def code(numbers: Numbers, model: nn.Module) -> str:
    """What :func:`built` does, to paste: from ``model``, which is asked before it is built for, to ``optimizer``."""
    lr = rate(numbers)
    if numbers["optimizer"] != ADVISED:
        return _CODES[numbers["optimizer"]].format(lr=lr) + ('\n    group["weight_decay"] = 0.0' if _undecayed(numbers) else "")
    sparse = "".join(f"model.get_submodule({path!r}).sparse = False\n" for path in Facts.of(model).sparse)
    return f"{sparse}optimizer = {nw.advise(model).optimizer}" + (f"{_MULTIPLIED}{lr}" if lr != 1 else "")


def _undecayed(numbers: Numbers) -> bool:
    """Whether auto goes without its decays: a rule that sets the length of a step would undo them, and is refused beside them."""
    return bool(numbers["optimizer"] == "auto" and any(option.lr is not None for option in _chosen(numbers).values()))


def policy(numbers: Numbers, model: nn.Module) -> nw.Policy:
    """The candidate's rules, for a model."""
    if numbers["optimizer"] == ADVISED:
        return nw.advise(model).policy
    where = {name: WHERE.get(numbers.get(f"{name} on", ""), {}) for name in _chosen(numbers)}
    return nw.Policy([option.rules(**_strengths(numbers, name, option), **where[name]) for name, option in _chosen(numbers).items()])


def label(numbers: Numbers) -> str:
    """In words: ``adam + max_norm (radius 2, matrices)``."""
    told = []
    for name, option in _chosen(numbers).items():
        parts = [f"{axis} {value:g}" for axis, value in _strengths(numbers, name, option).items()]
        told.append(f"{name} ({', '.join([*parts, *([numbers[f'{name} on']] if option.placed else [])])})")
    return " + ".join([numbers["optimizer"], *told])


def _chosen(numbers: Numbers) -> dict[str, Option]:
    names = [(slot, numbers.get(slot, NONE)) for slot in SLOTS]
    return {name: SLOTS[slot][name] for slot, name in names if name != NONE}


def _strengths(numbers: Numbers, name: str, option: Option) -> dict[str, float]:
    return {axis: _short(numbers[f"{name} {axis}"]) for axis in option.axes}


def _short(value: float) -> float:
    """To three digits: what is tried is exactly what is printed."""
    return float(f"{value:.3g}")
