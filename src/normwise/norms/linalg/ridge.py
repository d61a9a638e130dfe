"""The pseudo-inverse with a ridge, transposed: large singular values of a direction come out small, and tiny ones stay tiny."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from normwise.errors import NormError
from normwise.norms.decompose import svd
from normwise.norms.linalg import paths
from normwise.norms.linalg.checks import as_batch, by_peak, like_input, positive
from normwise.norms.reduce import may_branch, wide

EVICTS_FROM, APART = 128, 8
"""torch clears the upper triangle of a factor row by row though it stores columns. Columns that lie a multiple of 512 bytes apart evict
each other from the cache meanwhile, from 128 on: at 256 that is most of the factorisation. Some rows and columns more move them apart."""


def ridge_inverse(x: Tensor, damping: float) -> Tensor:
    """``(Y Yᵀ + δ I)⁻¹ Y`` of Y = X / s: each singular value t of Y becomes t / (t² + δ). s² is the mean of X's squared singular values.

    For δ → 0 this is the transposed pseudo-inverse (Moore-Penrose), for δ → ∞ X itself up to a factor; no result exceeds 1/(2√δ),
    which t = √δ becomes. The scale of X does not matter. It is the u that minimises ½‖Yᵀu‖² + ½δ‖u‖² − ⟨y, u⟩ for every column y of Y:
    a natural gradient by the direction's own second moment (Amari 1998), damped as by Levenberg (1944) and Marquardt (1963).

    It takes two products and an inverse by Cholesky on the smaller side: 4 m² n + m³ operations for m <= n, in fp32 or float64. A zero
    matrix stays zero; a matrix that is not finite becomes NaN, and the others do not.

    Args:
        x: real matrices (..., m, n), each for itself.
        damping: δ > 0.

    Raises:
        NormError: x is not a real floating-point matrix, or damping is not a number above zero.
    """
    if not (isinstance(damping, int | float) and not isinstance(damping, bool) and 0 < damping < math.inf):
        raise NormError(f"a ridge needs a damping > 0, given {damping!r}: 0.03 of the mean square is a good start")
    batch = as_batch(x)
    if not batch.numel():
        return x.detach().clone()
    with torch.no_grad():
        return like_input(paths.run(partial(_ridge, damping=damping), batch), x)


def _ridge(x: Tensor, damping: float) -> Tensor:
    """Of a batch of matrices, or of one."""
    y, highest = by_peak(x)
    tall = y.shape[-2] > y.shape[-1]
    inverse, failed = _inverse(y.mT @ y if tall else y @ y.mT, damping)
    found = y @ inverse if tall else inverse @ y
    if failed is None:
        return found
    again = failed if isinstance(highest, float) else failed & highest.isfinite()[..., 0, 0]
    if bool(again.any()):    # a damping below the rounding of the Gram matrix leaves it no factor, but singular values it has
        found[again] = _by_svd(y[again], damping).to(found.dtype)
    return found


def _by_svd(y: Tensor, damping: float) -> Tensor:
    u, s, vh = svd(y.to(wide(y.device)))
    square = positive(s.square().mean(1, keepdim=True))
    return (u * (s * square.sqrt() / (s.square() + damping * square))[:, None, :]) @ vh


def _inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor | None]:
    """s·(G + δ s² I)⁻¹, s² the mean eigenvalue, and where there is none, which is NaN: an entry is not finite, or δ below rounding. None
    where that is nowhere, and free to know.

    The inverse is formed, though its solution for many columns is all that is wanted: products are several times as fast as triangular
    solutions, and the damping bounds the condition number by m/δ.
    """
    size = gram.shape[-1]
    square = positive(gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
    if gram.device.type == "cpu" and size >= EVICTS_FROM and size * gram.itemsize % 512 == 0:
        gram = pad(gram, (0, APART, 0, APART))    # of zeros: with the damping, a matrix beside this one that is factored by itself
    gram.diagonal(dim1=-2, dim2=-1).add_(damping * square)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if may_branch(gram) and not any(failed.view(-1).tolist()) and all(map(math.isfinite, square.view(-1).tolist())):
        return torch.cholesky_inverse(factor)[..., :size, :size].mul_(square.sqrt()[..., None]), None
    wrong = (failed != 0) | ~square[..., 0].isfinite()
    scale = torch.where(wrong[..., None], torch.nan, square.sqrt())
    # cholesky_inverse raises on a factor with a zero on its diagonal
    factor = torch.where(wrong[..., None, None], torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), factor)
    return torch.cholesky_inverse(factor)[..., :size, :size].mul_(scale[..., None]), wrong
