"""Each choice of each column against its formula, written out in float64 on one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.norms.linalg import METHODS, error_bound
from normwise.optim import CHOICES, DEFAULTS, PRESETS, NormOptimizer

F64 = torch.float64
ETA, LAMBDA = 0.1, 0.3


def start(seed: int = 0, shape: tuple[int, ...] = (6, 4)) -> tuple[Tensor, list[Tensor]]:
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=gen, dtype=F64)
    return w, [torch.randn(shape, generator=gen, dtype=F64) for _ in range(4)]


def steps(w: Tensor, grads: list[Tensor], **row: Any) -> Tensor:
    """What an optimizer of this one row makes of ``w``, beside a twin that shares its pack, so that blocks are batched."""
    p, twin = nn.Parameter(w.clone()), nn.Parameter(-2 * w)
    optimizer = NormOptimizer([p, twin], {"row": {"lr": ETA, **row}}, {}, "row")
    for g in grads:
        p.grad, twin.grad = g.clone(), g.flip(0).contiguous()
        optimizer.step()
    return p.detach()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- directions


def directions(kind: str, grads: list[Tensor], mu: float = 0.7, betas: tuple[float, float] = (0.6, 0.8)) -> list[Tensor]:
    b, found = torch.zeros_like(grads[0]), []
    for g in grads:
        if kind in ("heavy_ball", "nesterov"):
            b = mu * b + g
            found.append(b if kind == "heavy_ball" else g + mu * b)
        elif kind in ("ema", "ema_nesterov"):
            b = mu * b + (1 - mu) * g
            found.append(b if kind == "ema" else (1 - mu) * g + mu * b)
        else:
            found.append(betas[0] * b + (1 - betas[0]) * g if kind == "lion" else g)
            b = betas[1] * b + (1 - betas[1]) * g
    return found


@pytest.mark.parametrize("kind", [d for d in CHOICES["direction"] if d != "adam"])
def test_directions(kind: str) -> None:
    w, grads = start()
    got = steps(w, grads, direction=kind, momentum=0.7, betas=(0.6, 0.8))
    close(got, w - ETA * sum(directions(kind, grads)))


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_adams_direction_without_and_with_blocks(scale: str) -> None:
    w, grads = start()
    got, m, v = steps(w, grads, direction="adam", betas=(0.6, 0.8), eps=0.01, scale=scale), torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = 0.6 * m + 0.4 * g, 0.8 * v + 0.2 * g * g
        u = m / (1 - 0.6**t) / ((v / (1 - 0.8**t)).sqrt() + 0.01)
        w = w - ETA * u * (w.norm() / u.norm() if scale == "relative" else 1)
    close(got, w)


# ---------------------------------------------------------------------------------------------------------- act


def per_unit(d: Tensor) -> Tensor:
    return d / d.norm(dim=1, keepdim=True)


def uv(d: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(d, full_matrices=False)
    return u @ vh


LMOS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda d: d / d.norm(),
    "linf": torch.sign,
    "l1": lambda d: d.sign() * (d.abs() == d.abs().max()),
    "spectral": uv,
    "nuclear": lambda d: torch.outer(torch.linalg.svd(d)[0][:, 0], torch.linalg.svd(d)[2][0]),
    "max_of_units": per_unit,
    "max_of_inputs": lambda d: per_unit(d.mT).mT,
    "rms": lambda d: d / d.square().mean().sqrt(),
    "rms_rms": lambda d: math.sqrt(d.shape[0] / d.shape[1]) * uv(d),
    "sign": lambda d: d.sign() / d.shape[1],
    "rms_inf": lambda d: per_unit(d) / math.sqrt(d.shape[1]),
    "one_rms": lambda d: per_unit(d.mT).mT * math.sqrt(d.shape[0]),
}


@pytest.mark.parametrize("norm", LMOS)
def test_the_steepest_direction_under_each_norm(norm: str) -> None:
    w, grads = start(1)
    close(steps(w, grads, act="lmo", norm=norm, polar="exact"), w - ETA * sum(LMOS[norm](g) for g in grads))


def test_the_ridge_maps_singular_values() -> None:
    w, grads = start(2)
    want = w.clone()
    for g in grads:
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        t = s / s.square().mean().sqrt()
        want = want - ETA * (u * (t / (t * t + 0.2))) @ vh
    close(steps(w, grads, act="ridge", damping=0.2), want)
    with pytest.raises(ValueError, match="damping > 0"):
        steps(w, grads, act="ridge", damping=0.0)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": torch.linalg.norm,
    "l1": lambda d: d.abs().sum(),
    "linf": lambda d: d.abs().max(),
    "spectral": lambda d: torch.linalg.svdvals(d)[0],
    "rms": lambda d: d.square().mean().sqrt(),
    "rms_rms": lambda d: torch.linalg.svdvals(d)[0] * math.sqrt(d.shape[1] / d.shape[0]),
    "max_of_units": lambda d: d.norm(dim=1).max(),
}


@pytest.mark.parametrize("norm", VALUES)
def test_the_normalised_direction_under_each_norm(norm: str) -> None:
    w, grads = start(2)
    close(steps(w, grads, act="normalize", norm=norm), w - ETA * sum(g / VALUES[norm](g) for g in grads))


@pytest.mark.parametrize(("per", "dim"), [("unit", 1), ("input", 0), ("tensor", (0, 1)), ("element", ())])
def test_blocks_of_the_normalised_direction(per: str, dim: Any) -> None:
    w, grads = start(3)
    pieces = [g.sign() if per == "element" else g / g.norm(dim=dim, keepdim=True) for g in grads]
    close(steps(w, grads, act="normalize", per=per), w - ETA * sum(pieces))


@pytest.mark.parametrize("method", [*METHODS, "exact"])
def test_every_polar_method_gives_a_nearly_orthogonal_direction(method: str) -> None:
    w, grads = start(4)
    change = w - steps(w, grads[:1], act="lmo", norm="spectral", polar=method, lr=1.0)
    sigma = torch.linalg.svdvals(change)
    assert (sigma - 1).abs().max() < 0.01 + (error_bound(method) if method in METHODS else 0)
    assert (change * grads[0]).sum() > 0.65 * torch.linalg.svdvals(grads[0]).sum()


def test_experts_are_blocks_of_their_own() -> None:
    gen = torch.Generator().manual_seed(5)
    w, g = torch.randn(3, 4, 2, generator=gen, dtype=F64), torch.randn(3, 4, 2, generator=gen, dtype=F64)
    for per in ("expert", "matrix"):
        p = nn.Parameter(w.clone())
        row = {"lr": ETA, "act": "lmo", "norm": "spectral", "polar": "exact", "per": per}
        group = {"params": [p], "layouts": [nw.Layout("eoi", (3, 4, 2))]}
        optimizer = NormOptimizer([group], {"row": row}, {}, "row")
        p.grad = g.clone()
        optimizer.step()
        close(p.detach(), w - ETA * torch.stack([uv(x) for x in g]))


# ---------------------------------------------------------------------------------------------------------- scale, rows


SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "absolute": lambda m, n: 1.0,
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "rms_rms": lambda m, n: math.sqrt(m / n),
    "conv_rms_rms": lambda m, n: math.sqrt(m / n),
}


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("scale", SHAPE_SCALES)
def test_scales_of_the_shape(scale: str, shape: tuple[int, int]) -> None:
    w, grads = start(6, shape)
    close(steps(w, grads, scale=scale, radius=0.5), w - ETA * 0.5 * SHAPE_SCALES[scale](*shape) * sum(grads))


WEIGHT_SCALES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "relative": lambda now, g, first: now.norm() / g.norm(),
    "init": lambda now, g, first: first.norm() / g.norm(),
    "lamb": lambda now, g, first: now.norm() / g.norm(),
    "lars": lambda now, g, first: 0.05 * now.norm() / (g.norm() + LAMBDA * now.norm()),
    "normuon": lambda now, g, first: 0.2 * math.sqrt(g.numel()) / g.norm(),
}


@pytest.mark.parametrize("scale", WEIGHT_SCALES)
def test_scales_of_the_weights_and_the_update(scale: str) -> None:
    w, grads = start(7)
    now = w
    for g in grads:
        now = now - ETA * WEIGHT_SCALES[scale](now, g, w) * g
    close(steps(w, grads, scale=scale, trust=0.05, decay="none", weight_decay=LAMBDA), now)


def test_a_relative_step_leaves_zero_at_the_floor() -> None:
    g = start(8)[1][0]
    floor = 1e-3 * math.sqrt(g.numel())
    close(steps(torch.zeros_like(g), [g], scale="relative"), -ETA * floor * g / g.norm())
    close(steps(torch.zeros_like(g), [0 * g], scale="relative"), 0 * g)


def test_units_over_the_root_of_their_second_moment() -> None:
    w, grads = start(9)
    got, v = steps(w, grads, row_beta=0.6, eps=0.01), torch.zeros(6, dtype=F64)
    for g in grads:
        v = 0.6 * v + 0.4 * g.square().mean(1)
        w = w - ETA * g / (v.sqrt() + 0.01)[:, None]
    close(got, w)


def test_velocity_is_momentum_on_the_scaled_step() -> None:
    """A learning rate that falls to zero does not stop what is under way."""
    w, grads = start(10)
    p = nn.Parameter(w.clone())
    optimizer = NormOptimizer([p], {"row": {"lr": ETA, "velocity": 0.5, "scale": "relative"}}, {}, "row")
    v = torch.zeros_like(w)
    for i, g in enumerate(grads):
        optimizer.param_groups[0]["lr"] = lr = ETA if i < 2 else 0.0
        p.grad = g.clone()
        optimizer.step()
        v = 0.5 * v + lr * w.norm() / g.norm() * g
        w = w - v
    close(p.detach(), w)


# ---------------------------------------------------------------------------------------------------------- decay


DECAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda now, g: now - ETA * g.sign(),
    "gradient": lambda now, g: now - ETA * (g + LAMBDA * now).sign(),
    "direction": lambda now, g: now - ETA * (g + LAMBDA * now).sign(),
    "weight": lambda now, g: (1 - ETA * LAMBDA) * now - ETA * g.sign(),
    "cautious": lambda now, g: now - ETA * LAMBDA * now * (now * g > 0) - ETA * g.sign(),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_decays(decay: str) -> None:
    w, grads = start(11)
    now = w
    for g in grads:
        now = DECAYS[decay](now, g)
    close(steps(w, grads, act="lmo", norm="linf", decay=decay, weight_decay=LAMBDA), now)


def test_decay_of_the_direction_comes_before_the_act() -> None:
    """LAMB adds λw to Adam's direction, and what is normalised is the sum."""
    w, grads = start(12)
    now, b = w, torch.zeros_like(w)
    for g in grads:
        b = 0.5 * b + g
        u = b + LAMBDA * now
        now = now - ETA * u / u.norm()
    got = steps(w, grads, direction="heavy_ball", momentum=0.5, act="normalize", decay="direction", weight_decay=LAMBDA)
    close(got, now)


