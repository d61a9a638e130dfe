"""The state of bound rules as plain data: read, checked, given back, and carried over to rules that were bound again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from normwise.engine.bound import BoundRule
from normwise.errors import PolicyError

Saved = dict[str, Any]


def state_of(bound: BoundRule) -> Saved:
    """What a rule stored at attach (``radius``, ``center``) and found in training (``found``), by parameter name; copies."""
    return {
        "label": bound.rule.label(),
        "radius": {m.name: m.radius.clone() for m in bound.members if m.radius is not None},
        "center": {m.name: m.center.clone() for m in bound.members if m.center is not None},
        "found": {name: {what: t.clone() for what, t in found.items()} for name, found in bound.store.items()},
    }


def together(kept: Saved, own: Saved) -> Saved:
    """``own``, and what is ``kept`` of other parameters."""
    return {what: {**kept.get(what, {}), **value} if isinstance(value, dict) else value for what, value in own.items()}


def beyond(kept: Mapping[str, Any], bound: BoundRule) -> Saved:
    """What ``kept`` knows of parameters that the rule does not hold at present: frozen ones, which may come back."""
    own = {"radius": {m.name for m in bound.members}, "center": {m.name for m in bound.members}, "found": set(bound.store)}
    return {what: {name: t for name, t in kept[what].items() if name not in own[what]} for what in own}


def carry_over(bound: BoundRule, kept: Saved) -> None:
    """Gives a rule that was bound again what it knew of each parameter, by name, where it still fits."""
    own = state_of(bound)
    for what in ("radius", "center"):
        own[what] |= {name: t for name, t in kept[what].items() if name in own[what] and own[what][name].shape == t.shape}
    own["found"] |= {name: t for name, t in kept["found"].items() if name in own["found"] and _fits(bound, own["found"][name], t)}
    bound.restore(own)


def _fits(bound: BoundRule, own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> bool:
    return own.keys() == kept.keys() and all(bound.fits(own[what], kept[what]) for what in own)


def check_rules(rules: Sequence[BoundRule], saved: Sequence[Mapping[str, Any]]) -> None:
    """PolicyError where saved states belong to other rules or parameters."""
    labels, expected = [r.get("label") if isinstance(r, Mapping) else r for r in saved], [b.rule.label() for b in rules]
    if labels != expected:
        raise PolicyError(f"the state belongs to the rules {labels}, but this control has {expected}.")
    for bound, given in zip(rules, saved, strict=True):
        _check_rule(bound, given)


def _check_rule(bound: BoundRule, saved: Mapping[str, Any]) -> None:
    if not all(_named_tensors(saved.get(what)) for what in ("radius", "center")) or not _named(saved.get("found"), _named_tensors):
        raise PolicyError(f"the state of rule '{bound.rule.label()}' needs radius, center and found with tensors by parameter name.")
    for m, what in ((m, what) for m in bound.members for what in ("radius", "center")):
        own, kept = getattr(m, what), saved[what].get(m.name)
        if own is not None and (kept is None or not _replaces(own, kept, what)):
            raise PolicyError(f"the state has no fitting {what} for {m.name!r} in rule '{bound.rule.label()}'.")
    for name, what, own in ((name, what, t) for name, found in bound.store.items() for what, t in found.items()):
        kept = bound.current(name, saved["found"].get(name, {})).get(what)
        if not isinstance(kept, Tensor) or not bound.fits(own, kept):
            raise PolicyError(f"the state has no fitting {what} for {name!r} in rule '{bound.rule.label()}'.")


def _named(given: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) and fits(value) for name, value in given.items())


def _named_tensors(given: Any) -> bool:
    return _named(given, lambda value: isinstance(value, Tensor))


def _replaces(own: Tensor, kept: Tensor, what: str) -> bool:
    """A radius or a center; one that is not finite, or a radius below zero, would spoil every weight that it is for."""
    fits = kept.shape == own.shape and kept.is_floating_point() and bool(kept.isfinite().all())
    return fits and (what != "radius" or bool((kept >= 0).all()))
