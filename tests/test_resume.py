"""What happens to a run besides training: copies, averages, ties, parameters that come and go, wrappers, checkpoints without pickle."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normwise as nw
from normwise.optim import Muon


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed))
    out: Tensor = model(x)
    return (out - x[:, :3]).square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for seed in steps:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def lengths(weight: Tensor) -> Tensor:
    return weight.detach().double().norm(dim=1)


STATEFUL = [
    nw.clip_grad_norm(1.0), nw.autoclip(params="2.*"), nw.zclip(params="0.*"), nw.cpr(0.02, params="0.weight"),
    nw.unit_norm("init", params="2.weight"), nw.spectral_cap(0.8, params="4.weight", tolerance=0.01),
    nw.max_norm(0.3, params="0.weight", center="init"), nw.weight_decay(0.1),
]    # fmt: skip


# ---------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deep", "shallow", "pickle"])
def test_a_copied_control_holds_nothing_and_says_what_to_do(copied: Callable[[Any], Any]) -> None:
    model = net()
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), STATEFUL)
    with pytest.warns(UserWarning, match=r"twin = nw\.attach\(model_copy, optimizer_copy, control\.policy\)"):
        twin = copied(control)
    assert not twin and not isinstance(twin, nw.Control)
    with pytest.raises(nw.PolicyError, match="no rule acts"):
        twin.verify()


def test_a_copy_of_model_and_optimizer_goes_on_alike_once_the_policy_is_attached_to_it() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.05)
    control = nw.attach(model, optimizer, STATEFUL)
    train(model, optimizer, range(5))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    free, free_optimizer = copy.deepcopy((model, optimizer))
    again = nw.attach(twin, twin_optimizer, control.policy)
    again.load_state_dict(control.state_dict())
    for m, o in ((model, optimizer), (twin, twin_optimizer), (free, free_optimizer)):
        train(m, o, range(5, 10))
    assert same(model, twin) and again.verify() and again.steps == control.steps == 10
    assert not same(model, free), "torch's copy has no hooks, so it trains without the rules"


def test_a_copied_preset_says_that_its_policy_is_gone() -> None:
    model = net()
    optimizer = Muon(model, policy=[nw.max_norm(0.3)])
    train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match="the copy of this optimizer has no policy="):
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert twin_optimizer.control is None and optimizer.control is not None
    again = nw.attach(twin, twin_optimizer, optimizer.control.policy)
    again.load_state_dict(optimizer.control.state_dict())
    train(model, optimizer, range(2, 5))
    train(twin, twin_optimizer, range(2, 5))
    assert same(model, twin) and float(lengths(twin[0].weight).max()) <= 0.3
    with pytest.warns(UserWarning, match="this one has none"):
        Muon(net()).load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(Muon(net()))


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_weights_in_a_ball_are_in_it_and_the_run_does_not_notice(average: str) -> None:
    """A ball is convex. The average of points of a sphere is not on it, which the documentation says."""
    model, alone = net(), net()
    averaging = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if average == "ema" else {}
    shadow = AveragedModel(model, **averaging)
    runs = [(m, SGD(m.parameters(), lr=0.5)) for m in (model, alone)]
    controls = [nw.attach(m, o, [nw.max_norm(0.4), nw.spectral_cap(0.7)]) for m, o in runs]
    for step in range(12):
        for m, o in runs:
            train(m, o, range(step, step + 1))
        shadow.update_parameters(model)
    assert same(model, alone) and all(controls)
    assert not same(shadow.module, model)
    for layer in (0, 2, 4):
        weight = shadow.module[layer].weight.detach().double()
        assert float(lengths(weight).max()) <= 0.4 * (1 + 1e-6) and float(torch.linalg.svdvals(weight)[0]) <= 0.7 * (1 + 1e-6)
    update_bn([torch.ones(2, 6)], shadow)
    model.load_state_dict(shadow.module.state_dict())    # the average becomes the model
    train(model, runs[0][1], range(12, 13))
    assert controls[0].verify()


def test_functional_call_sees_the_weights_and_changes_none() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.5)
    control = nw.attach(model, optimizer, STATEFUL)
    plain = net()
    plain_optimizer = SGD(plain.parameters(), lr=0.5)
    nw.attach(plain, plain_optimizer, STATEFUL)
    for seed in range(4):
        optimizer.zero_grad()
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed))
        out = functional_call(model, dict(model.named_parameters()), (x,))
        (out - x[:, :3]).square().mean().backward()
        before = [p.detach().clone() for p in model.parameters()]
        functional_call(model, {n: 2 * p.detach() for n, p in model.named_parameters()}, (x,))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        optimizer.step()
        train(plain, plain_optimizer, range(seed, seed + 1))
    assert same(model, plain) and control.verify()


# ---------------------------------------------------------------------------------------------------------- parameters come and go


def test_tied_weights_are_one_parameter_in_the_state_and_after_a_resume() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(x.argmax(1)))[:, :3]
            return out

    def built(seed: int) -> tuple[Tied, Optimizer, nw.Control]:
        torch.manual_seed(seed)
        model = Tied()
        optimizer = AdamW(model.parameters(), lr=0.1)
        return model, optimizer, nw.attach(model, optimizer, [nw.unit_norm("init"), nw.zclip()])

    whole, optimizer, control = built(0)
    train(whole, optimizer, range(3))
    assert list(control.state_dict()["rules"][0]["radius"]) == ["embed.weight"]
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), control.state_dict()))
    resumed, again, other = built(5)
    for part, state in zip((resumed, again, other), saved, strict=True):
        part.load_state_dict(state)
    assert resumed.head.weight is resumed.embed.weight
    train(whole, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert same(whole, resumed) and other.verify()


def test_frozen_for_a_while_and_trained_again_with_what_was_known() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    control = nw.attach(model, optimizer, STATEFUL)
    radius = control.state_dict()["rules"][4]["radius"]["2.weight"].clone()
    train(model, optimizer, range(3))
    model[2].requires_grad_(False)
    optimizer.zero_grad()
    held = model[2].weight.detach().clone()
    train(model, optimizer, range(3, 6))
    assert torch.equal(model[2].weight, held)
    model[2].requires_grad_(True)
    train(model, optimizer, range(6, 9))
    assert not torch.equal(model[2].weight, held) and control.verify()
    assert torch.equal(control.state_dict()["rules"][4]["radius"]["2.weight"], radius)
    torch.testing.assert_close(lengths(model[2].weight), radius, rtol=1e-6, atol=0)


def test_unfrozen_after_attach_is_ruled_from_the_next_step_on() -> None:
    """Gradual unfreezing: the optimizer holds all, the rules found only what was trained."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.5)
    control = nw.attach(model, optimizer, [nw.max_norm(0.2), nw.unit_norm("init", params="role:matrix", stop=0 + 1)], log=True)
    train(model, optimizer, range(2))
    assert float(lengths(model[0].weight).max()) > 0.2
    state = control.state_dict()["rules"][1]["radius"]
    model[0].requires_grad_(True)
    train(model, optimizer, range(2, 4))
    assert float(lengths(model[0].weight).max()) <= 0.2 and control.verify()
    now = control.state_dict()["rules"][1]["radius"]
    assert set(now) == {*state, "0.weight"} and all(torch.equal(now[name], r) for name, r in state.items())
    assert control.steps == 4 and "0.weight" in str(control.norms().to_data() if hasattr(control.norms(), "to_data") else control.norms())


