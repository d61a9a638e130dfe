"""Traps that others fell into: GradScaler, gradients that are not finite, rounding, and bounds that only seemed to hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import normwise as nw
from normwise.engine.margins import relative_margin

F64 = torch.float64
SCALE = 2.0**10


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model: nn.Module, seed: int, wrap: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
    gen = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(10, 6, generator=gen, dtype=F64).to(dtype), torch.randn(10, 3, generator=gen, dtype=F64).to(dtype)
    model.zero_grad()
    wrap((model(x) - y).square().mean()).backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------- GradScaler

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    "AdamW": lambda ps: AdamW(ps, lr=0.05, weight_decay=0.1),
    "fused SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "fused AdamW": lambda ps: AdamW(ps, lr=0.05, weight_decay=0.1, fused=True),
}
EVERYTHING = [
    nw.l2_penalty(nw.schedules.linear(0.1, 0.2, 4)),
    nw.clip_grad_norm(0.3),
    nw.weight_decay(0.1),
    nw.l1_prox(0.02),
    nw.max_norm(nw.schedules.linear(0.9, 0.6, 4)),
    nw.clip_weight_value(0.25, params="role:bias", every=2),
]


def scaled_run(
    make: Callable[..., Optimizer], scaled: bool, bad: tuple[int, ...] = (), unscale: bool = False
) -> tuple[nn.Module, nw.Control]:
    """Six steps with a GradScaler; at the steps ``bad`` one gradient is infinite."""
    model = net()
    opt = make(model.parameters())
    control = nw.attach(model, opt, EVERYTHING)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled, growth_interval=100, backoff_factor=1.0 - 1e-9)
    for step in range(6):
        if not scaled and step in bad:
            continue
        backward(model, step, scaler.scale)
        if step in bad:
            model[0].weight.grad[1, 2] = math.inf
        if unscale:
            scaler.unscale_(opt)
        before, was, counts = weights(model), copy.deepcopy(opt.state_dict()["state"]), control.state_dict()
        scaler.step(opt)
        scaler.update(SCALE)
        if step in bad:
            assert equal(weights(model), before), "a skipped step changed weights"
            assert not was or str(opt.state_dict()["state"]) == str(was), "a skipped step advanced the optimizer"
            assert str(control.state_dict()) == str(counts), "a skipped step was counted"
    return model, control


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaled_run_equals_the_run_without_scaler(name, unscale):
    """A power of two as scale, so that scaling loses no bit; the rules see unscaled gradients."""
    plain, _ = scaled_run(OPTIMIZERS[name], scaled=False)
    scaled, control = scaled_run(OPTIMIZERS[name], scaled=True, unscale=unscale)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert control.steps == 6
    assert control.verify(), str(control.verify())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_gradscaler_skips_does_not_happen(name, unscale):
    """The first, where weights were never bounded yet, one between, the last: weights, moments, counts and schedules stand still.

    Not the first of torch's fused SGD, which then starts from a momentum buffer that it has not filled.
    """
    bad = (2, 5) if name == "fused SGD" else (0, 2, 5)
    plain, _ = scaled_run(OPTIMIZERS[name], scaled=False, bad=bad)
    scaled, control = scaled_run(OPTIMIZERS[name], scaled=True, bad=bad, unscale=unscale)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert control.steps == 6 - len(bad)
    assert control.verify(), str(control.verify())


@pytest.mark.parametrize("mode", ["raise", "skip", "zero"])
def test_gradscalers_own_skip_is_no_error_of_ours(mode):
    model = net()
    opt = AdamW(model.parameters(), lr=0.05, fused=True)
    control = nw.attach(model, opt, nw.max_norm(0.5), on_nonfinite=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    backward(model, 0, scaler.scale)
    model[0].weight.grad[0, 0] = math.inf
    before = weights(model)
    scaler.step(opt)
    scaler.update()
    assert equal(weights(model), before)
    assert scaler.get_scale() < SCALE
    assert control.steps == 0


def test_a_global_norm_over_two_scaled_fused_optimizers_says_to_unscale_first():
    model = net()
    opts = [AdamW(model[k].parameters(), lr=0.05, fused=True) for k in (0, 2)]
    nw.attach(model, opts, nw.clip_grad_norm(0.3))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    backward(model, 0, scaler.scale)
    before = weights(model)
    with pytest.raises(nw.PolicyError, match=r"scaler\.unscale_"):
        scaler.step(opts[0])
    assert equal(weights(model), before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_global_norm_over_two_optimizers_unscaled_first(fused):
    model, twin = net(), net()
    opts = [AdamW(model[k].parameters(), lr=0.05, fused=fused) for k in (0, 2)]
    plain = AdamW(twin.parameters(), lr=0.05)
    control = nw.attach(model, opts, [nw.clip_grad_norm(0.1), nw.l2_penalty(0.1, "role:all")])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        backward(model, step, scaler.scale)
        for o in opts:
            scaler.unscale_(o)
        for o in opts:
            scaler.step(o)
        scaler.update(SCALE)
        backward(twin, step)
        with torch.no_grad():
            for p in twin.parameters():
                p.grad.add_(p, alpha=0.1)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert control.steps == 3


@pytest.mark.parametrize("name", ["fused SGD", "fused AdamW"])
def test_a_device_that_is_not_read_masks_the_rules_of_a_skipped_step(name, monkeypatch):
    """Where knowing whether the step is skipped would wait for the device, the same results come from multiplying by it."""
    for module in ("engine.program", "engine.rules.bounds", "engine.pack"):
        monkeypatch.setattr(f"normwise.{module}.may_branch", lambda x: False)
    bad = (2, 5) if name == "fused SGD" else (0, 2, 5)
    masked, control = scaled_run(OPTIMIZERS[name], scaled=True, bad=bad)
    plain, _ = scaled_run(OPTIMIZERS[name], scaled=False, bad=bad)
    for p, q in zip(masked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert control.verify()


# ------------------------------------------------------------------------------------------ gradients that are not finite

BAD = [math.nan, math.inf, -math.inf]
MOVERS: dict[str, Callable[..., Optimizer]] = {
    "momentum and decay": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.5),
    "adamw": lambda ps: AdamW(ps, lr=0.05, weight_decay=0.5),
    "adamw one by one": lambda ps: AdamW(ps, lr=0.05, weight_decay=0.5, foreach=False),
}


def prepared(mode: str, make: Callable[..., Optimizer], value: float) -> tuple[nn.Module, Optimizer, nw.Control]:
    """A control after one good step, with one entry of one gradient spoilt for the next."""
    model = net()
    opt = make(model.parameters())
    rules = [nw.l2_penalty(0.1), nw.clip_grad_norm(0.1), nw.weight_decay(0.1), nw.max_norm(0.5)]
    control = nw.attach(model, opt, rules, on_nonfinite=mode)
    backward(model, 0)
    opt.step()
    backward(model, 1)
    model[2].weight.grad[1, 3] = value
    return model, opt, control


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("make", list(MOVERS))
def test_raise_names_the_parameters_and_changes_nothing(make, value):
    model, opt, control = prepared("raise", MOVERS[make], value)
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(nw.NonFiniteError, match=r"gradients of 2\.weight are not finite"):
        opt.step()
    assert equal(weights(model), before)
    assert str(opt.state_dict()["state"]) == str(state)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    assert control.steps == 1
    backward(model, 1)
    opt.step()
    assert control.steps == 2
    assert control.verify()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("make", list(MOVERS))
def test_skip_leaves_weights_moments_and_counts_alone(make, value):
    """Momentum and weight decay would move weights without any gradient: they must not."""
    model, opt, control = prepared("skip", MOVERS[make], value)
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    opt.step()
    assert equal(weights(model), before)
    assert str(opt.state_dict()["state"]) == str(state)
    assert control.steps == 1
    backward(model, 2)
    opt.step()
    assert control.steps == 2
    assert not equal(weights(model), before)
    assert control.verify()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("make", list(MOVERS))
def test_zero_takes_the_bad_entries_for_zero_and_steps(make, value):
    model, opt, control = prepared("zero", MOVERS[make], value)
    twin, plain, other = prepared("ignore", MOVERS[make], 0.0)
    opt.step()
    plain.step()
    assert equal(weights(model), weights(twin))
    assert control.steps == other.steps == 2


@pytest.mark.parametrize("value", BAD)
def test_ignore_leaves_the_blocks_concerned_and_no_other_is_spoilt(value):
    """A clip of each tensor by itself: the spoilt one is not scaled into NaN, the others are clipped."""
    model = net()
    opt = SGD(model.parameters(), lr=0.0)
    nw.attach(model, opt, nw.clip_grad_norm(0.01, per="tensor"))
    backward(model, 0)
    model[2].weight.grad[1, 3] = value
    kept = model[2].weight.grad.clone()
    opt.step()
    torch.testing.assert_close(model[2].weight.grad, kept, rtol=0, atol=0, equal_nan=True)
    assert float(model[0].weight.grad.norm()) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("mode", ["raise", "skip", "zero"])
def test_finite_gradients_pass_even_where_their_sum_overflows(mode):
    model = net()
    opt = SGD(model.parameters(), lr=1.0)
    control = nw.attach(model, opt, nw.clip_grad_norm(1e-3), on_nonfinite=mode)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2e38)
    opt.step()
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert control.steps == 1
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("mode", ["raise", "skip", "zero", "ignore"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_complex_and_sparse_gradients_beside_the_ruled_ones(mode, spoilt):
    """The imaginary part counts; a sparse gradient is looked at by its entries."""
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "fc": nn.Linear(3, 2)})
    model.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.max_norm(0.5, params="fc.weight"), nw.max_norm(0.9, params="table.weight")], on_nonfinite=mode)
    model["fc"](model["table"](torch.tensor([1, 1, 4]))).sum().backward()
    model.phase.grad = torch.zeros(4, dtype=torch.complex64)
    if spoilt:
        model.phase.grad[1] = complex(0.0, math.inf)
        model["table"].weight.grad._values()[0, 0] = math.nan
    before = weights(model)
    if spoilt and mode == "raise":
        with pytest.raises(nw.NonFiniteError, match=r"phase.*table\.weight|table\.weight.*phase"):
            opt.step()
        assert equal(weights(model), before)
        return
    opt.step()
    assert control.steps == (0 if spoilt and mode == "skip" else 1)
    assert equal(weights(model), before) == (spoilt and mode == "skip")
    if spoilt and mode == "zero":
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_gradient_rule_on_a_sparse_gradient_is_one_clear_error_that_changes_nothing():
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "fc": nn.Linear(3, 2)})
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.l2_penalty(0.1), nw.clip_grad_norm(1.0)])
    model["fc"](model["table"](torch.tensor([1, 1, 4]))).sum().backward()
    before, grad = weights(model), model["fc"].weight.grad.clone()
    with pytest.raises(nw.PolicyError, match="sparse"):
        opt.step()
    assert equal(weights(model), before)
    assert torch.equal(model["fc"].weight.grad, grad)
    assert control.steps == 0


def test_two_optimizers_skip_a_round_together_and_only_that_round():
    """The gradients of both are dropped with the first; gradients computed after that are stepped and ruled again."""
    model = net(dtype=F64)
    opts = [SGD(model[k].parameters(), lr=0.1) for k in (0, 2)]
    control = nw.attach(model, opts, [nw.clip_grad_norm(0.1), nw.max_norm(0.5)], on_nonfinite="skip")
    before = weights(model)
    backward(model, 0)
    model[0].weight.grad[0, 0] = math.nan
    for o in opts:
        o.step()
    assert equal(weights(model), before)
    backward(model, 0)
    model[0].weight.grad[0, 0] = math.nan
    opts[0].step()
    backward(model, 1)
    opts[1].step()
    assert float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()) == pytest.approx(0.1, rel=1e-12)
    assert equal(weights(model)[:2], before[:2])
    assert not equal(weights(model)[2:], before[2:])
    assert control.verify()


def test_a_line_search_that_meets_infinity_still_ends_within_the_ball():
    """Where weights have moved before an evaluation is not finite, the bound must hold again after the step."""
    model = net(dtype=F64)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=5)
    control = nw.attach(model, opt, nw.max_norm(0.3), on_nonfinite="skip")
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        backward(model, 0)
        if calls == 3:
            model[0].weight.grad[0, 0] = math.inf
        return torch.tensor(1.0 / calls, dtype=F64)

    opt.step(closure)
    assert calls >= 3
    assert control.steps == 1
    assert control.verify()
    assert model[0].weight.norm(dim=1).max() <= 0.3


# ------------------------------------------------------------------------------------------------ verify finds what is broken


def test_verify_names_a_broken_weight_its_block_and_by_how_much():
    model = net(dtype=F64)
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.max_norm(0.5), nw.clip_weight_value(2.0)])
    assert control.verify().not_enforced, "nothing was enforced before the first step"
    backward(model, 0)
    opt.step()
    assert control.verify()
    with torch.no_grad():
        model[2].weight[1] = 0.0
        model[2].weight[1, 4] = 1.25
    result = control.verify()
    assert not result
    [breach] = result.breaches
    assert (breach.parameter, breach.block, breach.rule) == ("2.weight", 1, "clip_norm l2/unit <= 0.5")
    assert breach.value == 1.25
    assert breach.excess == pytest.approx(0.75, rel=1e-9)
    assert "2.weight[block 1] is 1.25, bound 0.5 (by 0.75)" in str(result)
    with torch.no_grad():
        model[2].weight[1, 4] = math.nan
    assert [b.parameter for b in control.verify().breaches] == ["2.weight", "2.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_verify_sees_the_smallest_excess(dtype):
    """One entry of a unit vector up by one ulp is outside of a ball that the norm filled; of a sphere it is within two ulp."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    opt = SGD(model.parameters(), lr=0.0)
    ball = nw.attach(model, opt, nw.clip_weight_value(1.0))
    sphere = nw.attach(model, opt, nw.unit_norm())
    model.weight.grad = torch.zeros_like(model.weight)
    opt.step()
    eps = torch.finfo(dtype).eps
    far = 3 if dtype != F64 else 60  # float64 measured in float64 has no two ulp to tell
    for ulps, in_ball, on_sphere in ((0, True, True), (1, False, True), (2, False, True), (far, False, False)):
        with torch.no_grad():
            model.weight.fill_(1 + ulps * eps)
        assert ball.verify().ok is in_ball
        assert sphere.verify().ok is on_sphere


