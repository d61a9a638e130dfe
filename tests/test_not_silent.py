"""Nothing fails silently: a rule acts, is refused before anything changes, or the user is told."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

F64 = torch.float64


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model: nn.Module, seed: int = 0, scale: float = 1.0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x, y = (torch.randn(10, n, generator=gen, dtype=F64).to(weight.dtype) for n in (6, 3))
    model.zero_grad()
    loss = scale * (model(x) - y).square().mean()
    loss.backward()
    return loss


def longest(weight: Tensor) -> float:
    return float(weight.detach().double().norm(dim=1).max())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the user was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: list[str] = []
        yield found
        found += [str(w.message) for w in caught]


def said(told: list[Any]) -> str:
    return "\n".join(str(getattr(w, "message", w)) for w in told)


# --------------------------------------------------------------------------------------- what verify says of what it measured


def test_before_the_first_step_nothing_was_checked():
    model = net()
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(0.3))
    result = control.verify()
    assert not result and not result.breaches and not result.rules
    assert str(result).startswith("nothing was checked.") and "has not stepped yet" in str(result)


@pytest.mark.parametrize("rules", [nw.l1_prox(0.1), nw.clip_grad_norm(1.0), nw.weight_decay(0.1), [nw.l2_penalty(0.1), nw.zclip()]])
def test_a_policy_that_bounds_no_weights_is_no_success(rules):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, rules)
    backward(model)
    optimizer.step()
    result = control.verify()
    assert not result and not result.breaches
    assert str(result).startswith("nothing was checked.") and len(result.unchecked) == len(control.policy)


def test_it_says_what_it_measured_and_how_near_that_is_to_its_bound():
    model = net(dtype=F64)
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.3), nw.clip_grad_norm(1.0), nw.clip_weight_value(9.0, start=5)])
    backward(model)
    optimizer.step()
    result = control.verify()
    assert result and result.held == ["clip_norm l2/unit <= 0.3"] and result.blocks == 11
    [nearest] = result.largest
    by_hand = torch.cat([model[i].weight.detach().norm(dim=1) for i in (0, 2)])
    assert nearest.value == pytest.approx(float(by_hand.max()), rel=1e-12) and nearest.bound == 0.3
    name, block = nearest.parameter, nearest.block
    assert float(dict(model.named_parameters())[name][block].detach().norm()) == pytest.approx(nearest.value, rel=1e-12)
    assert result.not_enforced == ["project linf/tensor <= 9"] and "acts on gradients" in str(result)


class Bystander:
    """Steps the weights itself: no hook of any optimizer runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.sub_(p.grad, alpha=0.1)


def test_a_run_in_which_no_hook_fired_is_told_and_never_called_a_success(told):
    model = net()
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(0.3))
    for seed in range(6):
        backward(model, seed)
        Bystander(model).step()
    result = control.verify()
    assert not result and "no step hook of the SGD ran" in str(result) and len(result.never_ran) == 1
    assert "no step hook of the SGD ran" in str(control.receipt())
    del model, control


def test_the_warning_of_a_run_without_hooks_comes_by_itself_and_once():
    model = net()
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(0.3))
    with pytest.warns(UserWarning, match="no step hook of the SGD ran") as caught:
        for seed in range(12):
            backward(model, seed)
            Bystander(model).step()
    assert len(caught) == 1
    assert not control.verify()


@pytest.mark.parametrize("kind", [AdamW, SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_another_optimizer_is_noticed_though_its_fused_kernel_counts_no_writes(kind):
    model = net()
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(0.3))
    other = kind(model.parameters(), lr=0.1, fused=True)
    with pytest.warns(UserWarning, match="no step hook of the SGD ran") as caught:
        for seed in range(12):
            backward(model, seed)
            other.step()
    assert len(caught) == 1
    assert "the weights have changed since attach" in str(control.verify())


def test_parameters_beside_the_rules_may_be_of_any_kind():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, device="meta"), nn.Linear(3, 2, dtype=torch.complex64))
    model.sparse, model.empty = nn.Parameter(torch.eye(3).to_sparse()), nn.Parameter(torch.empty(0, 3))
    model.scalar = nn.Parameter(torch.tensor(1.0, dtype=torch.float16))
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(0.3, params="0.weight"))
    assert "has not stepped yet" in str(control.verify()) and "no step yet" in str(control.receipt())


def test_a_weight_that_is_not_a_number_is_no_weight_that_moves():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            backward(model, seed)
    assert "has not stepped yet" in str(control.verify())


def test_gradient_accumulation_is_no_run_without_hooks():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(10):
            backward(model, seed)
        optimizer.step()
    assert control.verify()


