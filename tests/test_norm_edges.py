"""Where norms go wrong: large, subnormal, empty and non-finite blocks, wrong shapes and radii, names, and what the forms mean."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from norm_cases import DTYPES, FORMULAS, columns, gaussian, registered
from norm_checks import hairs
from normwise.errors import NormError
from normwise.norms import FORMS, NORMS, SETS, get_norm

ALL = registered()


def some_shape(name: str, *, rows: int, m: int = 5, n: int = 4) -> tuple[int, ...]:
    return (rows, m, n) if FORMULAS[name].matrix else (rows, m * n)


# --- large blocks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "dtype"), list(product(["l1", "l2", "rms", "sum_of_units", "sum_of_inputs", "max_of_inputs"], DTYPES)))
def test_long_sums_lose_nothing(name: str, dtype: str) -> None:
    """120,000 entries around 1: summed in bf16 they stop at 256, in naive fp32 they lose the sixth digit; fp16 squares overflow."""
    x = (1 + 0.1 * gaussian((1, 300, 400), 1)).to(DTYPES[dtype])
    x = x if FORMULAS[name].matrix else x.flatten(1)
    want = FORMULAS[name].value(x.double())
    rtol = 1e-13 if dtype == "float64" else 2e-7
    assert torch.allclose(get_norm(name).value(x).double(), want, rtol=rtol, atol=0)


@pytest.mark.parametrize(("name", "dtype"), list(product(ALL, DTYPES)))
def test_bounds_of_larger_blocks_hold_to_a_hair(name: str, dtype: str) -> None:
    """1200 entries and radii far below the norm: the roundings of many entries must not add up beyond what the engine keeps clear."""
    x = gaussian(some_shape(name, rows=3, m=40, n=30), 2).to(DTYPES[dtype])
    norm, formula = get_norm(name), FORMULAS[name]
    for factor in (0.7, 0.05, 0.002):
        radius = norm.value(x) * factor
        for y in (norm.project(x, radius), norm.clip_norm(x, radius)):
            assert bool((formula.value(y.double()) <= radius.double() * (1 + hairs(name, dtype))).all()), (name, factor)


# --- the ends of the range --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "dtype"), list(product(ALL, ["float32", "bfloat16"])))
def test_subnormal_blocks_normalize(name: str, dtype: str) -> None:
    """The reciprocal of a subnormal norm is infinite in fp32; the normalised block is not."""
    tiny = torch.finfo(torch.float32).tiny / 64
    x = (gaussian(some_shape(name, rows=2), 3) * tiny).to(DTYPES[dtype])
    y = get_norm(name).normalize(x, 1.0)
    rtol = 2e-2 if dtype == "bfloat16" else 1e-5
    assert torch.allclose(FORMULAS[name].value(y.double()), torch.ones(2, dtype=torch.float64), rtol=rtol)


@pytest.mark.parametrize("name", ALL)
def test_subnormal_gradients_have_a_direction(name: str) -> None:
    tiny = torch.finfo(torch.float32).tiny / 64
    x = (gaussian(some_shape(name, rows=2), 4) * tiny).float()
    y = get_norm(name).lmo(x).double()
    up = x.double() / tiny
    assert bool((FORMULAS[name].value(y) <= 1 + 1e-5).all())
    assert torch.allclose((up * y).flatten(1).sum(1), -FORMULAS[name].dual(up), rtol=1e-4)


# --- empty and non-finite ---------------------------------------------------------------------------------------------
def maps(name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    norm = get_norm(name)
    return {
        "project": lambda x: norm.project(x, 0.5),
        "clip_norm": lambda x: norm.clip_norm(x, 0.5),
        "normalize": lambda x: norm.normalize(x, 0.5),
        "prox": lambda x: norm.prox(x, 0.5),
        "lmo": lambda x: norm.lmo(x),
        "subgradient": lambda x: norm.subgradient(x),
    }


@pytest.mark.parametrize("name", ALL)
def test_empty_blocks(name: str) -> None:
    """No blocks, or blocks of nothing (an empty shard): the norm is 0 and every map gives the shape back."""
    shapes = [(0, 3, 2), (2, 0, 3), (2, 3, 0)] if FORMULAS[name].matrix else [(0, 3), (2, 0)]
    for shape in shapes:
        x = torch.zeros(shape)
        assert torch.equal(get_norm(name).value(x), torch.zeros(shape[0]))
        for label, move in maps(name).items():
            assert move(x).shape == x.shape, label


@pytest.mark.parametrize(("name", "bad"), list(product(ALL, [float("nan"), float("inf")])))
def test_a_block_that_is_not_finite_harms_no_other(name: str, bad: float) -> None:
    x = gaussian(some_shape(name, rows=3), 5).float()
    clean = x[::2].clone()
    x[1].view(-1)[3] = bad
    values = get_norm(name).value(x)
    assert torch.allclose(values[::2], get_norm(name).value(clean), rtol=1e-6)
    assert not bool(values[1].isfinite())
    for label, move in maps(name).items():
        assert torch.allclose(move(x)[::2], move(clean), rtol=1e-5, atol=1e-6), label


ENTRYWISE = {("project", "linf"), ("project", "sign"), ("prox", "l1")}
"""What acts on each entry by itself."""
BLOCKWISE = [pair for pair in product(["project", "prox", "clip_norm", "normalize"], ALL) if pair not in ENTRYWISE]


@pytest.mark.parametrize(("bad", "dtype"), list(product(["nan", "inf", "-inf"], DTYPES)))
@pytest.mark.parametrize(("label", "name"), BLOCKWISE)
def test_a_block_that_is_not_finite_is_left_as_it_is(name: str, bad: str, dtype: str, label: str) -> None:
    """Bit for bit, wherever the entry stands, alone and beside a block that is moved: nothing spreads, and nothing is hidden."""
    whole = gaussian(some_shape(name, rows=2), 6).to(DTYPES[dtype])
    for place in (0, 7, 19):
        x = whole.clone()
        x[1].view(-1)[place] = float(bad)
        moved = maps(name)[label](x)
        assert torch.equal(torch.nan_to_num(moved[1], nan=77), torch.nan_to_num(x[1], nan=77)), place
        alone = maps(name)[label](x[1:])
        assert torch.equal(torch.nan_to_num(alone, nan=77), torch.nan_to_num(x[1:], nan=77)), place
        assert not torch.equal(moved[0], x[0]), "the block beside it was to be moved"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_acts_on_single_entries_does_as_torch_does(dtype: str) -> None:
    """An infinity is clamped as by ``torch.clamp``, which ``clip_grad_value_`` calls, and NaN stays; neither touches another entry."""
    x = torch.tensor([[3.0, float("inf"), -float("inf"), float("nan"), 0.1, -2.0]], dtype=DTYPES[dtype])
    for radius in (0.5, torch.tensor([0.5])):
        assert torch.equal(get_norm("linf").project(x, radius).nan_to_num(77), x.clamp(-0.5, 0.5).nan_to_num(77))
        assert torch.equal(get_norm("l1").prox(x, radius).nan_to_num(77), torch.nn.functional.softshrink(x, 0.5).nan_to_num(77))
    assert torch.equal(get_norm("linf").project(x, float("inf")).nan_to_num(77), x.nan_to_num(77))


@pytest.mark.parametrize("entries", [4, 128, 129, 300])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["l1", "l2"])
def test_norms_have_a_derivative_at_every_scale(name: str, dtype: str, entries: int) -> None:
    """Long rows, zero, tiny and large ones beside an ordinary one; x/‖x‖ at unit scale is the reference, and 0 at zero."""
    unit = gaussian((5, entries), 8)
    unit[3] = 0
    powers = {"float64": (-700, 0, 520, 0, -600), "float32": (-120, 0, 124, 0, -80)}[dtype]
    x = torch.ldexp(unit, torch.tensor(powers)[:, None]).to(DTYPES[dtype]).requires_grad_()
    get_norm(name).value(x).double().mul(torch.arange(1.0, 6.0, dtype=torch.float64)).sum().backward()
    direction = unit.sign() if name == "l1" else unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-300)
    want = direction * torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    assert x.grad is not None
    rtol, atol = (1e-5, 1e-7) if dtype == "float32" else (1e-12, 1e-13)
    torch.testing.assert_close(x.grad.double(), want, rtol=rtol, atol=atol)


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in ALL if FORMULAS[name].matrix])
def test_matrix_norms_refuse_vectors(name: str) -> None:
    for method in ("value", "dual", "project", "clip_norm", "normalize", "prox", "lmo", "subgradient"):
        numbers = () if method in ("value", "dual", "subgradient") else (1.0,)
        with pytest.raises(NormError, match=r"\(batch, m, n\)"):
            getattr(get_norm(name), method)(torch.ones(2, 6), *numbers)


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_block_of_real_numbers_is_refused(name: str) -> None:
    norm, shape = get_norm(name), some_shape(name, rows=2)
    for wrong in (torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.complex64), torch.ones(2, 2, 2, 2), torch.ones(3)):
        with pytest.raises(NormError):
            norm.value(wrong)


@pytest.mark.parametrize(("name", "method"), list(product(ALL, ["project", "clip_norm", "normalize", "prox", "lmo"])))
def test_radii_that_mean_nothing_are_refused(name: str, method: str) -> None:
    """A negative radius would flip signs, NaN would spread; a tensor must have one radius per block."""
    move, x = getattr(get_norm(name), method), torch.ones(some_shape(name, rows=2))
    for number in (-1.0, float("nan")):
        with pytest.raises(NormError, match="0 or more"):
            move(x, number)
    with pytest.raises(NormError, match="one a block"):
        move(x, torch.ones(3))


# --- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_a_norm_is_known_by_its_name(name: str) -> None:
    norm = get_norm(name)
    assert norm.name == name
    assert get_norm(norm.name) == norm
    assert get_norm(norm) is norm
    assert norm.matrix is FORMULAS[name].matrix
    assert copy.deepcopy(norm) == norm == pickle.loads(pickle.dumps(norm))
    assert len({get_norm(other) for other in ALL}) == len(ALL), "two registered names are one norm"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(NormError, match="Did you mean 'spectral'") as error:
        get_norm("spectrall")
    assert all(name in str(error.value) for name in (*NORMS, *FORMS, *SETS))


# --- what the operator norms mean -------------------------------------------------------------------------------------
def vector(name: str, v: Tensor) -> Tensor:
    return FORMULAS[name].value(v)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def strongest(rows: Tensor) -> Tensor:
    """(b, k, n) -> (b, n), the row of largest L2 norm."""
    return rows[torch.arange(len(rows)), rows.norm(dim=2).argmax(1)]


def one_hot_input(w: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(w.norm(dim=1).argmax(1), w.shape[2]).double()


def top_right(w: Tensor) -> Tensor:
    return torch.linalg.svd(w).Vh[:, 0]


# operator norm -> (norm of the input, norm of the output, the input where it is attained)
OPERATORS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "spectral": ("l2", "l2", top_right),
    "max_of_units": ("l2", "linf", strongest),
    "max_of_inputs": ("l1", "l2", one_hot_input),
    "rms_rms": ("rms", "rms", top_right),
    "one_rms": ("l1", "rms", one_hot_input),
    "rms_inf": ("rms", "linf", strongest),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_norms_are_the_largest_gain(name: str) -> None:
    """‖W‖ = max of ‖Wv‖_out / ‖v‖_in: no random input gains more, the named one gains as much."""
    inputs, outputs, attained = OPERATORS[name]
    w = gaussian((2, 5, 8), 6)
    value = get_norm(name).value(w)

    def gain(v: Tensor) -> Tensor:
        return vector(outputs, (w @ v[:, :, None])[:, :, 0]) / vector(inputs, v)

    assert all(bool((gain(gaussian((2, 8), 100 + seed)) <= value).all()) for seed in range(40))
    assert torch.allclose(gain(attained(w)), value, rtol=1e-12)


def test_the_lmo_of_the_sign_form_is_the_sign_over_the_inputs() -> None:
    """Scion's head (arXiv 2502.07529): −sign(G)/d_in."""
    g = gaussian((2, 5, 8), 7)
    assert torch.allclose(get_norm("sign").lmo(g), -g.sign() / 8)


