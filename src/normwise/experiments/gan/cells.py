"""The cells of the GAN study, strategy × loss: tuned with equal trials, the best of them once more, the choice then reported."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from normwise.experiments.compare import search
from normwise.experiments.compare.cells import TUNING_SEED, Cell, Job, Loop
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import Store
from normwise.experiments.gan.strategies import axes
from normwise.experiments.gan.trial import Run

AGAIN_SEED = TUNING_SEED + 1
Result = dict[str, Any]


@dataclass
class GanCell(Cell):
    """``trials`` holds a point's results by seed; ``optimizer`` is the loss."""

    @property
    def loss(self) -> str:
        return self.optimizer

    @property
    def scores(self) -> dict[search.Point, tuple[float, ...]]:
        """Of the first tuning seed, which every point was tried with."""
        return {point: score([by_seed[str(TUNING_SEED)]]) for point, by_seed in self.trials.items()}

    def again(self, count: int) -> list[search.Point]:
        """The best points of the first seed, the ``count`` of them that a second one decides between."""
        scores = self.scores
        return sorted(sorted(scores), key=lambda point: scores[point], reverse=True)[:count]

    @property
    def choice(self) -> search.Point:
        """The best mean over the seeds among the points that saw the most seeds."""
        most = max(map(len, self.trials.values()))
        return search.best({point: score(list(by.values())) for point, by in self.trials.items() if len(by) == most})

    def numbers(self, point: search.Point | None = None) -> dict[str, float]:
        """Learning rate and strengths at a point, by default the chosen one."""
        return search.values(axes(self.strategy), self.choice if point is None else point)


def score(results: Sequence[Result]) -> tuple[float, ...]:
    """Higher is better: the share of runs that did not diverge, then minus their mean distance."""
    distances = [result["distance"] for result in results if not result["diverged"]]
    return len(distances) / len(results), -statistics.fmean(distances) if distances else float("-inf")


Make = Callable[[Cell, dict[str, float], int, bool], Run]


class GanLoop(Loop):
    """Every cell: ``trials`` points with one tuning seed, the ``again`` best of them with another, then the choice with ``seeds`` others.

    Runs, keeps, stops and goes on as the loop of ``compare`` does.
    """

    def __init__(
        self, cells: Sequence[GanCell], make: Make, trials: int, again: int, seeds: int, store: Store, progress: Progress
    ) -> None:
        self.again = again
        super().__init__(list(cells), cast(Any, make), trials, seeds, store, progress)

    def _finish(self, job: Job, result: Result) -> None:
        cell, run = job.cell, job.run
        if job.point is None:
            cell.finals[run.seed] = result
        else:
            cell.trials.setdefault(job.point, {})[str(run.seed)] = result
        cell.under_way -= 1
        found = "diverged" if result["diverged"] else f"distance {result['distance']:.3f}"
        self.progress.advance(f"{cell.strategy} with the loss {cell.optimizer}: {found}")
        self.queue.extend(self._due(cell))

    def _due(self, cell: Cell) -> list[Job]:
        assert isinstance(cell, GanCell)
        if cell.under_way or cell.finals:
            return []
        jobs = self._first(cell) or self._second(cell) or [self._job(cell, cell.numbers(), seed, None) for seed in range(self.seeds)]
        cell.under_way = len(jobs)
        return jobs

    def _first(self, cell: GanCell) -> list[Job]:
        points = search.propose(len(axes(cell.strategy)), self.trials, cell.scores)
        return [self._job(cell, cell.numbers(point), TUNING_SEED, point) for point in points]

    def _second(self, cell: GanCell) -> list[Job]:
        points = [point for point in cell.again(self.again) if str(AGAIN_SEED) not in cell.trials[point]]
        return [self._job(cell, cell.numbers(point), AGAIN_SEED, point) for point in points]
