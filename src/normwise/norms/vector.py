"""Norms of a block's entries. A matrix is treated as the vector of its entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normwise.norms.base import Norm, Radius, column, register
from normwise.norms.reduce import max_abs, root_sum_squares, sum_abs, up, wide


@dataclass(frozen=True)
class L2(Norm):
    """‖x‖₂ = √Σx²; of a matrix the Frobenius norm. Its own dual."""

    name: ClassVar[str] = "l2"
    p: ClassVar[float | None] = 2.0
    radial: ClassVar[bool] = True
    rounding: ClassVar[float] = 8.0
    level: ClassVar[int | None] = 3

    @property
    def dual_norm(self) -> Norm:
        return self

    def measure(self, x: Tensor) -> Tensor:
        return root_sum_squares(x.flatten(1))

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        return self.clip_norm(x, radius)

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        return -self.normalize(x, radius)


@dataclass(frozen=True)
class L1(Norm):
    """‖x‖₁ = Σ|x|. Its dual is LInf; its prox is the soft threshold."""

    name: ClassVar[str] = "l1"
    p: ClassVar[float | None] = 1.0
    level: ClassVar[int | None] = 6

    @property
    def dual_norm(self) -> Norm:
        return LInf()

    def squared_over_l2(self, shape: tuple[int, ...]) -> float:
        return math.prod(shape)

    def measure(self, x: Tensor) -> Tensor:
        return sum_abs(x.flatten(1))

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        return project_l1(x.flatten(1), radius).view(x.shape)

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        return one_hot_direction(x.flatten(1), radius).view(x.shape)


@dataclass(frozen=True)
class LInf(Norm):
    """‖x‖_∞ = max|x|. Its dual is L1; its projection is the entrywise clamp, its LMO the sign.

    As with ``torch.clamp``, an infinity is clamped like every number, and NaN stays, in its own entry alone.
    """

    name: ClassVar[str] = "linf"
    p: ClassVar[float | None] = math.inf
    separable: ClassVar[bool] = True
    rounding: ClassVar[float] = 8.0
    level: ClassVar[int | None] = 0

    @property
    def dual_norm(self) -> Norm:
        return L1()

    def measure(self, x: Tensor) -> Tensor:
        return max_abs(x.flatten(1))

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        limit = column(radius, x)
        if isinstance(limit, Tensor):
            return torch.clamp(x, -limit.to(x.dtype), limit.to(x.dtype))
        if limit > torch.finfo(x.dtype).max:    # a number that the dtype cannot hold is refused by clamp
            return x.clone()
        return torch.clamp(x, -limit, limit)

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        return (-column(radius, x) * up(x).sign()).to(x.dtype)


def project_l1(x: Tensor, radius: Radius) -> Tensor:
    """The nearest point of the L1 ball, row by row, ``(b, n)``; rows inside, and rows that are not finite, come back as they are.

    max(|x| − θ, 0) with the θ ≥ 0 at which the sum is the radius, by sorting (Held, Wolfe & Crowder, 1974; Duchi et al., 2008).
    """
    if x.shape[1] == 0:
        return x.clone()
    total, work = sum_abs(x), up(x)
    limit = radius if not isinstance(radius, Tensor) else radius.to(total.dtype)
    outside = (total > limit) & total.isfinite()
    # In terms of how far each size is below the largest, which is exact, and not of θ itself: of sizes a million radii large θ would have
    # lost the digits that the radius is made of.
    size = work.abs().to(wide(x.device))
    below = size - size.amax(1, keepdim=True)
    ordered = below.sort(dim=1, descending=True).values
    counts = torch.arange(1, size.shape[1] + 1, device=size.device, dtype=size.dtype)
    left = (column(limit, size) - ordered.cumsum(1)) / counts    # of the largest, if so many are left
    active = (ordered + left > 0).sum(1, keepdim=True).clamp(min=1)
    lowered = (below + left.gather(1, active - 1)).clamp(min=0)
    return torch.where(outside[:, None], torch.copysign(lowered, work).to(work.dtype), work).to(x.dtype)


def one_hot_direction(x: Tensor, radius: Radius) -> Tensor:
    """−radius·sign(x_k)·e_k at the entry k of largest magnitude: a vertex of the L1 ball; 0 for a zero row. ``(b, n)``."""
    if x.shape[1] == 0:
        return x.clone()
    work = up(x)
    k = work.abs().argmax(dim=1, keepdim=True)
    step = -column(radius, work) * work.gather(1, k).sign()
    return torch.zeros_like(work).scatter_(1, k, step).to(x.dtype)


register(L1(), L2(), LInf())
