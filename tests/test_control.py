"""The controller: closures, several optimizers, partial ones, state, removal, reports, and bad input that changes nothing."""

from __future__ import annotations

import copy
import gc
import io
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import normwise as nw
from normwise.norms import native

F64 = torch.float64


def mlp(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(seed: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(10, 6, dtype=dtype, generator=gen), torch.randn(10, 3, dtype=dtype, generator=gen)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def train(model: nn.Module, opt: Optimizer, steps: range, after: Callable[[], object] = lambda: None) -> None:
    for seed in steps:
        opt.zero_grad()
        loss_of(model, seed).backward()
        opt.step()
        after()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def hooks(*opts: Optimizer) -> int:
    return sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in opts)


RULES = [nw.l2_penalty(0.1), nw.clip_grad_norm(0.2), nw.weight_decay(0.1), nw.l1_prox(0.01), nw.max_norm(0.6)]


# ------------------------------------------------------------------------------------------------------------ closures


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("make", [lambda ps: SGD(ps, lr=0.1, momentum=0.9), lambda ps: AdamW(ps, lr=0.01)])
def test_a_closure_gives_what_the_plain_loop_gives(make, as_keyword):
    """The closure holds zero_grad, forward and backward, as Lightning's does: the rules must see its gradients."""
    model = mlp()
    twin = copy.deepcopy(model)
    opt, plain = make(model.parameters()), make(twin.parameters())
    nw.attach(model, opt, RULES)
    nw.attach(twin, plain, RULES)
    train(twin, plain, range(5))
    for seed in range(5):

        def closure(seed: int = seed) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        returned = opt.step(closure=closure) if as_keyword else opt.step(closure)
        assert torch.is_tensor(returned)
    assert same(model, twin)


class Recorder:
    """A closure that counts itself and keeps the gradient that it computed."""

    def __init__(self, model: nn.Module, opt: Optimizer) -> None:
        self.model, self.opt, self.calls = model, opt, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        self.opt.zero_grad()
        loss = loss_of(self.model, 0)
        loss.backward()
        return loss


def test_lbfgs_sees_the_penalised_gradient_at_every_evaluation():
    """Equal, step by step, to LBFGS on the penalised loss written out."""
    model = mlp()
    twin = copy.deepcopy(model)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=4)
    plain = torch.optim.LBFGS(twin.parameters(), max_iter=4)
    nw.attach(model, opt, nw.l2_penalty(0.1, "role:all"))
    closure = Recorder(model, opt)

    def penalised() -> Tensor:
        plain.zero_grad()
        loss = loss_of(twin, 0) + 0.05 * sum(p.square().sum() for p in twin.parameters())
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        plain.step(penalised)
    assert closure.calls > 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_lbfgs_with_a_line_search_ends_each_step_within_the_ball():
    model = mlp()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn="strong_wolfe")
    control = nw.attach(model, opt, [nw.max_norm(0.5), nw.weight_decay(0.1)])
    closure = Recorder(model, opt)
    losses = [float(opt.step(closure)) for _ in range(4)]
    assert closure.calls > 4
    assert control.steps == 4
    assert control.verify().ok
    assert losses[-1] < losses[0]


class Thrice(SGD):
    """Evaluates its closure three times a step, as a line search does."""

    def step(self, closure):
        for _ in range(2):
            closure()
        return super().step(closure)


def test_penalties_act_at_every_evaluation_and_decay_once_a_step():
    model = mlp()
    opt = Thrice(model.parameters(), lr=0.1)
    nw.attach(model, opt, [nw.weight_decay(0.5, "role:all"), nw.l2_penalty(0.3, "role:all")])
    before = snapshot(model)
    closure = Recorder(model, opt)
    gradients = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    decayed = copy.deepcopy(model)
    with torch.no_grad():
        for p in decayed.parameters():
            p.mul_(1 - 0.1 * 0.5)
    at_decayed = torch.autograd.grad(loss_of(decayed, 0), list(decayed.parameters()))
    opt.step(closure)
    assert closure.calls == 3
    for (n, p), g, after in zip(model.named_parameters(), gradients, at_decayed, strict=True):
        w = before[n] * 0.95  # decayed once, after the first evaluation; the last one sees the decayed weights
        torch.testing.assert_close(p.detach(), w - 0.1 * (after + 0.3 * w), rtol=1e-12, atol=1e-14)
        assert not torch.allclose(g, after)