# ------------------------------------------------------------------------------------------------- bounds after rounding

DTYPES = [torch.float32, F64, torch.bfloat16, torch.float16]
BALLS: list[tuple[str, str]] = [
    ("l1", "unit"), ("l1", "tensor"), ("l1", "input"), ("l2", "unit"), ("l2", "tensor"), ("l2", "input"), ("linf", "tensor"),
    ("spectral", "matrix"), ("nuclear", "matrix"), ("max_of_units", "matrix"), ("sum_of_units", "matrix"), ("sum_of_inputs", "matrix"),
]  # fmt: skip
ACTIONS = ("clip_norm", "project")
SHAPES = [(1, 1), (2, 3), (7, 5), (16, 16), (5, 40), (100, 128), (3, 500)]


def norm_in_float64(w: Tensor, norm: str, per: str) -> Tensor:
    """Of every block, written out on the double of the weights: independent of the library's measures."""
    w = w.detach().double()
    if norm == "spectral":
        return torch.linalg.svdvals(w)[:1]
    if norm == "nuclear":
        return torch.linalg.svdvals(w).sum()[None]
    if norm in ("max_of_units", "sum_of_units", "sum_of_inputs"):
        lengths = w.square().sum(0 if norm == "sum_of_inputs" else 1).sqrt()
        return (lengths.max() if norm == "max_of_units" else lengths.sum())[None]
    rows = {"unit": w, "input": w.T, "tensor": w.reshape(1, -1)}[per]
    exact = torch.tensor([math.fsum(row) for row in rows.abs().tolist()], dtype=F64)
    return {"l1": exact, "l2": rows.square().sum(1).sqrt(), "linf": rows.abs().amax(1)}[norm]


