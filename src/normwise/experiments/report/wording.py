"""Numbers as text."""

from __future__ import annotations

import math
from typing import Any

from normwise.experiments.compare.tables import MISSING
from normwise.experiments.report.tidy import Cell, number, stat


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
