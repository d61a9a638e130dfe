"""The state of bound rules as plain data: read, matched with the rules that there are now, checked, and given back to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normwise.engine.rules.base import BoundRule
from normwise.errors import PolicyError

Saved = dict[str, Any]
# What is stored of each parameter at attach; `found` is what a rule finds in training.
KEPT = ("radius", "center")
# The fields without which what is stored means something else: rules that differ in one of them are two rules. Of the others (a radius, a
# strength, a schedule, a window of steps) the present value is the one that counts.
MEANING = ("action", "on", "norm", "per", "heads", "layout", "center")
SELECTION = ("params", "exclude")


def state_of(bound: BoundRule, among: Callable[[str], bool] | None = None) -> Saved:
    """What a rule stored at attach (``radius``, ``center``) and found in training (``found``), by parameter name; copies.

    among: the names that are wanted; all by default.
    """
    members = [m for m in bound.members if among is None or among(m.name)]
    others = {m.name for m in bound.members} - {m.name for m in members}    # what is found of all together belongs to each of them
    found = {name: found for name, found in bound.store.items() if name not in others and (members or among is None)}
    stored = {what: {m.name: t.clone() for m in members if (t := getattr(m, what)) is not None} for what in KEPT}
    return {**stored, "found": {name: {what: t.clone() for what, t in own.items()} for name, own in found.items()}}


def together(kept: Mapping[str, Any], own: Mapping[str, Any]) -> Saved:
    """``own``, and what is ``kept`` of other parameters."""
    return {what: {**kept.get(what, {}), **value} for what, value in own.items()}


def saved_of(bound: BoundRule, kept: Mapping[str, Any], among: Callable[[str], bool] | None = None) -> Saved:
    """What a checkpoint has of a rule: its own state, what is ``kept`` of parameters that it does not hold at present, and in ``rule``,
    as JSON, whose state it is: the label for people, the fields, the parameters, and what there is of them."""
    state = together(kept, state_of(bound, among))
    names = {m.name for m in bound.members if among is None or among(m.name)} | {name for known in state.values() for name in known}
    rule = {
        "label": bound.rule.summary(), "fields": bound.rule.described(), "params": sorted(names),
        "stored": [what for what in KEPT if state[what]], "found": _kinds(state["found"]),
    }  # fmt: skip
    return {"rule": json.dumps(rule, sort_keys=True), **state}


def _kinds(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of what is found, by which it is known how."""
    return sorted({what for own in found.values() for what in own})


def beyond(kept: Mapping[str, Any], bound: BoundRule) -> Saved:
    """What ``kept`` knows of parameters that the rule does not hold at present: frozen ones, which may come back."""
    own = {"radius": {m.name for m in bound.members}, "center": {m.name for m in bound.members}, "found": set(bound.store)}
    return {what: {name: t for name, t in kept[what].items() if name not in own[what]} for what in own}


def renamed(kept: Saved, names: Mapping[str, str]) -> Saved:
    """``kept`` with the names that parameters have now, where the same tensor has another one: behind a parametrization, say."""
    return {what: {names.get(n, n): t for n, t in value.items()} if isinstance(value, dict) else value for what, value in kept.items()}


def carry_over(bound: BoundRule, kept: Mapping[str, Any]) -> None:
    """Gives a rule what is known of each parameter, by name, where it fits; of the others it keeps what it has."""
    own = state_of(bound)
    for what in KEPT:
        # A tensor of another shape is another parameter under an old name, and starts anew.
        own[what] |= {name: t for name, t in kept[what].items() if name in own[what] and own[what][name].shape == t.shape}
    own["found"] |= {name: t for name, t in kept["found"].items() if name in own["found"] and _fits(bound, own["found"][name], t)}
    bound.restore(own)


