"""A spectral cap within a tolerance: the promise checked by float64 SVD after every step, its state, its words."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.engine.rules.tracked_cap import APART_FROM
from normwise.norms import linalg

CAP = 0.9
WIDE = 96  # above the side up to which matrices are decomposed each time


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.Tanh(), nn.Linear(2 * WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(64, WIDE, generator=generator) for _ in range(2))
    optimizer.zero_grad()
    (net(x) - y.roll(1, 1) * 3).square().mean().backward()
    optimizer.step()


def largest(net: nn.Module) -> float:
    return max(float(torch.linalg.svdvals(p.detach().double())[0]) for p in net.parameters() if p.ndim == 2)


def test_the_promise_holds_after_every_step() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0)
    control = nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=0.01))
    acted = 0
    for seed in range(40):
        step(net, optimizer, seed)
        assert largest(net) <= 1.01 * CAP
        acted += sum(control.violations().values())
    assert acted > 40, "the cap must have had something to do"
    assert control.verify().ok


def test_without_the_rule_the_bound_would_break() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0)
    for seed in range(40):
        step(net, optimizer, seed)
    assert largest(net) > 1.5 * CAP


def test_it_is_near_the_exact_cap() -> None:
    nets = [model(), model()]
    for net, tolerance in zip(nets, (0.0, 0.01), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=tolerance))
        for seed in range(15):
            step(net, optimizer, seed)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.linalg.vector_norm(p - q) <= 0.01 * torch.linalg.vector_norm(p)


def test_its_state_goes_on_bit_for_bit() -> None:
    nets = [model(), model()]
    optimizers = [torch.optim.AdamW(n.parameters(), lr=3e-3) for n in nets]
    first = nw.attach(nets[0], optimizers[0], nw.spectral_cap(CAP, tolerance=0.01))
    for seed in range(10):
        step(nets[0], optimizers[0], seed)
    buffer = io.BytesIO()
    torch.save({"model": nets[0].state_dict(), "optimizer": optimizers[0].state_dict(), "control": first.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = nw.attach(nets[1], optimizers[1], nw.spectral_cap(CAP, tolerance=0.01))
    nets[1].load_state_dict(saved["model"])
    optimizers[1].load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["control"])
    for seed in range(10, 20):
        for net, optimizer in zip(nets, optimizers, strict=True):
            step(net, optimizer, seed)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_its_state_is_its_own_and_complete() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    control = nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=0.01))
    step(net, optimizer, 0)
    saved = control.state_dict()
    found = [t for rule in saved["rules"] for own in rule["found"].values() for t in own.values()]
    assert len(found) == 3 * 3 and all(t.isfinite().all() for t in found)
    before = [t.clone() for t in found]
    for seed in range(1, 5):
        step(net, optimizer, seed)
    assert all(torch.equal(old, t) for old, t in zip(before, found, strict=True)), "a checkpoint is not changed by training on"


def test_each_matrix_within_a_multiple_of_its_initial_norm() -> None:
    net = model()
    weights = [p for p in net.parameters() if p.ndim == 2]
    limits = [0.9 * float(torch.linalg.svdvals(w.detach().double())[0]) for w in weights]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0)
    control = nw.attach(net, optimizer, nw.spectral_cap("0.9*init", tolerance=0.01))
    for seed in range(40):
        step(net, optimizer, seed)
        for weight, limit in zip(weights, limits, strict=True):
            assert float(torch.linalg.svdvals(weight.detach().double())[0]) <= 1.01 * limit
    assert control.verify().ok


def test_a_learning_rate_that_leaps_is_seen() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    nw.attach(net, optimizer, nw.spectral_cap(3.0, tolerance=0.01))
    for seed in range(5):
        step(net, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 50.0
    step(net, optimizer, 5)
    assert 2.9 < largest(net) <= 3.0 * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_the_promise(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    control = nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=0.01))
    acted = 0
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(64, WIDE, generator=generator).to(dtype) for _ in range(2))
        optimizer.zero_grad()
        (net(x) - y.roll(1, 1) * 3).square().mean().backward()
        optimizer.step()
        assert largest(net) <= 1.01 * CAP
        acted += sum(control.violations().values())
    assert acted >= 3 and control.verify().ok


class Transposed(nn.Module):
    """Convolutions whose blocks are no views of the weight: transposed, grouped, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(40, 48, 3)
        self.grouped = nn.Conv2d(48, 80, 3, groups=2)
        self.last = nn.Conv2d(80, 40, 3).to(memory_format=torch.channels_last)


