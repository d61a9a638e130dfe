"""Runs plans side by side on several workers, each run kept as it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from normwise.errors import StudyError
from normwise.race.plans import Plan, Result
from normwise.race.run import RaceRun
from normwise.study.pool import call
from normwise.study.progress import Progress
from normwise.study.store import Store


@dataclass(eq=False)
class _Going:
    """A plan with the runs that it waits for."""

    name: str
    plan: Plan
    runs: list[RaceRun] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)


class Driver:
    """Drives plans until all have returned. open_pool: the workers; capacity: how many runs are handed out at once.

    Progress is told in samples, those of runs that were kept from before included; how many lie ahead depends on what comes out.
    """

    def __init__(
        self, store: Store, progress: Progress, open_pool: Callable[[], AbstractContextManager[Executor]], capacity: int
    ) -> None:
        self.store, self.progress, self.open_pool, self.capacity = store, progress, open_pool, capacity
        self.queue: deque[tuple[_Going, int]] = deque()
        self.pending: dict[Future[Result], tuple[_Going, int]] = {}
        self.stack = ExitStack()
        self.executor: Executor | None = None
        self.found: dict[str, Any] = {}
        self.seen: set[RaceRun] = set()

    def run(self, plans: Mapping[str, Plan]) -> dict[str, Any]:
        """What each plan returned. On Ctrl-C the runs under way are finished and kept, then KeyboardInterrupt goes on."""
        self.found = {}
        for name, plan in plans.items():
            self._advance(_Going(name, plan), None)
        if self.queue:
            self._work(self._workers())
        return self.found

    def close(self) -> None:
        """The workers' end."""
        self.stack.close()

    def _workers(self) -> Executor:
        """Opened with the first run that is not kept, and for all plans: a process takes seconds to start."""
        if self.executor is None:
            self.executor = self.stack.enter_context(self.open_pool())
        return self.executor

    def _work(self, executor: Executor) -> None:
        try:
            while self.queue or self.pending:
                while self.queue and len(self.pending) < self.capacity:
                    going, k = self.queue.popleft()
                    self.pending[executor.submit(call, going.runs[k])] = going, k
                self._collect()
        except KeyboardInterrupt:
            self._finish_pending()
            raise
        except BrokenProcessPool:
            raise StudyError(
                "A worker process was killed from outside, perhaps for want of memory; finished runs are kept. "
                "Start the same command again, with a smaller --workers if it is memory."
            ) from None

    def _collect(self) -> None:
        done, _ = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in done:
            (going, k), result = self.pending[future], future.result()
            self.store.add(going.runs[k].settings(), result)
            del self.pending[future]
            self.seen.add(going.runs[k])
            self.progress.advance(f"{sum(run.samples for run in self.seen)} samples in all; {_said(going.runs[k], result)}")
            self._take(going, k, result)

    def _finish_pending(self) -> None:
        self.queue.clear()
        self.pending = {future: job for future, job in self.pending.items() if not future.cancel()}
        if self.pending:
            self.progress.note(f"Stopping: the {len(self.pending)} runs under way are finished and kept.")
        while self.pending:
            self._collect()

    def _take(self, going: _Going, k: int, result: Result) -> None:
        going.results[k] = result
        if len(going.results) == len(going.runs):
            self._advance(going, [going.results[i] for i in range(len(going.runs))])

    def _advance(self, going: _Going, results: list[Result] | None) -> None:
        """Sends results to the plan until it asks for a run that is not kept."""
        try:
            while True:
                going.runs, going.results = (next(going.plan) if results is None else going.plan.send(results)), {}
                for k, run in enumerate(going.runs):
                    kept = self.store.get(run.settings())
                    if kept is not None:
                        self.seen.add(run)
                        going.results[k] = kept
                waiting = [k for k in range(len(going.runs)) if k not in going.results]
                if waiting:
                    self.queue.extend((going, k) for k in waiting)
                    return
                results = [going.results[k] for k in range(len(going.runs))]
        except StopIteration as stop:
            self.found[going.name] = stop.value


def _said(run: RaceRun, result: Result) -> str:
    value = result["result"]
    return f"{run.contender} {run.samples} samples, seed {run.seed}: {'diverged' if value is None else f'{value:.4f}'}"



class Replay(Driver):
    """Looks at kept runs only: a plan that needs another one stays without a result."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, Progress(), _nowhere, 0)

    def run(self, plans: Mapping[str, Plan]) -> dict[str, Any]:
        self.found, self.queue = {}, deque()
        for name, plan in plans.items():
            self._advance(_Going(name, plan), None)
        return self.found


def _nowhere() -> AbstractContextManager[Executor]:
    raise RuntimeError("a replay trains nothing")
