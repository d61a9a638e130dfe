"""The command ``normwise race`` from its options to its table and its file: outputs are checked before any work, written after it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from normwise.experiments.bench.runner import show as show_rows
from normwise.experiments.framework.job import deliver
from normwise.experiments.framework.progress import on_stderr
from normwise.experiments.race.study import Options, race, replay
from normwise.experiments.race.tables import rows, title


def run(options: Options, json: Path | None = None) -> None:
    """Races, prints the table, writes the results to ``json``; finished runs stand beside it unless ``state`` says where."""
    deliver(lambda state: race(replace(options, state=state), on_stderr()), show, json, options.state)


def look(state: Path, json: Path | None = None) -> None:
    """Prints what the finished runs in ``state`` say, without training anything."""
    deliver(lambda _: replay(state, on_stderr()), show, json, None, keeps=False)


def show(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the target and how long each contender needed for it."""
    out = stream or sys.stdout
    print(title(results), file=out)
    show_rows({"rows": rows(results)}, out)
    if results["unfinished"]:
        print(f"Not finished: {', '.join(results['unfinished'])}.", file=out)
