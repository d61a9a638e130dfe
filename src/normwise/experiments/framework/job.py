"""The command ``normwise compare`` from its options to its files: outputs are checked before any work, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from normwise import files
from normwise.errors import DataError, OutputError
from normwise.experiments.compare import tables
from normwise.experiments.compare.compare import Options, compare
from normwise.experiments.framework import interrupts
from normwise.experiments.framework.printing import printed, tell
from normwise.experiments.framework.progress import on_stderr
from normwise.files import check_file, check_folder


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
    """Compares, writes the outputs, prints the table. False where a bound is broken or a baseline was not trained."""
    return deliver(
        lambda state: compare(replace(options, state=state), on_stderr()), lambda results: tables.show(results), outputs.json,
        options.state or outputs.default_state(), outputs.report,
        complaints=lambda results: [*results["baseline_defects"], *(breach for cell in results["cells"] for breach in cell["breaches"])],
    )  # fmt: skip


def deliver(
    work: Callable[[Path | None], Mapping[str, Any]], show: Callable[[Mapping[str, Any]], None], json: Path | None, state: Path | None,
    report: Path | None = None, keeps: bool = True, complaints: Callable[[Mapping[str, Any]], Sequence[str]] = lambda results: (),
) -> bool:
    """``work(state)`` with its outputs checked before it; after it they are written, and only then ``show`` prints the results, so that
    nothing that happens to a terminal or a pipe costs them. Finished runs stand beside ``json`` unless ``state`` says where; keeps: whether
    there are any. complaints: what is wrong with the results, for standard error; False where there is something.

    Raises OutputError, at the end of all this, for what could not be written or printed.
    """
    if keeps and state is None and json is not None:
        state = json.with_suffix(".runs.jsonl")
    check_outputs(json, state, report)
    if report is not None:
        import_module("normwise.experiments.report")  # an extra that is missing is told now, not after the work
    interrupts.say(partial(_how_to_go_on, state, keeps))
    results = work(state)
    with interrupts.held():
        written, failed = _save(results, json, report)
        interrupts.say(lambda: f"Interrupted: {_whereabouts(written, state)}.")
    try:
        printed(partial(_print, show, results, written), _whereabouts(written, state))
    except OutputError as error:
        failed.append(str(error).rstrip("."))
    wrong = complaints(results)
    for message in wrong:
        tell(message)
    if failed:
        raise OutputError(f"{'; '.join(failed)}.")
    return not wrong


def _save(results: Mapping[str, Any], json: Path | None, report: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Where everything is now, and what is wrong with the rest."""
    written: dict[str, Path] = {}
    failed = []
    if json is not None:
        try:
            write_json(json, results)
            written["Results"] = json
        except (OSError, DataError) as error:
            failed.append(f"the results could not be written ({str(error).rstrip('.')})")
    if report is not None:
        try:
            written["Report"] = import_module("normwise.experiments.report").write(results, report)
        except (OSError, DataError) as error:
            failed.append(f"the report could not be written ({str(error).rstrip('.')})")
    return written, failed


def _print(show: Callable[[Mapping[str, Any]], None], results: Mapping[str, Any], written: Mapping[str, Path]) -> None:
    show(results)
    for name, path in written.items():
        print(f"{name}: {path}")


def _whereabouts(written: Mapping[str, Path], state: Path | None) -> str:
    if written:
        return f"the results are in {' and '.join(map(str, written.values()))}"
    return f"finished runs are in {state}" if state else "with --json FILE they are kept"


def _how_to_go_on(state: Path | None, keeps: bool) -> str:
    if not keeps:
        return "Interrupted: nothing is kept of it; start the same command again."
    if state is None:
        return "Interrupted: nothing is kept; give --state FILE to be able to go on."
    if not state.exists() or not state.stat().st_size:
        return f"Interrupted before the first run was finished; the same command starts anew, and keeps its runs in {state}."
    return f"Interrupted: finished runs are in {state}; the same command goes on from there."


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
