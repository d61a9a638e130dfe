"""Reductions that keep what a dtype can hold: fp16 and bf16 accumulate in fp32, no representable norm overflows or is flushed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.norms import native

# Squares of 128 numbers are summed in fp32, the chunks in float64: as fast as one fp32 pass on a CPU, and accurate to about 3e-8.
CHUNK = 128
# Of columns so many entries are squared at a time: a megabyte, which the cache holds until they are summed.
STRIPE_ENTRIES = 1 << 18
# Below these an fp32 or float64 sum of squares has lost digits to underflow, and the block is measured again, scaled by its largest entry.
TRUSTED_FROM = {torch.float32: 1e-15, torch.float64: 1e-140}
HALF = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on ``dtype`` is done in: float32 for fp16 and bf16, the dtype itself otherwise."""
    return torch.float32 if dtype in HALF else dtype


def up(x: Tensor) -> Tensor:
    """``x`` in its compute dtype, itself where it already is."""
    return x.to(compute_dtype(x.dtype))


def wide(device: torch.device) -> torch.dtype:
    """The widest accumulator a device has: float64, or float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def may_branch(x: Tensor) -> bool:
    """Whether reading a number is free: on the CPU, outside of a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def sum_abs(x: Tensor) -> Tensor:
    """``(b, n) -> (b,)``, Σ|x|, accumulated wide."""
    if not may_branch(x):
        return torch.linalg.vector_norm(x, 1, dim=1, dtype=wide(x.device))
    value = _chunked(x, 1.0)
    beyond = value.isinf()
    if bool(beyond.any()):    # 128 numbers may add up beyond fp32, though none of them is
        value = value.index_put((beyond,), x[beyond].to(value.dtype).abs().sum(1))
    return value


def max_abs(x: Tensor) -> Tensor:
    """``(b, n) -> (b,)``, max|x|, 0 for an empty block; NaN stays NaN."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    return up(x.abs().amax(dim=1))


def root_sum_squares(x: Tensor) -> Tensor:
    """``(b, n) -> (b,)``, the L2 norm of each row, accumulated wide; the result may be wider than ``x``."""
    if not may_branch(x):
        if x.dtype != torch.float64 and wide(x.device) == torch.float64:
            return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        return _scaled(x)
    if not (x.requires_grad and torch.is_grad_enabled()) and (found := native.row_norms(x)) is not None:
        return found
    value = _chunked(x, 2.0)
    if not value.numel():
        return value
    low, high = torch.aminmax(value)
    trusted = TRUSTED_FROM[torch.float64 if x.dtype == torch.float64 else torch.float32]
    if trusted <= float(low) and float(high) < math.inf:
        return value
    # Squares left the range: such rows are measured again.
    doubtful = ~(value >= trusted) | value.isinf()
    again = _scaled(x[doubtful]) if x.dtype == torch.float64 else torch.linalg.vector_norm(x[doubtful].to(torch.float64), dim=1)
    if value.requires_grad:    # the derivative of a sum that overflowed is NaN, whatever becomes of the sum
        value = _chunked(x.masked_fill(doubtful[:, None], 0.0), 2.0)
    return value.index_put((doubtful,), again.to(value.dtype))


def _chunked(x: Tensor, order: float) -> Tensor:
    """Of rows on a CPU."""
    rows, n = x.shape
    dtype = compute_dtype(x.dtype)
    if n <= CHUNK:
        return torch.linalg.vector_norm(x, order, dim=1, dtype=dtype).to(torch.float64)
    whole = n // CHUNK * CHUNK
    parts = torch.linalg.vector_norm(x[:, :whole].reshape(rows, -1, CHUNK), order, dim=2, dtype=dtype)
    if whole < n:
        parts = torch.cat([parts, torch.linalg.vector_norm(x[:, whole:], order, dim=1, keepdim=True, dtype=dtype)], 1)
    # Converted first: the CPU kernel with dtype=float64 on fp32 input is a hundred times slower.
    return torch.linalg.vector_norm(parts.to(torch.float64), order, dim=1)


def column_norms(x: Tensor) -> Tensor:
    """``(n, b) -> (b,)``, the L2 norm of each column of a contiguous fp32 matrix on a CPU, without gathering the columns.

    Squares are summed as in :func:`root_sum_squares`, 128 in fp32 and the sums in float64, in stripes that stay in the cache.
    Where there are no kernels: torch's norm along the first axis reads far more slowly than memory gives.
    """
    n, b = x.shape
    stripe = max(1, STRIPE_ENTRIES // max(1, b) // CHUNK) * CHUNK
    total, squares = x.new_zeros(b, dtype=torch.float64), x.new_empty(min(n, stripe), b)
    for start in range(0, n, stripe):
        part = x[start : start + stripe]
        kept = torch.mul(part, part, out=squares[: len(part)])
        whole = len(part) // CHUNK * CHUNK
        if whole:
            total += kept[:whole].view(-1, CHUNK, b).sum(1).to(torch.float64).sum(0)
        if whole < len(part):
            total += kept[whole:].sum(0)
    value = total.sqrt_()
    if value.numel():
        low, high = torch.aminmax(value)
        if not (TRUSTED_FROM[torch.float32] <= float(low) and float(high) < math.inf):
            doubtful = ~(value >= TRUSTED_FROM[torch.float32]) | value.isinf()
            value[doubtful] = torch.linalg.vector_norm(x[:, doubtful].to(torch.float64), dim=0)    # whose squares float64 holds
    return value


def _scaled(x: Tensor) -> Tensor:
    """The L2 norm as max|x| times the norm of x / max|x|: two passes, never out of range."""
    largest = max_abs(x)
    usable = (largest > 0) & largest.isfinite()
    safe = torch.where(usable, largest, 1.0)
    value = torch.linalg.vector_norm(up(x) / safe[:, None], dim=1).to(wide(x.device)) * safe.to(wide(x.device))
    return torch.where(usable, value, largest.to(value.dtype))


def floor_to(bound: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The largest number of ``dtype`` that is not above ``bound``: 0.1 is no bf16 number, and its nearest is 0.10009."""
    exact = bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=torch.float64)
    nearest = exact.to(dtype)
    if dtype == torch.float16:    # torch.nextafter does not know it; a part in 1024 less, rounded again, is one or two numbers further down
        info = torch.finfo(dtype)
        below = (exact - exact.abs() * info.eps - info.smallest_normal * info.eps).clamp(max=info.max).to(dtype)
    else:
        below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    rounded = torch.where(nearest.to(exact.dtype) > exact, below, nearest)
    return rounded if isinstance(bound, Tensor) else float(rounded)