def test_the_watch_over_backward_passes_ends_with_the_first_step():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, nw.max_norm(0.3))
    for seed in range(2):
        backward(model, seed)
        optimizer.step()
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def test_two_networks_trained_in_turn_by_freezing_are_both_measured():
    """A GAN's loop freezes the one while the other steps: what is frozen was bounded by its own last step, and is measured by that."""
    model = nn.ModuleDict({"g": nn.Linear(4, 5), "d": nn.Linear(5, 3)}).double()
    optimizers = [SGD(model[k].parameters(), lr=0.5) for k in ("g", "d")]
    control = nw.attach(model, optimizers, [nw.max_norm(0.3), nw.unit_norm("init", params="*.bias", per="tensor", floor=0.1)])
    for seed in range(6):
        for k, (name, optimizer) in enumerate(zip(("g", "d"), optimizers, strict=True)):
            model["g"].requires_grad_(name == "g")
            model["d"].requires_grad_(name == "d")
            torch.manual_seed(seed * 2 + k)
            model["d"](model["g"](torch.randn(7, 4, dtype=F64))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    result = control.verify()
    assert result and result.blocks == 5 + 3 + 2
    with torch.no_grad():
        model["g"].weight[1] *= 9
    broken = control.verify()
    assert [(b.parameter, b.block) for b in broken.breaches] == [("g.weight", 1)]


def test_a_frozen_block_under_a_radius_that_moves_on_is_measured_by_the_step_that_held_it():
    model = net(dtype=F64)
    optimizer = SGD(model.parameters(), lr=0.5)
    control = nw.attach(model, optimizer, nw.max_norm(nw.schedules.linear(0.5, 0.1, 4)))
    backward(model)
    optimizer.step()
    model[0].requires_grad_(False)
    for seed in range(1, 5):
        backward(model, seed)
        optimizer.step()
    assert 0.1 < longest(model[0].weight) <= 0.5 and longest(model[2].weight) <= 0.1 * (1 + 1e-12)
    assert control.verify()


def test_a_tensor_that_left_the_model_is_not_measured_in_its_place():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3))
    backward(model)
    optimizer.step()
    assert control.verify()
    model[2] = nn.Linear(8, 3)
    result = control.verify()
    assert not result and "2.weight: the model has another tensor there now" in str(result)


def test_a_block_that_joins_the_optimizer_is_not_held_before_the_next_step():
    model = net()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3))
    backward(model)
    optimizer.step()
    assert control.verify()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert not control.verify() and "2.weight: joined the optimizer" in str(control.verify())
    backward(model)
    optimizer.step()
    assert control.verify() and control.verify().blocks == 11


def test_of_two_optimizers_the_one_that_has_not_stepped_is_listed():
    model = net()
    optimizers = [SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    control = nw.attach(model, optimizers, nw.max_norm(0.3))
    backward(model)
    optimizers[0].step()
    assert control.verify() and any("2.weight" in one and "not stepped" in one for one in control.verify().not_enforced)
    with torch.no_grad():
        model[2].weight.mul_(5)    # somebody trains it all the same
    assert not control.verify()


# ------------------------------------------------------------------------------------------------------------- receipts


def test_a_receipt_counts_what_the_last_step_changed():
    model = net(dtype=F64)
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.55), nw.clip_grad_norm(1e-3)])
    backward(model)
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
    SGD(twin.parameters(), lr=0.1).step()
    outside = sum(int((twin[i].weight.detach().norm(dim=1) > 0.55).sum()) for i in (0, 2))
    assert 0 < outside < 11
    assert "no step yet" in str(control.receipt())
    optimizer.step()
    receipt = control.receipt()
    assert [(r.tensors, r.blocks, r.changed) for r in receipt.rules] == [(2, 11, outside), (4, 1, 1)]
    assert f"clip_norm l2/unit <= 0.55 on 2 tensors, {outside} of 11 units changed" in str(receipt)
    assert receipt.untouched == [] and receipt.flat()["rules/clip_norm l2/unit <= 0.55"] == outside / 11


def test_a_receipt_names_what_no_rule_touches_and_which_rules_rest():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.5, params="0.weight"), nw.clip_weight_value(1.0, params="0.weight", start=9)])
    backward(model)
    optimizer.step()
    text = str(control.receipt())
    assert "no rule: 3 (0.bias, 2.weight, 2.bias)" in text and "rested in the last step" in text


# ------------------------------------------------------------------------------------------ optimizers around optimizers


class Forwarding(Optimizer):
    """As Accelerate's: an Optimizer by class that never calls its base's __init__, and hands everything on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lookahead(Optimizer):
    """Slow weights over another optimizer (Zhang et al., 2019), written as many repositories have it."""

    def __init__(self, optimizer: Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                    p.copy_(slow.lerp_(p, self.alpha))
        return loss


class BaseOnly(Forwarding):
    """Keeps what it drives under another name."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.base_optimizer = optimizer

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


