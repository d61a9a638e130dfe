"""Every preset is a real ``torch.optim.Optimizer``: what loops, schedulers, scalers and checkpoints do to one works, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import normwise as nw
from normwise.optim import DEFAULTS, PRESETS, SGD, AdamH, AdamW, Muon, MuonH, NormalizedSGD, NormOptimizer, Scion

F64 = torch.float64
Build = Callable[..., NormOptimizer]
LIVELY = {"NormalizedSGD": 0.03, "LARS": 0.3, "SGD": 0.3, "AdamW": 0.01, "Scion": 2.0**-12, "Signum": 3e-3, "Lion": 3e-3}
"""Rates that move a small model in a few steps, where the default is made for long runs."""
every_preset = pytest.mark.parametrize("preset", list(PRESETS.values()), ids=list(PRESETS))


class Model(nn.Module):
    """An embedding, a convolution, a normalisation, hidden matrices, a head; vectors, matrices and a four-dimensional weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.conv = nn.Conv1d(6, 8, 2)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.conv(self.embed(tokens).mT).mean(2))
        out: Tensor = self.head(h + self.down(self.up(h).tanh()))
        return out


def model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def loss_of(net: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(5, (7, 4), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(tokens).float(), tokens[:, 0])


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], object] = lambda: None) -> None:
    for seed in steps:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
        after()


@torch.no_grad()
def total_loss(net: nn.Module) -> float:
    return sum(float(loss_of(net, seed)) for seed in range(20))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def moved(net: nn.Module) -> list[str]:
    before = dict(model(next(net.parameters()).dtype).named_parameters())
    return [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]


# ---------------------------------------------------------------------------------------------------------- the loop


@every_preset
def test_every_parameter_moves_and_gradients_are_never_written(preset: Build) -> None:
    net = model()
    optimizer = preset(net)
    loss_of(net, 0).backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    pointers = {n: p.grad.data_ptr() for n, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    assert moved(net) == [name for name, _ in net.named_parameters()]
    for name, p in net.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, grads[name]) and p.grad.data_ptr() == pointers[name], name


@every_preset
def test_training_lowers_the_loss(preset: Build) -> None:
    net = model()
    before = total_loss(net)
    if preset is PRESETS["LARS"]:
        optimizer = preset(net, lr=0.05, trust=0.1)
    else:
        optimizer = preset(net, lr=LIVELY.get(preset.__name__, 0.01))
    train(net, optimizer, range(60))
    assert total_loss(net) < 0.97 * before


@every_preset
def test_a_closure_is_called_once_with_gradients_on(preset: Build) -> None:
    plain, closed = model(), model()
    train(plain, preset(plain), range(3))
    optimizer, calls = preset(closed), []
    for seed in range(3):

        def closure(seed: int = seed) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(closed, seed)
            loss.backward()
            calls.append(seed)
            return loss

        assert optimizer.step(closure) is not None    # type: ignore[arg-type]
    assert calls == [0, 1, 2] and equal(plain, closed)


@every_preset
def test_parameters_without_gradients_stay_and_the_others_step_as_alone(preset: Build) -> None:
    net, whole = model(), model()
    optimizer, reference = preset(net), preset(whole)
    for seed, absent in enumerate([["up.weight", "norm.bias"], [], ["conv.weight"], ["up.weight"]]):
        for m, o in ((net, optimizer), (whole, reference)):
            o.zero_grad()
            loss_of(m, seed).backward()
        held = {n: p.detach().clone() for n, p in net.named_parameters() if n in absent}
        for n, p in net.named_parameters():
            p.grad = None if n in absent else whole.get_parameter(n).grad.clone()    # type: ignore[union-attr]
        optimizer.step()
        reference.step()
        assert all(torch.equal(net.get_parameter(n), w) for n, w in held.items())
        if seed == 0:
            assert all(torch.equal(p, whole.get_parameter(n)) for n, p in net.named_parameters() if n not in absent)
    for p in net.parameters():
        p.grad = None
    now = copy.deepcopy(net)
    optimizer.step()
    assert equal(net, now)


@every_preset
def test_step_hooks_run_around_the_step(preset: Build) -> None:
    net, seen = model(), []
    optimizer = preset(net)
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", moved(net) == [])))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", moved(net) != [])))
    train(net, optimizer, range(1))
    assert seen == [("before", True), ("after", True)]


@every_preset
def test_mixed_dtypes_take_the_steps_that_each_dtype_takes(preset: Build) -> None:
    def parts() -> list[nn.Parameter]:
        gen = torch.Generator().manual_seed(5)
        return [nn.Parameter(torch.randn(4, 4, generator=gen).to(d)) for d in (torch.float32, torch.bfloat16, F64, torch.float32)]

    mixed, alone, lr = parts(), parts(), LIVELY.get(preset.__name__, 0.01)
    optimizer, others = preset(mixed, lr=lr), [preset([p], lr=lr) for p in alone]
    for seed in range(3):
        for p, q in zip(mixed, alone, strict=True):
            g = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        for other in others:
            other.step()
    for p, q, start in zip(mixed, alone, parts(), strict=True):
        assert p.isfinite().all() and not torch.equal(p, start)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@every_preset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train(preset: Build, dtype: torch.dtype) -> None:
    net = model(dtype)
    train(net, preset(net, lr=LIVELY.get(preset.__name__, 0.01)), range(3))
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(p.dtype == dtype for p in net.parameters())
    assert len(moved(net)) >= 8


def test_empty_parameters_and_empty_groups_are_fine() -> None:
    p, nothing = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(0, 3))
    for preset in PRESETS.values():
        optimizer = preset([p, nothing])
        optimizer.add_param_group({"params": []})
        p.grad, nothing.grad = torch.ones(2, 2), torch.ones(0, 3)
        optimizer.step()
        assert p.isfinite().all()
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])


