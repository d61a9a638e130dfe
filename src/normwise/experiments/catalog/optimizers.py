"""The optimizers that strategies are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.experiments.catalog.parts import axis
from normwise.experiments.framework.lattice import Axis


@dataclass(frozen=True)
class Optimizer:
    """label, about: for tables. lr: where to look for the learning rate. build: model and learning rate to an optimizer that decays
    nothing by itself, so that every strategy starts from the same one."""

    label: str
    lr: Axis
    build: Callable[[nn.Module, float], torch.optim.Optimizer]
    about: str


TORCH: dict[str, Optimizer] = {
    "gd": Optimizer("gradient descent", axis("lr", 0.4, 3.0), lambda m, lr: torch.optim.SGD(m.parameters(), lr), "torch's SGD"),
    "momentum": Optimizer(
        "momentum", axis("lr", 0.06, 3.0), lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9), "torch's SGD with momentum 0.9"
    ),
    "adam": Optimizer(
        "Adam", axis("lr", 0.005, 3.0), lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=0.0),
        "torch's AdamW without decay",
    ),
}
"""The article's optimizers: those that are compared where none are named."""


def _plain(
    name: str, own_rest: bool = False, on_spheres: bool = False, **columns: Any
) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The preset with these columns.

    Args:
        own_rest: with AdamW at the same learning rate for what it does not take: one rate is searched, as with every optimizer.
        on_spheres: from convolutions of the size that He et al. (2015) give them, which it then keeps: the article's 0.02 is a tenth of
            that and less, and on spheres so small the network does not learn.
    """

    def build(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        for w in (module.weight for module in model.modules() if on_spheres and isinstance(module, nn.Conv2d)):
            w.data *= (2 / w[0].numel()) ** 0.5 / w.detach().square().mean().sqrt()
        rest: dict[str, Any] = {"adamw": {"lr": lr}} if own_rest else {}
        optimizer: torch.optim.Optimizer = getattr(nw.optim, name)(model, lr, **rest, **columns)
        return optimizer

    return build


# What each learning rate means differs from preset to preset; the centres are from a first look at digits.
PRESETS: dict[str, Optimizer] = {
    "normalized_sgd": Optimizer(
        "normalised SGD", axis("lr", 0.06, 3.0), _plain("NormalizedSGD"), "each tensor's averaged gradient at length lr"
    ),
    "signum": Optimizer("Signum", axis("lr", 0.003, 3.0), _plain("Signum"), "the signs of the averaged gradient"),
    "lion": Optimizer("Lion", axis("lr", 0.003, 3.0), _plain("Lion"), "the signs of a mix of gradient and average"),
    "lars": Optimizer(
        "LARS", axis("lr", 0.3, 3.0), _plain("LARS", trust=0.02),
        "momentum with steps relative to each tensor's norm, trust 0.02: with the paper's 0.001 a rate that moves the weights would "
        "throw the biases, which have no ratio",
    ),
    "lamb": Optimizer("LAMB", axis("lr", 0.03, 3.0), _plain("LAMB"), "Adam with steps relative to each tensor's norm"),
    "muon": Optimizer(
        "Muon", axis("lr", 0.01, 3.0), _plain("Muon", own_rest=True, adjust_lr_fn="match_rms_adamw", weight_decay=0.0),
        "orthogonalised momentum for hidden matrices and convolutions, RMS-matched; AdamW at the same rate for the rest",
    ),
    "normuon": Optimizer(
        "NorMuon", axis("lr", 0.01, 3.0), _plain("NorMuon", own_rest=True, weight_decay=0.0),
        "Muon with units of equal step; AdamW at the same rate for the rest",
    ),
    "scion": Optimizer(
        "Scion", axis("lr", 0.01, 3.0), _plain("Scion", radius=8.0, head_radius=1.0),
        "unconstrained; radius 8 for convolutions, as in the paper, and 1 for the head: its 128 is for layers that are wider",
    ),
    "adamh": Optimizer(
        "AdamH", axis("lr", 0.01, 3.0), _plain("AdamH", own_rest=True, on_spheres=True),
        "Adam on spheres, of convolutions those of He's initial norm; AdamW at the same rate for the rest",
    ),
    "muonh": Optimizer(
        "MuonH", axis("lr", 0.02, 3.0), _plain("MuonH", own_rest=True, on_spheres=True),
        "Muon on spheres, of convolutions those of He's initial norm; AdamW at the same rate for the rest",
    ),
}  # fmt: skip
"""Presets of ``normwise.optim`` as optimizers, without weight decay. Their SGD and AdamW are torch's, and so gd, momentum and adam."""

OPTIMIZERS: dict[str, Optimizer] = {**TORCH, **PRESETS}
SPHERES = ("adamh", "muonh")
"""Those that keep their matrices on a sphere."""
