"""Where the norms of a run go while it trains: a file, or a logger by its own method."""

from __future__ import annotations

import csv
import inspect
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from normwise import files
from normwise.errors import PolicyError

Numbers: TypeAlias = Mapping[str, float]
Units: TypeAlias = Mapping[str, Sequence[float]]
"""The L2 norms of the units of each weight, by name; empty where no histograms are asked for."""
Write: TypeAlias = Callable[[int, Numbers, Units], object]
"""Writes what is known after a step."""

METHODS = ("log_metrics", "log_dict", "log")
"""What loggers call their method of (numbers, step=...): MLflow and Lightning's loggers; Fabric; W&B and Accelerate."""
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
"""What stands for a histogram where a logger has none."""
MOST_BYTES = 1 << 30    # of a file that is gone on with


@dataclass
class Logger:
    """One place that norms go to, and how often."""

    name: str
    write: Write
    every: int
    histograms: bool
    failed: bool = False

    def due(self, step: int) -> bool:
        """Whether the ``step``-th step is written, at which it is recorded too."""
        return step % self.every == 0

    def __call__(self, step: int, numbers: Numbers, units: Units) -> None:
        """Training goes on where this fails: a full disk or a server that is away costs the records, not the run."""
        try:
            self.write(step, numbers, units if self.histograms else {})
        except Exception as error:    # whatever somebody else's logger raises
            if not self.failed:
                self.failed = True
                problem = f"{type(error).__name__}: {error}"
                warnings.warn(f"{self.name} did not take the norms of step {step} ({problem}). Training goes on.", stacklevel=2)


def logger_of(target: Any, every: int, histograms: bool) -> Logger:
    """What :meth:`normwise.Control.log_to` is given, as a logger.

    Raises PolicyError for what is none and for a file of another kind, DataError for a file that cannot be written.
    """
    if isinstance(target, Logger):
        return target
    if type(every) is not int or every < 1:
        raise PolicyError(f"every is {every!r}, but every must be a whole number of steps, 1 or more.")
    if not isinstance(target, str | os.PathLike):
        return Logger(f"the logger {type(target).__name__}", _write_to(target), every, histograms)
    path, kinds = Path(target), {".jsonl": _JSONL, ".csv": _CSV}
    if path.suffix not in kinds:
        raise PolicyError(f"norms cannot be logged to {str(path)!r}: give a path that ends in {' or '.join(kinds)}.")
    return Logger(str(path), kinds[path.suffix](path), every, histograms)


def _write_to(target: Any) -> Write:
    if not isinstance(target, type | nn.Module):    # which are callable, too
        for name in METHODS:
            if _takes(getattr(target, name, None), {}, step=0):
                return _by_method(target, name)
        if hasattr(target, "add_scalar") and hasattr(target, "add_histogram"):
            return _in_tensorboard(target)
        if _takes(target, {}, 0):
            return lambda step, numbers, units: target({**numbers, **quantiles(units)}, step)
    raise PolicyError(
        f"{target!r} is no place to log norms to. Give a path that ends in .jsonl or .csv, a SummaryWriter, a run of W&B, the mlflow "
        "module, a logger of Lightning, a Fabric, an Accelerator, or a function of (numbers, step)."
    )


