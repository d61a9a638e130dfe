"""The control's state in ``optimizer.state_dict()``: several optimizers, other policies, old checkpoints, copies, and torch's own step."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

import normwise as nw
from normwise.engine.detached_control import Detached
from normwise.engine.optimizer_state import KEY
from normwise.parameters.names import clean_name, sites

RULES = [
    nw.zclip(z=0.5, warmup=2), nw.autoclip(percentile=40, window=6, params="0.*"), nw.unit_norm("init", params="2.weight"),
    nw.max_norm(0.2, params="0.weight", center="init"), nw.cpr(0.02, params="4.weight"),
    nw.clip_weight_value(nw.schedules.linear(0.5, 0.1, 9), params="4.bias"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_unsaid() -> Iterator[None]:
    """A warning of ours that no test asks for is a fault."""
    with warnings.catch_warnings():
        for said in (".*start anew.*", ".*saved under other rules.*", ".*detached copy.*"):
            warnings.filterwarnings("error", said)
        yield


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def step(model: nn.Module, seed: int, *optimizers: Optimizer) -> None:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed))
    for o in optimizers:
        o.zero_grad()
    (model(x) - x[:, :3]).square().mean().backward()
    for o in optimizers:
        o.step()


def made(seed: int = 0, rules: Any = RULES, **options: Any) -> tuple[nn.Sequential, Optimizer, nw.Control]:
    model = net(seed)
    optimizer = AdamW(model.parameters(), lr=0.02)
    return model, optimizer, nw.attach(model, optimizer, rules, **options)


def trained(rules: Any = RULES, steps: int = 4, **options: Any) -> tuple[nn.Sequential, Optimizer, nw.Control]:
    model, optimizer, control = made(0, rules, **options)
    for seed in range(steps):
        step(model, seed, optimizer)
    return model, optimizer, control


def saved(state: Any) -> Any:
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else bool(a == b)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


# ---------------------------------------------------------------------------------------------------------- what is in it


def test_it_is_one_key_of_the_first_group_and_the_rest_is_as_without() -> None:
    model, optimizer, control = trained()
    plain, plain_optimizer, _ = trained(in_optimizer_state=False)
    assert same(model, plain)
    ours, theirs = optimizer.state_dict(), plain_optimizer.state_dict()
    assert KEY not in str(theirs) and ours["param_groups"][0].pop(KEY) and equal(ours, theirs)
    assert str(optimizer.param_groups[0][KEY]) == "[]", "the optimizer itself, which may be printed, holds nothing"
    control.remove()
    assert equal(optimizer.state_dict(), theirs)


def test_loading_changes_nothing_of_what_was_given_and_may_be_repeated() -> None:
    model, optimizer, control = trained()
    state = saved(optimizer.state_dict())
    kept, known = copy.deepcopy(state), copy.deepcopy(control.state_dict())
    for seed in range(4, 7):
        step(model, seed, optimizer)
    for _ in range(2):
        optimizer.load_state_dict(state)
        assert equal(state, kept) and equal(control.state_dict(), known) and equal(optimizer.state_dict(), kept)
    control.load_state_dict(known)    # as code did that was written before
    assert equal(control.state_dict(), known)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_under_one_control_in_either_order(order: tuple[int, int]) -> None:
    """One of the rules spans both, and its history is in both states."""

    def built(seed: int) -> tuple[nn.Sequential, list[Optimizer], nw.Control]:
        model = net(seed)
        first, second = SGD(model[:3].parameters(), lr=0.2), AdamW(model[3:].parameters(), lr=0.02)
        return model, [first, second], nw.attach(model, [first, second], RULES)

    whole, optimizers, control = built(0)
    for seed in range(4):
        step(whole, seed, *optimizers)
    optimizers[1].zero_grad()
    weights = saved(whole.state_dict())
    states, known = saved([o.state_dict() for o in optimizers]), control.state_dict()
    resumed, again, other = built(5)
    resumed.load_state_dict(weights)
    for k in order:
        again[k].load_state_dict(states[k])
    assert equal(other.state_dict(), known)
    for seed in range(4, 8):
        step(whole, seed, *optimizers)
        step(resumed, seed, *again)
    assert same(whole, resumed) and other.verify()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_network_that_was_frozen_when_saved_is_no_other_policy(order: tuple[int, int]) -> None:
    """As a GAN's: the history of all gradients together is in the state of the optimizer whose network was trained last."""

    def built(seed: int) -> tuple[nn.Sequential, list[Optimizer], nw.Control]:
        model = net(seed)
        optimizers: list[Optimizer] = [SGD(part.parameters(), lr=0.2) for part in (model[:3], model[3:])]
        return model, optimizers, nw.attach(model, optimizers, nw.autoclip(percentile=40, window=6))

    def turns(model: nn.Sequential, optimizers: list[Optimizer], seeds: range) -> None:
        for seed, k in ((seed, k) for seed in seeds for k in order):
            model[:3].requires_grad_(k == 0)
            model[3:].requires_grad_(k == 1)
            step(model, seed, optimizers[k])

    whole, optimizers, control = built(0)
    turns(whole, optimizers, range(3))
    resumed, again, other = built(5)
    resumed.load_state_dict(saved(whole.state_dict()))
    for one, o in zip(again, optimizers, strict=True):
        one.load_state_dict(saved(o.state_dict()))
    known, found = (c.state_dict()["rules"][0]["found"] for c in (control, other))
    assert equal(found, known) and known
    turns(whole, optimizers, range(3, 6))
    turns(resumed, again, range(3, 6))
    assert same(whole, resumed)