def ruled(rule: nw.Rule, shape: tuple[int, int], dtype: torch.dtype, seed: int, spread: float = 1.0) -> tuple[nn.Linear, nw.Control]:
    """A Linear of random weights after one step of rate 0 under ``rule``."""
    gen = torch.Generator().manual_seed(seed)
    model = nn.Linear(shape[1], shape[0], bias=False)
    values = torch.randn(shape, dtype=F64, generator=gen) * spread
    if seed % 4 == 3:  # equal entries, whose rounding errors add up
        values = torch.full(shape, float(values[0, 0].abs()) + 0.5, dtype=F64)
    if seed % 4 == 2:  # of rank one, where rounding alone makes singular values
        values = values[:, :1] @ values[:1]
    model.weight = nn.Parameter(values.to(dtype))
    opt = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, opt, rule)
    model.weight.grad = torch.zeros_like(model.weight)
    opt.step()
    return model, control


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.long if d == torch.float16 else ()) for d in DTYPES], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(("norm", "per"), BALLS)
def test_an_inequality_holds_exactly_after_rounding(norm, per, dtype, coverage):
    """42 radii and shapes a case, some blocks far outside and some hardly, measured in float64 on what is stored."""
    gen = torch.Generator().manual_seed(len(norm) + 7 * len(per))
    eps = torch.finfo(dtype).eps
    worst = checked = 0.0
    for k in range(42):
        shape, action = SHAPES[k % len(SHAPES)], ACTIONS[k // 7 % 2]
        radius = float(10 ** torch.empty(()).uniform_(-1.3, 1.3, generator=gen))
        rule = nw.Rule(action=action, norm=norm, per=per, radius=radius)
        model, control = ruled(rule, shape, dtype, seed=k, spread=1 + 3 * (k % 3))
        value = norm_in_float64(model.weight, norm, per)
        assert bool((value <= radius).all()), f"{float(value.max()):.17g} > {radius:.17g} at {shape}, {action}"
        assert control.verify(), str(control.verify())
        if sum(control.violations().values()):
            checked += 1
            worst = max(worst, float((1 - value.max() / radius) / eps) if action == "clip_norm" else 0.0)
    assert checked >= 20, "too few blocks were outside, so little was proved"
    limit = {F64: 2500.0, torch.float16: 12.0, torch.bfloat16: 5.0, torch.float32: 80.0}[dtype]
    assert worst <= limit, f"{worst:.1f} eps inside is a waste"
    coverage("bounds after rounding", norm, per, dtype=str(dtype)[6:])


@pytest.mark.parametrize("norm", ["l1", "l2", "sum_of_units", "nuclear"])
def test_a_long_fp16_block_of_subnormal_entries_stays_inside(norm):
    """Below 6e-5 the steps of fp16 are no longer relative: rounding 3000 entries of 3e-6 moves their sum by more than a hair."""
    per = "unit" if norm in ("l1", "l2") else "matrix"
    for k, radius in enumerate((0.3, 0.1, 0.05, 0.02)):
        model, control = ruled(nw.Rule(action="clip_norm", norm=norm, per=per, radius=radius), (3, 3000), torch.float16, seed=k)
        assert bool((norm_in_float64(model.weight, norm, per) <= radius).all())
        assert control.verify()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("norm", "per"), [("l2", "unit"), ("l2", "tensor"), ("l1", "unit"), ("linf", "unit"), ("spectral", "matrix")])
