"""The laws of norms, put to every registered norm, form and set, in every position and dtype.

A law is a function of a :class:`norm_cases.Case`. It compares with formulas written out in float64, never with the code under
test, and everything is in units of the block's own scale, so that 1e200 and 1e-200 are judged like 1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import norm_interface  # noqa: F401  registers its laws
from norm_cases import DTYPES, FORMULAS, HUGE, POSITIONS, VALUE, Case, cases, columns
from norm_checks import LAWS, ONLY, all_checks, at_most, blocks_equal, equal, feasible, hairs, inner, law, law_of, size
from normwise.norms import FORMS, NORMS


# --- value and dual ---------------------------------------------------------------------------------------------------
@law
def value(case: Case) -> None:
    """The value is the formula, in the promised dtype, positive where the block is not zero."""
    got, want = case.norm.value(case.x), case.value(case.x)
    assert got.shape == case.x.shape[:1]
    assert got.dtype == (torch.float64 if case.dtype == "float64" else torch.float32)
    equal(case, case.down(got), want, VALUE[case.dtype] * want, "value")


@law
def dual(case: Case) -> None:
    """The dual is the dual's formula, by method and as the dual norm's value."""
    want = case.dual(case.x)
    for got in (case.norm.dual(case.x), case.norm.dual_norm.value(case.x)):
        equal(case, case.down(got), want, VALUE[case.dtype] * want, "dual")


@law
def homogeneous(case: Case) -> None:
    before = case.down(case.norm.value(case.x))
    for factor in (-2.0, 0.25, -1.0):  # powers of two: exact in every dtype
        after = case.down(case.norm.value(case.x * factor))
        equal(case, after, abs(factor) * before, 2 * VALUE[case.dtype] * before, f"value({factor} x)")


@law
def triangle(case: Case) -> None:
    for y in (case.other(1), case.other(2), case.x):
        total, parts = case.x + y, (case.norm.value(case.x), case.norm.value(y))
        bound = sum(map(case.down, parts))
        at_most(case, case.down(case.norm.value(total)), bound, case.result * bound, "‖x + y‖ against ‖x‖ + ‖y‖")


@law
def hoelder(case: Case) -> None:
    """|⟨x, y⟩| <= ‖x‖·‖y‖_*, for random y and for y = x."""
    for y in (case.other(3), case.other(4), case.x):
        pairing = inner(case.down(case.x), case.down(y)).abs()
        bound = case.down(case.norm.value(case.x)) * case.down(case.norm.dual(y))
        at_most(case, pairing, bound, 4 * VALUE[case.dtype] * bound, "⟨x, y⟩")


@law
def bidual(case: Case) -> None:
    """The dual of the dual is the norm: by value, and as the maximum of ⟨x, y⟩ over the dual ball."""
    want = case.value(case.x)
    again = case.norm.dual_norm.dual_norm.value(case.x)
    equal(case, case.down(again), want, VALUE[case.dtype] * want, "bidual")
    best = -case.norm.dual_norm.lmo(case.x)
    attained = inner(case.down(case.x), best.double())
    equal(case, attained, want, case.result * want, "max ⟨x, y⟩ over the dual ball")


# --- LMO and subgradient ----------------------------------------------------------------------------------------------
@law
def lmo_attains_dual_norm(case: Case) -> None:
    """Hölder's equality and its sign: ⟨x, lmo(x, r)⟩ = −r·‖x‖_* and ‖lmo(x, r)‖ <= r; r is 1 unless given."""
    one = torch.ones_like(case.radius)
    for y, radius in ((case.norm.lmo(case.x), one), (case.norm.lmo(case.x, 0.75), 0.75 * one)):
        feasible(case, y, radius.double(), "‖lmo‖", lambda z: case.formula.value(z.double()))
        want = -radius.double() * case.dual(case.x)
        equal(case, inner(case.down(case.x), y.double()), want, case.result * want.abs(), "⟨x, lmo(x)⟩")