def test_blocks_that_are_no_views_are_written_back() -> None:
    torch.manual_seed(0)
    net = Transposed()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    control = nw.attach(net, optimizer, nw.spectral_cap(0.9, tolerance=0.01))
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.grad = 0.02 * torch.randn(p.shape, generator=generator)
        optimizer.step()
        flat = [net.up.weight.transpose(0, 1).flatten(1), *net.grouped.weight.flatten(1).chunk(2), net.last.weight.flatten(1)]
        assert max(float(torch.linalg.svdvals(w.detach().double())[0]) for w in flat) <= 1.01 * 0.9
    assert sum(control.violations().values()) > 0 and control.verify().ok


def test_verify_names_what_is_beyond_the_tolerance() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    control = nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=0.01))
    step(net, optimizer, 0)
    with torch.no_grad():
        weight = net[0].weight
        weight.mul_(1.02 * CAP / torch.linalg.svdvals(weight)[0])
    result = control.verify()
    assert [b.parameter for b in result.breaches] == ["0.weight"]


def test_words() -> None:
    rule = nw.spectral_cap(2.0, tolerance=0.01)
    assert nw.Policy.from_yaml(nw.Policy(rule).to_yaml()) == nw.Policy(rule)
    with pytest.raises(nw.PolicyError, match=r"tolerance is 0\.001"):
        nw.spectral_cap(2.0, tolerance=0.001)
    with pytest.raises(nw.PolicyError, match="does not use tolerance"):
        nw.Rule(action="clip_norm", norm="spectral", per="matrix", radius=1.0, tolerance=0.01)
    with pytest.raises(nw.PolicyError, match="tolerance is for projecting weights under the norm 'spectral'"):
        nw.Rule(action="project", norm="l1", radius=1.0, tolerance=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (8, 8), (7, 40), (41, 33), (36, 100), (3, 8)])
def test_every_shape_and_matrices_that_lie_apart(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    batch = torch.randn(5, *shape)
    radius = 0.7 * torch.linalg.matrix_norm(batch, ord=2)
    whole, apart, seen = batch.clone(), batch.clone(), []
    one = two = None
    for _ in range(8):
        moved = 0.05 * torch.randn(5, *shape)
        whole, apart = whole + moved, apart + moved
        whole, one = linalg.cap(whole, radius, one)
        cut, two = linalg.follow([apart[:2], apart[2:3], apart[3:]], radius, two, 0.01)
        apart = torch.stack([cut.get(i, m) for i, m in enumerate(apart)])
        seen.append(float((torch.linalg.matrix_norm(whole.double(), ord=2) / radius).max()))
        torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-5)
    assert max(seen) <= 1.01 and max(seen) > 0.9


def test_weights_whose_memory_is_replaced_in_mid_run() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 200, bias=False))
    assert net[0].weight.numel() >= APART_FROM, "it is read where it lies"
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    nw.attach(net, optimizer, nw.spectral_cap(1.0, "*", tolerance=0.01))
    for i in range(6):
        if i in (2, 4):
            net[0].weight.data = net[0].weight.data * 1.3 if i == 2 else (net[0].weight.data * 1.3).t().contiguous().t()
        net[0].weight.grad = 0.01 * torch.randn(200, 256)
        optimizer.step()
        assert largest(net) <= 1.01, f"step {i}"


