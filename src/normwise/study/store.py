"""Finished runs, one JSON line each, so that an interrupted study goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normwise.errors import DataError

Record = dict[str, Any]


def key_of(settings: Mapping[str, Any]) -> str:
    """A name for one run: equal settings have equal names, and any other value of any setting has another."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


class Store:
    """Results by the key of their settings; kept in memory only where ``path`` is None.

    A line that cannot be read, which is what a kill in the middle of writing leaves, or that is not what was written, as its sum tells,
    is dropped and its run done again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.results: dict[str, Record] = _read(path) if path is not None and path.exists() else {}

    def get(self, settings: Mapping[str, Any]) -> Record | None:
        """The result of a finished run, None where it has still to be done."""
        return self.results.get(key_of(settings))

    def newest(self, kind: str) -> tuple[Record, Record] | tuple[None, None]:
        """Settings and result of the last kept record of a kind; two Nones where there is none."""
        if self.path is None or not self.path.exists():
            return None, None
        entries = [e for e in map(_entry, _lines(self.path)) if e and e["settings"].get("kind") == kind]
        return (entries[-1]["settings"], entries[-1]["result"]) if entries else (None, None)

    def add(self, settings: Mapping[str, Any], result: Record) -> None:
        """Keeps a result; it is on disk when this returns."""
        key = key_of(settings)
        self.results[key] = result
        if self.path is not None:
            line = json.dumps({"key": key, "settings": dict(settings), "result": result, "sum": _sum(settings, result)}, allow_nan=False)
            # The newline comes first: a line that was cut off before must not swallow this one.
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line)


def _read(path: Path) -> dict[str, Record]:
    lines = _lines(path)
    kept = [entry for entry in map(_entry, lines) if entry is not None]
    if any(lines) and not kept and not any(line.startswith('{"key"') for line in lines):
        raise DataError(f"{path}: expected the runs kept by an earlier study, found another kind of file; give another --state.")
    return {entry["key"]: entry["result"] for entry in kept}


def _lines(path: Path) -> list[str]:
    """A byte that is no UTF-8 spoils its line only."""
    try:
        return path.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise DataError(f"{path}: expected the runs kept by an earlier study, found a file that cannot be read ({error}).") from None


def _entry(line: str) -> Record | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return None
    settings, result = entry.get("settings"), entry.get("result")
    if not isinstance(settings, dict) or not isinstance(result, dict) or entry["key"] != key_of(settings):
        return None
    return entry if entry.get("sum", "") in ("", _sum(settings, result)) else None


def _sum(settings: Mapping[str, Any], result: Record) -> str:
    """Tells a damaged line; lines of version 0.1 have none."""
    return key_of(json.loads(json.dumps({"settings": dict(settings), "result": result})))    # as it is read again: its keys are words