def test_each_optimizer_brings_its_own_step_count() -> None:
    model = net()
    pair = [SGD(model[:3].parameters(), lr=0.1), SGD(model[3:].parameters(), lr=0.1)]
    control = nw.attach(model, pair, nw.max_norm(nw.schedules.linear(1, 0.1, 9)))
    step(model, 0, *pair)
    step(model, 1, pair[0])
    states = [o.state_dict() for o in pair]
    step(model, 2, *pair)
    for o, state in zip(pair, states, strict=True):
        o.load_state_dict(state)
    assert control.state_dict()["steps"] == [2, 1]


def test_what_was_loaded_before_the_control_is_attached_is_taken() -> None:
    whole, optimizer, control = trained()
    weights, state = saved([whole.state_dict(), optimizer.state_dict()])
    model = net(5)
    again = AdamW(model.parameters())
    model.load_state_dict(weights)
    again.load_state_dict(state)
    third = AdamW(model.parameters())
    third.load_state_dict(saved(again.state_dict()))    # carried along by optimizers without a control
    again = third
    other = nw.attach(model, again, RULES)
    assert equal(other.state_dict(), control.state_dict()) and again.param_groups[0][KEY] == []
    for seed in range(4, 8):
        step(whole, seed, optimizer)
        step(model, seed, again)
    assert same(whole, model)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64])
def test_it_keeps_its_own_dtypes_whatever_the_weights_are(wide: torch.dtype) -> None:
    model = net().to(wide)
    optimizer = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm("init"), nw.zclip(), nw.weight_decay(0.1, rounding="compensated")])
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    known, state = control.state_dict(), saved(optimizer.state_dict())
    twin = net().to(wide)
    other = SGD(twin.parameters(), lr=0.1)
    other.load_state_dict(state)
    assert equal(nw.attach(twin, other, control.policy).state_dict(), known)


def test_frozen_and_added_parameters_are_in_it() -> None:
    model, optimizer, control = made(0, [nw.unit_norm("init"), nw.cpr(0.02)])
    step(model, 0, optimizer)
    model[2].requires_grad_(False)
    optimizer.zero_grad()
    model.add_module("5", nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[5].parameters()})
    step(model, 1, optimizer)
    known, state = control.state_dict(), saved(optimizer.state_dict())
    assert {"2.weight", "5.weight"} <= set(known["rules"][0]["radius"])
    twin = net(5)
    twin[2].requires_grad_(False)
    twin.add_module("5", nn.Linear(3, 3))
    other = AdamW([{"params": twin[:5].parameters()}, {"params": twin[5].parameters()}])
    again = nw.attach(twin, other, control.policy)
    other.load_state_dict(state)
    assert equal(again.state_dict(), known)