@every_preset
def test_channels_last_and_transposed_weights(preset: Build) -> None:
    def nets(changed: bool) -> nn.Sequential:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 6)).double()
        if changed:
            net = net.to(memory_format=torch.channels_last)
            net[3].weight.data = net[3].weight.data.t().contiguous().t()
        return net

    plain, other = nets(False), nets(True)
    for net, optimizer in [(plain, preset(plain, lr=0.01)), (other, preset(other, lr=0.01))]:
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 5, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))
            net(x).square().mean().backward()
            optimizer.step()
    assert other[1].weight.is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------- learning rates

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda e: 1 / (1 + e)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda e: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    kinds = {n for n, c in vars(schedulers).items() if isinstance(c, type) and issubclass(c, schedulers.LRScheduler) and n[0] != "_"}
    assert kinds - {"LRScheduler"} <= set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_under_every_scheduler_the_steps_are_torchs(name: str, kind: str) -> None:
    """Momentum and betas cycle too, where the scheduler cycles them."""
    ours, theirs = model(F64), model(F64)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    a, b = PRESETS[kind](ours, lr=0.05, **options), getattr(torch.optim, kind)(theirs.parameters(), lr=0.05, **options)
    plans = [SCHEDULES[name](a), SCHEDULES[name](b)]
    for seed in range(6):
        for net, optimizer, plan in ((ours, a, plans[0]), (theirs, b, plans[1])):
            train(net, optimizer, range(seed, seed + 1))
            plan.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] != 0.05 or name in ("ConstantLR", "CosineAnnealingWarmRestarts")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@every_preset
def test_under_a_scheduler_each_groups_rate_is_what_is_used(preset: Build) -> None:
    scheduled, by_hand = model(), model()
    a, b = preset(scheduled), preset(by_hand)
    plan = schedulers.ExponentialLR(a, 0.5)
    for seed in range(4):
        train(scheduled, a, range(seed, seed + 1), after=plan.step)
        train(by_hand, b, range(seed, seed + 1))
        for group in b.param_groups:
            group["lr"] *= 0.5
    assert equal(scheduled, by_hand)


def test_schedulers_cycle_the_momentum_that_is_in_use() -> None:
    muon, lion, sgd = Muon(model()), PRESETS["Lion"](model()), SGD(model())
    schedulers.OneCycleLR(muon, 0.1, total_steps=5)
    assert muon.param_groups[0]["momentum"] == 0.95 and muon.param_groups[0]["max_momentum"] == 0.95
    schedulers.OneCycleLR(lion, 0.1, total_steps=5)
    assert lion.param_groups[0]["betas"][0] == 0.95
    with pytest.raises(ValueError, match="momentum"):
        schedulers.OneCycleLR(sgd, 0.1, total_steps=5)    # it has none, and says so instead of cycling nothing
    schedulers.OneCycleLR(sgd, 0.1, total_steps=5, cycle_momentum=False)


@every_preset
def test_a_rate_of_zero_changes_nothing_but_state(preset: Build) -> None:
    net = model(F64)
    optimizer = preset(net, lr=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(net, optimizer, range(2))
    for p, q in zip(net.parameters(), model(F64).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)    # a sphere rounds


@every_preset
def test_a_tensor_rate_is_the_number(preset: Build) -> None:
    a, b = model(F64), model(F64)
    train(a, preset(a, lr=torch.tensor(0.0078125)), range(2))
    train(b, preset(b, lr=0.0078125), range(2))
    assert equal(a, b)


# ---------------------------------------------------------------------------------------------------------- groups


@every_preset
def test_groups_have_their_own_options(preset: Build) -> None:
    """Two groups of one optimizer take the steps of two optimizers."""

    def parts() -> list[nn.Parameter]:
        gen = torch.Generator().manual_seed(2)
        return [nn.Parameter(torch.randn(4, 3, generator=gen)) for _ in range(2)]

    together, alone = parts(), parts()
    one = preset([{"params": together[:1], "lr": 0.1, "weight_decay": 0.5}, {"params": together[1:]}], lr=0.01)
    two = [preset(alone[:1], lr=0.1, weight_decay=0.5), preset(alone[1:], lr=0.01)]
    for seed in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            q.grad = p.grad.clone()
        one.step()
        for o in two:
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


@every_preset
def test_a_group_added_in_training_takes_part(preset: Build) -> None:
    late, net = nn.Parameter(torch.ones(3, 2)), model()
    optimizer = preset(net)
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.05})    # torch: all groups have names, or none
    late.grad = torch.ones(3, 2)
    train(net, optimizer, range(2, 3))
    assert torch.equal(late, torch.ones(3, 2))    # zero_grad took its gradient
    late.grad = torch.arange(6.0).view(3, 2)
    optimizer.step()
    assert not torch.equal(late, torch.ones(3, 2)) and optimizer.param_groups[-1]["lr"] == 0.05


def test_a_group_may_change_its_parts_in_training() -> None:
    """A plan built for other parts is not used again: momentum kept, the sign taken from now on."""
    p = nn.Parameter(torch.ones(2, 2, dtype=F64))
    optimizer = SGD([p], lr=0.1, momentum=0.5)
    p.grad = torch.full((2, 2), 3.0, dtype=F64)
    optimizer.step()
    optimizer.param_groups[0].update(act="lmo", norm="linf")
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 1 - 0.3 - 0.1, dtype=F64))


def test_replaced_state_is_what_the_next_step_uses() -> None:
    """Offloading tools put other tensors into the state between steps."""
    for preset in (AdamW, Muon, AdamH):
        kept, replaced = model(), model()
        a, b = preset(kept), preset(replaced)
        for seed in range(4):
            train(kept, a, range(seed, seed + 1))
            train(replaced, b, range(seed, seed + 1))
            for p, state in list(b.state.items()):
                if seed % 2:
                    b.state[p] = {k: v.clone() for k, v in state.items()}
                else:
                    state |= {k: v.clone() for k, v in state.items()}
        assert equal(kept, replaced)


