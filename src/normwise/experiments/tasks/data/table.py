"""Tables for a study: rows of numbers and their classes, in three disjoint parts."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normwise.errors import DataError, need
from normwise.experiments.tasks.data.readers import read_one
from normwise.experiments.tasks.data.splits import stratified

__all__ = ["TableData", "load_table"]

_SHARE = 0.2    # of all rows: the validation part, and the test part
_LEAST_PER_CLASS = 5
Rows = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class TableData:
    """name: of the source. parts: by name the columns ``(n, columns)``, fp32, each standardised by its mean and deviation in the training
    part, and the classes ``(n,)`` from 0. classes: how many. key: a fingerprint of all numbers and their places."""

    name: str
    parts: dict[str, Rows]
    classes: int
    key: str

    @classmethod
    def of(cls, name: str, columns: NDArray[np.float64], labels: NDArray[np.int64], seed: int = 0) -> TableData:
        """Three fifths of the rows to train on, a fifth each for validation and test, every class in proportion; the seed decides which.
        DataError where a class has fewer than five rows, or there is only one."""
        counts = np.bincount(labels)
        if len(counts) < 2 or counts.min() < _LEAST_PER_CLASS:
            raise DataError(
                f"{name}: expected two or more classes with at least {_LEAST_PER_CLASS} rows each, found {len(counts)} with "
                f"{counts.min()} of the rarest."
            )
        rng, size = np.random.default_rng(seed), round(len(labels) * _SHARE)
        test, rest = stratified(labels, np.arange(len(labels)), size, rng)
        validation, train = stratified(labels, rest, size, rng)
        mean, deviation = columns[train].mean(0), columns[train].std(0)
        scaled = ((columns - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
        parts = {part: (scaled[rows], labels[rows]) for part, rows in (("train", train), ("validation", validation), ("test", test))}
        digest = hashlib.sha256(repr(scaled.shape).encode())
        for values, classes in parts.values():
            digest.update(values.tobytes() + classes.tobytes())
        return cls(name, parts, len(counts), digest.hexdigest()[:16])


def load_table(source: str | Path | None = None) -> TableData:
    """A table in three parts.

    source: a CSV file, or a folder with exactly one ``*.csv``: a line of names, then numbers, the class in the last column; or None for
    the breast cancer table that scikit-learn carries (569 real rows of 30 numbers, two classes).

    Raises DataError, in one sentence, for a source that cannot be read as that.
    """
    if source is None:
        need("study", "sklearn", what="the breast cancer table")
        from sklearn.datasets import load_breast_cancer

        columns, labels = load_breast_cancer(return_X_y=True)
        return TableData.of("breast cancer", columns, labels.astype(np.int64))
    path, text = read_one(source, ".csv", "CSV")
    lines = list(csv.reader(text.splitlines()))
    numbers = [_numbers(path, place, line, len(lines[0])) for place, line in enumerate(lines[1:], 2) if line]
    if not numbers or len(lines[0]) < 2:
        wide = len(lines[0]) if lines else 0
        raise DataError(f"{path}: expected a line of names and rows of two numbers or more, found {len(numbers)} rows of {wide}.")
    table = np.asarray(numbers)
    _, labels = np.unique(table[:, -1], return_inverse=True)
    return TableData.of(path.name, table[:, :-1], labels.astype(np.int64))


def _numbers(path: Path, place: int, line: list[str], columns: int) -> list[float]:
    if len(line) != columns:
        raise DataError(f"{path}: line {place} has {len(line)} columns, expected {columns} as in the line of names.")
    try:
        found = [float(cell) for cell in line]
    except ValueError as error:
        raise DataError(f"{path}: line {place}: {error}; expected numbers only.") from None
    if not np.isfinite(found).all():
        raise DataError(f"{path}: line {place} has a number that is not finite; leave out such rows, or fill them.")
    return found
