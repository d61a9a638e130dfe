"""The laws of the sets that are no norm balls: box, non-negative orthant, orthogonal matrices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from norm_cases import DTYPES, POSITIONS, RESULT, TALL, WIDE, columns, gaussian
from normwise.errors import NormError
from normwise.norms import SETS, Box, NonNegative, Orthogonal, Set, get_norm

LOW, HIGH = -0.5, 0.25
SET_OBJECTS: dict[str, Set] = {"box": Box(LOW, HIGH), "non_negative": NonNegative(), "orthogonal": Orthogonal()}
CONVEX = ("box", "non_negative")
RADIUS = {"box": 1.0, "non_negative": 1.0, "orthogonal": 1.5}  # a radius means something for the orthogonal set only

Check = Callable[[str, Tensor, float], None]
LAWS: dict[str, Check] = {}


def law(check: Check) -> Check:
    LAWS[check.__name__] = check
    return check


def project(name: str, x: Tensor) -> Tensor:
    return SET_OBJECTS[name].project(x, RADIUS[name])


def nonzero(x: Tensor) -> Tensor:
    return (x != 0).flatten(1).any(1)


def is_member(name: str, y: Tensor, tol: float) -> bool:
    """Membership by definition, in float64."""
    y = y.double()
    if name == "box":
        return bool(((y >= LOW) & (y <= HIGH)).all())
    if name == "non_negative":
        return bool((y >= 0).all())
    short = y if y.shape[1] <= y.shape[2] else y.mT
    identity = torch.eye(short.shape[1], dtype=torch.float64)
    return bool(((short @ short.mT / RADIUS[name] ** 2 - identity).abs() <= 4 * tol).all())


@law
def feasible(name: str, x: Tensor, tol: float) -> None:
    y = project(name, x)
    blocks = nonzero(x) if name == "orthogonal" else slice(None)  # a zero block has no nearest orthogonal matrix and stays zero
    assert is_member(name, y[blocks], tol)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert bool((y[~nonzero(x)] == 0).all())


@law
def idempotent(name: str, x: Tensor, tol: float) -> None:
    once = project(name, x)
    assert torch.allclose(project(name, once), once, rtol=0, atol=tol)
    if name in CONVEX:
        assert torch.equal(project(name, once), once)


def distances(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """‖x − y‖₂ of each block in float64, in units of the largest entry of ``like``, so that 1e200 can be squared."""
    unit = like.double().abs().flatten(1).amax(1).clamp(min=1)
    return ((x.double() - y.double()) / columns(unit, x)).flatten(1).norm(dim=1)


@law
def nearest(name: str, x: Tensor, tol: float) -> None:
    """No other member is nearer: random ones, and small moves away from the projection."""
    p = project(name, x)
    for seed in range(5):
        noise = gaussian(tuple(x.shape), seed)
        for candidate in (noise, p.double() + 0.01 * noise):
            member = reference(name, candidate)
            slack = tol * (1 + distances(x, p, x))
            assert bool((distances(x, p, x) <= distances(x, member, x) + slack)[nonzero(x)].all())


def reference(name: str, y: Tensor) -> Tensor:
    """Some member, made without the library."""
    if name == "box":
        return y.clamp(LOW, HIGH)
    if name == "non_negative":
        return y.abs()
    tall = y if y.shape[1] >= y.shape[2] else y.mT
    q = torch.linalg.qr(tall).Q * RADIUS[name]
    return q if y.shape[1] >= y.shape[2] else q.mT


@law
def optimal(name: str, x: Tensor, tol: float) -> None:
    """Box and orthant: the formula, entry by entry. Orthogonal: ⟨x, p⟩ reaches its maximum, radius × the sum of the singular values."""
    p = project(name, x).double()
    if name == "box":
        want = torch.where(x > HIGH, HIGH, torch.where(x < LOW, LOW, x.double()))
        assert torch.equal(p, want)
    elif name == "non_negative":
        assert torch.equal(p, (x.double() + x.double().abs()) / 2)
    else:
        unit = columns(x.double().abs().flatten(1).amax(1).clamp(min=1e-300), x)
        best = RADIUS[name] * torch.linalg.svdvals(x.double() / unit).sum(1)
        got = (x.double() / unit * p).flatten(1).sum(1)
        assert bool(((got - best).abs() <= tol * best).all())


@law
def nonexpansive(name: str, x: Tensor, tol: float) -> None:
    y = (x.double() * 0.5 - 0.1).to(x.dtype)
    moved = distances(x, y, x), distances(project(name, x), project(name, y), x)
    assert bool((moved[1] <= moved[0] * (1 + tol)).all())


@law
def excess_measures_the_distance(name: str, x: Tensor, tol: float) -> None:
    """0 within rounding at a member, and outside the largest entry beyond, or max|σ − radius|."""
    rule, radius = SET_OBJECTS[name], RADIUS[name]
    inside = rule.excess(project(name, x), radius)[nonzero(x)]
    assert bool((inside.double() <= 4 * tol).all())
    if name == "orthogonal":
        want = (torch.linalg.svdvals(x.double()) - radius).abs().amax(1)
    else:
        want = (x.double() - project(name, x).double()).abs().flatten(1).amax(1)
    assert torch.allclose(rule.excess(x, radius).double(), want, rtol=1e-5, atol=1e-6)


@law
def leaves_its_input(name: str, x: Tensor, tol: float) -> None:
    before = x.clone()
    project(name, x)
    SET_OBJECTS[name].excess(x, RADIUS[name])
    assert torch.equal(x, before)


@law
def batch_equals_one_by_one(name: str, x: Tensor, tol: float) -> None:
    single = torch.cat([project(name, x[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(single, project(name, x), rtol=0, atol=tol)


def all_checks() -> list[tuple[str, str, str]]:
    """(law, set, dtype). Only convex sets have a projection that does not expand: at a singular matrix the polar factor jumps."""
    checks = product(LAWS, SETS, DTYPES)
    return [(law, name, dtype) for law, name, dtype in checks if law != "nonexpansive" or name in CONVEX]


@pytest.mark.parametrize(("check", "name", "dtype"), all_checks())
def test_set_law(check: str, name: str, dtype: str, coverage: Callable[..., None]) -> None:
    for position, shape in product(POSITIONS, (TALL, WIDE)):
        if name == "orthogonal" and position == "low rank" and check == "batch_equals_one_by_one":
            continue  # the nearest orthogonal matrix of a singular one is not unique
        build, _ = POSITIONS[position]
        x = build((4, 1, 1) if position == "one entry" else shape, dtype).to(DTYPES[dtype])
        LAWS[check](name, x, RESULT[dtype])
        coverage("law × set", check, name, dtype=dtype, position=position)


def test_no_set_is_missing() -> None:
    assert set(SET_OBJECTS) == set(SETS)
    assert {type(s) for s in SET_OBJECTS.values()} == set(SETS.values())
    assert all(get_norm(name) == s for name, s in SET_OBJECTS.items() if name != "box")


def test_an_orthogonal_radius_per_block() -> None:
    x, radius = gaussian((3, 4, 6), 1), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    singular = torch.linalg.svdvals(Orthogonal().project(x, radius))
    assert torch.allclose(singular, radius[:, None].expand(3, 4), rtol=1e-12)


def test_orthogonal_refuses_vectors() -> None:
    with pytest.raises(NormError, match=r"\(batch, m, n\)"):
        Orthogonal().project(torch.ones(2, 6))


def test_an_open_box_bounds_one_side() -> None:
    x = gaussian((2, 5), 1)
    assert torch.equal(Box(0.0, float("inf")).project(x), NonNegative().project(x))


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("nan"))])
def test_a_box_that_holds_nothing_is_refused(low: float, high: float) -> None:
    with pytest.raises(NormError, match="low <= high"):
        Box(low, high)


@pytest.mark.parametrize("name", ["box", "non_negative", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_sets_refuse_what_are_no_real_numbers_as_norms_do(name: str, dtype: torch.dtype) -> None:
    members = Box(0, 1) if name == "box" else SETS[name]()
    for act in (members.project, members.excess):
        with pytest.raises(NormError, match="needs real floating-point blocks"):
            act(torch.ones(2, 3, 3, dtype=dtype))