class HalfHooked(Lookahead):
    """As pytorch_optimizer's: step hooks of its own making, and none of the state."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()


def test_a_wrapper_with_step_hooks_alone_has_its_rules_and_tells_that_their_state_stays_here():
    model = net()
    optimizer = HalfHooked(SGD(model.parameters(), lr=0.5))
    with pytest.warns(UserWarning, match="HalfHooked has step hooks and no hooks of its state_dict"):
        control = nw.attach(model, optimizer, nw.max_norm("0.5*init"))
    for seed in range(7):
        backward(model, seed)
        optimizer.step()
        assert control.verify(), "after the step of the wrapper, not of what it drives"
    again = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = nw.attach(again, HalfHooked(SGD(again.parameters(), lr=0.5)), nw.max_norm("0.5*init"), in_optimizer_state=False)
    other.load_state_dict(control.state_dict())
    assert other.steps == 7 and other.radii().flat() == control.radii().flat()


def test_a_forwarding_wrapper_is_opened(told):
    model = net()
    wrapped = Forwarding(Forwarding(SGD(model.parameters(), lr=0.5)))
    control = nw.attach(model, wrapped, nw.max_norm(0.3))
    for seed in range(3):
        backward(model, seed)
        wrapped.step()
        assert longest(model[0].weight) <= 0.3
    assert control.steps == 3 and control.verify()


def test_rules_run_within_lookahead_and_the_user_is_told_what_it_does_after_them():
    model = net()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.5))
    with pytest.warns(UserWarning, match="Lookahead.*is not held; control.verify"):
        control = nw.attach(model, optimizer, nw.unit_norm(0.5))
    held = []
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
        held.append(control.verify().ok)
    assert control.steps == 3 and held == [True, True, False], "an average of two points of a sphere lies inside"


@pytest.mark.parametrize("wrap", [BaseOnly, lambda o: type("Lost", (Forwarding,), {"__init__": lambda s: None})()])
def test_a_class_whose_hooks_never_run_is_refused_and_what_to_attach_to_is_named(wrap):
    model = net()
    inner = SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nw.PolicyError, match=r"runs no step hooks.*Attach to the optimizer that it drives") as raised:
        nw.attach(model, wrap(inner), nw.max_norm(0.1))
    assert wrap is not BaseOnly or ".base_optimizer (a SGD)" in str(raised.value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_accelerates_own_wrapper_is_opened():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is a test extra")
    model = net()
    optimizer = accelerate.Accelerator(cpu=True).prepare(SGD(model.parameters(), lr=0.5))
    control = nw.attach(model, optimizer, nw.max_norm(0.3))
    backward(model)
    optimizer.step()
    assert control.steps == 1 and control.verify()


class SAM(Optimizer):
    """Sharpness-aware minimisation (Foret et al., 2021): moves up, evaluates there, goes back, steps. ``back`` says how it goes back."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 0.05, back: str = "data", **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer, self.back = base(self.param_groups, **options), back
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        total = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
        rises = [p.grad * (self.defaults["rho"] / total) for p in params]
        old = [p.detach().clone() for p in params]
        for p, rise in zip(params, rises, strict=True):
            p.add_(rise)
        with torch.enable_grad():
            loss = closure()
        for p, w, rise in zip(params, old, rises, strict=True):
            if self.back == "data":
                p.data = w
            else:
                p.sub_(rise)
        self.base_optimizer.step()
        return loss


@pytest.mark.parametrize("back", ["data", "subtract"])
def test_decay_and_snapshots_are_of_the_weights_that_a_two_phase_step_starts_from(back):
    """Against SAM with the same decay, and the same length of the step, written out."""
    model, plain = net(dtype=F64), net(dtype=F64)
    optimizer = SAM(model.parameters(), SGD, lr=0.1, back=back)
    rules = [nw.weight_decay(0.5), nw.Rule(action="normalize", on="update", radius=nw.radii.StepLength("number", 0.7), params="*.weight")]
    control = nw.attach(model, optimizer, rules)
    twin = SAM(plain.parameters(), SGD, lr=0.1, back=back)
    for seed in range(4):
        backward(model, seed)
        optimizer.step(lambda seed=seed: backward(model, seed))
        backward(plain, seed)
        start = {n: p.detach().clone() for n, p in plain.named_parameters()}
        twin.step(lambda seed=seed: backward(plain, seed))
        with torch.no_grad():
            for n, p in plain.named_parameters():
                if p.ndim == 2:
                    step = p - start[n]
                    p.copy_(start[n] * (1 - 0.1 * 0.5) + step * (0.7 * 0.1 / step.norm()))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert control.steps == 4


# -------------------------------------------------------------------------------------------------- changes after attach

CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "bfloat16": lambda m: m.bfloat16(), "half": lambda m: m.half(), "double": lambda m: m.double(),
    "a part of it": lambda m: m[2].bfloat16(),
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.bfloat16()),
}


@pytest.mark.parametrize("what", list(CHANGES))
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_after_a_conversion_the_margin_is_that_of_the_new_dtype(what, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 160), nn.Tanh(), nn.Linear(160, 320))
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.Rule(action="clip_norm", norm=norm, per="unit", radius=0.31))
    for step in range(4):
        if step == 2:
            CHANGES[what](model)
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
        value = torch.cat([torch.linalg.vector_norm(model[i].weight.detach().double(), 1 if norm == "l1" else 2, dim=1) for i in (0, 2)])
        assert int((value > 0.31).sum()) == 0 and control.verify(), str(control.verify())


def test_what_was_found_stays_over_a_conversion():
    model, plain = net(dtype=F64), net(dtype=F64)
    runs = []
    for m in (model, plain):
        optimizer = SGD(m.parameters(), lr=0.1)
        runs.append((m, optimizer, nw.attach(m, optimizer, [nw.unit_norm("init", params="0.weight"), nw.zclip()])))
    start = model[0].weight.detach().norm(dim=1).clone()
    for m, optimizer, _ in runs:
        for seed in range(3):
            backward(m, seed)
            optimizer.step()
    model.float()
    for _, optimizer, control in runs:
        backward(runs[0][0] if control is runs[0][2] else runs[1][0], 3)
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach().norm(dim=1).double(), start, rtol=1e-6, atol=0)
    ours, theirs = (str(c.state_dict()["rules"][1]["found"]["all together"]["count"]) for _, _, c in runs)
    assert ours == theirs and runs[0][2].steps == 4