def test_a_sphere_is_met_to_two_ulp(norm, per, dtype):
    gen = torch.Generator().manual_seed(3)
    for k in range(28):
        radius = float(10 ** torch.empty(()).uniform_(-1.0, 1.0, generator=gen))
        model, control = ruled(nw.Rule(action="normalize", norm=norm, per=per, radius=radius), SHAPES[k % 7], dtype, seed=k)
        ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(radius))
        away = (norm_in_float64(model.weight, norm, per) - radius).abs().max() / ulp
        measuring = (400.0 if norm == "spectral" else 40.0) if dtype == F64 else 1e-6
        assert float(away) <= 2.0 + measuring, f"{float(away):.2f} ulp at {SHAPES[k % 7]}"
        assert control.verify(), str(control.verify())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_spectral_sphere_of_a_large_matrix(dtype):
    for shape in ((200, 300), (512, 128)):
        model, control = ruled(nw.spectral_normalize(1.0), shape, dtype, seed=0)
        away = abs(float(torch.linalg.svdvals(model.weight.detach().double())[0]) - 1.0)
        assert away <= (2 if dtype != F64 else 20) * torch.finfo(dtype).eps
        assert control.verify(), str(control.verify())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_a_ball_around_a_center_however_far_outside_the_step_went(dtype, shift):
    """The weights are as large as the center, the ball is small, and the step may have left it by many radii."""
    for k in range(8):
        gen = torch.Generator().manual_seed(k)
        model = nn.Linear(20, 6, bias=False)
        model.weight = nn.Parameter((torch.randn(6, 20, dtype=F64, generator=gen) + shift).to(dtype))
        start = model.weight.detach().double().clone()
        radius = max(0.05 * 3**k, 40 * torch.finfo(dtype).eps * float(start.norm(dim=1).max()))
        opt = SGD(model.parameters(), lr=1.0)
        control = nw.attach(model, opt, nw.max_norm(radius, center="init"))
        model.weight.grad = (100 * radius * torch.randn(6, 20, dtype=F64, generator=gen)).to(dtype)
        opt.step()
        away = (model.weight.detach().double() - start).norm(dim=1)
        assert bool((away <= radius).all()), f"{float((away / radius).max()):.9f} of the radius"
        assert float(away.min()) > 0.9 * radius
        assert control.verify(), str(control.verify())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (1.0, 1.0 + 1e-9), (1.0, 1.0)])
