"""Rules that cannot both hold: found when a policy is bound, before anything is changed.

Only what is provable without the shapes is refused: a norm that one rule keeps at least a, which is never above a norm that
another keeps at most b < a, on blocks within its blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from normwise.errors import PolicyError
from normwise.norms import L2, LInf, MaxOfUnits, Norm
from normwise.policy.rule import Rule
from normwise.policy.rule_fields import norm_label
from normwise.policy.schedules import Constant, is_number

# The kinds of block that a block of each kind lies within. (A unit need not lie within a head: heads may split the inputs.)
_WITHIN = {
    "element": ("element", "unit", "input", "head", "matrix", "expert", "tensor", "global"),
    "unit": ("unit", "matrix", "expert", "tensor", "global"),
    "input": ("input", "matrix", "expert", "tensor", "global"),
    "head": ("head", "matrix", "expert", "tensor", "global"),
    "matrix": ("matrix", "expert", "tensor", "global"),
    "expert": ("expert", "tensor", "global"),
    "tensor": ("tensor", "global"),
    "global": ("global",),
}

# Radii this close are the same number, written or rounded differently.
SLACK = 1e-6


@dataclass(frozen=True)
class _Bound:
    """A norm of every block of a kind, kept at ``value`` or more (or less)."""

    norm: Norm
    per: str
    value: float
    label: str


@dataclass(frozen=True)
class _Firm:
    """A rule that acts at every step, the parameters that it acts on, and what it keeps: entries within, a norm large, a norm small."""

    rule: Rule
    names: AbstractSet[str]
    interval: tuple[float, float] | None
    least: _Bound | None
    most: _Bound | None


def check(bound: Sequence[tuple[Rule, AbstractSet[str]]]) -> None:
    """PolicyError if two rules provably contradict each other; ``bound`` has each rule with the parameters it acts on.

    Looks at rules on weights that act at every step of a common window, with constant radii around zero: spheres of two radii,
    a sphere outside of a ball, a lower bound above an upper one, orthogonal matrices under a smaller spectral cap, boxes
    without a common point.
    """
    firm = [_Firm(rule, names, getattr(rule.norm, "interval", None), _lower(rule), _upper(rule)) for rule, names in bound if _is_firm(rule)]
    # Numbers are compared first, names last: of thousands of rules on thousands of parameters almost no pair comes so far.
    for one, other in itertools.combinations(firm, 2):
        for low, high in ((one, other), (other, one)):
            why = _why_not_both(low, high)
            if why and _overlap(low.rule, high.rule) and not low.names.isdisjoint(high.names):
                raise _contradiction(low.rule, high.rule, min(low.names & high.names), why)


def _is_firm(rule: Rule) -> bool:
    return rule.phase == "weight" and rule.center is None and rule.every == 1 and rule.rate == 1


def _overlap(one: Rule, other: Rule) -> bool:
    ends = [math.inf if rule.stop is None else rule.stop for rule in (one, other)]
    return max(one.start, other.start) < min(ends)


def _why_not_both(low: _Firm, high: _Firm) -> str | None:
    """Why no weights can obey both on a parameter that they share; None where some may."""
    if low.interval is not None and high.interval is not None and low.interval[0] > high.interval[1]:
        return "no number is in both"
    least, most = low.least, high.most
    if least is None or most is None or not least.value > most.value * (1 + SLACK):
        return None
    if not _never_above(least, most) or not _blocks_within(low, high, least, most):
        return None
    never = "" if least.label == most.label else f", and {least.label} is never above {most.label}"
    return f"the first keeps {least.label} at {least.value:g} or more, the second {most.label} at {most.value:g} or less{never}"


def _contradiction(one: Rule, other: Rule, shared: str, why: str) -> PolicyError:
    return PolicyError(
        f"rules '{one.label()}' and '{other.label()}' contradict each other on {shared!r}: {why}. "
        "Change a radius, or let them act on different parameters or steps (exclude=, start=, stop=)."
    )


def _never_above(least: _Bound, most: _Bound) -> bool:
    low, high = least.norm.level, most.norm.level
    if least.norm == most.norm:
        return low is not None or least.per == most.per
    return low is not None and high is not None and low < high


def _blocks_within(low: _Firm, high: _Firm, least: _Bound, most: _Bound) -> bool:
    if least.per == "global" and not low.names <= high.names:
        return False
    blind = most.per in ("tensor", "global") and most.norm.p is not None
    same_axes = blind or low.rule.layout == high.rule.layout
    return same_axes and most.per in _WITHIN[least.per]


# ------------------------------------------------------------------------------------------------- bounds of a rule


def _constant(rule: Rule) -> float | None:
    radius = rule.radius
    if isinstance(radius, Constant):
        return radius.value
    return radius if is_number(radius) else None  # type: ignore[return-value]


def _lower(rule: Rule) -> _Bound | None:
    """What the rule keeps large."""
    if interval := getattr(rule.norm, "interval", None):
        return _Bound(LInf(), "element", max(interval[0], -interval[1], 0.0), "the smallest |entry|")
    radius = _constant(rule)
    if isinstance(rule.norm, Norm):
        radius = radius if rule.action == "normalize" else rule.min_radius
    return None if radius is None else _Bound(_norm(rule), rule.per, radius, _label(rule))


def _upper(rule: Rule) -> _Bound | None:
    """What the rule keeps small."""
    if interval := getattr(rule.norm, "interval", None):
        return _Bound(LInf(), "tensor", max(abs(end) for end in interval), "the largest |entry|")
    radius, norm = _constant(rule), _norm(rule)
    return None if radius is None else _Bound(norm, _widest(norm, rule.per), radius, _label(rule))


def _widest(norm: Norm, per: str) -> str:
    """A bound on every entry, or on every unit, is one on the largest of any block that they make up."""
    made_up: dict[Norm, tuple[str, ...]] = {LInf(): ("global",), MaxOfUnits(): ("global", "head")}
    return per if per in made_up.get(norm, (per,)) else "tensor"


def _norm(rule: Rule) -> Norm:
    """The norm that is bounded; on single numbers, and of L2 on units, the equal norm of the lowest level."""
    norm = rule.norm if isinstance(rule.norm, Norm) else rule.norm.sphere
    assert norm is not None, "a set without a radius bounds no norm"
    if rule.per == "element" and norm.level is not None:
        return LInf()
    return MaxOfUnits() if (rule.per, norm) == ("unit", L2()) else norm


def _label(rule: Rule) -> str:
    return f"{norm_label(getattr(rule.norm, 'sphere', None) or rule.norm)}/{rule.per}"
