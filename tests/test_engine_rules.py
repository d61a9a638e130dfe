"""Every named rule on every kind of module, attached: equal, in float64, to its formula written out here by hand.

The twin run knows nothing of normwise: the test changes the twin's gradients, lets torch's own optimizer step, and changes
the twin's weights, each by the rule's formula on matrices that the test itself cuts out of the tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.policy import NAMED

F64 = torch.float64
RATES = {"sgd": 0.1, "adamw": 0.05}
STEPS = 3


# ------------------------------------------------------------------------------------- tensors as (matrix, unit, input)


@dataclass(frozen=True)
class Cut:
    """How one weight is several matrices of (units, inputs), and how these become the tensor again."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, torch.Size], Tensor]


ROWS = Cut(lambda t: t.reshape(1, t.shape[0], -1), lambda m, s: m.reshape(s))
TRANSPOSED = Cut(
    lambda t: t.transpose(0, 1).reshape(1, t.shape[1], -1),
    lambda m, s: m.reshape(s[1], s[0], *s[2:]).transpose(0, 1).contiguous(),
)


def stacked(count: int) -> Cut:
    return Cut(lambda t: t.reshape(count, t.shape[0] // count, -1), lambda m, s: m.reshape(s))


MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Cut]]] = {
    "Linear": (lambda: nn.Linear(5, 4), {"weight": ROWS}),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (3, 2)), {"weight": ROWS}),
    "Conv2d, 2 groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), {"weight": stacked(2)}),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, (3, 2)), {"weight": TRANSPOSED}),
    "Embedding": (lambda: nn.Embedding(7, 4), {"weight": ROWS}),
    "LSTM": (lambda: nn.LSTM(3, 4), {"weight_ih_l0": stacked(4), "weight_hh_l0": stacked(4)}),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(6, 2),
        {"in_proj_weight": stacked(3), "out_proj.weight": ROWS},
    ),
}


