"""Mixed norms of a matrix: the L2 norms of its units (rows) or of its inputs (columns), summed or at their largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from normwise.norms.base import Norm, Radius, beyond, clip_factor, column, lifted, radial_factor, register, times, unless_broken
from normwise.norms.reduce import max_abs, root_sum_squares, sum_abs
from normwise.norms.vector import one_hot_direction, project_l1

Over = Literal["units", "inputs"]


@dataclass(frozen=True)
class _Mixed(Norm):
    over: Over = "units"
    _kind: ClassVar[str]
    matrix: ClassVar[bool] = True
    oriented: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self._kind}_of_{self.over}"

    def vectors(self, x: Tensor) -> Tensor:
        """``(b, m, n)`` seen as ``(b, vectors, entries)``."""
        return x if self.over == "units" else x.mT

    def lengths(self, x: Tensor) -> Tensor:
        """The L2 norm of each vector, ``(b, vectors)``."""
        v = self.vectors(x)
        return root_sum_squares(v.flatten(0, 1)).view(v.shape[:2])

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        """``x`` with each vector multiplied by its factor, ``(b, vectors)``."""
        return times(x, factors.unsqueeze(2 if self.over == "units" else 1))


@dataclass(frozen=True)
class MaxOfUnits(_Mixed):
    """The largest L2 norm of a unit, the 2→∞ operator norm ("max-norm"); over inputs, the 1→2 norm. Dual: SumOfUnits."""

    _kind: ClassVar[str] = "max"
    level: ClassVar[int | None] = 1

    @property
    def dual_norm(self) -> Norm:
        return SumOfUnits(self.over)

    def measure(self, x: Tensor) -> Tensor:
        return max_abs(self.lengths(x))

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        lengths = self.lengths(x)
        return unless_broken(x, self.scaled(x, clip_factor(lengths, column(radius, lengths))))

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        x = lifted(x)
        lengths = self.lengths(x)
        factor = radial_factor(lengths, column(radius, lengths))
        toward = self.scaled(x, factor)
        return self.lmo(toward, radius) if x.dtype == torch.float64 and beyond(factor) else -toward


@dataclass(frozen=True)
class SumOfUnits(_Mixed):
    """The L2 norms of the units summed: the group lasso's norm (Yuan & Lin, 2006). Dual: MaxOfUnits."""

    _kind: ClassVar[str] = "sum"
    level: ClassVar[int | None] = 5

    @property
    def dual_norm(self) -> Norm:
        return MaxOfUnits(self.over)

    def squared_over_l2(self, shape: tuple[int, ...]) -> float:
        return shape[0 if self.over == "units" else -1]

    def measure(self, x: Tensor) -> Tensor:
        return sum_abs(self.lengths(x))

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        lengths = self.lengths(x)
        return self.scaled(x, shrink_ratio(project_l1(lengths, radius), lengths))

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        x = lifted(x)
        lengths = self.lengths(x)
        ratio = shrink_ratio(one_hot_direction(lengths, radius), lengths)
        toward = self.scaled(x, ratio)
        return self.lmo(-toward, radius) if x.dtype == torch.float64 and beyond(-ratio) else toward


def shrink_ratio(new: Tensor, old: Tensor) -> Tensor:
    """new / old where old is a positive finite length, else 1: zero vectors stay zero, others that mean nothing are left alone."""
    ratio = new / old
    if ratio.dtype == torch.float64:    # a unit of subnormal length, see ``beyond``
        ratio = torch.where((old > 0) & old.isfinite(), ratio.clamp(-torch.finfo(ratio.dtype).max, torch.finfo(ratio.dtype).max), ratio)
    return torch.where((old > 0) & ratio.isfinite(), ratio, 1.0)


register(SumOfUnits(), MaxOfUnits(), SumOfUnits("inputs"), MaxOfUnits("inputs"))
