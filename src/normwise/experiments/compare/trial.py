"""One training run: a strategy, an optimizer, a learning rate, strengths and a seed to the numbers that come out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normwise.experiments.compare.optimizers import OPTIMIZERS
from normwise.experiments.compare.strategies import STRATEGIES
from normwise.experiments.framework.store import MAYBE, NUMBER, Form
from normwise.experiments.tasks.data.splits import ImageData
from normwise.experiments.tasks.models.cnn import CNN
from normwise.norms.decompose import singular_values

_EVALUATION_BATCH = 200  # twice as fast on the CPU as 1000, which leaves the caches
_LAST = 3


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's outcome; two equal runs give equal numbers on one machine.

    data: the fingerprint of the split. strengths: of the strategy, by axis. full: whether the run is one to report, with the
    test part, norms and curves, or a trial that only asks for the validation accuracy. versions: of normwise and torch.
    """

    strategy: str
    optimizer: str
    lr: float
    strengths: dict[str, float]
    seed: int
    epochs: int
    batch: int
    channels: tuple[int, int]
    marks: int
    full: bool
    data: str
    versions: tuple[str, str] = field(default=("", ""))

    def settings(self) -> dict[str, Any]:
        """As plain data, for the key of the run and for the file of finished runs."""
        return {"kind": "run", **asdict(self)}

    @property
    def form(self) -> Form:
        """What a kept result must hold."""
        trial: dict[str, Form] = {"validation_accuracy": NUMBER, "validation_loss": MAYBE, "steps": int, "diverged": bool}
        curve: Form = {"step": list, "validation_accuracy": list, "train_loss": list, "norms": dict}
        more: dict[str, Form] = {"test_accuracy": NUMBER, "train_accuracy": NUMBER, "sparsity": NUMBER, "norms": dict, "breaches": list}
        return trial | more | {"curve": curve} if self.full else trial

    def train(self, data: ImageData, /) -> dict[str, Any]:
        """As :func:`train` does: how a worker of ``study.pool`` does this run."""
        return train(self, data)


@dataclass
class Training:
    """A model on its way: what a step needs, built from a run. ``control`` is None where the strategy has no rules."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    control: Any
    images: Tensor
    labels: Tensor

    def step(self, rows: Tensor) -> float:
        """One step on these rows; gives the mean cross-entropy before it."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.images[rows]), self.labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


def prepare(run: Run, data: ImageData, *, timed: bool = False) -> Training:
    """The model with its initial weights, its optimizer and the control attached to it."""
    torch.manual_seed(run.seed)
    model = CNN(data.shape, data.classes, run.channels)
    optimizer = OPTIMIZERS[run.optimizer].build(model, run.lr)
    images, labels = data.tensors("train")
    rules = STRATEGIES[run.strategy].rules(run.strengths, len(labels))
    control = None
    if rules:
        import normwise as nw

        control = nw.attach(model, optimizer, rules, timed=timed)
    return Training(model, optimizer, control, images, labels)


def batches(run: Run, samples: int) -> Iterator[Tensor]:
    """Row numbers of each step: every epoch in its own order, which depends on the seed alone; a short last batch is left out."""
    generator = torch.Generator().manual_seed(run.seed)
    size = min(run.batch, samples)
    for _ in range(run.epochs):
        yield from torch.split(torch.randperm(samples, generator=generator)[: samples - samples % size], size)


