"""Singular values of stored matrices from their Gram matrices, and what follows from them: σ₁, stable, effective and numerical rank.

The Gram matrix of the shorter side is summed in float64 while the matrix passes in slabs, so that it is never in memory as a whole. Its
eigenvalues are σ² to about 1e-16 σ₁²: σ₁ is exact to far below 1e-4. A rank counts how many are above what rounding can have made
(:func:`rounding`). Where that limit is too near to an eigenvalue for float64's own rounding to tell, a second pass brings the matrix to its
triangular factor, whose singular values are those of the matrix to 1e-15 σ₁. So a rank never depends on the shorter way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normwise.inspection.threads import share_out
from normwise.norms.decompose import eigvalsh, singular_values

SLAB_BYTES = 1 << 22
TOGETHER_BYTES = 1 << 24
"""Of Gram matrices of one size that are decomposed in one call."""
SMALL = 128
"""The size up to which matrices are decomposed in one call."""
SHOWN = 64
"""Singular values that are kept of a spectrum: evenly by their place, the first and the last among them."""


def rounding(l2: float, dtype: torch.dtype) -> float:
    """The largest singular value that rounding to ``dtype`` can have made of nothing: u · ‖W‖_F, u half the distance from 1 to the next.

    Each entry was moved by at most u times itself, so that the change's spectral norm is at most u · ‖W‖_F, and by Weyl's inequality no
    singular value moved by more.
    """
    return torch.finfo(dtype).eps / 2 * l2


def summary(values: Tensor, limit: float, scale: float = 1.0) -> dict[str, Any]:
    """What is told of a spectrum. values: of one matrix or a batch ``(b, k)``, falling; of a batch the means, and the largest σ₁. scale:
    by which values and limit were divided.

    ``effective_rank`` is exp of the entropy of σᵢ / Σσ (Roy and Vetterli, 2007), ``stable_rank`` is ‖W‖_F² / σ₁² (Rudelson and Vershynin,
    2007), ``rank`` counts the values above ``limit``.
    """
    values = values.reshape(-1, values.shape[-1])
    first = values[:, 0].clamp(min=torch.finfo(torch.float64).tiny)
    share = values / values.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(share, share).sum(1)
    largest = values[int(values[:, 0].argmax())]
    places = torch.linspace(0, len(largest) - 1, min(len(largest), SHOWN)).round().long()
    zero = values[:, 0] == 0
    return {
        "sigma": float(largest[0]) * scale, "stable_rank": _mean((values / first[:, None]).square().sum(1)),
        "effective_rank": _mean(torch.where(zero, 0.0, entropy.exp())), "rank": _mean((values > limit).sum(1).double()),
        "of": values.shape[1], "spectrum": [float(f"{v * scale:.4g}") for v in largest[places].tolist()],
    }  # fmt: skip


def _mean(values: Tensor) -> float | int:
    mean = float(values.mean())
    return int(mean) if mean.is_integer() else mean


class Slabs:
    """The rows of a matrix or, where it is wide, of its transpose, in runs: ``slabs(i)`` is ``(run, k)`` in float64, k the shorter side.

    Args:
        fetch: gives a run of the entries, by the first one's place and their number.
        m, n: the matrix's shape.
    """

    def __init__(self, fetch: Callable[[int, int], Tensor], m: int, n: int) -> None:
        self._fetch, self._m, self._n, self.k = fetch, m, n, min(m, n)
        self._step = max(SLAB_BYTES // (8 * max(self.k, 1)), 1)
        self.count = -(-max(m, n) // self._step)
        self._wide: Tensor | None = None

    def __call__(self, i: int) -> Tensor:
        first = i * self._step
        if self._wide is not None:
            return self._wide[:, first : first + self._step].double().mT
        rows = min(self._step, self._m - first)
        return self._fetch(first * self._n, rows * self._n).view(rows, self._n).double()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A wide matrix is in memory within, since a run of its columns lies everywhere in it."""
        self._wide = self._fetch(0, self._m * self._n).view(self._m, self._n) if self._m < self._n else None
        try:
            yield
        finally:
            self._wide = None


