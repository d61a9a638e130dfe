"""What every function here does to its input first and to its result last."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.errors import NormError
from normwise.norms.reduce import may_branch, up, wide


def as_batch(x: Tensor) -> Tensor:
    """``(..., m, n)`` as ``(b, m, n)``, a view where it can be. Stacked matrices stay apart: only leading axes are merged."""
    if x.ndim < 2:
        raise NormError(f"singular values need matrices (..., m, n), given shape {tuple(x.shape)}: reshape it first")
    if not x.is_floating_point():
        raise NormError(f"real floating-point matrices are needed, given {x.dtype}: convert them, or use view_as_real")
    return x.detach().reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def like_input(result: Tensor, x: Tensor) -> Tensor:
    """The result in the input's shape and dtype."""
    return result.to(x.dtype).reshape(x.shape)


def positive(norm: Tensor) -> Tensor:
    """The norm, or one where it is zero: a zero matrix divided by it stays zero."""
    return torch.where(norm == 0, 1.0, norm)


def peak(x: Tensor) -> Tensor:
    """The power of two above max ``|entry|`` of each matrix, as (..., 1, 1) in the compute dtype; NaN or inf if an entry is.

    Dividing by it is exact, and keeps squares within the dtype's range whatever the matrix's scale.
    """
    if 0 in x.shape[-2:]:
        return up(x).new_ones((*x.shape[:-2], 1, 1))
    largest = up(x.abs().amax((-2, -1), keepdim=True))
    exponent = torch.frexp(largest).exponent.clamp(max=127 if largest.dtype == torch.float32 else 1023)
    return torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), largest)


def by_peak(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """Matrices in their compute dtype over their :func:`peak`, and the peak: a number where it is free to read, as of one matrix on a CPU.

    One matrix is what a step of a small network has, where a tensor's call costs more than its arithmetic.
    """
    if x.numel() and math.prod(x.shape[:-2]) == 1 and may_branch(x):
        low, high = torch.aminmax(x)
        largest = max(-float(low), float(high))
        if largest < math.inf:    # false of NaN
            power = 2.0 ** min(math.frexp(largest)[1], 1023 if x.dtype == torch.float64 else 127)
            return up(x) / power, power
    highest = peak(x)
    return up(x) / highest, highest


def bounds(value: float | Tensor, x: Tensor) -> Tensor:
    """A bound as a tensor (b,) in the widest dtype of the device, from a number or one number a matrix, all >= 0."""
    bound = torch.as_tensor(value, dtype=wide(x.device), device=x.device)
    if bound.ndim > 1 or bound.numel() not in (1, x.shape[0]):
        raise NormError(f"a bound of shape {tuple(bound.shape)} for {x.shape[0]} matrices: give a number or one a matrix")
    if not bool((bound >= 0).all()):
        raise NormError(f"a bound on singular values must be a number >= 0, given {value}")
    return bound.expand(x.shape[0])