# ---------------------------------------------------------------------------------------------------------- copies and checkpoints


def saved_and_loaded(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_fresh_objects_goes_on_bit_for_bit(preset: Build, dtype: torch.dtype) -> None:
    whole, first = model(dtype), model(dtype)
    whole_optimizer, optimizer = preset(whole), preset(first)
    plans = [schedulers.ExponentialLR(o, 0.9) for o in (whole_optimizer, optimizer)]
    train(whole, whole_optimizer, range(6), after=plans[0].step)
    train(first, optimizer, range(3), after=plans[1].step)
    checkpoint = saved_and_loaded({"model": first.state_dict(), "optimizer": optimizer.state_dict(), "plan": plans[1].state_dict()})

    torch.manual_seed(99)
    second = Model().to(dtype)
    resumed = preset(second, lr=0.5)    # every option comes from the checkpoint
    plan = schedulers.ExponentialLR(resumed, 0.9)
    second.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    plan.load_state_dict(checkpoint["plan"])
    train(second, resumed, range(3, 6), after=plan.step)
    assert equal(whole, second)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        for key, value in whole_optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]) and value.dtype == resumed.state[q][key].dtype


@every_preset
def test_a_deep_copy_goes_on_alike_and_apart(preset: Build) -> None:
    net = model()
    optimizer = preset(net)
    train(net, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(2, 4))
    assert not equal(net, twin)
    train(twin, twin_optimizer, range(2, 4))
    assert equal(net, twin)


@every_preset
def test_pickled_with_its_model_it_goes_on(preset: Build) -> None:
    net = model()
    optimizer = preset(net)
    train(net, optimizer, range(2))
    twin, twin_optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    train(net, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert equal(net, twin)


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Muon(model()).load_state_dict(AdamW(model()).state_dict())


def test_the_state_of_a_policy_inside_is_in_the_checkpoint() -> None:
    """A radius ``"init"`` and a schedule go on where they were, and not from where the weights are now."""

    def optimizer_of(net: nn.Module) -> NormOptimizer:
        rules = [nw.Rule(params="up.weight", action="normalize", norm="l2", radius="init"),
                 nw.Rule(params="*", on="update", action="clip_norm", norm="l2", radius=nw.schedules.linear(1e-3, 1e-1, 6))]    # fmt: skip
        return Muon(net, policy=rules)

    whole, first = model(), model()
    train(whole, optimizer_of(whole), range(6))
    optimizer = optimizer_of(first)
    train(first, optimizer, range(3))
    checkpoint = saved_and_loaded({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    torch.manual_seed(5)
    second = Model()
    resumed = optimizer_of(second)
    second.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert resumed.control.steps == 3
    train(second, resumed, range(3, 6))
    assert equal(whole, second)


def test_a_step_under_a_policy_needs_no_snapshot_and_is_the_attached_one() -> None:
    """The same rules attached to torch's SGD, which takes a snapshot, give the same weights where there is no decay."""
    rules = [nw.clip_grad_norm(0.05), nw.Rule(params="*.weight", on="update", action="clip_norm", norm="l2", per="unit", radius=2e-3),
             nw.max_norm(0.5, params="up.weight")]    # fmt: skip
    inside, attached = model(F64), model(F64)
    ours, theirs = SGD(inside, 0.3, momentum=0.9, policy=rules), torch.optim.SGD(attached.parameters(), 0.3, momentum=0.9)
    control = nw.attach(attached, theirs, rules)
    train(inside, ours, range(5))
    train(attached, theirs, range(5))
    for p, q in zip(inside.parameters(), attached.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert list(control.violations().values()) == list(ours.control.violations().values()) != [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------- GradScaler, compile


@every_preset
def test_under_a_grad_scaler_the_steps_are_the_same_and_bad_ones_are_skipped(preset: Build) -> None:
    plain, scaled = model(), model()
    a, b = preset(plain), preset(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for seed in range(4):
        b.zero_grad()
        scaler.scale(loss_of(scaled, seed)).backward()
        if seed == 2:
            next(p for p in scaled.parameters()).grad.fill_(torch.inf)    # type: ignore[union-attr]
        before = copy.deepcopy(scaled)
        scaler.step(b)
        scaler.update()
        assert equal(before, scaled) == (seed == 2)
        if seed != 2:
            train(plain, a, range(seed, seed + 1))
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.long    # by default test_compiled.py shows it
@pytest.mark.parametrize("preset", [Muon, SGD, AdamW, AdamH, PRESETS["LARS"]])
def test_a_compiled_step_is_the_step(preset: Build, fresh_compiler: None) -> None:
    """Traced and run as graphs, without a C++ compiler; ``make test-long`` compiles."""
    plain, compiled = model(F64), model(F64)
    a, b = preset(plain), preset(compiled)
    step = torch.compile(b.step, backend="aot_eager")
    for seed in range(3):
        train(plain, a, range(seed, seed + 1))
        b.zero_grad()
        loss_of(compiled, seed).backward()
        step()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)    # bias corrections from the fp32 step count, as torch's capturable


@pytest.mark.long
@pytest.mark.parametrize("preset", [AdamW, Muon])
def test_a_step_compiled_to_machine_code_is_the_step(preset: Build, fresh_compiler: None) -> None:
    plain, compiled = model(), model()
    a, b = preset(plain), preset(compiled)
    step = torch.compile(b.step)
    for seed in range(3):
        train(plain, a, range(seed, seed + 1))
        b.zero_grad()
        loss_of(compiled, seed).backward()
        try:
            step()
        except Exception as error:
            if "InvalidCxxCompiler" in repr(error):
                pytest.skip("no C++ compiler here")
            raise
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- what is refused


@every_preset
def test_sparse_gradients_are_refused_before_anything_moves(preset: Build) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True))
    optimizer = preset(net)
    before = copy.deepcopy(net)
    (net[1](torch.tensor([0, 1])).sum() + net[0](torch.ones(3)).sum()).backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert equal(net, before)


@every_preset
def test_complex_parameters_are_refused(preset: Build) -> None:
    with pytest.raises(ValueError, match=r"complex64.*view_as_real"):
        preset([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


@every_preset
@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "fast", None, True, torch.tensor([0.1, 0.2])])
def test_a_rate_that_is_none_is_refused(preset: Build, lr: Any) -> None:
    with pytest.raises(ValueError, match=r"lr=.*needs a finite number >= 0"):
        preset(model(), lr=lr)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"momentum": 1.0}, r"momentum=1.0, and needs a number in \[0, 1\)"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"betas": (0.9, 1.0)}, "betas=1.0"),
        ({"betas": 0.9}, "needs two numbers"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"momemtum": 0.9}, "unknown option 'momemtum'. Did you mean 'momentum'?"),
        ({"direction": "adamm"}, "direction='adamm'. Did you mean 'adam'?"),
        ({"act": "lno"}, "act='lno'. Did you mean 'lmo'?"),
        ({"norm": "spektral"}, "'spektral'. Did you mean 'spectral'?"),
        ({"norm": "non_negative"}, "which is a set: a step needs a norm"),
        ({"scale": "rms"}, "scale='rms'"),
        ({"polar": "quintik"}, "polar='quintik'. Did you mean 'quintic'?"),
        ({"per": "row"}, "per='row'"),
        ({"decay": "weights"}, "decay='weights'. Did you mean 'weight'?"),
        ({"hold": "spher"}, "hold='spher'. Did you mean 'sphere'?"),
    ],
)
def test_bad_options_are_named_with_what_is_near(columns: dict[str, Any], says: str) -> None:
    says = says.replace("?", r"\?")
    with pytest.raises(ValueError, match=says):
        if columns.keys() & {"betas", "direction", "act", "norm"}:    # what Muon does not take by keyword
            Muon(model(), override={"head.weight": columns})
        else:
            Muon(model(), **columns)
    with pytest.raises(ValueError, match=says):
        AdamW([{"params": [nn.Parameter(torch.ones(2, 2))], **columns}])
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **columns})
    assert len(optimizer.param_groups) == 1


