"""A small MLP-Mixer (Tolstikhin et al., 2021): one MLP across the patches, one across the channels, in turns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.models.vit import patch_of
from normwise.experiments.tasks.task import Recipe, Source, task


class MLP(nn.Module):
    """Two layers with a GELU between them, over the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Mixing(nn.Module):
    """``(n, patches, width)``: an MLP over the patches and one over the channels, each added to what it read."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across, self.within = MLP(count, 2 * count), MLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    """Images ``(n, channels, height, width)`` of one size to logits ``(n, classes)``. Weights are torch's defaults."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 96, layers: int = 4) -> None:
        super().__init__()
        side, count = patch_of(shape)
        self.patches = nn.Conv2d(shape[0], width, side, side)
        self.blocks = nn.Sequential(*[Mixing(count, width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(patches)).mean(1))
        return logits


@task("mixer", steps=500, held_out=True)
def mixer(source: Source, tiny: bool) -> ImageTask:
    """Four blocks of width 96, 0.37M parameters, on images that are shifted and, in colour, mirrored at random; 32 a batch."""
    data = load(source)
    model = partial(Mixer, data.shape, data.classes, *((32, 2) if tiny else (96, 4)))
    return ImageTask(Recipe("mixer", tiny, "accuracy", 32, model, bf16=not tiny), data, augmented=True)
