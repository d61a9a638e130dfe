"""Bounds on the spectral norm, norms of convolutions and caps of singular values, each against a float64 SVD."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from linalg_cases import capped, gaussian, largest, log_uniform, with_values
from normwise.errors import NormError
from normwise.norms.linalg import (
    cap,
    cap_singular_values,
    circular_norm,
    convolution_norms,
    flattened_filter_norm,
    polar,
    power_iteration,
    soft_threshold_singular_values,
    tracking,
    upper_bound,
    zero_padded_norm,
)

# Bounds on the spectral norm

def samples() -> dict[str, Tensor]:
    shape = (2, 60, 45)
    return {
        "Gaussian": gaussian(*shape), "orthogonal": with_values(shape, torch.ones(2, 45, dtype=torch.float64)),
        "rank one": gaussian(2, 60, 1) @ gaussian(2, 1, 45), "log-uniform": log_uniform(shape, 1e-6),
        "positive": gaussian(*shape).abs(), "wide": gaussian(2, 45, 300), "zero": torch.zeros(shape, dtype=torch.float64),
        "row": gaussian(2, 1, 50),
    }


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("scale", [1e-35, 1.0, 1e35])
def test_bounds_hold_on_both_sides(name: str, scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        x = (samples()[name] * scale).to(dtype)
        s = largest(x)
        for steps in (1, 3, 6):
            high = upper_bound(x, steps=steps).double()
            assert (high >= s).all() and (high <= s * min(x.shape[1:]) ** 0.5 ** (steps + 1) * 1.01).all()
            assert (power_iteration(x, steps=steps)[0].double() <= s).all()
        assert (upper_bound(x, "holder").double() >= s).all()
        assert (power_iteration(x, steps=300)[0].double() >= 0.99 * s).all()


def test_bounds_of_half_precision_and_non_finite_matrices() -> None:
    x = gaussian(3, 30, 20).bfloat16()
    assert (upper_bound(x) >= largest(x)).all() and (power_iteration(x, steps=50)[0].double() <= largest(x)).all()
    x[1, 2, 3] = torch.nan
    low, v = power_iteration(x)
    assert low[1].isnan() and upper_bound(x)[1].isnan() and low[[0, 2]].isfinite().all()
    x[1, 2, 3] = 1.0
    assert power_iteration(x, v)[0].isfinite().all()


def test_power_iteration_goes_on_where_it_was() -> None:
    x = gaussian(2, 40, 40)
    _, start = power_iteration(x, steps=2)
    kept = start.clone()
    v, lows = start, []
    for _ in range(30):
        low, v = power_iteration(x, v)
        lows.append(low)
    assert torch.equal(start, kept)
    assert (torch.stack(lows).diff(dim=0) >= -1e-14).all()
    assert torch.allclose(lows[-1], power_iteration(x, steps=32)[0], rtol=1e-12)


def _operator(weight: Tensor, size: tuple[int, ...], mode: str, groups: int = 1) -> Tensor:
    """The convolution as a matrix, column by column from what torch's own layer does to unit images."""
    rank, channels = weight.ndim - 2, weight.shape[1] * groups
    layer = (torch.nn.Conv1d, torch.nn.Conv2d)[rank - 1](
        channels, weight.shape[0], weight.shape[2:], padding="same", padding_mode=mode, groups=groups, bias=False).double()
    layer.weight.data.copy_(weight)
    images = torch.eye(channels * int(np.prod(size)), dtype=torch.float64).reshape(-1, channels, *size)
    with torch.no_grad():
        return layer(images).flatten(1).T


