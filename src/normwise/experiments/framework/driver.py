"""Plans and what drives them.

A *plan* is a generator: it yields the runs that it needs next, receives their results in the same order, and returns what it found. What it
asks for depends on results alone, so that neither an interruption, nor the number of workers, nor where they are changes anything. A
*driver* runs any number of plans side by side on an executor, and keeps each result as it comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from normwise.experiments.framework.elsewhere import Elsewhere, opened
from normwise.experiments.framework.pool import STOPPING, call, finished, open_pool, working
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import NUMBER, Form, Result, Run, Store, key_of

# Yields runs, gets their results, returns what it found.
Plan: TypeAlias = "Generator[list[Any], list[Result], Any]"


@dataclass(eq=False)
class _Going:
    """A plan with the runs that it waits for."""

    name: str
    plan: Plan
    runs: list[Run] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    begun: bool = False

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.runs)


class Driver:
    """Drives plans until all have returned.

    Args:
        store: what was finished before is taken from here; what is finished now is kept here.
        progress: is told of every run. Where a study knows how many there will be (``total``), kept ones are counted too.
        workers: processes on this machine; 1 trains in this one.
        executor: in their place, see ``elsewhere.opened``.
    """

    def __init__(self, store: Store, progress: Progress, workers: int = 1, executor: Executor | str | None = None) -> None:
        self.store, self.progress, self.workers, self.elsewhere = store, progress, workers, executor
        self.total: int | None = None
        self.context: Any = None
        self.setup: Callable[[], Any] = dict
        self.queue: deque[tuple[_Going, int]] = deque()
        self.pending: dict[Future[Result], tuple[_Going, int]] = {}
        self.stack = ExitStack()
        self.executor: Executor | None = None
        self.found: dict[str, Any] = {}
        self.seen: dict[str, int] = {}

    def on(self, context: Any, setup: Callable[[], Any]) -> None:
        """What runs are trained on: ``context`` in this process; any other one makes its own by ``setup``, which is pickled."""
        self.context, self.setup = context, setup

    def start(self, total: int | None) -> None:
        """Progress from here on: of so many runs, or of a number that depends on what comes out."""
        self.total = total
        self.progress.start(total)

    def run(self, plans: Mapping[str, Plan]) -> dict[str, Any]:
        """What each plan returned. On Ctrl-C the runs under way are finished and kept, then KeyboardInterrupt goes on."""
        self.found = {}
        for name, plan in plans.items():
            self._advance(_Going(name, plan))
        if self.queue:
            self._work()
        return self.found

    def measured(self, settings: Mapping[str, Any], form: Form, measure: Callable[[], Result], note: str) -> Result | None:
        """What was kept under ``settings``, or measured now, in this process: times are comparable only on one machine, in turns."""
        kept = self.store.get(settings, form)
        if kept is None:
            self.progress.note(note)
            kept = measure()
            self.store.add(settings, kept)
        return kept

    def timed(
        self, runs: Sequence[Run], rounds: int, measure: Callable[[], list[Any]], note: str, name: str = "step_ms", each: Form = NUMBER
    ) -> list[Any]:
        """What steps of these runs cost, as ``measured``; nothing where a replay has no measurement. each: the form of one cost."""
        settings = {"kind": f"{runs[0].kind} timing", "rounds": rounds, "runs": [run.settings() for run in runs]} if runs else {}
        kept = self.measured(settings, {name: [each] * len(runs)}, lambda: {name: measure()}, note) if runs else None
        return kept[name] if kept else []

    def close(self) -> None:
        """The workers' end."""
        self.stack.close()

    # ----------------------------------------------------------------------------------------------------- the loop

    def _work(self) -> None:
        if self.executor is None:    # with the first run that is not kept, and for all plans: a process takes seconds to start
            workers = opened(self.elsewhere, self.setup) if self.elsewhere else open_pool(self.workers, self.setup, self.context)
            self.executor = self.stack.enter_context(workers)
        with working(self.executor):
            try:
                self._hand_out(self.executor)
            except KeyboardInterrupt:
                # Those that no worker has begun are cancelled; the others are finished and kept.
                self.queue.clear()
                self.pending = {future: one for future, one in self.pending.items() if not future.cancel()}
                if self.pending:
                    self.progress.note(STOPPING.format(len(self.pending)))
                with suppress(BrokenExecutor):
                    self._collect()
                raise

    def _hand_out(self, executor: Executor) -> None:
        while self.queue or self.pending:
            # One run more than there are workers, so that none waits for this process, and few enough for Ctrl-C to be quick.
            slots = executor.slots() if isinstance(executor, Elsewhere) else self.workers
            capacity = 1 if self.workers == 1 and not self.elsewhere else slots + 1
            while self.queue and len(self.pending) < capacity:
                going, k = self.queue.popleft()
                self.pending[executor.submit(call, going.runs[k])] = going, k
            self._collect_some()

    def _collect(self) -> None:
        while self.pending:
            self._collect_some()

    def _collect_some(self) -> None:
        for future in finished(self.pending):
            (going, k), result = self.pending[future], future.result()
            self.store.add(going.runs[k].settings(), result)
            del self.pending[future]
            self._tell(going.runs[k], result)
            going.results[k] = result
            if going.complete:
                self._advance(going)

    def _advance(self, going: _Going) -> None:
        """Sends results to the plan until it asks for a run that is not kept."""
        while going.complete:
            told = [going.results[k] for k in range(len(going.runs))] if going.begun else None
            try:
                going.runs, going.results, going.begun = going.plan.send(told), {}, True    # type: ignore[arg-type]
            except StopIteration as stop:
                self.found[going.name] = stop.value
                return
            for k, run in enumerate(going.runs):
                if (kept := self.store.get(run.settings(), run.form)) is not None:
                    going.results[k] = kept
                    self._tell(run, kept, fresh=False)
        self.queue.extend((going, k) for k in range(len(going.runs)) if k not in going.results)

    def _tell(self, run: Run, result: Result, fresh: bool = True) -> None:
        self.seen[key_of(run.settings())] = run.amount
        if fresh or self.total is not None:
            self.progress.advance(f"{sum(self.seen.values())} {run.unit} in all; {run.told(result)}")


class Replay(Driver):
    """Looks at kept runs only: a plan that needs another one stays without a result, a time that was not measured is None."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, Progress())

    def measured(self, settings: Mapping[str, Any], form: Form, measure: Callable[[], Result], note: str) -> Result | None:
        return self.store.get(settings, form)

    def _work(self) -> None:
        self.queue.clear()