def model_of(kind: str, seed: int = 0) -> nn.Module:
    """The module in float64, every entry random (attention starts with zero biases)."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"part": MODULES[kind][0]()}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def cuts_of(kind: str) -> dict[str, Cut]:
    return {f"part.{name}": cut for name, cut in MODULES[kind][1].items()}


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=RATES[kind], momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=RATES[kind], weight_decay=0.0)


# ---------------------------------------------------------------------------------------------- formulas, by hand


def lengths(m: Tensor) -> Tensor:
    """The L2 norm of each unit, kept as a column: ``(s, units, 1)``."""
    return m.square().sum(2, keepdim=True).sqrt()


def soft(x: Tensor, t: float) -> Tensor:
    return torch.where(x > t, x - t, torch.where(x < -t, x + t, torch.zeros_like(x)))


def onto_l1_ball(m: Tensor, radius: float) -> Tensor:
    """Row by row by bisection on the threshold, which needs no sorting: independent of the library's method."""
    low, high = torch.zeros_like(lengths(m)), m.abs().amax(2, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        too_large = (m.abs() - middle).clamp(min=0).sum(2, keepdim=True) > radius
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    inside = m.abs().sum(2, keepdim=True) <= radius
    return torch.where(inside, m, m.sign() * (m.abs() - high).clamp(min=0))


def singular(m: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ torch.diag_embed(change(s)) @ vh


def all_together(gs: dict[str, Tensor]) -> float:
    return float(sum(g.square().sum() for g in gs.values())) ** 0.5


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A rule, and what it does: to the gradients, to the weights before the step and to those after it. ``None``: nothing.

    ``unit``-wise functions get the matrices ``(s, units, inputs)`` of one weight; ``everything`` gets all parameters by name.
    """

    rules: Callable[[], object]
    grad: Callable[[Tensor, Tensor], Tensor] | None = None
    before: Callable[[Tensor, Tensor, float], Tensor] | None = None
    after: Callable[[Tensor, float], Tensor] | None = None
    grads_of_everything: Callable[[Tensors], Tensors] | None = None


CASES: dict[str, list[Case]] = {
    "l1_penalty": [Case(lambda: nw.l1_penalty(0.3), grad=lambda g, w: g + 0.3 * w.sign())],
    "l2_penalty": [Case(lambda: nw.l2_penalty(0.3), grad=lambda g, w: g + 0.3 * w)],
    "elastic_net": [Case(lambda: nw.elastic_net(0.3, 0.2), grad=lambda g, w: g + 0.3 * w.sign() + 0.2 * w)],
    "l1_prox": [Case(lambda: nw.l1_prox(2.0), after=lambda w, lr: soft(w, lr * 2.0))],
    "weight_decay": [Case(lambda: nw.weight_decay(0.3), before=lambda w, w0, lr: w * (1 - lr * 0.3))],
    "decay_to_init": [Case(lambda: nw.decay_to_init(0.3), before=lambda w, w0, lr: w - lr * 0.3 * (w - w0))],
    "group_lasso": [
        Case(lambda: nw.group_lasso(9.0), after=lambda w, lr: w * (1 - lr * 9.0 / lengths(w)).clamp(min=0)),
        Case(
            lambda: nw.group_lasso(9.0, per="input", exclude="class:_ConvNd", optional=True),
            after=lambda w, lr: (w.mT * (1 - lr * 9.0 / lengths(w.mT)).clamp(min=0)).mT,
        ),
    ],
    "nuclear_prox": [
        Case(lambda: nw.nuclear_prox(5.0), after=lambda w, lr: singular(w, lambda s: (s - lr * 5.0).clamp(min=0)))
    ],
    "max_norm": [Case(lambda: nw.max_norm(1.5), after=lambda w, lr: w * (1.5 / lengths(w)).clamp(max=1))],
    "unit_norm": [
        Case(lambda: nw.unit_norm(), after=lambda w, lr: w / lengths(w)),
        Case(lambda: nw.unit_norm(2.0), after=lambda w, lr: w * 2.0 / lengths(w)),
    ],
    "min_max_norm": [
        Case(lambda: nw.min_max_norm(1.9, 2.1), after=lambda w, lr: w * lengths(w).clamp(1.9, 2.1) / lengths(w)),
        Case(
            lambda: nw.min_max_norm(1.9, 2.1, rate=0.25),
            after=lambda w, lr: w * (0.25 * lengths(w).clamp(1.9, 2.1) + 0.75 * lengths(w)) / lengths(w),
        ),
    ],
    "clip_weight_value": [
        Case(lambda: nw.clip_weight_value(0.5), after=lambda w, lr: w.clamp(-0.5, 0.5)),
        Case(lambda: nw.clip_weight_value(-0.25, 0.5), after=lambda w, lr: w.clamp(-0.25, 0.5)),
    ],
    "clip_weight_norm": [
        Case(lambda: nw.clip_weight_norm(2.0), after=lambda w, lr: w * min(1.0, 2.0 / float(w.square().sum()) ** 0.5)),
        Case(lambda: nw.clip_weight_norm(5.0, norm="l1"), after=lambda w, lr: w * min(1.0, 5.0 / float(w.abs().sum()))),
    ],
    "non_negative": [Case(lambda: nw.non_negative(), after=lambda w, lr: w * (w > 0))],
    "l1_ball": [Case(lambda: nw.l1_ball(2.0), after=lambda w, lr: onto_l1_ball(w, 2.0))],
    "spectral_cap": [Case(lambda: nw.spectral_cap(1.0), after=lambda w, lr: singular(w, lambda s: s.clamp(max=1.0)))],
    "spectral_normalize": [
        Case(lambda: nw.spectral_normalize(2.0), after=lambda w, lr: singular(w, lambda s: 2.0 * s / s[:, :1]))
    ],
    "clip_grad_norm": [
        Case(
            lambda: nw.clip_grad_norm(0.5),
            grads_of_everything=lambda gs: {n: g * min(1.0, 0.5 / all_together(gs)) for n, g in gs.items()},
        ),
        Case(
            lambda: nw.clip_grad_norm(0.5, per="tensor"),
            grads_of_everything=lambda gs: {n: g * min(1.0, 0.5 / float(g.norm())) for n, g in gs.items()},
        ),
    ],
    "clip_grad_value": [
        Case(
            lambda: nw.clip_grad_value(0.4),
            grads_of_everything=lambda gs: {n: g.clamp(-0.4, 0.4) for n, g in gs.items()},
        )
    ],
    "normalize_grad": [Case(lambda: nw.normalize_grad(3.0), grad=lambda g, w: g * 3.0 / g.square().sum().sqrt())],
    "agc": [
        Case(
            lambda: nw.agc(0.2, "role:matrix", eps=1e-3),
            grad=lambda g, w: g * (0.2 * lengths(w).clamp(min=1e-3) / lengths(g)).clamp(max=1),
        )
    ],
}


def twin_step(case: Case, kind: str, twin: nn.Module, twin_opt: torch.optim.Optimizer, start: Tensors) -> None:
    """One step of the twin under the formulas of ``case``."""
    lr = twin_opt.param_groups[0]["lr"]
    params = dict(twin.named_parameters())
    with torch.no_grad():
        if case.grads_of_everything:
            changed = case.grads_of_everything({n: p.grad.clone() for n, p in params.items()})
            for name, g in changed.items():
                params[name].grad.copy_(g)
        for name, cut in cuts_of(kind).items():
            p = params[name]
            if case.grad:
                p.grad.copy_(cut.back(case.grad(cut.to(p.grad), cut.to(p)), p.shape))
            if case.before:
                p.copy_(cut.back(case.before(cut.to(p), cut.to(start[name]), lr), p.shape))
        twin_opt.step()
        for name, cut in cuts_of(kind).items():
            p = params[name]
            if case.after:
                p.copy_(cut.back(case.after(cut.to(p), lr), p.shape))


def draw_gradients(model: nn.Module, twin: nn.Module, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn(p.shape, dtype=F64, generator=gen)
        q.grad = p.grad.clone()


def case_ids() -> Iterable[tuple[str, int]]:
    return ((name, i) for name, cases in CASES.items() for i in range(len(cases)))


def applies(case: Case, kind: str) -> bool:
    """A rule on inputs leaves convolutions out here: their inputs are not the columns that the test cuts."""
    rule = case.rules()
    return not (isinstance(rule, nw.Rule) and rule.per == "input" and kind.startswith("Conv"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize(("name", "i"), list(case_ids()), ids=lambda v: str(v))
def test_an_attached_rule_equals_its_formula(name, i, kind, optimizer, coverage):
    case = CASES[name][i]
    if not applies(case, kind):
        with pytest.raises(nw.PolicyError, match="excluded"):
            nw.attach(model_of(kind), optimizer_of(optimizer, model_of(kind)), case.rules())
        return
    model = model_of(kind)
    twin = copy.deepcopy(model)
    start = {n: p.detach().clone() for n, p in twin.named_parameters()}
    opt, twin_opt = optimizer_of(optimizer, model), optimizer_of(optimizer, twin)
    nw.attach(model, opt, case.rules())
    for seed in range(STEPS):
        draw_gradients(model, twin, seed)
        opt.step()
        twin_step(case, kind, twin, twin_opt, start)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert changed, "the step moved nothing, so nothing was compared"
    coverage("rule × module type", name, kind, optimizer=optimizer)


def test_every_named_rule_is_covered_and_every_case_does_something():
    """Two steps, since decay towards the initial weights does nothing in the first."""
    assert set(CASES) <= set(NAMED)
    others = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py") if p != Path(__file__)]
    for name in set(NAMED) - set(CASES):  # rules with a state of their own have their formulas in a file of their own
        assert any(f"nw.{name}(" in text for text in others), f"the named rule {name} has no formula in any test"
    for name, cases in CASES.items():
        for case in cases:
            model = model_of("Linear")
            twin = copy.deepcopy(model)
            opt, plain = optimizer_of("sgd", model), optimizer_of("sgd", twin)
            nw.attach(model, opt, case.rules())
            for seed in range(2):
                draw_gradients(model, twin, seed)
                opt.step()
                plain.step()
            assert not torch.allclose(model["part"].weight, twin["part"].weight, rtol=1e-6), f"{name} changed nothing"


# --------------------------------------------------------------------------------------------- decay, prox and rates


def test_weight_decay_is_torchs_own_bit_for_bit():
    model = model_of("Linear")
    twin = copy.deepcopy(model)
    ours = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.3)
    nw.attach(model, ours, nw.weight_decay(0.3, "role:all"))
    for seed in range(20):
        draw_gradients(model, twin, seed)
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_prox_and_decay_use_the_rate_of_each_group_as_a_scheduler_changes_it(as_tensor):
    torch.manual_seed(0)
    model = nn.ModuleDict({"slow": nn.Linear(3, 4), "fast": nn.Linear(3, 4)}).double()
    rates = {"slow": 0.01, "fast": 0.1}
    rate = (lambda r: torch.tensor(r, dtype=F64)) if as_tensor else float
    opt = torch.optim.SGD([{"params": model[k].parameters(), "lr": rate(r)} for k, r in rates.items()], lr=rate(1.0))
    nw.attach(model, opt, [nw.l1_prox(2.0), nw.weight_decay(0.5)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    expected = {k: model[k].weight.detach().clone() for k in rates}
    for step in range(3):
        gen = torch.Generator().manual_seed(step)
        for k in rates:
            model[k].weight.grad = torch.randn(4, 3, dtype=F64, generator=gen)
            lr = rates[k] * 0.5**step
            expected[k] = soft(expected[k] * (1 - lr * 0.5) - lr * model[k].weight.grad, lr * 2.0)
        opt.step()
        scheduler.step()
    for k in rates:
        torch.testing.assert_close(model[k].weight.detach(), expected[k], rtol=1e-12, atol=1e-14)


def test_prox_gives_exact_zeros_and_a_soft_threshold_removes_whole_units():
    model = model_of("Linear")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, nw.l1_prox(5.0))
    model["part"].weight.grad = torch.zeros_like(model["part"].weight)
    small = model["part"].weight.detach().abs() <= 0.5
    opt.step()
    assert 0 < small.sum() < small.numel()
    assert torch.equal(model["part"].weight == 0, small)


def test_a_loaded_optimizer_state_replaces_the_groups_and_later_rates_are_seen():
    model = model_of("Linear")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, opt, nw.weight_decay(1.0, "role:all"))
    weight = model["part"].weight
    weight.grad = torch.zeros_like(weight)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"] = 0.25
    before = weight.detach().clone()
    opt.step()
    assert torch.equal(weight.detach(), before * 0.75)


def test_a_penalty_lowers_the_norm_under_an_optimizer_that_maximises():
    """With ``maximize=True`` the objective minus the penalty is what grows; torch's own weight_decay does the same."""
    model = model_of("Linear")
    twin = copy.deepcopy(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, maximize=True, weight_decay=0.3)
    nw.attach(model, ours, nw.l2_penalty(0.3, "role:all"))
    for seed in range(3):
        draw_gradients(model, twin, seed)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------- centers, radii, schedules


def run_steps(model: nn.Module, opt: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> list[Tensor]:
    """Steps under drawn gradients; the weight of ``part`` after each."""
    seen = []
    for seed in range(steps):
        gen = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, dtype=p.dtype, generator=gen)
        opt.step()
        seen.append(model["part"].weight.detach().clone())
    return seen


def plain_run(rules: object, steps: int, scale: float = 1.0, lr: float = 0.1) -> tuple[list[Tensor], Tensor, nw.Control]:
    """Weights after each step of gradient descent under ``rules``, the weights at the start, the control."""
    model = model_of("Linear")
    start = model["part"].weight.detach().clone()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    control = nw.attach(model, opt, rules)
    return run_steps(model, opt, steps, scale), start, control


def gradient(seed: int) -> Tensor:
    return torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_a_ball_around_the_initial_weights():
    seen, start, control = plain_run(nw.max_norm(0.2, center="init"), 4)
    w = start
    for step, now in enumerate(seen):
        moved = w - 0.1 * gradient(step) - start
        w = start + moved * (0.2 / moved.norm(dim=1, keepdim=True)).clamp(max=1)
        torch.testing.assert_close(now, w, rtol=1e-12, atol=1e-13)
    assert control.verify()


def test_a_ball_around_given_weights_whatever_wrapper_they_were_saved_from():
    model = model_of("Linear")
    other = {f"module.{n}": torch.zeros_like(p) + 0.5 for n, p in model.named_parameters()}
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, nw.max_norm(0.2, center=other))
    run_steps(model, opt, 1)
    assert control.verify()
    assert (model["part"].weight - 0.5).norm(dim=1).max() <= 0.2
    assert (model["part"].weight - 0.5).norm(dim=1).min() > 0.19


@pytest.mark.parametrize("action", ["penalty", "prox"])
def test_penalties_around_the_initial_weights(action):
    seen, start, _ = plain_run(nw.Rule(action=action, norm="l1", strength=0.3, center="init"), 3)
    w = start
    for step, now in enumerate(seen):
        if action == "penalty":
            w = w - 0.1 * (gradient(step) + 0.3 * (w - start).sign())
        else:
            w = start + soft(w - 0.1 * gradient(step) - start, 0.03)
        torch.testing.assert_close(now, w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("radius", "scale"), [("init", 1.0), ("0.5*init", 0.5), (nw.radii.Init(nw.schedules.linear(1.0, 0.4, 3)), None)])
def test_a_radius_of_the_initial_norm_is_stored_when_attached(radius, scale):
    seen, start, control = plain_run(nw.unit_norm(radius), 5)
    for step, now in enumerate(seen):
        share = scale if scale is not None else (1.0, 0.8, 0.6, 0.4, 0.4)[step]
        torch.testing.assert_close(now.norm(dim=1), share * start.norm(dim=1), rtol=1e-12, atol=0)
    assert control.verify()


def test_init_on_a_zero_block_is_an_error_unless_a_floor_is_given():
    model = model_of("Linear")
    with torch.no_grad():
        model["part"].weight[1] = 0
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match=r"1 of 4 blocks of 'part.weight'.*floor"):
        nw.attach(model, opt, nw.unit_norm("init"))
    start = model["part"].weight.detach().norm(dim=1)
    control = nw.attach(model, opt, nw.Rule(action="normalize", per="unit", radius="init", floor=0.25))
    run_steps(model, opt, 1)
    torch.testing.assert_close(model["part"].weight.detach().norm(dim=1), start.clamp(min=0.25), rtol=1e-12, atol=0)
    assert control.verify()


