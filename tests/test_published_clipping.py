"""The published methods with a memory, autoclip, zclip and cpr: formulas written out in float64, and state that survives a
checkpoint and grows with steps that happened only."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw

F64 = torch.float64


def net(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def lengths(steps: int, seed: int = 0) -> list[float]:
    """Gradient norms as they come: log-normal, with a spike now and then."""
    rng = np.random.default_rng(seed)
    return [float(x) * (30.0 if k % 17 == 11 else 1.0) for k, x in enumerate(rng.lognormal(0.0, 0.4, steps))]


def give(model: nn.Module, length: float, seed: int) -> Tensor:
    """Gradients whose global norm is ``length``; returns them as one vector."""
    gen = torch.Generator().manual_seed(seed)
    shapes = [p.shape for p in model.parameters()]
    drawn = [torch.randn(s, dtype=F64, generator=gen) for s in shapes]
    total = torch.cat([d.flatten() for d in drawn]).norm()
    for p, d in zip(model.parameters(), drawn, strict=True):
        p.grad = (d * (length / total)).to(p.dtype)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def applied(model: nn.Module, opt: torch.optim.Optimizer, length: float, seed: int) -> float:
    """The norm of the gradient that plain descent with rate 1 applied."""
    give(model, length, seed)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.step()
    return float((before - torch.cat([p.detach().flatten() for p in model.parameters()])).norm())


# --------------------------------------------------------------------------------------------------------- autoclip


@pytest.mark.parametrize("window", [10_000, 13])
@pytest.mark.parametrize("percentile", [0, 10, 50, 33.3, 100])
def test_autoclip_is_numpys_percentile_of_the_history(percentile, window):
    model, given = net(), lengths(40)
    opt = SGD(model.parameters(), lr=1.0)
    control = nw.attach(model, opt, nw.autoclip(percentile, window=window))
    clipped = 0
    for step, length in enumerate(given):
        bound = float(np.percentile(given[: step + 1][-window:], percentile))
        assert applied(model, opt, length, step) == pytest.approx(min(length, bound), rel=1e-9)
        assert next(iter(control.violations().values())) == int(bound < length * (1 - 1e-12))
        clipped += bound < length
    assert percentile == 100 or clipped > 3


def test_autoclip_per_tensor_keeps_a_history_for_each_parameter():
    model = net()
    opt = SGD(model.parameters(), lr=1.0)
    nw.attach(model, opt, nw.autoclip(40, per="tensor"))
    history: dict[str, list[float]] = {n: [] for n, _ in model.named_parameters()}
    for step, length in enumerate(lengths(12)):
        give(model, length, step)
        if step == 5:
            model[0].bias.grad = None    # takes no step, and is no observation
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        opt.step()
        for n, p in model.named_parameters():
            if n in norms:
                history[n].append(norms[n])
                wanted = min(norms[n], np.percentile(history[n], 40))
                assert float((p.detach() - before[n]).norm()) == pytest.approx(wanted, rel=1e-9)
    assert len(history["0.bias"]) == 11


# ------------------------------------------------------------------------------------------------------------ zclip


class Paper:
    """ZClip as its paper writes it, on Python's floats (Kumar et al., 2025, section 3)."""

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        self.z, self.alpha, self.warmup, self.first = z, alpha, warmup, []
        self.mean = self.var = math.nan

    def __call__(self, g: float) -> float:
        if len(self.first) < self.warmup:
            self.first.append(g)
            self.mean, self.var = float(np.mean(self.first)), float(np.var(self.first))
            return g
        score = (g - self.mean) / math.sqrt(self.var)
        clipped = self.mean + self.z**2 / score * math.sqrt(self.var) if score > self.z else g
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.var = self.alpha * self.var + (1 - self.alpha) * (clipped - self.mean) ** 2
        return clipped