def _takes(method: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a call fits the signature: ``log`` has many meanings, ``logging.Logger.log`` is another one."""
    try:
        inspect.signature(method).bind(*args, **kwargs)
    except (TypeError, ValueError):    # no function, or not such a one
        return False
    return True


def _in_tensorboard(writer: Any) -> Write:
    def write(step: int, numbers: Numbers, units: Units) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        for name, norms in units.items():
            writer.add_histogram(f"units/{name}", torch.tensor(norms), step)

    return write


def _by_method(target: Any, method: str) -> Write:
    """The method is looked up at each record: ``wandb.init()`` puts another one there."""
    kind = (target.__name__ if isinstance(target, ModuleType) else type(target).__module__).partition(".")[0]

    def write(step: int, numbers: Numbers, units: Units) -> None:
        shown: Mapping[str, Any] = quantiles(units)
        if kind == "wandb":
            shown = {f"units/{name}": import_module("wandb").Histogram(list(norms)) for name, norms in units.items()}
        getattr(target, method)({**numbers, **shown}, step=step)

    return write


def quantiles(units: Units) -> dict[str, float]:
    """``units/fc1.weight/median`` and so on."""
    at = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    found = {name: torch.tensor(norms, dtype=torch.float64).quantile(at).tolist() for name, norms in units.items()}
    return {f"units/{name}/{which}": value for name, values in found.items() for which, value in zip(QUANTILES, values, strict=True)}


# ------------------------------------------------------------------------------------------------------------- files


class _Lines:
    """A file with a line a record, which is on the disk when the call returns."""

    def __init__(self, path: Path) -> None:
        files.check_file(path)
        self.path, self.last = path, -1
        self.lines()    # a file of another kind is refused now, not in the middle of the run

    def __call__(self, step: int, numbers: Numbers, units: Units) -> None:
        if self.last < 0 or step <= self.last:
            self.go_on_from(step)
        self.append({"step": step, **numbers, **quantiles(units)})
        self.last = step

    def go_on_from(self, step: int) -> None:
        """Takes away the records of later steps, which a run wrote after the checkpoint that it goes on from and will write again. Where
        none would stay, the file is another run's, and is kept under another name."""
        lines = self.lines()
        kept = [line for line, at in lines if at < step]
        size = 0 if files.what_is(self.path) == files.NOTHING else self.path.stat().st_size
        if size and not any(0 <= at < step for _, at in lines):
            number = next(n for n in range(1, 10**6) if files.what_is(self.beside(n)) == files.NOTHING)
            os.rename(self.path, self.beside(number))
            warnings.warn(f"{self.path} had the norms of another run, which are in {self.beside(number)} now.", stacklevel=2)
        elif sum(map(len, kept)) != size:
            files.replace(self.path, b"".join(kept))

    def beside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")

    def lines(self) -> list[tuple[bytes, int]]:
        """The lines of the file, without one that a kill has cut in half, each with its step; the head's is -1."""
        if files.what_is(self.path) == files.NOTHING:
            return []
        found = [line for line in files.content(self.path, MOST_BYTES, "a log of norms").splitlines(True) if line.endswith(b"\n")]
        try:
            return [(line, self.step_of(line, number)) for number, line in enumerate(found)]
        except (ValueError, KeyError, TypeError):
            raise PolicyError(f"{self.path} is no log of norms, and nothing was written to it: give another name.") from None

    def step_of(self, line: bytes, number: int) -> int:
        raise NotImplementedError

    def append(self, record: Numbers) -> None:
        raise NotImplementedError


class _JSONL(_Lines):
    """``{"step": 100, "norm/weight/total": 12.5}``; null for what is not finite, which JSON has no number for."""

    def step_of(self, line: bytes, number: int) -> int:
        return int(json.loads(line)["step"])

    def append(self, record: Numbers) -> None:
        with files.append_to(self.path) as file:
            file.write(json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}).encode() + b"\n")


class _CSV(_Lines):
    """A column a number; a cell is empty where there was none at that step."""

    def step_of(self, line: bytes, number: int) -> int:
        first = line.decode().partition(",")[0].strip()
        return int(first) if number else ("step",).index(first) - 1

    def go_on_from(self, step: int) -> None:
        super().go_on_from(step)
        self.columns: list[str] = next((next(csv.reader([line.decode()])) for line, _ in self.lines()[:1]), [])

    def append(self, record: Numbers) -> None:
        if fresh := [name for name in record if name not in self.columns]:
            self.columns += fresh
            files.replace(self.path, b"".join([_row(self.columns), *[line for line, _ in self.lines()[1:]]]))
        with files.append_to(self.path) as file:
            file.write(_row([record.get(name) for name in self.columns]))


def _row(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