def test_added_with_a_group_it_is_ruled_from_the_next_step_on() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.9)
    control = nw.attach(model, optimizer, [nw.clip_grad_norm(0.5), nw.cpr("init"), nw.max_norm(0.2)])
    train(model, optimizer, range(3))
    known = control.state_dict()
    model.add_module("5", nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.1})
    train(model, optimizer, range(3, 4))
    total = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5    # type: ignore[union-attr]
    assert total <= 0.5 * (1 + 1e-6), "the new gradients belong to the one global norm"
    assert float(lengths(model[5].weight).max()) <= 0.2 and control.verify() and control.steps == 4
    first, now = known["rules"][1], control.state_dict()["rules"][1]
    assert all(torch.equal(first["radius"][n], now["radius"][n]) for n in first["radius"]) and "5.weight" in now["radius"]
    assert all(float(now["found"][n]["lambda"]) >= 0 for n in first["found"])


def test_added_to_a_preset_with_rules_inside_and_beside_matrices_that_are_followed() -> None:
    """A matrix of the shape of another joins its batch, whose singular vectors stay known; rules on updates still need no snapshot."""
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(3)    # so that the cap has to act
    small = nw.Rule(params="*.weight", on="update", action="clip_norm", norm="l2", radius=1e-3)
    optimizer = Muon(model, lr=0.5, weight_decay=0.0, policy=[small, nw.spectral_cap(0.8, tolerance=0.01)])
    train(model, optimizer, range(3))
    known = optimizer.control.state_dict()["rules"][1]["found"]["2.weight"]
    assert float(known["reach"].max()) > 0, "nothing is known that could be kept"
    model.insert(3, nn.Linear(8, 8))
    names = [f"3.{name}" for name, _ in model[3].named_parameters()]
    row = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names", "layouts", "name")}
    optimizer.add_param_group({"params": list(zip(names, model[3].parameters(), strict=True)), **row, "act": "none", "scale": "absolute"})
    for seed in range(3, 6):
        before = [p.detach().double().clone() for p in (model[2].weight, model[3].weight)]
        train(model, optimizer, range(seed, seed + 1))
        assert optimizer.control.engine.inline and optimizer.control.steps == seed + 1
        assert optimizer.control.verify(), str(optimizer.control.verify())
        for old, p in zip(before, (model[2].weight, model[3].weight), strict=True):
            capped = seed == 3 and p is model[3].weight
            assert capped or 0 < float((p.detach().double() - old).norm()) <= 2.5e-3, "the step's 1e-3, and what the cap takes off"
    found = optimizer.control.state_dict()["rules"][1]["found"]
    assert {"0.weight", "2.weight", "3.weight"} <= set(found)


