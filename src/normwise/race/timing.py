"""What a step of each contender costs, measured interleaved in one process on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from normwise.race.run import Lane, RaceRun, lane
from normwise.study.pool import one_thread
from normwise.tasks.task import Task

BURST, WARM_UP = 4, 2


def step_times(runs: Sequence[RaceRun], task: Task, rounds: int) -> list[float]:
    """Milliseconds a step of each run: all take turns in bursts of four steps, so that a slow moment of the machine strikes all alike;
    medians over ``rounds`` bursts after two to warm up."""
    with one_thread():
        lanes = [lane(run, task, BURST * (rounds + WARM_UP)) for run in runs]
        bursts = [[_burst(each) for each in lanes] for _ in range(WARM_UP + rounds)]
    return [1e3 * statistics.median(column) for column in zip(*bursts[WARM_UP:], strict=True)]


def _burst(going: Lane) -> float:
    """Seconds a step; the first of the four finds the caches filled by another contender."""
    started = time.perf_counter()
    for _ in range(BURST):
        going.step()
    return (time.perf_counter() - started) / BURST
