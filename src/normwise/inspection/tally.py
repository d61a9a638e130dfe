"""One look at every entry of a stored tensor: sums of squares, zeros, outliers, and what is not finite.

A tensor is read in blocks that the cache holds, by two threads that take turns: while one waits for the disk or copies, the other counts.
So no more than two blocks are in memory, whatever the tensor's size, and counting hides behind reading.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from normwise.inspection.checkpoint import widest
from normwise.inspection.threads import share_out
from normwise.norms import native

BLOCK_BYTES = 1 << 22
"""Of what is read at once: a processor's last cache holds it until it is counted, and Python's share of the time is small."""
THREADS_FROM = 1 << 22
"""Bytes of a tensor from which a second thread is worth starting."""
_LEAST_SQUARE = 2.0**-960
"""A sum of squares in float64 below which one of them may have been rounded to nothing, or to few digits."""
OUTLIER = 6.0
"""Times the RMS of its tensor, above which an entry is an outlier. The six of LLM.int8() (Dettmers et al., 2022), which counts activations
above the plain number 6; weights have no common scale, so that here it is relative."""


class Numbers(Protocol):
    """Entries that can be read in parts: those of a stored tensor, or what they are made of."""

    dtype: torch.dtype

    @property
    def count(self) -> int: ...

    def fetch(self, first: int, count: int, into: Tensor | None = None) -> Tensor: ...


@dataclass
class Tally:
    """Of one tensor. Norms are those of the finite entries."""

    rows: Tensor
    """The L2 norm of each row, ``(count / n,)``, float64."""
    columns: Tensor | None
    """The L2 norm of each column, ``(n,)``, float64, where they were asked for."""
    l2: float
    zeros: int
    nonfinite: int
    outliers: int


def tally(numbers: Numbers, n: int, columns: bool = False) -> Tally:
    """Looks at every entry once; at those of a block with an outlier again.

    Args:
        numbers: the tensor.
        n: how long its rows are.
        columns: whether the columns' squares are summed, too.
    """
    counting = _Counting(numbers, n, columns)
    share_out(counting.look_at, counting.blocks, numbers.count * numbers.dtype.itemsize >= THREADS_FROM)
    total = float(counting.rows.sum())
    if numbers.dtype == torch.float64 and numbers.count and not _squares_hold(counting, total):
        rows, across, l2 = _by_their_largest(counting)
    else:
        rows, across, l2 = counting.rows.sqrt(), None if counting.columns is None else counting.columns.sqrt(), math.sqrt(total)
    finite = max(numbers.count - counting.nonfinite, 1)
    limit = OUTLIER * (math.sqrt(total / finite) if 0 < total < math.inf else l2 / math.sqrt(finite))
    outliers = 0
    for block in (counting.tops > limit).any(1).nonzero().flatten().tolist():
        x = counting.fetch(block)
        outliers += int(((x.abs() > limit) & x.isfinite()).sum())
    return Tally(rows, across, l2, counting.zeros, counting.nonfinite, outliers)


def _squares_hold(counting: _Counting, total: float) -> bool:
    """Whether no sum of squares left float64's range: none is infinite, and none so small that its square may have been lost."""
    sums = counting.rows if counting.columns is None else torch.cat([counting.rows, counting.columns])
    return math.isfinite(total) and (float(sums.min()) > _LEAST_SQUARE or counting.zeros == counting.numbers.count)