REPLACED: dict[str, Callable[[nn.Sequential], object]] = {
    "a new layer": lambda m: m.__setitem__(2, nn.Linear(8, 3)),
    "a new parameter": lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(3, 8))),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("what", list(REPLACED))
def test_a_tensor_that_the_optimizer_does_not_know_is_an_error_at_the_next_step(what):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.3), nw.clip_grad_norm(1.0)])
    backward(model)
    optimizer.step()
    REPLACED[what](model)
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    held = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises(nw.PolicyError, match=r"another tensor as .*2\.weight.*add_param_group"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip((p for g in optimizer.param_groups for p in g["params"]), held, strict=True))
    assert control.steps == 1


@pytest.mark.parametrize("what", list(REPLACED))
def test_given_to_the_optimizer_the_new_tensor_is_under_the_rules(what):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.1))
    backward(model)
    optimizer.step()
    REPLACED[what](model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    backward(model)
    optimizer.step()
    assert control.verify() and longest(model[2].weight) <= 0.1


def test_a_layer_that_is_taken_out_of_the_model_is_told():
    model = net()
    model.add_module("extra", nn.Linear(3, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3))
    backward(model)
    optimizer.step()
    del model[3]
    backward(model)
    with pytest.warns(UserWarning, match=r"extra\.weight is no longer in the model"):
        optimizer.step()
    assert control.verify().blocks == 11


@pytest.mark.parametrize("how", ["between groups", "the last of one to the first of the next", "between optimizers"])
def test_parameters_that_move_between_groups_take_the_rate_of_where_they_are(how):
    model = net(dtype=F64)
    ps = list(model.parameters())
    if how == "between optimizers":
        optimizers = [SGD(ps[:2], lr=0.1), SGD(ps[2:], lr=0.3)]
        groups = [o.param_groups[0] for o in optimizers]
    else:
        optimizers = [SGD([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "lr": 0.3}])]
        groups = optimizers[0].param_groups
    nw.attach(model, optimizers, nw.weight_decay(1.0))

    def step() -> list[float]:
        before = [p.detach().clone() for p in ps]
        for p in ps:
            p.grad = torch.zeros_like(p)
        for o in optimizers:
            o.step()
        return [float((p.detach() / b).mean()) for p, b in zip(ps, before, strict=True) if p.ndim == 2]

    assert step() == pytest.approx([0.9, 0.7], rel=1e-12)
    moved = 0 if how == "between groups" else 1 if how.startswith("the last") else 0
    groups[1]["params"].insert(0, groups[0]["params"].pop(moved))
    if how.startswith("the last"):    # the bias came over; the weight that was first there goes the other way
        groups[0]["params"].append(groups[1]["params"].pop(1))
        assert step() == pytest.approx([0.9, 0.9], rel=1e-12)
    else:
        assert step() == pytest.approx([0.7, 0.7], rel=1e-12)


def test_data_of_another_size_is_followed_or_refused():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3))
    backward(model)
    optimizer.step()
    model[2].weight.data = torch.randn(5, 8)
    model[2].bias.data = torch.randn(5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert not control.verify() and "another shape" in str(control.verify())
    optimizer.step()
    assert longest(model[2].weight) <= 0.3 and control.verify() and control.verify().blocks == 13


# -------------------------------------------------------------------------------------------------------- interference


def test_the_same_attach_twice_is_an_error_and_replace_means_it():
    model = net(dtype=F64)
    optimizer = SGD(model.parameters(), lr=0.1)
    first = nw.attach(model, optimizer, nw.weight_decay(1.0))
    with pytest.raises(nw.PolicyError, match=r"has a control already.*replace=True"):
        nw.attach(model, optimizer, nw.weight_decay(1.0))
    with pytest.raises(nw.PolicyError, match="has a control already"):
        nw.attach(model, optimizer, nw.weight_decay(0.1))
    nw.attach(model, optimizer, nw.weight_decay(0.5), replace=True)
    assert not first._handles
    start = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), start * (1 - 0.1 * 0.5), rtol=1e-14, atol=0)


def test_a_warning_that_is_an_error_leaves_nothing_attached():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    beside = nw.attach(model, optimizer, nw.clip_grad_norm(1.0))
    for replace in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"BatchNorm rescales|has a control already"):
                nw.attach(model, optimizer, nw.group_lasso(5.0), replace=replace)
        assert len(optimizer._optimizer_step_pre_hooks) == 1 and beside._handles
    beside.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nw.attach(model, optimizer, nw.group_lasso(5.0))
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_a_control_that_cannot_take_anothers_place_leaves_it_there():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = nw.attach(model, optimizer, nw.max_norm(0.3))
    optimizer.param_groups[0]["normwise"] = [{"version": 0}]
    with pytest.raises(nw.PolicyError, match="the state is none"):
        nw.attach(model, optimizer, nw.max_norm(0.2), replace=True)
    backward(model)
    optimizer.step()
    assert first.verify() and longest(model[0].weight) <= 0.3