def test_two_optimizers_one_of_which_gets_a_group() -> None:
    model, late = net(), nn.Linear(3, 3)
    first, second = SGD(model[:2].parameters(), lr=0.2), AdamW(model[2:].parameters(), lr=0.02)
    control = nw.attach(model, [first, second], [nw.clip_grad_norm(0.3), nw.max_norm(0.3), nw.zclip(params="0.*")])
    for seed in range(4):
        if seed == 2:
            model.add_module("5", late)
            second.add_param_group({"params": late.parameters()})
        for o in (first, second):
            o.zero_grad()
        loss_of(model, seed).backward()
        first.step()
        second.step()
        total = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5    # type: ignore[union-attr]
        assert total <= 0.3 * (1 + 1e-6) and control.verify() and control.steps == seed + 1
    assert float(lengths(late.weight).max()) <= 0.3


def test_replaced_by_another_parameter_the_rule_follows_the_name() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.3)
    control = nw.attach(model, optimizer, [nw.max_norm(0.2, params="4.weight"), nw.unit_norm("init", params="2.weight")])
    train(model, optimizer, range(2))
    radius = control.state_dict()["rules"][1]["radius"]["2.weight"]
    old, model[4] = model[4], nn.Linear(8, 3)
    group = optimizer.param_groups[0]["params"]
    for before, after in zip(old.parameters(), model[4].parameters(), strict=True):
        group[next(i for i, p in enumerate(group) if p is before)] = after
    left = old.weight.detach().clone()
    with torch.no_grad():
        old.weight.mul_(100)
    train(model, optimizer, range(2, 4))
    assert float(lengths(model[4].weight).max()) <= 0.2 and control.verify()
    assert torch.equal(old.weight, 100 * left), "the parameter that nobody holds is left alone"
    assert torch.equal(control.state_dict()["rules"][1]["radius"]["2.weight"], radius)


