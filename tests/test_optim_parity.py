"""The presets against torch's optimizers, and against their papers' formulas written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.optim import (
    LAMB,
    LARS,
    SGD,
    AdamH,
    AdamW,
    Lion,
    Muon,
    MuonH,
    NormalizedSGD,
    NormOptimizer,
    NorMuon,
    Scion,
    Signum,
)

F64 = torch.float64
STEPS = 6
Formula = Callable[[Tensor, list[Tensor]], Tensor]
"""A weight and the gradients of all steps -> the weight after them."""


def weights(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = F64, seed: int = 0) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.3 * torch.randn(s, generator=gen, dtype=F64)).to(dtype)) for s in shapes]


def gradients(shapes: Sequence[tuple[int, ...]], steps: int = STEPS, dtype: torch.dtype = F64, seed: int = 1) -> list[list[Tensor]]:
    """``[step][parameter]``; of different sizes, as in training."""
    gen = torch.Generator().manual_seed(seed)
    return [[(10.0 ** (-i) * torch.randn(s, generator=gen, dtype=F64)).to(dtype) for i, s in enumerate(shapes)] for _ in range(steps)]


def drive(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, step, strict=True)), ".grad was written"
    return [p.detach().clone() for p in params]


Build = Callable[[list[nn.Parameter]], NormOptimizer]


def check(build: Build, shapes: Sequence[tuple[int, ...]], formula: Formula, tol: float = 1e-10) -> None:
    params, grads = weights(shapes), gradients(shapes)
    expected = [formula(p.detach().clone(), [step[i] for step in grads]) for i, p in enumerate(params)]
    assert all(not torch.allclose(p, e, atol=1e-7) for p, e in zip(params, expected, strict=True)), "the formula moves nothing"
    for got, want in zip(drive(build(params), params, grads), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# Two of one shape (a batch), tall, wide, square.
MATRICES = [(6, 4), (6, 4), (4, 6), (5, 5), (12, 3)]
ANY = [(6, 4), (6, 4), (7,), (1,), (2, 3, 2, 2)]


# ---------------------------------------------------------------------------------------------------------- torch's own


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum: float, nesterov: bool, weight_decay: float, maximize: bool) -> None:
    options: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "maximize": maximize}
    ours, theirs, grads = weights(ANY), weights(ANY), gradients(ANY, 20)
    got, want = drive(SGD(ours, 0.05, **options), ours, grads), drive(torch.optim.SGD(theirs, 0.05, **options), theirs, grads)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.5, 0.7), 1e-2), ((0.0, 0.9), 1e-8)])
def test_adamw_is_torchs(betas: tuple[float, float], eps: float, weight_decay: float, maximize: bool) -> None:
    options: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    grads = gradients(ANY, 20)
    want = drive(torch.optim.AdamW(theirs := weights(ANY), 0.05, foreach=False, **options), theirs, grads)
    fused = drive(AdamW(ours := weights(ANY), 0.05, **options), ours, grads)
    columns = drive(AdamW(one_by_one := weights(ANY), 0.05, hold="ball", limit=1e9, **options), one_by_one, grads)
    for w, f, c in zip(want, fused, columns, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(c, w, rtol=1e-12, atol=1e-12)    # without the fused kernel, which a hold rules out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw_is_torchs_fused_kernel_bit_for_bit(dtype: torch.dtype) -> None:
    grads = gradients(ANY, 20, dtype)
    want = drive(torch.optim.AdamW(theirs := weights(ANY, dtype), 0.01, fused=True, maximize=True), theirs, grads)
    for a, b in zip(drive(AdamW(ours := weights(ANY, dtype), 0.01, maximize=True), ours, grads), want, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------- Muon


def quintic(x: Tensor) -> Tensor:
    """torch's Newton-Schulz of five steps in the dtype of ``x``: torch.optim._muon._zeropower_via_newtonschulz without its bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.mT if x.shape[0] > x.shape[1] else x
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        g = y @ y.mT
        y = a * y + (b * g + c * g @ g) @ y
    return y.mT if x.shape[0] > x.shape[1] else y