def train(run: Run, data: ImageData) -> dict[str, Any]:
    """Trains and measures. Plain numbers only, None in place of those that are not finite.

    Gives ``validation_accuracy`` and ``validation_loss``, means over the last three marks so that one lucky batch decides
    nothing, ``diverged``, ``steps``, ``seconds`` and, for a full run, ``test_accuracy``, ``train_accuracy``, ``sparsity``,
    ``norms``, ``breaches`` and ``curve``. Training stops where the loss is not finite.
    """
    training = prepare(run, data)
    total = steps_of(run, len(data.train))
    record = _Record(run, training.model, data, total)
    schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: share_of_lr(step, total))
    started, steps, diverged = time.perf_counter(), 0, False
    for steps, rows in enumerate(batches(run, len(data.train)), start=1):
        loss = training.step(rows)
        diverged = not math.isfinite(loss)
        if diverged:
            break
        schedule.step()
        record.after(steps, loss)
    accuracy, final_loss = record.last()
    result: dict[str, Any] = {
        "validation_accuracy": accuracy, "validation_loss": final_loss, "steps": steps,
        "diverged": diverged or final_loss is None, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if run.full:
        result |= _reported(training, data) | {"curve": record.lines}
    return result


def steps_of(run: Run, samples: int) -> int:
    """How many steps a run takes."""
    return run.epochs * (samples // min(run.batch, samples))


def share_of_lr(step: int, total: int) -> float:
    """The learning rate, as a share of its first value: constant for half of the run, then linearly to zero, so that the numbers
    at the end are those of settled weights and not of the last few batches."""
    return min(1.0, 2.0 * (1.0 - step / total))


class _Record:
    """What a run writes down at its marks: validation accuracy and loss, mean training loss since the mark before, L2 norms.

    The marks are evenly spread and the last is at the end; a run that is not reported looks at its last three only.
    """

    def __init__(self, run: Run, model: nn.Module, data: ImageData, total: int) -> None:
        self.model, self.validation = model, data.tensors("validation")
        marks = sorted({round(total * (mark + 1) / run.marks) for mark in range(run.marks)})
        self.marks = set(marks if run.full else marks[-_LAST:])
        self.losses: list[float] = []
        self.seen: list[tuple[float, float | None]] = []
        names = [name for name, _ in model.named_parameters()]
        self.lines: dict[str, Any] = {"step": [], "validation_accuracy": [], "train_loss": [], "norms": {n: [] for n in names}}

    def after(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step not in self.marks:
            return
        self.seen.append(evaluate(self.model, *self.validation))
        self.lines["step"].append(step)
        self.lines["validation_accuracy"].append(self.seen[-1][0])
        self.lines["train_loss"].append(sum(self.losses) / len(self.losses))
        for name, parameter in self.model.named_parameters():
            self.lines["norms"][name].append(_finite(parameter.detach().norm().item()))
        self.losses.clear()

    def last(self) -> tuple[float, float | None]:
        """Mean validation accuracy and loss over the last three marks; of a run that reached none, those of its end."""
        seen = self.seen[-_LAST:] or [evaluate(self.model, *self.validation)]
        losses = [loss for _, loss in seen if loss is not None]
        mean_loss = sum(losses) / len(seen) if len(losses) == len(seen) else None
        return sum(accuracy for accuracy, _ in seen) / len(seen), mean_loss


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float | None]:
    """Accuracy, and mean cross-entropy where it is finite."""
    logits = torch.cat([model(chunk) for chunk in torch.split(images, _EVALUATION_BATCH)])
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return accuracy, _finite(nn.functional.cross_entropy(logits.double(), labels).item())


def _reported(training: Training, data: ImageData) -> dict[str, Any]:
    parameters = dict(training.model.named_parameters())
    entries = sum(parameter.numel() for parameter in parameters.values())
    zeros = sum(int((parameter == 0).sum()) for parameter in parameters.values())
    return {
        "test_accuracy": evaluate(training.model, *data.tensors("test"))[0],
        "train_accuracy": evaluate(training.model, training.images, training.labels)[0],
        "sparsity": zeros / entries,
        "norms": {name: _norms(parameter.detach()) for name, parameter in parameters.items()},
        "breaches": [] if training.control is None else [str(breach) for breach in training.control.verify().breaches],
    }


def _norms(parameter: Tensor) -> dict[str, float | None]:
    """L2 norm of all entries; spectral norm of, and largest unit of, the matrix whose rows are the output units (the network
    has only convolutions and linear layers, where they are the first axis). A bias has no singular values."""
    exact = parameter.double()
    rows = exact.flatten(1) if exact.ndim > 1 else exact[:, None]
    finite = bool(exact.isfinite().all())
    spectral = singular_values(rows[None])[0].amax().item() if finite and exact.ndim > 1 else None
    return {"l2": _finite(exact.norm().item()), "spectral": spectral, "max_unit": _finite(rows.norm(dim=1).max().item())}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
