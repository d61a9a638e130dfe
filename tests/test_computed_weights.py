"""Rules on weights that a module computes from other tensors: the weight that the module uses obeys, or the rule is refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import normwise as nw
from normwise.errors import PolicyError
from normwise.parameters.inventory import Inventory
from normwise.parameters.layouts import Layout

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*steps under a norm are taken in raw.*")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Doubled(nn.Module):
    """w = 2x."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


class Softplus(nn.Module):
    """Positive weights; zero is out of reach."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w + torch.log(-torch.expm1(-w))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.triu()


class OneWay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class LoRA(nn.Module):
    """w = x + BA, merged."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, columns) * 0.3), nn.Parameter(torch.randn(rows, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.B @ self.A


class Factors(nn.Module):
    """w = AB of full rank, from a singular value decomposition."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return u * s.sqrt(), s.sqrt()[:, None] * vh


def _noisy_mask(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    prune.custom_from_mask(layer, "weight", (torch.rand(layer.weight.shape, generator=generator) < 0.6).to(layer.weight.dtype))


ACTING: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight_norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "old weight_norm": utils.weight_norm,
    "old weight_norm of all": lambda layer: utils.weight_norm(layer, dim=None),
    "mask": _noisy_mask,
    "masks": lambda layer: [prune.l1_unstructured(layer, "weight", 0.2), prune.random_unstructured(layer, "weight", 0.2)],
    "doubled": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "chain": lambda layer: [
        parametrizations.weight_norm(layer), parametrize.register_parametrization(layer, "weight", Doubled()),
    ],
}  # fmt: skip


SHORT = ["weight_norm", "weight_norm over inputs", "old weight_norm", "mask", "chain"]
LONGER = [pytest.param(kind, marks=pytest.mark.long) for kind in ACTING if kind not in SHORT]


def net(make: Callable[[nn.Module], Any] | None, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)
    if make is not None:
        make(model[0])
    return model


def train(model: nn.Module, rules: Any, optimizer: Any = None, steps: int = 8, check: Callable[[int], None] | None = None) -> nw.Control:
    """Gradients of a plain square loss; the weights move by a few per cent a step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.3)
    control = nw.attach(model, optimizer, rules)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x, y = (torch.randn(16, n, generator=generator).to(next(model.parameters()).dtype) for n in (10, 4))
        optimizer.zero_grad()
        (model(x) - 2 * y).float().square().mean().backward()
        optimizer.step()
        if check:
            check(step)
    return control


def weight(model: Any) -> Tensor:
    """What the module uses in its next forward pass, in float64."""
    with torch.no_grad():
        model(torch.zeros(1, 10, dtype=next(model.parameters()).dtype))
    return model[0].weight.detach().double().clone()


# ------------------------------------------------------------------------------------------------------------- bounds

BOUNDS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor], float]] = {
    "max_norm": (lambda: nw.max_norm(0.3), lambda w: w.norm(dim=1).max(), 0.3),
    "tensor": (lambda: nw.Rule(action="clip_norm", radius=0.9), lambda w: w.norm(), 0.9),
    "input": (lambda: nw.max_norm(0.3, per="input"), lambda w: w.norm(dim=0).max(), 0.3),
    "linf": (lambda: nw.clip_weight_value(0.06), lambda w: w.abs().max(), 0.06),
    "l1 ball": (lambda: nw.Rule(action="project", norm="l1", per="unit", radius=0.5), lambda w: w.abs().sum(1).max(), 0.5),
    "spectral radially": (lambda: nw.Rule(action="clip_norm", norm="spectral", radius=0.4), lambda w: torch.linalg.matrix_norm(w, 2), 0.4),
    "global": (lambda: nw.Rule(action="clip_norm", per="global", radius=1.1, params=["0.weight", "0.bias"]), lambda w: w.norm(), 1.1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", [*SHORT, *LONGER])
def test_the_weight_that_the_module_uses_keeps_its_bound(kind: str, bound: str, dtype: torch.dtype) -> None:
    rule, measure, limit = BOUNDS[bound]
    free, model = (net(ACTING[kind], dtype) for _ in range(2))
    train(free, [nw.max_norm(100.0, params="2.weight")])
    assert measure(weight(free)) > limit * 1.05, "nothing would have to act, so nothing is proved"
    seen: list[Tensor] = []
    control = train(model, rule(), check=lambda step: seen.append(measure(weight(model))))
    assert max(seen) <= limit
    assert max(seen) > 0.9 * limit, "aimed too far inside"
    verification = control.verify()
    assert verification and verification.blocks > 0


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.05, eps=1e-4)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["weight_norm", "chain", *LONGER])
def test_a_bound_holds_after_each_of_fifty_steps(kind: str, dtype: torch.dtype, optimizer: Any) -> None:
    model = net(ACTING[kind], dtype)
    seen = []
    train(model, nw.max_norm(0.25), optimizer(model.parameters()), 50, lambda step: seen.append(weight(model).norm(dim=1).max()))
    assert len(seen) == 50 and max(seen) <= 0.25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((40, 300), 0), ((8, 7, 3, 3), 0), ((6, 5, 9), 2), ((3, 2000), 0), ((4, 6), None)])
