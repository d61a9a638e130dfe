"""Which path a batch of matrices takes: the one place that chooses looped or batched, direct or Gram, blocked or whole.

Every path gives the same result up to rounding; the thresholds are measurements (``normwise bench polar``, docs/linalg.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from normwise.norms import cuda_kernels

CHUNK = 1 << 19      # entries worked on at once on a CPU: temporaries then stay in the cache instead of being paged in anew
BLOCKS_FROM = 1024   # from here on skipping the upper triangle of x xᵀ gains more than copying it costs
BLOCKS = 4           # panels of x xᵀ: (1 + 1/4) / 2 of the products are left
GRAM_ASPECT = 2      # long side / short side from which two steps on one Gram matrix cost less than two on the matrix


def bf16_pays(device: torch.device) -> bool:
    """Whether a product in bf16 is no slower than one in fp32. On an x86 CPU without AVX-512 it took 49 times as long (256²)."""
    return device.type != "cpu" or _cpu_has_avx512()


@cache
def _cpu_has_avx512() -> bool:
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_f", True))    # another architecture does not say


def at_once(shape: torch.Size, device: torch.device) -> int:
    """How many matrices of a batch (b, m, n) go through one batched product; 1 is a loop over plain products.

    On a CPU a large matrix fills the cores alone (a loop from 1024² on), small ones only together.
    """
    batch, rows, columns = shape
    return batch if device.type != "cpu" else max(1, min(batch, CHUNK // (rows * columns)))


def steps_per_gram(shape: torch.Size) -> int:
    """How many steps of an iteration are taken on one Gram matrix before it is formed anew from the iterate: 1 or 2.

    Two pay for themselves where the short side is small, and are the most that bf16 bears: what is lost below 2⁻⁹ of
    the largest eigenvalue is then recovered from the iterate; four diverge at a condition number of 1000.
    """
    return 2 if max(shape[-2:]) >= GRAM_ASPECT * min(shape[-2:]) else 1


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` on the batch (b, m, n) in chunks, each (c, m, n), or one (m, n) where a loop is faster; a new tensor."""
    count = at_once(x.shape, x.device) if x.numel() else 0
    if count == len(x) > 0:    # all at once: nothing to put together
        return (function(x) if count > 1 else function(x[0])[None]).to(x.dtype).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if count == 1:
        for source, target in zip(x.unbind(), out.unbind(), strict=True):
            target.copy_(function(source))
    elif count > 1:
        for source, target in zip(torch.split(x, count), torch.split(out, count), strict=True):
            target.copy_(function(source))
    return out


def gram(x: Tensor, base: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """beta·base + alpha·x xᵀ for a wide x (..., m, n), m <= n, or with xᵀ x for a tall one: the small Gram matrix.

    Of a symmetric x it is the square. ``base`` must be symmetric, and is for a single matrix (m, n) only.
    """
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    if (found := cuda_kernels.gram(wide, base, beta, alpha)) is not None:
        return found
    if wide.ndim == 2 and wide.shape[0] >= BLOCKS_FROM and wide.device.type == "cpu":
        return gram_in_panels(wide, -(-wide.shape[0] // BLOCKS), base, beta, alpha)
    return wide @ wide.mT if base is None else torch.addmm(base, wide, wide.mT, beta=beta, alpha=alpha)


def square(g: Tensor, base: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """beta·base + alpha·g² for symmetric g and ``base`` (..., m, m)."""
    if g.ndim == 2:
        return gram(g, base, beta, alpha)
    if (found := cuda_kernels.gram(g, base, beta, alpha)) is not None:
        return found
    return g @ g if base is None else torch.baddbmm(base, g, g, beta=beta, alpha=alpha)


def gram_in_panels(x: Tensor, width: int, base: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """The same of a wide x (..., m, n), by panels of ``width`` rows below the diagonal, mirrored above it."""
    size = x.shape[-2]
    out = torch.empty((*x.shape[:-2], size, size), dtype=x.dtype, device=x.device)
    for start in range(0, size, width):
        stop = min(start + width, size)
        rows, columns = x[..., start:, :], x[..., start:stop, :].mT
        panel = rows @ columns if base is None else torch.addmm(base[start:, start:stop], rows, columns, beta=beta, alpha=alpha)
        out[..., start:, start:stop] = panel
        out[..., start:stop, stop:] = panel[..., stop - start :, :].mT
    return out
