"""Polar factors, each method against a float64 SVD, a formula written out, or a convex solver; and their benchmark."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import pairwise
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch

from linalg_cases import became, exact, gaussian, largest, log_uniform, with_values
from normwise.errors import NormError
from normwise.experiments.bench import polar as bench_polar
from normwise.experiments.framework.printing import markdown
from normwise.norms.linalg import METHODS, error_bound, paths, polar
from normwise.norms.linalg.coefficients import apply, cushioned_quintic, optimal_cubic, optimal_quintic, polar_express, worst_error

SHAPES = [(3, 40, 40), (2, 96, 24), (2, 24, 96), (2, 7, 1), (1, 130, 130)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What the iteration's rounding may add to |σ − 1| inside the domain; for bf16 the method states it.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
PUBLISHED = [  # Amsel et al. 2025, the reference implementation's list for l = 1e-3, before its safety factor
    (8.28721201814563, -23.595886519098837, 17.300387312530933), (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137), (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673), (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]


# Coefficients

def test_polar_express_has_the_published_coefficients() -> None:
    np.testing.assert_allclose(np.array(polar_express(6, 1e-3)), np.array(PUBLISHED), rtol=1e-9)


@pytest.mark.parametrize(("lower", "upper"), [(0.03, 1.0), (0.2, 1.8), (0.7, 1.3)])
def test_the_quintic_is_the_best_there_is(lower: float, upper: float) -> None:
    t = np.linspace(lower, upper, 1500)
    coefficients = cvxpy.Variable(3)
    best = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm_inf(1 - np.stack([t, t**3, t**5], 1) @ coefficients))).solve()
    assert np.abs(1 - apply(optimal_quintic(lower, upper), t)).max() == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize(("lower", "upper"), [(0.03, 1.0), (0.5, 1.5)])
def test_the_cubic_is_the_best_there_is(lower: float, upper: float) -> None:
    t = np.linspace(lower, upper, 1500)
    coefficients = cvxpy.Variable(2)
    best = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm_inf(1 - np.stack([t, t**3], 1) @ coefficients))).solve()
    assert np.abs(1 - apply(optimal_cubic(lower, upper), t)).max() == pytest.approx(best, abs=2e-5)


def test_a_cushioned_step_is_centred_on_one() -> None:
    t = np.geomspace(1e-3, 1, 5000)
    values = apply(cushioned_quintic(1e-3, 1.0), t)
    assert values.min() + values.max() == pytest.approx(2, abs=1e-6)


def test_more_steps_have_smaller_errors() -> None:
    errors = [worst_error(polar_express(n, 1e-3), 1e-3) for n in range(1, 8)]
    assert all(b < a for a, b in pairwise(errors)) and errors[-1] < 1e-8


# The polar factor

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_bound_on_its_domain(method: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    row, work = METHODS[method], dtype if dtype == torch.float64 else torch.float32
    work = torch.bfloat16 if row.quick and work == torch.float32 else work
    for x in (gaussian(*shape), log_uniform(shape, 1e-3)):
        x = x.to(dtype)
        s, now = became(x, polar(x, method))
        order = 2 if row.scale == "frobenius" else 8
        scale = 1.02 * torch.linalg.vector_norm(s, order, dim=1, keepdim=True)
        inside = s >= row.lower * scale
        assert inside.any()
        rounding = max(ROUNDING.get(work, row.bf16_error), 2 * torch.finfo(dtype).eps)
        assert (now - 1).abs()[inside].max() <= error_bound(method) + rounding


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 9])
def test_polar_express_keeps_its_bound_at_any_number_of_steps(steps: int) -> None:
    x = log_uniform((2, 50, 50), 2e-3)
    _, now = became(x, polar(x, "polar_express", steps))
    assert (now - 1).abs().max() <= error_bound("polar_express", steps) + 1e-9


def test_documented_error_bounds() -> None:
    assert error_bound("quintic") <= 0.33 and error_bound("fast") <= 0.18
    assert error_bound("polar_express") <= 0.14 and error_bound("polar_express", 6) <= 3e-3 and error_bound("accurate") <= 1e-6


def test_quintic_is_the_formula_in_float64() -> None:
    x = gaussian(30, 50)
    expected = x / x.norm()
    for _ in range(5):
        g = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * g + 2.0315 * g @ g) @ expected
    assert (polar(x, "quintic") - expected).abs().max() < 1e-13


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_quintic_in_bf16_is_no_further_from_float64_than_torch(shape: tuple[int, int]) -> None:
    theirs = import_module("torch.optim._muon")._zeropower_via_newtonschulz
    ours = torchs = 0.0    # over sixteen matrices: how one is rounded differs from one CPU's bf16 to another's by a few per cent
    for seed in range(16):
        x = gaussian(*shape, seed=seed).float()
        formula = polar(x.double(), "quintic")
        ours += float((polar(x, "quintic").double() - formula).norm())
        torchs += float((theirs(x, (3.4445, -4.7750, 2.0315), 5, 1e-7).double() - formula).norm())
    assert ours <= torchs


@pytest.mark.parametrize("kind", bench_polar.INPUTS)
@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 128, 32)])
def test_fast_is_nowhere_worse_than_torch(kind: str, shape: tuple[int, int, int]) -> None:
    x = bench_polar.INPUTS[kind](shape)
    theirs, ours = bench_polar.errors(x, torch.stack(bench_polar.torch_iteration(x))), bench_polar.errors(x, polar(x))
    assert ours[0] < theirs[0] and ours[1] < theirs[1]


@pytest.mark.parametrize("shape", [(2, 150, 150), (2, 200, 60), (1, 300, 300)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_accurate_is_orthogonal_and_near_the_exact_factor(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    x = log_uniform(shape, 1e-3).to(dtype)
    y = polar(x, "accurate").double()
    assert (torch.linalg.svdvals(y) - 1).abs().max() < 60 * torch.finfo(dtype).eps
    assert (y - exact(x)).abs().max() < tolerance


def test_a_nearly_singular_gaussian_does_not_grow() -> None:
    """Without the safety factor rounding at the interval's end grows 20-fold a step: 4306 at 1024², 0.11 here."""
    x = gaussian(2, 256, 256, seed=3).float()
    for method in METHODS:
        assert largest(polar(x, method)).max() <= 1 + error_bound(method) + METHODS[method].bf16_error + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_the_partial_isometry(dtype: torch.dtype) -> None:
    x = with_values((2, 9, 6), torch.tensor([[3.0, 2, 1, 0.5, 0, 0]] * 2, dtype=torch.float64))
    u, _, vh = torch.linalg.svd(x)
    expected = u[..., :4] @ vh[:, :4]
    y = polar(x.float().to(dtype) if dtype in (torch.float32, torch.float64) else x.to(dtype), "exact").double()
    if dtype == torch.float64:
        y = polar(x, "exact")
        assert (y - expected).abs().max() < 1e-12
    values = torch.linalg.svdvals(y)
    kept = 4 if dtype in (torch.float32, torch.float64) else 6   # rounding to 16 bits fills the null space
    assert (values[:, :kept] - 1).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", [*METHODS, "exact"])