@pytest.mark.parametrize("settings", [{}, {"z": 1.5, "alpha": 0.8, "warmup": 5}])
def test_zclip_is_its_paper(settings):
    model, paper = net(), Paper(**settings)
    opt = SGD(model.parameters(), lr=1.0)
    control = nw.attach(model, opt, nw.zclip(**settings))
    clipped = 0
    for step, length in enumerate(lengths(120)):
        wanted = paper(length)
        assert applied(model, opt, length, step) == pytest.approx(wanted, rel=1e-9)
        clipped += wanted < length
    assert 3 < clipped < 110
    found = control.state_dict()["rules"][0]["found"]["all together"]
    assert (float(found["mean"]), float(found["variance"])) == pytest.approx((paper.mean, paper.var), rel=1e-9)


def test_a_norm_that_is_not_finite_is_no_observation():
    for rule in (nw.zclip(warmup=3), nw.autoclip()):
        model, twin = net(), net()
        opts = [SGD(m.parameters(), lr=1.0) for m in (model, twin)]
        ours, theirs = nw.attach(model, opts[0], rule, on_nonfinite="ignore"), nw.attach(twin, opts[1], rule)
        for step, length in enumerate(lengths(20)):
            if step in (0, 2, 9):
                give(model, length, step)
                model[0].weight.grad[0, 0] = math.inf if step == 2 else math.nan
                saved = copy.deepcopy(model.state_dict())
                opts[0].step()
                model.load_state_dict(saved)
            give(model, length, step)
            give(twin, length, step)
            for opt in opts:
                opt.step()
        assert str(ours.state_dict()["rules"]) == str(theirs.state_dict()["rules"])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_one_history_over_two_optimizers():
    model, paper, clipped = net(), Paper(warmup=5), 0
    opts = [SGD(model[k].parameters(), lr=1.0) for k in (0, 2)]
    nw.attach(model, opts, nw.zclip(warmup=5))
    for step, length in enumerate(lengths(40)):
        give(model, length, step)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        for opt in opts if step % 2 else reversed(opts):
            opt.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        wanted = paper(length)
        clipped += wanted < length
        assert float((after - before).norm()) == pytest.approx(wanted, rel=1e-9)
    assert clipped > 1


def test_a_closure_that_is_evaluated_many_times_is_one_observation():
    """LBFGS evaluates its closure several times a step; each evaluation is clipped, the last one remembered."""
    model = net()
    opt = LBFGS(model.parameters(), lr=0.1, max_iter=4, tolerance_grad=0, tolerance_change=0)
    control = nw.attach(model, opt, nw.autoclip(100))
    seen: list[float] = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(torch.ones(2, 6, dtype=F64)) - 5).square().sum()
        loss.backward()
        seen.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        return loss

    lasts = []
    for _ in range(3):
        opt.step(closure)
        lasts.append(seen[-1])
    found = control.state_dict()["rules"][0]["found"]["all together"]
    assert len(seen) > 6 and float(found["count"]) == 3
    assert found["history"][0, :3].tolist() == pytest.approx(lasts, rel=1e-12)


def test_nothing_is_observed_outside_of_start_stop_and_every():
    model = net()
    opt = SGD(model.parameters(), lr=1.0)
    control = nw.attach(model, opt, nw.autoclip(50, start=2, stop=9, every=3))
    given = lengths(12)
    for step, length in enumerate(given):
        active = step in (2, 5, 8)
        bound = np.percentile([given[s] for s in (2, 5, 8) if s <= step], 50) if active else math.inf
        assert applied(model, opt, length, step) == pytest.approx(min(length, bound), rel=1e-9)
    assert float(control.state_dict()["rules"][0]["found"]["all together"]["count"]) == 3


