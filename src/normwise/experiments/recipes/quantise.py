"""Quantisation: which rule leaves weights that bear rounding to four bits?

An MLP learns images; then the entries of every matrix are rounded to the nearest of 15 levels, k·s with k from −7 to 7 and one scale s for
each tensor, as in post-training quantisation (Nagel et al., A white paper on neural network quantization, 2021). Biases stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.framework.lattice import Axis
from normwise.experiments.recipes.plasticity import mlp
from normwise.experiments.recipes.recipe import BASELINE, Arm, Column, Recipe, RecipeRun
from normwise.experiments.tasks.data.splits import ImageData, load

BATCH, BITS, EVERY = 32, 4, 8
SEARCHED = "searched scale"
_K = (Axis("k", (2.0,), ratio=1.5, off=1),)

ARMS = {
    "nothing": Arm("nothing", role=BASELINE),
    "scale": Arm("searched scale", role=BASELINE, variant=SEARCHED),
    "decay": Arm("weight decay", lambda n: [nw.weight_decay(n["strength"])], (Axis("strength", (0.1,), ratio=10.0, off=-1),), BASELINE),
    "clip": Arm("clip by value", lambda n: [nw.clip_weight_value(nw.radii.Init(n["k"]))], _K),
    "max_norm": Arm("max-norm", lambda n: [nw.max_norm(nw.radii.Init(n["k"]))], _K),
    "cap": Arm("spectral cap", lambda n: [nw.spectral_cap(nw.radii.Init(n["k"]), every=EVERY)], _K),
}


@dataclass(frozen=True)
class Pictures:
    """Images in three parts. key, facts: of the source."""

    parts: ImageData
    key: str
    facts: dict[str, Any]


def pictures(source: Any) -> Pictures:
    parts = load(source)
    sizes = {part: len(getattr(parts, part)) for part in ("train", "validation", "test")}
    return Pictures(parts, parts.key, {"name": parts.name, **sizes, "classes": parts.classes})


@dataclass(frozen=True)
class QuantiseRun(RecipeRun):
    """size: how many steps the network learns for."""

    kind: ClassVar[str] = "recipe quantise"
    unit: ClassVar[str] = "steps"
    figures: ClassVar[tuple[str, ...]] = ("four", "three", "before", "error")

    def measured(self, context: Pictures) -> tuple[int, dict[str, float]]:
        """The accuracies with weights of four and three bits and ``before`` rounding, on validation images for trials and test images for
        reported runs; ``error``: ‖Q(w) − w‖/‖w‖ of all matrices at four bits."""
        torch.manual_seed(self.seed)
        arm = ARMS[self.arm]
        images, labels = context.parts.tensors("train")
        model = mlp(images[0].numel(), normalised=False)
        optimizer = torch.optim.Adam(model.parameters(), self.numbers["lr"], fused=True)
        control = nw.attach(model, optimizer, arm.rules(self.numbers))
        acted = 0
        for _ in range(self.size):
            rows = torch.randint(len(images), (BATCH,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows].flatten(1)), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            acted += sum(control.violations().values())
        return acted, rounded(model, context, self.full, arm.variant == SEARCHED)


@torch.no_grad()
def rounded(model: nn.Module, data: Pictures, full: bool, searched: bool) -> dict[str, float]:
    """What rounding the matrices does to a network; the network is left rounded."""
    images, labels = data.parts.tensors("test" if full else "validation")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    kept = [p.clone() for p in matrices]

    def accuracy() -> float:
        return float((model(images.flatten(1)).argmax(1) == labels).float().mean())

    found = {"before": accuracy()}
    for name, bits in (("three", BITS - 1), ("four", BITS)):
        for p, w in zip(matrices, kept, strict=True):
            p.copy_(quantised(w, bits, searched))
        found[name] = accuracy()
    gap, size = (torch.stack([t.norm() for t in side]).norm() for side in ([p - w for p, w in zip(matrices, kept, strict=True)], kept))
    return {**found, "error": float(gap / size)}


def quantised(w: Tensor, bits: int, searched: bool = False) -> Tensor:
    """Each entry at the nearest of the levels k·s, |k| ≤ 2^(bits − 1) − 1. s reaches the largest entry; searched: or the share of it, from
    0.2 on, at which the squared error is least (Banner et al., 2019)."""
    most = 2 ** (bits - 1) - 1
    shares = torch.linspace(0.2, 1.0, 41) if searched else torch.ones(1)
    tried = [(w / s).round().clamp(-most, most) * s for s in w.abs().max() * shares / most]
    return min(tried, key=lambda q: float((q - w).square().sum()))


QUANTISE = Recipe(
    "Which arm is most accurate with weights of four bits?", QuantiseRun, ARMS, Axis("lr", (3e-3,), ratio=3.0), 600, pictures,
    {"": {"four": Column("accuracy, 4 bits"), "three": Column("accuracy, 3 bits"), "before": Column("accuracy before"),
          "error": Column("rounding error", higher=False)}},
)  # fmt: skip