class OnTop(SGD):
    """An optimizer that adds something to another's step; torch then calls the hooks for both of the two classes."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.1)
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_its_base_classs_step_is_one_step(with_closure):
    model = mlp()
    twin = copy.deepcopy(model)
    opt, plain = OnTop(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.l2_penalty(0.3, "role:all"), nw.weight_decay(0.5, "role:all"), nw.max_norm(0.7)])
    for _ in range(3):
        if with_closure:
            opt.step(Recorder(model, opt))
        else:
            train(model, opt, range(1))
        plain.zero_grad()
        loss_of(twin, 0).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p.grad.add_(p, alpha=0.3)
                p.mul_(1 - 0.1 * 0.5)
            plain.step()
            for p in twin.parameters():
                p.add_(0.1)
                if p.ndim > 1:
                    p.mul_((0.7 / p.norm(dim=1, keepdim=True)).clamp(max=1))
    assert control.steps == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_the_closures_own_error_leaves_the_control_usable():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, RULES)

    def broken() -> Tensor:
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        opt.step(broken)
    assert control.steps == 0
    train(model, opt, range(2))
    assert control.steps == 2
    assert control.verify()


# -------------------------------------------------------------------------------------------- accumulation, parts


def test_accumulated_gradients_are_clipped_once_as_a_whole():
    """Not clip(clip(g1) + g2): two micro-batches equal one batch of both."""
    model = mlp()
    twin = copy.deepcopy(model)
    opt, plain = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    nw.attach(model, opt, [nw.clip_grad_norm(0.05), nw.l2_penalty(0.3)])
    for step in range(3):
        opt.zero_grad()
        plain.zero_grad()
        for micro in range(2):
            (loss_of(model, 2 * step + micro) / 2).backward()
        (sum(loss_of(twin, 2 * step + k) / 2 for k in range(2)) + 0.15 * weights_squared(twin)).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        opt.step()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-7)


def weights_squared(model: nn.Module) -> Tensor:
    return sum(p.square().sum() for p in model.parameters() if p.ndim > 1)


def test_an_optimizer_over_a_part_of_the_model():
    model = mlp()
    before = snapshot(model)
    opt = SGD(model[0].parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.max_norm(0.3), nw.clip_grad_norm(0.1)])
    train(model, opt, range(1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not n.startswith("0."))
    assert model[0].weight.norm(dim=1).max() <= 0.3
    assert set(control.norms().parameter["weight"]) == {"0.weight", "0.bias"}
    own = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    assert float(own.norm()) == pytest.approx(0.1, rel=1e-12)


def test_a_parameter_that_no_optimizer_holds_is_an_error():
    model = mlp()
    opt = SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match=r"2\.weight.*no given optimizer holds"):
        nw.attach(model, opt, nw.max_norm(1.0, params="*.weight"))
    assert hooks(opt) == 0


def test_tied_weights_are_handled_once():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 7, bias=False)}).double()
    model["out"].weight = model["embed"].weight
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.l2_penalty(0.5), nw.weight_decay(1.0), nw.clip_grad_norm(1e9)])
    weight = model["embed"].weight
    start = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    assert control.penalty() == pytest.approx(0.25 * float(start.square().sum()), rel=1e-12)
    opt.step()
    expected = start * (1 - 0.1 * 1.0) - 0.1 * (1 + 0.5 * start)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=0)


def test_a_parameter_without_gradient_takes_no_step():
    """No penalty, decay or prox moves it; a bound on weights still holds there."""
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.l2_penalty(0.1), nw.weight_decay(0.5), nw.l1_prox(0.5)])
    for p in list(model.parameters())[2:]:
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    opt.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])
    control.remove()
    control = nw.attach(model, opt, nw.max_norm(0.1))
    opt.step()
    assert model[0].weight.norm(dim=1).max() <= 0.1
    assert control.verify()


def test_frozen_parameters_are_left_alone_and_only_frozen_ones_are_an_error():
    model = mlp()
    model[0].requires_grad_(False)
    before = snapshot(model)
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, [nw.max_norm(0.1), nw.weight_decay(0.5)])
    train(model, opt, range(2))
    assert torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(nw.PolicyError, match="frozen"):
        nw.attach(model, opt, nw.max_norm(0.1, params="0.weight"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rule", [nw.max_norm(0.5), nw.clip_weight_value(0.1), nw.l1_prox(0.1), nw.clip_weight_norm(0.5), nw.l1_ball(1.0)])
def test_empty_parameters(rule):
    model = nn.ModuleDict({"none": nn.Linear(0, 3), "no_units": nn.Linear(3, 0), "some": nn.Linear(3, 3)}).double()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [rule, nw.clip_grad_norm(1.0)])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert control.verify().ok is (rule.action != "prox"), "a prox bounds nothing, so that nothing was checked"
    assert control.norms().parameter["weight"]["none.weight"] == 0.0


# ---------------------------------------------------------------------------------------------------- several optimizers


def halves(model: nn.Module, make: Callable[..., Optimizer] = SGD) -> list[Optimizer]:
    params = list(model.parameters())
    return [make(params[:2], lr=0.1), make(params[2:], lr=0.05)]


def clipped_twin(twin: nn.Module, max_norm: float) -> float:
    """torch's own clipping, with its 1e-6 taken out of the threshold's effect by float64 arithmetic of our own."""
    total = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
    for p in twin.parameters():
        if p.grad is not None:
            p.grad.mul_(min(1.0, max_norm / float(total)))
    return float(total)


def test_a_norm_over_optimizers_that_step_within_backward_is_refused():
    """There the gradients of the other optimizers are not there yet. A norm of each tensor by itself is known, and is torch's."""
    for per, refused in (("global", True), ("tensor", False)):
        model = mlp()
        params = list(model.parameters())
        optimizers = {p: SGD([p], lr=0.1) for p in params}
        nw.attach(model, list(optimizers.values()), nw.clip_grad_norm(0.01, per=per))
        before, norms = [p.detach().clone() for p in params], []

        def step(p, optimizers=optimizers, norms=norms):
            optimizers[p].step()
            norms.append(float(p.grad.norm()))
            p.grad = None

        for p in params:
            p.register_post_accumulate_grad_hook(step)
        loss = model(torch.randn(4, params[0].shape[1], dtype=params[0].dtype)).square().sum()
        if refused:
            with pytest.raises(nw.PolicyError, match="not known before the backward pass ends"):
                loss.backward()
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        else:
            loss.backward()
            assert len(norms) == len(params) and max(norms) <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("make", [SGD, AdamW])
