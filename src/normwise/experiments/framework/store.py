"""A run, and finished runs, one JSON line each, so that an interrupted study resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeAlias

from normwise.errors import DataError, OutputError
from normwise.files import NOTHING, append_to, content, what_is

Record = dict[str, Any]
Result = dict[str, Any]
# What a value must be: of a type, of one of several forms, a list of just these, or a dictionary that has these names among others.
Form: TypeAlias = "type | tuple[Form, ...] | list[Form] | Mapping[str, Form]"

NUMBER: tuple[type, ...] = (int, float)
MAYBE: tuple[type, ...] = (int, float, type(None))    # what is not finite is kept as None
# Of a file of finished runs: the largest of ours has a few million.
MOST_BYTES = 1 << 28


class Run(ABC):
    """Everything that decides a result: a frozen dataclass that can be pickled, and settled by its settings alone."""

    kind: ClassVar[str]
    """Of which study it is."""
    unit: ClassVar[str] = "samples"
    """What ``amount`` counts."""

    @property
    @abstractmethod
    def amount(self) -> int:
        """What the run costs, for the progress."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """What a kept result must look like."""

    def settings(self) -> dict[str, Any]:
        """As plain data: the key of the run, and its line in the file of finished runs."""
        return {"kind": self.kind, **asdict(self)}    # type: ignore[call-overload]

    @abstractmethod
    def told(self, result: Result) -> str:
        """Run and result in a few words, for the progress."""

    @abstractmethod
    def train(self, context: Any, /) -> Result:
        """Trains on what the study was set up with. Plain data; seeds whatever it draws."""


def key_of(settings: Mapping[str, Any]) -> str:
    """A name for one run: equal settings have equal names, and any other value of any setting has another."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


class Store:
    """Results by the key of their settings; kept in memory only where ``path`` is None.

    Every line carries a checksum of its settings and its result. A line that cannot be read, which is what a kill in the middle of writing
    leaves, whose checksum is missing or another, is ignored and its run done again; ``ignored`` counts them, ``note`` says so.

    Raises DataError for a file that holds something else, and for what is no file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.ignored = path, 0
        self.entries: list[Record] = self._read(path) if path is not None and what_is(path) != NOTHING else []
        self.results: dict[str, Record] = {entry["key"]: entry["result"] for entry in self.entries}

    @property
    def note(self) -> str | None:
        """A sentence for the user on lines that were ignored; None where there were none."""
        if not self.ignored:
            return None
        lines = f"{self.ignored} lines are" if self.ignored > 1 else "1 line is"
        return f"{self.path}: {lines} ignored, damaged or without a checksum (normwise 0.1 wrote none); what is missing is run again."

    def get(self, settings: Mapping[str, Any], form: Form | None = None) -> Record | None:
        """The result of a finished run; None where it has still to be done, or where the result kept is not of this form."""
        kept = self.results.get(key_of(settings))
        return kept if kept is not None and fits(kept, form or {}) else None

    def newest(self, kind: str) -> tuple[Record, Record] | tuple[None, None]:
        """Settings and result of the last kept record of a kind; two Nones where there is none."""
        entries = [e for e in self.entries if e["settings"].get("kind") == kind]
        return (entries[-1]["settings"], entries[-1]["result"]) if entries else (None, None)

    def add(self, settings: Mapping[str, Any], result: Record) -> None:
        """Keeps a result; it is on the disk when this returns. OutputError where it cannot be written."""
        key = key_of(settings)
        line = json.dumps({"key": key, "settings": dict(settings), "result": result, "sum": _sum(settings, result)}, allow_nan=False)
        if self.path is not None:
            try:
                with append_to(self.path) as file:
                    # The newline comes first: a line that was cut off before must not swallow this one.
                    _write(file, b"\n" + line.encode())
                    os.fsync(file.fileno())
            except OSError as error:
                if isinstance(error, OutputError):
                    raise
                raise OutputError(f"{self.path}: a finished run cannot be kept ({error.strerror}); those before it are.") from error
        self.results[key] = result
        self.entries.append({"key": key, "settings": dict(settings), "result": result})

    def _read(self, path: Path) -> list[Record]:
        # A byte that is no UTF-8 spoils its line only.
        lines = content(path, MOST_BYTES, "the runs kept by an earlier study, a file").decode("utf-8", "replace").split("\n")
        kept = [entry for entry in map(_entry, lines) if entry is not None]
        if any(lines) and not kept and not any(line.startswith('{"key"') for line in lines):
            raise DataError(f"{path}: expected the runs kept by an earlier study, found another kind of file; give another --state.")
        self.ignored = sum(map(bool, lines)) - len(kept)
        return kept


def fits(value: Any, form: Form) -> bool:
    """Whether a value is of a form. True and False are no numbers."""
    if isinstance(form, Mapping):
        return isinstance(value, Mapping) and all(name in value and fits(value[name], part) for name, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and len(value) == len(form) and all(map(fits, value, form))
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))


def _write(file: BinaryIO, line: bytes) -> None:
    """All of it: without a buffer, a disk that fills up takes a part and says so at the next write only."""
    while line:
        line = line[file.write(line) :]


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
    return entry if entry.get("sum") == _sum(settings, result) else None


def _sum(settings: Mapping[str, Any], result: Record) -> str:
    """Tells a damaged line."""
    return key_of(json.loads(json.dumps({"settings": dict(settings), "result": result})))    # as it is read again: its keys are words