def test_both_ends_of_a_shell(dtype, low, high):
    """Exactly, where there is room between them for rounding; to two ulp where it is a sphere."""
    lengths = torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0, 1.7, 2.0, 2.2, 30.0], dtype=F64)
    model = nn.Linear(50, 9, bias=False)
    raw = torch.randn(9, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    model.weight = nn.Parameter((raw / raw.norm(dim=1, keepdim=True) * lengths[:, None]).to(dtype))
    opt = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, opt, nw.min_max_norm(low, high))
    model.weight.grad = torch.zeros_like(model.weight)
    opt.step()
    after = model.weight.detach().double().norm(dim=1)
    slack = 0.0 if high > 1.5 else 2 * torch.finfo(dtype).eps
    assert bool((after >= low - slack).all())
    assert bool((after <= high + slack).all())
    assert control.verify(), str(control.verify())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weights_at_rest_are_not_ground_down(dtype):
    """A hundred steps of rate 0 under a ball and a sphere leave what the first one made, but for its last bits."""
    for rule in (nw.max_norm(0.7), nw.unit_norm(0.7), nw.spectral_cap(0.7)):
        model, control = ruled(rule, (16, 16), dtype, seed=0)
        first = model.weight.detach().clone()
        for _ in range(100):
            control.optimizers[0].step()
        drift = (model.weight.detach().double() - first.double()).norm() / first.double().norm()
        assert float(drift) <= 4 * relative_margin(nw.norms.Spectral(), dtype, (16, 16))


