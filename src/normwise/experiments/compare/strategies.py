"""What ``compare`` compares: strategies, each a policy for given strengths and where to look for them, beside the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normwise.errors import StudyError, nearest
from normwise.experiments.compare.optimizers import OPTIMIZERS, SPHERES
from normwise.experiments.compare.search import Axis

Strengths = Mapping[str, float]


@dataclass(frozen=True)
class Strategy:
    """label: for tables. axes: the strengths to search, beside the learning rate. rules: strengths and the number of training
    samples m to a list of rules, which are built where they are used. about: one line. lr: where to look for the learning rate
    in the place of the optimizer's own axis, for rules that say themselves what it means."""

    label: str
    about: str
    axes: tuple[Axis, ...]
    rules: Callable[[Strengths, int], list[Any]]
    lr: Axis | None = None


# A penalty's strength is searched as λ/m, the factor on ½‖θ‖² or on ‖θ‖₁ beside the mean loss: unlike λ it means the same
# for every number of samples m. The rules get λ, as the article writes it.
_L2 = Axis("l2", 1e-3, 10.0, off=-1)
_L1 = Axis("l1", 1e-4, 10.0, off=-1)
_RADIUS = Axis("radius", 2.0, 2.0, off=1)
_SPHERE = Axis("radius", 1.0, 2.0)
_TENSOR_RADIUS = Axis("radius", 4.0, 2.0, off=1)


def _nothing(strengths: Strengths, samples: int) -> list[Any]:
    return []


def _l2(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.l2_penalty(_lambda(strengths["l2"], samples), samples=samples)]


def _l1(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.l1_penalty(_lambda(strengths["l1"], samples), samples=samples)]


def _lambda(coefficient: float, samples: int) -> float:
    return float(f"{coefficient * samples:.6g}")


def _clip_value(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.clip_weight_value(strengths["bound"], params="role:all")]


def _clip_tensor_norm(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.clip_weight_norm(strengths["radius"])]


def _normalise(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.unit_norm(strengths["radius"])]


def _max_norm(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.max_norm(strengths["radius"])]


def _spectral_cap(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.spectral_cap(strengths["radius"])]


def _soft_threshold(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.l1_prox(strengths["l1"])]


