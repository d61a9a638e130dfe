"""Norms of a matrix's singular values, by exact decomposition. The fast forms of the same maps are in ``normwise.norms.linalg``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normwise.norms.base import Norm, Radius, column, lifted, register
from normwise.norms.decompose import eigh, singular_values, svd
from normwise.norms.reduce import compute_dtype, may_branch, up, wide
from normwise.norms.vector import project_l1

DIGITS = 1e5    # radii: float64's rounding of a σ₁ below is a hundredth of fp32's of the radius
FAR = 4.0    # radii: beyond, singular vectors from fp32, orthonormal to a hundred eps, would show in what is rebuilt from many of them


def measured(x: Tensor) -> Tensor:
    """Singular values in the widest dtype, of fp32 matrices computed there: in fp32 σ₁ may be off by sixty eps. Halves round far above
    that, and are only computed there where a singular value is beyond fp32."""
    exact = wide(x.device)
    if x.dtype != torch.float32:
        s = singular_values(x).to(exact)
        if x.dtype == torch.float64 or bool(s.isfinite().all()):
            return s
    return singular_values(x.to(exact))


def svd_for(x: Tensor, radius: Radius = math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """What a matrix is rebuilt from: decomposed in float64 where some σ₁ is far above the radius, or beyond fp32's range."""
    u, s, vh = svd(x)
    if s.dtype != torch.float32 or not s.numel():
        return u, s, vh
    largest = torch.finfo(s.dtype).max
    far = s[:, :1] > (FAR * torch.as_tensor(column(radius, s), device=s.device)).clamp(max=largest)    # NaN is not: it stays as it is
    return svd(x.to(wide(x.device))) if bool(far.any()) else (u, s, vh)


def _rebuild(u: Tensor, s: Tensor, vh: Tensor, like: Tensor) -> Tensor:
    """U diag(s) Vᵀ, and the block of ``like`` where s is not finite."""
    usable = s.isfinite().all(1)[:, None, None]
    return torch.where(usable, (u * s[:, None, :]) @ vh, like.to(u.dtype)).to(like.dtype)


def _capped(x: Tensor, radius: Tensor) -> Tensor:
    """The projection of matrices that float64 holds with digits to spare, on a CPU: several times as fast as their SVD.

    λ₁(G) of the Gram matrix G of the shorter side is σ₁². Where r²I − G has a Cholesky decomposition σ₁ is below r, and a matrix stays as
    it is.
    """
    rows = (x if x.shape[1] <= x.shape[2] else x.mT).to(torch.float64)
    left = torch.bmm(rows, rows.mT).neg_()    # in place: a fresh megabyte costs more than the arithmetic on it
    left.diagonal(dim1=1, dim2=2).add_(radius.square()[:, None])
    outside = torch.linalg.cholesky_ex(left).info
    if not outside.any():
        return x
    if outside.all():    # as a rule that acts on everything finds them: no copies of what is at hand
        left.diagonal(dim1=1, dim2=2).sub_(radius.square()[:, None])
        return cut(x, radius, known=(rows, left.neg_()))
    chosen = outside.nonzero().flatten()
    return x.index_copy(0, chosen, cut(x[chosen], radius[chosen]))


