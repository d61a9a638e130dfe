"""Results as they come (nested, with gaps and values that are not finite) made into what the page draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from normwise.errors import StudyError
from normwise.experiments.catalog import BASELINE
from normwise.experiments.compare.tables import label

MOST_POINTS = 100  # a curve 1100 px wide shows no more, and 36 cells with every layer then stay far under a megabyte
GREY = "#808080"  # the baseline: readable on white and on near-black, and no colour among the colours
# Okabe & Ito, "Color Universal Design" (2008), without the yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FAMILIES: tuple[tuple[list[int], str], ...] = (
    ([1, 0], "circle"), ([6, 3], "square"), ([2, 2], "triangle-up"), ([8, 3, 2, 3], "diamond"),
)

Cell = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How one strategy is drawn everywhere: colour, dash and symbol say the same, so that no one needs the colour."""

    strategy: str
    label: str
    colour: str
    dash: list[int]
    shape: str


def finite(value: Any) -> Any:
    """``value`` with every float that is not finite as None: JSON knows no NaN, and a browser refuses it."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cells(results: dict[str, Any]) -> list[Cell]:
    """The cells of ``results``.

    Raises:
        StudyError: there is none, or one without its strategy or optimizer.
    """
    found = results.get("cells")
    if not isinstance(found, list) or not found:
        given = ", ".join(sorted(map(str, results))) or "an empty dictionary"
        raise StudyError(f"A report needs results with at least one entry in 'cells', got: {given}. "
                         "Pass what a study wrote with --json.")
    for cell in found:
        for key in ("strategy", "optimizer"):
            if not isinstance(cell.get(key), str):
                raise StudyError(f"Each cell of the results needs {key!r} as text, got {cell.get(key)!r}.")
    return found


def unique(words: Iterable[str]) -> list[str]:
    """``words`` without repetition, in the order of their first appearance."""
    return list(dict.fromkeys(words))


def looks(found: Sequence[Cell]) -> list[Look]:
    """A look for each strategy, in order of appearance; beyond 24 strategies they repeat."""
    labels: dict[str, str] = {}
    for cell in found:
        labels.setdefault(cell["strategy"], label(cell))
    base = [Look(BASELINE, labels.pop(BASELINE), GREY, [1, 0], "circle")] if BASELINE in labels else []
    return base + [_look(index, *pair) for index, pair in enumerate(labels.items())]


def _look(index: int, strategy: str, text: str) -> Look:
    dash, shape = FAMILIES[index // len(COLOURS) % len(FAMILIES)]
    return Look(strategy, text, COLOURS[index % len(COLOURS)], dash, shape)


def stat(cell: Cell, key: str, part: str = "mean") -> float | None:
    """``cell[key][part]`` (or ``cell[key]``, if that is a bare number), None where it is missing or not finite."""
    value = cell.get(key)
    if isinstance(value, dict):
        value = value.get(part)
    elif part != "mean":
        return None
    return number(value)


def number(value: Any) -> float | None:
    """``value`` as a float, None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """``value`` with so many significant digits, which is what a chart can show; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


def thin(steps: Sequence[int], most: int = MOST_POINTS) -> list[int]:
    """At most ``most`` of ``steps``, evenly by position, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def mean_curve(series: Sequence[tuple[Sequence[int], Sequence[Any]]]) -> dict[str, list[Any]]:
    """Several seeds' (steps, values) as ``{"step", "mean", "low", "high"}``, at most ``MOST_POINTS`` long.

    At each step the mean and range are over the seeds that have a finite value there.
    """
    at: dict[int, list[float]] = {}
    for steps, values in series:
        for step, value in zip(steps, values, strict=False):
            kept = number(value)
            at.setdefault(step, []).extend([] if kept is None else [kept])
    keep = [step for step in thin(sorted(at)) if at[step]]
    return {
        "step": keep,
        "mean": [rounded(sum(at[step]) / len(at[step])) for step in keep],
        "low": [rounded(min(at[step])) for step in keep],
        "high": [rounded(max(at[step])) for step in keep],
    }


def curve(cell: Cell, key: str) -> dict[str, list[Any]]:
    """The mean over seeds of ``cell["curves"][…][key]``."""
    return mean_curve([(seed.get("step") or [], seed.get(key) or []) for seed in cell.get("curves") or []])


def norm_curve(cell: Cell, parameter: str) -> dict[str, list[Any]]:
    """The mean over seeds of one parameter's norm."""
    every = cell.get("curves") or []
    return mean_curve([(seed.get("step") or [], (seed.get("norms") or {}).get(parameter) or []) for seed in every])


def parameters(found: Sequence[Cell]) -> list[str]:
    """Names of the parameters whose norms were followed; weights first, biases after them."""
    every = (name for cell in found for seed in cell.get("curves") or [] for name in seed.get("norms") or {})
    return sorted(unique(every), key=lambda name: name.rpartition(".")[2] == "bias")


def identity(index: int, cell: Cell) -> Row:
    """The fields that say which cell a row of a chart is from."""
    return {"cell": index, "strategy": cell["strategy"], "label": label(cell), "optimizer": cell["optimizer"]}
