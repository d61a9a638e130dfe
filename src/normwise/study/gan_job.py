"""The command ``normwise race gan`` from its options to its table and its file: outputs are checked before any work, written after it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from normwise.study import gan
from normwise.study.job import check_file, write_json
from normwise.study.progress import on_stderr


def run(options: gan.Options, json: Path | None = None) -> bool:
    """Runs the study, prints its table, writes the results to ``json``; False where a bound is broken."""
    state = options.state or (json.with_suffix(".runs.jsonl") if json is not None else None)
    check_file(json)
    check_file(state)
    try:
        results = gan.run(replace(options, state=state), on_stderr())
    except KeyboardInterrupt:
        kept = f"finished runs are in {state}; the same command goes on from there" if state else "give --state FILE to be able to go on"
        print(f"Interrupted: {kept}.", file=sys.stderr)
        raise
    gan.show(results)
    write_json(json, results)
    if json is not None:
        print(f"Results: {json}")
    broken = [breach for cell in results["cells"] for breach in cell["breaches"]]
    for message in broken:
        print(message, file=sys.stderr)
    return not broken