@law
def lmo_with_a_radius_per_block(case: Case) -> None:
    y, radius = case.norm.lmo(case.x, case.radius), case.down(case.radius)
    feasible(case, y, radius, "‖lmo‖")
    want = -radius * case.dual(case.x)
    equal(case, inner(case.down(case.x), case.down(y)), want, case.result * want.abs(), "⟨x, lmo(x, r)⟩")


@law
def subgradient(case: Case) -> None:
    """⟨s, x⟩ = ‖x‖ and ‖s‖_* <= 1, which is s ∈ ∂‖x‖; and so ‖y‖ >= ‖x‖ + ⟨s, y − x⟩."""
    s, x = case.norm.subgradient(case.x).double(), case.down(case.x)
    want = case.value(case.x)
    equal(case, inner(s, x), want, case.result * want, "⟨s, x⟩")
    feasible(case, s, torch.ones_like(want), "‖s‖_*", case.formula.dual)
    for y in (case.other(5), -case.x, case.x / 2):
        left = want + inner(s, case.down(y) - x)
        at_most(case, left, case.value(y), case.result * (want + case.value(y)), "the subgradient inequality")


# --- projection -------------------------------------------------------------------------------------------------------
@law
def project_is_feasible(case: Case) -> None:
    feasible(case, case.norm.project(case.x, case.radius), case.down(case.radius), "‖Px‖")


@law
def bounds_hold_to_a_hair(case: Case) -> None:
    """After rounding, a bound is missed by less than the hair that the engine keeps from it."""
    hair = 1 + hairs(case.name, case.dtype)
    for y in (case.norm.project(case.x, case.radius), case.norm.clip_norm(case.x, case.radius)):
        at_most(case, case.value(y), hair * case.down(case.radius), 0.0, "a bound")


@law
def project_leaves_the_inside(case: Case) -> None:
    """A block inside comes back bit for bit, from project and from clip_norm."""
    wider = 2 * case.norm.value(case.x) + (case.x == 0).flatten(1).all(1)
    assert torch.equal(case.norm.project(case.x, wider), case.x)
    assert torch.equal(case.norm.clip_norm(case.x, wider), case.x)


@law
def zero_and_infinite_radius(case: Case) -> None:
    """The ball of radius 0 is the zero block, an infinite radius ("for logging") changes nothing."""
    for move in (case.norm.project, case.norm.clip_norm):
        assert bool((move(case.x, 0.0) == 0).all())
        assert torch.equal(move(case.x, float("inf")), case.x)
        assert torch.equal(move(case.x, torch.full_like(case.radius, torch.inf)), case.x)


@law
def project_reaches_the_sphere(case: Case) -> None:
    """A block outside lands on the sphere, not within it."""
    outside = case.value(case.x) > case.down(case.radius) * (1 + case.result)
    got, want = case.value(case.norm.project(case.x, case.radius)), case.down(case.radius)
    equal(case, got[outside], want[outside], case.result * want[outside], "‖Px‖")


@law
def project_idempotent(case: Case) -> None:
    once = case.norm.project(case.x, case.radius)
    twice = case.norm.project(once, case.radius)
    blocks_equal(case, case.down(twice), case.down(once), size(case.down(once)), "P(Px)")


@law
def project_nonexpansive(case: Case) -> None:
    for y in (case.other(6), case.x * 0.75, -case.x):
        before = size(case.down(case.x) - case.down(y))
        after = [case.down(case.norm.project(z, case.radius)) for z in (case.x, y)]
        slack = case.result * (size(after[0]) + size(after[1]))
        at_most(case, size(after[0] - after[1]), before, slack, "‖Px − Py‖₂ against ‖x − y‖₂")


@law
def project_optimal(case: Case) -> None:
    """⟨x − Px, y − Px⟩ <= 0 for all feasible y: for the worst, by the support function r·‖x − Px‖_*, and for some by hand."""
    p, radius = case.norm.project(case.x, case.radius), case.down(case.radius)
    x, px = case.down(case.x), case.down(p)
    slack = case.result * (size(x) + size(px)) * size(px)
    support = radius * case.formula.dual(x - px)
    at_most(case, support, inner(x - px, px), slack, "the variational inequality's worst case")
    worst = case.norm.lmo((px - x).to(case.x.dtype), case.radius)
    for y in (worst, inside_ball(case, 7), inside_ball(case, 8)):
        at_most(case, inner(x - px, case.down(y) - px), torch.zeros(()), slack, "the variational inequality")


