"""The article's network: convolution, ReLU and 2×2 max pooling, twice, VALID; then a linear head."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.task import Recipe, Source, task

WEIGHT_STD = 0.02
BIAS = 0.1
_KERNELS = (5, 3, 2)
_SMALL_SIDE = 16  # images below this learn from smaller batches: there are few of them in the sets that have them


class CNN(nn.Module):
    """Images ``(n, channels, height, width)`` to logits ``(n, classes)``.

    shape: (channels, height, width) of an image, 7×7 or more. classes: how many. channels: of the first and the second
    convolution; the article has (32, 64). Kernels are the largest of 5, 3 and 2 that leave every pooling something to pool:
    5 and 5 on 28×28, 3 and 2 on 8×8.
    Weights are drawn from a normal of standard deviation 0.02 cut at two deviations, biases are 0.1, as in the article.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, channels: tuple[int, int] = (32, 64)) -> None:
        super().__init__()
        first, second = kernels_for(min(shape[1:]))
        self.conv1 = nn.Conv2d(shape[0], channels[0], first)
        self.conv2 = nn.Conv2d(channels[0], channels[1], second)
        height, width = (_pooled(_pooled(size, first), second) for size in shape[1:])
        self.head = nn.Linear(channels[1] * height * width, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        # Half the time on the CPU; the weights keep their plain layout, so that rules see one view of them, not a copy.
        images = images.to(memory_format=torch.channels_last)
        hidden = nn.functional.max_pool2d(self.conv1(images).relu(), 2)
        hidden = nn.functional.max_pool2d(self.conv2(hidden).relu(), 2)
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


def kernels_for(size: int) -> tuple[int, int]:
    """The two largest kernels, largest sum first, after which both poolings still give at least one pixel."""
    pairs = ((first, second) for first, second in product(_KERNELS, repeat=2) if first >= second)
    fits = [pair for pair in pairs if _pooled(_pooled(size, pair[0]), pair[1]) >= 1]
    if not fits:
        raise StudyError(f"Images of {size} pixels are too small for two convolutions and two poolings; give 7×7 or larger.")
    return max(fits, key=lambda pair: pair[0] + pair[1])


def _pooled(size: int, kernel: int) -> int:
    return (size - kernel + 1) // 2


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=WEIGHT_STD, a=-2 * WEIGHT_STD, b=2 * WEIGHT_STD)
        if module.bias is not None:
            nn.init.constant_(module.bias, BIAS)


@task("cnn", steps=800)
def cnn(source: Source, tiny: bool) -> ImageTask:
    """The article's network on images as they are: 128 a batch, 64 below 16 pixels, where bf16 would be slower than fp32."""
    data = load(source)
    small = min(data.shape[1:]) < _SMALL_SIDE
    model = partial(CNN, data.shape, data.classes, (4, 8) if tiny else (32, 64))
    return ImageTask(Recipe("cnn", tiny, "accuracy", 64 if small else 128, model, bf16=not tiny and not small), data, augmented=False)
