"""A small U-Net (Ronneberger et al., 2015) that takes the noise from images: regression on what it is not shown."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.denoising import DenoisingTask
from normwise.experiments.tasks.task import Recipe, Source, task


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3×3 convolutions, each with a ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """Images ``(n, channels, height, width)`` to images of the same shape.

    channels: of the data. width: of the outer stage; it doubles with each of two poolings. Weights are torch's defaults.
    """

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.outer, self.middle, self.inner = double(channels, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up_middle, self.up_outer = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join_middle, self.join_outer = double(4 * width, 2 * width), double(2 * width, width)
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % 4, 0, -height % 4)).contiguous(memory_format=torch.channels_last)
        outer = self.outer(padded)
        middle = self.middle(F.max_pool2d(outer, 2))
        inner = self.inner(F.max_pool2d(middle, 2))
        joined = self.join_middle(torch.cat((self.up_middle(inner), middle), 1))
        clean: Tensor = self.out(self.join_outer(torch.cat((self.up_outer(joined), outer), 1)))
        return clean[..., :height, :width]


@task("unet", steps=500, held_out=True)
def unet(source: Source, tiny: bool) -> DenoisingTask:
    """Two poolings, width 16 to 64, 0.12M parameters; 32 images a batch, which are shifted and, in colour, mirrored at random."""
    data = load(source)
    model = partial(UNet, data.shape[0], 8 if tiny else 16)
    return DenoisingTask(Recipe("unet", tiny, "loss", 32, model, bf16=not tiny), data, augmented=True)
