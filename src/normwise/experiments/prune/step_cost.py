"""Training step and inference of the full network and the smaller ones, interleaved in one process on one thread, medians of many."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.experiments.framework.timing import in_turn, milliseconds, seconds_each
from normwise.experiments.prune.run import example, rules, sgd
from normwise.experiments.tasks.task import Batch, Task
from normwise.prune import cut

_BURST = 5
KINDS = ("step_ms", "inference_ms", "single_ms")


def measure(task: Task, shapes: Sequence[Mapping[str, Sequence[int]]], rounds: int, hold: bool = False) -> dict[str, Any]:
    """Milliseconds of a training step, of inference on a training batch and on one input, of the full network, of it under the group
    lasso (``lasso``: steps only), and of the full network without the units of each of ``shapes`` (``smaller``).

    ``ratio``: a smaller network's time over the full one's in the same round, the median over rounds, by kind. In a round each network
    has a burst of five of each kind in turn.
    """
    inputs = example(task)
    torch.manual_seed(0)
    full = task.build()
    models = [full, task.build(), *(cut(full, inputs, units) for units in shapes)]
    lanes = [_Lane(task, model, rules(model, inputs, 1e-6, hold=hold) if place == 1 else []) for place, model in enumerate(models)]
    taken = in_turn([lane.burst for lane in lanes], rounds)
    first, lasso, *smaller = [dict(zip(KINDS, zip(*bursts, strict=True), strict=True)) for bursts in taken]

    def ratios(of: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return {kind: statistics.median(x / y for x, y in zip(of[kind], first[kind], strict=True)) for kind in KINDS}

    full_ms, lasso_ms, *smaller_ms = [{kind: milliseconds(of[kind]) for kind in KINDS} for of in (first, lasso, *smaller)]
    return {
        "full": full_ms, "lasso": {"step_ms": lasso_ms["step_ms"]}, "smaller": smaller_ms, "ratio": [ratios(of) for of in smaller],
        "lasso_ratio": ratios(lasso)["step_ms"], "rounds": rounds, "threads": 1,
    }  # fmt: skip


class _Lane:
    def __init__(self, task: Task, model: nn.Module, policy: list[nw.Rule]) -> None:
        self.task, self.model, self.optimizer = task, model, sgd(model, 1e-6)
        if policy:
            nw.attach(model, self.optimizer, policy)
        source = task.batches(task.batch, 0)
        self.batches = itertools.cycle([next(source) for _ in range(_BURST)])

    def burst(self) -> list[float]:
        """Seconds of each of ``KINDS``."""
        some = [next(self.batches) for _ in range(_BURST)]
        one = [tuple(tensor[:1] for tensor in batch) for batch in some]
        self.model.train()
        training = seconds_each(self.step, some)
        self.model.eval()
        with torch.no_grad():
            return [training, seconds_each(self.infer, some), seconds_each(self.infer, one)]

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.task.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def infer(self, batch: Batch) -> None:
        self.task.loss(self.model, batch)  # the forward pass in the task's own precision, and a cross-entropy beside it