@pytest.mark.parametrize("exponent", [-100, -108, 100])
def test_scale_does_not_matter(method: str, exponent: int) -> None:
    x = gaussian(2, 20, 30).float()
    scaled, plain = polar(x * 2.0**exponent, method), polar(x, method)
    assert torch.equal(scaled, plain) if method != "exact" else (scaled - plain).abs().max() < 1e-5


@pytest.mark.parametrize("method", [*METHODS, "exact"])
def test_zero_rank_deficient_and_non_finite_matrices(method: str) -> None:
    x = gaussian(5, 24, 16).float()
    x[0] = 0
    x[1] = x[1, :, :1] @ x[1, :1, :]
    x[2, 3, 4], x[3, 5, 6] = torch.nan, torch.inf
    before = x.clone()
    y = polar(x, method)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    assert (y[0] == 0).all()
    assert y[2:4].isnan().all() and y[[0, 1, 4]].isfinite().all()
    assert (largest(y[1:2]) - 1).abs() <= (error_bound(method) + METHODS[method].bf16_error if method != "exact" else 0) + 1e-6
    if method in ("accurate", "exact"):   # rounding a rank-one matrix to bf16 gives it small singular values, which then grow
        assert torch.linalg.svdvals(y[1].double())[1] < 0.05
    rank_one = before[4, :, :1].double() @ before[4, :1].double()
    assert torch.linalg.matrix_rank(polar(rank_one, method), atol=0.05) == 1


