"""What a training task is to a study: a model, batches, a loss, and a score on three disjoint parts of the data."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HELD_OUT", "TASKS", "Batch", "Part", "Recipe", "Score", "Source", "Task", "score", "task"]

Batch = tuple[Tensor, ...]
Part = Literal["train", "validation", "test"]
Source = str | Path | None


@dataclass(frozen=True)
class Score:
    """Means over a part of the data. loss: cross-entropy in nats an answer, or the squared error, inf where it is not finite. accuracy: in
    [0, 1]; of a regression the share of the answers' variance that it explains, 0 where that is negative."""

    loss: float
    accuracy: float


VERSION = 3  # of the tasks' code: one more whenever the same key would give another run


@functools.cache
def fast_bf16() -> bool:
    """Whether this CPU computes in bf16 by itself. One that does not takes 10 to 60 times as long as in fp32: tasks then run in fp32, and
    their keys say so, so that runs of two machines do not mix."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16", True))    # another architecture does not say


@dataclass(frozen=True)
class Recipe:
    """The choices that make a task of data.

    name: of the task. tiny: whether the model is one that trains in seconds. metric: what runs are judged by. batch: samples a step.
    model: gives a new model; torch's global generator decides its weights. bf16: run the model under
    ``torch.autocast("cpu", torch.bfloat16)``, the logits and the loss in fp32, where the CPU is quick at that. variant: of the model,
    where an option of the task changes it.
    """

    name: str
    tiny: bool
    metric: Literal["accuracy", "loss"]
    batch: int
    model: Callable[[], nn.Module]
    bf16: bool = False
    variant: str = ""

    def key(self, data: str) -> str:
        """What decides a run, with the fingerprint of the data: ``"gpt-standard-bf16-1-0123456789abcdef"``."""
        size, precision = "tiny" if self.tiny else "standard", "bf16" if self.bf16 and fast_bf16() else "fp32"
        return "-".join(filter(None, (self.name, size, self.variant, precision, str(VERSION), data)))


class Task(ABC):
    """A supervised task of cross-entropy: batches are (inputs, answers), logits have one axis more than the answers, the classes last.
    Nothing here knows of optimizers or norms.

    recipe: see :class:`Recipe`; its name, metric and batch are the task's. samples: how many a pass over the training part has.
    guess: the metric, on the test part, of answering without looking at the input. facts: name, sizes and fingerprint of the data.
    key: a fingerprint of the data and of everything else that decides a run, for the store of finished runs.
    """

    guess: float
    facts: dict[str, Any]

    def __init__(self, recipe: Recipe, samples: int, data_key: str) -> None:
        self.recipe, self.samples, self.key = recipe, samples, recipe.key(data_key)
        self.name, self.metric, self.batch = recipe.name, recipe.metric, recipe.batch

    def build(self) -> nn.Module:
        """A model with initial weights from torch's global generator: the caller seeds it."""
        return self.recipe.model()

    @abstractmethod
    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end, decided by the seed alone (order, crops, flips); ``batch`` samples each."""

    @abstractmethod
    def scored(self, part: Part) -> Iterable[Batch]:
        """The batches that a part is scored on, always the same ones. The training part is sampled where it is large."""

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's answers in fp32, computed in the task's precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16 and fast_bf16()):
            answers: Tensor = model(inputs)
        return answers.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean training loss of a batch, a scalar."""
        inputs, answers = batch
        return F.cross_entropy(self.logits(model, inputs).flatten(0, -2), answers.flatten())

    def evaluate(self, model: nn.Module, part: Part) -> Score:
        """The score on a part, in evaluation mode; the model's mode is put back."""
        with evaluating(model):
            return score(lambda inputs: self.logits(model, inputs), self.scored(part))


def score(logits: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Score:
    """Means over all answers of the batches, however they are cut; sums are kept in float64."""
    loss, right, count = 0.0, 0, 0
    for inputs, answers in batches:
        rows, wanted = logits(inputs).flatten(0, -2), answers.flatten()
        loss += float(F.cross_entropy(rows, wanted, reduction="none").double().sum())
        right += int((rows.argmax(1) == wanted).sum())
        count += len(wanted)
    mean = loss / count
    return Score(mean if math.isfinite(mean) else math.inf, right / count)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


Build = TypeVar("Build", bound=Callable[..., Task])
TASKS: dict[str, Callable[..., Task]] = {}
"""Every supervised task by its name: ``build(source, tiny, **options)``. Filled by the modules of ``tasks.models``; see ``tasks.load``."""


STEPS: dict[str, int] = {}
"""The steps of a run of ordinary length, by the task's name: ``compare`` takes a share of it, and a race's first horizon is that long."""


HELD_OUT: set[str] = set()
"""The tasks that no number, default or family is chosen on: they tell how far what was chosen on the others carries (docs/race.md)."""


def task(name: str, steps: int, held_out: bool = False) -> Callable[[Build], Build]:
    """Registers a task under this name for ``race`` and ``compare``.

    What is registered builds the task from ``source`` (``--data``: a folder or file, ``hf:NAME`` for a Hugging Face data set, None for data
    that need no download) and ``tiny`` (whether the model should train in seconds, in fp32, for tests); more arguments are its own options.
    An option ``half``, False by default, makes the size "half" of it: the network at half of its width.

    Args:
        name: what the command line calls it.
        steps: of a run of ordinary length, until which the tuned baseline has learnt most of what it will.
        held_out: whether it stands in ``HELD_OUT``.
    """

    def registered(build: Build) -> Build:
        TASKS[name], STEPS[name] = build, steps
        if held_out:
            HELD_OUT.add(name)
        return build

    return registered
