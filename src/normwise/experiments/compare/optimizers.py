"""The optimizers that ``compare`` trains with: three of torch's, as the article has them, and the presets of ``normwise.optim``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normwise.experiments.compare.search import Axis


@dataclass(frozen=True)
class OptimizerChoice:
    """label: for tables. lr: where to look for the learning rate. build: model and learning rate to an optimizer that decays
    nothing by itself, so that every strategy starts from the same one. about: one line."""

    label: str
    lr: Axis
    build: Callable[[nn.Module, float], torch.optim.Optimizer]
    about: str


def _gd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _momentum(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


TORCH: dict[str, OptimizerChoice] = {
    "gd": OptimizerChoice("gradient descent", Axis("lr", 0.4, 3.0), _gd, "torch's SGD"),
    "momentum": OptimizerChoice("momentum", Axis("lr", 0.06, 3.0), _momentum, "torch's SGD with momentum 0.9"),
    "adam": OptimizerChoice("Adam", Axis("lr", 0.005, 3.0), _adam, "torch's AdamW without decay"),
}
"""The article's optimizers: those that are compared where none are named."""


def _preset(name: str, **columns: Any) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The preset with these columns."""

    def build(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        import normwise as nw

        optimizer: torch.optim.Optimizer = getattr(nw.optim, name)(model, lr, **columns)
        return optimizer

    return build


def _with_adamw(name: str, **columns: Any) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The preset, with AdamW at the same learning rate for what it does not take: one rate is searched, as with every optimizer."""
    return lambda model, lr: _preset(name, adamw={"lr": lr}, **columns)(model, lr)


def _on_spheres(name: str) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The preset, from matrices of the size that He et al. (2015) give them, which it then keeps: the article's 0.02 is a tenth of
    that and less, and on spheres so small the network does not learn."""

    def build(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                _resize(module.weight)
        return _with_adamw(name)(model, lr)

    return build


@torch.no_grad()
def _resize(weight: torch.Tensor) -> None:
    """Scales the weight to the root mean square √(2/inputs of a unit)."""
    weight *= (2 / weight[0].numel()) ** 0.5 / weight.square().mean().sqrt()


# What each learning rate means differs from preset to preset; the centres are from a first look at digits.
PRESETS: dict[str, OptimizerChoice] = {
    "normalized_sgd": OptimizerChoice(
        "normalised SGD", Axis("lr", 0.06, 3.0), _preset("NormalizedSGD"), "each tensor's averaged gradient at length lr"
    ),
    "signum": OptimizerChoice("Signum", Axis("lr", 0.003, 3.0), _preset("Signum"), "the signs of the averaged gradient"),
    "lion": OptimizerChoice("Lion", Axis("lr", 0.003, 3.0), _preset("Lion"), "the signs of a mix of gradient and average"),
    "lars": OptimizerChoice(
        "LARS", Axis("lr", 0.3, 3.0), _preset("LARS", trust=0.02),
        "momentum with steps relative to each tensor's norm, trust 0.02: with the paper's 0.001 a rate that moves the weights would "
        "throw the biases, which have no ratio",
    ),
    "lamb": OptimizerChoice("LAMB", Axis("lr", 0.03, 3.0), _preset("LAMB"), "Adam with steps relative to each tensor's norm"),
    "muon": OptimizerChoice(
        "Muon", Axis("lr", 0.01, 3.0), _with_adamw("Muon", adjust="match_rms_adamw", weight_decay=0.0),
        "orthogonalised momentum for the convolutions, RMS-matched; AdamW at the same rate for head and biases",
    ),
    "normuon": OptimizerChoice(
        "NorMuon", Axis("lr", 0.01, 3.0), _with_adamw("NorMuon", weight_decay=0.0),
        "Muon with units of equal step; AdamW at the same rate for head and biases",
    ),
    "scion": OptimizerChoice(
        "Scion", Axis("lr", 0.01, 3.0), _preset("Scion", radius=8.0, head_radius=1.0),
        "unconstrained; radius 8 for convolutions, as in the paper, and 1 for the head: its 128 is for layers that are wider",
    ),
    "adamh": OptimizerChoice(
        "AdamH", Axis("lr", 0.01, 3.0), _on_spheres("AdamH"),
        "Adam on spheres of He's initial norm for the convolutions; AdamW at the same rate for head and biases",
    ),
    "muonh": OptimizerChoice(
        "MuonH", Axis("lr", 0.02, 3.0), _on_spheres("MuonH"),
        "Muon on spheres of He's initial norm for the convolutions; AdamW at the same rate for head and biases",
    ),
}  # fmt: skip
"""Presets of ``normwise.optim`` as optimizers, without weight decay. Their SGD and AdamW are torch's, and so gd, momentum and adam."""

OPTIMIZERS: dict[str, OptimizerChoice] = {**TORCH, **PRESETS}
SPHERES = ("adamh", "muonh")
"""Those that keep their matrices on a sphere."""