def test_an_overflow_that_a_scaler_skips_is_no_news():
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    control = nw.attach(model, optimizer, [nw.clip_grad_norm(1.0), nw.max_norm(3.0)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.scale(model(torch.full((2, 6), 1e35)).sum()).backward()
        scaler.step(optimizer)
    assert control.steps == 0
    backward(model)
    model[0].weight.grad[0, 0] = torch.inf
    with pytest.warns(UserWarning, match="whose norm is not finite"):    # nobody skips this one
        optimizer.step()


def test_a_looser_bound_over_a_tighter_one_is_an_error_and_nothing_is_hooked():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, nw.max_norm(0.1))
    hooks = len(optimizer._optimizer_step_pre_hooks)
    with pytest.raises(nw.PolicyError, match=r"max|clip_norm l2/unit <= 0.1"):
        nw.attach(model, optimizer, nw.max_norm(3.0))
    assert len(optimizer._optimizer_step_pre_hooks) == hooks


def test_other_rules_beside_a_control_are_told():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = nw.attach(model, optimizer, nw.max_norm(0.1))
    with pytest.warns(UserWarning, match="has a control already"):
        nw.attach(model, optimizer, nw.clip_grad_norm(1.0))
    first.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(3.0))    # another optimizer


def test_a_control_that_was_removed_or_is_gone_is_in_nobodys_way():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with nw.attach(model, optimizer, nw.max_norm(0.1)):
                pass
        gc.collect()
        nw.attach(model, optimizer, nw.max_norm(0.1))


def test_a_preset_with_a_policy_and_the_same_rule_attached_is_told():
    model = net()
    optimizer = nw.optim.SGD(model, 0.1, policy=nw.weight_decay(0.1))
    with pytest.warns(UserWarning, match="policy= of its own"):
        nw.attach(model, optimizer, nw.weight_decay(0.1))


@pytest.mark.parametrize("rule", [nw.autoclip(50), nw.zclip(), nw.clip_grad_norm(5.0), nw.autoclip(50, per="global", window=30)])
def test_gradients_that_were_clipped_before_are_told(rule):
    model = net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    nw.attach(model, optimizer, rule)
    with pytest.warns(UserWarning, match=r"had the norm 1 in .* of the first 20 steps.*max_grad_norm") as caught:
        for seed in range(25):
            backward(model, seed, scale=30.0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert len(caught) == 1


@pytest.mark.parametrize("rule", [nw.autoclip(50), nw.zclip(), nw.clip_grad_norm(0.5)])
def test_gradients_of_all_lengths_are_not(rule):
    model = net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    nw.attach(model, optimizer, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(25):
            backward(model, seed, scale=30.0)
            optimizer.step()


def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2).double()


def test_qk_clip_without_reports_is_told_once():
    model = attention()
    optimizer = SGD(model.parameters(), lr=0.0)
    nw.attach(model, optimizer, nw.qk_clip(1.0))
    with pytest.warns(UserWarning, match="no attention logits.*report_max_logits") as caught:
        for _ in range(9):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
    assert len(caught) == 1


def test_reports_do_not_outlive_a_step_at_which_the_rule_rests():
    model = attention()
    optimizer = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, nw.qk_clip(1.0, start=1))
    before = model.in_proj_weight.detach().clone()
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if step == 0:
            control.report_max_logits(model, torch.full((2,), 50.0))
        optimizer.step()
    assert torch.equal(model.in_proj_weight, before), "the report was of the step at which the rule rested"


