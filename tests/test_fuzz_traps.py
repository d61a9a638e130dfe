"""Traps that users of other libraries fell into: which tests hold each, and for those that were told with a formula, the naive version
beside ours, so that a test which the naive version would pass is noticed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw
from normwise.norms.linalg import polar
from normwise.optim import Muon

HERE = Path(__file__).parent

HELD_BY = {
    "clip(clip(g1) + g2) under accumulation": ["test_control:test_accumulated_gradients_are_clipped_once_as_a_whole"],
    "clip before unscale": ["test_traps:test_a_scaled_run_equals_the_run_without_scaler"],
    "a finite gradient whose norm overflows": ["test_clip_grad_norm:test_a_norm_beyond_fp32_is_still_clipped_rightly",
                                               "test_traps:test_gradients_whose_squares_leave_fp32"],
    "infinite gradients that become NaN": ["test_clip_grad_norm:test_gradients_that_are_not_finite_are_left_as_they_are",
                                           "test_traps:test_ignore_leaves_the_blocks_concerned_and_no_other_is_spoilt"],
    "max_norm=inf": ["test_clip_grad_norm:test_an_infinite_threshold_only_measures"],
    "max_norm=0 and below": ["test_clip_grad_norm:test_a_threshold_that_would_erase_or_flip_is_refused"],
    "fp16 squares overflow": ["test_clip_grad_norm:test_fp16_squares_do_not_overflow"],
    "bf16 sums lose": ["test_clip_grad_norm:test_bf16_sums_do_not_lose", "test_traps:test_a_bf16_sum_does_not_lose"],
    "mixed dtypes": ["test_clip_grad_norm:test_mixed_dtypes_in_one_list",
                     "test_traps:test_a_global_norm_over_parameters_of_mixed_dtypes"],
    "tied weights": ["test_control:test_tied_weights_are_handled_once"],
    "empty parameters": ["test_control:test_empty_parameters", "test_norm_edges:test_empty_blocks"],
    "zero blocks": ["test_traps:test_zero_blocks_stay_zero_under_every_rule"],
    "complex parameters": ["test_clip_grad_norm:test_complex_gradients_count_by_modulus"],
    "sparse gradients": ["test_clip_grad_norm:test_a_sparse_gradient_is_one_clear_error_and_nothing_is_changed",
                         "test_traps:test_a_gradient_rule_on_a_sparse_gradient_is_one_clear_error_that_changes_nothing"],
    "a fixed eps kills tiny inputs": ["test_linalg:test_scale_does_not_matter"],
    "bf16: a small decay rounds away": ["test_precision:test_a_thousand_decays_below_half_an_ulp"],
    "bf16: the bound after rounding": ["test_traps:test_an_inequality_holds_exactly_after_rounding"],
    "an Adam step leaves the sphere": ["test_traps:test_an_adam_step_moves_a_unit_row_off_its_sphere_and_the_stored_radius_brings_it_back"],
    "an adaptive state updated twice": ["test_published_clipping:test_one_history_over_two_optimizers",
                                        "test_published_clipping:test_a_closure_that_is_evaluated_many_times_is_one_observation"],
    "weights changed within forward": ["test_traps:test_weights_are_changed_after_the_step_and_never_within_a_forward_pass"],
}  # fmt: skip
"""Those of placements (partial norms, ranks without gradients, uneven shards, DTensor beside plain tensors) need several processes."""


@pytest.mark.parametrize("trap", HELD_BY)
def test_the_tests_of_a_trap_are_there(trap: str) -> None:
    for place in HELD_BY[trap]:
        file, name = place.split(":")
        assert re.search(rf"^def {name}\(", (HERE / f"{file}.py").read_text(encoding="utf-8"), re.MULTILINE), place


# ------------------------------------------------------------------------------------------- the naive version and ours


def naive_clip(grads: list[Tensor], most: float, order: float = 2.0) -> list[Tensor]:
    """As it is often written: powers summed in the gradients' own precision, a root, eps beside it."""
    total = sum((g.abs() ** order).sum() for g in grads) ** (1 / order)
    return [g * (most / (total + 1e-6)).clamp(max=1.0) for g in grads]


def clipped(grads: list[Tensor], most: float, norm: str = "l2") -> list[Tensor]:
    """Ours, inside of an optimizer's step."""
    model = nn.ParameterList([nn.Parameter(torch.zeros_like(g)) for g in grads])
    optimizer = SGD(model.parameters(), lr=0.0)
    nw.attach(model, optimizer, nw.clip_grad_norm(most, norm=norm))
    for p, g in zip(model, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return [p.grad for p in model]


def length(grads: list[Tensor], order: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), order))


OVERFLOWING: dict[str, tuple[list[Tensor], float, str, float]] = {
    "a norm beyond fp32": ([torch.full((4, 4), 2e38)], 1.0, "l2", 2.0),
    "squares beyond fp32": ([torch.full((3,), 1e30)], 1.0, "l2", 2.0),
    "squares beyond fp16": ([torch.full((8,), 300.0).half()], 1.0, "l2", 2.0),
    "squares below fp32": ([torch.full((3,), 1e-30)], 1e-31, "l2", 2.0),
    "the inf-norm as a root": ([torch.tensor([3.0, 0.5])], 1.0, "linf", math.inf),
}


@pytest.mark.parametrize("case", OVERFLOWING)
def test_a_gradient_norm_that_the_naive_formula_gets_wrong(case: str) -> None:
    grads, most, norm, order = OVERFLOWING[case]
    wrong, right = length(naive_clip(grads, most, order), order), length(clipped(grads, most, norm), order)
    assert wrong != pytest.approx(most, rel=0.02, abs=0)
    assert right == pytest.approx(most, rel=2e-3, abs=0)


