"""What a step prepares when rules are bound gives the numbers of the careful way, from the smallest weights to the largest.

Bit for bit by torch's calls; by the kernels in C, where there are any, to the last digit of fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.engine.rules.bounds import Bound
from normwise.engine.rules.decay import Shrinking
from normwise.engine.rules.penalty import Penalty
from normwise.norms import native
from normwise.norms.reduce import column_norms

SIZES = [(1e-42, 1e-35), (1e-20, 1e-35), (1e-3, 1e-3), (1.0, 100.0), (1e18, 1e-3), (1e36, 100.0)]
"""Scales of the numbers, each with a radius; in the long form with every radius."""
every_size = pytest.mark.parametrize(
    "sizes",
    [SIZES, pytest.param([(scale, radius) for scale, _ in SIZES for radius in (1e-35, 1e-3, 100.0)], marks=pytest.mark.long)],
    ids=["some", "every"],
)
SHAPES = ([(64, 64), (64,)], [(3, 5, 5), (7,), (300, 129), (1,)], [(700, 500), (5,), (5,)])


class Weights(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, ...]], scale: float = 1.0) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape) * scale))


def found(model: nn.Module, rule: nw.Rule, grads: Callable[[nn.Parameter], Tensor], steps: int = 3) -> list[Tensor]:
    """Weights, gradients and counts after each of a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control, kept = nw.attach(model, optimizer, rule), []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = grads(p)
        optimizer.step()
        kept += [t.detach().clone() for p in model.parameters() for t in (p, p.grad) if t is not None]
        kept.append(torch.tensor(list(control.violations().values())))
    return kept


def same(one: list[Tensor], other: list[Tensor], ulps: int) -> bool:
    """Within so many of fp32's digits, and of its smallest numbers; what was counted only where it must be all the same, since a block
    that was just brought to its radius is on either side of it."""
    eps, tiny = 2.0**-23, 2.0**-149
    pairs = [(a.double().nan_to_num(7), b.double().nan_to_num(7)) for a, b in zip(one, other, strict=True) if a.is_floating_point()]
    counts = [(a, b) for a, b in zip(one, other, strict=True) if not a.is_floating_point()]
    near = all(bool(((a - b).abs() <= ulps * (eps * b.abs() + tiny)).all()) for a, b in pairs)
    return near and (ulps > 0 or all(torch.equal(a, b) for a, b in counts))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(native.library() is None, reason="no C compiler"))])
def careful(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Called, it leaves every rule the careful way without kernels, and says by how many ulp what was before may differ."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)

    def begin() -> int:
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(Bound, "prepared", lambda self, optimizer: self.run)
        return 4 if request.param else 0    # in three steps

    return begin


@pytest.mark.filterwarnings("ignore")    # norms that are not finite are told
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("last", ["random", "zero", "nan"])
@every_size
def test_gradients_are_clipped(
    shapes: list[tuple[int, ...]], last: str, sizes: list[tuple[float, float]], careful: Callable[[], int]
) -> None:
    def all_of_them() -> list[list[Tensor]]:
        results = []
        for scale, radius in sizes:
            torch.manual_seed(0)
            model = Weights(shapes)
            end = list(model.parameters())[-1]

            def gradient(p: nn.Parameter, scale: float = scale, end: nn.Parameter = end) -> Tensor:
                g = torch.randn_like(p) * scale
                return g * (0.0 if last == "zero" else math.nan) if p is end and last != "random" else g

            results.append(found(model, nw.clip_grad_norm(radius), gradient))
        return results

    quick = all_of_them()
    ulps = careful()
    assert all(same(a, b, ulps) for a, b in zip(quick, all_of_them(), strict=True))


class Transposed(nn.Module):
    """Stores its weight as (inputs, outputs), as GPT-2's layers do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


nw.register_layout(Transposed, lambda module, name, t: nw.Layout("io", tuple(t.shape)), role="hidden")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: nn.Linear(129, 40, bias=False), lambda: Transposed(129, 40), lambda: Transposed(256, 7)])
@pytest.mark.parametrize("rows", ["random", "one zero", "some tiny", "one infinite"])
@pytest.mark.parametrize("method", [nw.max_norm, nw.unit_norm])
@every_size
def test_units_are_bounded(
    make: Callable[[], nn.Module], rows: str, method: Callable[[float], nw.Rule], sizes: list[tuple[float, float]],
    careful: Callable[[], int],
) -> None:
    def all_of_them() -> list[list[Tensor]]:
        results = []
        for scale, radius in sizes:
            torch.manual_seed(0)
            model = nn.Sequential(make(), make())
            for layer in model:
                with torch.no_grad():
                    layer.weight *= scale
                    units = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
                    units[0] *= {"random": 1.0, "one zero": 0.0, "some tiny": 1e-25, "one infinite": math.inf}[rows]
            results.append(found(model, method(radius), torch.zeros_like))
        return results

    quick = all_of_them()
    ulps = careful()
    assert all(same(a, b, ulps) for a, b in zip(quick, all_of_them(), strict=True))


@pytest.mark.parametrize("rows", [1, 7, 128, 300, 5000])
def test_norms_of_columns_are_those_of_float64(rows: int) -> None:
    """Within two eps, whatever the sizes of the numbers in a column, and where their squares leave fp32's range."""
    torch.manual_seed(0)
    x = torch.randn(rows, 60) * torch.exp(4 * torch.randn(rows, 60))
    x[:, 20:] *= torch.logspace(-42, 30, 40)
    x[:, 3] = 0
    exact = x.double().norm(dim=0)
    eps = torch.finfo(torch.float32).eps
    assert ((column_norms(x) - exact).abs() <= 2 * eps * exact).all()
    x[0, 5], x[0, 6] = math.inf, math.nan
    got = column_norms(x)
    assert got[5] == math.inf and got[6].isnan() and abs(got[4] - exact[4]) <= 2 * eps * exact[4]


@pytest.mark.parametrize("rule", [
    nw.l2_penalty(0.01), nw.l1_penalty(0.01), nw.weight_decay(0.3), nw.l1_prox(0.2), nw.clip_weight_value(0.05), nw.non_negative(),
], ids=lambda r: r.label())  # fmt: skip
@pytest.mark.parametrize("odd", [None, "a rate of its own", "no gradient", "maximize"])
def test_rules_on_entries(rule: nw.Rule, odd: str | None, careful: Callable[[], int]) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 7), nn.Linear(7, 3))
        groups = [{"params": list(model[0].parameters())}, {"params": [p for layer in model[1:] for p in layer.parameters()]}]
        if odd == "a rate of its own":
            groups[1]["lr"] = 0.5    # type: ignore[assignment]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, maximize=odd == "maximize")
        nw.attach(model, optimizer, rule)
        kept = []
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 12)).square().sum().backward()
            if odd == "no gradient":
                model[1].weight.grad = None
            optimizer.step()
            kept += [p.detach().clone() for p in model.parameters()]
        return kept

    quick = run()
    ulps = careful()
    monkey = pytest.MonkeyPatch()
    for cls in (Penalty, Shrinking):
        monkey.setattr(cls, "prepared", lambda self, optimizer: self.run)
    slow = run()
    monkey.undo()
    assert same(quick, slow, ulps)