def test_cautious_decay_never_pulls_against_the_step() -> None:
    w, grads = start(13)
    without, cautious = steps(w, grads[:1]), steps(w, grads[:1], decay="cautious", weight_decay=LAMBDA)
    decayed = cautious != without
    assert 0 < int(decayed.sum()) < w.numel()
    assert ((without - w).sign() == (cautious - without).sign())[decayed].all()    # both towards zero
    assert torch.equal(decayed, (w.abs() > (w - 1e-6 * grads[0]).abs()))


# ---------------------------------------------------------------------------------------------------------- hold


def hold_formulas(w0: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def floor(now: Tensor, g: Tensor) -> Tensor:
        new, least = now - ETA * g, 0.9 * w0.norm() / math.sqrt(len(w0))
        return new * (least / new.norm(dim=1, keepdim=True)).clamp(min=1)

    def brake(now: Tensor, g: Tensor) -> Tensor:
        new = now - ETA * g
        grown = new.norm() - now.norm()
        return new * (now.norm() + (0.9 * grown if grown > 0 else grown)) / new.norm()

    return {
        "none": lambda now, g: now - ETA * g,
        "sphere": lambda now, g: (now - ETA * g) * w0.norm() / (now - ETA * g).norm(),
        "ball": lambda now, g: (now - ETA * g) * min(1, 0.9 / float((now - ETA * g).norm())),
        "frank_wolfe": lambda now, g: (1 - ETA) * now - ETA * g,
        "row_floor": floor,
        "radial_brake": brake,
    }


@pytest.mark.parametrize("hold", CHOICES["hold"])
def test_holds(hold: str) -> None:
    w, grads = start(14)
    now, formula = w, hold_formulas(w)[hold]
    for g in grads:
        now = formula(now, g)
    close(steps(w, grads, hold=hold, limit=0.9), now)
    if hold != "none":
        assert not torch.allclose(now, w - ETA * sum(grads)), "the hold has nothing to do"


@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0])
def test_a_brake_keeps_its_share_of_growth_and_all_of_a_shrinking(limit: float) -> None:
    w = start(15)[0]
    grow, shrink = steps(w, [-w], hold="radial_brake", limit=limit), steps(w, [w], hold="radial_brake", limit=limit)
    close(grow.norm(), w.norm() * (1 + limit * ETA))
    close(shrink, (1 - ETA) * w)


