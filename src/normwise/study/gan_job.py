"""The command ``normwise race gan`` from its options to its table and its file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from normwise.study import gan
from normwise.study.job import deliver
from normwise.study.progress import on_stderr


def run(options: gan.Options, json: Path | None = None) -> bool:
    """Runs the study, prints its table, writes the results to ``json``; False where a bound is broken."""
    results = deliver(lambda state: gan.run(replace(options, state=state), on_stderr()), gan.show, json, options.state)
    broken = [breach for cell in results["cells"] for breach in cell["breaches"]]
    for message in broken:
        print(message, file=sys.stderr)
    return not broken
