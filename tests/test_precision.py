"""Weights in fp16 and bf16: steps below half an ulp, fp32 masters, autocast, and every named rule's bound after rounding."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.low_precision import ROUNDINGS, memory, narrow_, stochastic, ulp, widened
from normwise.optim import PRESETS, SGD, AdamW, Muon, NormOptimizer
from normwise.policy.named import NAMED

F64, BF16, FP16 = torch.float64, torch.bfloat16, torch.float16
HALVES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
KEEPING = ("stochastic", "compensated")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- rounding itself


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of ``dtype`` around each x, from the table of all of them."""
    table = torch.arange(-32768, 32768).to(torch.int16).view(dtype).double()
    table = table[table.isfinite()].unique()
    high = table[torch.searchsorted(table, x.double()).clamp(max=len(table) - 1)]
    low = table[(torch.searchsorted(table, x.double(), right=True) - 1).clamp(min=0)]
    return low, high


@HALVES
def test_stochastic_rounding_takes_one_of_the_two_neighbours_with_the_right_odds(dtype: torch.dtype) -> None:
    """Magnitudes from subnormal to large, numbers beside a power of two, and numbers of the dtype itself, which stay."""
    small = 6e-8 if dtype == FP16 else 1e-38
    x = torch.cat([random(40), 1e3 * random(10), small * 30 * random(20), torch.tensor([0.0, -0.0, 1.0, 1 - 2e-4, 1 + 1e-4, -2 + 1e-4])])
    low, high = neighbours(x, dtype)
    draws = 4000
    uniform = torch.rand(draws, len(x), generator=torch.Generator().manual_seed(1))
    got = stochastic(x.expand(draws, -1).contiguous(), dtype, uniform).double()
    assert bool(((got == low) | (got == high)).all())
    odds = torch.where(high > low, (x.double() - low) / (high - low), 0.0)
    share = torch.where(high > low, got == high, False).double().mean(0)
    assert float((share - odds).abs().max()) < 5 * math.sqrt(0.25 / draws)
    assert bool((got[:, low == high] == x.double()[low == high]).all())


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    assert str(stochastic(x, BF16, torch.full((3,), 0.5)).tolist()) == "[inf, -inf, nan]"
    weight, state = nn.Parameter(torch.ones(3, dtype=BF16)), memory(torch.ones(3, dtype=BF16), "compensated", 0)
    with torch.no_grad():
        narrow_([weight], [x], [state])
    assert str(weight.tolist()) == "[inf, -inf, nan]" and state["carry"].tolist() == [0, 0, 0]


@HALVES
def test_a_weight_and_its_carry_are_as_exact_as_fp32(dtype: torch.dtype) -> None:
    exact = torch.cat([random(5000), 100 * random(100), 1e-3 * random(100), torch.tensor([1.0, 1 - 1e-4, 1.00390625, 2.0])])
    weight = torch.zeros_like(exact, dtype=dtype)
    state = memory(weight, "compensated", 0)
    narrow_([weight], [exact.clone()], [state])
    assert torch.equal(weight, exact.to(dtype)), "the weight itself is the nearest number"
    error = (widened([weight], [state])[0].double() - exact.double()).abs()
    assert bool((error <= ulp(weight.double(), dtype) * 2.0**-16).all())
    assert float(error.max()) <= 1e-5 * float(exact.abs().max()) and state["carry"].dtype == torch.int16


def test_fp32_weights_and_rounding_to_nearest_need_no_state() -> None:
    for dtype in (torch.float32, F64):
        assert not any(memory(torch.ones(2, dtype=dtype), r, 0) for r in ROUNDINGS)
    assert not memory(torch.ones(2, dtype=BF16), "nearest", 0)
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizers = [AdamW([a], lr=0.1, rounding="stochastic"), AdamW([b], lr=0.1)]
    for _ in range(3):
        for p, o in zip((a, b), optimizers, strict=True):
            p.grad = random(3)
            o.step()
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------- decays below half an ulp


def decayed_by_optimizer(weight: Tensor, share: float, rounding: str) -> Tensor:
    p = nn.Parameter(weight.clone())
    optimizer = SGD([p], lr=1.0, weight_decay=share, decay="weight", rounding=rounding)
    for _ in range(1000):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    return p.detach()


def decayed_by_rule(weight: Tensor, share: float, rounding: str, center: Any = None) -> Tensor:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    model.weight = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nw.attach(model, optimizer, nw.Rule(action="weight_decay", strength=share, rounding=rounding, center=center))
    for _ in range(1000):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    return model.weight.detach()


