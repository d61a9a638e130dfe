"""The published methods that act on weights and steps, each equal in float64 to its paper's formula written out here by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import normwise as nw
from normwise.engine.rules.cpr import Constrained
from normwise.engine.rules.step_length import Braked, Stepped
from normwise.optim import AdamH, Muon, MuonH

F64 = torch.float64
MAKE: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda params, lr=0.1: SGD(params, lr=lr, momentum=0.9),
    "adam": lambda params, lr=0.03: Adam(params, lr=lr),
}


def net(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    """Two hidden matrices, a head, biases."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


HIDDEN = ("0.weight", "2.weight")


def draw(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Gradients that do not depend on the weights, so that a formula can be followed from outside."""
    gen = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, dtype=F64, generator=gen) * scale).to(p.dtype)


def params(model: nn.Module, names: tuple[str, ...] = HIDDEN) -> list[Tensor]:
    return [dict(model.named_parameters())[n].detach() for n in names]


def follow(
    rules: object, make: Callable[..., Optimizer], formula: Callable[[Tensor, Tensor, int, int], Tensor], steps: int = 12,
    start: nn.Module | None = None, scale: float = 1.0,
) -> tuple[nn.Module, nw.Control]:  # fmt: skip
    """Trains with ``rules`` attached, and a twin where ``formula(before, after, index, step)`` replaces what the optimizer made."""
    model = net() if start is None else start
    twin = copy.deepcopy(model)
    opt, twin_opt = make(model.parameters()), make(twin.parameters())
    control = nw.attach(model, opt, rules)
    for step in range(steps):
        draw(model, step, scale)
        draw(twin, step, scale)
        opt.step()
        before = [p.detach().clone() for p in params(twin)]
        twin_opt.step()
        with torch.no_grad():
            for i, (p, old) in enumerate(zip(params(twin), before, strict=True)):
                p.copy_(formula(old, p.clone(), i, step))
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13, msg=lambda m, n=name, s=step: f"{n} at step {s}: {m}")
    return model, control


def to(x: Tensor, length: float | Tensor) -> Tensor:
    return x * (length / x.norm())


# ------------------------------------------------------------------------------------------------------------ hyperball


@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
@pytest.mark.parametrize(("radius", "first"), [("init", None), ("1.5*init", None), (2.0, 2.0), (nw.schedules.linear(2.0, 1.0, 8), None)])
def test_hyperball_is_its_formula(make, radius, first):
    """W ← R·normalise(W + η·R·normalise(u))."""
    initial = [float(p.norm()) for p in params(net())]

    def wanted(i: int, step: int) -> float:
        return {"init": initial[i], "1.5*init": 1.5 * initial[i]}.get(radius) if isinstance(radius, str) else first or radius(step)

    eta = make([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
    formula = lambda old, new, i, s: to(old + to(new - old, eta * wanted(i, s)), wanted(i, s))    # noqa: E731
    model, control = follow(nw.hyperball(radius), make, formula)
    assert control.verify(), str(control.verify())
    assert all(not torch.allclose(p, q) for p, q in zip(params(model), params(net()), strict=True))


def test_adamw_without_decay_under_hyperball_is_adamh():
    x, y = torch.randn(16, 6, dtype=F64, generator=torch.manual_seed(1)), torch.randn(16, 3, dtype=F64)
    ours, theirs = net(), net()
    adamh = AdamH(ours, lr=0.02, adamw={"lr": 3e-3})
    weights = [theirs[0].weight, theirs[2].weight]
    hidden = {id(p) for p in weights}
    groups = [{"params": weights, "lr": 0.02}, {"params": [p for p in theirs.parameters() if id(p) not in hidden], "lr": 3e-3}]
    adamw = AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
    nw.attach(theirs, adamw, nw.hyperball())
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.2, 1.0, 10) for o in (adamh, adamw)]
    for _ in range(20):
        for model, opt in ((ours, adamh), (theirs, adamw)):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
        for schedule in schedules:
            schedule.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert (params(ours)[0] - params(net())[0]).abs().max() > 0.01


def test_muon_under_hyperball_is_muonh_and_keeps_no_copy_of_the_weights():
    ours, theirs = net(), net()
    muonh = MuonH(ours, lr=0.02, polar="exact")
    muon = Muon(theirs, lr=0.02, polar="exact", weight_decay=0.0, policy=nw.hyperball(per="matrix"))
    for step in range(8):
        for model, opt in ((ours, muonh), (theirs, muon)):
            draw(model, step)
            opt.step()
        assert muon.control.engine._turn is not None and not muon.control.engine._turn.before
    for p, q in zip(params(ours), params(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_the_learning_rate_of_hyperball_is_the_relative_length_of_the_step():
    """Before it is put back onto the sphere: the angle that a small step turns by is about η, its tangent part over R."""
    model = net()
    opt = SGD(model.parameters(), lr=1e-3)
    nw.attach(model, opt, nw.hyperball())
    for step in range(5):
        before = params(model)[0].detach().clone()
        draw(model, step, 100.0)
        opt.step()
        chord = float((params(model)[0] - before).norm() / before.norm())
        assert 0.9e-3 < chord <= 1.001e-3


# -------------------------------------------------------------------------------------------------- relative update


@pytest.mark.parametrize("how", ["loaded", "written"])
@pytest.mark.parametrize("rule", [nw.hyperball(), nw.relative_update(1.0)], ids=["hyperball", "relative_update"])
def test_a_weight_decay_that_comes_later_is_refused_before_the_step_changes_anything(rule, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    nw.attach(model, optimizer, [nw.clip_grad_norm(1e-3), *([rule] if isinstance(rule, nw.Rule) else rule)])
    if how == "loaded":
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5).state_dict())
    else:
        optimizer.param_groups[0]["weight_decay"] = 0.5
    model(torch.ones(3, 6)).square().sum().backward()
    before = [t.clone() for p in model.parameters() for t in (p.detach(), p.grad)]
    with pytest.raises(nw.PolicyError, match=r"weight_decay=0\.5.*Give the group weight_decay=0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [t for p in model.parameters() for t in (p.detach(), p.grad)], strict=True))
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()


@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
def test_relative_update_is_its_formula(make):
    eta = make([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
    follow(nw.relative_update(0.5), make, lambda old, new, i, s: old + to(new - old, 0.5 * eta * old.norm()))


def test_relative_update_of_each_unit_with_a_rate_of_each_group_and_a_schedule():
    model = net()
    rates = {"0.weight": 0.1, "2.weight": 0.02}
    named = dict(model.named_parameters())
    opt = SGD([{"params": [named[n]], "lr": lr} for n, lr in rates.items()], lr=1.0)
    control = nw.attach(model, opt, nw.relative_update(nw.schedules.linear(1.0, 0.2, 4), ["0.weight", "2.weight"], per="unit", norm="l1"))
    for step in range(4):
        before = {n: named[n].detach().clone() for n in rates}
        draw(model, step)
        opt.step()
        for n, lr in rates.items():
            lengths = (named[n] - before[n]).abs().sum(1)
            torch.testing.assert_close(lengths, (1 - 0.2 * step) * lr * before[n].abs().sum(1), rtol=1e-11, atol=0)
    assert isinstance(control.engine.rules[0], Stepped)


def test_a_pack_of_two_equal_matrices_may_have_two_rates():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)).to(F64)
    opt = SGD([{"params": [model[0].weight], "lr": 0.1}, {"params": [model[1].weight], "lr": 0.3}], lr=1.0)
    control = nw.attach(model, opt, nw.relative_update(params=["0.weight", "1.weight"]))
    assert len(control.engine.rules[0].packs) == 1, "the two matrices were meant to share a pack"
    before = [model[k].weight.detach().clone() for k in (0, 1)]
    draw(model, 0)
    opt.step()
    for k, lr in ((0, 0.1), (1, 0.3)):
        assert float((model[k].weight.detach() - before[k]).norm() / before[k].norm()) == pytest.approx(lr, rel=1e-11)


@pytest.mark.parametrize("rules", [nw.hyperball(), nw.relative_update(), nw.hyperball(1.0)])
def test_a_foreign_weight_decay_under_a_rule_on_step_lengths_is_refused_by_name(rules):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    opt = AdamW([{"params": [model[0].weight], "weight_decay": 0.0}, {"params": [model[2].weight], "weight_decay": 0.01}])
    with pytest.raises(nw.PolicyError, match=r"'2\.weight', whose parameter group has weight_decay=0\.01.*Give the group weight_decay=0"):
        nw.attach(model, opt, rules)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and not opt._optimizer_step_pre_hooks
    opt.param_groups[1]["weight_decay"] = 0.0
    nw.attach(model, opt, rules)


def test_a_decay_rule_may_stand_beside_a_relative_update():
    """It acts before the step, so that it is no part of the length."""
    follow(
        [nw.weight_decay(0.5, list(HIDDEN)), nw.relative_update()], MAKE["sgd"],
        lambda old, new, i, s: old * 0.95 + to(new - old, 0.1 * (old * 0.95).norm()),
    )  # fmt: skip


@pytest.mark.parametrize("make", [nw.hyperball, nw.relative_update])
def test_a_weight_that_starts_at_zero_needs_a_floor(make):
    model = net()
    nn.init.zeros_(model[2].weight)
    with pytest.raises(nw.PolicyError, match=r"1 of 1 blocks of '2\.weight' are zero when attached.*Give floor="):
        nw.attach(model, SGD(model.parameters(), lr=0.1), make())
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, make(floor=0.5))
    draw(model, 0)
    opt.step()
    assert float(model[2].weight.norm().detach()) == pytest.approx(0.5 if make is nw.hyperball else 0.05, rel=1e-11)


def test_a_step_of_zero_stays_zero():
    model = net()
    opt = SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, [nw.hyperball(), nw.relative_update(params="4.weight")])
    before = [p.detach().clone() for p in model.parameters()]
    draw(model, 0, 0.0)
    opt.step()
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-15, atol=0)


# ------------------------------------------------------------------------------------------------------ radial brake


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
def test_radial_brake_is_its_formula(make, keep):
    grew: list[bool] = []

    def formula(old: Tensor, new: Tensor, i: int, step: int) -> Tensor:
        grew.append(bool(new.norm() > old.norm()))
        return to(new, old.norm() + keep * (new.norm() - old.norm())) if grew[-1] else new

    _, control = follow(nw.radial_brake(keep), make, formula, scale=0.3)
    assert True in grew and False in grew, "both cases were meant to be tried"
    assert isinstance(control.engine.rules[0], Braked) and not control.verify().rules, "no bound is promised"
    assert control.engine._turn is not None and not control.engine._turn.before, "norms are enough: no copy of the weights"


def test_radial_brake_of_units_equals_the_part_of_the_optimizer_and_counts_what_it_held():
    ours, theirs = net(), net()
    opt = SGD(ours.parameters(), lr=0.1)
    control = nw.attach(ours, opt, nw.radial_brake(0.25, per="unit", every=2))
    for step in range(4):
        draw(ours, step)
        before = {n: p.detach().clone() for n, p in ours.named_parameters()}
        opt.step()
        for n in HIDDEN:
            old, plain = before[n], before[n] - 0.1 * dict(ours.named_parameters())[n].grad
            grown = (plain.norm(dim=1) - old.norm(dim=1)).clamp(min=0)
            held = plain * ((plain.norm(dim=1) - 0.75 * grown) / plain.norm(dim=1))[:, None]
            torch.testing.assert_close(dict(ours.named_parameters())[n].data, held if step % 2 == 0 else plain, rtol=1e-12, atol=1e-14)
        assert next(iter(control.violations().values())) > 0
    assert theirs is not ours


# --------------------------------------------------------------------------------------------------------------- cpr


def algorithm_1(
    make: Callable[..., Optimizer], kappa: Callable[[list[float], int], float], mu: float, steps: int, scale: float
) -> tuple[nn.Module, list[list[float]]]:
    """Franke et al., Algorithm 1, on a copy of the weights before the step: λ ← (λ + μ(R(θ_t) − κ))⁺, θ_{t+1} ← θ_t + Opt − λ·∇‖θ_t‖².

    ``kappa(history of R, t)`` is κ at step t, R the mean square.
    """
    model = net()
    opt = make(model.parameters())
    names = [n for n, p in model.named_parameters() if p.ndim == 2]
    lam, history, found = dict.fromkeys(names, 0.0), {n: [] for n in names}, {n: [] for n in names}
    for step in range(steps):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        draw(model, step, scale)
        opt.step()
        for n in names:
            history[n].append(float(before[n].square().mean()))
            lam[n] = max(0.0, lam[n] + mu * (history[n][-1] - kappa(history[n], step)))
            found[n].append(lam[n])
            dict(model.named_parameters())[n].data.sub_(2 * lam[n] * before[n])
    return model, list(found.values())


def kappa_ip(history: list[float], interval: int) -> float:
    """R at the first look, every ``interval`` steps, at which its second difference is negative."""
    looks = history[::interval]
    for j in range(2, len(looks)):
        if looks[j] - 2 * looks[j - 1] + looks[j - 2] < 0:
            return looks[j]
    return math.inf


KAPPAS: dict[str, tuple[object, Callable[[list[float], int], float]]] = {
    "K": (0.05, lambda h, t: 0.05),
    "a schedule": (nw.schedules.linear(0.05, 0.02, 20), lambda h, t: 0.05 + (0.02 - 0.05) * min(t / 20, 1)),
    "kI0": ("1.2*init", lambda h, t: 1.2 * h[0]),
    "WS": (nw.radii.WarmStart(7), lambda h, t: h[7] if t >= 7 else math.inf),
    "WS 0": (nw.radii.WarmStart(0), lambda h, t: h[0]),
    "IP": (nw.radii.Inflection(3), lambda h, t: kappa_ip(h, 3)),
    "IP 1": (nw.radii.Inflection(1), lambda h, t: kappa_ip(h, 1)),
}


@pytest.mark.parametrize("mu", [1.0, 0.1])
@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
@pytest.mark.parametrize("which", KAPPAS)
def test_cpr_is_algorithm_1(which, make, mu):
    given, kappa = KAPPAS[which]
    twin, multipliers = algorithm_1(make, kappa, mu, steps=30, scale=0.1)
    model = net()
    opt = make(model.parameters())
    control = nw.attach(model, opt, nw.cpr(given, mu=mu))
    for step in range(30):
        draw(model, step, 0.1)
        opt.step()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    found = [float(s["lambda"]) for s in control.state_dict()["rules"][0]["found"].values()]
    assert found == pytest.approx([m[-1] for m in multipliers], rel=1e-9, abs=1e-13)
    assert any(x > 0 for m in multipliers for x in m), "no bound was ever reached, so nothing was compared"
    assert isinstance(control.engine.rules[0], Constrained)


def test_cpr_holds_the_mean_square_near_its_bound():
    """Under a steady gradient weights grow without bound; under CPR their mean square comes back to where it was at the warm start."""
    grown, held = net(), net()
    for model in (grown, held):
        opt = Adam(model.parameters(), lr=0.01)
        control = nw.attach(model, opt, nw.cpr(nw.radii.WarmStart(50))) if model is held else None
        for _ in range(400):
            draw(model, 0)
            opt.step()
    kappa = float(control.state_dict()["rules"][0]["found"]["0.weight"]["kappa"])
    ratio = [float(params(m)[0].square().mean()) / kappa for m in (grown, held)]
    assert ratio[0] > 20 and 0.8 < ratio[1] < 1.2


def test_cpr_leaves_embeddings_biases_and_gains_and_bounds_each_matrix_by_itself():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.rnn, self.out = nn.Embedding(5, 4), nn.LayerNorm(4), nn.GRU(4, 3), nn.Linear(3, 2)

    model = Model()
    explained = nw.Policy(nw.cpr()).explain(model)
    assert {r.name for r in explained.rows if r.blocks} == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"}
    control = nw.attach(model, SGD(model.parameters(), lr=0.1), nw.cpr())
    assert {n: tuple(s["kappa"].shape) for n, s in control.engine.rules[0].store.items()}["rnn.weight_hh_l0"] == (3,)


# ------------------------------------------------------------------------------------------------------ orthogonality


@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_orthogonal_is_the_polar_factor(radius):
    def polar(old: Tensor, new: Tensor, i: int, step: int) -> Tensor:
        u, _, vh = torch.linalg.svd(new, full_matrices=False)
        return radius * u @ vh

    model, control = follow(nw.orthogonal(radius), MAKE["adam"], polar, steps=5)
    w = params(model)[0]
    torch.testing.assert_close(w.mT @ w, radius**2 * torch.eye(6, dtype=F64), rtol=0, atol=1e-12)
    assert control.verify() and control.verify().blocks == 2
    with torch.no_grad():
        w[0, 0] += 1e-3
    assert not control.verify()


def test_orthogonal_penalty_is_the_gradient_and_the_value_of_soft_orthogonality():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tall, self.wide, self.conv, self.head = nn.Linear(3, 5), nn.Linear(5, 3), nn.Conv2d(3, 4, 2), nn.Linear(3, 2)

    torch.manual_seed(0)
    model = Model().to(F64)
    weights = [model.tall.weight, model.wide.weight, model.conv.weight]
    matrices = [w.detach().flatten(1).requires_grad_() for w in weights]
    grams = [m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m for m in matrices]
    loss = sum(((g - torch.eye(len(g), dtype=F64)) ** 2).sum() / 4 for g in grams) * 0.3
    loss.backward()
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, nw.orthogonal_penalty(0.3))
    draw(model, 0)
    wanted = [w.detach() - 0.1 * (w.grad + m.grad.view_as(w)) for w, m in zip(weights, matrices, strict=True)]
    assert control.penalty() == pytest.approx(float(loss.detach()), rel=1e-12)
    head = model.head.weight.detach() - 0.1 * model.head.weight.grad
    opt.step()
    for w, x in zip([*weights, model.head.weight], [*wanted, head], strict=True):
        torch.testing.assert_close(w.detach(), x, rtol=1e-12, atol=1e-14)


def test_orthogonal_penalty_makes_a_matrix_orthogonal_and_goes_down_under_maximize():
    for maximize in (False, True):
        model = net()
        opt = SGD(model.parameters(), lr=0.1, maximize=maximize)
        control = nw.attach(model, opt, nw.orthogonal_penalty(1.0))
        first = control.penalty()
        for _ in range(300):
            draw(model, 0, 0.0)
            opt.step()
        assert control.penalty() < 1e-8 * first
