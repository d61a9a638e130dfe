"""Norms of a block's entries. A matrix is treated as the vector of its entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normwise.norms.base import Norm, Radius, column, register
from normwise.norms.reduce import max_abs, root_sum_squares, sum_abs, up
from normwise.norms.simplex import clamp_symmetric, project_l1


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
    """‖x‖_∞ = max|x|. Its dual is L1; its projection is the entrywise clamp, its LMO the sign."""

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
        return clamp_symmetric(x, column(radius, x))

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        return (-column(radius, x) * up(x).sign()).to(x.dtype)


def one_hot_direction(x: Tensor, radius: Radius) -> Tensor:
    """−radius·sign(x_k)·e_k at the entry k of largest magnitude: a vertex of the L1 ball; 0 for a zero row. ``(b, n)``."""
    if x.shape[1] == 0:
        return x.clone()
    work = up(x)
    k = work.abs().argmax(dim=1, keepdim=True)
    step = -column(radius, work) * work.gather(1, k).sign()
    return torch.zeros_like(work).scatter_(1, k, step).to(x.dtype)


register(L1(), L2(), LInf())
