"""Results as they come (nested, with gaps and values that are not finite) made into what the page draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from normwise.errors import StudyError
from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.compare.tables import MISSING, finite_number, label, stat

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
    for cell, key in product(found, ("strategy", "optimizer")):
        if not isinstance(cell.get(key), str):
            raise StudyError(f"Each cell of the results needs {key!r} as text, got {cell.get(key)!r}.")
    return found


def looks(found: Sequence[Cell]) -> list[Look]:
    """A look for each strategy, in order of appearance; beyond 24 strategies they repeat."""
    labels: dict[str, str] = {}
    for cell in found:
        labels.setdefault(cell["strategy"], label(cell))
    found_looks = [Look(BASELINE, labels.pop(BASELINE), GREY, [1, 0], "circle")] if BASELINE in labels else []
    for index, (strategy, text) in enumerate(labels.items()):
        dash, shape = FAMILIES[index // len(COLOURS) % len(FAMILIES)]
        found_looks.append(Look(strategy, text, COLOURS[index % len(COLOURS)], dash, shape))
    return found_looks


def rounded(value: float | None, digits: int = 4) -> float | None:
    """``value`` with so many significant digits, which is what a chart can show; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


def ends(cell: Cell, key: str) -> Row:
    """The mean over seeds and one standard deviation to either side: ``mean``, ``low``, ``high``; empty where there is no mean."""
    mean, std = stat(cell, key), stat(cell, key, "std") or 0.0
    return {} if mean is None else {"mean": mean, "low": mean - std, "high": mean + std}


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
            kept = finite_number(value)
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
    every = dict.fromkeys(name for cell in found for seed in cell.get("curves") or [] for name in seed.get("norms") or {})
    return sorted(every, key=lambda name: name.rpartition(".")[2] == "bias")


def identity(index: int, cell: Cell) -> Row:
    """The fields that say which cell a row of a chart is from."""
    return {"cell": index, "strategy": cell["strategy"], "label": label(cell), "optimizer": cell["optimizer"]}


# ------------------------------------------------------------------------------------------------------ numbers as text


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage without its sign: 0.9812 is ``"98.1"``."""
    return MISSING if value is None else f"{100 * value:.{digits}f}".replace("-", "−")


def plain(value: Any) -> str:
    """A number in four significant digits, thousands apart; text as it is; the dash for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    kept = finite_number(value)
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
