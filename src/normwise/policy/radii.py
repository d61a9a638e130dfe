"""Radii that a rule measures or finds in training: step lengths, brakes, quantiles and z-scores of gradient norms, CPR's bounds.

All are plain data, as the schedules are: they compare by value and go to YAML. ``normwise.engine.rules.adaptive`` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from normwise.errors import PolicyError, nearest
from normwise.policy import schedules
from normwise.policy.schedules import RadiusRule, Varying, count, number, varying

LENGTHS = ("init", "weight", "number")
MOST_WINDOW = 1_000_000
"""Norms remembered: they are sorted once a step, and take 8 MB for each block."""


@dataclass(frozen=True)
class StepLength(RadiusRule):
    """A radius for an update: ``scale · η · length``, η the learning rate of the parameter's group at that step.

    of: ``"init"``: the norm that the weight block had when attached (Hyperball); ``"weight"``: the one before the step (the learning rate
        is then the relative change); ``"number"``: 1, so that ``scale`` itself is the length.
    scale: a number > 0 or a schedule; default 1.
    """

    of: str = "init"
    scale: Varying = 1.0
    name: ClassVar[str] = "step_length"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "update"), ("project", "update"), ("normalize", "update"))

    def __post_init__(self) -> None:
        if self.of not in LENGTHS:
            raise PolicyError(f"a step length is of {self.of!r}.{nearest(str(self.of), LENGTHS)}")
        object.__setattr__(self, "scale", varying(self.scale, "the scale of a step length"))

    def label(self) -> str:
        scale = "" if self.scale == 1 and self.of != "number" else f"{schedules.label(self.scale)}*"
        return f"{scale}lr" if self.of == "number" else f"{scale}lr*{self.of}"


@dataclass(frozen=True)
class Brake(RadiusRule):
    """A radius for weights: the norm before the step, plus the share ``keep`` in [0, 1] of what the step added to it.

    With ``clip_norm`` a norm that shrank is left as it is. 0 lets no norm grow, 1 brakes nothing.
    """

    keep: float = 0.5
    name: ClassVar[str] = "brake"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "weight"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _share(self.keep, "keep of a brake", closed=True))


@dataclass(frozen=True)
class Quantile(RadiusRule):
    """A radius for gradients and updates: the ``percentile`` of the norms of the last ``window`` steps, this one's among them.

    percentile: in [0, 100], default 10; between two norms it is interpolated, as ``numpy.percentile`` does.
    window: how many steps are remembered; default 10000, within which it is the whole history (the paper's). Kept in the checkpoint.
    """

    percentile: float = 10.0
    window: int = 10_000
    name: ClassVar[str] = "quantile"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "grad"), ("clip_norm", "update"))

    def __post_init__(self) -> None:
        given = number(self.percentile, "percentile", zero=True)
        if given > 100:
            raise PolicyError(f"percentile is {given:g}, but percentile must be in [0, 100].")
        object.__setattr__(self, "percentile", given)
        if count(self.window, "window", least=1) > MOST_WINDOW:
            raise PolicyError(f"window is {self.window}, but window must be at most {MOST_WINDOW}: all of it is sorted once a step.")


@dataclass(frozen=True)
class ZScore(RadiusRule):
    """A radius for gradients and updates, below the norm only where that is a spike: more than ``z`` standard deviations above its
    running mean.

    With mean m and deviation s of the norms so far and the score ζ = (‖g‖ − m)/s, a spike gets the radius m + z²/ζ · s, the smaller the
    larger it is, and enters the running mean and variance (factor ``alpha``) as that, not as it was. The first ``warmup`` norms give the
    mean and the variance to start from, and are not clipped. Defaults are the paper's: 2.5, 0.97, 25.
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    name: ClassVar[str] = "zscore"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("clip_norm", "grad"), ("clip_norm", "update"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", number(self.z, "z"))
        object.__setattr__(self, "alpha", _share(self.alpha, "alpha", closed=False))
        object.__setattr__(self, "warmup", count(self.warmup, "warmup", least=2))


@dataclass(frozen=True)
class WarmStart(RadiusRule):
    """CPR's bound κ = R(θ) after ``steps`` steps of training without it; Kappa-WS. The paper advises twice the learning rate's warm-up."""

    steps: int
    name: ClassVar[str] = "warm_start"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("cpr", "weight"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", count(self.steps, "steps of a warm start", least=0))


@dataclass(frozen=True)
class Inflection(RadiusRule):
    """CPR's bound κ = R(θ) where R's growth first slows down, each block by itself; Kappa-IP.

    R is looked at every ``interval`` steps, and κ set at the first of these where ΔΔR < 0. Default 50: the paper takes a tenth of the
    learning rate's warm-up, 500 steps in its first experiment; an interval of 1 takes the first random wobble for the inflection.
    """

    interval: int = 50
    name: ClassVar[str] = "inflection"
    allowed: ClassVar[tuple[tuple[str, str], ...]] = (("cpr", "weight"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", count(self.interval, "interval of an inflection point", least=1))


def _share(value: Any, what: str, *, closed: bool) -> float:
    given = number(value, what, zero=True)
    if given > 1 or (given == 1 and not closed):
        raise PolicyError(f"{what} is {given:g}, but it must be in [0, 1{']' if closed else ')'}.")
    return given


RADII: dict[str, type[RadiusRule]] = {cls.name: cls for cls in (StepLength, Brake, Quantile, ZScore, WarmStart, Inflection)}
"""Every such radius by its name in YAML."""
schedules.FORMS.update(RADII)