@HALVES
@pytest.mark.parametrize("share", [pytest.param(1e-4, marks=pytest.mark.long), 1e-5])
@pytest.mark.parametrize("run", [decayed_by_optimizer, decayed_by_rule])
def test_a_thousand_decays_below_half_an_ulp(run: Callable[..., Tensor], share: float, dtype: torch.dtype) -> None:
    """float64's trajectory to the rounding of the end (compensated) or its random walk (stochastic); nearest does not move at all."""
    start = random(48, 32).to(dtype)
    want = start.double() * (1 - share) ** 1000
    eps = torch.finfo(dtype).eps
    assert torch.equal(run(start, share, "nearest"), start)
    off = (run(start, share, "compensated").double() - want).abs() / want.abs()
    assert float(off.max()) <= 0.5 * eps * 1.05, "half an ulp, which the weight's own format costs"
    walked = run(start, share, "stochastic").double() - want
    ulps = ulp(start.double(), dtype)
    assert float((walked / ulps).abs().max()) < 5 * math.sqrt(2000 * share / eps) + 3, "further than a random walk goes"
    assert abs(float(walked.sum() / want.abs().sum())) < 2e-3
    assert abs(float((walked * want.sign()).sum() / want.abs().sum())) < 2e-3, "right on average, towards zero too"


@pytest.mark.parametrize("rounding", ["compensated", pytest.param("stochastic", marks=pytest.mark.long)])
def test_a_decay_towards_given_weights(rounding: str) -> None:
    start, center = random(16, 8).to(BF16), random(16, 8, seed=1).to(BF16)
    got = decayed_by_rule(start, 1e-3, rounding, center={"weight": center}).double()
    want = center.double() + (start.double() - center.double()) * (1 - 1e-3) ** 1000
    assert float((got - want).abs().max()) < (0.01 if rounding == "compensated" else 0.2)
    assert torch.equal(decayed_by_rule(start, 1e-3, "compensated", None), decayed_by_rule(start, 1e-3, "compensated", None))
    assert float((start.double() - want).norm()) > 10 * float((got - want).norm())


@pytest.mark.parametrize("per", ["unit", *(pytest.param(per, marks=pytest.mark.long) for per in ("tensor", "global"))])
def test_a_soft_threshold_below_half_an_ulp(per: str) -> None:
    """The prox of ½λ‖w‖² and of λ‖w‖₁, small steps that add up; zeros of the L1 stay exact."""

    def run(rounding: str, norm: str, power: int) -> Tensor:
        model = nn.Linear(8, 16, bias=False).to(BF16)
        model.weight = nn.Parameter(random(16, 8).to(BF16))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        rule = nw.Rule(action="prox", norm=norm, power=power, strength=5e-5, per=per, rounding=rounding)
        nw.attach(model, optimizer, rule)
        for _ in range(1000):
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
        return model.weight.detach().double()

    start = random(16, 8).to(BF16).double()
    soft = start.sign() * (start.abs() - 0.05).clamp(min=0)
    for norm, power, want in (("l1", 1, soft), ("l2", 2, start / (1 + 5e-5) ** 1000)):
        got = run("compensated", norm, power)
        assert float((got - want).abs().max()) <= 0.5 * torch.finfo(BF16).eps * float(want.abs().max())
        if norm == "l1":
            assert torch.equal(got == 0, want == 0)
        assert float((run("nearest", norm, power) - want).norm()) > 5 * float((got - want).norm())


def walk(preset: Callable[..., NormOptimizer], rounding: str, dtype: torch.dtype, lr: float) -> tuple[Tensor, Tensor]:
    """The weight after thirty small steps with gradients that all dtypes hold, with its carry and without."""
    p = nn.Parameter(random(12, 8).to(BF16).to(dtype))
    optimizer = preset([p], lr=lr, rounding=rounding)
    for seed in range(30):
        p.grad = (random(12, 8, seed=99) + 0.1 * random(12, 8, seed=seed)).to(BF16).to(dtype)
        optimizer.step()
    state = {k: v for k, v in optimizer.state[p].items() if k in ("noise", "carry")}
    return widened([p.detach()], [state])[0].double(), p.detach().double()


