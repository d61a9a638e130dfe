"""The cells of a comparison as plain data, as rows of a table, and in words: who is better, and whether that may be said."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import normwise as nw
from normwise.experiments import cells
from normwise.experiments.catalog.optimizers import OPTIMIZERS
from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.catalog.strategies import STRATEGIES
from normwise.experiments.cells import Cell, strengths_of
from normwise.experiments.framework.figures import Interval, differ, median_reached, share_interval, spread
from normwise.experiments.framework.provenance import where
from normwise.experiments.tasks.task import Task

Results = Mapping[str, Any]
MISSING = "–"


# --------------------------------------------------------------------------------------------------------------- cells


def cell_results(cell: Cell, base: Cell, adam: Cell | None, cost: Mapping[str, float], task: Task) -> dict[str, Any]:
    """One cell. base: the cell of "nothing" with the same optimizer; adam: with Adam, where presets are compared. cost: of a step."""
    finals, strategy = cell.finals, STRATEGIES[cell.strategy]
    steps = steps_to_cell(cell, base, task.metric)
    norms = [final["norms"] for final in finals]
    return {
        **cell.told(strategy.label, strategy.about, policy_yaml(cell.strategy, strengths_of(cell.numbers), task.samples)),
        "optimizer": cell.group, "optimizer_label": OPTIMIZERS[cell.group].label,
        **{f"{part}_{name}": over_seeds([final[part][name] for final in finals])
           for part in ("test", "train", "validation") for name in ("accuracy", "loss")},
        "sparsity": spread([final["sparsity"] for final in finals]),
        "generalisation_gap": spread([final["train"]["accuracy"] - final["test"]["accuracy"] for final in finals]),
        "steps_to_baseline": median_reached(steps),
        "seconds_to_baseline": median_reached([None if n is None else n * cost["step_ms"] / 1e3 for n in steps]),
        "steps_to_adam": None if adam is None else median_reached(steps_to_cell(cell, adam, task.metric)),
        **cost, "norms": {name: {kind: _mean([run[name][kind] for run in norms]) for kind in norms[0][name]} for name in norms[0]},
    }  # fmt: skip


def over_seeds(numbers: Sequence[float | None]) -> dict[str, Any]:
    """As ``spread``; without a mean where a seed has no number."""
    known = [number for number in numbers if number is not None]
    return spread(known) if len(known) == len(numbers) else {"mean": None, "std": None, "values": list(numbers)}


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if len(known) == len(numbers) else None


def steps_to_cell(cell: Cell, base: Cell, metric: str) -> list[int | None]:
    """Of each seed, the steps to the best that the other cell's run with this seed saw: same start, same order of batches."""
    goals = [[v for v in final["curve"][f"validation_{metric}"] if v is not None] for final in base.finals]
    best = max if metric == "accuracy" else min
    return [steps_to(final["curve"], best(goal) if goal else None, metric) for final, goal in zip(cell.finals, goals, strict=True)]


def steps_to(curve: Mapping[str, Any], goal: float | None, metric: str = "accuracy") -> int | None:
    """The first recorded step whose validation result is the goal or better, None where none is."""
    sign = 1 if metric == "accuracy" else -1
    pairs = zip(curve["step"], curve[f"validation_{metric}"], strict=True)
    return next((step for step, value in pairs if None not in (value, goal) and sign * value >= sign * goal), None)  # type: ignore[operator]


def policy_yaml(strategy: str, strengths: Mapping[str, float], samples: int) -> str:
    """The policy that the strategy stands for at these strengths; no text for "nothing"."""
    rules = STRATEGIES[strategy].rules(strengths, samples)
    return nw.Policy(rules).to_yaml() if rules else ""


# ------------------------------------------------------------------------------------------------------------- verdicts

Kind = Literal["better", "worse", "none", "unknown"]
PHRASES: dict[Kind, str] = {
    "better": "norm control helps with {}",
    "worse": "norm control hurts with {}",
    "none": "no difference that these seeds can show with {}",
    "unknown": "nothing can be said yet about {}",
}
# Student's t, 97.5%: two seeds say little about what a third would do. Beyond ten seeds the last is near enough.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Verdict:
    """One optimizer's comparison: the strategy that validation prefers against the baseline, on the test part.

    Choosing by validation keeps the test part out of the choice. A difference is claimed only where the 95% intervals (``ends``: of the
    strategy, of the baseline) do not overlap; of accuracies they hold the chance of the images, too: two images of 359 are no headline.
    """

    optimizer: str
    kind: Kind
    best: Results | None = None
    base: Results | None = None
    gain: float = 0.0
    ends: tuple[Interval, Interval] | None = None
    metric: str = "accuracy"