@pytest.mark.parametrize("how", ["GradScaler", "fused GradScaler", "on_nonfinite"])
def test_reports_do_not_outlive_a_step_that_is_skipped(how):
    model = attention()
    make = {"fused GradScaler": lambda ps: AdamW(ps, lr=0.0, weight_decay=0.0, fused=True)}.get(how, lambda ps: SGD(ps, lr=0.0))
    optimizer = make(model.parameters())
    control = nw.attach(model, optimizer, nw.qk_clip(10.0), on_nonfinite="skip" if how == "on_nonfinite" else "ignore")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=how != "on_nonfinite")
    before = model.in_proj_weight.detach().clone()
    for step, logit in enumerate((50.0, 2.0)):
        optimizer.zero_grad()
        control.report_max_logits(model, torch.full((2,), logit))
        x = torch.randn(3, 1, 8, dtype=F64)
        scaler.scale(model(x, x, x)[0].sum() * (float("inf") if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(model.in_proj_weight, before), "50 was reported for the step that was skipped"
    control.report_max_logits(model, torch.full((2,), 40.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.in_proj_weight[:16], before[:16] * 0.5, rtol=1e-12, atol=0)


def test_a_penalty_is_at_the_step_of_its_own_optimizer():
    model = net(dtype=F64)
    optimizers = [SGD(model[i].parameters(), lr=0.0) for i in (0, 2)]
    control = nw.attach(model, optimizers, nw.l2_penalty(nw.schedules.linear(0.0, 1.0, 4)))
    backward(model)
    for k in (0, 0, 0, 1):
        optimizers[k].step()
    squares = [float(model[i].weight.detach().square().sum()) / 2 for i in (0, 2)]
    assert control.penalty() == pytest.approx(0.75 * squares[0] + 0.25 * squares[1], rel=1e-12)


# -------------------------------------------------------------------------------------------------------- after a failure


class Failing(SGD):
    """Raises, as when memory runs out: before it has moved anything, or after the first weight."""

    fails: str = ""

    def step(self, closure=None):
        if self.fails == "before":
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = super().step(closure)
        if self.fails == "after":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


class Plain(Optimizer):
    """The same, with a step of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.fails = ""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=torch.as_tensor(group["lr"], dtype=F64).item())
        return loss


ONCE = [nw.l2_penalty(0.3), nw.clip_grad_norm(0.5), nw.weight_decay(0.5), nw.cpr(0.01, mu=5.0), nw.l1_prox(0.01), nw.max_norm(0.6)]


@pytest.mark.parametrize("make", [lambda ps: Failing(ps, lr=0.1), lambda ps: Plain(ps, 0.1)], ids=["nested", "plain"])
@pytest.mark.parametrize("retry", ["step", "backward and step", "closure", "restored"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_step_that_raises_and_is_tried_again_has_its_rules_once(make, retry, times):
    model, plain = net(dtype=F64), net(dtype=F64)
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    control, other = (nw.attach(m, o, [*ONCE, nw.zclip(warmup=2)]) for m, o in ((model, optimizer), (plain, twin)))
    for seed in range(4):
        kept = copy.deepcopy(model.state_dict())
        backward(plain, seed)
        twin.step() if retry != "closure" else twin.step(lambda seed=seed: backward(plain, seed))
        if retry != "closure":
            backward(model, seed)
        for attempt in range(times + 1):
            optimizer.fails = "before" if attempt < times and seed in (1, 2) else ""
            if attempt and seed not in (1, 2):
                break
            if attempt and retry == "restored":
                model.load_state_dict(kept)
            if attempt and retry in ("backward and step", "restored"):
                backward(model, seed)
            try:
                optimizer.step() if retry != "closure" else optimizer.step(lambda seed=seed: backward(model, seed))
            except torch.OutOfMemoryError:
                assert control.steps == seed
        if retry in ("step", "restored"):
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert control.steps == other.steps == 4 and control.verify()
    # Gradients computed anew are those of weights that have decayed already; everything else happened once.
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p - q).abs().max()) < 0.05


def test_a_decay_of_a_failed_step_is_not_repeated():
    """Written out: three attempts, one decay."""
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = Failing(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, nw.weight_decay(1.0))
    start = model.weight.detach().clone()
    for fails in ("before", "before", ""):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.fails = fails
        try:
            optimizer.step()
        except torch.OutOfMemoryError:
            torch.testing.assert_close(model.weight.detach(), start * 0.9, rtol=1e-14, atol=0)
    torch.testing.assert_close(model.weight.detach(), start * 0.9, rtol=1e-14, atol=0)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), start * 0.81, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", [nw.clip_grad_norm(1.0), nw.zclip(), nw.max_norm(0.5), nw.normalize_grad(), nw.autoclip()])
def test_the_first_norm_that_is_not_finite_is_said_once(rule):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, rule)
    with pytest.warns(UserWarning, match="norm is not finite, in step 3.*on_nonfinite='raise'") as caught:
        for seed in range(6):
            backward(model, seed)
            if seed >= 2:
                model[0].weight.grad[0, 0] = float("nan")
            optimizer.step()
    assert len(caught) == 1
    if rule.on == "weight":
        assert not control.verify()


def test_norms_that_are_not_finite_are_said_when_they_are_asked_for():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.clip_weight_value(1.0), log=True)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="norm of all weight values is not finite"):
        control.norms()


# ------------------------------------------------------------------------------------------------------------ narrow inputs


@pytest.mark.parametrize(("first", "second", "says"), [
    (lambda m, o: m.parameters(), lambda m, o: o, "attach needs the model, given parameters"),
    (lambda m, o: list(m.parameters()), lambda m, o: o, "attach needs the model, given parameters"),
    (lambda m, o: o, lambda m, o: m, "swapped"),
    (lambda m, o: "model", lambda m, o: o, "attach needs the model, given a str"),
    (lambda m, o: m, lambda m, o: type("Trainer", (), {"optimizer": None})(), "not created yet"),
])    # fmt: skip
def test_arguments_of_another_kind_get_one_sentence(first, second, says):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match=says):
        nw.attach(first(model, optimizer), second(model, optimizer), nw.max_norm(1.0))


RATES: dict[str, Any] = {
    "tensor": lambda: torch.tensor(0.1, dtype=F64), "tensor of shape (1,)": lambda: torch.tensor([0.1], dtype=F64),
    "numpy": lambda: __import__("numpy").float64(0.1), "numpy of shape (1,)": lambda: __import__("numpy").array([0.1]),
    "float": lambda: 0.1,
}    # fmt: skip


@pytest.mark.parametrize("rate", list(RATES))
def test_learning_rates_of_any_kind(rate):
    """Decay, prox and a step's length by the same number."""
    got = []
    for lr in (0.1, RATES[rate]()):
        model = net(dtype=F64)
        optimizer = Plain(model.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = lr
        length = nw.Rule(action="normalize", on="update", radius=nw.radii.StepLength("init"), params="0.weight")
        nw.attach(model, optimizer, [nw.weight_decay(0.5), nw.l1_prox(0.01), nw.group_lasso(0.01), length])
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
        got.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*got, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", [nw.weight_decay(0.1), nw.l1_prox(0.1), nw.hyperball(), nw.relative_update()])
def test_a_rule_that_needs_a_rate_refuses_an_optimizer_without_one(rule):
    model = net()
    optimizer = Plain(model.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = None
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nw.PolicyError, match=r"needs the learning rate.*lr=None"):
        nw.attach(model, optimizer, rule)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    nw.attach(model, optimizer, nw.max_norm(1.0))    # which needs none


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = net()
    with pytest.raises(nw.PolicyError, match="meta device"):
        nw.attach(model, SGD(model.parameters(), lr=0.1), nw.max_norm(1.0))


@pytest.mark.parametrize("rule", [nw.zclip(warmup=3, on="update"), nw.autoclip(50, on="update", window=9)])
def test_update_clipping_from_history_is_gradient_clipping_of_what_sgd_adds(rule):
    """With plain SGD at rate 1 the update is minus the gradient, so that both histories are the same."""
    model, plain = net(dtype=F64), net(dtype=F64)
    optimizer, twin = SGD(model.parameters(), lr=1.0), SGD(plain.parameters(), lr=1.0)
    control = nw.attach(model, optimizer, rule)
    other = nw.attach(plain, twin, nw.Rule.from_data({**rule.to_data(), "on": "grad"}))
    changed = 0
    for seed in range(12):
        for m, o in ((model, optimizer), (plain, twin)):
            m.zero_grad()
            for i, p in enumerate(m.parameters()):
                gen = torch.Generator().manual_seed(seed * 10 + i)
                p.grad = torch.randn(p.shape, generator=gen, dtype=F64) * (1 + 9 * (seed % 4 == 3))
            o.step()
        changed += sum(control.violations().values())
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert changed >= 2 and sum(other.violations().values()) == sum(control.violations().values())


# ------------------------------------------------------------------------------------------------- receipts of optimizers


class Decoder(nn.Module):
    """Embedding, matrices and a head, of sizes that a test chooses."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(layers)])
        self.lm_head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def step_once(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_an_optimizers_receipt_says_who_takes_which_step():
    model = Decoder(10, 16, 6)
    optimizer = nw.optim.Muon(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_once(model, optimizer)
    receipt = optimizer.receipt()
    numbers = sum(p.numel() for p in model.parameters())
    assert f"6 matrices under the spectral LMO ({6 * 256 / numbers:.0%} of the parameters" in str(receipt)
    assert "1 embedding" in str(receipt) and "1 head" in str(receipt) and "under AdamW" in str(receipt)
    assert sum(g.numbers for g in receipt.groups) == numbers
    assert receipt.covered == 6 * 256 / (6 * 256 + 2 * 160)


def test_a_matrix_method_with_little_to_do_is_told_once_in_the_first_step():
    model = Decoder(100, 16, 1)
    optimizer = nw.optim.Muon(model)
    with pytest.warns(UserWarning, match=r"steps 7% of the weights of two or more.*embed\.weight \(embedding, 100x16\)") as caught:
        for _ in range(3):
            step_once(model, optimizer)
    assert len(caught) == 1


@pytest.mark.parametrize("make", [nw.optim.AdamW, nw.optim.SGD, lambda m: nw.optim.Muon([p for p in m.parameters() if p.ndim == 2])])
def test_other_methods_have_no_such_word(make):
    model = Decoder(100, 16, 1)
    optimizer = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_once(model, optimizer)
    assert optimizer.receipt().groups


def test_a_receipt_tells_of_parameters_without_a_gradient_and_of_the_policys_rules():
    model = Decoder(10, 16, 2)
    optimizer = nw.optim.Muon(model, policy=nw.max_norm(0.1))
    model(torch.arange(4)).sum().backward()
    model.blocks[1][0].weight.grad = None
    optimizer.step()
    text = str(optimizer.receipt())
    assert "not stepped yet, without a gradient: 1 (blocks.1.0.weight)" in text and "clip_norm l2/unit <= 0.1 on 4 tensors" in text


# ------------------------------------------------------------------------------------------------- what is said and logged


@pytest.mark.parametrize(("given", "allowed", "hint"), [
    ("error", ("raise", "skip", "zero", "ignore"), None), ("clip", ("clip_norm", "qk_clip", "project"), "clip_norm"),
    ("spectrl", ("spectral", "l2"), "spectral"), ("Hidden", ("hidden", "head"), "hidden"), ("xyz", ("l1", "l2"), None), ("", ("l1",), None),
    ("rais", ("raise", "skip"), "raise"), ("max", ("max_of_units", "min"), "max_of_units"), ("l3", ("l1", "l2", "linf"), None),
])    # fmt: skip
def test_a_suggestion_is_made_where_one_is_near(given, allowed, hint):
    from normwise.errors import nearest

    text = nearest(given, allowed)
    assert (f"Did you mean {hint!r}?" in text) if hint else ("Did you mean" not in text)
    assert text.endswith(f"Allowed: {', '.join(sorted(allowed))}.")


def test_the_action_clip_is_taken_for_clip_norm():
    with pytest.raises(nw.PolicyError, match="Did you mean 'clip_norm'"):
        nw.Rule(action="clip", radius=1.0)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_after_zero_grad_no_zero_is_reported_as_a_gradient_norm(log, set_to_none):
    model = net(dtype=F64)
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3), log=log)
    backward(model)
    raw = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    total = control.norms().total
    if log:
        assert total["grad"] == pytest.approx(raw, rel=1e-12)
    elif set_to_none:
        assert "grad" not in total
    else:
        assert total["grad"] == 0.0, "these gradients are zero"


def test_sparse_and_complex_gradients_count_in_the_totals():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "fc": nn.Linear(4, 2)}).double()
    model.register_parameter("phase", nn.Parameter(torch.randn(3, dtype=torch.complex128)))
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm(0.3), log=True)
    model["fc"](model["embed"](torch.tensor([1, 1, 5]))).square().sum().backward()
    model.phase.grad = torch.randn(3, dtype=torch.complex128)
    by_hand = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
    raw = torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in by_hand]).norm()
    total = control.norms().total
    assert total["grad"] == pytest.approx(float(raw), rel=1e-12)
    weights = torch.cat([torch.view_as_real(p.detach()).flatten() if p.is_complex() else p.detach().flatten() for p in model.parameters()])
    assert total["weight"] == pytest.approx(float(weights.norm()), rel=1e-12)


def test_a_matrix_norm_of_the_users_own_that_does_not_tell_rows_from_columns_needs_no_orientation():
    class Schatten4(nw.norms.Norm):
        name = "schatten4"
        matrix = True

        @property
        def dual_norm(self):
            raise NotImplementedError

        def measure(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x).pow(4).sum(1).pow(0.25)

        project = lmo = dual_norm    # clipping needs none of them

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4, dtype=F64))

    model = Bare()
    optimizer = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, nw.Rule(params="w", action="clip_norm", norm=Schatten4(), radius=0.7))
    model.w.grad = torch.zeros_like(model.w)
    optimizer.step()
    assert float(torch.linalg.svdvals(model.w.detach()).pow(4).sum() ** 0.25) <= 0.7 and control.verify()


@pytest.mark.parametrize("rule", [
    nw.clip_grad_norm(0.1), nw.l2_penalty(0.1), nw.l1_penalty(0.1), nw.group_lasso(0.1), nw.zclip(), nw.agc(), nw.clip_grad_value(0.01),
    nw.max_norm(0.3), nw.normalize_grad(),
], ids=lambda r: r.label())    # fmt: skip
def test_fp32_gradients_of_bf16_weights(rule):
    """torch lets a parameter keep gradients of another dtype; the rules act on them as on those of an fp32 twin."""
    model = net().bfloat16()
    twin = net()
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    optimizer, plain = Plain(model.parameters(), 0.0), Plain(twin.parameters(), 0.0)
    nw.attach(model, optimizer, rule)
    nw.attach(twin, plain, rule)
    for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(i))
        p.grad_dtype = None
        p.grad = q.grad.clone()
    with contextlib.suppress(RuntimeError):    # the optimizer's own step may not take them
        optimizer.step()
    plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- lassos, pruning, races


class Blocks(nn.Module):
    """Convolutions before BatchNorms as people write them: in turn, or all convolutions first; and one that nothing normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(self.stem(x))).relu())).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))