def test_convolutions_and_long_vectors(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> None:
    """With dim=2, as in wav2vec 2.0, a magnitude belongs to no unit, so that the directions must turn."""
    torch.manual_seed(1)
    made = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[len(shape)](shape[1], shape[0], *([shape[2:]] if len(shape) > 2 else []), bias=False)
    layer = parametrizations.weight_norm(made.to(dtype), dim=dim)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    start = layer.weight.detach().double().flatten(1).norm(dim=1)
    radius = float(start.median())
    nw.attach(layer, optimizer, [nw.max_norm(radius)])
    for _ in range(5):
        for p in layer.parameters():
            p.grad = torch.randn_like(p) * 0.05
        optimizer.step()
        assert layer.weight.detach().double().flatten(1).norm(dim=1).max() <= radius


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTING)
def test_spheres_and_radii_of_the_first_weight(kind: str, dtype: torch.dtype) -> None:
    model, eps = net(ACTING[kind], dtype), torch.finfo(dtype).eps
    control = train(model, nw.unit_norm(0.4))
    assert (weight(model).norm(dim=1) - 0.4).abs().max() <= 0.4 * eps * (8 if dtype is not torch.float32 else 20)
    assert control.verify()
    model = net(ACTING[kind], dtype)
    start = weight(model).norm(dim=1)
    control = train(model, nw.Rule(action="normalize", per="unit", radius="1.5*init"))
    assert (weight(model).norm(dim=1) / start / 1.5 - 1).abs().max() <= 20 * eps
    assert control.verify()


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "mask", "chain"])
def test_trust_regions_around_the_first_weight(kind: str) -> None:
    model = net(ACTING[kind])
    start = weight(model)
    control = train(model, nw.max_norm(0.05, center="init"))
    distance = (weight(model) - start).norm(dim=1)
    assert 0.045 < distance.max() <= 0.05 and control.verify()


def test_a_trust_region_below_what_rounding_does_to_the_weight_is_refused() -> None:
    model = net(parametrizations.weight_norm, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match=r"whose rounding moves it by more than 0\.001"):
        nw.attach(model, optimizer, [nw.max_norm(1e-3, params="0.weight", center="init")])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("make", [None, parametrizations.weight_norm, _noisy_mask])
def test_shells_are_kept_from_both_sides(make: Any, dtype: torch.dtype) -> None:
    """Around a center too; in float64 the inner radius was rounded to fp32, of plain weights as well."""
    model = net(make, dtype)
    assert train(model, nw.min_max_norm(0.3, 0.4)).verify()
    model = net(make, dtype)
    around = nw.Rule(params="0.weight", action="clip_norm", per="unit", radius=0.2, min_radius=0.15, center="init")
    start = weight(model)
    assert train(model, around).verify()
    assert (weight(model) - start).norm(dim=1).min() > 0.1499 and (weight(model) - start).norm(dim=1).max() <= 0.2


def test_verify_measures_the_computed_weight() -> None:
    model = net(parametrizations.weight_norm)
    control = train(model, nw.max_norm(0.3))
    with torch.no_grad():
        model[0].parametrizations.weight.original0[5] = 0.4
    breach = control.verify().breaches[0]
    assert (breach.parameter, breach.block) == ("0.weight", 5) and breach.value == pytest.approx(0.4, rel=1e-6)
    with torch.no_grad():
        model[0].parametrizations.weight.original0[5] = 0.2
        model[0].parametrizations.weight.original1.mul_(100)    # which is not the weight's norm
    assert control.verify()


# ------------------------------------------------------------------------------------- against the formula, one step


