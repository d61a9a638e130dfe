"""The numeric grid: every norm and every rule that bounds, in every dtype, from denormal numbers to the largest.

Measured by formulas in float64 at unit scale, where nothing overflows. At the end: how many were checked, how many bounds broke, and how
often a NaN came out of finite numbers. The full grid is a long test; the default one takes every third point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from norm_cases import DTYPES, FORMULAS, RESULT, gaussian, registered
from normwise.errors import NormwiseError
from normwise.norms import SETS, get_norm
from normwise.policy import actions

EXPONENTS = {
    "float32": (-149, -140, -130, -126, -100, -40, 0, 40, 100, 120, 127),
    "bfloat16": (-133, -130, -126, -100, 0, 40, 100, 120, 126),
    "float16": (-24, -20, -15, -8, 0, 8, 12, 15),
    "float64": (-1074, -1060, -1030, -1022, -500, 0, 500, 1000, 1015),
}
"""Powers of two of the entries, from the least that the dtype has; in float64 the norm itself has to be a number."""
KINDS = ("gauss", "constant", "one entry", "rank one", "far apart")
M, N = 4, 6
REST = {"float32": 149, "bfloat16": 133, "float16": 24, "float64": 1074}
"""The least number of each dtype is 2^-this."""


@dataclass
class Counts:
    """What the grid found."""

    checked: int = 0
    broken: list[str] = field(default_factory=list)
    nans: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        self.checked += 1
        if not holds:
            self.broken.append(what)

    def finite(self, y: Tensor, what: str, overflow: bool = False) -> None:
        """No NaN, and no infinity but where the result is beyond the dtype."""
        self.checked += 1
        if not bool((~y.isnan() if overflow else y.isfinite()).all()):
            self.nans.append(what)

    def report(self) -> None:
        print(f"\nnumeric grid: {self.checked} checked, {len(self.broken)} broken bounds, {len(self.nans)} NaN made from finite input")
        assert not self.broken, self.broken[:20]
        assert not self.nans, self.nans[:20]


def entries(kind: str, dtype: str, exponent: int) -> Tensor:
    """(1, M, N) of the dtype with entries of size 2^exponent and below, finite and not all zero."""
    x = gaussian((M, N), 3).clamp(-1, 1)
    if kind == "constant":
        x = torch.ones_like(x)
    elif kind == "one entry":
        x = torch.zeros_like(x)
        x[1, 2] = -1
    elif kind == "rank one":
        x = (gaussian((M, 1), 4) @ gaussian((1, N), 5)) / 8
    elif kind == "far apart":
        x = torch.full_like(x, 2.0**-60)
        x[2, 1], x[0, 0] = 1.0, 0.5
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, torch.tensor(half)), torch.tensor(exponent - half)).to(DTYPES[dtype])[None]


def unit(x: Tensor) -> tuple[Tensor, int]:
    """x in float64 with entries up to one, and the power of two taken out."""
    exponent = int(torch.frexp(x.double().abs().amax()).exponent)
    half = -exponent // 2
    return torch.ldexp(torch.ldexp(x.double(), torch.tensor(half)), torch.tensor(-exponent - half)), exponent


def size(name: str, x: Tensor) -> float:
    """The norm by its formula; may be infinite in float64."""
    down, exponent = unit(x)
    value = float(FORMULAS[name].value(down if FORMULAS[name].matrix else down.flatten(1)))
    return math.ldexp(value, exponent) if value == 0 or exponent + math.log2(value) < 1024 else math.inf


def grid(every: int) -> Iterator[tuple[str, str, str, int]]:
    points = list(product(registered(), DTYPES, KINDS))
    for i, (name, dtype, kind) in enumerate(points):
        yield from ((name, dtype, kind, e) for k, e in enumerate(EXPONENTS[dtype]) if (i + k) % every == 0)


def radii(name: str, dtype: str, x: Tensor) -> list[float]:
    """Of ordinary size, and a third of the block's norm."""
    return [r for r in (1.0, size(name, x) / 3) if 0 < r < math.inf]


def slack(name: str, dtype: str, radius: float) -> float:
    """What rounding to the dtype may add: relatively, and half of its least number for each entry."""
    least = float(FORMULAS[name].value(torch.ones(1, M, N, dtype=torch.float64)))
    return radius * RESULT[dtype] + math.ldexp(least, -REST[dtype])


def check_norm(name: str, dtype: str, kind: str, exponent: int, counts: Counts) -> None:
    norm, x, where = get_norm(name), entries(kind, dtype, exponent), f"{name} {dtype} {kind} 2^{exponent}"
    if not bool((x != 0).any()):
        return
    for radius in radii(name, dtype, x):
        held = {"project": norm.project(x, radius), "clip_norm": norm.clip_norm(x, radius)}
        for action, y in held.items():
            counts.finite(y, f"{action} {where} to {radius:g}")
            counts.check(size(name, y) <= radius + slack(name, dtype, radius), f"{action} {where}: {size(name, y):g} > {radius:g}")
            inside = size(name, x) <= radius * (1 - RESULT[dtype])
            counts.check(not inside or torch.equal(x, y), f"{action} {where} inside {radius:g} changed")
        y = norm.normalize(x, radius)
        counts.finite(y, f"normalize {where} to {radius:g}")
        counts.check(abs(size(name, y) - radius) <= slack(name, dtype, radius), f"normalize {where}: {size(name, y):g} is not {radius:g}")
        counts.finite(norm.prox(x, radius), f"prox {where} of {radius:g}")
    check_direction(name, dtype, x, where, counts)


