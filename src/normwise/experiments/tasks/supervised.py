"""What every supervised task shares: the mean cross-entropy of a model's logits, and a score on one part of the data."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.task import Batch, Part, Score, Task

__all__ = ["Recipe", "Supervised", "score"]

VERSION = 3  # of the tasks' code: one more whenever the same key would give another run


@dataclass(frozen=True)
class Recipe:
    """The choices that make a task of data.

    name: of the task. tiny: whether the model is one that trains in seconds. metric: what runs are judged by. batch: samples a step.
    model: gives a new model; torch's global generator decides its weights. bf16: run the model under
    ``torch.autocast("cpu", torch.bfloat16)``, the logits and the loss in fp32. variant: of the model, where
    an option of the task changes it.
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
        size, precision = "tiny" if self.tiny else "standard", "bf16" if self.bf16 else "fp32"
        return "-".join(filter(None, (self.name, size, self.variant, precision, str(VERSION), data)))


class Supervised(Task):
    """A task of cross-entropy: batches are (inputs, answers), logits have one axis more than the answers, the classes last."""

    def __init__(self, recipe: Recipe, samples: int, data_key: str) -> None:
        self.name, self.metric, self.batch = recipe.name, recipe.metric, recipe.batch
        self.samples, self.key = samples, recipe.key(data_key)
        self.recipe = recipe

    def build(self) -> nn.Module:
        return self.recipe.model()

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's answers in fp32, computed in the task's precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            answers: Tensor = model(inputs)
        return answers.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, answers = batch
        return F.cross_entropy(self.logits(model, inputs).flatten(0, -2), answers.flatten())

    def evaluate(self, model: nn.Module, part: Part) -> Score:
        with evaluating(model):
            return score(lambda inputs: self.logits(model, inputs), self.scored(part))

    @abstractmethod
    def scored(self, part: Part) -> Iterable[Batch]:
        """The batches that a part is scored on, always the same ones."""


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
