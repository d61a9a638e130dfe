"""The command ``normwise race`` from its options to its table and its file: outputs are checked before any work, written after it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from normwise.race.race import Options, race, replay
from normwise.race.table import rows, title
from normwise.study.bench import show as show_rows
from normwise.study.job import check_file, write_json
from normwise.study.progress import on_stderr


def run(options: Options, json: Path | None = None) -> None:
    """Races, prints the table, writes the results to ``json``; finished runs stand beside it unless ``state`` says where."""
    state = options.state or (json.with_suffix(".runs.jsonl") if json is not None else None)
    check_file(json)
    check_file(state)
    try:
        results = race(replace(options, state=state), on_stderr())
    except KeyboardInterrupt:
        kept = f"finished runs are in {state}; the same command goes on from there" if state else "give --state FILE to be able to go on"
        print(f"Interrupted: {kept}.", file=sys.stderr)
        raise
    _tell(results, json)


def look(state: Path, json: Path | None = None) -> None:
    """Prints what the finished runs in ``state`` say, without training anything."""
    check_file(json)
    _tell(replay(state), json)


def _tell(results: Mapping[str, Any], json: Path | None) -> None:
    show(results)
    write_json(json, results)
    if json is not None:
        print(f"Results: {json}")


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the target and how long each contender needed for it."""
    out = stream or sys.stdout
    print(title(results), file=out)
    show_rows({"rows": rows(results)}, out)
    if results["unfinished"]:
        print(f"Not finished: {', '.join(results['unfinished'])}.", file=out)