def check_direction(name: str, dtype: str, x: Tensor, where: str, counts: Counts) -> None:
    """The LMO and the gradients of penalties: directions, which no scale changes."""
    norm, down = get_norm(name), unit(x)[0]
    y = norm.lmo(x)
    counts.finite(y, f"lmo {where}")
    counts.check(size(name, y) <= 1 + slack(name, dtype, 1.0), f"lmo {where}: {size(name, y):g} > 1")
    dual = float(FORMULAS[name].dual(down if FORMULAS[name].matrix else down.flatten(1)))
    reached = -float((down * y.double()).sum())
    counts.check(abs(reached - dual) <= 4 * RESULT[dtype] * dual + 1e-12, f"lmo {where}: reaches {reached:g} of {dual:g}")
    counts.finite(norm.subgradient(x), f"subgradient {where}")
    for power in (1, 2):
        counts.finite(actions.penalty_gradient(norm, x, power), f"penalty {power} {where}", overflow=True)


def check_sets(dtype: str, kind: str, exponent: int, counts: Counts) -> None:
    x, where = entries(kind, dtype, exponent), f"{dtype} {kind} 2^{exponent}"
    counts.finite(actions.orthogonality_gradient(x), f"orthogonality {where}", overflow=True)
    for name in SETS:
        found = get_norm(name if name != "box" else nw.norms.Box(-1.0, 0.5)).project(x)
        counts.finite(found, f"{name} {where}")


def check_clip_grad(dtype: str, kind: str, exponent: int, counts: Counts) -> None:
    for order, threshold in product((1.0, 1.5, 2.0, 3.0, math.inf), (1.0, 1e-3)):
        p = nn.Parameter(torch.zeros(M, N, dtype=DTYPES[dtype]))
        p.grad = entries(kind, dtype, exponent)[0]
        down, power = unit(p.grad)
        before = math.ldexp(float(torch.linalg.vector_norm(down, order)), power)
        nw.clip_grad_norm_([p], threshold, order)
        down, power = unit(p.grad)
        after = math.ldexp(float(torch.linalg.vector_norm(down, order)), power)
        wanted = min(before, threshold)
        what = f"clip_grad_norm_ p={order} {dtype} {kind} 2^{exponent}: {after:g} for {wanted:g}"
        counts.finite(p.grad, what)
        counts.check(abs(after - wanted) <= wanted * RESULT[dtype] + M * N * math.ldexp(1, -REST[dtype]), what)


def check_rule(name: str, dtype: str, kind: str, exponent: int, counts: Counts) -> None:
    """The same through an optimizer, on weights and on gradients; ``verify`` and the formula agree that the bound holds."""
    x = entries(kind, dtype, exponent)[0]
    per = "matrix" if FORMULAS[name].matrix else "tensor"
    if not bool((x != 0).any()):
        return
    for action, radius in product(("project", "clip_norm", "normalize"), radii(name, dtype, x[None])):
        layer = nn.Linear(N, M, bias=False, dtype=DTYPES[dtype])
        layer.weight.data.copy_(x)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        rules = [nw.Rule(action=action, norm=name, per=per, radius=radius, params="*", on=on) for on in ("weight", "grad")]
        control = nw.attach(layer, optimizer, rules)
        layer.weight.grad = x.clone()
        optimizer.step()
        where = f"rule {action} {name} {dtype} {kind} 2^{exponent} to {radius:g}"
        for on, y in (("weight", layer.weight.detach()), ("grad", layer.weight.grad)):
            counts.finite(y, f"{where} on {on}")
            excess = size(name, y[None]) - radius
            off = abs(excess) if action == "normalize" else excess
            counts.check(off <= slack(name, dtype, radius), f"{where} on {on}: {excess / radius:.3g} beyond")
        if radius * RESULT[dtype] > math.ldexp(M * N, -REST[dtype]):    # a sphere of denormal numbers has no two ulp to be met by
            counts.check(bool(control.verify().ok), f"{where}: {control.verify()}")


def run(every: int, rules_every: int) -> Counts:
    torch.set_num_threads(1)
    counts = Counts()
    for point in grid(every):
        check_norm(*point, counts)
    for point in grid(rules_every):
        check_rule(*point, counts)
    for dtype, kind in product(DTYPES, KINDS):
        for exponent in EXPONENTS[dtype][::every]:
            check_sets(dtype, kind, exponent, counts)
            check_clip_grad(dtype, kind, exponent, counts)
    return counts


def test_the_thinned_grid() -> None:
    counts = run(8, 24)
    assert counts.checked > 5000
    counts.report()


@pytest.mark.long
def test_the_full_grid() -> None:
    run(1, 1).report()


def test_the_grid_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that finds nothing must be able to."""
    counts = Counts()
    monkeypatch.setattr(type(get_norm("l1")), "clip_norm", lambda self, x, radius: x)
    check_norm("l1", "float32", "gauss", 40, counts)
    assert counts.broken
    with pytest.raises(AssertionError):
        counts.report()


def test_rules_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(NormwiseError):
        nw.Rule(action="clip_norm", norm="l1", radius=math.inf * 0)