# ---------------------------------------------------------------------------------------------------------- other policies


def test_a_state_from_before_the_control_is_told_once_and_only_where_something_is_lost() -> None:
    _, optimizer, _ = trained(in_optimizer_state=False)
    old = optimizer.state_dict()
    _, other, control = made(0)
    with pytest.warns(UserWarning, match=r"saved without these rules.*start anew"):
        other.load_state_dict(old)
    other.load_state_dict(old)
    assert control.steps == 0
    made(0, [nw.max_norm(0.3), nw.clip_grad_norm(1.0)])[1].load_state_dict(old)    # which know nothing
    made(0, in_optimizer_state=False)[1].load_state_dict(old)


def unit(radius: Any) -> nw.Rule:
    return nw.Rule(params="0.weight", action="normalize", per="unit", radius=radius)


RADIUS = unit("init")
CHANGES: dict[str, tuple[Any, Any, str]] = {
    "multiple": (RADIUS, unit("2*init"), 'radius was "init" and is "2.0*init"'),
    "scheduled": (RADIUS, unit(nw.radii.Init(nw.schedules.linear(1, 2, 3))), "radius was"),
    "number": (RADIUS, unit(0.5), 'radius was "init" and is 0.5'),
    "small number": (nw.max_norm(1.00000001), nw.max_norm(1.0), "radius was 1.00000001 and is 1.0"),
    "from a number": (nw.unit_norm(0.5, params="0.weight"), RADIUS, "starts anew for 0.weight"),
    "strength": (nw.cpr(0.02, mu=0.5), nw.cpr(0.02), "strength was 0.5 and is 1.0"),
    "percentile": (nw.autoclip(percentile=10), nw.autoclip(percentile=20), "radius was"),
    "z": (nw.zclip(z=2.0), nw.zclip(z=3.0), "radius was"),
    "finder": (nw.zclip(), nw.autoclip(window=5), "starts anew for all together"),
    "window of steps": (nw.max_norm(1.0, every=2), nw.max_norm(1.0, every=3), "every was 2 and is 3"),
    "selection": (nw.cpr(0.02), nw.cpr(0.02, params="re:[02].*weight"), "params was not given and is"),
    "wider selection": (nw.unit_norm("init", params="0.weight"), nw.unit_norm("init"), "starts anew for 2.weight, 4.weight"),
    "tolerance": (nw.spectral_cap(1.0), nw.spectral_cap(1.0, tolerance=0.01), "tolerance was not given and is 0.01"),
    "added": ([RADIUS], [nw.cpr(0.02), RADIUS], "rule 'cpr mean square/matrix <= 0.02 at rate 1' is new and starts anew"),
    "removed": ([nw.cpr(0.02), RADIUS], [RADIUS], "1 rule(s) of the state are in this control no more: cpr"),
    "replaced": (nw.zclip(), nw.cpr(0.02), "no more: clip_norm grad"),
    "another norm": (nw.max_norm("init"), nw.spectral_cap("init"), "no more: clip_norm l2/unit <= init"),
    "order": ([nw.zclip(), nw.cpr(0.02)], [nw.cpr(0.02), nw.zclip()], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_policy_goes_on_with_what_it_can_and_one_warning_says_what_differs(name: str) -> None:
    before, after, told = CHANGES[name]
    _, optimizer, control = trained(before)
    _, other, again = made(5, after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(optimizer.state_dict())
        other.load_state_dict(optimizer.state_dict())
    assert len(caught) == bool(told), [str(w.message) for w in caught]
    assert all(told in str(w.message) for w in caught), str(caught[0].message)
    assert again.steps == 4
    old = {k: v for rule in control.state_dict()["rules"] for k, v in rule["radius"].items()}
    now = {k: v for rule in again.state_dict()["rules"] for k, v in rule["radius"].items()}
    if name in ("multiple", "scheduled", "added", "removed", "wider selection"):
        assert torch.equal(old["0.weight"], now["0.weight"]), "the norm at the first attach, and not of the new weights"
    if name in ("strength", "percentile", "z", "order", "selection"):
        found = [{n: f for rule in c.state_dict()["rules"] for n, f in rule["found"].items()} for c in (control, again)]
        assert found[1] and all(equal(f, found[0][n]) for n, f in found[1].items())


def test_rules_that_look_alike_keep_their_own_state_when_one_of_them_goes() -> None:
    rules = [nw.cpr(0.02, params=f"{i}.weight") for i in (0, 2, 4)]
    _, optimizer, control = trained(rules)
    _, other, again = made(5, rules[1:])
    with pytest.warns(UserWarning, match="no more"):
        other.load_state_dict(optimizer.state_dict())
    found = [{n: f for rule in c.state_dict()["rules"] for n, f in rule["found"].items()} for c in (control, again)]
    assert set(found[1]) == {"2.weight", "4.weight"} and all(equal(f, found[0][n]) for n, f in found[1].items())
    assert any(float(f["lambda"]) > 0 for f in found[1].values())


@pytest.mark.parametrize("name", ["shape", "window", "elsewhere"])
def test_what_cannot_fit_is_refused_with_nothing_changed(name: str) -> None:
    before, after = {
        "shape": (nw.max_norm("init", per="unit"), nw.max_norm("init", per="unit")),
        "window": (nw.autoclip(window=5), nw.autoclip(window=6)),
        "elsewhere": (nw.decay_to_init(0.1, params="0.weight"), nw.decay_to_init(0.1, params="2.weight")),
    }[name]
    _, optimizer, _ = trained(before)
    state = optimizer.state_dict()
    model, other, again = made(5, after)
    if name == "shape":
        part = state["param_groups"][0][KEY][0]
        part["rules"] = part["rules"].replace("[8]", "[7]")
    step(model, 1, other)
    kept, known = copy.deepcopy(other.state_dict()), again.state_dict()
    with pytest.raises(nw.PolicyError, match="the state has no fitting"):
        other.load_state_dict(state)
    assert equal(other.state_dict(), kept) and equal(again.state_dict(), known)
    twin = net(5)
    fresh = AdamW(twin.parameters())
    fresh.load_state_dict(state)
    with pytest.raises(nw.PolicyError, match="the state has no fitting"):
        nw.attach(twin, fresh, after)
    assert not fresh._optimizer_step_pre_hooks and not fresh._optimizer_state_dict_post_hooks
    nw.attach(twin, fresh, after, in_optimizer_state=False)


def test_a_state_that_torch_refuses_leaves_the_control_as_it_was() -> None:
    _, optimizer, _ = trained()
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    _, other, again = made(5)
    known = again.state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(state)
    assert equal(again.state_dict(), known)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_part_is_one_clear_error(seed: int) -> None:
    rnd = random.Random(seed)
    _, optimizer, control = trained([*RULES, nw.spectral_cap(0.9, params="2.weight", tolerance=0.01)])
    state, known = optimizer.state_dict(), control.state_dict()
    part = state["param_groups"][0][KEY][0]
    what = rnd.choice(sorted(set(part) - {"inside"}))
    if what == "rules":
        at = rnd.randrange(1, len(part[what]) - 1)
        part[what] = rnd.choice([part[what][:at], part[what][:at] + "{" + part[what][at:], None, "[]x", "[[]]", '[{"rule": 1}]', 7])
    else:
        part[what] = rnd.choice([None, "x", -1, 1.5, [], torch.ones(1), {}])
    with pytest.raises(nw.PolicyError, match="state"):
        optimizer.load_state_dict(state)
    assert equal(control.state_dict(), known)


def test_states_of_the_version_before_still_load() -> None:
    """A control's, which told rules by their labels, and a preset's, which kept it beside the groups."""
    _, _, control = trained()
    old = control.state_dict()
    for rule, own in zip(old["rules"], control.policy, strict=True):
        del rule["rule"]
        rule["label"] = own.summary()    # a label was no more than that
    _, _, other = made(5)
    other.load_state_dict(old)
    assert equal(other.state_dict(), control.state_dict())
    old["rules"][0]["label"] += "x"
    with pytest.raises(nw.PolicyError, match="belongs to the rules"):
        other.load_state_dict(old)
    old["rules"][0]["label"] = old["rules"][0]["label"][:-1]
    model = net(5)
    preset = nw.optim.Muon(model, policy=RULES)
    bare = nw.optim.Muon(net(5)).state_dict()
    preset.load_state_dict({**bare, "policy": old})
    assert equal(preset.control.state_dict(), control.state_dict())


# ---------------------------------------------------------------------------------------------------------- torch's own step

ACTING = [nw.max_norm(0.1), nw.unit_norm("0.5*init", params="0.weight"), nw.weight_decay(0.5), nw.cpr(1e-4), nw.zclip(), nw.l1_prox(0.1),
          nw.Rule(params="2.weight", action="normalize", on="update", radius=0.1)]  # fmt: skip
MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda m: AdamW(m.parameters(), lr=0.1),
    "fused": lambda m: AdamW(m.parameters(), lr=torch.tensor(0.1), fused=True),
    "sgd": lambda m: SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "groups": lambda m: Adam([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(m.parameters(), 1)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_step_that_makes_state_is_none_of_the_rules(name: str) -> None:
    model = net()
    optimizer = MAKERS[name](model)
    control = nw.attach(model, optimizer, [r for r in ACTING if name != "fused" or r.on != "update"])
    before, known = copy.deepcopy(model), control.state_dict()
    state = get_optimizer_state_dict(model, optimizer)
    assert same(model, before) and equal(control.state_dict(), known) and not any(control.violations().values())
    set_optimizer_state_dict(model, optimizer, state)
    assert same(model, before) and equal(control.state_dict(), known)
    step(model, 0, optimizer)
    assert control.steps == 1 and not same(model, before)
    optimizer.zero_grad()
    known = control.state_dict()
    before = copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)    # of an optimizer without a state, torch steps here again
    assert same(model, before) and equal(control.state_dict(), known)


@pytest.mark.parametrize("name", nw.optim.PRESETS)
@pytest.mark.parametrize("policy", [False, True], ids=["bare", "policy"])
def test_presets_make_their_state_and_move_nothing(name: str, policy: bool) -> None:
    make = nw.optim.PRESETS[name]
    model = net()
    optimizer = make(model, **({"policy": ACTING[:2]} if policy else {}))
    before = copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state and same(model, before) and (not policy or optimizer.control.steps == 0)
    step(model, 0, optimizer)
    twin = copy.deepcopy(before)
    other = make(twin, **({"policy": ACTING[:2]} if policy else {}))
    step(twin, 0, other)
    assert same(model, twin), "the first step is as if nothing had been"
    later = saved(get_optimizer_state_dict(model, optimizer))
    other_net = net(3)
    again = make(other_net, **({"policy": ACTING[:2]} if policy else {}))
    moved = copy.deepcopy(other_net)
    set_optimizer_state_dict(other_net, again, later)
    assert same(other_net, moved)
    other_net.load_state_dict(model.state_dict())
    for seed in range(1, 4):
        step(model, seed, optimizer)
        step(other_net, seed, again)
    assert same(model, other_net)


def test_a_warm_up_from_zero_is_a_step_like_any_other() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, nw.max_norm(0.1))
    step(model, 0, optimizer)
    assert control.steps == 1 and control.verify() and float(model[0].weight.norm(dim=1).max()) <= 0.1


def test_a_users_step_with_no_rate_and_no_gradient_is_the_rules() -> None:
    """To project the weights, say: torch names ``closure=None``, and nobody else does."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, nw.max_norm(0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert control.steps == 1 and float(model[0].weight.norm(dim=1).max()) <= 0.1


class Nesting(SGD):
    """An optimizer over another's step, whose hooks run twice."""

    def step(self, closure: Any = None) -> Any:    # type: ignore[override]
        return super().step(closure)


def test_the_step_that_makes_state_of_an_optimizer_over_another() -> None:
    model = net()
    optimizer = Nesting(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, ACTING)
    before = copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)
    assert same(model, before) and control.steps == 0
    step(model, 0, optimizer)
    assert control.steps == 1


# ---------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["shallow", "deep", "pickle"])
def test_a_copied_control_says_that_it_holds_nothing(copied: Callable[[Any], Any]) -> None:
    model, optimizer, control = trained()
    with pytest.warns(UserWarning, match=r"detached copy of Control.*no rule acts.*twin = nw\.attach\(model_copy") as caught:
        twin = copied(control)
    assert len(caught) == 1 and isinstance(twin, Detached) and not isinstance(twin, nw.Control) and not twin
    assert "no rule acts" in repr(twin) and twin.policy == control.policy
    for ask in (twin.verify, twin.state_dict):
        with pytest.raises(nw.PolicyError, match="no rule acts"):
            ask()
    with pytest.raises(AttributeError, match=r"no rule acts.*It has no norms"):
        twin.norms()
    assert not hasattr(twin, "steps")
    twin.remove()
    twin.report_max_logits("attention", torch.ones(2))
    assert copied(twin) is not None, "a copy of the copy says no more"
    step(model, 4, optimizer)
    assert control.steps == 5 and control.verify(), "the control itself holds on"


def test_a_policy_with_functions_is_left_out_of_a_pickle() -> None:
    _, _, control = made(0, nw.max_norm(lambda step: 1.0))
    with pytest.warns(UserWarning, match="detached"):
        assert pickle.loads(pickle.dumps(control)).policy is None


def test_a_module_that_has_its_control_is_copied_and_saved() -> None:
    model, optimizer, control = trained()
    model.control = control
    with pytest.warns(UserWarning, match="detached"):
        twin, other = copy.deepcopy((model, optimizer))
    with pytest.warns(UserWarning, match="detached"):
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert same(model, twin) and same(model, loaded) and not twin.control and not loaded.control
    for seed in range(4, 6):
        step(model, seed, optimizer)
        step(twin, seed, other)
    assert not same(model, twin), "the copied optimizer has no hooks"
    assert KEY not in str(other.state_dict()["state"]) and other.state_dict()["param_groups"][0][KEY] == []


def test_a_copied_optimizer_takes_no_part_in_the_control_and_may_get_its_own() -> None:
    model, optimizer, control = trained()
    twin, other = copy.deepcopy((model, optimizer))
    known = control.state_dict()
    step(twin, 9, other)
    other.load_state_dict(other.state_dict())
    assert equal(control.state_dict(), known)
    twin.load_state_dict(model.state_dict())
    again = nw.attach(twin, other, control.policy)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert equal(again.state_dict(), known)
    for seed in range(4, 7):
        step(model, seed, optimizer)
        step(twin, seed, other)
    assert same(model, twin)


# ---------------------------------------------------------------------------------------------------------- wrappers


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, model)
        self.inner = [model]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner[0](x)
        return out


DeepSpeedEngine, Float16Module, ModelEmaV3, DataParallel, GradSampleModule = (
    type(name, (Wrapped,), {}) for name in ("DeepSpeedEngine", "Float16Module", "ModelEmaV3", "DataParallel", "GradSampleModule")
)
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fabric": lambda m: Wrapped(m, "_forward_module", "_original_module"),
    "fabric over ddp": lambda m: Wrapped(DataParallel(m, "module"), "_forward_module"),
    "compiled in fabric": lambda m: Wrapped(Wrapped(m, "_orig_mod"), "_forward_module"),
    "average": AveragedModel,
    "deepspeed": lambda m: DeepSpeedEngine(m, "module"),
    "megatron": lambda m: DataParallel(Float16Module(m, "module"), "module"),
    "timm": lambda m: ModelEmaV3(m, "module"),
    "fairscale": lambda m: Wrapped(Wrapped(m, "_fpw_module"), "_fsdp_wrapped_module"),
    "opacus": lambda m: GradSampleModule(m, "_module"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_leave_no_trace_in_names(name: str) -> None:
    plain = net()
    wrapped = WRAPPERS[name](net())
    assert [s.name for s in sites(wrapped)] == [s.name for s in sites(plain)] == [n for n, _ in plain.named_parameters()]
    if name != "opacus":    # whose attribute is no mark by itself
        assert [clean_name(n) for n, _ in wrapped.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("into", [False, True], ids=["out of", "into"])
def test_a_state_goes_into_and_out_of_a_wrapper(name: str, into: bool) -> None:
    def built(seed: int, wrap: bool) -> tuple[nn.Module, nn.Module, Optimizer]:
        inner = net(seed)
        model = WRAPPERS[name](inner) if wrap else inner
        optimizer = AdamW(model.parameters(), lr=0.02)
        nw.attach(model, optimizer, RULES)
        return model.module if name == "average" and wrap else inner, model, optimizer

    whole, model, optimizer = built(0, not into)
    for seed in range(3):
        step(model, seed, optimizer)
    weights, state = saved([whole.state_dict(), optimizer.state_dict()])
    resumed, other, again = built(5, into)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for seed in range(3, 6):
        step(model, seed, optimizer)
        step(other, seed, again)
    assert same(whole, resumed)


def test_names_of_users_own_and_of_peft_are_kept() -> None:
    owner = nn.Module()
    owner.module = owner.base_model = nn.Linear(2, 2)
    assert {s.name for s in sites(owner)} == {"module.weight", "module.bias", "base_model.weight", "base_model.bias"}
    assert clean_name("base_model.model.q.lora_A.default.weight") == "base_model.model.q.lora_A.default.weight"


# ------------------------------------------------------------------------------------------------- what lies by itself


BY_THEMSELVES = [
    nw.max_norm(0.2, params="0.weight", center="init"), nw.decay_to_init(0.1, params="2.*"),
    nw.weight_decay(0.1, params="4.*", rounding="compensated"), nw.unit_norm("init", params="2.weight"),
]  # fmt: skip


def test_centers_and_carries_lie_by_themselves_as_those_of_split_weights_do() -> None:
    model = net().bfloat16()
    optimizer = AdamW(model.parameters(), lr=0.02)
    nw.attach(model, optimizer, BY_THEMSELVES)
    part = optimizer.state_dict()["param_groups"][0][KEY][0]
    shapes = {name: list(t.shape) for name, t in part.items() if isinstance(t, Tensor)}
    assert shapes == {
        "kept_whole_0": [8, 6], "kept_whole_1": [8, 8], "kept_whole_2": [8], "found_whole_3": [3, 8], "found_whole_4": [3],
        "kept_float64": [8],
    }  # fmt: skip


def test_a_state_that_has_them_end_to_end_is_resumed_bit_for_bit() -> None:
    """Version 0.2 and later ones wrote whole weights so; the file is theirs. The control's own state names each tensor, then as now."""
    old = torch.load(Path(__file__).parent / "data" / "rules_before_whole_centers.pt", weights_only=True)
    part = old["optimizer"]["param_groups"][0][KEY][0]
    assert not any("whole" in name for name in part) and part["found_int16"].numel() == 27

    def resumed(in_optimizer_state: bool) -> tuple[nn.Module, nw.Control]:
        model = net(5).bfloat16()
        optimizer = AdamW(model.parameters(), lr=0.02)
        control = nw.attach(model, optimizer, BY_THEMSELVES, in_optimizer_state=in_optimizer_state)
        model.load_state_dict(old["model"])
        optimizer.load_state_dict(copy.deepcopy(old["optimizer"]))
        if not in_optimizer_state:
            control.load_state_dict(old["control"])
        return model, control

    runs = [resumed(True), resumed(False)]
    assert equal(runs[0][1].state_dict(), old["control"])
    for seed in range(3, 6):
        for model, control in runs:
            x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
            [optimizer] = control.optimizers
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
    assert same(runs[0][0], runs[1][0]) and equal(runs[0][1].state_dict(), runs[1][1].state_dict())