def test_a_bad_adjustment_and_nesterov_without_momentum() -> None:
    with pytest.raises(nw.PolicyError, match=r"'match_rms'. Did you mean 'match_rms_adamw'\?"):
        Muon(model(), adjust_lr_fn="match_rms")
    with pytest.raises(ValueError, match="momentum"):
        SGD(model(), nesterov=True)


# ---------------------------------------------------------------------------------------------------------- routing


@every_preset
def test_every_parameter_is_in_exactly_one_group(preset: Build) -> None:
    net = model()
    optimizer = preset(net)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert optimizer.routing is not None
    table = str(optimizer.routing).splitlines()
    assert len(table) == 1 + len(held)
    assert all(any(line.startswith(name) for line in table) for name, _ in net.named_parameters())
    for group in optimizer.param_groups:
        assert set(DEFAULTS) <= set(group) and all(optimizer.routing.of[n] == group["name"] for n in group["param_names"])


def test_a_parameter_that_no_row_covers_is_named() -> None:
    rows = {"adamw": {"direction": "adam"}}
    with pytest.raises(nw.PolicyError, match=r"no row covers conv.bias \(bias\), norm.weight \(gain\), .*override"):
        NormOptimizer(model(), rows, dict.fromkeys(("hidden", "conv", "embedding", "head"), "adamw"), "adamw")


def test_overrides_route_by_name_role_and_class_to_a_row_or_a_new_one() -> None:
    net = model()
    override = {"role:bias": {"direction": "plain", "lr": 0.5}, "head.*": "muon", nn.Conv1d: "adamw", "head.bias": "adamw"}
    optimizer = Muon(net, override=override)
    assert optimizer.routing is not None
    of = optimizer.routing.of
    assert of["up.bias"] == of["norm.bias"] == "override 1" and of["head.weight"] == "muon" and of["head.bias"] == "adamw"
    assert of["conv.weight"] == of["conv.bias"] == "adamw" and of["up.weight"] == "muon"
    bias, start = net.up.bias, net.up.bias.detach().clone()
    train(net, optimizer, range(1))
    torch.testing.assert_close(bias.detach(), start - 0.5 * bias.grad, rtol=1e-6, atol=1e-7)    # type: ignore[operator]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"haed.*": "adamw"}, "matches no parameter"),
        ({"head.*": "adam"}, "the row 'adam'. Did you mean 'adamw'"),
        ({"head.*": {"direction": "adam", "ler": 1}}, "unknown option 'ler'"),
        ({"norm.weight": "muon"}, "'norm.weight'.*holds no matrix"),
    ],
)
def test_bad_overrides_are_named(override: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Muon(model(), override=override)


def test_override_and_policy_need_the_module() -> None:
    with pytest.raises(nw.PolicyError, match="give the module"):
        AdamW(model().parameters(), override={"a": "adamw"})
    with pytest.raises(nw.PolicyError, match="give the module"):
        AdamW(model().parameters(), policy=[nw.max_norm(1.0)])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3, 4))