@pytest.mark.parametrize("method", [*METHODS, "exact"])
def test_shapes_dtypes_and_memory(method: str) -> None:
    x = gaussian(2, 3, 12, 8)
    for dtype in DTYPES:
        y = polar(x.to(dtype), method)
        assert y.shape == x.shape and y.dtype == dtype and y.data_ptr() != x.data_ptr()
    y = polar(x, method)
    stacked = torch.stack([polar(m, method) for m in x.flatten(0, 1)]).reshape(x.shape)
    assert (y - stacked).abs().max() < 1e-12
    assert (polar(x.mT, method) - y.mT).abs().max() < 1e-12
    assert polar(x[:0], method).shape == (0, 3, 12, 8)
    assert polar(x[..., :0], method).shape == (2, 3, 12, 0)


def test_ways_through_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched or looped, one or two steps per Gram matrix, whole or blocked products: the same numbers in float64."""
    x = gaussian(3, 70, 30)
    expected = polar(x)
    monkeypatch.setattr(paths, "GRAM_ASPECT", 100)
    assert (polar(x) - expected).abs().max() < 1e-12
    monkeypatch.setattr(paths, "CHUNK", 1)
    monkeypatch.setattr(paths, "BLOCKS_FROM", 10)
    assert (polar(x) - expected).abs().max() < 1e-12
    assert (polar(x.mT).mT - expected).abs().max() < 1e-12
    assert (paths.gram(x[0]) - x[0].T @ x[0]).abs().max() < 1e-13
    assert (paths.gram(x[0].T[:, :61]) - x[0].T[:, :61] @ x[0][:61]).abs().max() < 1e-13


# The benchmark

def test_the_benchmark_gives_what_its_table_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_polar, "FASTER", {(6, 32, 16): 1.0})
    before = torch.get_num_threads()
    measured = bench_polar.run(repeats=2, threads=1)
    assert torch.get_num_threads() == before
    assert json.loads(json.dumps(measured)) == measured
    assert [row["input"] for row in measured["rows"]] == list(bench_polar.INPUTS)
    assert all(row["ours_median"] < row["torch_median"] for row in measured["rows"])
    assert markdown(measured["rows"]).count("6 of 32×16") == len(bench_polar.INPUTS)


def test_benchmark_errors_by_hand() -> None:
    x = torch.diag_embed(torch.tensor([[1.0, 0.5, 0.02, 0.001]]))
    y = torch.diag_embed(torch.tensor([[1.1, 0.8, 1.05, 5.0]]))
    assert bench_polar.errors(x, y) == pytest.approx((0.2, 0.1), abs=1e-6)


@pytest.mark.parametrize("steps", [(), ((1.0, 2.0),), (1.0, 2.0), ((1.0, 2.0, float("nan")),), (("a", "b", "c"),), None, 3])
def test_steps_that_are_none_are_refused_with_what_to_give(steps: Any) -> None:
    with pytest.raises(NormError, match="three finite numbers each"):
        polar(gaussian(2, 3, 4), steps)


def test_the_exact_polar_factor_has_a_bound_like_the_others() -> None:
    assert error_bound("exact") == 0
    with pytest.raises(NormError, match="Did you mean 'exact'"):
        error_bound("exakt")
