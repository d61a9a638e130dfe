"""Benchmarks by name: every other module of this folder, with a function ``run()`` that gives ``{"rows": [{...}, ...]}``."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from normwise.errors import StudyError, nearest
from normwise.experiments.framework.printing import console, for_stream

_RUNNER = __name__.rpartition(".")[2]


def names() -> list[str]:
    """All benchmarks there are."""
    modules = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in modules if name != _RUNNER]


def named(name: str) -> Callable[[], dict[str, Any]]:
    """The benchmark of this name; StudyError, with what there is, for another."""
    if name not in names():
        raise StudyError(f"Benchmark {name!r} is not known.{nearest(name, names())}")
    run: Callable[[], dict[str, Any]] = import_module(f"{__package__}.{name}").run
    return run


def complaints(measured: Mapping[str, Any]) -> list[str]:
    """What a benchmark that checks something did not find as it should be."""
    return [] if measured.get("ok", True) else [f"The benchmark {measured.get('bench', '')} misses what it checks; see its rows."]


def show(measured: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the rows as tables: rows with the same columns stand together."""
    from rich import box
    from rich.table import Table

    out = stream or sys.stdout
    wide = console(out)
    rows = list(measured["rows"])
    for columns in dict.fromkeys(tuple(row) for row in rows):
        table = Table(*(for_stream(column, out) for column in columns), box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            if tuple(row) == columns:
                table.add_row(*(for_stream(_text(row[column]), out) for column in columns))
        wide.print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