class NoReading(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [nw.autoclip(30), nw.autoclip(30, per="tensor"), nw.zclip(1.0, warmup=2), nw.cpr(nw.radii.Inflection(1))])
def test_nothing_is_read_back_where_reading_waits(rule, monkeypatch):
    """As on a device: wherever the library asks whether reading a number is free, it is told no."""
    free, waiting = net(), net()
    for model in (free, waiting):
        opt = SGD(model.parameters(), lr=1.0)
        if model is waiting:
            for name, module in list(sys.modules.items()):
                if name.startswith("normwise") and hasattr(module, "may_branch"):
                    monkeypatch.setattr(module, "may_branch", lambda x: False)
        control = nw.attach(model, opt, rule)
        for step, length in enumerate(lengths(20)):
            give(model, length, step)
            with NoReading() if model is waiting else contextlib.nullcontext():
                opt.step()
        assert control.steps == 20
    for p, q in zip(free.parameters(), waiting.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    with pytest.raises(AssertionError, match="waits"), NoReading():
        float(torch.ones(1))


# ------------------------------------------------------------------------------------------------------------ state

REMEMBERING = {
    "autoclip": lambda: nw.autoclip(30, window=7),
    "autoclip per tensor": lambda: nw.autoclip(30, per="tensor", window=50),
    "zclip": lambda: nw.zclip(1.0, warmup=4),
    "zclip per tensor": lambda: nw.zclip(1.0, warmup=4, per="tensor"),
    "cpr, warm start": lambda: nw.cpr(nw.radii.WarmStart(4)),
    "cpr, inflection": lambda: nw.cpr(nw.radii.Inflection(2), mu=10.0),
    "hyperball": lambda: nw.hyperball(),
    "all": lambda: [nw.zclip(1.0, warmup=4), nw.autoclip(), nw.cpr(nw.radii.WarmStart(5)), nw.relative_update(), nw.radial_brake(0.1)],
}


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("cut", [2, 6, 13])
def test_a_resumed_run_ends_on_the_same_bits(name, cut):
    def run(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            give(model, lengths(20)[step], step)
            opt.step()

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, AdamW(model.parameters(), lr=0.02, weight_decay=0.0)

    whole, opt = made()
    nw.attach(whole, opt, REMEMBERING[name]())
    run(whole, opt, range(20))
    first, opt = made()
    control = nw.attach(first, opt, REMEMBERING[name]())
    run(first, opt, range(cut))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": opt.state_dict(), "control": control.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, opt = made()
    control = nw.attach(second, opt, REMEMBERING[name]())
    second.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    control.load_state_dict(saved["control"])
    run(second, opt, range(cut, 20))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_state_that_does_not_fit_is_refused():
    model = net()
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.zclip())
    state = control.state_dict()
    del state["rules"][0]["found"]["all together"]["mean"]
    with pytest.raises(nw.PolicyError, match="no fitting mean for 'all together' in rule"):
        control.load_state_dict(state)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_step_that_gradscaler_skips_does_not_advance_anything(name, fused):
    def run(scaled: bool) -> tuple[nn.Module, nw.Control]:
        model = net(dtype=torch.float32)
        opt = AdamW(model.parameters(), lr=0.02, weight_decay=0.0, fused=fused)
        control = nw.attach(model, opt, REMEMBERING[name]())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled, growth_interval=100)
        for step in range(12):
            if step in (0, 3, 8) and scaled:
                attempt(model, opt, scaler, step, math.inf)
            attempt(model, opt, scaler, step, 1.0)
        return model, control

    def attempt(model: nn.Module, opt: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int, factor: float) -> None:
        give(model, lengths(12)[step], step)
        scaler.scale(torch.ones(1))    # which sets the scale up
        for p in model.parameters():
            p.grad.mul_(scaler.get_scale() * factor)
        scaler.step(opt)
        scaler.update(2.0**10)

    (plain, one), (scaled, other) = run(False), run(True)
    assert one.steps == other.steps == 12
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for a, b in zip(one.state_dict()["rules"], other.state_dict()["rules"], strict=True):
        for key, found in a["found"].items():
            for what, value in found.items():
                torch.testing.assert_close(b["found"][key][what], value, rtol=1e-5, atol=1e-9)


def test_a_skipped_step_is_no_observation_under_on_nonfinite_skip():
    model = net()
    opt = SGD(model.parameters(), lr=1.0)
    control = nw.attach(model, opt, [nw.zclip(), nw.cpr(nw.radii.WarmStart(3))], on_nonfinite="skip")
    give(model, 1.0, 0)
    opt.step()
    before: Callable[[], str] = lambda: str(control.state_dict())    # noqa: E731
    was = before()
    give(model, 1.0, 1)
    model[0].weight.grad[0, 0] = math.nan
    opt.step()
    assert before() == was
