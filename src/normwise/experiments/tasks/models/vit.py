"""A small vision transformer (Dosovitskiy et al., 2021): patches, learned places, pre-norm blocks, the mean over all patches."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.models.gpt import Block, initialise
from normwise.experiments.tasks.task import Recipe, Source, task

_LARGE_SIDE = 16


def patch_of(shape: tuple[int, int, int]) -> tuple[int, int]:
    """The side of a patch, 4 pixels from 16×16 on and 2 below, and how many patches an image of this shape has."""
    side = 4 if min(shape[1:]) >= _LARGE_SIDE else 2
    return side, (shape[1] // side) * (shape[2] // side)


class ViT(nn.Module):
    """Images ``(n, channels, height, width)`` of one size to logits ``(n, classes)``.

    shape: (channels, height, width) of an image. Blocks and weights are those of the character transformer, without its mask.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        side, count = patch_of(shape)
        self.patches = nn.Conv2d(shape[0], width, side, side)
        self.places = nn.Embedding(count, width)
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(patches + self.places.weight)).mean(1))
        return logits


@task("vit", steps=400)
def vit(source: Source, tiny: bool, half: bool = False) -> ImageTask:
    """Four blocks of width 96, 0.46M parameters, on images that are shifted and, in colour, mirrored at random; 32 a batch."""
    data = load(source)
    width, layers, heads = (32, 2, 2) if tiny else (48 if half else 96, 4, 4)
    model = partial(ViT, data.shape, data.classes, width, layers, heads)
    recipe = Recipe("vit", tiny, "accuracy", 32, model, not tiny, "half" if half else "")
    return ImageTask(recipe, data, augmented=True)