@pytest.mark.parametrize(
    "schedule",
    [nw.schedules.linear(2.0, 0.5, 4), nw.schedules.cosine(2.0, 0.5, 4), nw.schedules.warmup(2.0, 4, start=0.5),
     lambda step: 2.0 / (1 + step)],
    ids=["linear", "cosine", "warmup", "function"],
)
def test_a_radius_that_is_a_schedule_of_the_step(schedule):
    by_hand = {
        0: [2.0, 1.625, 1.25, 0.875, 0.5, 0.5],
        1: [0.5 + 0.75 * (1 + torch.cos(torch.tensor(torch.pi * min(s / 4, 1), dtype=F64)).item()) for s in range(6)],
        2: [0.5, 0.875, 1.25, 1.625, 2.0, 2.0],
        3: [2.0 / (1 + s) for s in range(6)],
    }
    kinds = (type(nw.schedules.linear(1, 1, 1)), type(nw.schedules.cosine(1, 1, 1)), type(nw.schedules.warmup(1, 1)))
    which = next((i for i, kind in enumerate(kinds) if type(schedule) is kind), 3)
    seen, _, control = plain_run(nw.unit_norm(schedule), 6)
    for now, expected in zip(seen, by_hand[which], strict=True):
        torch.testing.assert_close(now.norm(dim=1), torch.full((4,), expected, dtype=F64), rtol=1e-12, atol=0)
    assert control.verify()