def test_the_spectral_lmo_is_the_polar_factor() -> None:
    g = gaussian((2, 5, 8), 8)
    gram = g @ g.mT
    values, vectors = torch.linalg.eigh(gram)
    polar = vectors @ torch.diag_embed(values**-0.5) @ vectors.mT @ g
    assert torch.allclose(get_norm("spectral").lmo(g), -polar, atol=1e-12)
    assert torch.allclose(get_norm("rms_rms").lmo(g), -polar * (5 / 8) ** 0.5, atol=1e-12)


def test_forms_are_free_of_the_dimension() -> None:
    """A constant or orthogonal matrix has the same form at every width: that is what they are for."""
    for d_out, d_in in ((4, 4), (64, 16), (8, 128)):
        ones = torch.ones(1, d_out, d_in, dtype=torch.float64)
        assert get_norm("rms").value(ones).item() == pytest.approx(1)
        assert get_norm("one_rms").value(ones).item() == pytest.approx(1)
        for name in ("rms_rms", "rms_inf", "sign"):
            assert get_norm(name).value(ones / d_in).item() == pytest.approx(1)


def test_columns_broadcast_as_the_cases_assume() -> None:
    assert columns(torch.ones(3), torch.ones(3, 2, 4)).shape == (3, 1, 1)