def test_one_global_norm_over_two_optimizers(order, make):
    """Whichever steps first, both see gradients clipped by the norm of all: torch's over all parameters."""
    model = mlp()
    twin = copy.deepcopy(model)
    ours, plain = halves(model, make), halves(twin, make)
    nw.attach(model, ours, [nw.clip_grad_norm(0.05), nw.l2_penalty(0.1, "role:all")])
    for seed in range(4):
        for opts, m in ((ours, model), (plain, twin)):
            for o in opts:
                o.zero_grad()
            loss_of(m, seed).backward()
        for p in twin.parameters():
            p.grad.add_(p.detach(), alpha=0.1)
        assert clipped_twin(twin, 0.05) > 0.05
        for k in order:
            ours[k].step()
            plain[k].step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_global_norm_is_torchs():
    model = mlp()
    opts = halves(model)
    nw.attach(model, opts, nw.clip_grad_norm(0.01))
    loss_of(model, 0).backward()
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    opts[0].step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=0)


def test_only_one_of_two_optimizers_steps():
    """Every step of it is a round of its own: all gradients are measured again."""
    model = mlp()
    opts = halves(model)
    nw.attach(model, opts, nw.clip_grad_norm(0.05))
    for seed in range(3):
        for o in opts:
            o.zero_grad()
        loss_of(model, seed).backward()
        opts[0].step()
        total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert float(total) == pytest.approx(0.05, rel=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_computed_between_two_steps_are_clipped_too(set_to_none):
    """As a GAN's are: backward, step of the one, another backward, step of the other, and the one steps more often."""
    model = mlp()
    opts = halves(model)
    nw.attach(model, opts, nw.clip_grad_norm(0.05))
    for round_ in range(3):
        for turn, k in enumerate((0, 0, 1)):
            for o in opts:
                o.zero_grad(set_to_none=set_to_none)
            (10 * loss_of(model, 3 * round_ + turn)).backward()
            before = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            opts[k].step()
            total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            assert float(before) > 0.05
            assert float(total) == pytest.approx(0.05, rel=1e-12), f"round {round_}, turn {turn}"


def test_the_penalty_is_added_once_in_a_round_of_two_optimizers():
    model = mlp()
    opts = halves(model)
    nw.attach(model, opts, [nw.l2_penalty(1.0, "role:all"), nw.clip_grad_norm(1e9)])
    weights = snapshot(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opts[0].step()
    opts[1].step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[n], rtol=1e-14, atol=0)


def test_rules_of_one_optimizer_do_not_wait_for_the_other():
    """Separate blocks, uneven steps: verify() judges each weight by its own optimizer's last step."""
    model = mlp()
    opts = halves(model)
    control = nw.attach(model, opts, [nw.unit_norm(nw.schedules.linear(1.0, 0.5, 4)),
        nw.clip_weight_value(0.9, params="role:bias", every=2)])
    loss_of(model, 0).backward()
    for k in (0, 0, 1, 0):
        opts[k].step()
        assert control.verify(), str(control.verify())
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.full((8,), 0.75, dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(model[2].weight.norm(dim=1), torch.full((5,), 1.0, dtype=F64), rtol=1e-12, atol=0)
    assert control.steps == 3


def test_violations_are_counted_over_all_optimizers():
    model = mlp()
    opts = halves(model)
    control = nw.attach(model, opts, [nw.max_norm(1e-3), nw.clip_grad_norm(1e-3)])
    loss_of(model, 0).backward()
    opts[0].step()
    opts[1].step()
    assert control.violations() == {"1: clip_norm l2/unit <= 0.001": 8 + 5 + 3, "2: clip_norm grad l2/global <= 0.001": 1}


def test_the_same_optimizer_twice_or_a_parameter_in_two_is_an_error():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match="twice"):
        nw.attach(model, [opt, opt], nw.max_norm(1.0))
    other = SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match=r"'0\.weight'.*two of the given optimizers"):
        nw.attach(model, [opt, other], nw.max_norm(1.0))
    assert hooks(opt, other) == 0