TINY = {"SGD": 1e-4, "AdamW": 2e-5, "NormalizedSGD": 2e-4, "Signum": 2e-5, "Lion": 2e-5, "LARS": 0.02, "LAMB": 2e-5, "Muon": 5e-5,
        "NorMuon": 5e-5, "Scion": 2e-6, "AdamH": 2e-5, "MuonH": 2e-5, "Ridge": 2e-4}    # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_small_steps_of_every_preset_add_up_as_in_fp32(name: str) -> None:
    """Of what moves fp32 weights compensated keeps nine tenths and more (moments are bf16), stochastic the direction, nearest little."""
    preset, lr = PRESETS[name], TINY[name]
    start = random(12, 8).to(BF16).double()
    way = walk(preset, "nearest", torch.float32, lr)[0] - start
    assert 0 < float(way.abs().max()) < 0.02
    kept = {r: walk(preset, r, BF16, lr) for r in ROUNDINGS}
    missed = {r: float((kept[r][0] - start - way).norm() / way.norm()) for r in ROUNDINGS}
    assert missed["compensated"] < 0.1, missed
    assert missed["nearest"] > 3 * missed["compensated"], missed
    along = float(((kept["stochastic"][1] - start) * way).sum() / way.square().sum())
    assert 0.5 < along < 1.5, along


# ---------------------------------------------------------------------------------------------------------- state