def test_a_small_decay_of_bf16_weights_is_not_promised_but_a_bound_is():
    """A decay of 1e-4 rounds away in bf16 (its steps are 1/128); the bound is still met."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20, bias=False).bfloat16()
    opt = SGD(model.parameters(), lr=1e-3)
    control = nw.attach(model, opt, [nw.weight_decay(0.1), nw.max_norm(0.3)])
    for seed in range(5):
        model.weight.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).bfloat16()
        opt.step()
        assert control.verify()


# --------------------------------------------------------------------------------------------------------- other traps


def test_a_global_norm_over_parameters_of_mixed_dtypes():
    """Each scaled to its own precision, by a norm accumulated wide: fp16 squares would overflow."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 4, bias=False).to(d) for d in (F64, torch.float32, torch.bfloat16, torch.float16)])
    opt = SGD(model.parameters(), lr=0.0)
    nw.attach(model, opt, nw.clip_grad_norm(1.0))
    grads = [(300 * torch.randn(4, 5, dtype=F64)).to(m.weight.dtype) for m in model]
    for m, g in zip(model, grads, strict=True):
        m.weight.grad = g.clone()
    opt.step()
    total = math.sqrt(math.fsum(float(z) ** 2 for g in grads for z in g.double().flatten()))
    for m, g in zip(model, grads, strict=True):
        eps = torch.finfo(g.dtype).eps
        torch.testing.assert_close(m.weight.grad.double(), g.double() / total, rtol=max(eps, 1e-7), atol=1e-7 if eps > 1e-4 else 0)
    ratio = model[0].weight.grad / grads[0]
    assert float(ratio.max() / ratio.min() - 1) <= 1e-15, "a float64 gradient was scaled in float32"


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_gradients_whose_squares_leave_fp32(norm, scale):
    model = net()
    opt = SGD(model.parameters(), lr=0.0)
    nw.attach(model, opt, nw.clip_grad_norm(0.1 * scale, norm=norm))
    gen = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=gen)
    opt.step()
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    order = {"l1": 1.0, "l2": 2.0, "linf": math.inf}[norm]
    assert float(torch.linalg.vector_norm(flat, order)) == pytest.approx(0.1 * scale, rel=1e-6)


