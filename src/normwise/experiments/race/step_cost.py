"""What a step of each contender costs, measured interleaved in one process on one thread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from normwise.experiments.framework.timing import WARM_UP, in_turn, seconds_each
from normwise.experiments.race.run import Lane, RaceRun, lane
from normwise.experiments.tasks.task import Task

BURST = 4


def step_times(runs: Sequence[RaceRun], task: Task, rounds: int) -> list[float]:
    """Milliseconds a step of each run: all take turns in bursts of four steps; medians over ``rounds`` bursts after two to warm up."""
    bursts = [_burst(lane(run, task, BURST * (rounds + WARM_UP))) for run in runs]
    return [1e3 * statistics.median(seconds) for seconds in in_turn(bursts, rounds)]


def _burst(going: Lane) -> Callable[[], float]:
    return lambda: seconds_each(lambda _: going.step(), range(BURST))