def one_step(kind: str, rule: Any, lr: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """The weight before the step, after the optimizer alone, and after the optimizer with the rule."""
    alone, ruled = net(ACTING[kind]), net(ACTING[kind])
    before = weight(alone)
    train(alone, nw.max_norm(1e3), torch.optim.SGD(alone.parameters(), lr), steps=1)
    train(ruled, rule, torch.optim.SGD(ruled.parameters(), lr), steps=1)
    return before, weight(alone), weight(ruled)


KINDS = ["weight_norm", "old weight_norm", "weight_norm over inputs", "mask", "doubled", "chain"]


@pytest.mark.parametrize("kind", KINDS)
def test_prox_is_that_of_the_weight(kind: str) -> None:
    _, stepped, got = one_step(kind, nw.l1_prox(0.4, params="0.weight"))
    wanted = stepped.sign() * (stepped.abs() - 0.04).clamp(min=0)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert (got == 0).sum() == (wanted == 0).sum() > 5
    length = stepped.norm(dim=1, keepdim=True)
    _, stepped, got = one_step(kind, nw.group_lasso(float(length.median()) / 0.1, params="0.weight"))
    torch.testing.assert_close(got, stepped * (1 - length.median() / length).clamp(min=0), atol=1e-6, rtol=1e-5)
    assert bool((got.norm(dim=1) == 0).any()) and bool((got.norm(dim=1) > 0).any())


@pytest.mark.parametrize("kind", KINDS)
def test_decay_multiplies_the_weight(kind: str) -> None:
    """Before the step, so that a step of length zero shows it alone."""
    model = net(ACTING[kind])
    before = weight(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, [nw.weight_decay(0.5, params="0.weight")])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(weight(model), before * 0.95, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_cpr_shrinks_the_weight_by_its_own_mean_square(kind: str) -> None:
    model = net(ACTING[kind])
    before = weight(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, [nw.cpr(0.01, params="0.weight")])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    multiplier = (before.square().mean() - 0.01).clamp(min=0)
    torch.testing.assert_close(weight(model), before * (1 - 2 * multiplier), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "spectral_norm", "orthogonal", "one way", "lora"])
def test_a_penalty_reaches_every_raw_tensor_by_the_chain_rule(kind: str) -> None:
    """Also where no other rule can act, since it needs no inverse. Against autograd through the module's own weight."""
    make = {
        **ACTING, "spectral_norm": parametrizations.spectral_norm, "orthogonal": parametrizations.orthogonal,
        "one way": lambda layer: parametrize.register_parametrization(layer, "weight", OneWay()),
        "lora": lambda layer: parametrize.register_parametrization(layer, "weight", LoRA(12, 10)),
    }[kind]  # fmt: skip
    model = net(make).eval()
    model(torch.zeros(1, 10))
    (0.7 * model[0].weight.abs().sum()).backward(retain_graph=True)
    wanted = {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model[0].named_parameters()}
    value = 0.7 * float(model[0].weight.detach().abs().sum())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, [nw.l1_penalty(0.7, params="0.weight")])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert control.penalty() == pytest.approx(value, rel=1e-6)
    optimizer.step()
    for name, p in model[0].named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-4)
    assert model[0].training


@pytest.mark.parametrize("kind", KINDS)
def test_rules_on_updates_mean_the_weights_update(kind: str) -> None:
    rule = nw.Rule(params="0.weight", action="clip_norm", on="update", per="unit", radius=0.003)
    before, stepped, got = one_step(kind, rule)
    change = stepped - before
    length = change.norm(dim=1, keepdim=True)
    assert bool((length > 0.003).any())
    torch.testing.assert_close(got, before + change * (0.003 / length).clamp(max=1), atol=2e-6, rtol=1e-5)


def test_hyperball_on_any_optimizer_keeps_the_weight_on_its_sphere_and_its_step_at_its_length() -> None:
    model = net(parametrizations.weight_norm)
    before = weight(model)
    control = train(model, nw.hyperball(params="0.weight"), torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.0), steps=1)
    after = weight(model)
    assert after.norm() == pytest.approx(float(before.norm()), rel=1e-5) and control.verify()
    assert 0.02 < float((after - before).norm() / before.norm()) < 0.06


def test_rules_within_a_presets_step_take_the_weights_update_too() -> None:
    model = net(parametrizations.weight_norm)
    before = weight(model)
    rule = nw.Rule(params="0.weight", action="clip_norm", on="update", radius=0.01)
    optimizer = nw.optim.AdamW(model, lr=0.1, policy=[rule])
    model(torch.randn(8, 10)).square().sum().backward()
    optimizer.step()
    assert float((weight(model) - before).norm()) == pytest.approx(0.01, rel=1e-4)


def test_qk_clip_scales_the_heads_of_the_weight() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))

    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention()})
    for layer in (model["attn"].q_proj, model["attn"].k_proj):
        parametrizations.weight_norm(layer)
    before = model["attn"].q_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, [nw.qk_clip(10.0, params="attn.[qk]_proj.weight", heads=2)])
    control.report_max_logits("attn.q_proj", torch.tensor([40.0, 5.0]))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model["attn"].q_proj.weight[:4], before[:4] / 2)
    assert torch.equal(model["attn"].q_proj.weight[4:], before[4:])


# ------------------------------------------------------------------------------------------- what stays as it was


def test_radial_rules_touch_only_the_magnitude_of_units_that_are_too_long() -> None:
    model = net(parametrizations.weight_norm)
    raw = model[0].parametrizations.weight
    lengths = weight(model).norm(dim=1)
    radius = float(lengths.median())
    g, v = raw.original0.detach().clone(), raw.original1.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    nw.attach(model, optimizer, [nw.max_norm(radius, params="0.weight")])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(raw.original1, v)
    short = lengths < radius * 0.999
    assert torch.equal(raw.original0[short], g[short]) and not torch.equal(raw.original0, g)


