"""The spectral norm σ₁ without a decomposition: lower bounds by power iteration, upper bounds that include their rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.errors import NormError, nearest
from normwise.norms.linalg import paths
from normwise.norms.linalg.checks import as_batch, peak, positive
from normwise.norms.reduce import root_sum_squares, up, wide


def power_iteration(x: Tensor, v: Tensor | None = None, steps: int = 1) -> tuple[Tensor, Tensor]:
    """A lower bound of σ₁ and the vector that attains it: v ← xᵀx v / ‖xᵀx v‖, then ‖x v‖.

    ‖x v‖ <= σ₁ for every unit v. What rounding may add is taken off, so the bound stays below σ₁ of the numbers given. From a random
    start its relative error after k steps is expected to be at most 0.44 ln(n) / (k - 1) (Kuczyński, Woźniakowski 1992), and it falls
    as (σ₂/σ₁)^(4k). Zero matrices give 0; matrices that are not finite give NaN, and their v starts again next time.

    Args:
        x: (b, m, n).
        v: (b, n) from the previous call (warm start), or None for a fixed pseudo-random start; it is not changed.

    Returns:
        (bound (b,), v (b, n)), fp32 or float64.
    """
    batch = up(as_batch(x))
    if v is None:
        v = start_vectors(batch, 1).squeeze(-1)
    if batch.numel() == 0:
        return batch.new_zeros(len(batch)), v
    scale = peak(batch)
    y = batch / scale
    w = torch.where(v.isfinite().all(1, keepdim=True), v, 1.0).to(y.dtype).unsqueeze(-1)
    w = _unit(w, w)
    for _ in range(steps):
        w = _unit(y.mT @ (y @ w), w)
    reached = torch.linalg.vector_norm(y @ w, dim=(-2, -1)) * scale[:, 0, 0]
    bound = reached * (1 - _rounding(sum(y.shape[1:]) + 8, y.dtype))
    # Of subnormal numbers rounding is no share: they are a fixed distance apart.
    bound = torch.where(bound < torch.finfo(bound.dtype).smallest_normal, torch.nextafter(bound, torch.zeros_like(bound)), bound)
    return bound, w.squeeze(-1)


def start_vectors(x: Tensor, count: int) -> Tensor:
    """(b, n, count) pseudo-random normal columns in x's dtype: the same for every call, whatever the global seed."""
    generator = torch.Generator().manual_seed(20)
    block = torch.randn(x.shape[-1], count, generator=generator, dtype=torch.float64)
    return block.to(x).expand(x.shape[0], -1, -1)


def upper_bound(x: Tensor, method: str = "gram", steps: int = 3) -> Tensor:
    """A number that σ₁ of each matrix does not exceed, rounding included: every product is allowed its worst case γ_k = k u/(1 − k u).

    Delattre et al. 2023, arXiv 2305.16173, Gram iteration; Higham 2002, section 3.5, for γ_k.

    Args:
        x: (b, m, n).
        method: ``"gram"`` ‖(xᵀx)^(2^(steps-1))‖_F^(1/2^steps), the Schatten-2^(steps+1) norm: at most r^(1/2^(steps+1)) times too large
            for rank r (1.54 for 1024 equal singular values at 3 steps; 1 for rank one). ``"holder"`` √(‖x‖₁ ‖x‖_∞), the largest column
            sum times the largest row sum: one reading of x, often far off.
        steps: products of ``"gram"``, all but the first on the small side.

    Returns:
        (b,), in the widest dtype of the device.

    Raises:
        NormError: an unknown method, or fewer than one step.
    """
    batch = up(as_batch(x))
    if method not in _UPPER:
        raise NormError(f"unknown upper bound {method!r}.{nearest(method, _UPPER)}")
    if batch.numel() == 0:
        return batch.new_zeros(batch.shape[0])
    scale = peak(batch)
    bound = _UPPER[method](batch / scale, steps) * scale[:, 0, 0]
    return bound.to(wide(x.device)) * (1 + _rounding(16, batch.dtype))


def _holder_bound(y: Tensor, steps: int) -> Tensor:
    size = y.abs()
    product = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    return product.sqrt() * (1 + _rounding(sum(y.shape[1:]), y.dtype))


def _gram_bound(y: Tensor, steps: int) -> Tensor:
    """With H₀ = yᵀy / f₀ and H_k = H_{k-1}² / f_k, all of Frobenius norm one: ‖H_{k-1}‖² <= f_k ‖H_k‖ + what rounding hid."""
    if steps < 1:
        raise NormError(f"the Gram bound needs at least one step, got steps={steps}")
    total = root_sum_squares(y.flatten(1))
    y = y / positive(total).to(y.dtype)[:, None, None]
    factors, h = [], paths.gram(y)
    for _ in range(steps):
        factors.append(root_sum_squares(h.flatten(1)))
        h = h / positive(factors[-1]).to(h.dtype)[:, None, None]
        h = h @ h if len(factors) < steps else h
    hidden = _rounding(max(y.shape[1:]) + 8, y.dtype)
    bound = torch.ones_like(factors[0])
    for factor in factors[:0:-1]:
        bound = (factor * bound * (1 + hidden) + hidden).sqrt()
    return (factors[0] * bound * (1 + hidden) + hidden).sqrt() * total * (1 + hidden)


_UPPER = {"gram": _gram_bound, "holder": _holder_bound}


def _rounding(operations: int, dtype: torch.dtype) -> float:
    """γ_k: the largest relative error of a sum of k products."""
    unit = torch.finfo(dtype).eps / 2
    return operations * unit / (1 - operations * unit)


def _unit(w: Tensor, fallback: Tensor) -> Tensor:
    """w scaled to length one; where w is zero (a zero matrix, or a start in its null space) the fallback."""
    length = torch.linalg.vector_norm(w, dim=-2, keepdim=True)
    return torch.where(length == 0, fallback, w / positive(length))