def inside_ball(case: Case, seed: int) -> Tensor:
    """A random feasible block, by the formula alone."""
    y = case.other(seed).double()
    return y * columns(case.down(case.radius) / case.value(y) * 0.999, y)


@law
def moreau(case: Case) -> None:
    """x = prox of t‖·‖ + projection onto the dual ball of radius t."""
    parts = case.norm.prox(case.x, case.step), case.norm.dual_norm.project(case.x, case.step)
    whole = sum(map(case.down, parts))
    blocks_equal(case, whole, case.down(case.x), size(case.down(case.x)), "prox + projection")


# --- prox -------------------------------------------------------------------------------------------------------------
@law
def prox_optimal(case: Case) -> None:
    """(x − p)/t ∈ ∂‖p‖, that is ‖x − p‖_* <= t and ⟨x − p, p⟩ = t‖p‖; and no other point is better."""
    p, t, x = case.down(case.norm.prox(case.x, case.step)), case.down(case.step), case.down(case.x)
    slack = case.result * size(x) * (size(x) + size(p))
    at_most(case, case.formula.dual(x - p), t, case.result * (t + case.formula.dual(x)), "‖x − p‖_*")
    equal(case, inner(x - p, p), t * case.formula.value(p), slack, "⟨x − p, p⟩")
    for y in (case.down(case.other(9)), x, p / 2, p + 0.01 * x):
        left = t * case.formula.value(p) + inner(x - p, y - p)
        at_most(case, left, t * case.formula.value(y), case.result * size(x) * (size(x) + size(y)), "the prox's subgradient inequality")


@law
def prox_vanishes(case: Case) -> None:
    """At t >= ‖x‖_* nothing is left, to the bit."""
    step = 2 * case.norm.dual(case.x) + (case.x == 0).flatten(1).all(1)
    assert bool((case.norm.prox(case.x, step) == 0).all())


@law_of("l1")
def prox_soft_thresholds(case: Case) -> None:
    """L1: sign(x)·max(|x| − t, 0), with exact zeros where |x| <= t."""
    step, x = case.norm.value(case.x) / case.x[0].numel(), case.down(case.x)
    got, t = case.norm.prox(case.x, step), columns(case.down(step), case.x)
    assert bool((got == 0)[x.abs() <= t * (1 - case.result)].all())
    assert bool((got != 0)[x.abs() >= t * (1 + case.result) + (t == 0)].all())
    blocks_equal(case, case.down(got), x.sign() * (x.abs() - t).clamp(min=0), size(x), "the soft threshold")


def group_zeros(case: Case, dim: int) -> None:
    """Whole vectors along ``dim`` become exactly zero where their length is at most t; the others shrink by t."""
    x = case.down(case.x)
    lengths = x.square().sum(dim, keepdim=True).sqrt()
    step = lengths.flatten(1).median(1).values * 1.1 * case.scale + (case.scale == 1)
    step = step.to(case.step.dtype)
    t, got = columns(case.down(step), x), case.norm.prox(case.x, step)
    falls = (lengths <= t * (1 - case.result)).expand_as(x)
    assert bool((got == 0)[falls].all())
    assert bool(falls.any())
    shrunk = torch.where(lengths > t, x * (1 - t / lengths), 0.0)
    blocks_equal(case, case.down(got), shrunk, size(x), "the group soft threshold")


@law_of("sum_of_units")
def prox_drops_whole_units(case: Case) -> None:
    group_zeros(case, dim=2)


@law_of("sum_of_inputs")
def prox_drops_whole_inputs(case: Case) -> None:
    group_zeros(case, dim=1)


