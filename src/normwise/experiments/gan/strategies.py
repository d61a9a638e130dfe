"""What the GAN study compares: rules and penalties on the discriminator, and one on the generator too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normwise.experiments.compare.search import Axis
from normwise.experiments.tasks.models.dcgan import Discriminator, Score, gradient_penalty, r1_penalty

Strengths = Mapping[str, float]
Penalty = Callable[[Score, Tensor, Tensor, torch.Generator | None], Tensor]
Rules = Callable[[Strengths], list[Any]]

LR = Axis("lr", 4e-3, 3.0)
"""Of both optimizers; a cell that looks for nothing else starts at a ninth of it to nine times it."""
TRACKED = 0.01
"""Tolerance of the caps: singular values at most 1.01 times the radius, at a small part of an exact cap's time."""

_BOUND = Axis("bound", 0.05, 3.0, off=1)
_RADIUS = Axis("radius", 2.0, 2.0, off=1)
_GENERATOR_RADIUS = Axis("generator_radius", 2.0, 2.0, off=1)
_PENALTY = Axis("penalty", 1.0, 10.0, off=-1)


def _no_rules(strengths: Strengths) -> list[Any]:
    return []


def _no_wrapping(discriminator: Discriminator) -> None:
    pass


@dataclass(frozen=True)
class Strategy:
    """label, about: for tables. axes: strengths to search, beside the learning rate. rules, generator_rules: strengths to the rules
    of the discriminator, of the generator. penalty: what strengths["penalty"] times is added to the discriminator's loss. wrap: what
    is done to the discriminator before anything else, for what is no rule."""

    label: str
    about: str
    axes: tuple[Axis, ...] = ()
    rules: Rules = _no_rules
    generator_rules: Rules = _no_rules
    penalty: Penalty | None = None
    wrap: Callable[[Discriminator], None] = _no_wrapping


def _clip(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.clip_weight_value(strengths["bound"], params="role:all")]


def _cap(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.spectral_cap(strengths["radius"], tolerance=TRACKED)]


def _generator_cap(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.spectral_cap(strengths["generator_radius"], tolerance=TRACKED)]


def _unit_spectral_norm(strengths: Strengths) -> list[Any]:
    import normwise as nw

    return [nw.spectral_normalize(1.0)]


def _parametrize(discriminator: Discriminator) -> None:
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.utils.parametrizations.spectral_norm(layer)


STRATEGIES: dict[str, Strategy] = {
    "nothing": Strategy("nothing", "no limit, no penalty: the baseline"),
    "clip_value": Strategy(
        "weight clipping", "the discriminator's entries in ±bound after its step, as in WGAN (Arjovsky et al., 2017)",
        (_BOUND,), _clip,
    ),
    "spectral_cap": Strategy("spectral cap", "singular values of the discriminator's layers at most the radius", (_RADIUS,), _cap),
    "spectral_normalize": Strategy(
        "spectral normalisation", "largest singular value of each layer 1 after each step, by a rule", rules=_unit_spectral_norm
    ),
    "torch_spectral_norm": Strategy(
        "torch's spectral_norm", "the parametrization of Miyato et al. (2018) as torch has it: the outside reference", wrap=_parametrize
    ),
    "gradient_penalty": Strategy(
        "gradient penalty", "strength · E (‖∇D‖ - 1)² between real and drawn images (Gulrajani et al., 2017)",
        (_PENALTY,), penalty=gradient_penalty,
    ),
    "r1": Strategy("R1", "strength · ½ E ‖∇D‖² at real images (Mescheder et al., 2018)", (_PENALTY,), penalty=r1_penalty),
    "spectral_cap+gradient_penalty": Strategy(
        "cap + gradient penalty", "the spectral cap and the gradient penalty", (_RADIUS, _PENALTY), _cap, penalty=gradient_penalty
    ),
    "spectral_cap+generator": Strategy(
        "cap on both", "the spectral cap on the generator too, with a radius of its own", (_RADIUS, _GENERATOR_RADIUS), _cap, _generator_cap
    ),
}  # fmt: skip


def axes(strategy: str) -> tuple[Axis, ...]:
    """What is searched: the learning rate, then the strategy's strengths."""
    return (LR, *STRATEGIES[strategy].axes)
