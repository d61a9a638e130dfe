"""Interleaved timing: everything that is compared takes turns in one process, so that a slow moment of the machine strikes all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch

from normwise.experiments.framework.pool import on_threads

T = TypeVar("T")
WARM_UP = 2


def in_turn(
    bursts: Sequence[Callable[[], T]], rounds: int, *, warm_up: int = WARM_UP, threads: int | None = 1, alternate: bool = False
) -> list[list[T]]:
    """What each burst gives in every one of ``rounds`` rounds, after ``warm_up`` rounds that are left out.

    In a round each has one turn. A burst should be several steps: the first finds the caches filled by another's, as a loop of its own
    would not. threads: of torch meanwhile; None for as many as it has. alternate: every second round goes backwards, since of two the
    second one finds the caches filled by the first.
    """
    with nullcontext() if threads is None else on_threads(threads):
        taken = []
        for k in range(warm_up + rounds):
            places = range(len(bursts))[:: -1 if alternate and k % 2 else 1]
            found = {place: bursts[place]() for place in places}
            taken.append([found[place] for place in range(len(bursts))])
    return [list(column) for column in zip(*taken[warm_up:], strict=True)]


def device() -> str:
    """Where benchmarks that can choose measure: on a CUDA device, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(call: Callable[[], object]) -> float:
    """Of one call. Where there is a CUDA device, of which the call may ask for work that goes on after it, from one event to another."""
    if torch.cuda.is_initialized():    # type: ignore[no-untyped-call]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))    # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def seconds_each(step: Callable[[T], object], inputs: Iterable[T]) -> float:
    """Seconds a step of one burst, which takes a step on each of ``inputs``. They are made before the clock starts."""
    ready = list(inputs)
    return seconds(lambda: [step(one) for one in ready]) / len(ready)


def milliseconds(seconds: Iterable[float]) -> float:
    """The median."""
    return 1e3 * statistics.median(seconds)
