"""The command ``normwise race gan`` from its options to its table and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from normwise.experiments.framework.job import deliver
from normwise.experiments.framework.progress import on_stderr
from normwise.experiments.gan import study


def run(options: study.Options, json: Path | None = None) -> bool:
    """Runs the study, prints its table, writes the results to ``json``; False where a bound is broken."""
    return deliver(
        lambda state: study.run(replace(options, state=state), on_stderr()), study.show, json, options.state,
        complaints=lambda results: [breach for cell in results["cells"] for breach in cell["breaches"]],
    )  # fmt: skip