def adjustment(name: str, rows: int, columns: int) -> float:
    return {
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "rms_rms": math.sqrt(rows / columns),
        "none": 1.0,
    }[name]


def muon(lr: float = 0.02, mu: float = 0.95, nesterov: bool = True, decay: float = 0.1, adjust: str = "original", sign: int = 1) -> Formula:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        b = torch.zeros_like(w)
        for g in (sign * g for g in grads):
            b = mu * b + (1 - mu) * g
            d = (1 - mu) * g + mu * b if nesterov else b
            w = (1 - lr * decay) * w - lr * adjustment(adjust, *w.shape) * quintic(d)
        return w

    return formula


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "rms_rms", "none"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_muon_is_the_formula(adjust: str, nesterov: bool, maximize: bool) -> None:
    def build(params: list[nn.Parameter]) -> NormOptimizer:
        return Muon(params, 0.02, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust, weight_decay=0.1, maximize=maximize)

    check(build, MATRICES, muon(nesterov=nesterov, adjust=adjust, sign=-1 if maximize else 1))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_one_step_of_muon_is_no_further_from_float64_than_torchs(adjust: str) -> None:
    """fp32 weights, iterations in bf16 on both sides; the Frobenius distance over matrices of each shape, three draws."""
    for shape in [(64, 64), (256, 64), (64, 256), (128, 96), (33, 17)]:
        ours_off = theirs_off = 0.0
        for seed in range(3):
            shapes = [shape] * 6
            ours, theirs = weights(shapes, torch.float32, seed), weights(shapes, torch.float32, seed)
            grads = gradients(shapes, 1, torch.float32, seed + 50)
            formula = muon(decay=0.1, adjust=adjust)
            want = [formula(p.detach().double(), [g.double()]) for p, g in zip(ours, grads[0], strict=True)]
            got = drive(Muon(ours, 0.02, weight_decay=0.1, adjust_lr_fn=adjust), ours, grads)
            torchs = drive(torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn=adjust), theirs, grads)
            ours_off += sum(float((a - w).square().sum()) for a, w in zip(got, want, strict=True))
            theirs_off += sum(float((b - w).square().sum()) for b, w in zip(torchs, want, strict=True))
        assert 0 < ours_off <= theirs_off, (shape, ours_off / theirs_off)


def test_muon_beside_torchs_stays_close_in_fp32() -> None:
    """A sanity check that needs no formula of ours: bf16's rounding apart, the two take the same steps."""
    grads = gradients(MATRICES, 10, torch.float32)
    want = drive(torch.optim.Muon(theirs := weights(MATRICES, torch.float32), 0.02, weight_decay=0.1), theirs, grads)
    for a, b in zip(drive(Muon(ours := weights(MATRICES, torch.float32), 0.02, weight_decay=0.1), ours, grads), want, strict=True):
        assert (a - b).norm() < 0.02 * (b.norm())


# ---------------------------------------------------------------------------------------------------------- the papers


def test_normalized_sgd() -> None:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        b = torch.zeros_like(w)
        for g in grads:
            b = 0.8 * b + 0.2 * g
            w = (1 - 0.01 * 0.5) * w - 0.01 * b / b.norm()
        return w

    check(lambda p: NormalizedSGD(p, 0.01, momentum=0.8, weight_decay=0.5), ANY, formula)


def test_signum() -> None:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        b = torch.zeros_like(w)
        for g in grads:
            b = 0.8 * b + 0.2 * g
            w = (1 - 0.01 * 0.5) * w - 0.01 * b.sign()
        return w

    check(lambda p: Signum(p, 0.01, momentum=0.8, weight_decay=0.5), ANY, formula)


def test_lion() -> None:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        m = torch.zeros_like(w)
        for g in grads:
            c = 0.9 * m + 0.1 * g
            w = w - 0.01 * (c.sign() + 0.5 * w)
            m = 0.7 * m + 0.3 * g
        return w

    check(lambda p: Lion(p, 0.01, betas=(0.9, 0.7), weight_decay=0.5), ANY, formula)


