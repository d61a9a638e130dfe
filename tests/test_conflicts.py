"""Contradictory rules: what is refused is impossible indeed, what is possible passes, and the claims it rests on hold on numbers."""

import itertools
import math

import pytest
import torch

from normwise.errors import PolicyError
from normwise.norms import NORMS, Box
from normwise.parameters.layouts import Layout, block_view
from normwise.policy import Rule, named
from normwise.policy.conflicts import _WITHIN, check
from normwise.policy.schedules import Constant, Linear

W = {"fc1.weight", "fc2.weight"}
ortho = Rule(action="project", norm="orthogonal", per="matrix", radius=2)


def sphere(norm, radius, per="matrix", **more):
    return Rule(action="normalize", norm=norm, per=per, radius=radius, **more)


def ball(norm, radius, per="matrix", **more):
    return Rule(action="clip_norm", norm=norm, per=per, radius=radius, **more)


CONTRADICTIONS = [
    (named.unit_norm(1), named.unit_norm(2)),
    (named.unit_norm(2), named.max_norm(1)),
    (named.unit_norm(Constant(2)), named.max_norm(1)),
    (named.min_max_norm(2, 3), named.max_norm(1)),
    (named.min_max_norm(2, 3), named.unit_norm(1)),
    (ortho, named.spectral_cap(1)),
    (ortho, named.spectral_normalize(1)),
    (ortho, Rule(action="project", norm="orthogonal", per="matrix", radius=1)),
    (named.unit_norm(2), named.spectral_cap(1)),
    (named.unit_norm(2), named.spectral_cap(1, per="tensor")),
    (named.unit_norm(2), named.clip_weight_norm(1)),
    (named.unit_norm(2), ball("max_of_units", 1)),
    (sphere("max_of_units", 2), named.max_norm(1)),
    (named.spectral_normalize(2), ball("l2", 1)),
    (named.spectral_normalize(2), ball("nuclear", 1)),
    (sphere("linf", 2, "tensor"), named.clip_weight_value(1)),
    (sphere("linf", 2, "tensor"), named.clip_weight_value(-1, 0.5)),
    (sphere("l2", 2, "element"), named.clip_weight_value(1)),
    (named.clip_weight_value(1, 2), named.clip_weight_value(3, 4)),
    (named.non_negative(), named.clip_weight_value(-2, -1)),
    (named.clip_weight_value(1, 2), named.max_norm(0.5)),
    (named.clip_weight_value(-2, -1), named.clip_weight_value(0.5)),
    (sphere("rms_rms", 2), ball("rms_rms", 1)),
    (named.unit_norm(1, start=5), named.unit_norm(2, stop=6)),
    (sphere("l2", 2, "tensor"), ball("l2", 1, "global")),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("one", "other"), CONTRADICTIONS, ids=[f"{a.label()} | {b.label()}" for a, b in CONTRADICTIONS])
def test_a_contradiction_names_both_rules_and_a_parameter(one, other, swapped):
    pair = (other, one) if swapped else (one, other)
    with pytest.raises(PolicyError, match=r"contradict each other on 'fc1.weight'") as caught:
        check([(rule, W) for rule in pair])
    assert f"'{one.label()}'" in str(caught.value) and f"'{other.label()}'" in str(caught.value)


COMPATIBLE = [
    (named.unit_norm(1), named.unit_norm(1 + 1e-9)),
    (named.unit_norm(1), named.max_norm(2)),
    (named.unit_norm(1), named.non_negative()),
    (named.min_max_norm(1, 3), named.max_norm(2)),
    (ortho, named.spectral_cap(2)),
    (ortho, named.unit_norm(1)),
    (named.spectral_cap(1), named.max_norm(0.1)),
    (named.spectral_normalize(2), named.max_norm(1)),
    (named.unit_norm(2, per="input"), named.spectral_cap(1)),
    (named.unit_norm(2), ball("max_of_inputs", 1)),
    (sphere("l2", 2, "tensor"), named.max_norm(1)),
    (sphere("l2", 2, "tensor"), named.clip_weight_value(0.1)),
    (sphere("l1", 2), ball("l2", 1)),
    (sphere("rms_rms", 2), ball("spectral", 1)),
    (named.clip_weight_value(0, 2), named.clip_weight_value(-1, 1)),
    (named.unit_norm(1), named.unit_norm(2, center="init")),
    (named.unit_norm(1), named.unit_norm("init")),
    (named.unit_norm(1), named.unit_norm(Linear(2, 3, 10))),
    (named.unit_norm(1, stop=5), named.unit_norm(2, start=5)),
    (named.unit_norm(1, every=2), named.unit_norm(2)),
    (named.min_max_norm(2, 3, rate=0.5), named.max_norm(1)),
    (named.normalize_grad(2), named.clip_grad_norm(1)),
    (named.weight_decay(0.1), named.weight_decay(0.2)),
    (named.unit_norm(2, layout=Layout("oi", (4, 6))), named.max_norm(1)),
    (sphere("l2", 2, "global"), ball("l2", 1, "tensor")),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("one", "other"), COMPATIBLE, ids=[f"{a.label()} | {b.label()}" for a, b in COMPATIBLE])
