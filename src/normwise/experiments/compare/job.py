"""The command ``normwise compare`` from its options to its files."""

from __future__ import annotations

from dataclasses import replace

from normwise.experiments.compare import tables
from normwise.experiments.compare.compare import Options, compare
from normwise.experiments.framework.progress import on_stderr
from normwise.experiments.framework.study import Outputs, deliver


def run(options: Options, outputs: Outputs) -> bool:
    """Compares, writes the outputs, prints the table. False where a bound is broken or a baseline was not trained."""
    return deliver(
        lambda state: compare(replace(options, state=state), on_stderr()), lambda results: tables.show(results), outputs.json,
        options.state or outputs.default_state(f"compare-{options.task}"), outputs.report,
        complaints=lambda results: [*results["baseline_defects"], *(breach for cell in results["cells"] for breach in cell["breaches"])],
    )  # fmt: skip