def test_optimizers_may_come_as_any_iterable():
    model = mlp()
    opts = halves(model)
    control = nw.attach(model, (o for o in opts), nw.max_norm(1.0))
    assert control.optimizers == opts


# ------------------------------------------------------------------------------------------------- wrappers and copies


class DistributedDataParallel(nn.Module):
    """Looks like torch's: the model is its ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("wrap", [torch.compile, DistributedDataParallel, lambda m: DistributedDataParallel(torch.compile(m))])
def test_names_are_those_of_the_model_without_its_wrappers(wrap):
    model = mlp()
    wrapped = wrap(model)
    opt = SGD(wrapped.parameters(), lr=0.1)
    control = nw.attach(wrapped, opt, nw.max_norm(0.1, params="2.weight"))
    train(model, opt, range(1))
    assert model[2].weight.norm(dim=1).max() <= 0.1
    assert model[0].weight.norm(dim=1).max() > 0.1
    assert set(control.norms().parameter["weight"]) == set(snapshot(model))


def test_the_models_state_dict_keys_and_class_do_not_change():
    model = mlp()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, [*RULES, nw.decay_to_init(0.1)])
    train(model, opt, range(2))
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_deep_copy_of_the_model_trains_without_the_control():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, nw.max_norm(0.1))
    twin = copy.deepcopy(model)
    train(model, opt, range(1))
    train(twin, SGD(twin.parameters(), lr=0.1), range(1))
    assert model[0].weight.norm(dim=1).max() <= 0.1 < twin[0].weight.norm(dim=1).max()


# -------------------------------------------------------------------------------------------------------------- state

STATEFUL = [
    nw.unit_norm("init", params="0.weight"),
    nw.max_norm(0.2, params="2.weight", center="init"),
    nw.decay_to_init(0.3, params="4.weight"),
    nw.l2_penalty(nw.schedules.linear(0.0, 1.0, 8)),
    nw.clip_weight_value(0.3, params="role:bias", every=3),
]


def saved_and_loaded(state: object) -> object:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_resumed_run_continues_bit_for_bit():
    """Saved after 4 of 9 steps, loaded into a control that was attached to other weights."""
    model = mlp()
    opt = AdamW(model.parameters(), lr=0.05)
    control = nw.attach(model, opt, STATEFUL)
    train(model, opt, range(4))
    saved = saved_and_loaded({"model": model.state_dict(), "opt": opt.state_dict(), "control": control.state_dict()})
    train(model, opt, range(4, 9))

    resumed = mlp(seed=7)
    again = AdamW(resumed.parameters(), lr=0.05)
    other = nw.attach(resumed, again, STATEFUL)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    other.load_state_dict(saved["control"])
    assert other.steps == 4
    train(resumed, again, range(4, 9))
    assert same(model, resumed)
    assert other.verify().ok == control.verify().ok is True
    assert control.state_dict()["steps"] == other.state_dict()["steps"] == [9]


def foreign_states() -> Iterator[tuple[str, object]]:
    model = mlp()
    good = nw.attach(model, SGD(model.parameters(), lr=0.1), STATEFUL).state_dict()
    yield "rules that are none", {**good, "rules": [*good["rules"][:-1], {"radius": {}, "center": {}, "found": {}}]}
    yield "other optimizers", {**good, "steps": [1, 2]}
    yield "no steps", {k: v for k, v in good.items() if k != "steps"}
    yield "no rules", {"version": 1, "steps": [0]}
    yield "another version", {**good, "version": 2}
    yield "not a state", None
    yield "an optimizer's", SGD(model.parameters(), lr=0.1).state_dict()
    for what, name in (("radius", "0.weight"), ("center", "2.weight")):
        rules = copy.deepcopy(good["rules"])
        found = next(r for r in rules if name in r[what])
        del found[what][name]
        yield f"no {what}", {**good, "rules": rules}
        rules = copy.deepcopy(good["rules"])
        next(r for r in rules if name in r[what])[what][name] = torch.zeros(2, 2)
        yield f"another {what}", {**good, "rules": rules}


@pytest.mark.parametrize("what", [what for what, _ in foreign_states()])
def test_a_foreign_state_is_refused_with_nothing_changed(what):
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, STATEFUL)
    train(model, opt, range(2))
    before, kept = snapshot(model), copy.deepcopy(control.state_dict())
    with pytest.raises(nw.PolicyError, match="the state"):
        control.load_state_dict(dict(foreign_states())[what])
    assert str(control.state_dict()) == str(kept)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_rule_on_another_selection_has_another_state():
    """Two rules that look alike in a table but stand on different parameters are not each other's."""
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    state = nw.attach(model, opt, nw.decay_to_init(0.1, params="0.weight")).state_dict()
    with pytest.raises(nw.PolicyError, match=r"center for '2\.weight'"):
        nw.attach(model, opt, nw.decay_to_init(0.1, params="2.weight")).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------- attach, remove