def test_a_strength_that_is_a_schedule_of_the_step():
    seen, start, _ = plain_run(nw.l2_penalty(nw.schedules.linear(0.0, 1.0, 2)), 4)
    w = start
    for step, now in enumerate(seen):
        w = w - 0.1 * (gradient(step) + min(step / 2, 1.0) * w)
        torch.testing.assert_close(now, w, rtol=1e-12, atol=1e-13)


def test_every_start_and_stop():
    """Acts on steps 2, 4 and 6 of nine, counted from 0."""
    seen, _, control = plain_run(nw.unit_norm(every=2, start=2, stop=7), 9)
    held = [bool(((w.norm(dim=1) - 1).abs() < 1e-12).all()) for w in seen]
    assert held == [False, False, True, False, True, False, True, False, False]
    assert control.verify().not_enforced == ["normalize l2/unit = 1"]


def test_rules_of_one_phase_act_in_the_policys_order():
    """Clamping entries and then normalising units is not the reverse."""
    clamp, unit = nw.clip_weight_value(0.3), nw.unit_norm()
    first, start, _ = plain_run([clamp, unit], 1)
    second, _, _ = plain_run([unit, clamp], 1)
    stepped = start - 0.1 * gradient(0)
    clamped = stepped.clamp(-0.3, 0.3)
    torch.testing.assert_close(first[0], clamped / clamped.norm(dim=1, keepdim=True), rtol=1e-12, atol=0)
    scaled = stepped / stepped.norm(dim=1, keepdim=True)
    torch.testing.assert_close(second[0], scaled.clamp(-0.3, 0.3), rtol=1e-12, atol=0)


