"""The axis for accuracies: the error on a logarithmic scale, labelled as accuracy.

Between 97% and 99% two thirds of the errors disappear; a linear axis that also holds the 10% of chance shows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

COARSE = (1.0, 2.0, 3.0, 5.0)
FINE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


@dataclass(frozen=True)
class ErrorScale:
    """Errors from ``best`` (> 0) to ``worst`` (<= 1); smaller errors are drawn at ``best``."""

    best: float
    worst: float

    def error(self, accuracy: float | None) -> float | None:
        """1 − accuracy, held within the scale; None stays None."""
        return None if accuracy is None else round(min(max(1 - accuracy, self.best), self.worst), 6)

    def share(self, accuracy: float) -> float:
        """Where ``accuracy`` lies, from 0 (``worst``) to 1 (``best``)."""
        error = min(max(1 - accuracy, self.best), self.worst)
        return math.log(self.worst / error) / math.log(self.worst / self.best)

    def around(self, accuracies: Iterable[float | None], times: float = 2.5) -> ErrorScale:
        """This scale, cut at so many times the errors of ``accuracies``: one failure must not flatten all the rest."""
        errors = [1 - accuracy for accuracy in accuracies if accuracy is not None] or [1.0]
        return ErrorScale(self.best, max(min(self.worst, times * max(errors)), self.best * 1.5))

    def ticks(self) -> list[float]:
        """Errors worth a label: 1, 2, 3, 5 in each decade, more of them on a short scale."""
        steps = COARSE if self.worst / self.best > 12 else FINE
        every = (digit * 10.0**power for power in range(-6, 1) for digit in steps)
        return [round(tick, 9) for tick in every if self.best <= tick <= self.worst]


def as_errors(rows: Sequence[dict[str, Any]], samples: Any) -> ErrorScale:
    """The scale that holds ``mean``, ``low`` and ``high`` of all rows, in which they are errors on it from now on."""
    keys = ("low", "mean", "high")
    scale = fit((row[key] for row in rows for key in keys), samples)
    for row in rows:
        row |= {key: scale.error(row[key]) for key in keys}
    return scale


def fit(accuracies: Iterable[float | None], samples: Any = None) -> ErrorScale:
    """The scale that holds ``accuracies``; no error is drawn below half of one in ``samples``."""
    floor = 0.5 / samples if isinstance(samples, int) and samples > 0 else 1e-3
    errors = [min(max(1 - accuracy, floor), 1.0) for accuracy in accuracies if accuracy is not None] or [0.1]
    return ErrorScale(best=max(min(errors) * 0.9, floor * 0.9), worst=min(max(errors) * 1.1, 1.0))