def test_remove_and_the_context_manager_detach():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    with nw.attach(model, opt, nw.max_norm(0.1)) as control:
        assert hooks(opt) == 2
        train(model, opt, range(1))
    assert hooks(opt) == 0
    before = snapshot(model)
    train(model, opt, range(1, 3))
    assert model[0].weight.norm(dim=1).max() > 0.1
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    control.remove()
    assert hooks(opt) == 0


def test_two_controls_on_one_optimizer_act_in_turn():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    outer, inner = nw.attach(model, opt, nw.clip_weight_value(0.2)), nw.attach(model, opt, nw.max_norm(0.3))
    train(model, opt, range(2))
    assert outer.verify()
    assert inner.verify()


BAD: dict[str, Callable[[], object]] = {
    "pattern": lambda: nw.max_norm(1.0, params="nothing*"),
    "spectral on a bias": lambda: nw.spectral_cap(1.0, params="0.bias"),
    "contradiction": lambda: [nw.unit_norm(2.0), nw.max_norm(1.0)],
    "init on zero": lambda: nw.unit_norm("init", params="zero.weight"),
    "two spheres": lambda: [nw.unit_norm(1.0), nw.unit_norm(2.0)],
    "no such block": lambda: nw.max_norm(1.0, per="head"),
    "center of another model": lambda: nw.max_norm(1.0, center={"other": torch.zeros(2)}),
    "center of another shape": lambda: nw.max_norm(1.0, params="0.weight", center={"0.weight": torch.zeros(2)}),
    "a later rule is bad": lambda: [nw.max_norm(1.0), nw.unit_norm(params="nothing")],
    "not a rule": lambda: [nw.max_norm(1.0), 3],
}
SAYS = {
    "pattern": r"'nothing\*' matches no parameter.*0\.weight",
    "spectral on a bias": "bias",
    "contradiction": "contradict",
    "init on zero": "zero when attached",
    "two spheres": "contradict",
    "no such block": "head",
    "center of another model": "no weights for",
    "center of another shape": "shape",
    "a later rule is bad": "nothing",
    "not a rule": "given 3",
}


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_gets_one_clear_error_and_changes_nothing(what):
    model = mlp()
    model.add_module("zero", nn.Linear(3, 3).double())
    nn.init.zeros_(model.zero.weight)
    before = snapshot(model)
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(nw.NormwiseError, match=SAYS[what]):
        nw.attach(model, opt, BAD[what]())
    assert hooks(opt) == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nw.max_norm(-1.0), "radius"),
        (lambda: nw.max_norm(0.0), "radius"),
        (lambda: nw.max_norm(float("nan")), "radius"),
        (lambda: nw.Rule(action="clip_norm", norm="spectrl", radius=1.0), "Did you mean 'spectral'"),
        (lambda: nw.Rule(action="clip_norn", radius=1.0), "Did you mean 'clip_norm'"),
        (lambda: nw.Rule(action="clip_norm", radus=1.0), "Did you mean 'radius'"),
        (lambda: nw.Rule(action="penalty", on="grad", strength=1.0), "no meaning"),
        (lambda: nw.Rule(action="lmo", on="weight"), "no meaning"),
    ],
)
def test_a_rule_that_cannot_mean_anything(make, says):
    with pytest.raises(nw.PolicyError, match=says):
        make()


