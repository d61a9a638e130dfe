"""Tasks on images: the article's network as it is, and a residual network on images that are flipped and shifted at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from normwise.experiments.framework.provenance import describe
from normwise.experiments.tasks.data.splits import ImageData
from normwise.experiments.tasks.task import Batch, Part, Recipe, Task

__all__ = ["ImageTask", "augment", "endless"]

_SCORED_AT_ONCE = 250
_SHADES = 16  # pixels of an image's side for each pixel that a crop may move: 2 on 32×32, 1 on 8×8


class ImageTask(Task):
    """Classify images; the model maps ``(n, channels, height, width)`` to ``(n, classes)``.

    Images are kept as bytes and standardised batch by batch with the training part's mean and deviation, channels last, which
    is twice as fast on the CPU. augmented: training images are shifted by up to a sixteenth of their side, as if they were padded
    with the mean and cropped at random, and colour images are mirrored with probability one half; grey ones are not, since a
    mirrored digit is another thing. ``parts``: the images as bytes ``(n, channels, height, width)`` and the labels ``(n,)`` of each part.
    Validation and test are scored whole, the training part on a fixed sample of the validation part's size.
    """

    def __init__(self, recipe: Recipe, data: ImageData, *, augmented: bool) -> None:
        super().__init__(recipe, len(data.train), data.key)
        self.guess, self.facts = data.commonest, describe(data)
        self.mean, self.deviation = data.scale
        self.shift = max(1, min(data.shape[1:]) // _SHADES) if augmented else 0
        self.mirror = augmented and data.shape[0] > 1
        named = {"train": data.train, "validation": data.validation, "test": data.test}
        # Arrays read from a file are read-only, which torch warns of.
        self.parts = {
            name: (torch.from_numpy(np.require(part.images, requirements=["C", "W"])), torch.from_numpy(part.labels))
            for name, part in named.items()
        }
        self._sample = torch.randperm(self.samples, generator=torch.Generator().manual_seed(0))[: len(data.validation)]

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        chance = torch.Generator().manual_seed(seed)
        images, labels = self.parts["train"]
        for rows in endless(self.samples, batch, chance):
            yield augment(self._standardised(images[rows]), self.shift, self.mirror, chance), labels[rows]

    def scored(self, part: Part) -> Iterable[Batch]:
        images, labels = self.parts[part]
        rows = self._sample if part == "train" else torch.arange(len(labels))
        for some in torch.split(rows, _SCORED_AT_ONCE):
            yield self._standardised(images[some]), labels[some]

    def _standardised(self, images: Tensor) -> Tensor:
        plain = images.float().sub_(self.mean).div_(self.deviation)
        return plain.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, shift: int, mirror: bool, chance: torch.Generator) -> Tensor:
    """Images ``(n, c, h, w)`` moved by up to ``shift`` pixels down and right or up and left, zeros moving in, and mirrored half the time.

    Equal to padding each by ``shift`` zeros and cropping it at a random place; one gather for the whole batch. Channels last.
    """
    if not shift and not mirror:
        return images
    count, _, height, width = images.shape
    top, left = torch.randint(2 * shift + 1, (2, count, 1), generator=chance)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if mirror:
        mirrored = torch.randint(2, (count, 1), generator=chance).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (shift,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def endless(samples: int, batch: int, chance: torch.Generator) -> Iterator[Tensor]:
    """Rows for batches without end: pass after pass in a new order each, every sample once a pass, batches running on across passes."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(samples, generator=chance)])
        yield waiting[:batch]
        waiting = waiting[batch:]