def test_a_group_lasso_before_batch_norm_is_told_with_what_to_do():
    model = Blocks()
    with pytest.warns(UserWarning, match=r"units of 3 layers whose output a BatchNorm rescales, such as stem\.0\.weight before stem\.1"):
        nw.attach(model, SGD(model.parameters(), lr=0.1), nw.group_lasso(0.1))
    quiet = [nw.group_lasso(0.1, params=["last.weight", "fc.weight"]), nw.group_lasso(0.1, params="class:BatchNorm2d"), nw.l1_prox(0.1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in quiet:
            nw.attach(model, SGD(model.parameters(), lr=0.1), rule)


def test_shrinks_report_tells_what_stayed_and_how_far_from_zero_it_is():
    pytest.importorskip("torch_pruning", reason="torch-pruning is the extra 'prune'")
    from normwise.prune import shrink

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0
        model[3].weight[4] = -0.01
    _, report = shrink(model, torch.zeros(1, 1, 8, 8))
    assert set(report.units) == {"0"} and set(report.whole) == {"2"}
    assert report.whole["2"] == (6, pytest.approx(0.01, rel=1e-6))
    assert "2: 6 units, none of them zero (the nearest 0.01 away)" in str(report)


def test_every_task_has_a_first_horizon_of_its_own():
    from normwise.experiments.race.protocol import first_horizon
    from normwise.experiments.tasks.load import TASKS
    from normwise.experiments.tasks.task import task

    assert {"cnn", "gpt", "lstm", "resnet"} <= set(TASKS) and all(first_horizon(name, 16, 0.25) >= 16 for name in TASKS)
    with pytest.raises(TypeError, match="steps"):
        task("new")
