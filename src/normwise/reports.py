"""What every report shares: it prints as a table, and ``flat()`` is one dict of numbers for a logger."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar


class Loggable(ABC):
    """A report: ``print(report)`` shows it, ``logger.log(report.flat())`` keeps its numbers."""

    prefix: ClassVar[str] = ""

    @abstractmethod
    def numbers(self) -> Mapping[str, float]:
        """The report's numbers by name, without the prefix."""

    def flat(self, prefix: str | None = None) -> dict[str, float]:
        """The numbers as floats under ``prefix``; default the report's own, such as ``norm/``."""
        lead = self.prefix if prefix is None else prefix
        return {f"{lead}{name}": float(value) for name, value in self.numbers().items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Lines of aligned columns, two spaces apart; those in ``right`` are set to the right, as numbers are."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def finite(value: Any) -> Any:
    """Plain data without what JSON does not know: a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unique(labels: Iterable[str]) -> list[str]:
    """Labels as keys of a dict: the second of two equal ones gets `` (2)``."""
    seen: dict[str, int] = {}
    keys = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        keys.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return keys
