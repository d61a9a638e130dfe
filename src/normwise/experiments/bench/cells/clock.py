"""How a cell of ``bench control`` is timed: steps in turn, differences in pairs, and the floor of the same memory in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from normwise.experiments.framework.figures import finite, ratio_interval
from normwise.experiments.framework.timing import device, in_turn, seconds

READS: tuple[Callable[[Tensor], object], ...] = (torch.sum, lambda x: torch.dot(x, x), torch.amax, torch.linalg.vector_norm)
REWRITES: tuple[Callable[[Tensor], object], ...] = (lambda x: x.mul_(1.0), lambda x: x.add_(0.0), torch.Tensor.neg_)
CELL_SECONDS = 2.0
LEAST_ROUNDS, FEWEST_ROUNDS, OVERTIME = 11, 5, 3


@cache
def fastest(entries: int, calls: tuple[Callable[[Tensor], object], ...]) -> Callable[[Tensor], object]:
    """The fastest of these calls on so many fp32 entries, by medians of turns."""
    x = torch.ones(entries, device=device())
    taken = in_turn([lambda call=call: seconds(lambda: call(x)) for call in calls], 7, threads=None)    # type: ignore[misc]
    return calls[min(range(len(calls)), key=lambda k: statistics.median(taken[k]))]


class Floor:
    """The fastest way through as much memory as the rules work on.

    Each of ``entries`` is one flat buffer of so many fp32 numbers, ones. passes: over each buffer, ``READS`` or ``REWRITES``, one after the
    other; of each kind the fastest call.
    """

    def __init__(self, entries: Sequence[int], passes: Sequence[tuple[Callable[[Tensor], object], ...]]) -> None:
        self.buffers = [torch.ones(n, device=device()) for n in entries]
        self.calls = [(x, fastest(x.numel(), kind)) for x in self.buffers for kind in passes]

    def put_back(self) -> None:
        """Touches the memory as putting weights back does, so that caches are as warm."""
        for x in self.buffers:
            x.fill_(1.0)

    def __call__(self) -> None:
        for x, call in self.calls:
            call(x)


def burst(put_back: Callable[[], object], step: Callable[[], object], steps: int) -> float:
    """Seconds of one step: the median of a few, everything put back before each, outside the clock."""
    taken = []
    for _ in range(steps):
        put_back()
        taken.append(seconds(step))
    return statistics.median(taken)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step replayed as a CUDA graph: what it costs the device, without the calls that ask for it."""
    side = torch.cuda.Stream()    # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):    # what torch asks for: states are made and kernels built before
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def steps_for(steps: Sequence[Callable[[], object]]) -> int:
    """How many steps make a burst: eight of short ones, so that one that was interrupted does not count; one where they take long."""
    longest = max(min(seconds(step) for _ in range(2)) for step in steps)
    return 8 if longest < 1e-3 else 3 if longest < 1e-2 else 1


def rounds_for(bursts: Sequence[Callable[[], float]], most: int, budget: float = CELL_SECONDS) -> int:
    """How many rounds fit into the budget: at least eleven, for which slow ones may take three budgets, and five in any case, unless
    ``most`` is less. One round is spent on finding out."""
    one = seconds(lambda: in_turn(bursts, 1, warm_up=0, threads=None))
    least = max(FEWEST_ROUNDS, min(LEAST_ROUNDS, int(OVERTIME * budget / one)))
    return min(most, max(least, int(budget / one)))


@dataclass(frozen=True)
class Timed:
    """What each way took in every round, in seconds. hand: by the name of the way."""

    plain: list[float]
    control: list[float]
    floor: list[float]
    hand: dict[str, list[float]] = field(default_factory=dict)

    def added(self, taken: Sequence[float]) -> list[float]:
        """What a way adds to the step without control, of the same round each."""
        return [a - b for a, b in zip(taken, self.plain, strict=True)]

    def row(self, step: float) -> dict[str, Any]:
        """The figures, in µs; the faster way by hand counts. step: seconds of the whole training step without control."""
        own, by = self.added(self.control), {name: self.added(taken) for name, taken in self.hand.items()}
        ways = {name: statistics.median(taken) for name, taken in by.items()}
        way = min(ways, key=lambda name: ways[name])
        added, hand, floor = statistics.median(own), ways[way], statistics.median(self.floor)
        low, high = ratio_interval(own, by[way])
        return {
            "added_us": 1e6 * added, "hand_us": 1e6 * hand, "by_hand": way, "floor_us": 1e6 * floor, "step_us": 1e6 * step,
            "share": added / step, "ratio": added / hand if hand > 0 else None, "low": finite(low), "high": finite(high),
            "over_floor": added / floor, "rounds": len(own), "ways_us": {name: 1e6 * taken for name, taken in ways.items()},
        }  # fmt: skip
