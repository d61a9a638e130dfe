"""The command ``normwise prune`` from its options to its table and its file: outputs are checked before any work, written after it."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from normwise.experiments.bench.runner import show as show_rows
from normwise.experiments.framework.job import deliver
from normwise.experiments.framework.progress import on_stderr
from normwise.experiments.prune import study


def run(options: study.Options, json: Path | None = None) -> None:
    """Runs the study, prints its tables, writes the results to ``json``; finished runs stand beside it unless ``state`` says where."""
    deliver(lambda state: study.run(replace(options, state=state), on_stderr()), show, json, options.state)


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints every strength that was tried, the networks side by side, and how exact the surgery was."""
    out = stream or sys.stdout
    print(f"{results['task']} on {results['data']}: learning rate {results['lr']:.3g}, strength {results['strength']:.3g}", file=out)
    show_rows({"rows": [trial(line) for line in results["strengths"]]}, out)
    show_rows({"rows": networks(results)}, out)
    print(f"Removing the units changed no output by more than {results['summary']['difference']:.1e} (in float64).", file=out)


def trial(line: Mapping[str, Any]) -> dict[str, str]:
    """A strength that was tried, with the tuning seed."""
    row = {"strength": f"{line['strength']:.2g}"}
    if "failed" in line:
        return {**row, "validation, %": "-", "fine-tuned, %": "-", "parameters": "-", "multiplications": "-"}
    scores = {"validation, %": f"{100 * line['trained']:.1f}", "fine-tuned, %": f"{100 * line['fine_tuned']:.1f}"}
    return {**row, **scores, "parameters": f"{line['parameters']:,}", "multiplications": f"{line['multiplications']:,}"}


def networks(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The full network, the smaller one and the same shape from fresh weights, with what each step of them costs."""
    full = _row("full", results, "full", results["timing"]["full"])
    smaller = _row("smaller: group lasso, shrunk", results, "smaller", _typical(results, "smaller"))
    ratios = _typical(results, "ratio")
    fresh = _row("its shape from fresh weights", results, "fresh", {})
    share = {**dict.fromkeys(full, ""), "network": "smaller / full"}
    found = results["summary"]
    share |= {what: f"{found['smaller'][what] / found['full'][what]:.3f}" for what in ("parameters", "multiplications")}
    share |= {head: f"{ratios[kind]:.2f}" for head, kind in _TIMES.items()}
    return [full, smaller, fresh, share]


_TIMES = {"step, ms": "step_ms", "inference, ms": "inference_ms", "one input, ms": "single_ms"}


def _row(label: str, results: Mapping[str, Any], name: str, times: Mapping[str, float]) -> dict[str, str]:
    found = results["summary"][name]
    return {
        "network": label, "test, %": _percent(found["trained"]), "fine-tuned, %": _percent(found["fine_tuned"]),
        "parameters": f"{found['parameters']:,.0f}", "multiplications": f"{found['multiplications']:,.0f}",
        **{head: f"{times[kind]:.3g}" if times else "" for head, kind in _TIMES.items()},
    }  # fmt: skip


def _typical(results: Mapping[str, Any], what: str) -> dict[str, float]:
    """The median over the seeds' networks, by kind of time."""
    measured = results["timing"][what]
    return {kind: statistics.median(one[kind] for one in measured) for kind in measured[0]}


def _percent(over_seeds: Mapping[str, Any]) -> str:
    return f"{100 * over_seeds['mean']:.1f} ± {100 * over_seeds['std']:.1f}"