@pytest.mark.parametrize(
    "shape, growth, noise", [((256, 64), 1.001, 0.001), pytest.param((200, 120), 1.001, 0.004, marks=pytest.mark.long)]
)
def test_more_and_more_singular_values_come_to_the_radius(shape: tuple[int, int], growth: float, noise: float) -> None:
    """More than were followed at first: one of them that is not followed grows beyond the tolerance unseen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator)
    radius = 0.98 * torch.linalg.matrix_norm(x, ord=2)
    state, worst = None, 0.0
    for _ in range(200):
        x, state = linalg.cap(growth * x + noise * torch.randn(3, *shape, generator=generator), radius, state)
        worst = max(worst, float((torch.linalg.matrix_norm(x.double(), ord=2) / radius).max()))
    assert worst <= 1.01
    assert all(int((torch.linalg.svdvals(m) > 0.98 * r).sum()) > 8 for m, r in zip(x, radius, strict=True)), "the crowd was there"


# --- against an adversary ----------------------------------------------------------------------------------------------
SIDE = 64


def state_of(control: nw.Control) -> dict[str, Tensor]:
    """What the cap remembers: everything that an adversary may know."""
    return dict(control.state_dict()["rules"][0]["found"]["weight"])


@functools.cache
def seen_by_combinations(length: int) -> Tensor:
    """An orthonormal basis, as columns, of what the combinations see of the long side."""
    return torch.linalg.qr(combinations(length).T).Q


def hidden_from(rows: Tensor, length: int) -> Tensor:
    """A unit vector orthogonal to the rows (k, length)."""
    basis = torch.linalg.qr(rows.T.double(), mode="complete").Q
    return basis[:, min(len(rows), length - 1)]


def combinations(length: int) -> Tensor:
    """The eight fixed random combinations of rows by which an earlier version saw matrices move, written out."""
    draws = torch.rand(2, length, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
    weights = torch.where(draws[0] < 0.5, -0.5, 0.5) * (1 + 2 * draws[1])
    weights = weights / weights.square().mean().sqrt()
    rows = torch.zeros(8, length, dtype=torch.float64)
    for i in range(length):
        rows[min(i // (length // 8), 7) if i < length // 8 * 8 else i - length // 8 * 8, i] = weights[i]
    return rows


def worst_direction(attack: str, weight: Tensor, known: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """A matrix of rank one and length one."""
    w = weight.double()
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    if attack == "leading":
        return torch.outer(u[:, 0], vh[0])
    if attack == "growth since the reference":    # go on where something already grows unseen
        moved = w - known["reference"][0].double() if "reference" in known and known["reference"].shape[1] else w
        p, _, qh = torch.linalg.svd(moved)
        return torch.outer(p[:, 0], qh[0])
    if attack == "unseen by combinations":
        long_first = w.shape[0] >= w.shape[1]
        left, right = (u[:, 0], vh[0]) if long_first else (vh[0], u[:, 0])
        seen = seen_by_combinations(len(left))
        left = left - seen @ (seen.T @ left)
        return torch.outer(left / left.norm(), right) if long_first else torch.outer(right, left / left.norm())
    if attack == "outside what is followed":
        followed = known["vectors"][0].double()
        if not len(followed):
            return torch.outer(u[:, -1], vh[-1])
        hidden = hidden_from(followed, followed.shape[1])
        if w.shape[0] < w.shape[1]:
            return torch.outer(hidden, w.T @ hidden / (w.T @ hidden).norm())
        return torch.outer(w @ hidden / (w @ hidden).norm(), hidden)
    one, other = (torch.randn(n, generator=generator, dtype=torch.float64) for n in w.shape)
    return torch.outer(one / one.norm(), other / other.norm())


ATTACKS = ["leading", "growth since the reference", "unseen by combinations", "outside what is followed", "random"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("shape", [pytest.param((SIDE, SIDE), marks=pytest.mark.long), (40, 96), (20, 24)])
def test_an_adversary_that_knows_the_state_never_exceeds_the_bound(attack: str, shape: tuple[int, int]) -> None:
    """The worst update of its kind at each step, from 0.1% to 80% of the radius: σ₁ ≤ 1.01 r by float64 SVD after every step."""
    slow = attack == "unseen by combinations"
    besiege(attack, shape, torch.float32, (0.005,) if slow else (0.001, 0.005, 0.3, 0.8), steps=45 if slow else 12)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("shape", [(96, 96), (40, 200), (300, 48), (33, 33), (32, 64)])
def test_a_long_siege(attack: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    besiege(attack, shape, dtype, (0.001, 0.003, 0.005, 0.02, 0.1, 0.3, 0.8), steps=150)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_an_adversary_in_other_dtypes(dtype: torch.dtype) -> None:
    besiege("outside what is followed", (SIDE, SIDE), dtype, (0.005, 0.3), steps=12)


def besiege(attack: str, shape: tuple[int, int], dtype: torch.dtype, shares: tuple[float, ...], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for share in shares:
        torch.manual_seed(0)
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
        radius = 0.95 * float(torch.linalg.svdvals(layer.weight.detach().double())[0])
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        control = nw.attach(layer, optimizer, nw.spectral_cap(radius, "*", tolerance=0.01))
        cut = 0
        for i in range(steps):
            push = share * radius * worst_direction(attack, layer.weight.detach(), state_of(control), generator)
            layer.weight.grad = -push.to(dtype)
            optimizer.step()
            sigma = float(torch.linalg.svdvals(layer.weight.detach().double())[0])
            assert sigma <= 1.01 * radius, f"{attack}, {share} of the radius, step {i}: {sigma / radius}"
            cut += sum(control.violations().values())
        assert cut > 0, "the first step at least has something to cut"
        assert control.verify().ok


@pytest.mark.parametrize("rate, batch", [(0.1, 1), (1.0, 1), (1.0, 3), (1.0, 8)])
def test_plain_sgd_with_few_samples_goes_on(rate: float, batch: int) -> None:
    """Gram matrices of low rank or with rows that are zero: an fp32 ``eigh`` raised or gave NaN within three steps."""
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(96, 96), nn.ReLU())
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        nw.attach(net, optimizer, nw.spectral_cap(CAP, "*weight", tolerance=0.01))
        for _ in range(8):
            x = torch.randn(batch, 96) * 3
            optimizer.zero_grad()
            (net(x) - torch.randn(batch, 96)).square().sum().backward()
            optimizer.step()
            assert bool(torch.stack([p.isfinite().all() for p in net.parameters()]).all()) and largest(net) <= 1.01 * CAP


def test_three_tanh_layers_with_one_sample_go_on() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(96, 96), nn.Tanh())])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.003)
    nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=0.01))
    for _ in range(15):
        optimizer.zero_grad()
        (net(torch.randn(1, 96)) - torch.randn(1, 96)).square().sum().backward()
        optimizer.step()
        assert largest(net) <= 1.01 * CAP


def test_matrices_with_zero_rows_and_of_any_scale() -> None:
    """Rows that are exactly zero, at the ends of fp32's range, far above the radius and far below."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-30, 1e-20, 1.0, 1e15, 1e25):
        x = torch.zeros(4, 70, 50)
        x[:, ::9] = torch.randn(4, 8, 50, generator=generator)
        x, state, radius = x * scale, None, 2.0 * scale
        for step in range(6):
            x = x + 0.3 * radius * torch.randn(4, 70, 50, generator=generator) / 60 * (step % 2)
            x, state = linalg.cap(x * (1e6 if step == 3 else 1.0), radius, state)
            assert float((torch.linalg.svdvals(x.double())[:, 0] / radius).max()) <= 1.01
            assert bool(x.isfinite().all())


