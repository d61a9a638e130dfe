"""One run of a comparison: a strategy, an optimizer, a learning rate, strengths and a seed to the numbers that come out."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normwise.experiments.catalog.optimizers import OPTIMIZERS
from normwise.experiments.catalog.strategies import STRATEGIES
from normwise.experiments.framework.figures import finite
from normwise.experiments.framework.store import MAYBE, NUMBER, Form, Result, Run
from normwise.experiments.framework.timing import in_turn, milliseconds, seconds_each
from normwise.experiments.tasks.rates import constant_then_linear
from normwise.experiments.tasks.task import Batch, Score, Task
from normwise.norms.decompose import singular_values

LAST = 3  # marks whose mean a run is chosen by, so that one lucky batch decides nothing
_BURST = 5
_CURVE = ("step", "validation_accuracy", "validation_loss", "train_loss")


@dataclass(frozen=True)
class CompareRun(Run):
    """Everything that decides a run's outcome; two equal runs give equal numbers on one machine.

    task: its key. strengths: of the strategy, by axis. batch: samples a step. marks: at which it is looked at. full: whether the run is one
    to report, with the test part, norms and curves, or a trial that only asks for validation. versions: of normwise and torch.
    """

    task: str
    strategy: str
    optimizer: str
    lr: float
    strengths: dict[str, float]
    seed: int
    steps: int
    batch: int
    marks: int
    full: bool
    versions: tuple[str, str] = ("", "")
    kind: ClassVar[str] = "compare"

    @property
    def amount(self) -> int:
        return self.steps * self.batch

    @property
    def form(self) -> Form:
        score: Form = {"accuracy": NUMBER, "loss": MAYBE}
        trial: dict[str, Form] = {"validation": score, "steps": int, "diverged": bool}
        curve: Form = dict.fromkeys(_CURVE, list) | {"norms": dict}
        more: dict[str, Form] = {"test": score, "train": score, "sparsity": NUMBER, "norms": dict, "breaches": list}
        return trial | more | {"curve": curve} if self.full else trial

    def told(self, result: Result) -> str:
        score = result["validation"]
        loss = "diverged" if score["loss"] is None else f"loss {score['loss']:.3f}"
        return f"{self.strategy} with {self.optimizer}: {100 * score['accuracy']:.1f}%, {loss}"

    def train(self, task: Task, /) -> Result:
        return train(self, task)


class Lane:
    """A model on its way. ``control`` is None where the strategy has no rules."""

    def __init__(self, run: CompareRun, task: Task, *, timed: bool = False) -> None:
        import normwise as nw

        torch.manual_seed(run.seed)
        self.task, self.model = task, task.build()
        self.optimizer = OPTIMIZERS[run.optimizer].build(self.model, run.lr)
        rules = STRATEGIES[run.strategy].rules(run.strengths, task.samples)
        self.control = nw.attach(self.model, self.optimizer, rules, timed=timed) if rules else None
        self.batches: Iterator[Batch] = task.batches(run.batch, run.seed)

    def step(self, batch: Batch) -> float:
        """One step; gives the loss before it. One that is not finite changes nothing."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return value


def train(run: CompareRun, task: Task) -> Result:
    """Trains and measures. Plain numbers only, None in place of those that are not finite; training stops where the loss is not finite.

    Returns:
        ``validation`` (``accuracy``, ``loss``: means over the last three marks), ``diverged``, ``steps``, ``seconds``; of a full run also
        ``test``, ``train``, ``sparsity``, ``norms``, ``breaches`` and ``curve``.
    """
    lane = Lane(run, task)
    schedule = torch.optim.lr_scheduler.LambdaLR(lane.optimizer, lambda step: constant_then_linear(step, run.steps))
    marks = sorted({round(run.steps * (mark + 1) / run.marks) for mark in range(run.marks)})
    marks = marks if run.full else marks[-LAST:]
    seen: list[tuple[Any, ...]] = []
    norms: dict[str, list[float | None]] = {name: [] for name, _ in lane.model.named_parameters()}
    losses: list[float] = []
    started, step, diverged = time.perf_counter(), 0, False
    for step, batch in enumerate(itertools.islice(lane.batches, run.steps), start=1):
        losses.append(lane.step(batch))
        if diverged := not math.isfinite(losses[-1]):
            break
        schedule.step()
        if step in marks:
            score = task.evaluate(lane.model, "validation")
            seen.append((step, score.accuracy, finite(score.loss), statistics.fmean(losses)))
            for name, parameter in lane.model.named_parameters():
                norms[name].append(finite(parameter.detach().norm().item()))
            losses.clear()
    curve: dict[str, Any] = {name: [line[k] for line in seen] for k, name in enumerate(_CURVE)}
    accuracies, ends = curve["validation_accuracy"][-LAST:], curve["validation_loss"][-LAST:]
    if not ends:
        score = task.evaluate(lane.model, "validation")
        accuracies, ends = [score.accuracy], [finite(score.loss)]
    loss = None if None in ends else statistics.fmean(ends)
    result = {
        "validation": {"accuracy": statistics.fmean(accuracies), "loss": loss}, "steps": step,
        "diverged": diverged or loss is None, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return result | _reported(lane) | {"curve": curve | {"norms": norms}} if run.full else result


def _reported(lane: Lane) -> Result:
    parameters = dict(lane.model.named_parameters())
    zeros = sum(int((parameter == 0).sum()) for parameter in parameters.values())

    def plain(score: Score) -> dict[str, float | None]:
        return {"accuracy": score.accuracy, "loss": finite(score.loss)}

    return {
        "test": plain(lane.task.evaluate(lane.model, "test")), "train": plain(lane.task.evaluate(lane.model, "train")),
        "sparsity": zeros / sum(parameter.numel() for parameter in parameters.values()),
        "norms": {name: norms_of(parameter.detach()) for name, parameter in parameters.items()},
        "breaches": [] if lane.control is None else [str(breach) for breach in lane.control.verify().breaches],
    }  # fmt: skip


def norms_of(parameter: Tensor) -> dict[str, float | None]:
    """L2 norm of all entries; spectral norm of, and largest row of, the matrix whose rows lie along the first axis, which are the output
    units of convolutions and linear layers. A vector has no singular values."""
    exact = parameter.double()
    rows = exact.flatten(1) if exact.ndim > 1 else exact[:, None]
    finite_rows = bool(exact.isfinite().all())
    spectral = singular_values(rows[None])[0].amax().item() if finite_rows and exact.ndim > 1 else None
    return {"l2": finite(exact.norm().item()), "spectral": spectral, "max_unit": finite(rows.norm(dim=1).max().item())}


def step_costs(runs: Sequence[CompareRun], task: Task, rounds: int) -> list[dict[str, float]]:
    """``step_ms`` and ``control_share`` of each run: medians over ``rounds`` rounds.

    In a round every run has a burst of five steps in turn. The control's share is the time within its hooks over the time of the steps.
    """

    def burst(lane: Lane) -> Callable[[], tuple[float, float]]:
        def measured() -> tuple[float, float]:
            before = lane.control.seconds if lane.control is not None else 0.0
            step = seconds_each(lane.step, itertools.islice(lane.batches, _BURST))
            after = lane.control.seconds if lane.control is not None else 0.0
            return step, (after - before) / (step * _BURST)

        return measured

    kept = in_turn([burst(Lane(run, task, timed=True)) for run in runs], rounds)
    columns = [list(zip(*column, strict=True)) for column in kept]
    return [{"step_ms": milliseconds(steps), "control_share": statistics.median(shares)} for steps, shares in columns]