def _weight_decay(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [nw.weight_decay(strengths["decay"])]


def _both(first: Callable[..., list[Any]], second: Callable[..., list[Any]]) -> Callable[[Strengths, int], list[Any]]:
    return lambda strengths, samples: [*first(strengths, samples), *second(strengths, samples)]


ARTICLE: dict[str, Strategy] = {
    "nothing": Strategy("nothing", "no decay, no limit: the baseline", (), _nothing),
    "l2": Strategy("L2 penalty", "the article's λ/2m Σθ² over all parameters", (_L2,), _l2),
    "l1": Strategy("L1 penalty", "the article's λ/m Σ|θ| over all parameters", (_L1,), _l1),
    "clip_value": Strategy(
        "clip by value", "every parameter's entries in ±bound", (Axis("bound", 0.5, 2.0, off=1),), _clip_value
    ),
    "clip_tensor_norm": Strategy(
        "clip by tensor norm", "the L2 norm of each weight tensor at most the radius", (_TENSOR_RADIUS,), _clip_tensor_norm
    ),
    "normalise": Strategy("normalise units", "each unit's weight vector to the radius, at every step", (_SPHERE,), _normalise),
    "max_norm": Strategy("max-norm", "each unit's weight vector at most the radius", (_RADIUS,), _max_norm),
    "spectral_cap": Strategy("spectral cap", "singular values at most the radius", (_RADIUS,), _spectral_cap),
    "soft_threshold": Strategy("soft threshold", "the L1 prox after the step: exact zeros", (_L1,), _soft_threshold),
    "weight_decay": Strategy(
        "decoupled decay", "θ ← (1 − ηλ)θ before the step, as AdamW does", (Axis("decay", 0.1, 10.0, off=-1),), _weight_decay
    ),
    "l2+max_norm": Strategy("L2 + max-norm", "the penalty and the limit per unit", (_L2, _RADIUS), _both(_l2, _max_norm)),
    "l1+clip_tensor_norm": Strategy(
        "L1 + tensor norm", "the penalty and the limit per tensor", (_L1, _TENSOR_RADIUS), _both(_l1, _clip_tensor_norm)
    ),
}
"""The article's strategies and what they are made of: those that are compared where none are named."""


def _rule(name: str, *strengths: str) -> Callable[[Strengths, int], list[Any]]:
    """The published method of this name, with these strengths as its first arguments."""

    def rules(numbers: Strengths, samples: int) -> list[Any]:
        import normwise as nw

        return [getattr(nw, name)(*(numbers[strength] for strength in strengths))]

    return rules


def _hyperball(strengths: Strengths, samples: int) -> list[Any]:
    import normwise as nw

    return [*nw.hyperball(f"{strengths['multiple']:g}*init")]


# The article's weights start at a deviation of 0.02, a tenth and less of what layers of this size need: a sphere of their own norm
# would keep them from learning. Sixteen times as much is near He's initialisation, which the method's authors start from.
_MULTIPLE = Axis("multiple", 16.0, 4.0)
_STEP_LENGTH = Axis("lr", 0.02, 3.0)

PUBLISHED: dict[str, Strategy] = {
    "hyperball": Strategy(
        "Hyperball", "matrices on a sphere of a multiple of their initial norm, steps of the length lr × radius",
        (_MULTIPLE,), _hyperball, lr=_STEP_LENGTH,
    ),
    "relative_update": Strategy(
        "relative update", "steps of matrices of the length scale × lr × ‖w‖", (Axis("scale", 1.0, 8.0),), _rule("relative_update", "scale")
    ),
    "radial_brake": Strategy(
        "radial brake", "of what a step adds to a matrix's norm the share keep is kept",
        (Axis("keep", 0.5, 2.0, off=1, most=1.0),), _rule("radial_brake", "keep"),
    ),
    "cpr": Strategy("CPR", "each matrix bounded from where its growth slows down, by a decay of its own", (), _rule("cpr")),
    "autoclip": Strategy(
        "AutoClip", "the gradient at most a percentile of its norms so far",
        (Axis("percentile", 30.0, 3.0, off=1, most=100.0),), _rule("autoclip", "percentile"),
    ),
    "zclip": Strategy(
        "ZClip", "gradients clipped that lie more than z deviations above their mean norm",
        (Axis("z", 2.5, 2.0, off=1),), _rule("zclip", "z"),
    ),
    "orthogonal": Strategy(
        "orthogonal", "matrices made orthogonal after the step, all singular values the radius", (_SPHERE,), _rule("orthogonal", "radius")
    ),
    "orthogonal_penalty": Strategy(
        "orthogonality penalty", "strength/4 · ‖WWᵀ − I‖² of matrices beside the loss",
        (Axis("strength", 0.1, 10.0, off=-1),), _rule("orthogonal_penalty", "strength"),
    ),
}  # fmt: skip
"""Published methods (docs/published-methods.md) as strategies, on what each acts on by default."""

STRATEGIES: dict[str, Strategy] = {**ARTICLE, **PUBLISHED}
ALL = "all"
_NEEDS_ATTENTION = "qk_clip"
_ON_A_SPHERE = ("hyperball", "relative_update", "radial_brake")


def chosen(names: Sequence[str] | None, table: Mapping[str, Any], usual: Mapping[str, Any], what: str) -> list[str]:
    """The names in the table's order: the ``usual`` ones where None are given, every one for ``all``.

    Raises StudyError for an unknown one or for none at all."""
    if names is None:
        return list(usual)
    if not names:
        raise StudyError(f"No {what} was given; name one or more of {', '.join(table)}, or {ALL}.")
    unknown = next((name for name in names if name not in table and name != ALL), None)
    if unknown is not None:
        raise StudyError(_unknown(unknown, table, what))
    return [name for name in table if name in names or ALL in names]


def _unknown(name: str, table: Mapping[str, Any], what: str) -> str:
    if name == _NEEDS_ATTENTION and table is STRATEGIES:
        return f"{what} {name!r} scales the queries and keys of attention heads, and the networks compared here have none; leave it out."
    return f"{what} {name!r} is not known.{nearest(name, [*table, ALL])}"


def why_not(strategy: str, optimizer: str) -> str | None:
    """Why a strategy says nothing with this optimizer, in words that follow its name; None where it does."""
    if optimizer in SPHERES and strategy in _ON_A_SPHERE:
        return "already keeps its matrices on a sphere and sets the length of their steps"
    if optimizer == "lamb" and strategy == "relative_update":
        return "already takes steps of the length lr × ‖w‖"
    return None


def axes(strategy: str, optimizer: str) -> tuple[Axis, ...]:
    """What is searched in a cell: the learning rate, then the strategy's strengths."""
    own = STRATEGIES[strategy]
    return (own.lr or OPTIMIZERS[optimizer].lr, *own.axes)