def test_an_infinite_gradient_makes_no_nan_of_the_others() -> None:
    grads = [torch.tensor([math.inf, 1.0]), torch.tensor([2.0, 3.0])]
    assert any(g.isnan().any() for g in naive_clip(grads, 1.0))
    assert not any(g.isnan().any() for g in clipped(grads, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_clip_grad_value_does_as_torch_does_with_what_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    """By the kernels (fp32) and without them: an infinity is clamped, NaN stays, and the entries beside them are clamped."""
    layer = torch.nn.Linear(3, 2, dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    nw.attach(layer, optimizer, nw.clip_grad_value(0.5))
    given = torch.tensor([[bad, 3.0, -0.1], [-2.0, 0.2, 0.5]], dtype=dtype)
    for _ in range(2):    # the second step is on the fast path
        layer.weight.grad, layer.bias.grad = given.clone(), torch.zeros_like(layer.bias)
        optimizer.step()
        by_torch = torch.zeros(2, 3, dtype=dtype).requires_grad_()
        by_torch.grad = given.clone()
        torch.nn.utils.clip_grad_value_([by_torch], 0.5)
        assert torch.equal(layer.weight.grad.nan_to_num(77), by_torch.grad.nan_to_num(77))


def test_clipping_each_micro_batch_is_not_clipping_their_sum() -> None:
    one, two = [torch.tensor([6.0, 0.0])], [torch.tensor([0.0, 0.5])]
    naive = naive_clip([naive_clip(one, 1.0)[0] + two[0]], 1.0)
    whole = [one[0] + two[0]]
    ours = clipped(whole, 1.0)
    torch.testing.assert_close(ours[0], whole[0] / whole[0].norm())
    assert float((naive[0] - ours[0]).norm()) > 0.1


def naive_newton_schulz(x: Tensor) -> Tensor:
    """In place, with a fixed eps, on everything flattened to one matrix."""
    flat = x.reshape(x.shape[0], -1) if x.ndim > 2 else x
    flat.div_(flat.norm() + 1e-7)
    for _ in range(12):
        flat = 1.5 * flat - 0.5 * flat @ flat.mT @ flat
    return flat.reshape(x.shape)


def largest(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), 2).max())


def test_a_tiny_matrix_has_a_polar_factor_too() -> None:
    torch.manual_seed(0)
    x = 1e-20 * torch.randn(6, 6)
    assert largest(naive_newton_schulz(x.clone())) < 1e-6
    assert largest(polar(x)) == pytest.approx(1.0, abs=0.4)


def test_a_polar_factor_does_not_write_into_what_it_was_given() -> None:
    """A momentum buffer in bf16 needs no conversion, so that the copy which saves a naive version in fp32 is not made."""
    torch.manual_seed(0)
    buffer = torch.randn(6, 4).bfloat16()
    aliased, kept = buffer.clone(), buffer.clone()
    naive_newton_schulz(aliased)
    polar(kept)
    assert not torch.equal(aliased, buffer)
    assert torch.equal(kept, buffer)


def test_a_step_of_muon_leaves_its_momentum_a_sum_of_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False).bfloat16(), nn.Linear(4, 4, bias=False).bfloat16())
    optimizer = Muon(model, lr=0.0)
    grad = torch.randn(4, 6).bfloat16()
    for p in model.parameters():
        p.grad = grad[:, : p.shape[1]].clone()
    optimizer.step()
    hidden = model[0].weight
    [buffer] = [t for t in optimizer.state[hidden].values() if isinstance(t, Tensor) and t.shape == hidden.shape]
    ratio = (buffer.double() / hidden.grad.double()).flatten()
    assert float(ratio.max() / ratio.min()) < 1.02, "the buffer is no multiple of the only gradient there was"


def test_stacked_matrices_are_not_merged_into_one() -> None:
    """Four gates of an LSTM are four matrices: each is orthogonal by itself, not the tall matrix that they make up."""
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 5, bias=False)
    naive = naive_newton_schulz(lstm.weight_hh_l0.detach().clone())
    gates = naive.reshape(4, 5, 5)
    assert largest(gates @ gates.mT - torch.eye(5)) > 0.2
    optimizer = SGD(lstm.parameters(), lr=0.0)
    nw.attach(lstm, optimizer, nw.orthogonal(params="weight_hh*"))
    for p in lstm.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    ours = lstm.weight_hh_l0.detach().reshape(4, 5, 5)
    assert largest(ours @ ours.mT - torch.eye(5)) < 1e-5


def test_two_clips_of_one_step_are_one_observation() -> None:
    """Called once for each optimizer, a naive running history would hold two numbers a step."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizers = [SGD(part.parameters(), lr=0.1) for part in model]
    control = nw.attach(model, optimizers, nw.autoclip(50.0, window=8))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for o in optimizers:
            o.step()
    [found] = [f for rule in control.state_dict()["rules"] for f in rule["found"].values()]
    held = [int(t.isfinite().sum()) for t in found.values() if t.numel() >= 8]
    counts = [int(t) for t in found.values() if t.numel() == 1]
    assert 3 in held or 3 in counts, found


def spoiled(make: Callable[[], object]) -> str:
    with pytest.raises(nw.PolicyError) as caught:
        make()
    return str(caught.value)


@pytest.mark.parametrize("most", [0, -1.0, math.inf, math.nan])
def test_a_rule_takes_no_threshold_that_erases_flips_or_divides_infinity_by_itself(most: float) -> None:
    g = [torch.tensor([3.0, 4.0])]
    naive = naive_clip(g, most)[0]
    assert most == math.inf or not bool((naive > 0).all())
    assert str(float(most)) in spoiled(lambda: nw.clip_grad_norm(most))
