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
from typing import Any

from normwise.errors import PolicyError
from normwise.norms import L2, LInf, MaxOfUnits, Norm
from normwise.policy.rule import Rule, norm_label
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
    firm = [
        _firm(rule, names) for rule, names in bound
        if rule.phase == "weight" and rule.center is None and rule.every == 1 and rule.rate == 1
    ]  # fmt: skip
    # Numbers are compared first, names last: of thousands of rules on thousands of parameters almost no pair comes so far.
    for low, high in (pair for both in itertools.combinations(firm, 2) for pair in (both, both[::-1])):
        one, other, why = low.rule, high.rule, _why_not_both(low, high)
        if why is None or low.names.isdisjoint(high.names):
            continue
        ends = [math.inf if rule.stop is None else rule.stop for rule in (one, other)]
        if max(one.start, other.start) < min(ends):
            raise PolicyError(
                f"rules '{one.label()}' and '{other.label()}' contradict each other on {min(low.names & high.names)!r}: {why}. "
                "Change a radius, or let them act on different parameters or steps (exclude=, start=, stop=)."
            )


def _why_not_both(low: _Firm, high: _Firm) -> str | None:
    """Why no weights can obey both on a parameter that they share; None where some may."""
    if low.interval is not None and high.interval is not None and low.interval[0] > high.interval[1]:
        return "no number is in both"
    least, most = low.least, high.most
    if least is None or most is None or not least.value > most.value * (1 + SLACK):
        return None
    one, other = least.norm.level, most.norm.level
    if least.norm == most.norm:
        never_above = one is not None or least.per == most.per
    else:
        never_above = one is not None and other is not None and one < other
    # A norm of all entries on a whole tensor does not depend on what its axes are called.
    same_axes = (most.per in ("tensor", "global") and most.norm.p is not None) or low.rule.layout == high.rule.layout
    within = most.per in _WITHIN[least.per] and same_axes and (least.per != "global" or low.names <= high.names)
    if not never_above or not within:
        return None
    never = "" if least.label == most.label else f", and {least.label} is never above {most.label}"
    return f"the first keeps {least.label} at {least.value:g} or more, the second {most.label} at {most.value:g} or less{never}"


def _firm(rule: Rule, names: AbstractSet[str]) -> _Firm:
    if interval := getattr(rule.norm, "interval", None):
        smallest = _Bound(LInf(), "element", max(interval[0], -interval[1], 0.0), "the smallest |entry|")
        return _Firm(rule, names, interval, smallest, _Bound(LInf(), "tensor", max(map(abs, interval)), "the largest |entry|"))
    # The norm that is bounded; on single numbers, and of L2 on units, the equal norm of the lowest level.
    norm = rule.norm if isinstance(rule.norm, Norm) else rule.norm.sphere
    assert norm is not None, "a set without a radius bounds no norm"
    label, per = f"{norm_label(norm)}/{rule.per}", rule.per
    if per == "element" and norm.level is not None:
        norm = LInf()
    elif per == "unit" and norm == L2():
        norm = MaxOfUnits()
    radius: Any = rule.radius.value if isinstance(rule.radius, Constant) else rule.radius if is_number(rule.radius) else None
    lower = rule.min_radius if isinstance(rule.norm, Norm) and rule.action != "normalize" else radius
    # A bound on every entry, or on every unit, is one on the largest of any block that they make up.
    made_up: dict[Norm, tuple[str, ...]] = {LInf(): ("global",), MaxOfUnits(): ("global", "head")}
    widest = per if per in made_up.get(norm, (per,)) else "tensor"
    kept = [None if value is None else _Bound(norm, kind, value, label) for kind, value in ((per, lower), (widest, radius))]
    return _Firm(rule, names, None, *kept)
