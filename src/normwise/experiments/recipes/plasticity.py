"""Plasticity: can a network still learn after its labels were reshuffled again and again?

The same images get new random labels sixty times. Each time the network goes on from the weights that it has, with Adam, whose state it
keeps, and the accuracy over all batches of one shuffle, each before its step, says how fast it memorises them (Lyle et al., Understanding
plasticity in neural networks, 2023; Kumar et al., Maintaining plasticity via regenerative regularization, 2023).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.framework.lattice import Axis
from normwise.experiments.recipes.recipe import BASELINE, Arm, Column, Recipe, RecipeRun
from normwise.experiments.tasks.data.splits import load

IMAGES, WIDTH, EPOCHS, BATCH = 256, 64, 10, 32
LAST = 10
EVERYTHING = "role:all"
NORMALISED = "LayerNorm"

ARMS = {
    "nothing": Arm("nothing", role=BASELINE),
    "l2_init": Arm(
        "L2-init", lambda n: [nw.l2_penalty(n["strength"], params=EVERYTHING, center="init")],
        (Axis("strength", (3e-3,), ratio=3.0, off=-1),), BASELINE,
    ),
    "shrink": Arm(
        "shrink", lambda n: [nw.weight_decay(n["strength"], params=EVERYTHING)], (Axis("strength", (0.1,), ratio=10.0, off=-1),), BASELINE
    ),
    "layer_norm": Arm("LayerNorm", role=BASELINE, variant=NORMALISED),
    "clip_weights": Arm(    # Elsayed et al., Weight clipping for deep continual and reinforcement learning, 2024
        "weight clipping", lambda n: [nw.clip_weight_value(nw.radii.Init(n["k"]), params=EVERYTHING)],
        (Axis("k", (2.0,), ratio=1.5, off=1),),
    ),
    "project": Arm(         # Lyle et al., Normalization and effective learning rates in reinforcement learning, 2024
        "normalise and project", lambda n: [nw.unit_norm("init", per="tensor")], variant=NORMALISED
    ),
    "spectral_cap": Arm(    # once an epoch: at every step it would take longer than the step
        "spectral cap", lambda n: [nw.spectral_cap(nw.radii.Init(n["k"]), every=IMAGES // BATCH)], (Axis("k", (1.5,), ratio=1.5, off=1),)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shuffled:
    """Images ``(n, pixels)`` whose labels the runs draw. key, facts: of the source."""

    images: Tensor
    key: str
    facts: dict[str, Any]


def shuffled(source: Any) -> Shuffled:
    data = load(source)
    images = data.tensors("train")[0][:IMAGES].flatten(1)
    return Shuffled(images, data.key, {"name": data.name, "train": len(images), "classes": 10})


@dataclass(frozen=True)
class PlasticityRun(RecipeRun):
    """size: how many times the labels are reshuffled."""

    kind: ClassVar[str] = "recipe plasticity"
    unit: ClassVar[str] = "reshuffles"
    figures: ClassVar[tuple[str, ...]] = ("last", "first", "end", "dead", "norm")

    def measured(self, context: Shuffled) -> tuple[int, dict[str, float]]:
        """Of the accuracy while a shuffle is learnt ``first`` is that of the first one, ``last`` the mean over the last ten; ``end`` is
        their mean accuracy when they are learnt. ``dead``: the share of ReLUs that no image opens. ``norm``: of all parameters, end
        over start. What acted: blocks of the last step."""
        torch.manual_seed(self.seed)
        chance, images, arm = torch.Generator().manual_seed(self.seed), context.images, ARMS[self.arm]
        model = mlp(images.shape[1], arm.variant == NORMALISED)
        optimizer = torch.optim.Adam(model.parameters(), self.numbers["lr"], fused=True)
        control = nw.attach(model, optimizer, arm.rules(self.numbers))
        size = length(model)
        learning, ends = [], []
        for _ in range(self.size):
            labels = torch.randint(10, (len(images),), generator=chance)
            learning.append(epochs(model, optimizer, images, labels, chance))
            ends.append(float((model(images).argmax(1) == labels).float().mean()))
        return sum(control.violations().values()), {
            "first": learning[0], "last": statistics.fmean(learning[-LAST:]), "end": statistics.fmean(ends[-LAST:]),
            "dead": dead(model, images), "norm": length(model) / size,
        }  # fmt: skip


def mlp(pixels: int, normalised: bool) -> nn.Sequential:
    """Two hidden layers. normalised: with a LayerNorm without gain or shift before each ReLU."""
    layers: list[nn.Module] = []
    for inputs in (pixels, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), *([nn.LayerNorm(WIDTH, elementwise_affine=False)] if normalised else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, chance: torch.Generator) -> float:
    """Trains on one shuffle; the accuracy over all its batches, each before its step."""
    right = torch.zeros((), dtype=torch.int64)
    for rows in [rows for _ in range(EPOCHS) for rows in torch.split(torch.randperm(len(images), generator=chance), BATCH)]:
        answers = model(images[rows])
        right += (answers.detach().argmax(1) == labels[rows]).sum()
        optimizer.zero_grad()
        nn.functional.cross_entropy(answers, labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return right.item() / (EPOCHS * len(images))


def length(model: nn.Module) -> float:
    """The L2 norm of all parameters."""
    return float(nn.utils.parameters_to_vector(model.parameters()).detach().norm())


@torch.no_grad()
def dead(model: nn.Sequential, images: Tensor) -> float:
    """The share of ReLUs whose output is zero for every image."""
    silent = []
    for layer in model:
        images = layer(images)
        silent += [images.amax(0) <= 0] if isinstance(layer, nn.ReLU) else []
    return float(torch.cat(silent).float().mean())


PLASTICITY = Recipe(
    "Which arm still learns new labels after sixty reshuffles?", PlasticityRun, ARMS, Axis("lr", (3e-3,), ratio=3.0), 60, shuffled,
    {"": {"last": Column("accuracy, last 10"), "first": Column("accuracy, first"), "end": Column("at the end of each of the last 10"),
          "dead": Column("dead units", 2, higher=False), "norm": Column("norm, end / start", 2, higher=False)}},
)  # fmt: skip
