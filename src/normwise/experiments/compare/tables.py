"""Statistics over seeds, and the table that a study ends with."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from normwise.errors import need
from normwise.experiments.framework.printing import console, for_stream


def spread(numbers: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of a single value) and the values."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": statistics.fmean(numbers), "std": deviation, "values": list(numbers)}


def median_reached(numbers: Sequence[float | None]) -> dict[str, Any]:
    """The median in which a None, a seed that missed, counts as later than every other; None where that is the median."""
    middle = statistics.median([math.inf if number is None else number for number in numbers])
    return {"median": middle if math.isfinite(middle) else None, "values": list(numbers)}


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the table of a comparison, one block of rows for each optimizer, the baseline first, and what to know about it."""
    out = stream or sys.stdout
    wide = console(out)
    wide.print(_title(results), soft_wrap=True)
    wide.print(_table(results, wide.width, lambda text: for_stream(text, out)))
    for line in _remarks(results):
        wide.print(line, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class _Column:
    """width: the narrowest terminal that shows it; the JSON file has all of them. needs: a key without which there is no column."""

    head: str
    text: Callable[[Mapping[str, Any]], str]
    width: int = 0
    right: bool = True
    needs: str = ""


def _table(results: Mapping[str, Any], width: int, written: Callable[[str], str]) -> Any:
    need("study", "rich", what="a table")
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in _COLUMNS if column.width <= width and _is_told(column, results["cells"])]
    for column in columns:
        table.add_column(written(column.head), justify="right" if column.right else "left", no_wrap=True)
    cells = results["cells"]
    for place, cell in enumerate(cells):
        last = place + 1 == len(cells) or cells[place + 1]["optimizer"] != cell["optimizer"]
        table.add_row(*(written(column.text(cell)) for column in columns), end_section=last)
    return table


def _is_told(column: _Column, cells: Sequence[Mapping[str, Any]]) -> bool:
    return not column.needs or any(cell.get(column.needs) for cell in cells)


def _title(results: Mapping[str, Any]) -> str:
    data, protocol = results["data"], results["protocol"]
    return (
        f"{results['task']} on {data['name']}: {data['train']} images to train, {data['validation']} to choose on, "
        f"{data['test']} to test; {protocol['trials']} trials in every cell, {protocol['seeds']} seeds"
    )


def _remarks(results: Mapping[str, Any]) -> list[str]:
    edge, fading, left_out = (results["protocol"].get(name, []) for name in ("cells_on_edge", "cells_fading_out", "left_out"))
    remarks = {
        "Best at the edge of what was tried, so that more trials may find better (--budget long)": edge,
        "Best at the weakest strength tried, so better left out": fading,
        "Left out": left_out,
    }
    return [f"{remark}: {'; '.join(cells)}." for remark, cells in remarks.items() if cells]


def _strengths(cell: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in cell["strengths"].items())


def _percent(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda cell: f"{100 * cell[name]['mean']:.1f} ± {100 * cell[name]['std']:.1f}"


def _reached(name: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    def text(cell: Mapping[str, Any]) -> str:
        median = cell[name]["median"]
        return "missed" if median is None else f"{median:.{digits}f}"

    return text


def _weight_norms(cell: Mapping[str, Any]) -> str:
    norms = (norm["l2"] for name, norm in cell["norms"].items() if name.endswith("weight"))
    return " ".join("–" if norm is None else f"{norm:.3g}" for norm in norms)


_COLUMNS = (
    _Column("optimizer", lambda cell: cell["optimizer"], right=False),
    _Column("strategy", lambda cell: cell["label"], right=False),
    _Column("lr", lambda cell: f"{cell['lr']:.3g}", width=110),
    _Column("strength", _strengths, width=135, right=False),
    _Column("test %", _percent("test_accuracy")),
    _Column("gap %", _percent("generalisation_gap"), width=92),
    _Column("steps to\nbaseline", _reached("steps_to_baseline", 0)),
    _Column("steps to\nAdam's", _reached("steps_to_adam", 0), width=120, needs="steps_to_adam"),
    _Column("seconds to\nbaseline", _reached("seconds_to_baseline", 2), width=150),
    _Column("step\nms", lambda cell: f"{cell['step_ms']:.2f}"),
    _Column("control", lambda cell: f"{100 * cell['control_share']:.0f}%", width=100),
    _Column("zeros\n%", lambda cell: f"{100 * cell['sparsity']['mean']:.1f}", width=140),
    _Column("L2 norms\nof weights", _weight_norms, width=160, right=False),
    _Column("viola-\ntions", lambda cell: str(cell["violations"])),
)