def test_a_unit_of_zeros_is_a_magnitude_of_zero_and_can_come_back() -> None:
    """With a direction of zeros the weight would be 0/0."""
    model = net(parametrizations.weight_norm)
    raw = model[0].parametrizations.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.group_lasso(100.0, params="0.weight")])
    model(torch.randn(4, 10)).square().sum().backward()
    optimizer.step()
    assert torch.equal(weight(model), torch.zeros(12, 10, dtype=torch.float64))
    assert bool((raw.original1.norm(dim=1) > 0).all())
    control.remove()
    optimizer.zero_grad()
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    assert bool(weight(model).isfinite().all()) and bool((weight(model) != 0).any())


def test_what_a_mask_hides_keeps_its_raw_value() -> None:
    model = net(_noisy_mask)
    hidden = model[0].weight_mask == 0
    raw = model[0].weight_orig.detach().clone()
    train(model, [nw.max_norm(0.2), nw.weight_decay(0.3)])
    assert torch.equal(model[0].weight_orig[hidden], raw[hidden])


def test_looking_takes_no_step_of_a_power_iteration() -> None:
    model = net(parametrizations.spectral_norm)
    u = model[0].parametrizations.weight[0]._u.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.l2_penalty(0.1, params="0.weight")])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    control.norms(), control.penalty(), control.verify()
    assert torch.equal(model[0].parametrizations.weight[0]._u, u)


def test_plain_weights_beside_a_computed_one_are_bit_for_bit_as_without_it() -> None:
    """The distance from the bound that computing a weight needs is its own."""
    models = [net(make) for make in (parametrizations.weight_norm, None)]
    for model in models:
        with torch.no_grad():
            model[2].weight.copy_(torch.linspace(-3, 3, 48).view(4, 12))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        nw.attach(model, optimizer, [nw.max_norm(0.3)])
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(models[0][2].weight, models[1][2].weight)


# --------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "spectral_norm": (parametrizations.spectral_norm, "spectral_norm divides by the largest singular value"),
    "old spectral_norm": (utils.spectral_norm, "spectral_norm divides by the largest singular value"),
    "orthogonal": (parametrizations.orthogonal, "fixes every singular value"),
    "cayley": (lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"), "fixes every singular value"),
    "no inverse": (lambda layer: parametrize.register_parametrization(layer, "weight", OneWay()), "OneWay has no right_inverse"),
    "lora": (lambda layer: parametrize.register_parametrization(layer, "weight", LoRA(12, 10)), "LoRA has no right_inverse"),
    "chain": (
        lambda layer: [parametrizations.weight_norm(layer), parametrize.register_parametrization(layer, "weight", OneWay())],
        "OneWay has no right_inverse",
    ),
    "two hooks": (lambda layer: [utils.weight_norm(layer), prune.l1_unstructured(layer, "weight_v", 0.3)], "two steps"),
}


@pytest.mark.parametrize("rule", [
    lambda: nw.max_norm(0.3), lambda: nw.unit_norm(), lambda: nw.spectral_cap(1.0), lambda: nw.l1_prox(0.1), lambda: nw.weight_decay(0.1),
    lambda: nw.cpr(0.01), lambda: nw.Rule(action="clip_norm", on="update", radius=0.1), lambda: nw.max_norm("init"),
])  # fmt: skip
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_raw_tensor_can_give_is_refused_before_anything_changes(kind: str, rule: Callable[[], Any]) -> None:
    make, reason = REFUSED[kind]
    model = net(make)
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match=reason) as caught:
        nw.attach(model, optimizer, [rule()])
    assert "'0.weight'" in str(caught.value) and "xclude" in str(caught.value)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    nw.attach(model, optimizer, [nw.max_norm(0.3, exclude="0.weight"), nw.clip_grad_norm(1.0)])
    assert "refused" in str(nw.Policy([nw.max_norm(0.3)]).explain(model))


def test_a_frozen_part_is_never_written_to() -> None:
    """DINO's last layer: weight_norm whose magnitude is frozen at one."""
    model = net(parametrizations.weight_norm)
    model[0].parametrizations.weight.original0.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match=r"'0\.weight'.*frozen"):
        nw.attach(model, optimizer, [nw.max_norm(0.3)])
    model = net(parametrizations.weight_norm)
    model[0].parametrizations.weight.original1.requires_grad_(False)
    train(model, nw.max_norm(0.3))    # needs the magnitude alone
    assert weight(model).norm(dim=1).max() <= 0.3
    with pytest.raises(PolicyError, match="frozen"):
        nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [nw.clip_weight_value(0.01)])
    for p in model[0].parameters():
        p.requires_grad_(False)
    nw.attach(model, torch.optim.SGD(model[2].parameters(), lr=0.1), [nw.max_norm(0.3)])    # all of it is frozen, and left alone


