"""What a rule adds to a training step, and what a matrix step costs: measured shares from docs/benchmarks.md, or counted from shapes."""

from __future__ import annotations

from collections.abc import Iterable

from normwise.parameters.inventory import Entry
from normwise.parameters.layouts import COLUMNS

SHARES = {"clip": (0.0, 0.9), "bound": (0.1, 1.2), "cap": (2.4, 16.0), "exact cap": (1.9, 58.7)}
"""Percent of a step: the lowest and the highest of `normwise bench control` on the residual CNN of 0.7M and both GPTs of 4.8M
(clip_grad_norm, max_norm), and of `normwise bench cap` (spectral_cap within 1%, and exact). A test compares them."""


def measured(kind: str) -> str:
    """The share of a training step that a rule of this kind took."""
    low, high = SHARES[kind]
    where = " on networks of 0.7M to 4.8M parameters, more on smaller ones" if kind in ("clip", "bound") else ""
    return f"{low:g} to {high:g}% of a step{where} (docs/benchmarks.md)."


def ridge(entries: Iterable[Entry]) -> str:
    """Of the ridge inverse of `auto`: 4m²n + m³ operations for each matrix, and how many positions of training that is worth."""
    operations, numbers = 0, 0
    for e in entries:
        count, columns = e.layout.size("se"), e.layout.size(COLUMNS)
        m, n = sorted((e.layout.size("ho"), columns))
        operations += count * (4 * m * m * n + m**3)
        numbers += e.param.numel()
    # Forward and backward take 6 operations for each weight and position (token, or pixel of a convolution's output).
    positions = operations / max(6 * numbers, 1)
    return f"{_short(operations)}FLOP a step, as much as training on {positions:,.0f} more tokens or pixels (counted from shapes)."


def size_of(numbers: float) -> str:
    """A number of parameters: 124M."""
    return _short(numbers).strip()


def count_of(number: int, thing: str) -> str:
    """3 tensors, 1 tensor."""
    return f"{number} {thing}{'s' * (number != 1)}"


def _short(value: float) -> str:
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.0f} "
