"""The cells of a study, strategy × optimizer, and the loop that tunes and then reports each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from normwise.experiments.compare import search
from normwise.experiments.compare.strategies import axes
from normwise.experiments.compare.trial import Run
from normwise.experiments.framework.pool import STOPPING, call, finished, still_running, working
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import Store

TUNING_SEED = 1000  # none of the seeds that are reported, so that no choice was made on their luck


@dataclass
class Cell:
    """One strategy with one optimizer: its trials by point of the search, its reported runs by seed."""

    strategy: str
    optimizer: str
    trials: dict[search.Point, dict[str, Any]] = field(default_factory=dict)
    finals: dict[int, dict[str, Any]] = field(default_factory=dict)
    under_way: int = 0

    @property
    def scores(self) -> dict[search.Point, tuple[float, ...]]:
        """Validation accuracy, then validation loss; a run that diverged comes after every run that did not."""
        return {point: _score(result) for point, result in self.trials.items()}

    def numbers(self, point: search.Point | None = None) -> dict[str, float]:
        """Learning rate and strengths at a point, by default the best one."""
        return search.values(axes(self.strategy, self.optimizer), search.best(self.scores) if point is None else point)


@dataclass(frozen=True)
class Job:
    """A run to be done for a cell: a trial at a point, or, where ``point`` is None, one to report."""

    cell: Cell
    run: Run
    point: search.Point | None


class Loop:
    """Tunes all cells with ``trials`` trials each, then trains the choice of each with every seed.

    make(cell, numbers, seed, full): the run for given numbers. A cell's next trial depends on its finished ones only, never
    on the order in which the cells' runs end, so that any number of workers, and any interruption, gives the same result.
    """

    def __init__(
        self, cells: list[Cell], make: Callable[[Cell, dict[str, float], int, bool], Run],
        trials: int, seeds: int, store: Store, progress: Progress,
    ) -> None:
        self.cells, self.make, self.trials, self.seeds = cells, make, trials, seeds
        self.store, self.progress = store, progress
        self.queue: deque[Job] = deque(job for cell in cells for job in self._due(cell))
        self.pending: dict[Future[dict[str, Any]], Job] = {}

    def run(self, workers: int, open_pool: Callable[[], AbstractContextManager[Executor]]) -> None:
        """Until every cell is done. On Ctrl-C the runs under way are finished and kept, then KeyboardInterrupt goes on."""
        if self.store.note:
            self.progress.note(self.store.note)
        self._take_kept()
        if not self.queue:
            return
        with open_pool() as executor, working(executor):
            try:
                self._work(executor, capacity=1 if workers == 1 else workers + 1)
            except KeyboardInterrupt:
                with suppress(BrokenExecutor):
                    self._finish_pending()
                raise

    def _work(self, executor: Executor, capacity: int) -> None:
        while self.queue or self.pending:
            while self.queue and len(self.pending) < capacity:
                job = self.queue.popleft()
                self.pending[executor.submit(call, job.run)] = job
            self._collect()
            self._take_kept()

    def _collect(self) -> None:
        for future in finished(self.pending):
            job, result = self.pending[future], future.result()
            self.store.add(job.run.settings(), result)
            del self.pending[future]
            self._finish(job, result)

    def _finish_pending(self) -> None:
        self.pending = {future: self.pending[future] for future in still_running(self.pending)}
        if self.pending:
            self.progress.note(STOPPING.format(len(self.pending)))
        while self.pending:
            self._collect()

    def _take_kept(self) -> None:
        """Finishes every queued job whose result an earlier study has kept."""
        fresh: deque[Job] = deque()
        while self.queue:
            job = self.queue.popleft()
            kept = self.store.get(job.run.settings(), job.run.form)
            if kept is None:
                fresh.append(job)
            else:
                self._finish(job, kept)
        self.queue = fresh

    def _finish(self, job: Job, result: dict[str, Any]) -> None:
        cell = job.cell
        if job.point is None:
            cell.finals[job.run.seed] = result
        else:
            cell.trials[job.point] = result
        cell.under_way -= 1
        self.progress.advance(f"{cell.strategy} with {cell.optimizer}: {100 * result['validation_accuracy']:.1f}%")
        self.queue.extend(self._due(cell))

    def _due(self, cell: Cell) -> list[Job]:
        if cell.under_way or cell.finals:
            return []
        points = search.propose(len(axes(cell.strategy, cell.optimizer)), self.trials, cell.scores)
        if points:
            jobs = [self._job(cell, cell.numbers(point), TUNING_SEED, point) for point in points]
        else:
            jobs = [self._job(cell, cell.numbers(), seed, None) for seed in range(self.seeds)]
        cell.under_way = len(jobs)
        return jobs

    def _job(self, cell: Cell, numbers: dict[str, float], seed: int, point: search.Point | None) -> Job:
        return Job(cell, self.make(cell, numbers, seed, point is None), point)


def _score(result: dict[str, Any]) -> tuple[float, ...]:
    loss = result["validation_loss"]
    return (0.0 if result["diverged"] else 1.0, result["validation_accuracy"], float("-inf") if loss is None else -loss)