def test_lars() -> None:
    """Algorithm 1 of You, Gitman & Ginsburg (2017)."""

    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        v = torch.zeros_like(w)
        for g in grads:
            local = 0.02 * w.norm() / (g.norm() + 0.1 * w.norm())
            v = 0.9 * v + 0.5 * local * (g + 0.1 * w)
            w = w - v
        return w

    check(lambda p: LARS(p, 0.5, momentum=0.9, trust=0.02, weight_decay=0.1), ANY, formula)


def adam_directions(grads: list[Tensor], betas: tuple[float, float], eps: float) -> list[Tensor]:
    m, v, found = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        found.append(m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps))
    return found


def test_lamb() -> None:
    """Algorithm 2 of You et al. (2020), with bias correction and φ(z) = z."""

    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        for r in adam_directions(grads, (0.9, 0.98), 1e-6):
            u = r + 0.1 * w
            w = w - 0.01 * w.norm() / u.norm() * u
        return w

    check(lambda p: LAMB(p, 0.01, betas=(0.9, 0.98), weight_decay=0.1), ANY, formula)


@pytest.mark.parametrize("build", [LARS, LAMB])
def test_the_trust_ratio_of_a_zero_weight_is_one(build: Callable[..., NormOptimizer]) -> None:
    p = nn.Parameter(torch.zeros(3, 2, dtype=F64))
    g = torch.tensor([[1.0, -2.0], [3.0, 0.5], [1.0, 1.0]], dtype=F64)
    drive(build([p], 0.1), [p], [[g]])
    torch.testing.assert_close(p.detach(), -0.1 * (g if build is LARS else g / (g.abs() + 1e-6)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_normuon(nesterov: bool) -> None:
    """Algorithm 1 of Li et al. (2025), the direction before the polar factor as in Muon."""

    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        m, v = torch.zeros_like(w), torch.zeros(w.shape[0], dtype=F64)
        for g in grads:
            m = 0.9 * m + 0.1 * g
            o = quintic(0.1 * g + 0.9 * m if nesterov else m)
            v = 0.8 * v + 0.2 * o.square().mean(1)
            scaled = o / (v.sqrt() + 1e-8)[:, None]
            w = w - 0.01 * 0.5 * w - 0.2 * 0.01 * math.sqrt(w.numel()) / scaled.norm() * scaled
        return w

    check(lambda p: NorMuon(p, 0.01, momentum=0.9, nesterov=nesterov, row_beta=0.8, weight_decay=0.5), MATRICES, formula)


def test_adamh() -> None:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        radius = w.norm()
        for u in adam_directions(grads, (0.9, 0.95), 1e-8):
            w = w - 0.1 * radius * u / u.norm()
            w = radius * w / w.norm()
        return w

    check(lambda p: AdamH(p, 0.1), [(6, 4), (6, 4), (2, 3, 2, 2)], formula)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muonh(nesterov: bool) -> None:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        radius, b = w.norm(), torch.zeros_like(w)
        for g in grads:
            b = 0.9 * b + 0.1 * g
            u = quintic(0.1 * g + 0.9 * b if nesterov else b)
            w = w - 0.1 * radius * u / u.norm()
            w = radius * w / w.norm()
        return w

    check(lambda p: MuonH(p, 0.1, momentum=0.9, nesterov=nesterov), MATRICES, formula)


# ---------------------------------------------------------------------------------------------------------- Scion, by module


class Net(nn.Module):
    """One module of each kind that a matrix method must take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv2d(2, 6, (3, 2), groups=2)
        self.up = nn.ConvTranspose1d(4, 3, 2)
        self.lstm = nn.LSTM(8, 5, proj_size=3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9)


def net() -> Net:
    torch.manual_seed(3)
    model = Net().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return model


def heads_of(name: str, w: Tensor, per_head: bool) -> list[Tensor]:
    """The matrices of a parameter as views, (out, in × kernel), written out by hand for ``Net``."""
    if name == "conv.weight":
        return [w[3 * g : 3 * g + 3].view(3, -1) for g in range(2)]
    if name == "up.weight":
        return [w.transpose(0, 1).reshape(3, -1)]
    if name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        return [w[5 * k : 5 * k + 5] for k in range(4)]
    if name == "attention.in_proj_weight":
        return [w[4 * k : 4 * k + 4] for k in range(6)] if per_head else [w[8 * k : 8 * k + 8] for k in range(3)]
    if name == "attention.out_proj.weight" and per_head:
        return [w[:, 4 * k : 4 * k + 4] for k in range(2)]
    return [w]


def rebuild(name: str, blocks: list[Tensor], like: Tensor, per_head: bool) -> Tensor:
    if name == "up.weight":
        return blocks[0].view(3, 4, 2).transpose(0, 1).contiguous()
    if name == "attention.out_proj.weight" and per_head:
        return torch.cat(blocks, 1)
    return torch.cat([b.reshape(-1, *like.shape[1:]) for b in blocks])


def on_blocks(name: str, formula: Formula, w: Tensor, grads: list[Tensor], per_head: bool = False) -> Tensor:
    """The formula on each matrix of the parameter by itself."""
    pieces = [heads_of(name, g, per_head) for g in grads]
    after = [formula(b.clone(), [p[i] for p in pieces]) for i, b in enumerate(heads_of(name, w, per_head))]
    return rebuild(name, after, w, per_head)


def train_net(model: Net, optimizer: NormOptimizer) -> dict[str, list[Tensor]]:
    gen = torch.Generator().manual_seed(8)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=gen, dtype=F64)
            seen[name].append(p.grad.clone())
        optimizer.step()
    return seen


MATRIX_NAMES = [
    "conv.weight", "up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0", "attention.in_proj_weight",
    "attention.out_proj.weight", "fc.weight",
]  # fmt: skip


@pytest.mark.parametrize("per", ["matrix", "head"])
def test_muon_takes_every_matrix_by_itself(per: str) -> None:
    """Convolutions flattened, groups, gates, q, k, v and heads: the formula on each, and AdamW on the rest."""
    model, start = net(), {n: p.detach().clone() for n, p in net().named_parameters()}
    optimizer = Muon(model, 0.02, weight_decay=0.1, per=per, adamw={"lr": 1e-3})
    assert optimizer.routing is not None
    assert sorted(n for n, row in optimizer.routing.of.items() if row == "muon") == sorted(MATRIX_NAMES)
    grads = train_net(model, optimizer)
    for name, p in model.named_parameters():
        if name in MATRIX_NAMES:
            want = on_blocks(name, muon(), start[name], grads[name], per == "head")
        else:
            q = nn.Parameter(start[name].clone())
            decay = 0.1 if name in ("embed.weight", "head.weight") else 0.0
            want = drive(torch.optim.AdamW([q], 1e-3, betas=(0.9, 0.95), weight_decay=decay), [q], [[g] for g in grads[name]])[0]
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-10, msg=name)


def scion(lr: float, scale: Callable[[Tensor], Tensor], constrained: bool) -> Formula:
    def formula(w: Tensor, grads: list[Tensor]) -> Tensor:
        d = torch.zeros_like(w)
        for g in grads:
            d = 0.9 * d + 0.1 * g
            w = (1 - lr) * w - lr * scale(d) if constrained else w - lr * scale(d)
        return w

    return formula


@pytest.mark.parametrize("constrained", [False, True])
def test_scion(constrained: bool) -> None:
    """Tables 2 to 4 of Pethick et al. (2025): spectral, convolution, bias-RMS and sign layers."""
    model, start = net(), {n: p.detach().clone() for n, p in net().named_parameters()}
    grads = train_net(model, Scion(model, 0.02, radius=5.0, head_radius=30.0, constrained=constrained))
    kernels = {"conv.weight": 6, "up.weight": 2}
    for name, p in model.named_parameters():
        k = kernels.get(name, 1)
        if name in MATRIX_NAMES:
            formula = scion(0.02, lambda d, k=k: 5 * math.sqrt(d.shape[0] / (d.shape[1] / k)) / k * quintic(d), constrained)  # type: ignore[misc]
        elif name in ("embed.weight", "head.weight"):
            formula = scion(0.02, lambda d: 30 / d.shape[1] * d.sign(), constrained)
        else:
            formula = scion(0.02, lambda d: 5 * d / d.square().mean().sqrt(), constrained)
        want = on_blocks(name, formula, start[name], grads[name]) if name in MATRIX_NAMES else formula(start[name], grads[name])
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-10, msg=name)


def test_muonh_keeps_every_gate_and_q_k_v_on_its_own_sphere() -> None:
    model, start = net(), {n: p.detach().clone() for n, p in net().named_parameters()}
    train_net(model, MuonH(model, 0.3))
    for name in MATRIX_NAMES:
        after = heads_of(name, dict(model.named_parameters())[name].detach(), False)
        for a, b in zip(after, heads_of(name, start[name], False), strict=True):
            assert not torch.allclose(a, b, atol=1e-3)
            torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------- packs, Hyperball


@pytest.mark.parametrize("preset", [Muon, NorMuon, Scion, AdamH, MuonH, LARS, LAMB, Lion, Signum, NormalizedSGD, SGD, AdamW])
def test_packed_equals_one_by_one(preset: Callable[..., NormOptimizer]) -> None:
    """A dozen parameters of three shapes in one optimizer take the steps that each takes alone, under a policy on updates too."""
    shapes = [(6, 4), (6, 4), (4, 6), (6, 4), (4, 6), (5, 5)] * 2
    together, alone, grads = weights(shapes), weights(shapes), gradients(shapes, 3)
    got = drive(preset(together, 0.01), together, grads)
    for i, p in enumerate(alone):
        want = drive(preset([p], 0.01), [p], [[step[i]] for step in grads])[0]
        torch.testing.assert_close(got[i], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("preset", [Muon, AdamW, AdamH, LARS])
def test_packed_equals_one_by_one_under_a_policy_inside(preset: Callable[..., NormOptimizer]) -> None:
    def models() -> tuple[nn.Sequential, list[nn.Sequential]]:
        torch.manual_seed(4)
        together = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(6)]).double()
        singles = [nn.Sequential(nn.Linear(5, 5, bias=False)).double() for _ in range(6)]
        for single, layer in zip(singles, together, strict=True):
            single.load_state_dict({"0.weight": layer.weight})
        return together, singles

    rules = [nw.Rule(params="*", on="update", action="clip_norm", norm="l2", per="unit", radius=1e-3), nw.max_norm(0.4, params="*")]
    row = {"0.weight": "muon"} if preset is Muon else {"0.weight": "adamh"} if preset is AdamH else None
    (together, singles), grads = models(), gradients([(5, 5)] * 6, 4)
    got = drive(preset(together, 0.01, policy=rules, override=row and {"*": row["0.weight"]}), list(together.parameters()), grads)
    for i, single in enumerate(singles):
        optimizer = preset(single, 0.01, policy=rules, override=row)
        want = drive(optimizer, list(single.parameters()), [[step[i]] for step in grads])[0]
        torch.testing.assert_close(got[i], want, rtol=1e-11, atol=1e-13)
        assert preset is LARS or next(iter(optimizer.control.violations().values())) == 5, "the rule on updates has nothing to do"


def test_a_clipped_update_is_the_formula() -> None:
    """A rule on updates inside the step: w ← (1 − ηλ)w + clip(−η·u), the decay not counted as update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    rule = nw.Rule(params="*", on="update", action="clip_norm", norm="l2", per="unit", radius=0.02)
    w, g = model[0].weight.detach().clone(), torch.randn(3, 4, dtype=F64)
    optimizer = SGD(model, 0.1, decay="weight", weight_decay=0.3, policy=[rule])
    drive(optimizer, list(model.parameters()), [[g, torch.randn(3, 3, dtype=F64)]])
    change = -0.1 * g
    change = change * (0.02 / change.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(model[0].weight.detach(), (1 - 0.03) * w + change, rtol=1e-12, atol=1e-12)
