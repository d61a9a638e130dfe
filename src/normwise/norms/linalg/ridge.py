"""The pseudo-inverse with a ridge, transposed: large singular values of a direction come out small, and tiny ones stay tiny."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.errors import NormError
from normwise.norms.linalg.checks import as_batch, like_input, peak, positive
from normwise.norms.reduce import up


def ridge_inverse(x: Tensor, damping: float) -> Tensor:
    """``(Y Yᵀ + δ I)⁻¹ Y`` of Y = X / s: each singular value t of Y becomes t / (t² + δ). s² is the mean of X's squared singular values.

    x: real matrices (..., m, n), each its own; returns a new tensor of the same shape and dtype. damping: δ > 0. For δ → 0 this is
    the transposed pseudo-inverse (Moore-Penrose), for δ → ∞ X itself but for a factor; no result exceeds 1/(2√δ), which t = √δ becomes.
    Whatever the scale of X, the result is the same. It is the u that minimises ½‖Yᵀu‖² + ½δ‖u‖² − ⟨y, u⟩ for every column y of Y: a
    natural gradient by the direction's own second moment (Amari 1998), damped as by Levenberg (1944) and Marquardt (1963).

    A product, a Cholesky factor and its solution on the smaller side: 4 m² n + m³/3 operations for m <= n, in fp32 or float64.
    A zero matrix stays zero; a matrix that is not finite becomes NaN, alone.
    Raises NormError for what is not a real floating-point matrix, and for a damping that is no number above zero.
    """
    if not (isinstance(damping, int | float) and not isinstance(damping, bool) and 0 < damping < math.inf):
        raise NormError(f"a ridge needs a damping > 0, given {damping!r}: 0.03 of the mean square is a good start")
    batch = as_batch(x)
    if not batch.numel():
        return x.detach().clone()
    with torch.no_grad():
        y = up(batch) / peak(batch)
        tall = y.shape[1] > y.shape[2]
        solved = _solve(y.mT if tall else y, damping)
        return like_input(solved.mT if tall else solved, x)


def _solve(y: Tensor, damping: float) -> Tensor:
    """For m <= n; NaN where there is no factor, which is where an entry is not finite."""
    y = y / positive(torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)) * math.sqrt(y.shape[1])
    gram = y @ y.mT
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.where((failed == 0)[:, None, None], torch.cholesky_solve(y, factor), torch.nan)
