"""A small residual network with BatchNorm (He et al. 2016, "Deep Residual Learning"), for images from 8×8 on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.task import Recipe, Source, task

WIDTHS = (16, 32, 64, 128)
Norm = Callable[[int], nn.Module]


class Residual(nn.Module):
    """Two 3×3 convolutions with a norm each around a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResNet(nn.Module):
    """Images ``(n, channels, height, width)`` to logits ``(n, classes)``.

    channels, classes: of the data. widths: of the stages; each after the first halves the image. depth: residual blocks a stage.
    norm: of so many channels, BatchNorm by default. 700,986 parameters for 3 channels and 10 classes. Weights are torch's defaults.
    """

    def __init__(
        self, channels: int, classes: int, widths: tuple[int, ...] = WIDTHS, depth: int = 2, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        blocks, width = [], widths[0]
        for stage, wider in enumerate(widths):
            for place in range(depth):
                blocks.append(Residual(width, wider, stride=2 if stage and not place else 1, norm=norm))
                width = wider
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # half the time of the plain layout on the CPU
        hidden = self.blocks(self.stem(images))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


@task("resnet", steps=600)
def resnet(source: Source, tiny: bool, half: bool = False) -> ImageTask:
    """Eight residual blocks, 0.70M parameters, on images that are shifted and, in colour, mirrored at random; 128 a batch."""
    data = load(source)
    widths = (8, 16) if tiny else tuple(width // 2 for width in WIDTHS) if half else WIDTHS
    model = partial(ResNet, data.shape[0], data.classes, widths, 1 if tiny else 2)
    recipe = Recipe("resnet", tiny, "accuracy", 32 if tiny else 128, model, not tiny, "half" if half else "")
    return ImageTask(recipe, data, augmented=True)
