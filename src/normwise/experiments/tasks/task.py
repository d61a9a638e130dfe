"""What a training task is to a study: a model, batches, a loss, and a score on three disjoint parts of the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

__all__ = ["TASKS", "Batch", "Part", "Score", "Source", "Task", "task"]

Batch = tuple[Tensor, ...]
Part = Literal["train", "validation", "test"]
Source = str | Path | None


@dataclass(frozen=True)
class Score:
    """Means over a part of the data. loss: cross-entropy in nats an answer, inf where it is not finite. accuracy: in [0, 1]."""

    loss: float
    accuracy: float


class Task(ABC):
    """A supervised task. Nothing here knows of optimizers or norms.

    name: as it is registered. metric: what runs are judged by, ``"accuracy"`` (higher is better) or ``"loss"`` (lower is better).
    batch: samples a step, by default. samples: how many a pass over the training part has.
    guess: the metric, on the test part, of answering without looking at the input. facts: name, sizes and fingerprint of the data.
    key: a fingerprint of the data and of everything else that decides a run, for the store of finished runs.
    """

    name: str
    metric: Literal["accuracy", "loss"]
    batch: int
    samples: int
    guess: float
    facts: dict[str, Any]
    key: str

    @abstractmethod
    def build(self) -> nn.Module:
        """A model with initial weights from torch's global generator: the caller seeds it."""

    @abstractmethod
    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end, decided by the seed alone (order, crops, flips); ``batch`` samples each."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean training loss of a batch, a scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: Part) -> Score:
        """The score on a part, in evaluation mode; the model's mode is put back. The training part is sampled where it is large."""


Build = TypeVar("Build", bound=Callable[..., Task])
TASKS: dict[str, Callable[..., Task]] = {}
"""Every supervised task by its name: ``build(source, tiny, **options)``. Filled by the modules of ``tasks.models``; see ``tasks.load``."""


STEPS: dict[str, int] = {}
"""The steps of a run of ordinary length, by the task's name: ``compare`` takes a share of it, and a race's first horizon is that long."""


def task(name: str, steps: int) -> Callable[[Build], Build]:
    """Registers a task under this name for ``race`` and ``compare``.

    What is registered builds the task from ``source`` (``--data``: a folder or file, ``hf:NAME`` for a Hugging Face data set, None for data
    that need no download) and ``tiny`` (whether the model should train in seconds, in fp32, for tests); more arguments are its own options.

    Args:
        name: what the command line calls it.
        steps: of a run of ordinary length, until which the tuned baseline has learnt most of what it will.
    """

    def registered(build: Build) -> Build:
        TASKS[name], STEPS[name] = build, steps
        return build

    return registered
