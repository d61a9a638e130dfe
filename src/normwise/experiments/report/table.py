"""The rows of the table of results: text ready to print, and which values are the best of their column."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.compare.tables import MISSING, finite_number, label, missed_of, of_seeds, stat, strengths
from normwise.experiments.report.scale import ErrorScale
from normwise.experiments.report.tidy import Cell, ends, percent, plain


@dataclass
class Entry:
    """One value: its text, a remark below it, and whether it is the column's best or a breach."""

    name: str
    text: str
    note: str = ""
    best: bool = False
    bad: bool = False


@dataclass(frozen=True)
class Strip:
    """Where a row's accuracy and its spread, and the baseline's, lie on a common scale; shares of its width."""

    low: float
    mean: float
    high: float
    base: float | None


@dataclass
class Line:
    """One row of the table."""

    label: str
    strategy: str
    setting: str
    index: int
    entries: list[Entry] = field(default_factory=list)
    strip: Strip | None = None


@dataclass(frozen=True)
class Column:
    """A column: its title, its text, and the number whose smallest (``sign`` −1) or largest (+1) is marked (0: none)."""

    name: str
    show: Callable[[Cell, int], tuple[str, str]]
    value: Callable[[Cell], float | None]
    sign: int = 0
    rivals_only: bool = False  # the baseline has no control, so that its share of nothing is no merit
    needs: str = ""  # a key of the results: without it in any cell there is no such column


def columns_of(found: Sequence[Cell]) -> list[Column]:
    """The columns that these cells have something to say in."""
    return [column for column in COLUMNS if not column.needs or any(cell.get(column.needs) for cell in found)]


def lines(
    group: Sequence[tuple[int, Cell]], columns: Sequence[Column], scale: ErrorScale, digits: int, metric: str = "accuracy"
) -> list[Line]:
    """One optimizer's rows, the best by ``metric`` first, cells without it last."""
    sign = -1 if metric == "accuracy" else 1
    ordered = sorted(group, key=lambda pair: math.inf if (value := stat(pair[1], f"test_{metric}")) is None else sign * value)
    base = next((_accuracy(cell) for _, cell in group if cell["strategy"] == BASELINE), None)
    rows = []
    for index, cell in ordered:
        row = Line(label(cell), cell["strategy"], setting(cell), index, [Entry(c.name, *c.show(cell, digits)) for c in columns])
        row.entries[-1].bad = bool(finite_number(cell.get("violations")))
        if middle := ends(cell, "test_accuracy"):
            shares = {key: scale.share(value) for key, value in middle.items()}
            row.strip = Strip(**shares, base=None if base is None else scale.share(base))
        rows.append(row)
    for position, column in enumerate(columns):
        _mark(column, [(row.entries[position], cell) for row, (_, cell) in zip(rows, ordered, strict=True)])
    return rows


def _accuracy(cell: Cell) -> float | None:
    return stat(cell, "test_accuracy")


def setting(cell: Cell) -> str:
    """The learning rate and strength that validation chose."""
    rate = [f"lr {plain(cell['lr'])}"] if cell.get("lr") is not None else []
    return ", ".join([*rate, *([strengths(cell)] if cell.get("strengths") else [])])


def _mark(column: Column, pairs: Sequence[tuple[Entry, Cell]]) -> None:
    """Marks the best entries; those that print alike are marked alike."""
    able = [pair for pair in pairs if not (column.rivals_only and pair[1]["strategy"] == BASELINE)]
    ranked = [(column.sign * value, entry) for entry, cell in able if (value := column.value(cell)) is not None]
    if not column.sign or len(ranked) < 2:
        return
    winner = max(ranked, key=lambda pair: pair[0])[1].text
    for _, entry in ranked:
        entry.best = entry.text == winner and winner not in (MISSING, NONE_ZERO)


def _to_baseline(cell: Cell, key: str) -> tuple[str, str]:
    """The median, and how many seeds never got there; only the latter where that is the median."""
    note = missed_of(cell.get(key))
    median = stat(cell, key, "median")
    return (note, "") if median is None and note else (plain(_short(median)), note)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}") if abs(value) < 100 else float(round(value))


def _percentage(value: float | None) -> str:
    return MISSING if value is None else f"{percent(value, 1)}\u202f%"


NONE_ZERO = "0.0\u202f%"
COLUMNS: tuple[Column, ...] = (
    Column("Test accuracy, %", lambda c, d: (of_seeds(c, "test_accuracy", d), ""), _accuracy, +1),
    Column("Test loss", lambda c, d: (of_seeds(c, "test_loss"), ""), lambda c: stat(c, "test_loss"), -1, needs="test_loss"),
    Column("Generalisation gap", lambda c, d: (of_seeds(c, "generalisation_gap", d), ""),
           lambda c: stat(c, "generalisation_gap"), -1),
    Column("Steps to baseline", lambda c, d: _to_baseline(c, "steps_to_baseline"),
           lambda c: stat(c, "steps_to_baseline", "median"), -1),
    Column("Seconds to baseline", lambda c, d: _to_baseline(c, "seconds_to_baseline"),
           lambda c: stat(c, "seconds_to_baseline", "median"), -1),
    Column("Steps to Adam’s", lambda c, d: _to_baseline(c, "steps_to_adam"),
           lambda c: stat(c, "steps_to_adam", "median"), -1, needs="steps_to_adam"),
    Column("Step, ms", lambda c, d: (plain(_short(stat(c, "step_ms"))), ""), lambda c: stat(c, "step_ms"), -1),
    Column("Control’s share", lambda c, d: (_percentage(stat(c, "control_share")), ""),
           lambda c: stat(c, "control_share"), -1, rivals_only=True),
    Column("Zero weights", lambda c, d: (_percentage(stat(c, "sparsity")), ""), lambda c: stat(c, "sparsity"), +1),
    Column("Violations", lambda c, d: (plain(finite_number(c.get("violations"))), ""), lambda c: None),
)