def _by_their_largest(counting: _Counting) -> tuple[Tensor, Tensor | None, float]:
    """Norms of rows, of columns and of all entries, each from the quotients with its largest entry: for numbers whose squares float64 does
    not have. It reads everything again, as next to no tensor needs it."""
    rows = _Lengths(len(counting.rows))
    columns = None if counting.columns is None else _Lengths(counting.n)
    for block in range(counting.blocks):
        x = counting.fetch(block)
        x, place = torch.where(x.isfinite(), x, 0).abs(), torch.arange(len(x)) + block * counting.size
        rows.add(x, place // counting.n)
        if columns is not None:
            columns.add(x, place % counting.n)
    whole, norms = _Lengths(1), rows.norms()
    whole.add(norms, torch.zeros(len(norms), dtype=torch.long))
    l2 = float(whole.norms()) if bool(norms.isfinite().all()) else math.inf
    return norms, None if columns is None else columns.norms(), l2


class _Lengths:
    """L2 norms that grow, as a largest entry and the sum of the squares of quotients with it."""

    def __init__(self, count: int) -> None:
        self.largest, self.sums = torch.zeros(2, count, dtype=torch.float64)

    def add(self, x: Tensor, place: Tensor) -> None:
        """x: not negative. place: of which norm each one is."""
        largest = self.largest.scatter_reduce(0, place, x, "amax")
        divisor = torch.where(largest > 0, largest, 1)
        self.sums.mul_((self.largest / divisor).square()).index_add_(0, place, (x / divisor[place]).square())
        self.largest = largest

    def norms(self) -> Tensor:
        return self.largest * self.sums.sqrt()


def not_finite(numbers: Numbers, n: int, columns: bool) -> Tensor:
    """Which rows of length n, or which columns, have an entry that is not finite, as booleans."""
    counting = _Counting(numbers, n, columns)
    found = torch.zeros(counting.n if columns else len(counting.rows), dtype=torch.bool)
    for block in range(counting.blocks):
        at = (~counting.fetch(block).to(widest(numbers.dtype)).isfinite()).nonzero().flatten() + block * counting.size
        found[at % counting.n if columns else at // counting.n] = True
    return found


class _Counting:
    """The sums of one tensor while they grow. ``size`` is that of a block, in entries."""

    def __init__(self, numbers: Numbers, n: int, columns: bool) -> None:
        self.numbers, self.n = numbers, max(n, 1)
        size = BLOCK_BYTES // numbers.dtype.itemsize
        # Columns are summed over whole rows: as many as a block holds, one at least.
        self.size = max(size // self.n, 1) * self.n if columns else size
        self.blocks = -(-numbers.count // self.size)
        self.stretches = -(-self.size // native.STRETCH)
        self.rows = torch.zeros(-(-numbers.count // self.n), dtype=torch.float64)
        self.columns = torch.zeros(self.n, dtype=torch.float64) if columns else None
        self.tops = torch.zeros(self.blocks, self.stretches)
        self.zeros = self.nonfinite = 0
        self._lock, self._own = threading.Lock(), threading.local()

    def fetch(self, block: int) -> Tensor:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = torch.empty(self.size * self.numbers.dtype.itemsize, dtype=torch.uint8)
        first = block * self.size
        return self.numbers.fetch(first, min(self.size, self.numbers.count - first), self._own.buffer)

    def look_at(self, block: int) -> None:
        x, first = self.fetch(block), block * self.size
        start, stop = first // self.n, (first + len(x) - 1) // self.n + 1
        rows = torch.zeros(stop - start, dtype=torch.float64)
        counts = native.tally(x, first, self.n, rows, self.tops[block])
        if counts is None:
            counts = _by_torch(x, first, self.n, rows, self.tops[block])
        columns = None if self.columns is None else _squares_of_columns(x.view(-1, self.n), counts[1])
        with self._lock:
            self.rows[start:stop] += rows
            self.zeros += counts[0]
            self.nonfinite += counts[1]
            if columns is not None:
                self.columns += columns    # type: ignore[operator]


def _by_torch(x: Tensor, first: int, n: int, rows: Tensor, tops: Tensor) -> tuple[int, int]:
    """As ``native.tally``, of any dtype."""
    x = x.to(widest(x.dtype))
    finite = x.isfinite()
    size = torch.where(finite, x, 0).abs()
    place = (torch.arange(len(x)) + first) // n - first // n
    rows.index_add_(0, place, size.double().square())
    for k, stretch in enumerate(torch.split(size, native.STRETCH)):
        tops[k] = stretch.amax()
    return int((x == 0).sum()), len(x) - int(finite.sum())


def _squares_of_columns(x: Tensor, nonfinite: int) -> Tensor:
    wide = x.to(widest(x.dtype))
    wide = torch.where(wide.isfinite(), wide, 0) if nonfinite else wide
    value = native.norms([wide], (wide.shape[0], wide.shape[1], 1))
    return wide.double().square().sum(0) if value is None else value.square()
