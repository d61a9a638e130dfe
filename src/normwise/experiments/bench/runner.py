"""Benchmarks by name: every other module of this folder is one.

A benchmark has a docstring that begins with its name and says in the same line what it measures; ``run()``, which gives
``{"rows": [{column: value, ...}, ...]}``; and ``BARS``, the columns that must keep to a bar. Where rows are many or wide, ``tables()``
makes of them what is shown, by heading.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from normwise.errors import StudyError, nearest
from normwise.experiments.framework.printing import cell_text, for_stream, show_table


@dataclass(frozen=True)
class Bar:
    """In each row that has both columns, ``value`` is at most ``bar``, or at least: ``sense`` says which, or the row's own ``bar_is``."""

    value: str
    bar: str = "bar"
    sense: str = "at most"


def names() -> list[str]:
    """All benchmarks there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", Path(__file__).stem))


def listing() -> str:
    """A line for each benchmark: its name, and what its docstring says first."""
    lines = []
    for name in names():
        # Read, not imported: a list should not wait for torch.
        about = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"{name:<8} {about.splitlines()[0].partition(': ')[2].rstrip('.')}")
    return "\n".join(lines)


def named(name: str) -> Any:
    """The module of this benchmark. Raises StudyError, with the names that there are, for another."""
    if name not in names():
        raise StudyError(f"Benchmark {name!r} is not known.{nearest(name, names())}")
    return import_module(f"{__package__}.{name}")


def missed(bench: Any, measured: Mapping[str, Any]) -> list[str]:
    """A sentence for each bar that a row misses."""
    return [
        f"{case}: {bar.value} is {cell_text(value)}, the bar {sense} {cell_text(limit)}."
        for case, bar, value, sense, limit, met in _held(bench, measured) if not met
    ]  # fmt: skip


def kept(bench: Any, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each bar and limit how many rows keep to it, and the worst of those that do not."""
    groups: dict[tuple[str, str, float], list[tuple[str, float, bool]]] = {}
    for case, bar, value, sense, limit, met in _held(bench, measured):
        groups.setdefault((bar.value, sense, limit), []).append((case, value, met))
    rows = []
    for (what, sense, limit), found in groups.items():
        misses = [(value, case) for case, value, met in found if not met and value is not None]
        worst = (max if sense == "at most" else min)(misses) if misses else None
        rows.append({
            "figure": what, "bar": f"{sense} {cell_text(limit)}", "kept in": f"{sum(met for _, _, met in found)} of {len(found)}",
            "worst miss": f"{cell_text(worst[0])} ({worst[1]})" if worst else "-",
        })  # fmt: skip
    return rows


def _held(bench: Any, measured: Mapping[str, Any]) -> Iterator[tuple[str, Bar, float, str, float, bool]]:
    """Every row beside every bar that it has: its case, the bar, the value, the sense, the limit, and whether it keeps to it."""
    for row in measured["rows"]:
        case = ", ".join(value for column, value in row.items() if isinstance(value, str) and column != "bar_is")
        for bar in getattr(bench, "BARS", ()):
            if bar.value in row and bar.bar in row:
                value, limit, sense = row[bar.value], row[bar.bar], row.get("bar_is", bar.sense)
                # A NaN, and a ratio that means nothing, keep to no bar.
                met = value is not None and (value <= limit if sense == "at most" else value >= limit)
                yield case, bar, value, sense, limit, met


def show(measured: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the rows as tables: rows with the same columns stand together."""
    out = stream or sys.stdout
    for heading, rows in tables(measured).items():
        if heading:
            print(for_stream(heading, out), file=out)
        show_table(rows, out)


def tables(measured: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is shown of a benchmark's rows, by heading."""
    known = measured.get("bench")
    make = getattr(named(known), "tables", None) if known else None
    found: dict[str, list[dict[str, Any]]] = {"": measured["rows"]} if make is None else make(measured)
    return found
