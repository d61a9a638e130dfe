"""``nw.clip_grad_norm_``: torch's function where that is right, and what it promises where torch's is not."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import normwise as nw

ORDERS = [1.0, 2.0, 3.5, math.inf]
SHAPES = [(4, 3), (7,), (2, 3, 5), (), (0, 4), (300, 5)]


def params(*grads: Tensor | None) -> list[nn.Parameter]:
    made = []
    for g in grads:
        p = nn.Parameter(torch.zeros(()) if g is None else torch.zeros_like(g))
        p.grad = None if g is None else g.clone()
        made.append(p)
    return made


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, dtype=torch.float64, generator=gen)).to(dtype) for s in SHAPES]


def p_norm(grads: list[Tensor], order: float) -> float:
    """In Python's own arithmetic, on the absolute values of all entries."""
    entries = [abs(z) for g in grads for z in g.flatten().tolist()]
    if order == math.inf:
        return max(entries, default=0.0)
    largest = max(entries, default=0.0) or 1.0
    return largest * math.fsum((z / largest) ** order for z in entries) ** (1 / order)


def test_its_signature_is_torchs():
    theirs = inspect.signature(torch.nn.utils.clip_grad_norm_).parameters
    ours = inspect.signature(nw.clip_grad_norm_).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [(p.name, p.default, p.kind) for p in theirs.values()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [0.1, 2.0, 1e6])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_it_equals_torchs_on_ordinary_gradients(order, max_norm, foreach):
    """Equal to 1e-6 relatively, which is what torch adds to the norm; the norm returned to 1e-13."""
    ours, theirs = params(*drawn()), params(*drawn())
    of_torch = [q for q in theirs if q.numel() > 0]  # which has no largest entry of an empty tensor
    expected = torch.nn.utils.clip_grad_norm_(of_torch, max_norm, order, foreach=foreach)
    got = nw.clip_grad_norm_(ours, max_norm, order, foreach=foreach)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6 + 1e-6 / float(expected), atol=0)
    if float(expected) > max_norm:
        assert p_norm([p.grad for p in ours], order) == pytest.approx(max_norm, rel=1e-13)
    else:
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, drawn(), strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_finite_fp32_gradients_whose_powers_leave_the_range(order, scale):
    grads = drawn(dtype=torch.float32, scale=scale)
    ps = params(*grads)
    radius = 0.5 * scale
    total = nw.clip_grad_norm_(ps, radius, order)
    assert float(total) == pytest.approx(p_norm(grads, order), rel=1e-6)
    assert p_norm([p.grad for p in ps], order) == pytest.approx(radius, rel=1e-6)


def test_a_norm_beyond_fp32_is_still_clipped_rightly():
    """300 entries of 3e38 have the norm 5.2e39: returned as infinity, since no fp32 number is so large, but not mistaken for it."""
    ps = params(torch.full((300,), 3e38))
    total = nw.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True)
    assert total.dtype == torch.float32
    assert float(total) == math.inf
    assert float(ps[0].grad.double().norm()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_that_are_not_finite_are_left_as_they_are(bad, order):
    """torch's turns every other entry into 0 or NaN."""
    grads = drawn(dtype=torch.float32)
    grads[1][2] = bad
    ps = params(*grads)
    total = nw.clip_grad_norm_(ps, 0.1, order)
    assert not math.isfinite(total)
    assert math.isnan(total) == math.isnan(bad)
    for p, g in zip(ps, grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(nw.NonFiniteError, match="were not changed"):
        nw.clip_grad_norm_(ps, 0.1, order, error_if_nonfinite=True)
    for p, g in zip(ps, grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_threshold_only_measures():
    for grads in (drawn(), [torch.tensor([math.inf, 1.0])]):
        ps = params(*grads)
        total = nw.clip_grad_norm_(ps, math.inf)
        finite = all(bool(g.isfinite().all()) for g in grads)
        assert float(total) == pytest.approx(p_norm(grads, 2.0) if finite else math.inf, rel=1e-13)
        assert all(torch.equal(p.grad, g) for p, g in zip(ps, grads, strict=True))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, -math.inf])
def test_a_threshold_that_would_erase_or_flip_is_refused(max_norm):
    ps = params(*drawn())
    with pytest.raises(nw.NormError, match="max_norm"):
        nw.clip_grad_norm_(ps, max_norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, drawn(), strict=True))


@pytest.mark.parametrize("order", [0.0, 0.5, -1.0, -math.inf, math.nan])
def test_an_order_that_is_no_norm_is_refused(order):
    ps = params(*drawn())
    with pytest.raises(nw.NormError, match="norm_type"):
        nw.clip_grad_norm_(ps, 1.0, order)
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, drawn(), strict=True))


def test_a_generator_a_single_tensor_and_those_without_gradient():
    ps = params(*drawn(), None)
    assert float(nw.clip_grad_norm_((p for p in ps), 1.0)) == pytest.approx(p_norm(drawn(), 2.0), rel=1e-13)
    alone = params(torch.tensor([3.0, 4.0]))[0]
    assert float(nw.clip_grad_norm_(alone, 1.0)) == 5.0
    torch.testing.assert_close(alone.grad, torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("given", [[], params(None, None), iter(())])
def test_nothing_to_clip_gives_zero(given):
    assert float(nw.clip_grad_norm_(given, 1.0)) == 0.0


def test_zero_gradients_stay_zero():
    ps = params(torch.zeros(3), torch.zeros(2, 2))
    assert float(nw.clip_grad_norm_(ps, 1.0)) == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ps)


