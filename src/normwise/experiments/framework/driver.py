"""Runs plans side by side on several workers, each run kept as it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from normwise.experiments.framework.pool import STOPPING, call, finished, still_running, working
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import Store
from normwise.experiments.race.plans import Plan, Result
from normwise.experiments.race.run import RaceRun


@dataclass(eq=False)
class _Going:
    """A plan with the runs that it waits for."""

    name: str
    plan: Plan
    runs: list[RaceRun] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    begun: bool = False

    @property
    def complete(self) -> bool:
        """Whether no run is waited for."""
        return len(self.results) == len(self.runs)

    def next(self) -> None:
        """Tells the plan the results and asks for its next runs; StopIteration with what it found."""
        told = [self.results[k] for k in range(len(self.runs))] if self.begun else None
        self.runs, self.results, self.begun = self.plan.send(told), {}, True    # type: ignore[arg-type]


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
            self._advance(_Going(name, plan))
        if self.queue:
            self._work()
        return self.found

    def close(self) -> None:
        """The workers' end."""
        self.stack.close()

    def _workers(self) -> Executor:
        """Opened with the first run that is not kept, and for all plans: a process takes seconds to start."""
        if self.executor is None:
            self.executor = self.stack.enter_context(self.open_pool())
        return self.executor

    def _work(self) -> None:
        executor = self._workers()
        with working(executor):
            try:
                while self.queue or self.pending:
                    self._hand_out(executor)
                    self._collect()
            except KeyboardInterrupt:
                with suppress(BrokenExecutor):
                    self._finish_pending()
                raise

    def _hand_out(self, executor: Executor) -> None:
        while self.queue and len(self.pending) < self.capacity:
            going, k = self.queue.popleft()
            self.pending[executor.submit(call, going.runs[k])] = going, k

    def _collect(self) -> None:
        for future in finished(self.pending):
            (going, k), result = self.pending[future], future.result()
            self.store.add(going.runs[k].settings(), result)
            del self.pending[future]
            self.seen.add(going.runs[k])
            self.progress.advance(f"{sum(run.samples for run in self.seen)} samples in all; {_said(going.runs[k], result)}")
            self._take(going, k, result)

    def _finish_pending(self) -> None:
        self.queue.clear()
        self.pending = {future: self.pending[future] for future in still_running(self.pending)}
        if self.pending:
            self.progress.note(STOPPING.format(len(self.pending)))
        while self.pending:
            self._collect()

    def _take(self, going: _Going, k: int, result: Result) -> None:
        going.results[k] = result
        if going.complete:
            self._advance(going)

    def _advance(self, going: _Going) -> None:
        """Sends results to the plan until it asks for a run that is not kept."""
        try:
            while going.complete:
                going.next()
                self._take_kept(going)
        except StopIteration as stop:
            self.found[going.name] = stop.value
            return
        self.queue.extend((going, k) for k in range(len(going.runs)) if k not in going.results)

    def _take_kept(self, going: _Going) -> None:
        for k, run in enumerate(going.runs):
            kept = self.store.get(run.settings(), run.form)
            if kept is not None:
                self.seen.add(run)
                going.results[k] = kept


def _said(run: RaceRun, result: Result) -> str:
    value = result["result"]
    return f"{run.contender} {run.samples} samples, seed {run.seed}: {'diverged' if value is None else f'{value:.4f}'}"


class Replay(Driver):
    """Looks at kept runs only: a plan that needs another one stays without a result."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, Progress(), _nowhere, 0)

    def _work(self) -> None:
        self.queue.clear()


def _nowhere() -> AbstractContextManager[Executor]:
    raise RuntimeError("a replay trains nothing")