def saved_and_loaded(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def bf16_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(BF16)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        optimizer.zero_grad()
        net(random(5, 6, seed=seed).to(BF16)).float().square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("rounding", KEEPING)
@pytest.mark.parametrize("preset", [AdamW, Muon, SGD])
def test_the_state_of_rounding_goes_on_bit_for_bit(preset: Callable[..., NormOptimizer], rounding: str) -> None:
    def built(seed: int) -> tuple[nn.Sequential, NormOptimizer, nw.Control]:
        net = bf16_net(seed)
        optimizer = preset(net, rounding=rounding, lr=1e-3)
        return net, optimizer, nw.attach(net, optimizer, nw.weight_decay(0.01, rounding=rounding))

    whole, whole_optimizer, _ = built(0)
    train(whole, whole_optimizer, range(8))
    first, optimizer, control = built(0)
    train(first, optimizer, range(4))
    state = saved_and_loaded({"net": first.state_dict(), "optimizer": optimizer.state_dict(), "control": control.state_dict()})
    second, resumed, again = built(7)
    second.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    again.load_state_dict(state["control"])
    train(second, resumed, range(4, 8))
    assert same(whole, second)
    kept = {"stochastic": ("noise", torch.int64), "compensated": ("carry", torch.int16)}[rounding]
    held = resumed.param_groups[0]["params"]
    assert all(resumed.state[p][kept[0]].dtype == kept[1] for p in held)
    again.remove()
    twin, twin_optimizer = copy.deepcopy((second, resumed))
    train(second, resumed, range(8, 10))
    train(twin, twin_optimizer, range(8, 10))
    assert same(second, twin)


def test_a_seed_decides_the_roundings() -> None:
    def run(seed: int) -> nn.Module:
        net = bf16_net()
        torch.manual_seed(seed + 5)    # the global generator has no part in it, and is not touched
        before = torch.get_rng_state()
        train(net, SGD(net, rounding="stochastic", seed=seed, lr=0.01), range(3))
        assert torch.equal(torch.get_rng_state(), before)
        return net

    assert same(run(1), run(1)) and not same(run(1), run(2))
    p, q = (nn.Parameter(torch.ones(200, dtype=BF16)) for _ in range(2))
    optimizer = SGD([{"params": [p]}, {"params": [q]}], rounding="stochastic", weight_decay=1e-3, lr=1.0, decay="weight")
    for x in (p, q):
        x.grad = torch.zeros_like(x)
    optimizer.step()
    assert not torch.equal(p, q), "two parameters share their random numbers"


def test_the_rounding_may_change_in_training() -> None:
    net = bf16_net()
    optimizer = SGD(net, lr=1e-3)
    for rounding in ("compensated", "stochastic", "nearest"):
        optimizer.param_groups[0]["rounding"] = rounding
        train(net, optimizer, range(2))
        kept = {"compensated": {"carry"}, "stochastic": {"noise"}, "nearest": set()}[rounding]
        assert {k for p in net.parameters() for k in optimizer.state[p]} & {"carry", "noise"} == kept


def test_a_step_that_gradscaler_skips_leaves_the_roundings_state_alone() -> None:
    for rounding in KEEPING:
        net = bf16_net().float()
        net[0].to(BF16)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
        control = nw.attach(net, optimizer, nw.weight_decay(0.01, rounding=rounding))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for bad in (False, True, False):
            for p in net.parameters():
                p.grad = torch.full_like(p, math.inf if bad else 1.0)
            before, state = copy.deepcopy(net), str(control.state_dict())
            scaler.scale(torch.ones(()))    # makes its scale
            scaler.step(optimizer)
            scaler.update()
            assert same(net, before) is bad and (str(control.state_dict()) == state) is bad


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(bf16_net(), rounding="up"), "rounding='up'"),
        (lambda: SGD(bf16_net(), rounding="stochastik"), "Did you mean 'stochastic'?"),
        (lambda: SGD(bf16_net(), seed=-1), "seed=-1, and needs an integer"),
        (lambda: SGD(bf16_net(), seed=0.5), "seed=0.5"),
        (lambda: nw.weight_decay(0.1, rounding="kahan"), "rounding is 'kahan'"),
        (lambda: nw.max_norm(1.0, rounding="stochastic"), "does not use rounding"),
    ],
)
def test_what_cannot_be_meant(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_the_yaml_form_has_it() -> None:
    policy = nw.Policy([nw.weight_decay(0.1, rounding="compensated"), nw.l1_prox(0.1, rounding="stochastic")])
    assert nw.Policy.from_yaml(policy.to_yaml()) == policy
    assert nw.Policy.from_yaml("- {weight_decay: {strength: 0.1, rounding: compensated}}")[0] == policy[0]
    assert "rounding compensated" in policy[0].label()


# ---------------------------------------------------------------------------------------------------------- every named rule


def units(w: Tensor) -> Tensor:
    return w.norm(dim=1)


HOLDS: dict[str, tuple[Callable[[], nw.Rule], Callable[[Tensor, Tensor], Tensor]]] = {
    "max_norm": (lambda: nw.max_norm(0.4), lambda w, w0: units(w) - 0.4),
    "min_max_norm": (lambda: nw.min_max_norm(0.2, 0.4), lambda w, w0: torch.maximum(units(w) - 0.4, 0.2 - units(w))),
    "clip_weight_norm": (lambda: nw.clip_weight_norm(0.7), lambda w, w0: w.norm() - 0.7),
    "clip_weight_value": (lambda: nw.clip_weight_value(0.1), lambda w, w0: w.abs() - 0.1),
    "non_negative": (lambda: nw.non_negative(), lambda w, w0: -w),
    "l1_ball": (lambda: nw.l1_ball(0.7), lambda w, w0: w.abs().sum(1) - 0.7),
    "spectral_cap": (lambda: nw.spectral_cap(0.3), lambda w, w0: torch.linalg.svdvals(w)[0] - 0.3),
    "spectral_cap within a tolerance": (
        lambda: nw.spectral_cap(0.3, tolerance=0.01), lambda w, w0: torch.linalg.svdvals(w)[0] - 0.3 * 1.01),
    "unit_norm": (lambda: nw.unit_norm(0.5), lambda w, w0: (units(w) - 0.5).abs() - 2 * 0.5 * torch.finfo(BF16).eps),
    "spectral_normalize": (
        lambda: nw.spectral_normalize(0.5), lambda w, w0: (torch.linalg.svdvals(w)[0] - 0.5).abs() - 2 * 0.5 * torch.finfo(BF16).eps),
    "hyperball": (lambda: nw.hyperball(params="*"), lambda w, w0: (w.norm() / w0.norm() - 1).abs() - 2 * torch.finfo(BF16).eps),
    "orthogonal": (
        lambda: nw.orthogonal(params="*"), lambda w, w0: (torch.linalg.svdvals(w) - 1).abs() - 4 * torch.finfo(BF16).eps),
}    # fmt: skip
"""What a rule on weights promises, as what may not be above zero, written out in float64."""
FREE = {
    "l2_penalty", "l1_penalty", "elastic_net", "weight_decay", "decay_to_init", "l1_prox", "group_lasso", "nuclear_prox",
    "clip_grad_norm", "clip_grad_value", "normalize_grad", "agc", "autoclip", "zclip", "relative_update", "radial_brake", "cpr", "qk_clip",
    "orthogonal_penalty",
}    # fmt: skip
"""Named rules that promise no bound on the weights."""


def test_every_named_rule_is_in_one_of_the_tables() -> None:
    assert {name.partition(" ")[0] for name in HOLDS} | FREE == set(NAMED)


@HALVES
@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_every_named_bound_holds_after_rounding(name: str, kind: str, dtype: torch.dtype, coverage: Callable[..., None]) -> None:
    make, excess = HOLDS[name]
    torch.manual_seed(0)
    model = nn.Linear(12, 9, bias=False)
    if name == "orthogonal":
        nn.init.orthogonal_(model.weight)
    model = model.to(dtype)
    first = model.weight.detach().double().clone()
    options = {"eps": 1e-3} if kind == "AdamW" else {}    # its default is 0 in fp16
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, weight_decay=0.0, **options)
    control = nw.attach(model, optimizer, make())
    for step in range(12):
        model.weight.grad = random(9, 12, seed=step).to(dtype)
        optimizer.step()
        assert float(excess(model.weight.detach().double(), first).max()) <= 0.0, f"after step {step}"
        assert control.verify(), str(control.verify())
    assert not torch.equal(model.weight.double(), first)
    coverage("named bounds in half precision", name.partition(" ")[0], kind, dtype=str(dtype)[6:])