def verdicts(results: Results) -> list[Verdict]:
    """One verdict for each optimizer, in order of appearance."""
    groups = dict.fromkeys(cell["optimizer"] for cell in results["cells"])
    count, metric = (results.get("data") or {}).get("test"), results.get("metric") or "accuracy"
    return [_verdict([cell for cell in results["cells"] if cell["optimizer"] == name], count, metric) for name in groups]


def _verdict(group: Sequence[Results], count: int | None, metric: str) -> Verdict:
    """``"unknown"`` without a baseline, a rival, or a second seed."""
    name, key, sign = optimizer(group[0]), f"test_{metric}", 1 if metric == "accuracy" else -1
    base = next((cell for cell in group if cell["strategy"] == BASELINE), None)
    rivals = [cell for cell in group if cell["strategy"] != BASELINE and stat(cell, key) is not None]
    best = max(rivals, key=lambda cell: sign * (stat(cell, f"validation_{metric}") or -sign * math.inf), default=None)
    if base is None or best is None or stat(base, key) is None:
        return Verdict(name, "unknown", best, base)
    gain = (stat(best, key) or 0.0) - (stat(base, key) or 0.0)
    sides = [[float(value) for value in cell[key].get("values") or []] for cell in (best, base)]
    if min(map(len, sides)) < 2:
        return Verdict(name, "unknown", best, base, gain, None, metric)
    first, second = (share_interval(side, count) if metric == "accuracy" and count else _interval(side) for side in sides)
    kind: Kind = "none" if not differ(first, second) else "better" if sign * gain > 0 else "worse"
    return Verdict(name, kind, best, base, gain, (first, second), metric)


def _interval(values: Sequence[float]) -> Interval:
    half = _T.get(len(values) - 1, 2.2) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def headline(results: Results) -> str:
    """One sentence, and no more than the numbers carry."""
    told, found = [], verdicts(results)
    for kind, phrase in PHRASES.items():
        names = [_told(one, digits_of(results)) for one in found if one.kind == kind]
        told += [phrase.format(listed(names))] if names else []
    return f"On {(results.get('data') or {}).get('name') or 'this data'}, {'; '.join(told)}."


def _told(one: Verdict, digits: int) -> str:
    """The optimizer's name, with what helped or hurt there in brackets."""
    if one.best is None or one.kind not in ("better", "worse"):
        return one.optimizer
    return f"{one.optimizer} ({label(one.best)}, {_change(one, digits)})"


def _change(one: Verdict, digits: int) -> str:
    sign = "+" if one.gain >= 0 else "−"
    return f"{sign}{abs(one.gain):.3f} in loss" if one.metric == "loss" else f"{sign}{100 * abs(one.gain):.{digits}f} points"


def explained(one: Verdict, digits: int = 1) -> str:
    """The numbers behind one optimizer's part of the headline."""
    if one.base is None:
        return "no run without control to compare with."
    if one.best is None or stat(one.base, f"test_{one.metric}") is None:
        return f"no test {one.metric} to compare."
    unit = "" if one.metric == "loss" else " %"
    sides = ", ".join(f"{label(cell)} {of_seeds(cell, f'test_{one.metric}', digits)}{unit}" for cell in (one.best, one.base))
    if one.ends is None:
        return f"{sides}: {_change(one, digits)}, of which one seed cannot say what chance does."
    scale, places = (100, digits) if one.metric == "accuracy" else (1, 3)
    first, second = (f"[{scale * low:.{places}f}, {scale * high:.{places}f}]" for low, high in one.ends)
    overlap = "overlap" if one.kind == "none" else "do not overlap"
    return f"{sides}: {_change(one, digits)}; the 95% intervals {first} and {second} {overlap}."


# --------------------------------------------------------------------------------------------------------------- tables


def title(results: Results) -> str:
    """What was compared, and where."""
    data, protocol = results["data"], results["protocol"]
    return (
        f"{results['task']} on {data['name']}: {data['train']} to train, {data['validation']} to choose on, {data['test']} to test; "
        f"{protocol['trials']} trials in every cell, {protocol['seeds']} seeds, {protocol['steps']} steps of batch {protocol['batch']}; "
        f"protocol {protocol.get('number', 3)}, budget {results['budget']}; {where(results['machine'])}."
    )


