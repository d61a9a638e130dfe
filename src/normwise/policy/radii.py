"""Radii that a rule measures or finds in training: step lengths, brakes, quantiles and z-scores of gradient norms, CPR's bounds.

All are plain data, as the schedules are: they compare by value and go to YAML. ``normwise.engine.rules`` computes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, TypeAlias

from normwise.errors import PolicyError, nearest
from normwise.parameters.layouts import PER
from normwise.policy import schedules
from normwise.policy.schedules import SCHEDULES, Checks, Plain, Varying, count, is_number, label, number, one_entry, varying

LENGTHS = ("init", "weight", "number")
MOST_WINDOW = 1_000_000
"""Norms remembered: they are sorted once a step, and take 8 MB for each block."""


@dataclass(frozen=True)
class Init(Plain):
    """A radius that is ``scale`` times the norm that the weight block had when the policy was attached.

    The norm is stored then and kept in the control's state, since a step of the optimizer changes it. ``"init"`` and ``"1.5*init"`` are
    short forms.

    Args:
        scale: a number > 0 or a schedule; default 1.
    """

    scale: Varying = 1.0
    name: ClassVar[str] = "init"
    _checks: ClassVar[Checks] = {"scale": partial(varying, what="the multiple of 'init'")}

    def to_data(self) -> Any:
        """``"init"`` or ``"1.5*init"``; with a schedule the long form."""
        if callable(self.scale):
            return super().to_data()
        return self.name if self.scale == 1 else f"{self.scale!r}*{self.name}"

    def label(self) -> str:
        return self.name if self.scale == 1 else f"{label(self.scale)}*{self.name}"


@dataclass(frozen=True)
class Base(Init):
    """A radius that is ``scale`` times the norm of the same block of the frozen weight W₀ that LoRA's product s·B·A is added to.

    For rules on ``"peft:product"``. W₀ is measured when the policy is attached. ``"base"`` and ``"0.1*base"`` are short forms.

    Args:
        scale: a number > 0 or a schedule; default 1.
    """

    name: ClassVar[str] = "base"
    _checks: ClassVar[Checks] = {"scale": partial(varying, what="the multiple of 'base'")}


@dataclass(frozen=True)
class Relative(Plain):
    """A radius for a gradient or an update: ``scale * max(norm of the weight block, floor)``, measured at each step.

    Brock et al., High-performance large-scale image recognition without normalization, 2021 (adaptive gradient clipping).

    Args:
        scale: a number > 0 or a schedule.
        floor: >= 0, default 1e-3: keeps blocks that start at zero able to move.
    """

    scale: Varying
    floor: float = 1e-3
    name: ClassVar[str] = "relative"
    _checks: ClassVar[Checks] = {
        "scale": partial(varying, what="the scale of a relative radius"),
        "floor": partial(number, what="the floor of a relative radius", zero=True),
    }

    def label(self) -> str:
        return f"{label(self.scale)}*weight"


class RadiusRule(Plain):
    """Base of the radii that a rule finds in training."""

    allowed: ClassVar[tuple[tuple[str, str], ...]]
    """The pairs (action, on) that it has a meaning for."""
    _blocks: ClassVar[tuple[str, ...]] = PER
    """The kinds of block that it has a meaning on."""


@dataclass(frozen=True)
class StepLength(RadiusRule):
    """A radius for an update: ``scale · η · length``, η the learning rate of the parameter's group at that step.

    Args:
        of: ``"init"``: the norm that the weight block had when attached (Hyperball); ``"weight"``: the one before the step (the learning
            rate is then the relative change); ``"number"``: 1, so that ``scale`` itself is the length.
        scale: a number > 0 or a schedule; default 1.
    """

    of: str = "init"
    scale: Varying = 1.0
    name: ClassVar[str] = "step_length"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "update"), ("project", "update"), ("normalize", "update"))
    _blocks: ClassVar[tuple[str, ...]] = tuple(per for per in PER if per != "global")    # each group of an optimizer has an η of its own
    _checks: ClassVar[Checks] = {"scale": partial(varying, what="the scale of a step length")}

    def __post_init__(self) -> None:
        if self.of not in LENGTHS:
            raise PolicyError(f"a step length is of {self.of!r}.{nearest(str(self.of), LENGTHS)}")
        super().__post_init__()

    def label(self) -> str:
        scale = "" if self.scale == 1 and self.of != "number" else f"{label(self.scale)}*"
        return f"{scale}lr" if self.of == "number" else f"{scale}lr*{self.of}"


@dataclass(frozen=True)
class Brake(RadiusRule):
    """A radius for weights: the norm before the step, plus the share ``keep`` in [0, 1] of what the step added to it.

    With ``clip_norm`` a norm that shrank is left as it is.

    Args:
        keep: default 0.5, as in `normwise.radial_brake`; 0 lets no norm grow, 1 brakes nothing.
    """

    keep: float = 0.5
    name: ClassVar[str] = "brake"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "weight"),)
    _checks: ClassVar[Checks] = {"keep": lambda keep: _share(keep, "keep of a brake", closed=True)}


@dataclass(frozen=True)
class Quantile(RadiusRule):
    """A radius for gradients and updates: the ``percentile`` of the norms of the last ``window`` steps, this one's among them.

    Args:
        percentile: in [0, 100], default 10; between two norms it is interpolated, as ``numpy.percentile`` does.
        window: how many steps are remembered; default 10000, within which it is the whole history (the paper's). Kept in the checkpoint.
    """

    percentile: float = 10.0
    window: int = 10_000
    name: ClassVar[str] = "quantile"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "grad"), ("clip_norm", "update"))
    _blocks: ClassVar[tuple[str, ...]] = ("global", "tensor")
    _checks: ClassVar[Checks] = {"percentile": partial(number, what="percentile", zero=True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percentile > 100:
            raise PolicyError(f"percentile is {self.percentile:g}, but percentile must be in [0, 100].")
        if count(self.window, "window", least=1) > MOST_WINDOW:
            raise PolicyError(f"window is {self.window}, but window must be at most {MOST_WINDOW}: all of it is sorted once a step.")


@dataclass(frozen=True)
class ZScore(RadiusRule):
    """A radius for gradients and updates that clips only spikes: norms more than ``z`` standard deviations above their running mean.

    With mean m and deviation s of the norms so far and the score ζ = (‖g‖ − m)/s, a spike gets the radius m + z²/ζ · s, the smaller the
    larger it is, and enters the running mean and variance as that, not as it was. Kumar et al., ZClip, 2025, with its defaults.

    Args:
        z: > 0, default 2.5.
        alpha: the factor of the running mean and variance, in [0, 1); default 0.97.
        warmup: how many norms give the mean and the variance to start from and are not clipped, >= 2; default 25.
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    name: ClassVar[str] = "zscore"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "grad"), ("clip_norm", "update"))
    _blocks: ClassVar[tuple[str, ...]] = ("global", "tensor")
    _checks: ClassVar[Checks] = {
        "z": partial(number, what="z"), "alpha": lambda alpha: _share(alpha, "alpha", closed=False),
        "warmup": partial(count, what="warmup", least=2),
    }  # fmt: skip