def test_penalty_then_clip_then_decay_then_step_then_prox_then_ball():
    rules = [nw.max_norm(1.0), nw.l1_prox(0.5), nw.weight_decay(0.4), nw.clip_grad_norm(1.0), nw.l2_penalty(0.3)]
    seen, start, _ = plain_run(rules, 1, scale=3.0)
    bias = torch.randn(4, 5, dtype=F64, generator=(gen := torch.Generator().manual_seed(0)))  # the weight's is drawn first
    g, b = 3.0 * bias + 0.3 * start, 3.0 * torch.randn(4, dtype=F64, generator=gen)
    g = g / (g.square().sum() + b.square().sum()).sqrt()
    w = soft(start * (1 - 0.1 * 0.4) - 0.1 * g, 0.05)
    w = w * (1.0 / w.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(seen[0], w, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- updates

UPDATES: dict[str, tuple[nw.Rule, Callable[[Tensor, Tensor], Tensor]]] = {
    "clip_norm": (
        nw.Rule(action="clip_norm", on="update", per="unit", radius=0.1),
        lambda u, w: u * (0.1 / u.norm(dim=1, keepdim=True)).clamp(max=1),
    ),
    "project": (nw.Rule(action="project", on="update", norm="linf", radius=0.05), lambda u, w: u.clamp(-0.05, 0.05)),
    "normalize": (nw.Rule(action="normalize", on="update", per="tensor", radius=0.3), lambda u, w: u * 0.3 / u.norm()),
    "lmo": (
        nw.Rule(action="lmo", on="update", norm="spectral", per="tensor"),
        lambda u, w: singular(u[None], torch.ones_like)[0],
    ),
    "relative": (
        nw.Rule(action="normalize", on="update", per="unit", radius=nw.radii.Relative(0.02)),
        lambda u, w: u * 0.02 * w.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True),
    ),
}


@pytest.mark.parametrize("name", list(UPDATES))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rule_on_the_update(name, optimizer):
    """The update is what the optimizer's own step did: our decay comes before it and is no part of it."""
    rule, formula = UPDATES[name]
    model = model_of("Linear")
    twin = copy.deepcopy(model)
    opt, twin_opt = optimizer_of(optimizer, model), optimizer_of(optimizer, twin)
    nw.attach(model, opt, [rule, nw.weight_decay(0.4)])
    for seed in range(3):
        draw_gradients(model, twin, seed)
        opt.step()
        with torch.no_grad():
            w = twin["part"].weight
            w.mul_(1 - RATES[optimizer] * 0.4)
            before = w.clone()
            twin_opt.step()
            w.copy_(before + formula(w - before, before))
    torch.testing.assert_close(model["part"].weight, twin["part"].weight, rtol=1e-11, atol=1e-12)


def test_a_normalised_direction_replaces_the_gradient():
    """``lmo`` on the gradient: sign descent under LInf."""
    seen, start, _ = plain_run(nw.Rule(action="lmo", norm="linf"), 1)
    torch.testing.assert_close(seen[0], start - 0.1 * gradient(0).sign(), rtol=1e-13, atol=0)


def test_agc_leaves_the_head_out_by_default_as_the_paper_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    nw.attach(model, opt, nw.agc(0.01))
    draw_gradients(model, twin, 0)
    opt.step()
    for p, q, clipped in zip(model.parameters(), twin.parameters(), (True, False, False, False), strict=True):
        moved, g = p.detach() - q.detach(), q.grad
        if clipped:
            g = g * (0.01 * q.detach().norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)).clamp(max=1)
        torch.testing.assert_close(moved, -g, rtol=1e-10, atol=1e-12)