def test_a_bare_tensor_whose_axes_nobody_states_is_refused_by_matrix_methods_only() -> None:
    net = nn.ModuleList([Experts(), nn.Linear(2, 2)])
    with pytest.raises(nw.LayoutError, match=r"'0.w'.*register_layout.*override"):
        Muon(net, override={"0.w": "muon"})
    assert Muon(net).routing.of["0.w"] == "adamw"    # type: ignore[union-attr]
    with pytest.raises(nw.LayoutError, match="given without its module"):
        Muon([net[0].w])    # type: ignore[list-item]
    with pytest.raises(nw.LayoutError, match="given without its module"):
        NormalizedSGD([net[0].w], per="unit")    # type: ignore[list-item]
    assert len(Muon([{"params": [net[0].w], "layouts": [nw.Layout("eoi", (2, 3, 4))]}]).param_groups) == 1
    with pytest.raises(nw.LayoutError, match="does not fit"):
        Muon([{"params": [net[0].w], "layouts": [nw.Layout("eoi", (2, 4, 4))]}])
    with pytest.raises(nw.LayoutError, match="2 layouts for 1"):
        Muon([{"params": [net[0].w], "layouts": [nw.Layout("eoi", (2, 3, 4))] * 2}])


@every_preset
def test_tied_weights_step_once_and_frozen_ones_not_at_all(preset: Build) -> None:
    def tied(share: bool) -> nn.Sequential:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 2))
        net[2].requires_grad_(False)
        if share:
            net[1].weight = net[0].weight
        return net

    net = tied(True)
    optimizer = preset(net, lr=0.01)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert held.count(id(net[0].weight)) == 1 and id(net[2].weight) not in held
    net(torch.ones(3, 4)).sum().backward()
    grad, frozen = net[0].weight.grad.clone(), net[2].weight.clone()    # type: ignore[union-attr]
    alone = tied(False)
    single = preset(alone, lr=0.01)
    alone[0].weight.grad = grad
    single.step()
    optimizer.step()
    torch.testing.assert_close(net[0].weight, alone[0].weight)
    assert torch.equal(net[2].weight, frozen)


@pytest.mark.parametrize("preset", [AdamH, MuonH])
def test_a_zero_block_on_a_sphere_is_named_before_anything_moves(preset: Build) -> None:
    """R = ‖w‖ = 0 would freeze it without a word, as for zero-initialised projections and LoRA's B."""
    net = model()
    nn.init.zeros_(net.down.weight)
    optimizer, before = preset(net), copy.deepcopy(net)
    loss_of(net, 0).backward()
    with pytest.raises(nw.PolicyError, match=r"down.weight: a block is zero.*override=\{'down.weight': 'adamw'\}"):
        optimizer.step()
    assert equal(net, before) and not any("radius" in s for s in optimizer.state.values())
    routed = preset(net, override={"down.weight": "adamw"})
    train(net, routed, range(2))
    assert net.down.weight.any()
    late = model()    # weights that are loaded after the optimizer was built are what counts
    nn.init.zeros_(late.down.weight)
    optimizer = preset(late)
    late.load_state_dict(model().state_dict())
    train(late, optimizer, range(1))
    radius = optimizer.state[late.down.weight]["radius"]
    torch.testing.assert_close(radius, model().down.weight.norm().view(1), rtol=1e-6, atol=0)


def test_scions_constrained_weights_stay_in_their_balls() -> None:
    net = model()
    optimizer = Scion(net, 0.2, radius=2.0, head_radius=30.0, constrained=True, polar="exact")
    train(net, optimizer, range(40))
    w = net.up.weight.double()
    assert torch.linalg.svdvals(w)[0] <= 2.0 * (12 / 8) ** 0.5 * (1 + 1e-5)
    assert net.head.weight.abs().max() <= 30.0 / 8 * (1 + 1e-5)
    assert net.up.bias.square().mean().sqrt() <= 2.0 * (1 + 1e-5)


# ---------------------------------------------------------------------------------------------------------- options in every row


@pytest.mark.parametrize("build", [*PRESETS.values(), nw.optim.auto], ids=[*PRESETS, "auto"])
def test_maximize_is_of_every_row(build: Build) -> None:
    """It takes the steps that minimising takes with the opposite gradients: of every parameter, whatever its row."""
    up, down = model(F64), model(F64)
    override: Any = {"head.bias": {"direction": "plain", "lr": 0.5}}
    a, b = build(up, maximize=True, override=override), build(down, override=override)
    for seed in range(3):
        loss_of(up, seed).backward()
        for p, q in zip(up.parameters(), down.parameters(), strict=True):
            assert p.grad is not None
            q.grad = -p.grad
        a.step()
        b.step()
        a.zero_grad()
    for (name, p), q in zip(up.named_parameters(), down.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    with pytest.raises(ValueError, match=r"maximize='yes', and needs True or False"):
        build(model(), maximize="yes")


def test_rounding_is_of_every_row() -> None:
    groups = Muon(model(torch.bfloat16), rounding="stochastic", seed=3).param_groups
    assert {(g["rounding"], g["seed"]) for g in groups} == {("stochastic", 3)} and len(groups) == 3


def three() -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(4, 3, generator=gen, dtype=F64)) for _ in range(3)]


Listed = list[nn.Parameter]