@pytest.mark.parametrize("given", [[], object(), [object()], "adam", None])
def test_what_is_no_optimizer(given):
    with pytest.raises(nw.PolicyError, match="optimizer"):
        nw.attach(mlp(), given, nw.max_norm(1.0))


def test_an_unknown_word_for_nonfinite_gradients():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match="Did you mean 'raise'"):
        nw.attach(model, opt, nw.max_norm(1.0), on_nonfinite="rais")
    assert hooks(opt) == 0


def test_rules_on_updates_refuse_optimizers_that_own_their_iterates():
    model = mlp()
    opt = torch.optim.LBFGS(model.parameters())
    with pytest.raises(nw.PolicyError, match="LBFGS"):
        nw.attach(model, opt, nw.Rule(action="normalize", on="update", radius=0.1))
    assert hooks(opt) == 0


class TwoSequences(SGD):
    """As a schedule-free optimizer: it has other weights to evaluate than to train."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


RULES_ON_WEIGHTS = [nw.max_norm(1.0), nw.l1_prox(0.1), nw.weight_decay(0.1), nw.cpr(), nw.Rule(action="normalize", on="update", radius=0.1)]


@pytest.mark.parametrize("rule", RULES_ON_WEIGHTS, ids=str)
def test_rules_on_weights_refuse_optimizers_that_evaluate_others(rule):
    model = mlp()
    opt = TwoSequences(model.parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match="not those that you evaluate and save"):
        nw.attach(model, opt, rule)
    assert hooks(opt) == 0
    nw.attach(model, opt, [nw.l2_penalty(0.1), nw.clip_grad_norm(1.0)])


def test_the_weights_that_schedule_free_evaluates_are_never_promised_a_bound():
    schedulefree = pytest.importorskip("schedulefree")
    model = mlp()
    with pytest.raises(nw.PolicyError, match="AdamWScheduleFree trains with"):
        nw.attach(model, schedulefree.AdamWScheduleFree(model.parameters()), nw.max_norm(1.0))


def test_an_optimizer_in_a_wrapper_is_found():
    """Accelerate's has no hook registries, and keeps the real one in ``.optimizer``."""

    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, Wrapper(opt), nw.max_norm(0.1))
    train(model, opt, range(1))
    assert model[0].weight.norm(dim=1).max() <= 0.1