def cut(
    x: Tensor, radius: Radius, vectors_in: torch.dtype = torch.float64, known: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Takes away what the eigenvectors of the Gram matrix above r² have too much, ``(b, m, n)``, on a CPU.

    The exact projection; ``linalg.cap_singular_values`` does the same in fp32, on any device, and aims a hair below the cap.

    Args:
        x: fp32 or narrower.
        radius: a number or one a matrix, > 0.
        vectors_in: fp32 is twice as fast, and right to its own rounding: for whoever looks afterwards whether the matrices are inside.
        known: the matrices in float64, their shorter side first, and their Gram matrices, where somebody has them.
    """
    flat, limit = x if x.shape[1] <= x.shape[2] else x.mT, radius[:, None] if isinstance(radius, Tensor) else radius
    rows = flat.to(torch.float64) if known is None else known[0]
    gram = torch.bmm(rows, rows.mT) if known is None else known[1]
    try:
        values, vectors = torch.linalg.eigh(gram.to(vectors_in))
    except RuntimeError:    # not finite, or no convergence
        values, vectors = eigh(gram)
    s, vectors = values.to(torch.float64).clamp_(min=0).sqrt_(), vectors.to(torch.float64)
    too_much = (1 - limit / s).nan_to_num_(0, 0, 0).clamp_(min=0)
    found = torch.baddbmm(rows, vectors * too_much[:, None, :], vectors.mT @ rows, alpha=-1)
    if not bool((s[:, -1:] <= DIGITS * limit).all()):    # the difference would carry the rounding of σ₁; or not finite
        return _rebuilt(x, radius)
    return (found if flat is x else found.mT).to(x.dtype)


def _rebuilt(x: Tensor, radius: Radius) -> Tensor:
    """The projection by SVD. Rebuilt rather than x minus what exceeds: the difference carries the rounding of σ₁, which may be many times
    the radius."""
    u, s, vh = svd_for(x, radius)
    capped = s.minimum(torch.as_tensor(column(radius, s), dtype=s.dtype, device=s.device))
    return torch.where((capped < s).any(1)[:, None, None], _rebuild(u, capped, vh, x), x)


@dataclass(frozen=True)
class Spectral(Norm):
    """σ₁, the largest singular value: the 2→2 operator norm. Dual: Nuclear. Its LMO is the (negative) polar factor, Muon's direction."""

    name: ClassVar[str] = "spectral"
    matrix: ClassVar[bool] = True
    level: ClassVar[int | None] = 2
    polar: ClassVar[bool] = True

    @property
    def dual_norm(self) -> Norm:
        return Nuclear()

    def decomposition_error(self, shape: tuple[int, ...]) -> tuple[float, float]:
        return 0.0, math.sqrt(sum(shape))

    def measure(self, x: Tensor) -> Tensor:
        if 0 in x.shape[1:]:
            return up(x).new_zeros(x.shape[0])
        return measured(x)[:, 0]

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        if may_branch(x) and x.dtype != torch.float64 and x.numel():
            return _capped(x, torch.as_tensor(radius, dtype=torch.float64).expand(len(x)))
        return _rebuilt(x, radius)

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        u, s, vh = svd_for(lifted(x, decomposed=True))
        # What is no more than the rounding of x, in whatever it was decomposed, has no direction.
        kept = s > s[:, :1] * (max(x.shape[1:]) * torch.finfo(compute_dtype(x.dtype)).eps)
        kept = torch.where(s.isfinite(), kept.to(s.dtype), s)
        return -_rebuild(u, kept * column(radius, s), vh, x)


@dataclass(frozen=True)
class Nuclear(Norm):
    """Σσ, the sum of the singular values (trace norm). Dual: Spectral. Its prox soft-thresholds the singular values."""

    name: ClassVar[str] = "nuclear"
    matrix: ClassVar[bool] = True
    level: ClassVar[int | None] = 4

    @property
    def dual_norm(self) -> Norm:
        return Spectral()

    def squared_over_l2(self, shape: tuple[int, ...]) -> float:
        return min(shape)

    def decomposition_error(self, shape: tuple[int, ...]) -> tuple[float, float]:
        return math.sqrt(min(shape, default=1)) / 4, math.sqrt(sum(shape))    # zero singular values come back as noise, which adds up

    def measure(self, x: Tensor) -> Tensor:
        return measured(x).sum(1)

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        u, s, vh = svd_for(x, radius)
        shrunk = project_l1(s, radius)
        return torch.where((shrunk < s).any(1)[:, None, None], _rebuild(u, shrunk, vh, x), x)

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        u, s, vh = svd_for(lifted(x, decomposed=True))
        top = torch.zeros_like(s)
        top[:, :1] = torch.where(s[:, :1].isfinite(), s[:, :1].sign(), s[:, :1])
        return -_rebuild(u, top * column(radius, s), vh, x)

    def prox(self, x: Tensor, step: Radius) -> Tensor:
        """Singular values soft-thresholded at ``step``; written on them, so that the rank falls exactly."""
        self.check(x, step)
        u, s, vh = svd_for(x)
        return _rebuild(u, (s - column(step, s)).clamp(min=0), vh, x)


register(Spectral(), Nuclear())