# ------------------------------------------------------------------------------------- masters, autocast, recomputed activations


def test_fp32_master_weights_beside_a_bf16_model() -> None:
    """The pattern of docs/precision.md: the optimizer and the control know the fp32 copy; the model computes in bf16."""
    model = bf16_net()
    master = copy.deepcopy(model).float()
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-4)
    control = nw.attach(master, optimizer, [nw.max_norm(0.5), nw.clip_grad_norm(1.0)])
    reference = copy.deepcopy(master)
    alone = torch.optim.AdamW(reference.parameters(), lr=1e-4)
    nw.attach(reference, alone, [nw.max_norm(0.5), nw.clip_grad_norm(1.0)])
    start = copy.deepcopy(master)
    for seed in range(20):
        model.zero_grad()
        model(random(5, 6, seed=seed).to(BF16)).float().square().mean().backward()
        for p, w, r in zip(model.parameters(), master.parameters(), reference.parameters(), strict=True):
            w.grad, r.grad = p.grad.float(), p.grad.float()    # type: ignore[union-attr]
        optimizer.step()
        alone.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), list(master.parameters()))
    assert control.verify() and same(master, reference)
    moved = [(w - s).abs().max() for w, s in zip(master.parameters(), start.parameters(), strict=True)]
    assert all(bool(m > 0) for m in moved)
    over = max(float(m.weight.double().norm(dim=1).max()) for m in (model[0], model[2])) / 0.5 - 1
    assert over <= torch.finfo(BF16).eps / 2, "the rounded copy is off by half an ulp at most"


def test_under_autocast_the_weights_keep_their_bounds_and_the_rules_see_fp32_gradients() -> None:
    model = bf16_net().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen: list[torch.dtype] = []
    control = nw.attach(model, optimizer, [nw.clip_grad_norm(0.3), nw.max_norm(0.4), nw.spectral_cap(0.7)])
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.dtype for p in model.parameters()))    # type: ignore[union-attr]
    outputs = []
    for seed in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            out = model(random(5, 6, seed=seed))
            outputs.append(out.dtype)
            out.float().square().mean().backward()
            optimizer.step()    # within autocast too, as some loops have it
        total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))    # type: ignore[union-attr]
        assert total <= 0.3 * (1 + 1e-6) and control.verify(), str(control.verify())
    assert set(outputs) == {BF16} and set(seen) == {torch.float32}


def test_recomputed_activations_change_nothing() -> None:
    """Activation checkpointing runs the forward pass twice; rules act between backward and step only."""

    def run(recompute: bool) -> tuple[nn.Module, nw.Control]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        rules = [nw.l2_penalty(0.1), nw.zclip(), nw.cpr(0.01), nw.max_norm(0.6), nw.spectral_cap(0.9, tolerance=0.01)]
        control = nw.attach(net, optimizer, rules)
        for seed in range(6):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            x = random(5, 6, seed=seed).requires_grad_()
            out = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
            out.square().mean().backward()
            optimizer.step()
        return net, control

    (a, first), (b, second) = run(False), run(True)
    assert same(a, b) and str(first.state_dict()) == str(second.state_dict())


def test_accumulated_gradients_of_bf16_weights_are_one_step() -> None:
    def run(parts: int) -> tuple[nn.Module, nw.Control]:
        net = bf16_net().to(F64)
        optimizer = SGD(net, lr=0.1, momentum=0.9)
        control = nw.attach(net, optimizer, [nw.clip_grad_norm(0.2), nw.autoclip(), nw.unit_norm("init")])
        for seed in range(4):
            optimizer.zero_grad()
            for x in random(8, 6, seed=seed).double().chunk(parts):
                (net(x).square().sum() / 24).backward()
            optimizer.step()
        return net, control

    (a, first), (b, second) = run(1), run(4)
    assert first.steps == second.steps == 4
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
