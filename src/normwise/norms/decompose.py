"""Decompositions that neither end a run nor hide a failure: eigenvalues and singular values of batches of matrices.

LAPACK's fast drivers may not converge, or return NaN, on harmless matrices: in fp32 ``eigh`` of a Gram matrix with many rows that are
exactly zero is enough, and one such matrix fails its whole batch. Everything in the library that decomposes goes through these functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from normwise.norms.reduce import up, wide

JITTERS = (0.0, 1e-15, 1e-13, 1e-11)    # relative changes of the entries tried one after the other; 1e-11 is far below fp32's rounding

Parts = tuple[Tensor, ...]
Fast = Callable[[Tensor], Parts]
Other = Callable[[np.ndarray], tuple[np.ndarray, ...]]


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric ``(b, n, n)`` -> eigenvalues in rising order ``(b, n)`` and eigenvectors as columns, in the compute dtype.

    A matrix that is not finite has NaN for its eigenvalues, and harms no other.
    """
    values, vectors = _surely(x, torch.linalg.eigh, np.linalg.eigh, (1, 0))
    return values, vectors


def eigvalsh(x: Tensor) -> Tensor:
    """The eigenvalues alone, see :func:`eigh`."""
    return _surely(x, lambda a: (torch.linalg.eigvalsh(a),), lambda a: (np.linalg.eigvalsh(a),), (1,))[0]


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(b, m, n)`` -> ``U (b, m, k)``, singular values in falling order ``(b, k)``, ``Vᵀ (b, k, n)``, in the compute dtype.

    A matrix that is not finite has NaN for its singular values, and some finite U and V.
    """
    u, s, vh = _surely(
        x, lambda a: tuple(torch.linalg.svd(a, full_matrices=False)), lambda a: tuple(np.linalg.svd(a, full_matrices=False)), (0, 1, 0)
    )
    return u, s, vh


def singular_values(x: Tensor) -> Tensor:
    """The singular values alone, see :func:`svd`; complex matrices have real ones."""
    return _surely(x, lambda a: (torch.linalg.svdvals(a),), lambda a: (np.linalg.svd(a, compute_uv=False),), (1,))[0]


def _surely(x: Tensor, fast: Fast, other: Other, scales: tuple[int, ...]) -> Parts:
    """``fast`` on the whole batch; where that raises or finds no finite numbers, each matrix by itself in other ways.

    scales: the power of a matrix's scale by which each result grows. Matrices that are not finite are decomposed as zeros, and then get NaN
    for what grows with the scale.
    """
    work = x if x.is_complex() else up(x)
    finite = work.isfinite().flatten(1).all(1)
    work = torch.where(finite[:, None, None], work, 0.0)
    try:
        found = fast(work)
    except RuntimeError:    # torch's LinAlgError is one
        found = tuple(torch.cat(same) for same in zip(*(_alone(m[None], fast, other, scales) for m in work), strict=True))
    failed = torch.stack([~f.isfinite().flatten(1).all(1) for f in found]).any(0)
    for i in failed.nonzero().flatten().tolist():
        for whole, own in zip(found, _alone(work[i : i + 1], fast, other, scales), strict=True):
            whole[i] = own[0]
    usable = [finite.view(-1, *[1] * (f.ndim - 1)) for f in found]
    return tuple(torch.where(w, f, torch.nan) if power else f for w, f, power in zip(usable, found, scales, strict=True))


def _alone(x: Tensor, fast: Fast, other: Other, scales: tuple[int, ...]) -> Parts:
    """One finite matrix ``(1, m, n)``: as it is, then in float64 at unit scale, then by numpy's own LAPACK, then with entries changed by
    less than x's rounding. NaN if all of them fail, which every rule takes for a matrix to leave alone and to report."""
    largest = x.abs().amax()
    exponent = torch.frexp(largest.to(wide(x.device))).exponent
    unit = _times_two_to(x.to(torch.complex128 if x.is_complex() else wide(x.device)), -exponent)
    noise = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(20), dtype=torch.float64).numpy()
    noise = noise + noise.T if noise.shape[0] == noise.shape[1] else noise

    def by_numpy(jitter: float) -> Parts:
        entries = unit[0].cpu().resolve_conj().numpy()
        return tuple(torch.from_numpy(np.array(f))[None] for f in other(entries * (1 + jitter * noise)))

    ways: list[tuple[int, Callable[[], Parts]]] = [(0, lambda: fast(x)), (1, lambda: fast(unit))]
    ways += [(1, lambda j=j: by_numpy(j)) for j in JITTERS]    # type: ignore[misc]
    for scaled, way in ways:
        try:
            found = way()
        except (RuntimeError, np.linalg.LinAlgError):
            continue
        if all(bool(f.isfinite().all()) for f in found):
            grown = (_times_two_to(f, exponent.to(f.device)) if scaled and power else f for f, power in zip(found, scales, strict=True))
            # In the dtype that the fast way has: real where it is real.
            real = x.dtype.to_real() if x.is_complex() else x.dtype
            return tuple(f.to(x.device, x.dtype if f.is_complex() else real) for f in grown)
    shaped = fast(torch.zeros_like(x))
    return tuple(torch.full_like(f, torch.nan) for f in shaped)


def _times_two_to(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent in two halves: the power alone may be beyond the range."""
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, half), exponent - half)
