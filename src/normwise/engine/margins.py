"""How far inside a bound to aim, so that it still holds once the result is rounded to the weights' dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.norms import Norm, Radius, Set
from normwise.norms.reduce import HALF, floor_to


def relative_margin(norm: Norm, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    """The relative distance to keep from the bound, for blocks of ``shape``; what the tests find at worst is about half of it.

    fp32: what the norm says of itself (``Norm.rounding``), and a decomposition's error beside. fp16 and bf16: 1 eps, twice the worst
    rounding; 2 for matrices, whose norms move more than their entries do. float64 is measured in float64, which errs by a share of √n eps.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return eps * (32 + math.sqrt(math.prod(shape)) + 16 * (min(shape, default=1) if norm.matrix else 0))
    noise, in_fp32 = norm.decomposition_error(shape)
    if dtype in HALF:
        return eps * ((2 if norm.matrix else 1) + noise)
    return eps * (norm.rounding + in_fp32 + noise)


def inside(
    radius: Radius, norm: Norm | Set, dtype: torch.dtype, shape: tuple[int, ...], center_norm: Radius = 0.0, entrywise: bool = False
) -> Radius:
    """The radius to aim at so that ‖x‖ ≤ radius holds for blocks of ``shape`` after rounding.

    ``entrywise``: each entry is clamped, so that a bound rounded towards zero is exact. Around a center c the sum c + x is what gets
    rounded, which moves it by up to half an ulp of ‖c‖ + radius.
    """
    if isinstance(norm, Set):
        return radius
    if entrywise and not isinstance(center_norm, Tensor):
        return floor_to(radius, dtype)
    drift = (center_norm + radius) * (torch.finfo(dtype).eps / 2 if isinstance(center_norm, Tensor) else 0.0)
    aimed = radius * (1 - relative_margin(norm, dtype, shape)) - drift - subnormal(norm, dtype, shape)
    return aimed.clamp(min=0) if isinstance(aimed, Tensor) else max(aimed, 0.0)


def shy(radius: Radius, margin: float, center_norm: Radius = 0.0) -> Radius:
    """The radius to start from where computing the weight anew changes its norm by up to the share ``margin``."""
    kept = radius - margin * (radius + center_norm)
    return kept.clamp(min=0) if isinstance(kept, Tensor) else max(kept, 0.0)


def subnormal(norm: Norm, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    """What rounding adds where entries are subnormal, as in fp16 those of a long block of norm 0.1 are: half a step of each entry."""
    base, scale = norm.unscaled(shape)
    info = torch.finfo(dtype)
    return scale * math.sqrt(base.squared_over_l2(shape) * math.prod(shape)) * info.smallest_normal * info.eps / 2


def room(low: float, radius: Radius, aimed: Radius, margin: float) -> Radius:
    """``aimed``, where a block can keep a hair (``margin``, relatively) from both ``low`` and ``radius``; ``radius`` where these are too
    near to each other."""
    raised = low * (1 + margin)
    if isinstance(aimed, Tensor):
        return torch.where(aimed >= raised, aimed, torch.as_tensor(radius, dtype=aimed.dtype, device=aimed.device))
    return aimed if aimed >= raised else radius


def least(low: Radius, aimed: Radius, margin: float) -> Radius:
    """The lower bound to aim at, a hair above ``low`` unless that is beyond what is aimed at from above."""
    raised = low * (1 + margin)
    if isinstance(aimed, Tensor):
        above, at = (torch.as_tensor(end, dtype=aimed.dtype, device=aimed.device) for end in (raised, low))    # two floats would be fp32
        return torch.where(aimed >= raised, above, at)
    return raised if aimed >= raised else low