def test_row_floor_stretches_short_units_only_and_leaves_zero_ones() -> None:
    w = start(16)[0]
    w[0], w[1] = 0.0, 1e-3 * w[1]
    got = steps(w, [torch.zeros_like(w)], hold="row_floor", limit=0.5)
    floor = 0.5 * w.norm() / math.sqrt(6)
    assert torch.equal(got[0], w[0]) and torch.equal(got[2:], w[2:])
    close(got[1], w[1] * floor / w[1].norm())


@pytest.mark.parametrize("hold", ["sphere", "ball"])
def test_holds_by_block(hold: str) -> None:
    w, grads = start(17)
    got, now = steps(w, grads, hold=hold, per="unit", limit=0.8), w
    for g in grads:
        new = now - ETA * g
        length = new.norm(dim=1, keepdim=True)
        now = new * (w.norm(dim=1, keepdim=True) / length if hold == "sphere" else (0.8 / length).clamp(max=1))
    close(got, now)


def test_frank_wolfe_stays_in_the_hull_of_the_ball() -> None:
    """From inside σ₁ ≤ ρ every step stays inside, whatever the gradients and the decay-free rate."""
    w, grads = start(18)
    w = 3 * w / torch.linalg.svdvals(w)[0]
    row = {"act": "lmo", "norm": "spectral", "polar": "exact", "radius": 3.0, "hold": "frank_wolfe"}
    got = steps(w, [g * 10.0**i for i, g in enumerate(grads)] * 5, **row)
    assert torch.linalg.svdvals(got)[0] <= 3.0 * (1 + 1e-12)