@law_of("nuclear")
def prox_lowers_the_rank(case: Case) -> None:
    """Singular values between the largest and t fall to zero up to rounding, the others shrink by t."""
    step = case.norm.dual(case.x) * 0.5 + (case.x == 0).flatten(1).all(1)
    s = torch.linalg.svdvals(case.down(case.x))
    got = torch.linalg.svdvals(case.down(case.norm.prox(case.x, step)))
    want = (s - case.down(step)[:, None]).clamp(min=0)
    at_most(case, (got - want).abs().amax(1), torch.zeros(()), case.result * s[:, 0], "σ after the prox")


# --- radial maps ------------------------------------------------------------------------------------------------------
@law
def clip_norm_is_radial(case: Case) -> None:
    """x · min(1, r/‖x‖)."""
    factor = (case.down(case.radius) / case.value(case.x)).clamp(max=1)
    want = case.down(case.x) * columns(factor.nan_to_num(1.0, posinf=1.0), case.x)
    blocks_equal(case, case.down(case.norm.clip_norm(case.x, case.radius)), want, size(want), "clip_norm")


@law
def normalize_lands_on_the_sphere(case: Case) -> None:
    """‖normalize(x, r)‖ = r along the ray, for r near ‖x‖ and for r = 1, which a huge or tiny block is far from."""
    nonzero = case.value(case.x) > 0
    direction = case.down(case.x) / columns(torch.where(nonzero, case.value(case.x), 1.0), case.x)
    ones = torch.ones_like(case.scale)
    near = case.norm.normalize(case.x, case.radius), case.scale, case.down(case.radius)
    for y, scale, radius in (near, (case.norm.normalize(case.x, 1.0), ones, ones)):
        want = direction * columns(radius, direction)
        blocks_equal(case, y.double() / columns(scale, y), want, size(want), "normalize")


@law
def normalize_bridges_any_distance(case: Case) -> None:
    """From 1e-30 to 1e30 the factor is no fp32 number, the result is."""
    if case.dtype in ("float64", "float16"):
        return
    nonzero, far = case.value(case.x) > 0, HUGE[case.dtype]
    y = case.norm.normalize(case.x, far).double() / far
    want = nonzero.double()
    equal(case, case.formula.value(y), want, case.result * want, "normalize to a huge radius")


@law_of("l2", "rms")
def clip_norm_is_the_projection(case: Case) -> None:
    clipped, projected = (case.down(f(case.x, case.radius)) for f in (case.norm.clip_norm, case.norm.project))
    blocks_equal(case, clipped, projected, size(projected), "clip_norm against project")


def waits(law: str, norm: str, dtype: str) -> bool:
    """Whether a check runs in the long form alone.

    By default each norm runs in the exact numbers, and in the dtype that rounds most unless it is another norm times a factor, or one of
    transposed blocks; fp32 and fp16 compute as bf16 does, in fp32, and round less.
    """
    return dtype not in ("float64", "bfloat16") or (dtype != "float64" and (norm in FORMS or norm.endswith("_inputs")))


@pytest.mark.parametrize(
    ("name", "norm", "dtype"), [pytest.param(*check, marks=pytest.mark.long if waits(*check) else ()) for check in all_checks()]
)
def test_law(name: str, norm: str, dtype: str, coverage: Callable[..., None]) -> None:
    for case in cases(norm, dtype):
        LAWS[name](case)
        coverage("law × norm", name, norm, dtype=dtype, position=case.position)


def test_nothing_registered_is_missing() -> None:
    """Every norm and form of the registries has a formula and is put to every law, in every dtype and position."""
    names = {*NORMS, *FORMS}
    assert set(FORMULAS) == names
    checks = set(all_checks())
    for name in LAWS:
        covered = {(norm, dtype) for checked, norm, dtype in checks if checked == name}
        assert covered == set(product(ONLY.get(name, names), DTYPES)), name
    assert {case.position for case in cases("spectral", "bfloat16")} == set(POSITIONS)
    assert all(set(only) <= names for only in ONLY.values())