@dataclass(frozen=True)
class WarmStart(RadiusRule):
    """CPR's bound κ = R(θ) after ``steps`` steps of training without it; Kappa-WS.

    Args:
        steps: >= 0; the paper advises twice the learning rate's warm-up.
    """

    steps: int
    name: ClassVar[str] = "warm_start"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("cpr", "weight"),)
    _checks: ClassVar[Checks] = {"steps": partial(count, what="steps of a warm start", least=0)}


@dataclass(frozen=True)
class Inflection(RadiusRule):
    """CPR's bound κ = R(θ) where R's growth first slows down, each block by itself; Kappa-IP.

    Args:
        interval: R is looked at every so many steps, and κ set at the first of these where ΔΔR < 0. Default 50: the paper takes a tenth
            of the learning rate's warm-up, 500 steps in its first experiment; 1 takes the first random wobble for the inflection.
    """

    interval: int = 50
    name: ClassVar[str] = "inflection"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("cpr", "weight"),)
    _checks: ClassVar[Checks] = {"interval": partial(count, what="interval of an inflection point", least=1)}


def _share(value: Any, what: str, *, closed: bool) -> float:
    given = number(value, what, zero=True)
    if given > 1 or (given == 1 and not closed):
        raise PolicyError(f"{what} is {given:g}, but it must be in [0, 1{']' if closed else ')'}.")
    return given


FORMS: dict[str, type[Plain]] = {
    **SCHEDULES, **{cls.name: cls for cls in (Init, Base, Relative, StepLength, Brake, Quantile, ZScore, WarmStart, Inflection)},
}  # fmt: skip
"""Everything that has the YAML form ``{name: arguments}``."""


# ---------------------------------------------------------------------------------------- as the user or a file gives it


Radius: TypeAlias = Varying | Init | Relative | RadiusRule
_MULTIPLE = re.compile(r"\s*(?:([0-9][0-9.eE+-]*|\.[0-9][0-9.eE+-]*)\s*\*\s*)?(init|base)\s*")


def radius(value: object, what: str = "radius") -> Radius:
    """``value`` as a radius: a number > 0, a schedule, ``"init"``, ``"1.5*init"``, ``"0.1*base"``, or an object of one of these kinds."""
    if isinstance(value, Init | Relative | RadiusRule):
        return value
    if isinstance(value, str) and (match := _MULTIPLE.fullmatch(value)):
        with suppress(ValueError):    # "1.5.2*init" looks like a multiple and is none
            multiple = float(match[1] or 1)
            return Init(multiple) if match[2] == "init" else Base(multiple)
    if is_number(value) or callable(value):
        return varying(value, what)
    allowed = "a number > 0, a schedule, 'init', a multiple such as '1.5*init', nw.radii.Relative(scale), or a rule of nw.radii"
    raise PolicyError(f"{what} is {value!r}, but {what} must be {allowed}.")


def from_data(data: Any, what: str = "schedule") -> Any:
    """The inverse of ``schedules.to_data``: ``{linear: {start: 1, end: 0.1, steps: 100}}`` or ``{linear: [1, 0.1, 100]}`` becomes a
    schedule, numbers and strings stay what they are (the field that takes them judges them).
    """
    if not isinstance(data, Mapping):
        return data
    name, arguments = one_entry(data, what, FORMS)
    return build(FORMS[name], arguments, f"{what}'s {name}")


def build(cls: type[Any], arguments: Any, what: str) -> Any:
    """``cls`` from its arguments in data: a mapping by name, a list by position, anything else as the only one."""
    names = [f.name for f in fields(cls)]
    given = schedules.arguments_by_name(names, arguments, what)
    given = {k: from_data(v, f"{what} {k}") if k == "scale" else v for k, v in given.items()}
    try:
        return cls(**given)
    except TypeError as error:
        raise PolicyError(f"{what} takes {', '.join(names)}, but was given {given!r}.") from error
