"""How an expectation states which matrices a tensor holds: a pattern over its dimensions, independent of `normwise.Layout`.

``"o i"`` is a Linear, ``"i o"`` is GPT-2's ``Conv1D``. A dimension in brackets is split: ``"(s o) i"`` are s matrices one after another,
``"(h s o) i"`` are s matrices whose rows come in turns, head by head. ``s`` and ``e`` tell matrices apart, ``o`` and ``h`` are rows,
``i`` and ``k`` columns. ``m`` stands for
parts of unequal sizes, ``sizes["m"] = (4, 1, 1)``, each of which is a matrix: queries, keys and values, unless ``sizes["parts"]`` names
them otherwise.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MATRICES, ROWS, COLUMNS = "sem", "oh", "ik"
Sizes = Mapping[str, Any]


def matrices(shape: Sequence[int], pattern: str, sizes: Sizes) -> list[np.ndarray]:
    """The matrices of a tensor of ``shape`` as arrays (rows, columns) of flat indices.

    >>> [m.tolist() for m in matrices((4, 1), "(s o) i", {"s": 2})]
    [[[0], [1]], [[2], [3]]]
    """
    sizes = {"m": (1, 1, 1), **sizes}
    dimensions = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", pattern)]
    if len(dimensions) != len(shape):
        raise ValueError(f"{pattern!r} has {len(dimensions)} dimensions, the tensor {tuple(shape)} has {len(shape)}")
    letters = [letter for dimension in dimensions for letter in dimension]
    opened = [n for dimension, size in zip(dimensions, shape, strict=True) for n in _split(dimension, size, sizes, pattern)]
    index = np.arange(int(np.prod(shape))).reshape(opened)
    first = [axis for axis, letter in enumerate(letters) if letter in MATRICES]
    rows = [axis for axis, letter in enumerate(letters) if letter in ROWS]
    columns = [axis for axis, letter in enumerate(letters) if letter in COLUMNS]
    if len(first) + len(rows) + len(columns) != len(letters):
        raise ValueError(f"{pattern!r} has a letter that is none of {MATRICES + ROWS + COLUMNS!r}")
    found = []
    for chosen in itertools.product(*(_parts(letters[axis], opened[axis], sizes) for axis in first)):
        picked = index
        for axis, part in zip(first, chosen, strict=True):
            picked = picked.take(range(*part), axis)
        kept = [axis for axis in first if picked.shape[axis] > 1]  # a part of several heads: they are rows
        picked = picked.transpose([*[a for a in first if a not in kept], *sorted([*kept, *rows]), *columns])
        found.append(picked.reshape(-1, int(np.prod([opened[axis] for axis in columns], dtype=int))))
    return found


def _split(dimension: list[str], size: int, sizes: Sizes, pattern: str) -> list[int]:
    known = [_length(sizes[letter]) if letter in sizes and len(dimension) > 1 else None for letter in dimension]
    open_ = known.count(None)
    stated = int(np.prod([n for n in known if n is not None], dtype=int))
    if open_ > 1 or size % stated or (open_ == 0 and stated != size):
        raise ValueError(f"{dimension} of {pattern!r} do not split {size}: {sizes}")
    return [size // stated if n is None else n for n in known]


def _length(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else sum(size)


def _parts(letter: str, length: int, sizes: Sizes) -> list[tuple[int, int]]:
    lengths = sizes[letter] if letter == "m" else (1,) * length
    ends = list(itertools.accumulate(lengths))
    return [(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def canonical(found: Sequence[np.ndarray]) -> list[list[list[int]]]:
    """The same matrices in one order, whatever the order of matrices, of rows and within a row: two statements compare by ``==``."""
    ordered = []
    for matrix in found:
        rows = np.sort(np.asarray(matrix), axis=1)
        ordered.append(rows[np.argsort(rows[:, 0])].tolist())
    return sorted(ordered)
