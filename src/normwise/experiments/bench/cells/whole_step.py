"""What has no optimizer step of its own to stand beside: ways that change the forward or the backward pass, in whole training steps.

Beside the plain step, in turn: ``parametrizations.spectral_norm`` and ``weight_norm`` on every layer and, where GeoTorch is installed, its
sphere for each unit of the linear ones, which compute each weight anew in the forward pass and are other methods, so that there is no bar;
and L2 penalties, in the loss and as the gradient that the control adds (bar: a third of the time). All with fused AdamW at a rate of 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normwise as nw
from normwise.experiments.bench.cells.clock import rounds_for
from normwise.experiments.bench.cells.networks import CNN_CASE, WIDE, Case, Loss, weights_of
from normwise.experiments.framework.figures import finite, ratio_interval
from normwise.experiments.framework.timing import device, in_turn, seconds

NETWORKS = (CNN_CASE, WIDE)
STRENGTH, SECONDS = 1e-4, 4.0
THIRD = 1 / 3
IN_LOSS, AS_GRADIENT = "penalty in the loss", "nw.l2_penalty"


def training_step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, extra: Callable[[], Tensor] | None = None) -> None:
    optimizer.zero_grad()
    value = loss(model) if extra is None else loss(model) + extra()
    value.backward()    # type: ignore[no-untyped-call]
    optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused, at a rate of 0 and without decay: every weight stays where it is."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def step_seconds(model: nn.Module, loss: Loss, budget: float = 1.0, most: int = 30) -> float:
    """Of a whole step without control: the median of as many as fit into the budget, at least three."""
    optimizer = adamw(model)
    taken = [seconds(lambda: training_step(model, loss, optimizer)) for _ in range(2)]
    count = min(most, max(3, int(budget / taken[-1])))
    return statistics.median(seconds(lambda: training_step(model, loss, optimizer)) for _ in range(count))


def rows(case: Case, rounds: int, budget: float = SECONDS) -> list[dict[str, Any]]:
    """Of one network: what each way adds to its training step, in µs."""
    with torch.device(device()):
        loss, steps = case.batch(), steps_of(case)
    calls = {name: _timed(step, loss) for name, step in steps.items()}
    in_turn(list(calls.values()), 1, warm_up=0, threads=None)
    count = rounds_for(list(calls.values()), rounds, budget)
    taken = dict(zip(calls, in_turn(list(calls.values()), count, warm_up=0, threads=None, alternate=True), strict=True))
    plain = taken.pop("nothing")
    added = {name: [a - b for a, b in zip(one, plain, strict=True)] for name, one in taken.items()}
    typical = {name: statistics.median(one) for name, one in added.items()}
    step = statistics.median(plain)
    found: list[dict[str, Any]] = [
        {"case": case.name, "way": name, "added_us": 1e6 * typical[name], "step_us": 1e6 * step, "share": typical[name] / step,
         "rounds": count}
        for name in added
    ]  # fmt: skip
    low, high = ratio_interval(added[AS_GRADIENT], added[IN_LOSS])
    penalty = next(row for row in found if row["way"] == AS_GRADIENT)
    ratio = typical[AS_GRADIENT] / typical[IN_LOSS] if typical[IN_LOSS] > 0 else None
    penalty |= {"ratio": ratio, "bar": THIRD, "low": finite(low), "high": finite(high)}
    return found


Step = tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor] | None]


def steps_of(case: Case) -> dict[str, Step]:
    """Models of one start each, with their optimizers and what is added to the loss."""
    steps: dict[str, Step] = {}
    ways = _parametrized()
    for name in ("nothing", *ways, IN_LOSS, AS_GRADIENT):
        torch.manual_seed(0)
        model = case.build()
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
            ways.get(name, id)(layer)
        tensors = [w.tensor for w in weights_of(model)]
        steps[name] = model, adamw(model), partial(_penalty, tensors) if name == IN_LOSS else None
        if name == AS_GRADIENT:
            nw.attach(model, steps[name][1], nw.l2_penalty(STRENGTH))
    return steps


def _parametrized() -> dict[str, Callable[[nn.Module], object]]:
    """What to do to each layer."""
    ways: dict[str, Callable[[nn.Module], object]] = {
        "spectral_norm": parametrizations.spectral_norm, "weight_norm": parametrizations.weight_norm,
    }  # fmt: skip
    if find_spec("geotorch") is not None:
        sphere = import_module("geotorch").sphere
        # Along the last axis, which is a unit's in a linear layer alone.
        ways["geotorch.sphere"] = lambda layer: sphere(layer, "weight") if isinstance(layer, nn.Linear) else None
    return ways


def _penalty(tensors: list[Tensor]) -> Tensor:
    return STRENGTH / 2 * torch.stack([t.square().sum() for t in tensors]).sum()


def _timed(step: Step, loss: Loss) -> Callable[[], float]:
    model, optimizer, extra = step
    return lambda: seconds(lambda: training_step(model, loss, optimizer, extra))
