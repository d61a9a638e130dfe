"""The residual network with GroupNorm (Wu & He, 2018) in the place of BatchNorm: nothing depends on the batch."""

from __future__ import annotations

from functools import partial

from torch import nn

from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.models.resnet import WIDTHS, ResNet
from normwise.experiments.tasks.task import Recipe, Source, task


def groups_of_eight(channels: int) -> nn.GroupNorm:
    """GroupNorm over groups of eight channels."""
    return nn.GroupNorm(max(1, channels // 8), channels)


@task("resnet_gn", steps=400, held_out=True)
def resnet_gn(source: Source, tiny: bool) -> ImageTask:
    """Four residual blocks, 0.31M parameters, on images that are shifted and, in colour, mirrored at random; 64 a batch."""
    data = load(source)
    model = partial(ResNet, data.shape[0], data.classes, (8, 16) if tiny else WIDTHS, 1, groups_of_eight)
    return ImageTask(Recipe("resnet_gn", tiny, "accuracy", 32 if tiny else 64, model, bf16=not tiny), data, augmented=True)
