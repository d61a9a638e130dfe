"""Interleaved timing: everything that is compared takes turns in one process, so that a slow moment of the machine strikes all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from normwise.experiments.framework.pool import one_thread

T = TypeVar("T")
WARM_UP = 2


def in_turn(bursts: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """What each burst gives in every one of ``rounds`` rounds, on one thread, after two rounds to warm up that are left out.

    In a round each has one turn. A burst should be several steps: the first finds the caches filled by another's, as a loop of its own
    would not.
    """
    with one_thread():
        taken = [[burst() for burst in bursts] for _ in range(WARM_UP + rounds)]
    return [list(column) for column in zip(*taken[WARM_UP:], strict=True)]


def seconds_each(step: Callable[[T], object], inputs: Iterable[T]) -> float:
    """Seconds a step of one burst, which takes a step on each of ``inputs``. They are made before the clock starts."""
    ready = list(inputs)
    started = time.perf_counter()
    for one in ready:
        step(one)
    return (time.perf_counter() - started) / len(ready)


def milliseconds(bursts: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Of bursts that give seconds: the median over rounds."""
    return [1e3 * statistics.median(seconds) for seconds in in_turn(bursts, rounds)]