def test_matrices_that_are_not_finite_are_left_alone_and_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 60, generator=generator)
    capped, state = linalg.cap(x, 5.0)
    spoilt = capped.clone()
    spoilt[1, 2, 3] = torch.nan
    left, state = linalg.cap(spoilt, 5.0, state)
    assert torch.equal(left.isnan(), spoilt.isnan()) and torch.equal(left.nan_to_num(), spoilt.nan_to_num())
    healed, state = linalg.cap(2 * x, 5.0, state)
    assert float(torch.linalg.svdvals(healed.double())[:, 0].max()) <= 1.01 * 5.0


def test_the_bound_in_the_state_is_true() -> None:
    """``reach`` is not below σ₁ of the reference, and hardly above: that is what decides when to look again."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 30), (48, 48), (64, 200), (1, 7), (300, 220)):
        x, state = torch.randn(3, *shape, generator=generator), None
        radius = 0.9 * torch.linalg.matrix_norm(x, ord=2)
        for _ in range(6):
            x, state = linalg.cap(x + 0.02 * torch.randn(3, *shape, generator=generator), radius, state)
            sigma = torch.linalg.svdvals(state.reference.double())[:, 0]
            assert bool((state.reach >= sigma).all()) and bool((state.reach <= 1.1 * sigma).all())
            grown = torch.linalg.svdvals(x.double())[:, 0]
            assert bool((grown <= state.reach + torch.linalg.vector_norm(x - state.reference, dim=(1, 2)) + 1e-6).all())


def test_states_of_an_earlier_version_begin_anew() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    control = nw.attach(net, optimizer, nw.spectral_cap(CAP, tolerance=0.01))
    step(net, optimizer, 0)
    saved = control.state_dict()
    for found in saved["rules"][0]["found"].values():
        count, _, short = found["vectors"].shape
        del found["reference"]
        found |= {"sketch": torch.zeros(count, 8, short), "reach": torch.ones(count), "age": torch.zeros(count)}
    control.load_state_dict(saved)
    for seed in range(1, 4):
        step(net, optimizer, seed)
        assert largest(net) <= 1.01 * CAP


def test_around_a_center() -> None:
    net = model()
    starts = [p.detach().clone() for p in net.parameters() if p.ndim == 2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    control = nw.attach(net, optimizer, nw.spectral_cap(0.02, tolerance=0.01, center="init"))
    for seed in range(6):
        step(net, optimizer, seed)
        moved = [p.detach() - c for p, c in zip((p for p in net.parameters() if p.ndim == 2), starts, strict=True)]
        assert max(float(torch.linalg.svdvals(m.double())[0]) for m in moved) <= 1.01 * 0.02
    assert sum(control.violations().values()) > 0