def test_lora_with_a_frozen_base_is_seen_since_the_weight_moves() -> None:
    model = net(lambda layer: parametrize.register_parametrization(layer, "weight", LoRA(12, 10)))
    model[0].parametrizations.weight.original.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(PolicyError, match=r"'0\.weight'.*LoRA has no right_inverse"):
        nw.attach(model, optimizer, [nw.max_norm(0.3)])
    train(model, [nw.l2_penalty(0.1, params="0.weight"), nw.max_norm(0.2, params="*.A", layout=Layout("oi", (2, 10)))], optimizer)
    assert model[0].parametrizations.weight[0].A.norm(dim=1).max() <= 0.2


@pytest.mark.parametrize(("make", "rule", "acts"), [
    (Symmetric, lambda: nw.Rule(action="clip_norm", radius=0.5), True),
    (Symmetric, lambda: nw.clip_weight_value(0.05), True),
    (Symmetric, lambda: nw.spectral_cap(0.2), True),
    (Symmetric, lambda: nw.max_norm(0.3), False),
    (Softplus, lambda: nw.max_norm(0.3), True),
    (Softplus, lambda: nw.l1_prox(0.3), False),
    (Softplus, lambda: nw.weight_decay(0.3), True),
    (Factors, lambda: nw.max_norm(0.3), True),
    (Factors, lambda: nw.spectral_cap(0.2), True),
])  # fmt: skip
def test_a_users_right_inverse_is_tried_for_what_the_rule_does(make: type[nn.Module], rule: Callable[[], Any], acts: bool) -> None:
    """Symmetric matrices stay symmetric as a whole, not unit by unit; softplus reaches every scaled weight, but no zero."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(6, 6) + 0.05)
    parametrize.register_parametrization(layer, "weight", make())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    if not acts:
        with pytest.raises(PolicyError, match=r"'weight'"):
            nw.attach(layer, optimizer, [rule()])
        return
    control = nw.attach(layer, optimizer, [rule()])
    for _ in range(10):
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        assert not control.verify().breaches and bool(layer.weight.isfinite().all())
    measured = {"spectral": torch.linalg.matrix_norm, "linf": lambda w, _: w.abs().max(), "l2": lambda w, _: w.norm(dim=1).max()}
    one = rule()
    if (one.radius is not None and one.per != "tensor") or one.norm.name != "l2":
        assert measured[one.norm.name](layer.weight.detach().double(), 2) <= one.radius


def test_a_mask_refuses_what_would_fill_it() -> None:
    model = net(_noisy_mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rule in (nw.spectral_cap(0.2), nw.Rule(action="project", norm="orthogonal", params="0.weight", per="matrix")):
        with pytest.raises(PolicyError, match="pruning mask cannot give"):
            nw.attach(model, optimizer, [rule])


def test_a_weight_that_code_of_ones_own_computes_is_refused() -> None:
    """As in the spectral normalisation of SAGAN's repositories: weight_bar is the parameter, weight an attribute."""
    model = net(None)
    raw = model[0].weight
    del model[0].weight
    model[0].register_parameter("weight_bar", nn.Parameter(raw.data))
    model[0].weight = raw.data / 2
    with pytest.raises(PolicyError, match=r"'0\.weight'.*code of your own"):
        nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [nw.max_norm(0.3, params="0.*")])