# ------------------------------------------------------------------------------------------------------------- reports


def test_norms_in_total_per_role_and_per_parameter_before_and_after():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, [nw.clip_grad_norm(0.05), nw.max_norm(0.3)], log=True)
    before = snapshot(model)
    opt.zero_grad()
    loss_of(model, 0).backward()
    raw = {n: p.grad.clone() for n, p in model.named_parameters()}
    opt.step()
    report = control.norms()
    expected = {
        "weight": {n: p.detach() for n, p in model.named_parameters()},
        "weight_before": before,
        "grad": {n: p.grad for n, p in model.named_parameters()},
        "grad_before": raw,
        "update": {n: p.detach() - before[n] for n, p in model.named_parameters()},
    }
    assert set(report.total) == set(expected)
    for kind, tensors in expected.items():
        assert report.parameter[kind] == pytest.approx({n: float(t.norm()) for n, t in tensors.items()}, rel=1e-12)
        everything = torch.cat([t.flatten() for t in tensors.values()])
        assert report.total[kind] == pytest.approx(float(everything.norm()), rel=1e-12)
        roles = {"hidden": ["0.weight", "2.weight"], "head": ["4.weight"], "bias": ["0.bias", "2.bias", "4.bias"]}
        by_hand = {r: float(torch.cat([tensors[n].flatten() for n in ns]).norm()) for r, ns in roles.items()}
        assert report.role[kind] == pytest.approx(by_hand, rel=1e-12)
    assert report.total["grad"] == pytest.approx(0.05, rel=1e-12)
    assert report.flat()["norm/weight/head"] == report.role["weight"]["head"]


def test_the_log_spans_the_whole_step_of_an_optimizer_with_many_evaluations():
    model = mlp()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=5)
    control = nw.attach(model, opt, nw.max_norm(5.0), log=True)
    before = snapshot(model)
    opt.step(Recorder(model, opt))
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
    assert control.norms().total["update"] == pytest.approx(float(moved.norm()), rel=1e-12)


