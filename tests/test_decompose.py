"""Decompositions that fall back instead of failing: every place that decomposes, with LAPACK's drivers broken in every way they break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normwise.experiments.tasks.fidelity import Gaussian, frechet
from normwise.norms import Nuclear, Orthogonal, Spectral, linalg
from normwise.norms.decompose import eigh, eigvalsh, singular_values, svd


def zero_rows(rows: int, seed: int) -> Tensor:
    """A Gram matrix of 96 rows of which all but a few are exactly zero, as batches of a few samples leave them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(96, 96)
    x[:rows] = torch.randn(rows, 96, generator=generator) * 0.3
    x = x[torch.randperm(96, generator=generator)]
    return x @ x.mT


def test_gram_matrices_with_many_zero_rows() -> None:
    """torch.linalg.eigh raises on several of these in fp32 (MKL 2024.2), and one of them fails a whole batch."""
    grams = torch.stack([zero_rows(rows, seed) for rows in (1, 5, 10, 40) for seed in range(3)])
    values, vectors = eigh(grams)
    rebuilt = (vectors * values[:, None, :]) @ vectors.mT
    size = grams.flatten(1).norm(dim=1)
    assert bool(((rebuilt - grams).flatten(1).norm(dim=1) <= 1e-5 * size).all())
    assert bool(((vectors.mT @ vectors - torch.eye(96)).flatten(1).norm(dim=1) <= 1e-4).all())
    torch.testing.assert_close(values[:, -1].double(), torch.linalg.eigvalsh(grams.double())[:, -1], rtol=1e-5, atol=0)


def breaking(function: Callable[..., Any], how: str) -> Callable[..., Any]:
    """A driver that raises, that gives NaN, or that does so for fp32 alone."""

    def broken(x: Tensor, *args: Any, **options: Any) -> Any:
        if how == "raises in fp32" and x.dtype == torch.float64:
            return function(x, *args, **options)
        if how.startswith("raises"):
            raise torch.linalg.LinAlgError("did not converge")
        found = function(x, *args, **options)
        return found * torch.nan if isinstance(found, Tensor) else tuple(f * torch.nan for f in found)

    return broken


HOW = ["raises in fp32", "raises", "gives nan"]


@pytest.fixture(params=HOW)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, breaking(getattr(torch.linalg, name), request.param))
    return str(request.param)


def matrices(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_broken_driver_is_replaced(broken: str) -> None:
    x = matrices()
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(x).numpy(), exact, rtol=1e-5)
    u, s, vh = svd(x)
    torch.testing.assert_close((u * s[:, None, :]) @ vh, x, rtol=1e-5, atol=1e-5)
    gram = x.mT @ x
    values, vectors = eigh(gram)
    torch.testing.assert_close((vectors * values[:, None, :]) @ vectors.mT, gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(eigvalsh(gram), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_other_way_knows_every_scale(broken: str, scale: float) -> None:
    x = matrices() * scale
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(x).numpy(), exact, rtol=1e-5)


def rules(x: Tensor) -> dict[str, Tensor]:
    """Everything in the library that decomposes matrices."""
    state = None
    for _ in range(2):
        capped, state = linalg.cap(x, 1.0, state)
    return {
        "cap": capped, "cap_singular_values": linalg.cap_singular_values(x, 1.0), "by svd": linalg.cap_singular_values(x, 1.0, "exact"),
        "soft": linalg.soft_threshold_singular_values(x, 0.5), "polar": linalg.polar(x, "exact"), "ridge": linalg.ridge_inverse(x, 1e-12),
        "spectral": Spectral().project(x, 1.0), "nuclear": Nuclear().project(x, 1.0), "lmo": Nuclear().lmo(x), "value": Nuclear().value(x),
        "orthogonal": Orthogonal().project(x), "excess": Orthogonal().excess(x),
        "conv": linalg.circular_norm(x.reshape(3, 7, 5, 1), (6, 1))[None], "frechet": torch.tensor([distance(x)]),
    }  # fmt: skip


def distance(x: Tensor) -> float:
    return frechet(*(Gaussian.of(part) for part in (x[0], x[1])))


def test_no_rule_ends_or_hides_a_nan_when_drivers_break(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrices()
    expected = rules(x)
    for how in HOW:
        with monkeypatch.context() as patch:
            for name in ("eigh", "eigvalsh", "svd", "svdvals"):
                patch.setattr(torch.linalg, name, breaking(getattr(torch.linalg, name), how))
            for name, found in rules(x).items():
                torch.testing.assert_close(found, expected[name], rtol=2e-4, atol=2e-4, msg=lambda m, n=name, h=how: f"{n}, {h}: {m}")


def test_what_is_not_finite_is_nan_alone(broken: str) -> None:
    x = matrices()
    x[1, 2, 3] = torch.inf
    s = singular_values(x)
    assert bool(s[1].isnan().all()) and bool(s[::2].isfinite().all())
    assert bool(svd(x)[1][1].isnan().all())
    assert bool(eigh(x.mT @ x)[0][1].isnan().all())


def test_a_damping_below_rounding_still_has_an_inverse() -> None:
    """Rank five of forty: the Gram matrix plus 1e-12 has no Cholesky factor in fp32, and cholesky_inverse raises."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 5, generator=generator) @ torch.randn(2, 5, 60, generator=generator)
    found = linalg.ridge_inverse(x, 1e-12)
    u, s, vh = (t[:, ..., :5] if i < 2 else t[:, :5] for i, t in enumerate(torch.linalg.svd(x.double(), full_matrices=False)))
    scale = (s.square().sum(1, keepdim=True) / 40).sqrt()
    expected = (u * (scale / s)[:, None, :]) @ vh
    torch.testing.assert_close((u.mT @ found.double() @ vh.mT), u.mT @ expected @ vh.mT, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty_matrices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(shape, dtype=dtype)
    same = {
        "polar": linalg.polar(x), "exact": linalg.polar(x, "exact"), "ridge": linalg.ridge_inverse(x, 0.1), "cap": linalg.cap(x, 1.0)[0],
        "capped": linalg.cap_singular_values(x, 1.0), "by svd": linalg.cap_singular_values(x, 1.0, "exact"),
        "soft": linalg.soft_threshold_singular_values(x, 1.0), "again": linalg.cap(x, 1.0, linalg.cap(x, 1.0)[1])[0],
    }
    assert all(y.shape == x.shape and y.dtype == dtype for y in same.values())
    bounds = [linalg.upper_bound(x), linalg.upper_bound(x, "holder"), linalg.power_iteration(x)[0], Nuclear().value(x), Spectral().value(x)]
    for bound in bounds:
        assert torch.equal(bound.double(), torch.zeros(shape[0], dtype=torch.float64))


def test_empty_convolutions() -> None:
    for shape in ((0, 3, 3, 3), (4, 0, 3, 3)):
        assert set(linalg.convolution_norms(torch.zeros(shape), (5, 5)).values()) == {0.0}
