"""What a recipe found, as plain data, as rows of tables, and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import normwise as nw
from normwise.experiments.cells import Cell
from normwise.experiments.cells import remarks as cell_remarks
from normwise.experiments.framework.figures import NO_DIFFERENCE, differ, finite, interval
from normwise.experiments.framework.provenance import where
from normwise.experiments.recipes.recipe import BASELINE, CONTENDER, Column, Recipe

Results = Mapping[str, Any]


def results_of(recipe: Recipe, found: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every arm within its group: what was chosen, and every figure of the reported seeds."""
    cells = [_told(recipe, cell) for cell in found]
    if recipe.span is not None:
        name = next(iter(cells[0]["figures"]))
        low, high = (next(c["figures"][name]["values"] for c in cells if c["arm"] == end) for end in recipe.span)
        for cell in cells:
            values = [_share(*three) for three in zip(low, cell["figures"][name]["values"], high, strict=True)]
            cell["figures"]["recovered"] = _over_seeds(values, Column("of the harm undone", 2))
    return cells


def _share(low: float | None, value: float | None, high: float | None) -> float | None:
    """How much of the way from ``low`` to ``high`` a value goes; None without a way."""
    return None if low is None or value is None or high is None or low == high else (low - value) / (low - high)


def _told(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    arm = recipe.arms[cell.strategy]
    rules = arm.rules(cell.numbers)
    return {
        "arm": cell.strategy, "label": arm.label, "role": arm.role, "group": cell.group,
        "numbers": cell.numbers, "policy_yaml": nw.Policy(rules).to_yaml() if rules else "",
        "trials": sum(map(len, cell.trials.values())), **cell.ends, "acted": [final["acted"] for final in cell.finals],
        "figures": {
            name: _over_seeds([final[name] for final in cell.finals], column) for name, column in recipe.columns[cell.group].items()
        },
    }  # fmt: skip


def _over_seeds(values: Sequence[float | None], column: Column) -> dict[str, Any]:
    """Values, median, and 95% interval of the median; a seed that diverged is worse than every other, and None."""
    worst = -math.inf if column.higher else math.inf
    known = [worst if value is None else value for value in values]
    return {
        **asdict(column), "values": list(values), "median": finite(statistics.median(known)),
        "interval": [finite(end) for end in interval(known)],
    }  # fmt: skip


def setting(results: Results) -> str:
    """Data, protocol, cost and machine in a sentence."""
    data, plan = results["data"], results["protocol"]
    return (
        f"{data['name']}; {plan['trials']} trials for each arm with one seed, then {plan['seeds']} others (median, lowest to highest) of "
        f"{plan['size']} {plan['unit']}; {results['seconds'] / 3600:.2f} hours of training, budget {results['budget']}, "
        f"protocol {plan['number']}; {where(results['machine'])}."
    )


def verdicts(results: Results) -> list[str]:
    """A sentence a group: the best arm against the best baseline, and whether a difference may be claimed."""
    said = []
    for group, cells in _grouped(results).items():
        ranked = sorted(cells, key=_rank, reverse=True)
        base = next(cell for cell in ranked if cell["role"] == BASELINE)
        first = next((cell for cell in ranked if cell["role"] == CONTENDER), None)
        if first is None:
            continue
        figure, other = (next(iter(cell["figures"].values())) for cell in (first, base))
        told = f"{group + ': ' if group else ''}{figure['label']}: {_text(figure)} with {first['label']}"
        said.append(f"{told}, {_text(other)} with {base['label']}, the best baseline{_claimed(figure, other)}.")
    return said


def _claimed(one: Results, other: Results) -> str:
    worst = -math.inf if one["higher"] else math.inf
    ends = [tuple(worst if end is None else end for end in figure["interval"]) for figure in (one, other)]
    return "" if differ(*ends) else f": {NO_DIFFERENCE}, since the intervals of the medians overlap"  # type: ignore[arg-type]


def groups(results: Results) -> dict[str, list[dict[str, str]]]:
    """The rows of each group's table, the best arm first."""
    return {
        group: [
            {"arm": cell["label"], **{figure["label"]: _text(figure) for figure in cell["figures"].values()},
             "chosen": ", ".join(f"{name} {value:g}" for name, value in cell["numbers"].items())}
            for cell in sorted(cells, key=_rank, reverse=True)
        ]
        for group, cells in _grouped(results).items()
    }  # fmt: skip


def remarks(results: Results) -> list[str]:
    """What to know about single arms."""
    silent = [_name(cell) for cell in results["cells"] if cell["role"] == CONTENDER and not any(cell["acted"])]
    # A strength at its weakest is an edge here: whether it is better left out the table says, since "nothing" was tuned as often.
    cells = [{**c, "on_edge": [*c["on_edge"], *(f"{name} weakest" for name in c["fades_out"])], "fades_out": []} for c in results["cells"]]
    return cell_remarks(cells, _name, **{"Its rules changed nothing in any reported run": silent})


def _name(cell: Results) -> str:
    return f"{cell['label']}{', ' + cell['group'] if cell['group'] else ''}"


def _grouped(results: Results) -> dict[str, list[Results]]:
    found: dict[str, list[Results]] = {}
    for cell in results["cells"]:
        found.setdefault(cell["group"], []).append(cell)
    return found


def _rank(cell: Results) -> float:
    figure = next(iter(cell["figures"].values()))
    median = figure["median"]
    return -math.inf if median is None else median if figure["higher"] else -median


def _text(figure: Results) -> str:
    """The median over seeds, and the lowest to the highest."""
    digits, known = figure["digits"], [value for value in figure["values"] if value is not None]
    if figure["median"] is None:
        return "diverged"
    ends = f"{min(known):.{digits}f} to {max(known):.{digits}f}" if len(known) == len(figure["values"]) else "some diverged"
    return f"{figure['median']:.{digits}f} ({ends})"
