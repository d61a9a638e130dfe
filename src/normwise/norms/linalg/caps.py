"""Maps of singular values: capping them (the projection onto the spectral ball) and soft-thresholding them.

Two ways to cap once and for all: an SVD, and eigenvectors of the small Gram matrix where σ₁ is not far above the cap. ``tracking.py``
has the third, which follows the largest singular vectors through training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normwise.errors import NormError, nearest
from normwise.norms.decompose import eigh, svd
from normwise.norms.linalg import paths
from normwise.norms.linalg.checks import as_batch, bounds, like_input, peak, positive
from normwise.norms.linalg.spectral_norm import upper_bound
from normwise.norms.reduce import up, wide
from normwise.norms.spectral import Nuclear

GRAM_DOMAIN = 4.0  # up to this many caps the Gram matrix, whose errors are relative to σ₁², tells what exceeds
METHODS = ("auto", "gram", "exact")


def cap_singular_values(x: Tensor, cap: float | Tensor, method: str = "auto") -> Tensor:
    """argmin ‖Y − X‖_F over σ₁(Y) <= cap: U min(Σ, cap) Vᵀ, as a new tensor.

    Matrices that are surely inside (an upper bound with its rounding says so) and those that are not finite come back bit for bit.
    What exceeds is set to cap (1 − 32 eps), 4e-6 below for fp32, so that σ₁ <= cap (1 + 1e-6) in float64 after rounding. fp16 and bf16
    are computed in fp32, and rounding the result to them can add 2⁻⁹ of its Frobenius norm. Reading which matrices exceed takes one
    synchronisation on a GPU.

    Args:
        x: (..., m, n).
        cap: a number or one a matrix (b,), >= 0.
        method: ``"gram"`` uses eigenvectors of the small Gram matrix, several times faster, and the SVD where σ₁ may exceed 4 caps;
            ``"auto"`` is the same; ``"exact"`` always uses the SVD.

    Raises:
        NormError: x is not a stack of matrices, or a cap is below zero.
    """
    if method not in METHODS:
        raise NormError(f"unknown method {method!r} for capping singular values.{nearest(method, METHODS)}")
    batch = as_batch(x)
    limit, out = bounds(cap, batch), batch.clone()
    finite = batch.isfinite().flatten(1).all(1)
    reach = upper_bound(torch.where(finite[:, None, None], batch, 0.0))
    near = (reach <= GRAM_DOMAIN * limit) & (method != "exact")
    _replace(out, finite & (reach > limit) & near, limit, _by_gram)
    _replace(out, finite & (reach > limit) & ~near, limit, _by_svd)
    return like_input(out, x)


def soft_threshold_singular_values(x: Tensor, threshold: float | Tensor) -> Tensor:
    """argmin ½‖Y − X‖_F² + t Σσ(Y) = U max(Σ − t, 0) Vᵀ, by SVD: the prox of the nuclear norm, with exact rank.

    Cai, Candès, Shen 2010, "A Singular Value Thresholding Algorithm".

    Args:
        x: (..., m, n).
        threshold: t, a number or one a matrix (b,), >= 0.

    Raises:
        NormError: x is not a stack of matrices, or a threshold is below zero.
    """
    batch = as_batch(x)
    return like_input(Nuclear().prox(batch, bounds(threshold, batch)), x) if batch.numel() else x.detach().clone()


def _replace(out: Tensor, which: Tensor, limit: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    chosen = which.nonzero().squeeze(-1)
    if chosen.numel():
        work = up(out[chosen])
        scale = peak(work)    # a power of two; neither the squares in a Gram matrix nor their sums then leave the range
        capped = function(work / scale, (limit[chosen] / scale[:, 0, 0]).to(work.dtype)[:, None])
        out[chosen] = (capped * scale).to(out.dtype)


def inward(dtype: torch.dtype) -> float:
    """How far below the cap to aim, as a share: what the rounding of decomposition and product adds to σ₁."""
    return 32 * torch.finfo(dtype).eps


def _by_svd(x: Tensor, limit: Tensor) -> Tensor:
    """Takes the excess away, which keeps the digits of what is inside, unless x is so large that its own rounding would show.

    In float64: vectors from fp32 are orthonormal to a hundred eps, and where all of them come to the cap, that is how far σ₁ is off.
    """
    work = x.to(wide(x.device))
    u, s, vh = svd(work)
    limit = limit.to(s.dtype)
    kept = torch.where(s > limit, limit * (1 - inward(x.dtype)), s)
    rebuilt = (u * kept[:, None, :]) @ vh
    reduced = work - (u * (s - kept)[:, None, :]) @ vh
    return torch.where((s[:, :1] > 2 * limit)[..., None], rebuilt, reduced).to(x.dtype)


def _by_gram(x: Tensor, limit: Tensor) -> Tensor:
    """Every σᵢ > limit (b, 1) lowered to it, by the orthonormal singular vectors of the short side and their images, of norm σᵢ."""
    short_rows = x.shape[-2] < x.shape[-1]
    vectors = eigh(paths.gram(x if short_rows else x.mT))[1].mT
    images = short_images(x, vectors)
    sigma = torch.linalg.vector_norm(images, dim=-1)
    excess = torch.where(sigma > limit, 1 - limit * (1 - inward(x.dtype)) / positive(sigma), 0.0)
    left, right = (vectors, images) if short_rows else (images, vectors)
    return torch.baddbmm(x, (left * excess[..., None]).mT, right, alpha=-1)


def short_images(x: Tensor, vectors: Tensor) -> Tensor:
    """What x makes of vectors of its short side, as rows: (b, k, min(m, n)) -> (b, k, max(m, n)).

    Rows, since a product with few columns is several times slower on a CPU.
    """
    return vectors @ (x if x.shape[-2] < x.shape[-1] else x.mT)
