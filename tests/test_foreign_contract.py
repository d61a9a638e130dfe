"""Every optimizer of torch under a control: bounds hold after each step, states go on bit for bit, schedulers and hooks work as without."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normwise as nw
from normwise.optim import PRESETS
from test_optim_contract import SCHEDULES, saved_and_loaded

F64 = torch.float64
RADIUS, LARGEST, TOTAL = 0.5, 0.9, 0.3

FOREIGN: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.3, "momentum": 0.9}, "Adam": {"lr": 0.1}, "AdamW": {"lr": 0.1}, "RMSprop": {"lr": 0.05, "centered": True},
    "Adagrad": {"lr": 0.3}, "NAdam": {"lr": 0.1}, "RAdam": {"lr": 0.5}, "Adadelta": {"lr": 20.0}, "Rprop": {"lr": 0.1}, "ASGD": {"lr": 0.5},
    "LBFGS": {"lr": 0.5, "max_iter": 3}, "Muon": {"lr": 0.3}, "Adamax": {"lr": 0.1}, "Adafactor": {"lr": 0.5},
}    # fmt: skip
"""At rates that leave the bounds."""
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
FOREACH = tuple(name for name in FOREIGN if name not in ("LBFGS", "Muon"))
CASES = [(n, {}) for n in FOREIGN] + [(n, {"foreach": True}) for n in FOREACH] + [(n, {"fused": True}) for n in FUSED]
every_optimizer = pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{n}{'-' if h else ''}{'-'.join(h)}" for n, h in CASES])


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Matrices alone, which torch's Muon takes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)).to(dtype)


def rules() -> list[Any]:
    cap, sphere = nw.spectral_cap(LARGEST, params="2.weight"), nw.unit_norm(0.4, params="3.weight")
    return [nw.clip_grad_norm(TOTAL), nw.max_norm(RADIUS), cap, sphere]


def closure_of(model: nn.Module, optimizer: Optimizer, seed: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = next(model.parameters())
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        loss: Tensor = (model(x) - 3 * x[:, :3]).square().mean()
        loss.backward()
        return loss

    return closure


def step(model: nn.Module, optimizer: Optimizer, seed: int, closed: bool) -> None:
    closure = closure_of(model, optimizer, seed)
    if closed:
        optimizer.step(closure)    # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()


def check(model: nn.Sequential) -> None:
    """Written out in float64."""
    first, second, third = (model[i].weight.detach().double() for i in (0, 2, 3))
    for weight in (first, second):
        assert float(weight.norm(dim=1).max()) <= RADIUS
    assert float(torch.linalg.svdvals(second)[0]) <= LARGEST
    assert float((third.norm(dim=1) - 0.4).abs().max()) <= 2 * 0.4 * torch.finfo(model[3].weight.dtype).eps
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))    # type: ignore[union-attr]
    assert total <= TOTAL * (1 + 1e-6)


def closures(name: str) -> tuple[bool, ...]:
    return (True,) if name == "LBFGS" else (False, True)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(F64, marks=pytest.mark.long)], ids=["float32", "float64"])
def test_bounds_hold_after_each_step(name: str, how: dict[str, Any], dtype: torch.dtype, coverage: Callable[..., None]) -> None:
    for closed in closures(name):
        model = net(dtype=dtype)
        optimizer = getattr(torch.optim, name)(model.parameters(), **FOREIGN[name], **how)
        control = nw.attach(model, optimizer, rules())
        changed = 0
        for seed in range(6):
            before = copy.deepcopy(model)
            step(model, optimizer, seed, closed)
            check(model)
            assert control.verify(), str(control.verify())
            assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
            changed += min(control.violations().values())
        assert changed, "some rule never had anything to do"
    coverage("bounds under torch's optimizers", name, "+".join(how) or "plain", dtype=str(dtype)[6:])


@every_optimizer
def test_saved_and_resumed_it_goes_on_bit_for_bit(name: str, how: dict[str, Any]) -> None:
    stateful = [*rules(), nw.zclip(), nw.weight_decay(0.01), nw.Rule(params="0.weight", action="clip_norm", norm="l2", radius="init")]

    def built(seed: int) -> tuple[nn.Sequential, Optimizer, nw.Control]:
        model = net(seed)
        optimizer = getattr(torch.optim, name)(model.parameters(), **FOREIGN[name], **how)
        return model, optimizer, nw.attach(model, optimizer, stateful)

    whole = built(0)
    for seed in range(3):
        step(whole[0], whole[1], seed, closed=True)
    resumed = built(5)
    for part, state in zip(resumed, saved_and_loaded([part.state_dict() for part in whole]), strict=True):
        part.load_state_dict(state)
    for run in (whole, resumed):
        for seed in range(3, 6):
            step(run[0], run[1], seed, closed=True)
    assert all(torch.equal(p, q) for p, q in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))
    assert str(whole[2].state_dict()) == str(resumed[2].state_dict()) and whole[2].steps == 6


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_under_every_scheduler_rules_use_the_rate_of_the_step(name: str, schedule: str) -> None:
    """Decay and prox with a scheduler, and with its rates set by hand."""
    scheduled, by_hand = net(dtype=F64), net(dtype=F64)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizers = [getattr(torch.optim, name)(m.parameters(), lr=0.05, **options) for m in (scheduled, by_hand)]
    controls = [
        nw.attach(m, o, [nw.weight_decay(0.5), nw.l1_prox(0.01), nw.max_norm(RADIUS)])
        for m, o in zip((scheduled, by_hand), optimizers, strict=True)
    ]
    plan, rates = SCHEDULES[schedule](optimizers[0]), set()
    for seed in range(6):
        for mine, other in zip(optimizers[1].param_groups, optimizers[0].param_groups, strict=True):
            mine.update({k: v for k, v in other.items() if k in ("lr", "momentum", "betas")})
        rates.add(float(optimizers[0].param_groups[0]["lr"]))
        step(scheduled, optimizers[0], seed, closed=False)
        step(by_hand, optimizers[1], seed, closed=False)
        plan.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
        assert all(control.verify() for control in controls)
    assert len(rates) > 1
    assert all(torch.equal(p, q) for p, q in zip(scheduled.parameters(), by_hand.parameters(), strict=True))


def test_empty_groups_mixed_dtypes_and_groups_added_later() -> None:
    model = net()
    model[2].to(F64)
    optimizer = torch.optim.SGD([{"params": []}, {"params": [model[0].weight]}, {"params": [model[2].weight], "lr": 2.0}], lr=0.5)
    control = nw.attach(model, optimizer, [nw.clip_grad_norm(TOTAL), nw.max_norm(RADIUS)])
    for seed in range(4):
        if seed == 2:
            optimizer.add_param_group({"params": [model[3].weight], "lr": 1.0})
            optimizer.add_param_group({"params": []})
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 9 * i)).to(p.dtype)
        optimizer.step()
        held = [p for g in optimizer.param_groups for p in g["params"]]
        total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in held))
        assert abs(total - TOTAL) <= 1e-6 and control.verify()
        assert all(float(p.detach().double().norm(dim=1).max()) <= RADIUS for p in held)
    assert len(held) == 3


def test_the_users_own_hooks_run_in_their_order() -> None:
    """Those registered before the control see the step's own gradients and weights, those after it what the rules made of them."""
    model, seen = net(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def total(of: str) -> float:
        tensors = [p.grad if of == "grad" else p.detach() for p in model.parameters()]
        return float(torch.linalg.vector_norm(torch.stack([t.norm() for t in tensors])))    # type: ignore[union-attr]

    def longest() -> float:
        return float(model[0].weight.detach().norm(dim=1).max())

    optimizer.register_step_pre_hook(lambda *_: seen.update(raw=total("grad")))
    optimizer.register_step_post_hook(lambda *_: seen.update(free=longest()))
    nw.attach(model, optimizer, rules())
    optimizer.register_step_pre_hook(lambda *_: seen.update(clipped=total("grad")))
    optimizer.register_step_post_hook(lambda *_: seen.update(bound=longest()))
    with torch.no_grad():
        model[0].weight.mul_(5)
    step(model, optimizer, 0, closed=False)
    assert seen["raw"] > TOTAL >= seen["clipped"] * (1 - 1e-6) and seen["free"] > RADIUS >= seen["bound"]


# ------------------------------------------------------------------------------------------ torch's own table of its optimizers


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    from torch.testing._internal.common_optimizers import optim_db

    return {info.optim_cls.__name__: info for info in optim_db}


@pytest.mark.long
def test_bounds_hold_under_every_input_of_torchs_own_tests(table: dict[str, Any], coverage: Callable[..., None]) -> None:
    """Every optimizer with every set of options that torch tests it with, tensor rates, maximize and amsgrad included."""
    assert set(table) - {"SparseAdam"} == set(FOREIGN), "torch has an optimizer that is not in the table here"
    for name, info in table.items():
        if name == "SparseAdam":
            continue
        for case in info.optim_inputs_func(device="cpu"):
            options = {**({"lr": FOREIGN[name]["lr"]} if "lr" not in case.kwargs else {}), **copy.deepcopy(case.kwargs)}
            model = net()
            optimizer = info.optim_cls(model.parameters(), **options)
            control = nw.attach(model, optimizer, rules())
            for seed in range(4):
                step(model, optimizer, seed, closed=True)
                check(model)
                assert control.verify(), (name, case.desc, str(control.verify()))
            coverage("torch's own inputs", name, "bounds hold")


@pytest.mark.long
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_presets_take_torchs_steps_on_torchs_own_inputs(name: str, table: dict[str, Any]) -> None:
    checked = 0
    for case in table[name].optim_inputs_func(device="cpu"):
        options = copy.deepcopy(case.kwargs)
        if set(options) - {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "maximize"} or case.params is not None:
            continue
        if any(isinstance(b, Tensor) for b in options.get("betas", ())):
            continue
        ours, theirs = net(dtype=F64), net(dtype=F64)
        a, b = PRESETS[name](ours.parameters(), **options), getattr(torch.optim, name)(theirs.parameters(), **copy.deepcopy(options))
        for seed in range(4):
            step(ours, a, seed, closed=True)
            step(theirs, b, seed, closed=True)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, d=case.desc: f"{d}: {m}")
        checked += 1
    assert checked >= 4


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_presets_refuse_what_torchs_optimizers_refuse(preset: Any, table: dict[str, Any]) -> None:
    """The inputs that SGD and AdamW answer with an error, as far as the preset has the option; never a later surprise."""
    refused = 0
    for name in ("SGD", "AdamW"):
        for bad in table[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = bad.optimizer_error_input
            options = copy.deepcopy(given.kwargs)
            if "foreach" in options or any(isinstance(b, Tensor) for b in options.get("betas", ())):    # ours takes these
                continue
            expected = pytest.warns if issubclass(bad.error_type, Warning) else pytest.raises
            with expected(bad.error_type):
                preset([nn.Parameter(torch.ones(2, 2))] if given.params is None else given.params, **{"lr": 0.01, **options})
            refused += 1
    assert refused >= 12