def run_beside(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, a: Listed, b: Listed, steps: int = 3) -> None:
    for seed in range(steps):
        for k, (p, q) in enumerate(zip(a, b, strict=True)):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * seed + k), dtype=F64)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_groups_own_momentum_and_nesterov_are_torchs(momentum: float) -> None:
    a, b = three(), three()

    def groups(p: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": p[:1], "momentum": 0.8, "nesterov": True}, {"params": p[1:2], "momentum": 0.5}, {"params": p[2:]}]

    run_beside(SGD(groups(a), 0.1, momentum=momentum), torch.optim.SGD(groups(b), 0.1, momentum=momentum), a, b)
    fast = SGD([{"params": three(), "nesterov": False}], 0.1, momentum=0.9, nesterov=True)
    assert fast.param_groups[0]["direction"] == "heavy_ball"


def test_momentum_and_nesterov_may_come_in_training_as_in_torchs() -> None:
    a, b = three(), three()
    ours, theirs = SGD(a, 0.1), torch.optim.SGD(b, 0.1)
    for group in (ours.param_groups[0], theirs.param_groups[0]):
        group["momentum"] = 0.7
    run_beside(ours, theirs, a, b)
    for group in (ours.param_groups[0], theirs.param_groups[0]):
        group["nesterov"] = True
    run_beside(ours, theirs, a, b)


@every_preset
def test_an_option_that_no_part_uses_is_refused_by_name(preset: Build) -> None:
    """Adam has no momentum, a buffer has no betas; a group that asks for the wrong one would train on in silence."""
    betas = "betas" in preset(model()).defaults
    wrong: dict[str, Any] = {"momentum": 0.5} if betas else {"betas": (0.5, 0.6)}
    for given in (wrong, {"trust": 0.5} if preset is not PRESETS["LARS"] else {"damping": 0.5}, {"limit": 0.3}):
        name = next(iter(given))
        with pytest.raises(ValueError, match=rf"{name}=.*no part of it uses"):
            preset(model(), **given)
        with pytest.raises(ValueError, match=rf"{name}=.*no part of it uses"):
            preset([{"params": [nn.Parameter(torch.ones(3, 3))], **given}])
    if betas or preset is PRESETS["LARS"]:
        with pytest.raises(ValueError, match="nesterov=True"):
            preset([{"params": [nn.Parameter(torch.ones(3, 3))], "nesterov": True}])


@every_preset
@pytest.mark.parametrize("option", ["foreach", "fused", "capturable", "differentiable", "amsgrad", "dampening", "ns_steps"])
def test_torchs_options_that_are_none_here_are_named_with_the_reason(preset: Build, option: str) -> None:
    if preset is Muon and option == "ns_steps":
        return    # which takes it, as torch's does
    with pytest.raises(nw.PolicyError, match=rf"{option}=True, which is no option: it "):
        preset(model(), **{option: True})


@every_preset
def test_groups_keep_what_users_write_into_them(preset: Build) -> None:
    """As torch does: also a copy of a group of torch's own, whose switches ask for nothing."""
    p = nn.Parameter(torch.ones(3, 3))
    extra = {"my_tag": "x", "lr_scale": 0.5, "foreach": None, "fused": True, "capturable": False, "amsgrad": False, "differentiable": False}
    optimizer = preset([{"params": [p], **extra}])
    p.grad = torch.ones(3, 3)
    optimizer.step()
    again = preset([nn.Parameter(torch.ones(3, 3))])
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert {k: again.param_groups[0][k] for k in extra} == extra
    for asks in ({"amsgrad": True}, {"dampening": 0.1}, {"capturable": True}):
        with pytest.raises(nw.PolicyError, match="which is no option"):
            preset([{"params": [p], **asks}])


# ---------------------------------------------------------------------------------------------------------- numbers


@every_preset
@pytest.mark.parametrize("lr", [torch.tensor([0.0078125]), np.float32(0.0078125), np.array(0.0078125), np.array([0.0078125])], ids=repr)
def test_a_rate_of_any_kind_is_the_number(preset: Build, lr: Any) -> None:
    a, b = model(F64), model(F64)
    optimizer = preset(a, lr=lr, weight_decay=np.float32(0.25))
    train(a, optimizer, range(2))
    train(b, preset(b, lr=0.0078125, weight_decay=0.25), range(2))
    assert equal(a, b)
    saved_and_loaded(optimizer.state_dict())


@every_preset
def test_numbers_written_in_training_may_be_of_any_kind(preset: Build) -> None:
    """Schedules of the user's own write numpy's; a rate that is none is refused before any group has stepped."""
    a, b = model(F64), model(F64)
    one, two = preset(a), preset(b)
    for group in one.param_groups:
        group["lr"] = np.float32(0.0078125)
    for group in two.param_groups:
        group["lr"] = 0.0078125
    train(a, one, range(1))
    train(b, two, range(1))
    for group in one.param_groups:
        group["lr"] = torch.tensor([0.0078125])
    train(a, one, range(1, 2))
    train(b, two, range(1, 2))
    assert equal(a, b)
    saved_and_loaded(one.state_dict())
    one.param_groups[-1]["lr"] = None
    with pytest.raises(ValueError, match=r"lr=None, and needs a finite number"):
        train(a, one, range(2, 3))
    assert equal(a, b)


def test_betas_of_any_kind() -> None:
    for betas in ([0.8, 0.9], np.array([0.8, 0.9]), torch.tensor([0.8, 0.9], dtype=F64), (np.float64(0.8), torch.tensor(0.9, dtype=F64))):
        assert AdamW(model(), betas=betas).param_groups[0]["betas"] == (0.8, 0.9)


# ---------------------------------------------------------------------------------------------------------- momenta that cycle


@every_preset
@pytest.mark.parametrize("plan", ["OneCycleLR", "CyclicLR"])
def test_a_cycled_momentum_is_what_every_group_uses(preset: Build, plan: str) -> None:
    """Under whichever of its two names the scheduler writes it; the same numbers written by hand are the reference."""
    if preset is SGD:
        preset = lambda net: SGD(net, momentum=0.9)  # noqa: E731
    cycled, by_hand = model(F64), model(F64)
    a, b = preset(cycled), preset(by_hand)
    made = SCHEDULES[plan](a)
    seen = set()
    for seed in range(5):
        momentum = {a.param_groups[0][k] for k in ("momentum",)} if "momentum" in a.defaults else {a.param_groups[0]["betas"][0]}
        now = momentum.pop()
        seen.add(now)
        for ours, group in zip(a.param_groups, b.param_groups, strict=True):
            group["lr"] = ours["lr"]
            if group["direction"] in ("adam", "lion"):
                group["betas"] = (now, group["betas"][1])
            else:
                group["momentum"] = now
        train(cycled, a, range(seed, seed + 1), after=made.step)
        train(by_hand, b, range(seed, seed + 1))
        assert equal(cycled, by_hand)
    assert len(seen) > 2
    a.state_dict()
    for group in a.param_groups:
        assert group["direction"] not in ("adam", "lion") or group["momentum"] == group["betas"][0]


def test_a_plain_descent_shows_no_momentum() -> None:
    optimizer = SGD(model())
    assert "momentum" not in optimizer.defaults and {g["momentum"] for g in optimizer.param_groups} == {0.0}
    lars = PRESETS["LARS"](model(), momentum=0.8)
    assert lars.defaults["momentum"] == 0.8 and {g["momentum"] for g in lars.param_groups} == {0.8}


def test_a_momentum_in_the_midst_of_a_cycle_survives_a_checkpoint() -> None:
    """Written by the scheduler after the last step, under the other name, and not used yet when it is saved."""
    whole, first = model(F64), model(F64)
    a, b = Muon(whole), Muon(first)
    plans = [schedulers.OneCycleLR(o, 0.1, total_steps=8) for o in (a, b)]
    train(whole, a, range(5), after=plans[0].step)
    train(first, b, range(3), after=plans[1].step)
    checkpoint = saved_and_loaded([first.state_dict(), b.state_dict(), plans[1].state_dict()])
    second = Model().to(F64)
    c = Muon(second)
    plan = schedulers.OneCycleLR(c, 0.1, total_steps=8)
    for thing, state in zip((second, c, plan), checkpoint, strict=True):
        thing.load_state_dict(state)
    train(second, c, range(3, 5), after=plan.step)
    assert equal(whole, second)


# ---------------------------------------------------------------------------------------------------------- whose checkpoint


TORCHS: dict[str, tuple[Any, Any]] = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1), lambda p: SGD(p)),
    "SGD, momentum": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: SGD(p)),
    "SGD, Nesterov": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1), lambda p: SGD(p, momentum=0.5)),
    "SGD, maximize": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, maximize=True), lambda p: SGD(p)),
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.1), lambda p: AdamW(p)),
    "AdamW, fused": (lambda p: torch.optim.AdamW(p, 0.1, fused=True, weight_decay=0.5), lambda p: AdamW(p)),
    "Adam": (lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.9)), lambda p: AdamW(p)),
    "Adam, L2": (lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1), lambda p: AdamW(p, decay="gradient")),
    "Muon": (lambda p: torch.optim.Muon(p, 0.1), lambda p: Muon(p)),
    "Muon, three steps": (lambda p: torch.optim.Muon(p, 0.1, ns_steps=3), lambda p: Muon(p)),
    "Muon, its own steps": (lambda p: torch.optim.Muon(p, 0.1, ns_coefficients=(2.0, -1.5, 0.5), eps=3.0), lambda p: Muon(p, ns_steps=2)),
    "Muon, as AdamW": (lambda p: torch.optim.Muon(p, 0.1, nesterov=False, adjust_lr_fn="match_rms_adamw"), lambda p: Muon(p)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_a_state_of_torchs_goes_on_as_in_torch(name: str) -> None:
    """Step for step the torch optimizer that goes on beside it."""
    make, preset = TORCHS[name]
    a, b = three(), three()
    theirs = make(b)
    twin = make(a)
    run_beside(twin, theirs, a, b, 2)
    ours = preset(a)
    ours.load_state_dict(saved_and_loaded(twin.state_dict()))
    for seed in range(2):
        for k, (p, q) in enumerate(zip(a, b, strict=True)):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(50 + 10 * seed + k), dtype=F64)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    near = 2e-2 if "Muon" in name else 1e-9    # torch iterates in bf16
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=near, atol=near)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), AdamW, "amsgrad=True"),
    "L2 into decoupled": (lambda p: torch.optim.Adam(p, weight_decay=0.1), AdamW, "decay='gradient', here it is 'weight'"),
    "SGD into AdamW": (lambda p: torch.optim.SGD(p, momentum=0.9), AdamW, "direction='plain', here it is 'adam'"),
    "AdamW into Muon": (lambda p: torch.optim.AdamW(p), Muon, "direction='adam', here it is 'ema_nesterov'"),
    "AdamW into LAMB": (lambda p: torch.optim.AdamW(p), PRESETS["LAMB"], "scale='absolute', here it is 'lamb'"),
    "AdamW into AdamH": (lambda p: torch.optim.AdamW(p), AdamH, "hold='none', here it is 'sphere'"),
    "dampening": (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), SGD, "dampening=0.5"),
    "Muon into a fast one": (lambda p: torch.optim.Muon(p), lambda p: Muon(p, polar="fast"), "polar='quintic', here it is 'fast'"),
    "Muon into MuonH": (lambda p: torch.optim.Muon(p), MuonH, "hold='none', here it is 'sphere'"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p), AdamW, "of no optimizer that can be resumed"),
    "NAdam": (lambda p: torch.optim.NAdam(p), AdamW, "of no optimizer that can be resumed"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p), SGD, "of no optimizer that can be resumed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_of_another_method_is_refused_and_nothing_is_changed(name: str) -> None:
    make, preset, says = REFUSED[name]
    a, b = three(), three()
    theirs = make(b)
    for p, q in zip(a, b, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    theirs.step()
    ours = preset(a)
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(nw.PolicyError, match=says):
        ours.load_state_dict(theirs.state_dict())
    after = ours.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())
    ours.step()


