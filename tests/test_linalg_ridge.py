"""The damped pseudo-inverse against a float64 SVD and against the least-squares problem that it solves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linalg_cases import gaussian, log_uniform
from normwise.errors import NormError
from normwise.norms.linalg import ridge, ridge_inverse
from normwise.norms.linalg.checks import by_peak

SHAPES = [(3, 40, 40), (2, 96, 24), (2, 24, 96), (2, 7, 1), (2, 1, 7), (2, 128, 200), (1, 300, 256)]
ERRORS = {torch.float64: 1e-11, torch.float32: 4e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def by_svd(x: Tensor, damping: float) -> Tensor:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    t = s / s.square().mean(1, keepdim=True).sqrt()
    return (u * (t / (t.square() + damping))[:, None, :]) @ vh


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("damping", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_maps_singular_values_as_stated(shape: tuple[int, int, int], damping: float, dtype: torch.dtype) -> None:
    x = log_uniform(shape, 1e-4).to(dtype)
    got, want = ridge_inverse(x, damping), by_svd(x, damping)
    assert got.dtype == dtype and got.shape == x.shape
    error = ERRORS[dtype] * max(1.0, min(shape[1:]) / 40)    # fp32: rounding of the Gram matrix over the damping, which grows with its size
    assert float((got.double() - want).norm() / want.norm()) < error
    assert float(torch.linalg.matrix_norm(got.double(), 2).max()) <= (1 + 10 * ERRORS[dtype]) / (2 * math.sqrt(damping))


def test_every_column_minimises_the_regularised_square() -> None:
    """½‖Yᵀu‖² + ½δ‖u‖² − ⟨y, u⟩ has no gradient there."""
    x = gaussian(1, 6, 9)[0]
    y = x / x.norm() * math.sqrt(6)
    u = ridge_inverse(x, 0.1).requires_grad_()
    value = 0.5 * (y.mT @ u).square().sum() + 0.05 * u.square().sum() - (y * u).sum()
    value.backward()
    assert u.grad is not None and float(u.grad.abs().max()) < 1e-12


def test_its_ends_are_the_pseudo_inverse_and_the_direction() -> None:
    x = gaussian(2, 5, 8)
    s = torch.linalg.svdvals(x).square().mean(1).sqrt()[:, None, None]
    torch.testing.assert_close(ridge_inverse(x, 1e-12), torch.linalg.pinv(x / s).mT)
    torch.testing.assert_close(ridge_inverse(x, 1e9) * 1e9, x / s, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", ERRORS)
def test_no_scale_matters(dtype: torch.dtype) -> None:
    x = gaussian(2, 6, 4).to(dtype)
    tiny = float(torch.finfo(dtype).tiny)
    for factor in (2.0**-8, 2.0**7, tiny * 64 if dtype != torch.float16 else 2.0**-10):
        power = 2.0 ** round(math.log2(factor))
        torch.testing.assert_close(ridge_inverse(x * power, 0.03), ridge_inverse(x, 0.03), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [3, 128])
def test_zero_stays_zero_and_what_is_not_finite_is_nan_alone(size: int) -> None:
    x = gaussian(4, size + 2, size).float()
    x[1], x[2, 0, 0], x[3, 1, 1] = 0, math.nan, math.inf
    got = ridge_inverse(x, 0.03)
    torch.testing.assert_close(got[0], ridge_inverse(x[:1], 0.03)[0])    # a batch of another size may be rounded otherwise
    assert torch.equal(got[1], torch.zeros(size + 2, size))
    assert bool(got[2].isnan().all() and got[3].isnan().all())
    assert ridge_inverse(x[:0], 0.03).shape == (0, size + 2, size)


def test_what_it_refuses() -> None:
    x = gaussian(1, 3, 3)
    for damping in (0, -1.0, math.inf, math.nan, True, "0.1"):
        with pytest.raises(NormError, match="damping > 0"):
            ridge_inverse(x, damping)  # type: ignore[arg-type]
    with pytest.raises(NormError, match="matrices"):
        ridge_inverse(x[0, 0], 0.1)


@pytest.mark.parametrize("dtype", ERRORS)
def test_one_matrix_has_the_peak_and_the_digits_that_it_has_in_a_batch(dtype: torch.dtype) -> None:
    """The peak of one matrix is read as a number, that of a batch is a tensor: at every power of two, of zero and of what is not finite."""
    info = torch.finfo(dtype)
    x = gaussian(1, 3, 5).clamp(-0.9, 0.9)
    powers = range(math.frexp(info.smallest_normal * info.eps)[1], math.frexp(info.max)[1] + 1)
    for power in powers:
        one = torch.ldexp(x, torch.tensor(power)).to(dtype)
        y, highest = by_peak(one)
        both, peaks = by_peak(one.expand(2, 3, 5))
        assert isinstance(highest, float) and isinstance(peaks, Tensor) and both.dtype == y.dtype
        assert float(peaks[0, 0, 0]) == highest and torch.equal(both[:1], y), power
    for entry in (0.0, math.nan, math.inf, -math.inf):
        one = torch.full((1, 3, 5), entry, dtype=dtype)
        (y, highest), (both, peaks) = by_peak(one), by_peak(one.expand(2, 3, 5))
        assert torch.equal(y.isnan(), both[:1].isnan()) and float(highest) == pytest.approx(float(peaks[0, 0, 0]), nan_ok=True)


def test_one_matrix_without_a_factor_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damping far below the rounding of the Gram matrix, of one matrix as of several."""
    decompose, count = ridge._by_svd, []
    monkeypatch.setattr(ridge, "_by_svd", lambda y, damping: count.append(len(y)) or decompose(y, damping))
    x = log_uniform((1, 12, 20), 1e-6).float()
    for given in (x, x[0], x.repeat(2, 1, 1)):
        torch.testing.assert_close(ridge_inverse(given, 1e-14).view(-1, 12, 20)[:1].double(), by_svd(x, 1e-14), rtol=1e-3, atol=1e3)
    assert count == [1, 1, 2] and float(by_svd(x, 1e-14).abs().max()) > 5e4