@dataclass
class _Waiting:
    gram: Tensor
    limit: float
    slabs: Slabs
    done: Callable[[Tensor], None]


class Spectra:
    """Matrices whose singular values are asked for; those of one size are decomposed together.

    ``done(values)`` is called with the singular values in falling order, ``(k,)`` in float64, when their turn has come: at the latest by
    :meth:`flush`.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[_Waiting]] = {}

    def add(self, slabs: Slabs, limit: float, done: Callable[[Tensor], None]) -> None:
        """limit: the smallest singular value that counts for the rank."""
        gram = _gram(slabs)
        # Rows that are exactly zero, as those of dead units, stay so, and need no second pass.
        kept = (gram.diagonal() > 0).nonzero().flatten()
        gram = gram if len(kept) == slabs.k else gram[kept][:, kept].contiguous()
        same = self._waiting.setdefault(len(kept), [])
        same.append(_Waiting(gram, limit, slabs, done))
        if len(same) * gram.nbytes >= TOGETHER_BYTES:
            self._decompose(len(kept))

    def flush(self) -> None:
        for size in list(self._waiting):
            self._decompose(size)

    def _decompose(self, size: int) -> None:
        same = self._waiting.pop(size)
        values = _eigenvalues([one.gram for one in same]) if size else [torch.zeros(0, dtype=torch.float64)] * len(same)
        for one, squares in zip(same, values, strict=True):
            first = float(squares[0]) if size else 0.0
            doubt = torch.finfo(torch.float64).eps * 2 * (size + 64) * first
            unclear = bool(((squares - one.limit * one.limit).abs() <= doubt).any())
            found = _exactly(one.slabs) if unclear else squares.clamp(min=0).sqrt()
            one.done(torch.nn.functional.pad(found, (0, one.slabs.k - len(found))))


def _gram(slabs: Slabs) -> Tensor:
    """Σ slabᵀ slab, two slabs at a time where there are many: each thread adds to a sum of its own."""
    grams: list[Tensor] = []
    own = threading.local()

    def add(i: int) -> None:
        if not hasattr(own, "gram"):
            own.gram = torch.zeros(slabs.k, slabs.k, dtype=torch.float64)
            grams.append(own.gram)
        slab = slabs(i)
        own.gram.addmm_(slab.mT, slab)

    with slabs.ready():
        share_out(add, slabs.count)
    return grams[0] if len(grams) == 1 else grams[0].add_(grams[1])


def _eigenvalues(grams: list[Tensor]) -> list[Tensor]:
    """In falling order. Small matrices of one size are one call, large ones are shared out between two threads."""
    if grams[0].shape[0] <= SMALL:
        return list(eigvalsh(torch.stack(grams)).flip(1))
    found: dict[int, Tensor] = {}

    def decompose(i: int) -> None:
        found[i] = eigvalsh(grams[i][None])[0].flip(0)

    share_out(decompose, len(grams))
    return [found[i] for i in range(len(grams))]


def _exactly(slabs: Slabs) -> Tensor:
    """The singular values of the triangular factor, which grows with each slab."""
    factor = torch.zeros(0, slabs.k, dtype=torch.float64)
    with slabs.ready():
        for part in (part for i in range(slabs.count) for part in torch.split(slabs(i), max(slabs.k, 1))):
            factor = torch.linalg.qr(torch.cat([factor, part]), mode="r").R
    return singular_values(factor[None])[0]


def of_product(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The singular values of scale · B·A without forming it, and B times A's triangular factor, whose rows have the product's norms.

    a: ``(r, n)``, b: ``(m, r)``, in float64. From B = Q·R and Aᵀ = P·S the product is Q·(R·Sᵀ)·Pᵀ, and Q and P keep singular values.
    """
    right = torch.linalg.qr(a.mT, mode="r").R
    left = torch.linalg.qr(b, mode="r").R
    return singular_values((scale * left @ right.mT)[None])[0], scale * b @ right.mT