@pytest.mark.parametrize("order", ORDERS)
def test_mixed_dtypes_in_one_list(order):
    """Every gradient keeps its dtype and is scaled by one factor, to its own precision."""
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float64]
    grads = [g.to(d) for g, d in zip(drawn(), dtypes, strict=True)]
    ps = params(*grads)
    expected = p_norm(grads, order)
    total = nw.clip_grad_norm_(ps, 0.5, order)
    assert float(total) == pytest.approx(expected, rel=2e-7)
    factor = 0.5 / float(total)
    for p, g in zip(ps, grads, strict=True):
        assert p.grad.dtype == g.dtype
        tolerance = 1e-12 if g.dtype == torch.float64 else torch.finfo(g.dtype).eps
        atol = 1e-7 if g.dtype == torch.float16 else 0.0
        torch.testing.assert_close(p.grad.double(), g.double() * factor, rtol=tolerance, atol=atol)


def test_fp16_squares_do_not_overflow():
    ps = params(torch.full((100,), 300.0, dtype=torch.float16))
    assert float(nw.clip_grad_norm_(ps, 1.0)) == pytest.approx(3000.0, rel=1e-6)
    torch.testing.assert_close(ps[0].grad.float(), torch.full((100,), 0.1), rtol=1e-3, atol=0)


def test_bf16_sums_do_not_lose():
    """Summed in bf16, 256 + 1 is 256: a running sum of 100,000 ones would stop there."""
    ps = params(torch.ones(100_000, dtype=torch.bfloat16))
    assert float(nw.clip_grad_norm_(ps, 1e9)) == pytest.approx(math.sqrt(100_000), rel=1e-6)
    assert float(nw.clip_grad_norm_(ps, 1e9, 1.0)) == pytest.approx(100_000, rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_complex_gradients_count_by_modulus(order):
    gen = torch.Generator().manual_seed(0)
    grads = [torch.randn(5, 3, dtype=torch.complex128, generator=gen), torch.randn(4, dtype=torch.float64, generator=gen)]
    ours, theirs = params(*grads), params(*grads)
    expected = p_norm(grads, order)
    assert float(nw.clip_grad_norm_(ours, 0.5, order)) == pytest.approx(expected, rel=1e-13)
    for p, g in zip(ours, grads, strict=True):
        torch.testing.assert_close(p.grad, g * (0.5 / expected), rtol=1e-12, atol=0)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5, order)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=3e-6, atol=0)


def test_a_sparse_gradient_is_one_clear_error_and_nothing_is_changed():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    dense = params(torch.ones(3))[0]
    kept = table.weight.grad.to_dense()
    with pytest.raises(nw.NormError, match="sparse"):
        nw.clip_grad_norm_([dense, table.weight], 0.1)
    assert torch.equal(dense.grad, torch.ones(3))
    assert torch.equal(table.weight.grad.to_dense(), kept)


def test_gradients_of_any_memory_layout_are_changed_in_place():
    g = torch.arange(1.0, 13.0).view(3, 4).t()
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = g
    expected = g.clone() / p_norm([g], 2.0)
    nw.clip_grad_norm_(p, 1.0)
    assert p.grad is g
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=0)


def test_clipping_twice_is_clipping_once():
    ps = params(*drawn())
    nw.clip_grad_norm_(ps, 1.0)
    once = [p.grad.clone() for p in ps]
    nw.clip_grad_norm_(ps, 1.0 + 1e-12)
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, once, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e308])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_norm_beyond_float64_is_clipped_rightly(order, max_norm, dtype):
    """Fractions of Python's hold what float64 does not: 400 entries of 1.7e308, beside small ones that keep their digits."""
    largest, small = 1.7e308, 3e100
    grads = [torch.full((20, 20), largest, dtype=dtype), torch.full((5,), small, dtype=dtype)]
    ours = params(*grads)
    total = nw.clip_grad_norm_(ours, max_norm, order, error_if_nonfinite=True)
    norm = Fraction(largest) * (1 if order == math.inf else Fraction(400 ** (1 / order)))    # the small ones add nothing
    factor = min(Fraction(1), Fraction(max_norm) / norm)
    for p, entry in zip(ours, (largest, small), strict=True):
        assert p.grad.real.flatten().tolist() == pytest.approx([float(Fraction(entry) * factor)] * p.grad.numel(), rel=1e-13)
    assert float(total) == (math.inf if order < math.inf else largest)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_float64_gradients_that_are_not_finite_stay(bad):
    ours = params(torch.tensor([1e308, 1e308, bad], dtype=torch.float64))
    with pytest.raises(nw.NonFiniteError):
        nw.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    nw.clip_grad_norm_(ours, 1.0)
    assert ours[0].grad[:2].tolist() == [1e308, 1e308]