def test_torchs_adamw_takes_ours() -> None:
    a, b = three(), three()
    ours, twin = AdamW(a, 0.1), AdamW(b, 0.1)
    run_beside(ours, twin, a, b)
    theirs = torch.optim.AdamW(b, fused=True)
    theirs.load_state_dict(twin.state_dict())
    run_beside(ours, theirs, a, b)


def test_a_state_of_other_shapes_is_refused_before_anything_changes() -> None:
    for preset in (AdamW, Muon, MuonH, PRESETS["NorMuon"]):
        a, b = [nn.Parameter(torch.randn(4, 3))], [nn.Parameter(torch.randn(3, 4))]
        one, two = preset(a), preset(b)
        for p in (*a, *b):
            p.grad = torch.randn_like(p)
        one.step()
        two.step()
        before = copy.deepcopy(two.state_dict())
        with pytest.raises(nw.PolicyError, match=r"'parameter 0' has \w+ of shape .*Nothing was loaded"):
            two.load_state_dict(one.state_dict())
        assert all(torch.equal(v, two.state_dict()["state"][0][k]) for k, v in before["state"][0].items())


def test_torchs_own_hook_that_matches_names_keeps_the_axes_of_the_model() -> None:
    """The recipe of torch's documentation copies every key of the saved group but params and names, so the layouts in the saved order."""

    class Both(nn.Module):
        def __init__(self, first: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            made = {"turned": nn.ConvTranspose1d(6, 4, 2, bias=False), "plain": nn.Conv1d(5, 3, 2, bias=False)}
            for name in (first, *(n for n in made if n != first)):
                self.add_module(name, made[name])

    def names_matching(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        adapted = copy.deepcopy(optimizer.state_dict())
        own, saved = adapted["param_groups"][0], state["param_groups"][0]
        own |= {k: v for k, v in saved.items() if k not in ("params", "param_names")}
        for i, name in zip(own["params"], own["param_names"], strict=True):
            j = saved["params"][saved["param_names"].index(name)]
            adapted["state"][i] = {k: v.clone() for k, v in state["state"][j].items()}
        return adapted

    def stepped(net: nn.Module, optimizer: NormOptimizer, seeds: range) -> None:
        for seed in seeds:
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel()))
            optimizer.step()

    for hook in (True, False):
        whole, first, second = Both("turned"), Both("turned"), Both("plain")
        a, b, c = MuonH(whole), MuonH(first), MuonH(second)
        stepped(whole, a, range(4))
        stepped(first, b, range(2))
        second.load_state_dict(first.state_dict())
        if hook:
            c.register_load_state_dict_pre_hook(names_matching)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            c.load_state_dict(saved_and_loaded(b.state_dict()))
        assert [x[0] for x in c.param_groups[0]["layouts"]] == ["oik", "iok"]
        stepped(second, c, range(2, 4))
        for name, p in whole.named_parameters():
            assert torch.equal(p, second.get_parameter(name)), name