def test_a_rule_whose_parameters_are_all_frozen_rests() -> None:
    """Of every kind: those with a state, over all parameters, on heads of one group."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.2)
    control = nw.attach(model, optimizer, [*STATEFUL, nw.clip_weight_norm(5.0, per="tensor"), nw.l2_penalty(0.1)])
    train(model, optimizer, range(2))
    known = control.state_dict()
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra]})    # of no model
    extra.grad = torch.ones(3)
    before = copy.deepcopy(model)
    optimizer.step()
    assert same(model, before) and not torch.equal(extra, torch.ones(3))
    assert control.steps == 3 and control.verify() and control.penalty() == 0 and set(control.violations().values()) == {0}
    frozen = control.state_dict()
    assert str(frozen["rules"][3:6]) == str(known["rules"][3:6]), "what was known is kept"
    model.requires_grad_(True)
    train(model, optimizer, range(2, 4))
    assert control.verify() and str(control.state_dict()["rules"][4]) == str(known["rules"][4])


def test_a_rule_that_is_left_with_nothing_says_so_before_the_step() -> None:
    model = net()
    optimizer = SGD([{"params": [p]} for p in model.parameters()], lr=0.3)
    nw.attach(model, optimizer, nw.max_norm(0.2, params="4.weight"))
    train(model, optimizer, range(1))
    del optimizer.param_groups[4]
    before = copy.deepcopy(model)
    for _ in range(2):
        loss_of(model, 1).backward()
        with pytest.raises(nw.PolicyError, match=r"4\.weight.*no given optimizer holds"):
            optimizer.step()
    assert same(model, before)


def test_the_state_of_what_is_frozen_at_the_save_is_in_it() -> None:
    def built(seed: int) -> tuple[nn.Sequential, Optimizer, nw.Control]:
        model = net(seed)
        optimizer = SGD(model.parameters(), lr=0.2)
        return model, optimizer, nw.attach(model, optimizer, nw.unit_norm("init"))

    whole, optimizer, control = built(0)
    train(whole, optimizer, range(2))
    whole[2].requires_grad_(False)
    whole.add_module("5", nn.Linear(3, 3))
    optimizer.add_param_group({"params": whole[5].parameters()})    # binds anew, without the frozen one
    optimizer.zero_grad()
    train(whole, optimizer, range(2, 4))
    state = control.state_dict()
    assert set(state["rules"][0]["radius"]) == {"0.weight", "2.weight", "4.weight", "5.weight"}
    with torch.no_grad():
        whole[2].weight.mul_(2)
    whole[2].requires_grad_(True)
    train(whole, optimizer, range(4, 6))
    torch.testing.assert_close(lengths(whole[2].weight), state["rules"][0]["radius"]["2.weight"], rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------- wrappers and rates


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        self.add_module(attribute, model)
        self._inner = [model]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._inner[0](x)
        return out


class DistributedDataParallel(Wrapped):
    """Known by its name, as torch's is: a submodule ``module`` may also be a user's own."""


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("attribute", WRAPPERS)
def test_a_state_saved_under_one_wrapper_goes_on_under_another(attribute: str) -> None:
    plain = net()
    optimizer = AdamW(plain.parameters(), lr=0.05)
    control = nw.attach(plain, optimizer, STATEFUL)
    train(plain, optimizer, range(4))
    weights, moments, known = copy.deepcopy((plain.state_dict(), optimizer.state_dict(), control.state_dict()))
    inner = net(9)
    model = Wrapped(Wrapped(inner, attribute), "_orig_mod") if attribute != "module" else DistributedDataParallel(inner, "module")
    wrapped_optimizer = AdamW(model.parameters(), lr=0.05)
    wrapped = nw.attach(model, wrapped_optimizer, STATEFUL)
    inner.load_state_dict(weights)
    wrapped_optimizer.load_state_dict(moments)
    wrapped.load_state_dict(known)
    train(plain, optimizer, range(4, 8))
    train(model, wrapped_optimizer, range(4, 8))
    assert same(plain, model) and wrapped.verify()


def test_a_rate_changed_at_the_resume_is_the_one_that_decay_and_prox_use() -> None:
    model, other = net(), net(3)
    optimizer = SGD(model.parameters(), lr=0.2)
    control = nw.attach(model, optimizer, [nw.weight_decay(0.5), nw.l1_prox(0.1)])
    train(model, optimizer, range(2))
    later = SGD(other.parameters(), lr=0.2)
    again = nw.attach(other, later, control.policy)
    other.load_state_dict(model.state_dict())
    later.load_state_dict(optimizer.state_dict())
    again.load_state_dict(control.state_dict())
    later.param_groups[0]["lr"] = 0.01
    w = other[0].weight.detach().clone()
    loss_of(other, 5).backward()
    later.step()
    moved = w * (1 - 0.01 * 0.5) - 0.01 * other[0].weight.grad
    norm = (moved.abs() - 0.01 * 0.1).clamp(min=0) * moved.sign()
    torch.testing.assert_close(other[0].weight.detach(), norm, rtol=1e-6, atol=1e-7)


def test_a_unit_that_became_zero_in_training_keeps_its_first_radius() -> None:
    """When the rules are bound again, and when they are attached to a model and an optimizer that a checkpoint was loaded into. Without
    anything known of it a zero unit is refused, and nothing stays attached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    first = model[0].weight.detach().norm(dim=1)
    control = nw.attach(model, optimizer, nw.max_norm("init", "*.weight"))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    with torch.no_grad():
        model[0].weight[1].zero_()
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    step(model, optimizer)
    assert torch.allclose(control.state_dict()["rules"][0]["radius"]["0.weight"].float(), first)

    with torch.no_grad():
        model[0].weight[1].zero_()
    again = copy.deepcopy(model)
    second = torch.optim.SGD([{"params": list(layer.parameters())} for layer in again], lr=0.1)
    with pytest.raises(nw.PolicyError, match=r"1 of 5 blocks of '0\.weight' are zero"):
        nw.attach(again, second, nw.max_norm("init", "*.weight"))
    assert not second._optimizer_step_pre_hooks and not second._optimizer_step_post_hooks
    second.load_state_dict(optimizer.state_dict())
    resumed = nw.attach(again, second, nw.max_norm("init", "*.weight"))
    step(again, second)
    assert torch.allclose(resumed.state_dict()["rules"][0]["radius"]["0.weight"].float(), first) and resumed.verify()