class Quantised(Tensor):
    """A weight of int8 and one scale, which passes for a float32 tensor."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32, requires_grad=False)    # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> Any:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return Quantised(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x.numbers.float() * x.scale if isinstance(x, Quantised) else x

        if func is torch.ops.aten.detach.default or func is torch.ops.aten.clone.default:
            return Quantised(args[0].numbers.clone(), args[0].scale)
        if func is torch.ops.aten.copy_.default:
            args[0].numbers.copy_((plain(args[1]) / args[0].scale).round())
            return args[0]
        return func(*map(plain, args), **(kwargs or {}))


def test_a_quantised_weight_is_refused_and_a_frozen_one_left_alone() -> None:
    model = net(None)
    stored = Quantised(torch.randint(-127, 127, (12, 10), dtype=torch.int8), torch.tensor(0.01))
    model[0].weight = nn.Parameter(stored, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match=r"'0\.weight'.*Quantised stores its numbers in another form"):
        nw.attach(model, optimizer, [nw.max_norm(0.3)])
    model[0].weight.requires_grad_(False)
    nw.attach(model, optimizer, [nw.max_norm(0.3)])


def test_fake_quantisation_is_refused_for_bounds() -> None:
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig

    model = nn.Sequential(Linear(10, 12, qconfig=get_default_qat_qconfig()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match="fake quantisation"):
        nw.attach(model, optimizer, [nw.max_norm(0.3, params="0.weight")])
    nw.attach(model, optimizer, [nw.weight_decay(0.1, params="0.weight")])


def test_rounding_by_chance_needs_weights_that_are_stored() -> None:
    model = net(parametrizations.weight_norm, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match="rounding"):
        nw.attach(model, optimizer, [nw.Rule(action="weight_decay", strength=0.1, rounding="stochastic")])


# ------------------------------------------------------------------------------------------------ several optimizers


def test_a_bound_holds_after_the_steps_of_every_optimizer_that_moves_the_weight() -> None:
    model = net(parametrizations.weight_norm)
    raw = model[0].parametrizations.weight
    one = torch.optim.SGD([p for p in model.parameters() if p is not raw.original0], lr=0.3)
    other = torch.optim.SGD([raw.original0], lr=0.3)
    with pytest.raises(PolicyError, match="no given optimizer holds"):
        nw.attach(model, one, [nw.max_norm(0.3, params="0.weight")])
    control = nw.attach(model, [one, other], [nw.max_norm(0.3, params="0.weight")])
    for _ in range(5):
        (-model(torch.randn(16, 10)).square().mean()).backward()
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
            assert weight(model).norm(dim=1).max() <= 0.3
            assert control.verify()
            (-model(torch.randn(16, 10)).square().mean()).backward()


# -------------------------------------------------------------------------------------------------- names and tables


@pytest.mark.parametrize("params", ["0.weight", "0.parametrizations.weight.original*", "0.parametrizations.weight.original0", "re:^0\\.w"])
def test_both_spellings_mean_the_weight(params: str) -> None:
    model = net(parametrizations.weight_norm)
    train(model, nw.max_norm(0.3, params=params))
    assert weight(model).norm(dim=1).max() <= 0.3


def test_everything_means_the_weight_once() -> None:
    """A decay of "*" shrinks the weight by its share, not the magnitude and the weight."""
    model = net(parametrizations.weight_norm)
    before = weight(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, [nw.weight_decay(0.5, params="*")])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(weight(model), before * 0.95, atol=1e-7, rtol=1e-6)


def test_rules_on_gradients_mean_the_raw_tensors_under_either_name() -> None:
    for params in ("0.weight", "0.parametrizations.*"):
        model = net(parametrizations.weight_norm)
        train(model, nw.clip_grad_norm(1e-3, params=params), steps=1)
        raw = model[0].parametrizations.weight
        assert torch.stack([raw.original0.grad.norm(), raw.original1.grad.norm()]).norm() == pytest.approx(1e-3, rel=1e-5)
        assert model[2].weight.grad.norm() > 1e-2


def test_the_inventory_has_the_weight_with_its_modules_role_and_axes() -> None:
    def entry(make: Callable[[nn.Module], Any], layer: nn.Module) -> Any:
        make(layer)
        (found,) = [e for e in Inventory(nn.Sequential(layer, nn.Linear(4, 4), nn.Linear(4, 4))).weights if e.computed]
        return found

    conv = entry(parametrizations.weight_norm, nn.ConvTranspose2d(4, 6, 3, groups=2))
    assert (conv.name, conv.role, conv.layout.axes) == ("0.weight", "conv", "siokk")
    assert conv.names == ("0.weight", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    recurrent = entry(lambda m: parametrizations.weight_norm(m, "weight_hh_l0"), nn.LSTM(4, 5))
    assert (recurrent.name, recurrent.role, recurrent.layout.axes) == ("0.weight_hh_l0", "recurrent", "soi")
    bias = entry(lambda m: prune.l1_unstructured(m, "bias", 0.5), nn.Linear(4, 6))
    assert (bias.name, bias.role) == ("0.bias", "bias")
    embedding = entry(utils.weight_norm, nn.Embedding(9, 4))
    assert (embedding.role, embedding.names[1:]) == ("embedding", ("0.weight_g", "0.weight_v"))
    user = entry(lambda m: parametrize.register_parametrization(m, "weight", Doubled()), nn.Linear(4, 6))
    assert (user.role, user.layout.axes, user.layout.certain) == ("hidden", "oi", True)


def test_roles_stated_by_the_weights_name() -> None:
    model = net(parametrizations.weight_norm)
    entry = next(e for e in Inventory(model, {"0.weight": "other"}).weights if e.computed)
    assert entry.role == "other"


def test_the_table_and_the_report_name_the_weight() -> None:
    model = net(parametrizations.weight_norm)
    table = nw.Policy([nw.max_norm(0.3), nw.clip_grad_norm(1.0, params="0.weight")]).explain(model)
    rows = {row.name: row for row in table.rows}
    assert rows["0.weight"].blocks == {1: "12 of 10"} and rows["0.weight"].how == "weight_norm"
    assert set(rows["0.parametrizations.weight.original0"].blocks) == {2}
    assert "0.weight" not in table.untouched and "0.parametrizations.weight.original1" not in table.untouched
    control = train(model, [nw.max_norm(0.3)])
    report = nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), [nw.max_norm(0.3)], log=True).norms()
    for found in (report, control.norms()):
        assert found.parameter["weight"]["0.weight"] == pytest.approx(float(weight(model).norm()), rel=1e-6)
        assert "0.parametrizations.weight.original1" in found.parameter["grad"]
        assert not any("original" in name for name in found.parameter["weight"])
        assert "hidden" in found.role["weight"]


def test_logged_updates_are_those_of_the_weight() -> None:
    model = net(parametrizations.weight_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(0.3)], log=True)
    before = weight(model)
    model(torch.randn(8, 10)).square().sum().backward()
    optimizer.step()
    report = control.norms()
    assert report.parameter["update"]["0.weight"] == pytest.approx(float((weight(model) - before).norm()), rel=1e-5)
    assert report.parameter["weight_before"]["0.weight"] == pytest.approx(float(before.norm()), rel=1e-6)


# ------------------------------------------------------------------------------------------------- tied and changed


def tied() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"emb": nn.Embedding(6, 5), "head": nn.Linear(5, 6, bias=False)})
    model["head"].weight = model["emb"].weight
    parametrize.register_parametrization(model["head"], "weight", Doubled())
    return model


def test_a_tensor_that_is_a_weight_here_and_raw_there() -> None:
    """One rule cannot mean both; named alone, each can be meant."""
    model = tied()
    raw = model["emb"].weight
    assert model["head"].parametrizations.weight.original is raw
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(PolicyError, match=r"head\.weight.*shares a tensor with|emb\.weight.*shares a tensor with"):
        nw.attach(model, optimizer, [nw.max_norm(0.1)])
    raw.grad = torch.zeros_like(raw)
    for params, used in (("emb.weight", lambda: model["emb"].weight), ("head.weight", lambda: model["head"].weight)):
        with nw.attach(model, optimizer, [nw.max_norm(0.4, params=params)]) as control:
            with torch.no_grad():
                raw.copy_(torch.linspace(-1, 1, 30).view(6, 5))
            optimizer.step()
            assert 0.39 < used().norm(dim=1).max() <= 0.4 and control.verify()


def test_a_module_that_is_used_under_two_names_is_one_weight() -> None:
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(5, 5))
    model = nn.ModuleDict({"a": layer, "b": layer})
    (entry,) = [e for e in Inventory(model).weights if e.computed]
    assert entry.names[:2] == ("a.weight", "b.weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nw.attach(model, optimizer, [nw.max_norm(0.2, params="b.weight")]):
        layer(torch.randn(3, 5)).sum().backward()
        optimizer.step()
    assert layer.weight.norm(dim=1).max() <= 0.2


def test_what_was_stored_of_a_weight_is_carried_over_by_its_name() -> None:
    """radius="init" of a plain weight, of the same weight under a mask, and of one computed with weight_norm."""
    model = net(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = nw.attach(model, optimizer, [nw.max_norm("init")]).state_dict()
    assert "0.weight" in state["rules"][0]["radius"]
    for make in (parametrizations.weight_norm, _noisy_mask):
        changed = net(make)
        control = nw.attach(changed, torch.optim.SGD(changed.parameters(), lr=0.1), [nw.max_norm("init")])
        control.load_state_dict(state)
        assert torch.equal(control.state_dict()["rules"][0]["radius"]["0.weight"], state["rules"][0]["radius"]["0.weight"])


@pytest.mark.parametrize("make", [parametrizations.weight_norm, utils.weight_norm])
def test_a_weight_that_becomes_computed_in_training_is_followed(make: Any) -> None:
    """Its raw tensors are new parameters, which the user gives to the optimizer. The radius of the first weight stays."""
    model = net(None)
    first = weight(model).norm(dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    control = nw.attach(model, optimizer, [nw.max_norm("0.8*init")])
    (-model(torch.randn(16, 10)).square().mean()).backward()
    optimizer.step()
    assert (weight(model).norm(dim=1) <= 0.8 * first * (1 + 1e-6)).all()
    make(model[0])
    optimizer.add_param_group({"params": [p for name, p in model[0].named_parameters() if name != "bias"], "lr": 0.3})
    for _ in range(5):
        optimizer.zero_grad()
        (-model(torch.randn(16, 10)).square().mean()).backward()
        optimizer.step()
        assert (weight(model).norm(dim=1) <= 0.8 * first * (1 + 1e-6)).all() and control.verify()
    assert torch.allclose(control.state_dict()["rules"][0]["radius"]["0.weight"], first)


def _another_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    late = nn.Linear(2, 2)
    model.register_module(f"late{len(optimizer.param_groups)}", late)
    optimizer.add_param_group({"params": list(late.parameters())})


def _unfrozen(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model[2].weight.requires_grad_(False)
    _steps(model, optimizer, 1)
    model[2].weight.requires_grad_(True)


def _steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        (-model[2](model[1](model[0](torch.ones(4, 10, dtype=model[0].bias.dtype)))).square().mean()).backward()
        optimizer.step()


REBINDINGS: dict[str, Callable[[Any, torch.optim.Optimizer], Any]] = {
    "a group is added": _another_group,
    "frozen and unfrozen": _unfrozen,
    "double": lambda model, optimizer: model.double(),
    "saved and loaded": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@pytest.mark.parametrize("again", REBINDINGS)
@pytest.mark.parametrize("kind", [None, *ACTING])
def test_what_is_known_of_a_computed_weight_outlives_every_rebinding(kind: str | None, again: str) -> None:
    """The radius and the center are those of the weight when attached, however often the rules are bound again; so are multipliers."""
    model = net(ACTING[kind] if kind else None)
    first = weight(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rules = [nw.max_norm("0.9*init", "0.weight"), nw.max_norm(0.2, "0.weight", center="init", relative=True), nw.cpr(params="0.weight")]
    control = nw.attach(model, optimizer, rules)
    before: list[Any] = []
    for _ in range(3):
        _steps(model, optimizer, 2)
        before.append(copy.deepcopy(control.state_dict()["rules"][2]["found"]["0.weight"]))
        REBINDINGS[again](model, optimizer)
        _steps(model, optimizer, 1)
    now = control.state_dict()["rules"]
    assert torch.allclose(now[0]["radius"]["0.weight"].double(), first.norm(dim=1), rtol=1e-5)
    assert torch.allclose(now[1]["center"]["0.weight"].double(), first, atol=1e-6)
    assert set(now[0]["radius"]) == {"0.weight"}
    steps = [int(found["step"].max()) for found in (*before, now[2]["found"]["0.weight"])]
    assert steps == sorted(set(steps)), "the multiplier began anew"


def test_checkpoints_resume_bit_for_bit() -> None:
    whole = net(parametrizations.weight_norm)
    rules = lambda: [nw.max_norm("init"), nw.cpr("init", params="0.weight")]    # noqa: E731
    train(whole, rules(), steps=3)
    half = net(parametrizations.weight_norm)
    state = train(half, rules(), steps=2).state_dict()
    again = net(parametrizations.weight_norm, seed=5)
    again.load_state_dict(half.state_dict())
    optimizer = torch.optim.SGD(again.parameters(), lr=0.3)
    nw.attach(again, optimizer, rules()).load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, y = (torch.randn(16, n, generator=generator) for n in (10, 4))
    (again(x) - 2 * y).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_loop_with_grad_scaler_leaves_a_skipped_step_alone() -> None:
    model = net(parametrizations.weight_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, [nw.max_norm(0.1), nw.weight_decay(0.5)])
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(torch.randn(4, 10)).square().sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("make", [parametrizations.weight_norm, utils.weight_norm, _noisy_mask])
def test_presets_that_hold_a_raw_tensor_are_refused(make: Callable[[nn.Module], Any]) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(*net(make), nn.Linear(4, 3))

    holding: Any = [(nw.optim.MuonH, {}), (nw.optim.AdamH, {}), (nw.optim.Scion, {"constrained": True}), (nw.optim.Muon, {"hold": "ball"})]
    for preset, options in holding:
        with pytest.raises(PolicyError, match=r"'0\.weight'.*raw tensor"):
            preset(model(), **options)
    chosen = nw.optim.MuonH(model(), override={"0.weight": "adamw"})
    assert "sphere" in str(chosen.routing)


def test_presets_that_step_raw_tensors_under_a_norm_say_so_once() -> None:
    model = nn.Sequential(*net(parametrizations.weight_norm), nn.Linear(4, 3))
    for preset in (nw.optim.Muon, nw.optim.Ridge, nw.optim.auto):
        with pytest.warns(UserWarning, match=r"raw tensors.*0\.parametrizations\.weight\.original1 \(of 0\.weight\)") as seen:
            preset(model)
        assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nw.optim.AdamW(model)
        nw.optim.Muon(model, override={"0.weight": "adamw"})


def test_a_rule_in_a_preset_bounds_the_weight() -> None:
    model = net(parametrizations.weight_norm)
    optimizer = nw.optim.Muon(model, lr=0.1, policy=[nw.max_norm(0.3)])
    for _ in range(5):
        optimizer.zero_grad()
        (-model(torch.randn(16, 10)).square().mean()).backward()
        optimizer.step()
    assert weight(model).norm(dim=1).max() <= 0.3 and optimizer.control.verify()
