"""The strategies that are compared, each a policy to attach to any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import normwise as nw
from normwise.experiments.catalog.optimizers import OPTIMIZERS, SPHERES
from normwise.experiments.catalog.parts import BASELINE, Strengths, axis, rule
from normwise.experiments.framework.lattice import Axis


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
    return lambda numbers, m: rule(name, "λ", samples=m)({"λ": float(f"{numbers[strength] * m:.6g}")}, m)


def _both(label: str, about: str, first: Strategy, second: Strategy) -> Strategy:
    return Strategy(label, about, first.axes + second.axes, lambda numbers, m: [*first.rules(numbers, m), *second.rules(numbers, m)])


_L1 = axis("l1", 1e-4, 10.0, off=-1)
_LIMIT = axis("radius", 2.0, off=1)
_SPHERE = axis("radius", 1.0)
_L2_PENALTY = Strategy(
    "L2 penalty", "the article's λ/2m Σθ² over all parameters", (axis("l2", 1e-3, 10.0, off=-1),), _penalty("l2_penalty", "l2")
)
_L1_PENALTY = Strategy("L1 penalty", "the article's λ/m Σ|θ| over all parameters", (_L1,), _penalty("l1_penalty", "l1"))
_TENSOR = Strategy(
    "clip by tensor norm", "the L2 norm of each weight tensor at most the radius", (axis("radius", 4.0, off=1),),
    rule("clip_weight_norm", "radius"),
)  # fmt: skip
_MAX_NORM = Strategy("max-norm", "each unit's weight vector at most the radius", (_LIMIT,), rule("max_norm", "radius"))

ARTICLE: dict[str, Strategy] = {
    BASELINE: Strategy("nothing", "no decay, no limit: the baseline", (), lambda numbers, samples: []),
    "l2": _L2_PENALTY,
    "l1": _L1_PENALTY,
    "clip_value": Strategy(
        "clip by value", "every parameter's entries in ±bound", (axis("bound", 0.5, off=1),),
        rule("clip_weight_value", "bound", params="role:all"),
    ),
    "clip_tensor_norm": _TENSOR,
    "normalise": Strategy(
        "normalise units", "each unit's weight vector to the radius, at every step", (_SPHERE,), rule("unit_norm", "radius")
    ),
    "max_norm": _MAX_NORM,
    "spectral_cap": Strategy("spectral cap", "singular values at most the radius", (_LIMIT,), rule("spectral_cap", "radius")),
    "soft_threshold": Strategy("soft threshold", "the L1 prox after the step: exact zeros", (_L1,), rule("l1_prox", "l1")),
    "weight_decay": Strategy(
        "decoupled decay", "θ ← (1 − ηλ)θ before the step, as AdamW does",
        (axis("decay", 0.1, 10.0, off=-1),), rule("weight_decay", "decay"),
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
        (axis("multiple", 16.0, 4.0),), lambda numbers, samples: [*nw.hyperball(f"{numbers['multiple']:g}*init")],
        lr=axis("lr", 0.02, 3.0),
    ),
    "relative_update": Strategy(
        "relative update", "steps of matrices of the length scale × lr × ‖w‖",
        (axis("scale", 1.0, 8.0),), rule("relative_update", "scale"),
    ),
    "radial_brake": Strategy(
        "radial brake", "of what a step adds to a matrix's norm the share keep is kept",
        (axis("keep", 0.5, off=1, most=1.0),), rule("radial_brake", "keep"),
    ),
    "cpr": Strategy("CPR", "each matrix bounded from where its growth slows down, by a decay of its own", (), rule("cpr")),
    "autoclip": Strategy(
        "AutoClip", "the gradient at most a percentile of its norms so far",
        (axis("percentile", 30.0, 3.0, off=1, most=100.0),), rule("autoclip", "percentile"),
    ),
    "zclip": Strategy(
        "ZClip", "gradients clipped that lie more than z deviations above their mean norm",
        (axis("z", 2.5, off=1),), rule("zclip", "z"),
    ),
    "orthogonal": Strategy(
        "orthogonal", "matrices made orthogonal after the step, all singular values the radius", (_SPHERE,), rule("orthogonal", "radius")
    ),
    "orthogonal_penalty": Strategy(
        "orthogonality penalty", "strength/4 · ‖WWᵀ − I‖² of matrices beside the loss",
        (axis("strength", 0.1, 10.0, off=-1),), rule("orthogonal_penalty", "strength"),
    ),
}  # fmt: skip
"""Published methods (docs/published-methods.md) as strategies, on what each acts on by default."""

STRATEGIES: dict[str, Strategy] = {**ARTICLE, **PUBLISHED}
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
