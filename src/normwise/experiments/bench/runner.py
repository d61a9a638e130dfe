"""Benchmarks by name: every other module of this folder is one.

A benchmark has a docstring that begins with its name and says in the same line what it measures; ``run()``, which gives
``{"rows": [{column: value, ...}, ...]}``; and ``BARS``, the columns that must keep to a bar. Where rows are many or wide, ``tables()``
makes of them what is shown, by heading.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
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
    sentences = []
    for row in measured["rows"]:
        case = ", ".join(value for column, value in row.items() if isinstance(value, str) and column != "bar_is")
        for bar in getattr(bench, "BARS", ()):
            if bar.value not in row or bar.bar not in row:
                continue
            value, limit, sense = row[bar.value], row[bar.bar], row.get("bar_is", bar.sense)
            # A NaN keeps to no bar, nor does None, which stands for it in JSON.
            if value is None or not (value <= limit if sense == "at most" else value >= limit):
                sentences.append(f"{case}: {bar.value} is {cell_text(value)}, the bar {sense} {cell_text(limit)}.")
    return sentences


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
