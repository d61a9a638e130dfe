"""The cells of a finished study as plain data: what goes to the JSON file, the table and the page."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from normwise.experiments.compare import search
from normwise.experiments.compare.cells import Cell
from normwise.experiments.compare.optimizers import OPTIMIZERS
from normwise.experiments.compare.strategies import STRATEGIES, axes
from normwise.experiments.compare.tables import median_reached, spread
from normwise.experiments.tasks.data.splits import ImageData

BASELINE = "nothing"
_OVER_SEEDS = ("test_accuracy", "train_accuracy", "validation_accuracy", "sparsity")


def cell_results(cell: Cell, base: Cell, adam: Cell | None, cost: Mapping[str, float], samples: int) -> dict[str, Any]:
    """One cell. base: the cell of "nothing" with the same optimizer; adam: with Adam, where presets are compared with it. cost: of a step.
    samples: training images."""
    finals = [cell.finals[seed] for seed in sorted(cell.finals)]
    numbers = cell.numbers()
    lr = numbers.pop("lr")
    steps = steps_to_cell(cell, base)
    return {
        "strategy": cell.strategy, "label": STRATEGIES[cell.strategy].label,
        "optimizer": cell.optimizer, "optimizer_label": OPTIMIZERS[cell.optimizer].label,
        "about": STRATEGIES[cell.strategy].about, "lr": lr, "strength": _one_strength(numbers), "strengths": numbers,
        "policy_yaml": policy_yaml(cell.strategy, numbers, samples), **_searched(cell),
        **{name: spread([final[name] for final in finals]) for name in _OVER_SEEDS},
        "generalisation_gap": spread([final["train_accuracy"] - final["test_accuracy"] for final in finals]),
        "steps_to_baseline": median_reached(steps),
        "seconds_to_baseline": median_reached([None if n is None else n * cost["step_ms"] / 1e3 for n in steps]),
        "steps_to_adam": None if adam is None else median_reached(steps_to_cell(cell, adam)),
        **cost, "norms": _mean_norms([final["norms"] for final in finals]),
        "violations": sum(len(final["breaches"]) for final in finals),
        "breaches": sorted({breach for final in finals for breach in final["breaches"]}),
        "curves": [{"seed": seed, **cell.finals[seed]["curve"]} for seed in sorted(cell.finals)],
    }  # fmt: skip


def steps_to_cell(cell: Cell, base: Cell) -> list[int | None]:
    """Of each seed, the steps to what the other cell's run with this seed reached."""
    return [steps_to(cell.finals[seed]["curve"], target(base, seed)) for seed in sorted(cell.finals)]


def target(base: Cell, seed: int) -> float:
    """The best validation accuracy of the baseline's run with this seed: same start, same order of batches."""
    return max(base.finals[seed]["curve"]["validation_accuracy"], default=1.0)


def steps_to(curve: Mapping[str, Any], goal: float) -> int | None:
    """The first recorded step at which the validation accuracy is ``goal`` or more, None where it never is."""
    pairs = zip(curve["step"], curve["validation_accuracy"], strict=True)
    return next((step for step, accuracy in pairs if accuracy >= goal), None)


def policy_yaml(strategy: str, strengths: Mapping[str, float], samples: int) -> str:
    """The policy that the strategy stands for at these strengths; no text for "nothing"."""
    rules = STRATEGIES[strategy].rules(strengths, samples)
    if not rules:
        return ""
    import normwise as nw

    return nw.Policy(rules).to_yaml()


def machine() -> dict[str, Any]:
    """What the times were measured on, and when."""
    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def describe(data: ImageData) -> dict[str, Any]:
    """Name and sizes of the parts."""
    return {
        "name": data.name, "train": len(data.train), "validation": len(data.validation), "test": len(data.test),
        "shape": list(data.shape), "classes": data.classes, "own_test_part": data.own_test,
        "train_available": data.available, "fingerprint": data.key,
    }  # fmt: skip


def _one_strength(numbers: Mapping[str, float]) -> float | str | None:
    """A number where there is one, words where a combination has two."""
    if len(numbers) > 1:
        return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    return next(iter(numbers.values()), None)


def _searched(cell: Cell) -> dict[str, Any]:
    searched = axes(cell.strategy, cell.optimizer)
    ends = [(searched[axis], sign) for axis, sign in search.edges(cell.scores)]
    return {
        "trials": len(cell.trials), "widenings": search.widenings(cell.scores),
        "on_edge": [f"{axis.name} {'high' if sign > 0 else 'low'}" for axis, sign in ends if sign != axis.off],
        "fades_out": [axis.name for axis, sign in ends if sign == axis.off],
    }  # fmt: skip


def _mean_norms(runs: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {kind: _mean([run[name][kind] for run in runs]) for kind in runs[0][name]} for name in runs[0]
    }  # fmt: skip


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if len(known) == len(numbers) else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
