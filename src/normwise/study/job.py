"""The command ``normwise compare`` from its options to its files: outputs are checked before any work, written after it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normwise import files
from normwise.errors import DataError
from normwise.files import check_file, check_folder
from normwise.study import tables
from normwise.study.compare import Options, compare
from normwise.study.progress import on_stderr


@dataclass(frozen=True)
class Outputs:
    """Where the results go beside the table: a JSON file, a folder for the page."""

    json: Path | None = None
    report: Path | None = None

    def default_state(self) -> Path | None:
        """Finished runs stand beside the results; nothing is written where no output was asked for."""
        if self.json is not None:
            return self.json.with_suffix(".state.jsonl")
        return self.report / "state.jsonl" if self.report is not None else None


def run(options: Options, outputs: Outputs) -> bool:
    """Compares, prints the table, writes the outputs. False where a bound is broken or a baseline was not trained."""
    options = replace(options, state=options.state or outputs.default_state())
    check_outputs(outputs.json, options.state, outputs.report)
    if outputs.report is not None:
        import normwise.report  # an extra that is missing is told now, not after the work
    try:
        results = compare(options, on_stderr())
    except KeyboardInterrupt:
        _tell_how_to_go_on(options.state)
        raise
    tables.show(results)
    write_json(outputs.json, results)
    if outputs.json is not None:
        print(f"Results: {outputs.json}")
    if outputs.report is not None:
        print(f"Report: {normwise.report.write(results, outputs.report)}")
    return _sound(results)


def deliver(
    work: Callable[[Path | None], Mapping[str, Any]], show: Callable[[Mapping[str, Any]], None], json: Path | None, state: Path | None
) -> Mapping[str, Any]:
    """``work(state)`` with its outputs checked before it and written after it. Finished runs stand beside ``json`` unless ``state`` says
    where; on Ctrl-C the user is told how to go on."""
    state = state or (json.with_suffix(".runs.jsonl") if json is not None else None)
    check_outputs(json, state)
    try:
        results = work(state)
    except KeyboardInterrupt:
        _tell_how_to_go_on(state)
        raise
    show(results)
    write_json(json, results)
    if json is not None:
        print(f"Results: {json}")
    return results


def _tell_how_to_go_on(state: Path | None) -> None:
    kept = f"finished runs are in {state}; the same command goes on from there" if state else "give --state FILE to be able to go on"
    print(f"Interrupted: {kept}.", file=sys.stderr)


def _sound(results: Mapping[str, Any]) -> bool:
    broken = [breach for cell in results["cells"] for breach in cell["breaches"]]
    for message in [*results["baseline_defects"], *broken]:
        print(message, file=sys.stderr)
    return not results["baseline_defects"] and not broken


def check_outputs(json: Path | None, state: Path | None, report: Path | None = None) -> None:
    """DataError, before the work, where a result cannot be written, or would take the place of the finished runs."""
    check_file(json)
    check_file(state)
    pages = [] if report is None else [report / name for name in ("index.html", "results.json")]
    if report is not None:
        check_folder(report)
    for page in pages:
        check_file(page)
    for other in (json, *pages):
        if state is not None and other is not None and os.path.realpath(state) == os.path.realpath(other):
            raise DataError(f"{state}: the finished runs and the results cannot be written to one place; give two files.")


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes the whole file or none of it; nothing for None. OutputError where it cannot be written."""
    if path is not None:
        files.replace(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
