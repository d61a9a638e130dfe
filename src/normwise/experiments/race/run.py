"""One run of a race: a contender at its numbers, for so many samples, with one seed, to the numbers that come out."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from normwise.experiments.catalog.contenders import CATALOGUES
from normwise.experiments.framework.figures import finite
from normwise.experiments.framework.lattice import Value
from normwise.experiments.framework.store import MAYBE, NUMBER, Form, Result, Run
from normwise.experiments.framework.timing import WARM_UP, in_turn, milliseconds, seconds_each
from normwise.experiments.tasks.initial_weights import prepare
from normwise.experiments.tasks.task import Batch, Part, Score, Task
from normwise.optim import schedule

BURST = 4
RECENT, SPIKE = 32, 5.0
RENEWED = 50    # batches that BatchNorm's statistics are taken from anew
PARTS: tuple[Part, Part] = ("test", "train")


@dataclass(frozen=True)
class RaceRun(Run):
    """Everything that decides a run's outcome. task: its key. samples: the horizon. full: a run to report, with the test part.
    protocol: of the race. version: of torch."""

    task: str
    contender: str
    numbers: tuple[tuple[str, Value], ...]
    samples: int
    seed: int
    full: bool
    protocol: int
    version: str
    kind: ClassVar[str] = "race"

    @property
    def amount(self) -> int:
        return self.samples

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"numbers": dict(self.numbers)}

    @property
    def form(self) -> Form:
        trial: dict[str, Form] = {"result": MAYBE, "loss": MAYBE, "accuracy": NUMBER, "steps": int, "seconds": NUMBER, "diverged": bool}
        part: Form = {"loss": MAYBE, "accuracy": NUMBER}
        return trial | dict.fromkeys(PARTS, part) | {"sparsity": NUMBER, "breaches": list} if self.full else trial

    def told(self, result: Result) -> str:
        value = result["result"]
        return f"{self.contender} {self.samples} samples, seed {self.seed}: {'diverged' if value is None else f'{value:.4f}'}"

    def train(self, task: Task, /) -> Result:
        return train(self, task)


@dataclass
class Lane:
    """A model on its way."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    control: Any
    schedules: list[torch.optim.lr_scheduler.LambdaLR]
    stream: Iterator[Batch]
    clip: float
    task: Task

    def step(self) -> float:
        """One step; the batch's loss before it. A loss that is not finite changes nothing."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.task.loss(self.model, next(self.stream))
        value = loss.item()
        if not math.isfinite(value):
            return value
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for rates in self.schedules:
            rates.step()
        return value

    def settle(self) -> None:
        """Before the model is scored: the averaged weights of a schedule-free optimizer, and BatchNorm's statistics at them."""
        averaging = [optimizer for optimizer in self.optimizers if hasattr(optimizer, "eval")]
        for optimizer in averaging:
            optimizer.eval()
        if averaging and any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules()):
            update_bn(islice(self.stream, RENEWED), self.model)


def lane(run: RaceRun, task: Task, steps: int) -> Lane:
    """The model with its initial weights, its optimizer, its rules and its schedule."""
    numbers = dict(run.numbers)
    torch.manual_seed(run.seed)
    model = task.build()
    prepare(model, str(numbers["init"]))
    built, control = CATALOGUES[run.protocol][run.contender].build(model, numbers)
    optimizers = built if isinstance(built, tuple) else (built,)
    family = str(numbers["schedule"])
    schedules = [schedule(optimizer, steps, family) for optimizer in optimizers]
    return Lane(model, optimizers, control, schedules, task.batches(batch_of(numbers, task.batch), run.seed), float(numbers["clip"]), task)


def batch_of(numbers: Mapping[str, Value], batch: int) -> int:
    """Samples a step. batch: the task's."""
    return max(1, round(batch * float(numbers["batch"])))


def train(run: RaceRun, task: Task) -> Result:
    """Trains to the horizon and measures. Plain numbers; None in place of those that are not finite.

    ``result``: what the task is judged by, on validation. ``loss``, ``accuracy``, ``steps``, ``seconds``, ``diverged``, ``spikes``; of a
    full run also ``test``, ``train`` (loss and accuracy each), ``sparsity`` and ``breaches``.
    """
    steps = max(1, round(run.samples / batch_of(dict(run.numbers), task.batch)))
    going, losses, spikes, diverged = lane(run, task, steps), deque[float](maxlen=RECENT), 0, False
    started = time.perf_counter()
    for _ in range(steps):
        value = going.step()
        if not math.isfinite(value):
            diverged = True
            break
        spikes += is_spike(value, losses)
        losses.append(value)
    seconds = time.perf_counter() - started
    if not diverged:
        going.settle()
    score = Score(math.inf, 0.0) if diverged else task.evaluate(going.model, "validation")
    result = {
        "result": finite(getattr(score, task.metric)), "loss": finite(score.loss), "accuracy": score.accuracy, "steps": steps,
        "seconds": round(seconds, 2), "diverged": diverged or not math.isfinite(score.loss), "spikes": spikes,
    }  # fmt: skip
    if not run.full:
        return result
    worst, weights = Score(math.inf, 0.0), list(going.model.parameters())
    parts = {part: worst if diverged else task.evaluate(going.model, part) for part in PARTS}
    return result | {name: {"loss": finite(s.loss), "accuracy": s.accuracy} for name, s in parts.items()} | {
        "sparsity": sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights),
        "breaches": [] if going.control is None or diverged else [str(b) for b in going.control.verify().breaches],
    }  # fmt: skip


def is_spike(value: float, losses: deque[float]) -> bool:
    """Whether a loss lies more than five standard deviations above the mean of the last 32."""
    if len(losses) < RECENT:
        return False
    return value > statistics.fmean(losses) + SPIKE * statistics.pstdev(losses)


def step_times(runs: Sequence[RaceRun], task: Task, rounds: int) -> list[float]:
    """Milliseconds a step of each run: all take turns in bursts of four steps; medians over ``rounds`` bursts after two to warm up."""

    def burst(going: Lane) -> Callable[[], float]:
        return lambda: seconds_each(lambda _: going.step(), range(BURST))

    taken = in_turn([burst(lane(run, task, BURST * (rounds + WARM_UP))) for run in runs], rounds)
    return [milliseconds(seconds) for seconds in taken]