def test_the_penaltys_value_is_that_of_the_rules_at_work_now():
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    rules = [nw.l1_penalty(0.1, start=2), nw.l2_penalty(nw.schedules.linear(1.0, 0.0, 4), stop=3), nw.group_lasso(0.2)]
    control = nw.attach(model, opt, rules)
    for step in range(5):
        weights = [p.detach() for p in model.parameters() if p.ndim > 1]
        l1 = 0.1 * sum(w.abs().sum() for w in weights) if step >= 2 else 0.0
        l2 = (1 - step / 4) / 2 * sum(w.square().sum() for w in weights) if step < 3 else 0.0
        groups = 0.2 * sum(w.norm(dim=1).sum() for w in weights)
        assert control.penalty() == pytest.approx(float(l1 + l2 + groups), rel=1e-12)
        train(model, opt, range(step, step + 1))


def test_zero_units_under_a_sphere_are_left_and_counted():
    model = mlp()
    with torch.no_grad():
        model[0].weight[:3] = 0
    opt = SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, opt, nw.unit_norm())
    train(model, opt, range(1))
    result = control.verify()
    assert torch.equal(model[0].weight[:3], torch.zeros(3, 6, dtype=F64))
    assert result.ok
    assert result.zeros == 3
    assert "3 blocks are zero" in str(result)


def test_seconds_are_added_up_only_when_asked_for():
    for timed in (False, True):
        model = mlp()
        opt = SGD(model.parameters(), lr=0.1)
        control = nw.attach(model, opt, nw.max_norm(0.1), timed=timed)
        train(model, opt, range(2))
        assert (control.seconds > 0) is timed


@pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
def test_compiling_the_kernels_is_no_step_s_time(monkeypatch):
    build = native._built

    def slow(*args):
        time.sleep(0.5)
        return build(*args)

    monkeypatch.setattr(native, "_built", slow)
    native.library.cache_clear()    # as in a process of a new machine
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, nw.max_norm(0.1), timed=True)
    train(model, opt, range(2))
    assert 0 < control.seconds < 0.4


def test_a_scripted_model_trains_under_a_control_and_under_our_optimizers():
    """As the same model that is not scripted."""
    runs = []
    for scripted in (False, True):
        for build in (lambda model: SGD(model.parameters(), lr=0.1), lambda model: nw.optim.AdamW(model, lr=0.1)):
            model = mlp()
            if scripted:
                model = torch.jit.script(model)
            opt = build(model)
            nw.attach(model, opt, [nw.clip_grad_norm(0.1), nw.clip_grad_value(0.05)])
            train(model, opt, range(3))
            runs.append([p.detach().clone() for p in model.parameters()])
    for plain, other in zip(runs[:2], runs[2:], strict=True):
        assert all(map(torch.allclose, plain, other))


# -------------------------------------------------------------------------------------------------------------- memory


def held_tensors(root: object, stop: set[int]) -> list[Tensor]:
    """Every tensor that can be reached from ``root`` without passing through what is in ``stop``."""
    seen, stack, found = set(stop), [root], []
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ in ("module", "function", "builtin_function_or_method"):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
            continue
        stack.extend(gc.get_referents(thing))
    return found


@pytest.mark.parametrize(
    ("rules", "copies"),
    [([nw.max_norm(0.3), nw.clip_grad_norm(0.1), nw.l1_prox(0.01), nw.weight_decay(0.1)], 0), ([nw.decay_to_init(0.1)], 1)],
)
def test_no_persistent_copy_of_the_weights_without_a_center(rules, copies):
    """Counts the numbers in all tensors that the control keeps after a step and that are not the model's own."""
    model = nn.Linear(200, 300)
    opt = Adam(model.parameters(), lr=0.01)
    control = nw.attach(model, opt, rules)
    model(torch.randn(4, 200)).square().sum().backward()
    opt.step()
    own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in (p, p.grad)}
    stop = {id(model), id(opt), id(opt.state), id(opt.param_groups)}
    kept = [t for t in held_tensors(control, stop) if t.untyped_storage().data_ptr() not in own]
    numbers = sum(t.untyped_storage().nbytes() for t in kept) / 4
    assert copies * 60_000 <= numbers < copies * 60_000 + 2_000