DOCS = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text(encoding="utf-8")
IN_DOCS = ("hidden", "conv", "recurrent", "embedding", "head", "other", "bias", "gain")


@pytest.mark.parametrize("column", CHOICES)
def test_the_docs_show_every_choice_as_it_is(column: str) -> None:
    section = DOCS.split(f"### `{column}` (default `{DEFAULTS[column]}`)\n")[1].split("\n\n")[0]
    assert section.splitlines()[2:] == [f"| `{choice}` | {meaning} |" for choice, meaning in CHOICES[column].items()]


@pytest.mark.parametrize("name", PRESETS)
def test_the_docs_show_every_row_of_every_preset_as_it_is(name: str) -> None:
    routing = PRESETS[name](EveryRole()).routing
    assert routing is not None and {e.role for e in routing.entries} == set(IN_DOCS)
    lines = []
    for row, columns in routing.rows.items():
        roles = {e.role for e in routing.entries if routing.of[e.name] == row}
        listed = "every role" if len(roles) == len(IN_DOCS) else ", ".join(r for r in IN_DOCS if r in roles)
        changed = {k: v for k, v in columns.items() if DEFAULTS[k] != v or k == "lr"}
        shown = " ".join(f"`{k}={v:g}`" if isinstance(v, float) else f"`{k}={v}`" for k, v in changed.items())
        lines.append(f"| `{name}` | `{row}` | {listed} | {shown} |")
    assert [line for line in DOCS.splitlines() if line.startswith(f"| `{name}` | `")] == lines


class EveryRole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.rnn, self.norm = nn.Embedding(4, 4), nn.Conv1d(4, 4, 2), nn.RNN(4, 4), nn.LayerNorm(4)
        self.hidden, self.head, self.bare = nn.Linear(4, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(2, 2))


def test_every_choice_has_its_formula_here() -> None:
    """A choice that is registered and proved nowhere is a defect."""
    assert set(SHAPE_SCALES) | set(WEIGHT_SCALES) == set(CHOICES["scale"])
    assert set(DECAYS) == set(CHOICES["decay"])
    assert set(hold_formulas(torch.ones(2, 2))) == set(CHOICES["hold"])
    assert set(CHOICES["act"]) == {"none", "lmo", "normalize", "ridge"}
    assert sorted(CHOICES) == ["act", "decay", "direction", "hold", "rounding", "scale"]    # direction: above; rounding: test_precision.py
