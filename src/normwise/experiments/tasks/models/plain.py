"""Convolutions without normalisation or shortcuts, in the manner of VGG (Simonyan & Zisserman, 2015), for images from 4×4 on."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.task import Recipe, Source, task

WIDTHS = (32, 64, 128)


class Plain(nn.Module):
    """Images ``(n, channels, height, width)`` to logits ``(n, classes)``: two 3×3 convolutions a stage, 2×2 max pooling between stages.

    widths: of the stages. Weights are drawn as He et al. (2015) do, which is what such a network needs in order to learn; biases are 0.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        sizes = [channels, *(width for width in widths for _ in range(2))]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.head = nn.Linear(widths[-1], classes)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.contiguous(memory_format=torch.channels_last)
        for place, conv in enumerate(self.convs):
            if place and place % 2 == 0:
                hidden = F.max_pool2d(hidden, 2)
            hidden = F.relu(conv(hidden))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


@task("plain", steps=500, held_out=True)
def plain(source: Source, tiny: bool) -> ImageTask:
    """Six convolutions, 0.29M parameters, on images that are shifted and, in colour, mirrored at random; 32 a batch."""
    data = load(source)
    model = partial(Plain, data.shape[0], data.classes, (8, 16) if tiny else WIDTHS)
    return ImageTask(Recipe("plain", tiny, "accuracy", 32, model, bf16=not tiny), data, augmented=True)
