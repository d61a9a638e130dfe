"""The task of taking noise from images: a regression on the images as they were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.data.splits import ImageData
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.task import Batch, Part, Recipe, Score, evaluating

__all__ = ["DenoisingTask"]

NOISE = 1.0    # in deviations of the images' own values
_FIRST = {"train": 1, "validation": 2, "test": 3}    # the seed of the noise that a part is scored with


class DenoisingTask(ImageTask):
    """Batches are (noisy images, images as they were), standardised; the model maps one to the other. The loss is the mean squared error.

    Each batch has noise of its own, decided by the seed; each part is scored under the same noise in every run.
    """

    def __init__(self, recipe: Recipe, data: ImageData, *, augmented: bool) -> None:
        super().__init__(recipe, data, augmented=augmented)
        clean = self._standardised(self.parts["test"][0])
        self.guess = float((clean - clean.mean()).square().mean())

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        return _noisy(super().batches(batch, seed), seed)

    def scored(self, part: Part) -> Iterable[Batch]:
        return _noisy(super().scored(part), _FIRST[part])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        noisy, clean = batch
        return F.mse_loss(self.logits(model, noisy), clean)

    def evaluate(self, model: nn.Module, part: Part) -> Score:
        squares, spread, total, count = 0.0, 0.0, 0.0, 0
        with evaluating(model):
            for noisy, clean in self.scored(part):
                squares += float((self.logits(model, noisy) - clean).double().square().sum())
                spread += float(clean.double().square().sum())
                total += float(clean.double().sum())
                count += clean.numel()
        variance = spread / count - (total / count) ** 2
        error = squares / count
        return Score(error, max(0.0, 1 - error / variance)) if math.isfinite(error) else Score(math.inf, 0.0)


def _noisy(batches: Iterable[Batch], seed: int) -> Iterator[Batch]:
    chance = torch.Generator().manual_seed(seed)
    for images, _ in batches:
        yield images + NOISE * torch.randn(images.shape, generator=chance), images