@pytest.mark.parametrize(("shape", "size", "groups"), [((3, 2, 3, 3), (5, 6), 1), ((4, 1, 3), (9,), 2), ((2, 2, 1, 1), (4, 4), 1)])
def test_convolution_norms_equal_those_of_the_matrix(shape: tuple[int, ...], size: tuple[int, ...], groups: int) -> None:
    weight = gaussian(*shape)
    circular = torch.linalg.svdvals(_operator(weight, size, "circular", groups))[0]
    zeros = torch.linalg.svdvals(_operator(weight, size, "zeros", groups))[0]
    found = convolution_norms(weight, size, groups, steps=400)
    assert found["operator, circular padding"] == pytest.approx(float(circular), rel=1e-12)
    assert float(zeros) * (1 - 1e-4) <= found["operator, zero padding"] <= float(zeros) * (1 + 1e-12)
    assert found["upper bound from the filter"] >= max(float(circular), float(zeros)) * (1 - 1e-12)
    per_group = weight.reshape(groups, shape[0] // groups, -1)
    assert found["flattened filter"] == pytest.approx(float(largest(per_group).max()), rel=1e-12)


def test_the_two_norms_of_a_convolution_differ() -> None:
    weight = torch.ones(1, 1, 3, 3)
    assert float(circular_norm(weight, (8, 8))) == pytest.approx(9.0) and float(flattened_filter_norm(weight)) == pytest.approx(3.0)


# Capping and soft thresholds

@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(3, 60, 60), (2, 90, 40), (2, 40, 90)])
def test_capping_is_the_projection_and_never_exceeds(shape: tuple[int, int, int], share: float, method: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for x in (gaussian(*shape).to(dtype), log_uniform(shape, 1e-4).to(dtype)):
            limit = share * largest(x)
            y = cap_singular_values(x, limit, method)
            assert (largest(y) <= limit * (1 + 1e-6)).all()
            assert (y.double() - capped(x, limit)).norm() <= tolerance * max(1, 0.01 / share) * capped(x, limit).norm()


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_capping_leaves_what_is_inside(method: str) -> None:
    x = gaussian(5, 30, 20).float()
    x[1] *= 10
    x[2, 0, 0], x[3] = torch.nan, 0
    limit = 1.0001 * float(largest(x[[0, 4]]).max())
    before = x.clone()
    y = cap_singular_values(x, limit, method)
    assert torch.equal(y.nan_to_num(7.0)[[0, 2, 3, 4]], x.nan_to_num(7.0)[[0, 2, 3, 4]]) and largest(y[1:2]) <= limit
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0)) and y.data_ptr() != x.data_ptr()
    assert torch.equal(cap_singular_values(y, limit, method).nan_to_num(7.0), y.nan_to_num(7.0))
    assert (cap_singular_values(x[:1], 0.0, method) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_capping_in_half_precision(dtype: torch.dtype) -> None:
    x = gaussian(2, 50, 40).to(dtype)
    y = cap_singular_values(x, 5.0)
    assert y.dtype == dtype and (largest(y) <= 5 + torch.finfo(dtype).eps / 2 * y.double().norm(dim=(1, 2))).all()
    assert (y.double() - capped(x, torch.tensor([5.0] * 2))).abs().max() <= torch.finfo(dtype).eps * y.double().abs().max()


def test_soft_threshold() -> None:
    x = gaussian(2, 12, 9)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    t = torch.tensor([1.0, 3.0], dtype=torch.float64)
    expected = (u * (s - t[:, None]).clamp(min=0)[:, None, :]) @ vh
    y = soft_threshold_singular_values(x, t)
    assert (y - expected).abs().max() < 1e-12
    assert (torch.linalg.matrix_rank(y) == (s > t[:, None]).sum(1)).all() and int((s > t[:, None]).sum()) < s.numel()
    assert (soft_threshold_singular_values(x, 100.0) == 0).all()


# A cap through training

def drift(shape: tuple[int, int, int], steps: int, size: float, seed: int = 0) -> list[Tensor]:
    """Updates like a network's: each mostly of low rank, along directions that turn slowly, plus noise."""
    batch, m, n = shape
    left, right, out = gaussian(batch, m, 2, seed=seed), gaussian(batch, n, 2, seed=seed + 1), []
    for k in range(steps):
        left = 0.9 * left + 0.45 * gaussian(batch, m, 2, seed=seed + 2 + 3 * k)
        right = 0.9 * right + 0.45 * gaussian(batch, n, 2, seed=seed + 3 + 3 * k)
        update = left @ right.mT + 0.5 * gaussian(batch, m, n, seed=seed + 4 + 3 * k)
        out.append(size * update / torch.linalg.matrix_norm(update, 2, keepdim=True))
    return out


def untouched(state: tracking.Tracked) -> Callable[[], bool]:
    """Whether a state is still as it is now."""
    kept = [t.clone() for t in state]
    return lambda: all(torch.equal(old, now) for old, now in zip(kept, state, strict=True))


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices were decomposed, call by call."""
    calls: list[int] = []
    exact = tracking._decompose
    monkeypatch.setattr(tracking, "_decompose", lambda xs, *others: calls.append(len(xs)) or exact(xs, *others))
    return calls


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices were looked at without decomposing, call by call."""
    calls: list[int] = []
    search = tracking._search
    monkeypatch.setattr(tracking, "_search", lambda seen, *others: calls.append(len(seen)) or search(seen, *others))
    return calls


@pytest.mark.parametrize("shape", [(2, 128, 128), (1, 256, 96), (1, 96, 256), (3, 24, 50), (2, 131, 70)])
def test_the_cap_holds_after_every_step(shape: tuple[int, int, int], decomposed: list[int]) -> None:
    x = gaussian(*shape).float() / 20
    limit = 0.9 * float(largest(x).min())
    x, state = cap(x, limit)
    steps, worst = 0, 0.0
    for update in drift(shape, 30, 0.05 * limit):
        moved = x + update.float()
        same = untouched(state)
        x, after = cap(moved, limit, state)
        assert same()
        worst = max(worst, float(largest(x).max()) / limit)
        assert (x.double() - capped(moved, torch.tensor([limit] * shape[0]))).norm() <= 0.02 * x.norm()
        steps, state = steps + 1, after
    assert worst <= 1.01
    follows = min(shape[1:]) > tracking.DENSE_BELOW    # smaller ones are decomposed, as cheap
    assert not follows or len(decomposed) < steps, "some step must have followed the vectors instead of decomposing"


def test_each_matrix_has_its_own_radius() -> None:
    x = gaussian(4, 120, 90).float()
    limit = torch.tensor([0.5, 0.8, 1.2, 3.0]) * largest(x)
    y, state = cap(x, limit)
    for update in drift((4, 120, 90), 15, 0.3):
        y, state = cap(y + update.float(), limit, state)
        assert (largest(y) <= 1.01 * limit).all()
    assert largest(y)[3] < 0.5 * limit[3]


def test_the_followed_way_is_taken_and_leaves_what_is_inside(searched: list[int], decomposed: list[int]) -> None:
    x = with_values((2, 150, 100), torch.linspace(2, 0.1, 100, dtype=torch.float64).expand(2, 100)).float()
    y, state = cap(x, 1.95)
    at_the_cap = int((torch.linalg.svdvals(y) > tracking.CROWDED * 1.95).sum(1).max())
    assert state.vectors.shape == (2, max(tracking.WIDTH, 2 * at_the_cap), 100)
    again, after = cap(y, 3.0, state)
    assert again is y and not searched, "far inside: not even looked at"
    moved = y + 0.01 * gaussian(2, 150, 100).float()
    assert (largest(moved) > 1.95).any()
    followed, _ = cap(moved, 1.95, after)
    assert (largest(followed) <= 1.95 * 1.001).all() and searched == [2] and decomposed == [2]


def test_one_that_exceeds_leaves_its_neighbours_bits() -> None:
    x = with_values((3, 80, 90), torch.linspace(1, 0.1, 80, dtype=torch.float64).expand(3, 80)).float()
    y, state = cap(x, 2.0)
    moved = y * torch.tensor([1.0, 2.02, 1.5])[:, None, None]
    z, _ = cap(moved, 2.0, state)
    assert torch.equal(z[[0, 2]], moved[[0, 2]]) and largest(z)[1] <= 2.0 * 1.001 < largest(moved)[1]


def test_a_leap_and_a_crowd_are_decomposed() -> None:
    x = with_values((2, 100, 100), torch.linspace(1, 0.1, 100, dtype=torch.float64).expand(2, 100)).float()
    x, state = cap(x, 1.0)
    for jump in (5.0, 100.0, 1e30):
        y, _ = cap(jump * x, 1.0, state)
        assert (largest(y) <= 1 + 1e-6).all()
    crowded = with_values((2, 100, 100), torch.ones(2, 100, dtype=torch.float64)).float() * 1.2
    y, wider = cap(crowded, 1.0, state)
    assert (largest(y) <= 1 + 1e-6).all()
    assert (largest(cap(1.1 * y, 1.0, wider)[0]) <= 1 + 1e-6).all()


def test_a_crowd_in_one_matrix_widens_all_and_the_others_are_still_followed(decomposed: list[int]) -> None:
    x = with_values((2, 100, 120), torch.linspace(1, 0.1, 100, dtype=torch.float64).expand(2, 100)).float()
    x, state = cap(x, 1.0)
    x[1] = with_values((1, 100, 120), torch.full((1, 100), 1.2, dtype=torch.float64)).float()[0]
    x, state = cap(x, 1.0, state)
    known = len(decomposed)
    for update in drift((2, 100, 120), 10, 0.05):
        x, state = cap(x + update.float(), 1.0, state)
        assert (largest(x) <= 1.01).all()
    assert set(decomposed[known:]) <= {1}, "only the crowded one is decomposed again"


def test_a_new_direction_orthogonal_to_all_followed_ones_is_found() -> None:
    x = torch.diag_embed(torch.cat([torch.full((20,), 0.9), torch.full((80,), 0.1)])).expand(1, 100, 100).clone()
    x, state = cap(x, 1.0)
    for _ in range(40):
        x[0, 99, 99] += 0.05
        x, state = cap(x, 1.0, state)
    assert largest(x) <= 1.01


@pytest.mark.parametrize("rank", [1, 3, 60])
def test_the_gate_sees_leaps_of_a_matrix_far_inside(rank: int) -> None:
    """As a learning rate that leaps makes them: σ₁ from 0.3 to 1.3 radii in one step, in 40 random directions each."""
    x = gaussian(40, 100, 60).float()
    x *= (0.3 / largest(x).float())[:, None, None]
    x, state = cap(x, 1.0)
    leap = gaussian(40, 100, rank, seed=1) @ gaussian(40, rank, 60, seed=2)
    moved = x + (1.2 * leap / torch.linalg.matrix_norm(leap, 2, keepdim=True)).float()
    assert (largest(moved) > 1.1).all()
    assert (largest(cap(moved, 1.0, state)[0]) <= 1.01).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("side", [100, 20])
def test_the_followed_cap_leaves_non_finite_matrices(bad: float, side: int) -> None:
    x = gaussian(3, 100, side).float()
    limit = 0.8 * float(largest(x).min())
    for known in (None, cap(x, limit)):
        good, state = (x, None) if known is None else known
        moved = 1.1 * good
        moved[1, 0, 0] = bad
        y, state = cap(moved, limit, state)
        assert torch.equal(y[1].nan_to_num(7.0), moved[1].nan_to_num(7.0)) and (largest(y[[0, 2]]) <= limit * 1.001).all()
        assert state.vectors.isfinite().all() and state.reach[[0, 2]].isfinite().all()
        recovered, state = cap(1.2 * x, limit, state)
        assert (largest(recovered) <= limit * 1.01).all() and all(t.isfinite().all() for t in state)


@pytest.mark.parametrize("side", [100, 20])
def test_the_followed_cap_of_huge_and_tiny_entries(side: int) -> None:
    x = gaussian(2, 100, side).float()
    _, state = cap(x, 1e9)
    huge = x * torch.tensor([1e30, 1e-30])[:, None, None]
    for known in (None, state):
        y, after = cap(huge, 2.0, known)
        assert largest(y)[0] <= 2.01 and torch.equal(y[1], huge[1]) and all(t.isfinite().all() for t in after)
    assert torch.equal(cap(torch.zeros_like(x), 1.0, state)[0], torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_followed_cap_in_half_precision(dtype: torch.dtype) -> None:
    x = gaussian(2, 100, 80).to(dtype)
    limit = 0.8 * float(largest(x).min())
    x, state = cap(x, limit)
    for update in drift((2, 100, 80), 15, 0.05 * limit):
        x, state = cap((x.double() + update).to(dtype), limit, state)
        assert x.dtype == dtype and state.vectors.dtype == torch.float32
        assert (largest(x) <= limit * (1.01 + torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize(("call", "words"), [
    (lambda: polar(torch.ones(3)), "(3,)"),
    (lambda: polar(torch.ones(2, 2, dtype=torch.complex64)), "complex64"),
    (lambda: polar(torch.ones(2, 2), "quintik"), "'quintic'"),
    (lambda: polar(torch.ones(2, 2), steps=0), "steps=0"),
    (lambda: upper_bound(torch.ones(1, 2, 2), "grma"), "'gram'"),
    (lambda: upper_bound(torch.ones(1, 2, 2), steps=0), "steps=0"),
    (lambda: cap_singular_values(torch.ones(2, 2), -1.0), "-1.0"),
    (lambda: cap_singular_values(torch.ones(2, 2), float("nan")), "nan"),
    (lambda: cap_singular_values(torch.ones(2, 2), 1.0, "svd"), "exact"),
    (lambda: cap_singular_values(torch.ones(3, 2, 2), torch.ones(2)), "3 matrices"),
    (lambda: circular_norm(torch.ones(1, 1, 3, 3), (2, 2)), "(2, 2)"),
    (lambda: circular_norm(torch.ones(3, 1, 3), (8,), groups=2), "given 2"),
    (lambda: zero_padded_norm(torch.ones(3, 3), ()), "(3, 3)"),
])
def test_errors_say_what_was_given_or_is_allowed(call: object, words: str) -> None:
    with pytest.raises(NormError) as caught:
        call()  # type: ignore[operator]
    assert words in str(caught.value)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_no_convolution_norm_as_it_is_computed_exceeds_the_bound(kernel: tuple[int, int]) -> None:
    """In fp32, where a kernel of one entry has the operator norm and the bound equal, but for their roundings."""
    for seed in range(40):
        found = convolution_norms(gaussian(5, 4, *kernel, seed=seed).float(), (6, 6), steps=30)
        bound = found["upper bound from the filter"]
        assert max(found["operator, circular padding"], found["operator, zero padding"]) <= bound
        assert bound == pytest.approx(found["flattened filter"] * kernel[0], rel=3e-5)


@pytest.mark.parametrize("scale", [1e-44, 1e-42, 1e-39])
def test_a_power_iteration_on_subnormal_numbers_stays_below(scale: float) -> None:
    x = (gaussian(300, 3, 4) * scale).float()
    assert (x != 0).any() and (power_iteration(x, steps=50)[0].double() <= largest(x)).all()


@pytest.mark.parametrize("tolerance", [-0.5, 0.0, 0.009, float("nan"), float("inf")])
def test_a_tolerance_that_proofs_do_not_fit_into_is_refused(tolerance: float) -> None:
    with pytest.raises(NormError, match=r"tolerance .*: give 0.01 or more"):
        cap(gaussian(2, 3, 4), 1.0, tolerance=tolerance)
