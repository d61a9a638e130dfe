"""Sets that are no norm balls but have a nearest point: the box, the non-negative orthant, the orthogonal matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normwise.errors import NormError
from normwise.norms.base import Norm, Radius, Set, check_blocks, check_real, column
from normwise.norms.reduce import floor_to, max_abs, up
from normwise.norms.spectral import Spectral, _rebuild, svd_for


@dataclass(frozen=True)
class Box(Set):
    """Every entry within [low, high].

    Args:
        low, high: the ends, low <= high; either may be infinite.

    Raises:
        NormError: an end that is NaN, or low > high.
    """

    low: float
    high: float
    name: ClassVar[str] = "box"

    def __post_init__(self) -> None:
        if math.isnan(self.low) or math.isnan(self.high) or self.low > self.high:
            raise NormError(f"Box(low={self.low}, high={self.high}) holds nothing: give low <= high")

    @property
    def interval(self) -> tuple[float, float]:  # type: ignore[override]
        return self.low, self.high

    def project(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        """The clamp, its ends rounded inwards to numbers of x's dtype, so that the result is within them exactly."""
        check_real(self.name, x)
        return x.clamp(-float(floor_to(-self.low, x.dtype)), float(floor_to(self.high, x.dtype)))

    def excess(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        check_real(self.name, x)
        work = up(x)
        return max_abs((work - work.clamp(self.low, self.high)).flatten(1))


@dataclass(frozen=True)
class NonNegative(Set):
    """Every entry ≥ 0."""

    name: ClassVar[str] = "non_negative"
    interval = 0.0, math.inf

    def project(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        check_real(self.name, x)
        return x.clamp(min=0)

    def excess(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        check_real(self.name, x)
        return max_abs(x.clamp(max=0).flatten(1))


@dataclass(frozen=True)
class Orthogonal(Set):
    """Matrices whose shorter side is orthonormal, times ``radius``. The nearest one is radius·UVᵀ (the polar factor)."""

    name: ClassVar[str] = "orthogonal"
    matrix: ClassVar[bool] = True
    needs_radius: ClassVar[bool] = True
    separable: ClassVar[bool] = False
    sphere: ClassVar[Norm | None] = Spectral()

    def project(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        check_blocks(self.name, self.matrix, x, radius)
        u, s, vh = svd_for(x)
        nonzero = s[:, :1] > 0
        target = torch.where(s.isfinite() & nonzero, torch.ones_like(s), s)
        return _rebuild(u, target * column(radius, s), vh, x)

    def excess(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        """max|σ − radius|, the distance in the spectral norm."""
        check_blocks(self.name, self.matrix, x, radius)
        _, s, _ = svd_for(x)
        return max_abs(s - column(radius, s))
