"""What a step costs under each strategy, measured interleaved: all strategies of an optimizer take turns in one process."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from normwise.experiments.compare.trial import Run, Training, batches, prepare
from normwise.experiments.framework.timing import in_turn, seconds_each
from normwise.experiments.tasks.data.splits import ImageData

_BURST = 5


def measure(runs: Sequence[Run], data: ImageData, rounds: int) -> list[dict[str, float]]:
    """``step_ms`` and ``control_share`` of each run: medians over ``rounds`` rounds.

    In a round every run has a burst of five steps in turn. The control's share is the time within its hooks over the time of the steps.
    """
    lanes = [_Lane(run, data) for run in runs]
    return [_medians(kept) for kept in in_turn([lane.burst for lane in lanes], rounds)]


class _Lane:
    def __init__(self, run: Run, data: ImageData) -> None:
        self.training: Training = prepare(run, data, timed=True)
        self.rows: itertools.cycle[Tensor] = itertools.cycle(batches(run, len(data.train)))

    def burst(self) -> tuple[float, float]:
        """Seconds a step, and the control's share of them."""
        before = self._in_control()
        step = seconds_each(self.training.step, itertools.islice(self.rows, _BURST))
        return step, (self._in_control() - before) / (step * _BURST)

    def _in_control(self) -> float:
        return self.training.control.seconds if self.training.control is not None else 0.0


def _medians(kept: Sequence[tuple[float, float]]) -> dict[str, float]:
    steps, shares = zip(*kept, strict=True)
    return {"step_ms": 1e3 * statistics.median(steps), "control_share": statistics.median(shares)}


def as_plain(runs: Sequence[Run], rounds: int) -> dict[str, Any]:
    """The settings of one measurement, for the file of finished runs."""
    return {"kind": "timing", "rounds": rounds, "runs": [run.settings() for run in runs]}