def test_a_checkpoint_of_other_axes_is_told_and_one_of_another_method_too() -> None:
    a, b = three(), three()
    stated = {"layouts": [nw.Layout("io", (4, 3))] * 3}
    one = Muon([{"params": [(f"w{k}", p) for k, p in enumerate(a)], **stated}])
    two = Muon([{"params": [(f"w{k}", p) for k, p in enumerate(b)]}])
    with pytest.warns(UserWarning, match=r"other axes: w0 \(i o \(4, 3\) when saved, o i \(4, 3\) now\)"):
        two.load_state_dict(one.state_dict())
    assert two.param_groups[0]["layouts"][0][0] == "oi"
    with pytest.warns(UserWarning, match="has direction='ema_nesterov' for 'adam'.*columns of the checkpoint are used"):
        AdamW(b).load_state_dict(Muon(a).state_dict())


def test_the_same_names_in_other_groups_are_refused() -> None:
    a, b = three(), three()

    def named(p: list[nn.Parameter], order: list[int]) -> list[dict[str, Any]]:
        return [{"params": [(f"w{k}", p[k]) for k in part]} for part in (order[:1], order[1:])]

    one, two = AdamW(named(a, [0, 1, 2])), AdamW(named(b, [1, 0, 2]))
    with pytest.raises(nw.PolicyError, match="in other groups: w0, w1 are not in the group 0"):
        two.load_state_dict(one.state_dict())
    turned = AdamW([{"params": [("w2", b[2]), ("w1", b[1])]}, {"params": [("w0", b[0])]}])
    for p in a:
        p.grad = torch.randn_like(p)
    one.step()
    turned.load_state_dict(one.state_dict())
    for p, q in zip(a, b, strict=True):
        assert torch.equal(one.state[p]["exp_avg"], turned.state[q]["exp_avg"])


# ---------------------------------------------------------------------------------------------------------- what was given


@pytest.mark.parametrize("preset", [nw.optim.auto, Muon, MuonH, AdamH, Scion, PRESETS["NorMuon"], PRESETS["Ridge"]])
def test_vectors_without_their_model_are_refused_by_matrix_methods(preset: Build) -> None:
    for given in (model().parameters(), model().named_parameters()):
        with pytest.raises(ValueError, match=r"give the model, as nw\.optim\.\w+\(model\)"):
            preset(given)


def test_vectors_in_a_row_of_their_own_are_stepped_beside_matrices() -> None:
    w, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(3))
    optimizer = AdamH([{"params": [w]}, {"params": [b], "hold": "none", "scale": "absolute", "per": "matrix"}], lr=0.1)
    w.grad, b.grad = torch.randn(3, 2), torch.ones(3)
    norm = w.norm().item()
    optimizer.step()
    assert w.norm().item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(b.detach(), torch.full((3,), -0.1), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="give the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 2, "nothing is changed"


def test_a_parameter_given_twice_is_refused() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="more than once"):
        AdamW([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW([{"params": [p]}, {"params": [p]}])


def test_it_shows_its_groups_in_a_line_each() -> None:
    lines = repr(Muon(model(), lr=torch.tensor(0.5))).splitlines()
    assert len(lines) == 5 and lines[0] == "Muon ("
    assert lines[1].strip().startswith("the group 'muon', 3 parameters of 288 numbers: lr=0.5 direction=ema_nesterov momentum=0.95")
    assert "layouts" not in repr(Muon(model())) and "param_names" not in repr(Muon(model()))