def ranked(results: Results) -> list[Results]:
    """The cells, optimizer by optimizer, the best test result first."""
    metric = results.get("metric") or "accuracy"
    order = list(dict.fromkeys(cell["optimizer"] for cell in results["cells"]))
    sign = -1 if metric == "accuracy" else 1

    def place(cell: Results) -> tuple[int, float]:
        value = stat(cell, f"test_{metric}")
        return order.index(cell["optimizer"]), math.inf if value is None else sign * value

    return sorted(results["cells"], key=place)


def rows(results: Results, optimizer: str) -> list[dict[str, str]]:
    """A row a strategy with this optimizer, the best first."""
    metric, digits = results.get("metric") or "accuracy", digits_of(results)
    head = "test %" if metric == "accuracy" else "test loss"
    adam = any(cell.get("steps_to_adam") for cell in results["cells"])
    return [
        {
            f"with {cell['optimizer']}": cell["label"], head: of_seeds(cell, f"test_{metric}", digits),
            "steps to baseline": reached(cell["steps_to_baseline"]),
            **({"steps to Adam's": reached(cell["steps_to_adam"])} if adam else {}),
            "step ms": f"{cell['step_ms']:.3g}", "control": f"{100 * cell['control_share']:.0f}%", "lr": f"{cell['lr']:.3g}",
            "strength": strengths(cell), "gap %": of_seeds(cell, "generalisation_gap", digits),
            "zeros %": f"{100 * cell['sparsity']['mean']:.1f}", "broken bounds": str(cell["violations"]),
        }
        for cell in ranked(results) if cell["optimizer"] == optimizer
    ]  # fmt: skip


def remarks(results: Results) -> list[str]:
    """What to know about single cells, and what was left out."""
    left_out = {"Left out": results["protocol"].get("left_out") or []}
    return cells.remarks(results["cells"], lambda cell: f"{cell['strategy']} with {cell['optimizer']}", **left_out)


def label(cell: Results) -> str:
    """What the reader calls the cell's strategy."""
    return str(cell.get("label") or cell["strategy"])


def optimizer(cell: Results) -> str:
    """What the reader calls the cell's optimizer."""
    name = cell["optimizer"]
    return str(cell.get("optimizer_label") or (OPTIMIZERS[name].label if name in OPTIMIZERS else name))


def stat(cell: Results, key: str, part: str = "mean") -> float | None:
    """``cell[key][part]`` (or ``cell[key]``, if that is a bare number), None where it is missing or not finite."""
    value = cell.get(key)
    if isinstance(value, dict):
        value = value.get(part)
    elif part != "mean":
        return None
    return finite_number(value)


def finite_number(value: Any) -> float | None:
    """``value`` as a float, None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def digits_of(results: Results) -> int:
    """Of a percentage: one test image in 360 is 0.3 points, in 10,000 0.01."""
    return 2 if ((results.get("data") or {}).get("test") or 0) >= 2000 else 1


def of_seeds(cell: Results, key: str, digits: int = 1) -> str:
    """Mean ± standard deviation, shares in percent without the sign; without the second where one seed gives none."""
    mean, std = stat(cell, key), stat(cell, key, "std")
    if mean is None:
        return MISSING
    scale, places = (1, 3) if key.endswith("_loss") else (100, digits)
    one = std is None or len(cell[key].get("values") or (0, 0)) < 2
    return (f"{scale * mean:.{places}f}" + ("" if one else f" ± {scale * (std or 0.0):.{places}f}")).replace("-", "−")


def reached(numbers: Results | None) -> str:
    """The median over seeds, and how many missed."""
    if numbers is None or not numbers.get("values"):
        return MISSING
    if numbers["median"] is None:
        return missed_of(numbers)
    missed = numbers["values"].count(None)
    return f"{numbers['median']:.0f}" + (f" ({missed} missed)" if missed else "")


def missed_of(numbers: Results | None) -> str:
    """``missed 1 of 3`` seeds; nothing where none did."""
    values = [finite_number(value) for value in (numbers or {}).get("values") or []]
    return f"missed {values.count(None)} of {len(values)}" if None in values else ""


def strengths(cell: Results) -> str:
    """What validation chose beside the learning rate."""
    return ", ".join(f"{name} {value:.3g}" for name, value in (cell.get("strengths") or {}).items()) or "-"


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""
