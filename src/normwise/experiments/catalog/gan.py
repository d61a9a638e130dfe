"""The strategies that train a GAN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normwise.experiments.catalog.parts import Strengths, axis, rule
from normwise.experiments.framework.lattice import Axis
from normwise.experiments.tasks.models.dcgan import Discriminator, Score, gradient_penalty, r1_penalty

Penalty = Callable[[Score, Tensor, Tensor, torch.Generator | None], Tensor]
Rules = Callable[[Strengths], list[Any]]

LR = axis("lr", 0.004, 3.0)
"""Of both optimizers; a cell that looks for nothing else starts at a ninth of it to nine times it."""
TRACKED = 0.01
"""Tolerance of the caps: singular values at most 1.01 times the radius, at a small part of an exact cap's time."""

_RADIUS = axis("radius", 2.0, off=1)
_PENALTY = axis("penalty", 1.0, 10.0, off=-1)
_cap = rule("spectral_cap", "radius", tolerance=TRACKED)


@dataclass(frozen=True)
class GanStrategy:
    """label, about: for tables. axes: strengths to search, beside the learning rate. rules, generator_rules: strengths to the rules
    of the discriminator, of the generator. penalty: what strengths["penalty"] times is added to the discriminator's loss. wrap: what
    is done to the discriminator before anything else, for what is no rule."""

    label: str
    about: str
    axes: tuple[Axis, ...] = ()
    rules: Rules = lambda strengths: []
    generator_rules: Rules = lambda strengths: []
    penalty: Penalty | None = None
    wrap: Callable[[Discriminator], None] = lambda discriminator: None

    @property
    def tuned(self) -> tuple[Axis, ...]:
        """What is searched: the learning rate, then the strategy's strengths."""
        return (LR, *self.axes)


def _parametrize(discriminator: Discriminator) -> None:
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.utils.parametrizations.spectral_norm(layer)


GAN_STRATEGIES: dict[str, GanStrategy] = {
    "nothing": GanStrategy("nothing", "no limit, no penalty: the baseline"),
    "clip_value": GanStrategy(
        "weight clipping", "the discriminator's entries in ±bound after its step, as in WGAN (Arjovsky et al., 2017)",
        (axis("bound", 0.05, 3.0, off=1),), rule("clip_weight_value", "bound", params="role:all"),
    ),
    "spectral_cap": GanStrategy("spectral cap", "singular values of the discriminator's layers at most the radius", (_RADIUS,), _cap),
    "spectral_normalize": GanStrategy(
        "spectral normalisation", "largest singular value of each layer 1 after each step, by a rule",
        rules=rule("spectral_normalize", radius=1.0),
    ),
    "torch_spectral_norm": GanStrategy(
        "torch's spectral_norm", "the parametrization of Miyato et al. (2018) as torch has it: the outside reference", wrap=_parametrize
    ),
    "gradient_penalty": GanStrategy(
        "gradient penalty", "strength · E (‖∇D‖ - 1)² between real and drawn images (Gulrajani et al., 2017)",
        (_PENALTY,), penalty=gradient_penalty,
    ),
    "r1": GanStrategy("R1", "strength · ½ E ‖∇D‖² at real images (Mescheder et al., 2018)", (_PENALTY,), penalty=r1_penalty),
    "spectral_cap+gradient_penalty": GanStrategy(
        "cap + gradient penalty", "the spectral cap and the gradient penalty", (_RADIUS, _PENALTY), _cap, penalty=gradient_penalty
    ),
    "spectral_cap+generator": GanStrategy(
        "cap on both", "the spectral cap on the generator too, with a radius of its own", (_RADIUS, axis("generator_radius", 2.0, off=1)),
        _cap, rule("spectral_cap", "generator_radius", tolerance=TRACKED),
    ),
}  # fmt: skip