def test_a_bf16_sum_does_not_lose():
    """100,000 entries of 1/4 have the L1 norm 25,000; summed in bf16 it would stay at 64."""
    model = nn.Linear(100_000, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 0.25)
    opt = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, opt, nw.clip_weight_norm(12_500.0, norm="l1"))
    model.weight.grad = torch.zeros_like(model.weight)
    opt.step()
    assert float(model.weight.detach().double().abs().sum()) == pytest.approx(12_500, rel=0.02)
    assert control.verify()


def test_zero_blocks_stay_zero_under_every_rule():
    rules = [nw.unit_norm(), nw.max_norm(1.0), nw.l1_prox(0.1), nw.group_lasso(0.1), nw.spectral_cap(1.0), nw.clip_weight_norm(1.0)]
    for rule in rules:
        model = nn.Linear(4, 3)
        nn.init.zeros_(model.weight)
        opt = SGD(model.parameters(), lr=0.1)
        control = nw.attach(model, opt, [rule, nw.normalize_grad()])
        model.weight.grad = torch.zeros_like(model.weight)
        opt.step()
        assert torch.equal(model.weight.detach(), torch.zeros(3, 4)), rule.label()
        assert control.verify().ok is (rule.action != "prox"), "a prox bounds nothing, so that nothing was checked"


def test_an_adam_step_moves_a_unit_row_off_its_sphere_and_the_stored_radius_brings_it_back():
    """Recomputed at each step, the radius would drift with the weights."""
    torch.manual_seed(0)
    model = nn.Linear(8, 5, bias=False).double()
    start = model.weight.detach().norm(dim=1).clone()
    opt = Adam(model.parameters(), lr=0.3)
    control = nw.attach(model, opt, nw.unit_norm("init"))
    for seed in range(30):
        model.weight.grad = torch.randn(5, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))
        opt.step()
    torch.testing.assert_close(model.weight.detach().norm(dim=1), start, rtol=1e-14, atol=0)
    assert control.verify()


def test_weights_are_changed_after_the_step_and_never_within_a_forward_pass():
    """In-place changes inside ``forward`` break autograd: a forward and backward after an attached step works, and versions show it."""
    model = net()
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, nw.max_norm(0.3))
    backward(model, 0)
    opt.step()
    versions = [p._version for p in model.parameters()]
    backward(model, 1)
    assert [p._version for p in model.parameters()] == versions


def test_rules_leave_the_data_pointers_alone():
    """cuDNN's flat weights, optimizers and DDP's buckets keep pointing at the parameters."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2), "conv": nn.ConvTranspose2d(3, 4, 3), "fc": nn.Linear(4, 4)})
    opt = SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    places = [(id(p), p.data_ptr(), p.grad.data_ptr(), p.stride()) for p in model.parameters()]
    rules = [nw.clip_grad_norm(0.1), nw.l1_prox(0.1), nw.spectral_cap(0.5), nw.max_norm(0.3), nw.l1_ball(0.2), nw.clip_weight_value(0.1)]
    control = nw.attach(model, opt, rules)
    opt.step()
    assert [(id(p), p.data_ptr(), p.grad.data_ptr(), p.stride()) for p in model.parameters()] == places
    assert all(v > 0 for v in list(control.violations().values())[:2])


def test_channels_last_weights_are_read_by_their_axes_not_by_their_strides():
    torch.manual_seed(0)
    plain, last = nn.Conv2d(5, 4, 3), nn.Conv2d(5, 4, 3)
    last.load_state_dict(plain.state_dict())
    last = last.to(memory_format=torch.channels_last)
    for rule in (nw.max_norm(0.2), nw.spectral_cap(0.3), nw.l1_ball(0.5)):
        for model in (plain, last):
            opt = SGD(model.parameters(), lr=0.0)
            with nw.attach(model, opt, rule) as control:
                model.weight.grad = torch.zeros_like(model.weight)
                opt.step()
                assert control.verify()
    torch.testing.assert_close(last.weight, plain.weight, rtol=1e-5, atol=1e-7)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