def _fits(bound: BoundRule, own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> bool:
    return own.keys() == kept.keys() and all(bound.fits(own[what], kept[what]) for what in own)


# ---------------------------------------------------------------------------------------------------- saved and present rules


@dataclass
class Matched:
    """For each present rule the saved state that it goes on from, None for a rule that is new; and what the user should be told."""

    saved: list[Saved | None]
    notes: list[str]


def match(rules: Sequence[BoundRule], saved: Sequence[Any], among: Callable[[str], bool] | None = None) -> Matched:
    """Finds out which present rule goes on from which saved one, and checks that each can; nothing is changed.

    A rule is told by what it does (``MEANING``) and by its place among its like, those with the same radius and selection first; its label
    is for people. A changed radius, strength, schedule or selection is noted, as is a rule that is new, and one that is no longer there.
    among: the names that the saved states are of. PolicyError where a rule's state is damaged, or has nothing that fits it.
    """
    known = [_read(each) for each in saved]
    if any(k.fields is None for k in known):    # saved by an earlier version
        return _by_label(rules, known, among)
    partners = _partners([b.rule.described() for b in rules], [k.fields or {} for k in known])
    notes = []
    for b, i in zip(rules, partners, strict=True):
        if i is None:
            notes.append(f"rule '{b.rule.label()}' is new and starts anew.")
            continue
        fresh = _check(b, known[i], among)
        notes += [*_changes(b, known[i]), *([f"rule '{b.rule.label()}' starts anew for {_listed(fresh)}."] if fresh else [])]
    gone = [k.label for i, k in enumerate(known) if i not in partners]
    if gone:
        notes.append(f"{len(gone)} rule(s) of the state are in this control no more: {'; '.join(gone)}.")
    return Matched([None if i is None else known[i].state for i in partners], notes)


@dataclass
class _Known:
    """One saved rule. ``fields`` is None where an earlier version saved it, which told rules by their labels."""

    label: str
    fields: dict[str, str] | None
    params: list[str]
    stored: list[str]
    found: list[str]
    state: Saved


def _read(saved: Any) -> _Known:
    """PolicyError for what :func:`saved_of` did not make. A table that is missing is empty: some checkpoints keep no empty tables."""
    if not isinstance(saved, Mapping) or not ("rule" in saved or {"label", *KEPT, "found"} <= saved.keys()):
        raise PolicyError(f"the state of a rule is {_short(saved)}, but it needs rule, radius, center and found.")
    state = {what: saved.get(what, {}) for what in (*KEPT, "found")}
    if not all(_named_tensors(state[what]) for what in KEPT) or not _named(state["found"], _named_tensors):
        raise PolicyError("the state of a rule needs radius, center and found with tensors by parameter name.")
    if "rule" not in saved:
        return _Known(saved["label"], None, [], [], [], state)
    try:
        rule = json.loads(saved["rule"])
        told = _Known(rule["label"], rule["fields"], rule["params"], rule["stored"], rule["found"], state)
    except (TypeError, ValueError, KeyError) as error:
        raise PolicyError(f"the state does not say which rule it is of ({_short(saved['rule'])}).") from error
    lists = (told.params, told.stored, told.found)
    # A 0 among them fails the test below: any part that is no list is damage.
    texts = [told.label, *(t for each in lists for t in each)] if all(isinstance(each, list) for each in lists) else [0]
    if not all(isinstance(t, str) for t in texts) or not _named(told.fields, lambda value: isinstance(value, str)):
        raise PolicyError(f"the state does not say which rule it is of ({_short(saved['rule'])}).")
    return told


def _by_label(rules: Sequence[BoundRule], known: Sequence[_Known], among: Callable[[str], bool] | None) -> Matched:
    labels, expected = [k.label for k in known], [b.rule.summary() for b in rules]
    if labels != expected:
        raise PolicyError(f"the state belongs to the rules {labels}, but this control has {expected}.")
    for b, k in zip(rules, known, strict=True):
        k.params = [m.name for m in b.members]
        k.stored, k.found = list(KEPT), _kinds(b.store)
        _check(b, k, among)
    return Matched([k.state for k in known], [])


def _partners(rules: Sequence[dict[str, str]], known: Sequence[dict[str, str]]) -> list[int | None]:
    """For each rule the place of the saved one that is most like it, in order."""
    found: list[int | None] = [None] * len(rules)
    # Equal rules first, then those that act on the same parameters, then those that only mean the same.
    for fields in (None, (*MEANING, *SELECTION), MEANING):
        left = [i for i in range(len(known)) if i not in found]
        for r, rule in enumerate(rules):
            alike = [i for i in left if _same(rule, known[i], fields)] if found[r] is None else []
            if alike:
                found[r] = alike[0]
                left.remove(alike[0])
    return found


def _same(one: Mapping[str, str], other: Mapping[str, str], fields: Iterable[str] | None) -> bool:
    return one == other if fields is None else all(one.get(f) == other.get(f) for f in fields)


def _changes(bound: BoundRule, known: _Known) -> list[str]:
    """What is another value now than when the state was saved."""
    now, was = bound.rule.described(), known.fields or {}
    changed = [f for f in dict.fromkeys((*was, *now)) if was.get(f) != now.get(f) and f != "optional"]
    listed = ", ".join(f"{f} was {was.get(f, 'not given')} and is {now.get(f, 'not given')}" for f in changed)
    return [f"rule '{bound.rule.label()}': {listed}."] if changed else []


# ---------------------------------------------------------------------------------------------------- what fits


def _check(bound: BoundRule, known: _Known, among: Callable[[str], bool] | None) -> list[str]:
    """The parameters for which the rule starts anew. PolicyError where the state should have something and has not, or has what does not
    fit."""
    own = state_of(bound, among)
    names = [m.name for m in bound.members if among is None or among(m.name)]
    foreign = known.params and names and not set(names) & set(known.params)    # another selection: nothing that is saved is this rule's
    fresh: list[str] = []
    for what in KEPT:
        for name, mine in own[what].items():
            kept = known.state[what].get(name)
            expected = what in known.stored and (foreign or name in known.params)
            if kept is None and not expected:
                fresh.append(name)
            elif kept is None or not _replaces(mine, kept, what):
                raise _misfit(what, name, bound, mine, kept)
    anew = known.found != _kinds(own["found"])    # it finds something else now
    for name, found in () if anew else own["found"].items():
        saved = known.state["found"].get(name)
        kept = None if saved is None else bound.current(name, saved)
        if kept is None and name not in known.params and name in names and not foreign:
            fresh.append(name)
            continue
        for what, mine in found.items():
            one = (kept or {}).get(what)
            if one is None or not bound.fits(mine, one):
                raise _misfit(what, name, bound, mine, one)
    # What is found of all together lies in one optimizer's part: another's, where this one held no parameter then.
    began = [name for name in own["found"] if known.params or name in names] if anew else []
    return list(dict.fromkeys([*fresh, *began]))


def _misfit(what: str, name: str, bound: BoundRule, own: Tensor, kept: Tensor | None) -> PolicyError:
    has = "has none" if kept is None else f"has one of shape {tuple(kept.shape)} and {kept.dtype}"
    return PolicyError(
        f"the state has no fitting {what} for {name!r} in rule '{bound.rule.label()}': it {has}, and needed is {tuple(own.shape)}, finite. "
        "Load it with the policy and the model that it was saved with, or attach with in_optimizer_state=False to begin anew."
    )


def _named(given: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) and fits(value) for name, value in given.items())


def _named_tensors(given: Any) -> bool:
    return _named(given, lambda value: isinstance(value, Tensor))


def _replaces(own: Tensor, kept: Tensor, what: str) -> bool:
    """A radius or a center; one that is not finite, or a radius below zero, would spoil every weight that it is for."""
    fits = kept.shape == own.shape and kept.is_floating_point() and bool(kept.isfinite().all())
    return fits and (what != "radius" or bool((kept >= 0).all()))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
