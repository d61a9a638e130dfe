"""The command ``normwise race gan`` from its options to its table and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from normwise.study import gan
from normwise.study.job import deliver
from normwise.study.progress import on_stderr


def run(options: gan.Options, json: Path | None = None) -> bool:
    """Runs the study, prints its table, writes the results to ``json``; False where a bound is broken."""
    return deliver(
        lambda state: gan.run(replace(options, state=state), on_stderr()), gan.show, json, options.state,
        complaints=lambda results: [breach for cell in results["cells"] for breach in cell["breaches"]],
    )  # fmt: skip