def test_what_may_hold_together_passes(one, other, swapped):
    check([(rule, W) for rule in ((other, one) if swapped else (one, other))])


def test_only_shared_parameters_count():
    check([(named.unit_norm(1), {"a"}), (named.unit_norm(2), {"b"})])
    check([])
    small, large = sphere("l2", 1, "global"), sphere("l2", 2, "global")
    check([(small, {"a", "b"}), (ball("l2", 2, "global"), {"a"})])
    check([(large, {"a", "b"}), (ball("l2", 1, "global"), {"b", "c"})])
    with pytest.raises(PolicyError, match="on 'a'"):
        check([(large, {"a"}), (ball("l2", 1, "global"), {"a", "b"})])
    with pytest.raises(PolicyError, match="on 'b'"):
        check([(named.unit_norm(1), {"a"}), (named.max_norm(5), {"b"}), (named.unit_norm(9), {"b", "c"})])


# ------------------------------------------------------------------------------------------ the claims, on numbers


def test_every_plain_norm_has_its_level():
    assert all(norm.level is not None for norm in NORMS.values())


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (3, 5), (7, 4)])
def test_a_norm_is_never_above_one_of_a_higher_level(shape):
    torch.manual_seed(0)
    rank_one = torch.randn(50, shape[0], 1).double() @ torch.randn(50, 1, shape[1]).double()
    sparse = torch.randn(50, *shape).double() * (torch.rand(50, *shape) < 0.2)
    x = torch.cat([torch.randn(50, *shape).double(), rank_one, sparse, torch.ones(1, *shape).double()])
    pairs = [(a, b) for a, b in itertools.permutations(NORMS, 2) if NORMS[a].level < NORMS[b].level]
    assert len(pairs) > 25
    for low, high in pairs:
        assert (NORMS[low].value(x) <= NORMS[high].value(x) * (1 + 1e-12)).all(), (low, high)


LAYOUTS = [Layout("oi", (4, 6)), Layout("soikk", (2, 3, 2, 2, 2)), Layout("oHi", (4, 2, 3)), Layout("eshoi", (2, 3, 2, 2, 5))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_lie_within_blocks(layout):
    tensor = torch.arange(math.prod(layout.shape))
    can = [p for p in _WITHIN if not (p == "head" and not {"h", "H"} & set(layout.axes)) and not (p == "expert" and "e" not in layout.axes)]
    sets = {per: [frozenset(block.tolist()) for block in block_view(layout, per, False).blocks(tensor)] for per in can}
    tried = 0
    for inner, outer in itertools.product(can, can):
        if outer in _WITHIN[inner]:
            assert all(any(small <= big for big in sets[outer]) for small in sets[inner]), (inner, outer)
            tried += 1
    assert tried >= 20


def test_the_l2_norm_of_a_unit_is_a_row_of_the_matrix():
    """So that it is never above the matrix's spectral norm, kernels and stacks included."""
    torch.manual_seed(0)
    for layout in LAYOUTS:
        tensor = torch.randn(layout.shape).double().reshape(-1)
        units = block_view(layout, "unit", False).blocks(tensor)
        sigma = NORMS["spectral"].value(block_view(layout, "matrix", True).blocks(tensor)).max()
        rows = NORMS["max_of_units"].value(block_view(layout, "matrix", True).blocks(tensor)).max()
        assert NORMS["l2"].value(units).max() == pytest.approx(float(rows), rel=1e-12) and rows <= sigma


def test_a_box_knows_its_entries():
    assert named.clip_weight_value(1, 2).norm == Box(1.0, 2.0)
    with pytest.raises(PolicyError, match=r"no number is in both"):
        check([(named.clip_weight_value(1, 2), W), (named.clip_weight_value(3, 4), W)])
    with pytest.raises(PolicyError, match=r"keeps l2/unit at 2 or more, the second spectral/matrix at 1 or less, and l2/unit is never"):
        check([(named.unit_norm(2), W), (named.spectral_cap(1), W)])
