"""The command ``normwise race`` from its options to its table and its file: outputs are checked before any work, written after it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from normwise.race.race import Options, race, replay
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


def title(results: Mapping[str, Any]) -> str:
    """The target in one sentence."""
    if results["target"] is None:
        return f"{results['race']}: the baselines are still being tuned, so there is no target yet."
    horizon, seeds = results["horizon"], results["protocol"]["seeds"]
    end = "saturated" if horizon["saturated"] else "not saturated: the budget ends it there"
    return (
        f"{results['race']}: the target is a validation {results['metric']} of {results['target']:.4f}, the median over {seeds} seeds of "
        f"{results['leader']} at {horizon['samples']} samples ({horizon['steps']} steps of the task's batch; {end})."
    )


def rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row a contender, the fastest first."""
    metric = results["metric"]
    lines = sorted(results["contenders"], key=lambda c: float("inf") if c["share"] is None else c["share"])
    return [_row(line, metric) for line in lines]


def _row(c: Mapping[str, Any], metric: str) -> dict[str, str]:
    ends = [end["test"][metric] for end in c["ends"] if end["test"][metric] is not None]
    gaps = [end["test"]["loss"] - end["train"]["loss"] for end in c["ends"] if None not in (end["test"]["loss"], end["train"]["loss"])]
    return {
        "contender": c["label"], "share of samples": _share(c), "of seconds": _number(c["seconds_share"]),
        "missed": f"{c['missed']} of {len(c['shares'])}", f"test {metric} there": _number(_mean(ends), 3),
        "gap in loss": _number(_mean(gaps), 2),
        "step, ms": f"{c['step_ms']:.0f}", "batch": str(c["batch"]), "spikes": str(sum(end["spikes"] for end in c["ends"])),
        "result at rate × 0.1, 0.3, 1, 3, 10": " ".join(_number(r["result"], 2) for r in c["robustness"]),
        "rate": f"{c['tuned']['numbers']['lr']:g}" + (" (edge)" if c["tuned"]["on_edge"] else ""),
    }  # fmt: skip


def _share(c: Mapping[str, Any]) -> str:
    if c["share"] is None:
        return "missed"
    return f"{c['share']:.2f} [{_number(c['low'])}, {_number(c['high'])}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
