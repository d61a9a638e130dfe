"""Numbers as text, and the sentence that says what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from normwise.experiments.report.tidy import BASELINE, Cell, label, number, optimizer, stat, unique

MISSING = "–"
Kind = Literal["better", "worse", "none", "unknown"]
PHRASES: dict[Kind, str] = {
    "better": "norm control helps with {}",
    "worse": "norm control hurts with {}",
    "none": "there is no difference beyond the spread with {}",
    "unknown": "nothing can be said yet about {}",
}


@dataclass(frozen=True)
class Verdict:
    """One optimizer's comparison: the strategy that validation prefers against the baseline, on the test part.

    ``gain`` and ``spread`` are fractions: the difference of the means, and the standard deviation of that difference over
    seeds, √(s₁² + s₂²). Choosing by validation keeps the test part out of the choice.
    """

    optimizer: str
    kind: Kind
    best: Cell | None
    base: Cell | None
    gain: float | None
    spread: float | None


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage without its sign: 0.9812 is ``"98.1"``."""
    return MISSING if value is None else f"{100 * value:.{digits}f}".replace("-", "−")


def with_spread(cell: Cell, key: str, digits: int = 1) -> str:
    """Mean ± standard deviation of a fraction, as percentages; without the second where one seed gives none."""
    std = stat(cell, key, "std")
    one = std is None or len((cell.get(key) or {}).get("values") or (0, 0)) < 2
    return percent(stat(cell, key), digits) + ("" if one else f" ± {percent(std, digits)}")


def plain(value: Any) -> str:
    """A number in four significant digits, thousands apart; text as it is; the dash for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    kept = number(value)
    if kept is None:
        return str(value)
    if kept == int(kept) and abs(kept) < 1e15:
        return f"{int(kept):,}".replace(",", "\u202f")
    return f"{kept:.4g}"


def describe(value: Any) -> str:
    """Any JSON value as a phrase: lists with commas, dictionaries as ``key value``."""
    if isinstance(value, dict):
        return ", ".join(f"{words(key)} {describe(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(describe, value)) or MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value)


def words(key: Any) -> str:
    """A key of the results as the reader's words."""
    return str(key).replace("_", " ")


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def verdicts(found: Sequence[Cell]) -> list[Verdict]:
    """One verdict for each optimizer, in order of appearance."""
    groups = unique(cell["optimizer"] for cell in found)
    return [verdict([cell for cell in found if cell["optimizer"] == name]) for name in groups]


def verdict(group: Sequence[Cell]) -> Verdict:
    """The verdict on one optimizer's cells, at least one; ``"unknown"`` without a baseline, a rival, or a spread."""
    name = optimizer(group[0])
    base = next((cell for cell in group if cell["strategy"] == BASELINE), None)
    rivals = [cell for cell in group if cell["strategy"] != BASELINE and stat(cell, "test_accuracy") is not None]
    best = max(rivals, key=_preference, default=None)
    if base is None or best is None or stat(base, "test_accuracy") is None:
        return Verdict(name, "unknown", best, base, None, None)
    gain = (stat(best, "test_accuracy") or 0.0) - (stat(base, "test_accuracy") or 0.0)
    spread = _joint_spread(best, base)
    return Verdict(name, _kind(gain, spread), best, base, gain, spread)


def _preference(cell: Cell) -> float:
    chosen = stat(cell, "validation_accuracy")
    return -math.inf if chosen is None else chosen


def _joint_spread(best: Cell, base: Cell) -> float | None:
    """None if either side has fewer than two seeds: a spread of one value is no spread."""
    if any(len((cell["test_accuracy"] or {}).get("values") or []) < 2 for cell in (best, base)):
        return None
    first, second = stat(best, "test_accuracy", "std"), stat(base, "test_accuracy", "std")
    return None if first is None or second is None else math.hypot(first, second)


def _kind(gain: float, spread: float | None) -> Kind:
    if spread is None:
        return "unknown"
    if abs(gain) <= spread:
        return "none"
    return "better" if gain > 0 else "worse"


def headline(found: Sequence[Verdict], data: str, digits: int = 1) -> str:
    """The page's title: one sentence, and no more than the numbers carry."""
    told = []
    for kind, phrase in PHRASES.items():
        names = [_told(one, digits) for one in found if one.kind == kind]
        told += [phrase.format(listed(names))] if names else []
    return f"On {data}, {'; '.join(told)}."


def _told(one: Verdict, digits: int) -> str:
    """The optimizer's name, with what helped or hurt there in brackets."""
    if one.best is None or one.kind not in ("better", "worse"):
        return one.optimizer
    return f"{one.optimizer} ({label(one.best)}, {_change(one, digits)})"


def _change(one: Verdict, digits: int) -> str:
    gain = one.gain or 0.0
    return f"{'+' if gain >= 0 else ''}{percent(gain, digits)} points"


def explained(one: Verdict, digits: int = 1) -> str:
    """The numbers behind one optimizer's part of the title."""
    if one.base is None:
        return "no run without control to compare with."
    if one.best is None or one.gain is None:
        return "no test accuracy to compare."
    sides = f"{label(one.best)} {with_spread(one.best, 'test_accuracy', digits)} %, " \
            f"{label(one.base)} {with_spread(one.base, 'test_accuracy', digits)} %"
    return f"{sides}: {_change(one, digits)}, {_weight(one, digits)}."


def _weight(one: Verdict, digits: int) -> str:
    if one.spread is None:
        return "of which one seed cannot say what chance does"
    side = "within" if one.kind == "none" else "beyond"
    return f"{side} the spread of {percent(one.spread, digits)}"
