"""What has no optimizer step of its own to stand beside: ways that change the forward or the backward pass, in whole training steps.

Beside the plain step, in turn: ``parametrizations.spectral_norm`` and ``weight_norm`` on every layer, which compute each weight anew in the
forward pass and keep no norm bounded, so that there is no bar; and L2 penalties, in the loss and as the gradient that the control adds
(bar: a third of the time). All with fused AdamW at a rate of 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normwise as nw
from normwise.experiments.bench.cells.clock import rounds_for
from normwise.experiments.bench.cells.networks import CNN_CASE, WIDE, Case, Loss, weights_of
from normwise.experiments.framework.figures import finite, ratio_interval
from normwise.experiments.framework.timing import in_turn, seconds

NETWORKS = (CNN_CASE, WIDE)
STRENGTH, SECONDS = 1e-4, 4.0
THIRD = 1 / 3


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
    loss, steps = case.batch(), _steps(case)
    calls = {name: _timed(step, loss) for name, step in steps.items()}
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
    ours, theirs = "nw.l2_penalty", "penalty in the loss"
    low, high = ratio_interval(added[ours], added[theirs])
    penalty = next(row for row in found if row["way"] == ours)
    ratio = typical[ours] / typical[theirs] if typical[theirs] > 0 else None
    penalty |= {"ratio": ratio, "bar": THIRD, "low": finite(low), "high": finite(high)}
    return found


def _steps(case: Case) -> dict[str, tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor] | None]]:
    """Models of one start each, with their optimizers and what is added to the loss."""
    made: dict[str, nn.Module] = {}
    for name in ("nothing", "spectral_norm", "weight_norm", "penalty in the loss", "nw.l2_penalty"):
        torch.manual_seed(0)
        made[name] = case.build()
    for layer in [m for m in made["spectral_norm"].modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        parametrizations.spectral_norm(layer)
    for layer in [m for m in made["weight_norm"].modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        parametrizations.weight_norm(layer)
    steps = {name: (model, adamw(model), None) for name, model in made.items()}
    nw.attach(made["nw.l2_penalty"], steps["nw.l2_penalty"][1], nw.l2_penalty(STRENGTH))
    tensors = [w.tensor for w in weights_of(made["penalty in the loss"])]
    penalised = made["penalty in the loss"], steps["penalty in the loss"][1], lambda: _penalty(tensors)
    return {**steps, "penalty in the loss": penalised}


def _penalty(tensors: list[Tensor]) -> Tensor:
    return STRENGTH / 2 * torch.stack([t.square().sum() for t in tensors]).sum()


def _timed(step: tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor] | None], loss: Loss) -> Callable[[], float]:
    model, optimizer, extra = step
    return lambda: seconds(lambda: training_step(model, loss, optimizer, extra))
