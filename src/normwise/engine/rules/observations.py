"""What rules remember of what they measure: pure functions of (kind, state, value). Nothing is read back from a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normwise.norms.reduce import may_branch, wide
from normwise.policy.radii import Inflection, Quantile, WarmStart, ZScore

State = dict[str, Tensor]
"""Named tensors whose first axis is the block."""
Observe = Callable[[Any, State, Tensor], tuple[Tensor, State]]
"""(kind, state, what was measured a block) -> (the radius now, the state after it)."""


@dataclass(frozen=True)
class Observer:
    """A kind of memory: how it looks at first, ``first(kind, blocks, device)``, and what an observation does to it."""

    first: Callable[[Any, int, torch.device], State]
    observe: Observe


def zeros(*names: str) -> Callable[[Any, int, torch.device], State]:
    """A state of one zero a block under each name."""
    return lambda kind, blocks, device: {name: torch.zeros(blocks, dtype=wide(device), device=device) for name in names}


def where_finite(value: Tensor, fresh: State, state: State) -> State:
    """What is not finite was not seen."""
    seen = value.isfinite()
    return {name: torch.where(seen.view(-1, *[1] * (new.ndim - 1)), new, state[name]) for name, new in fresh.items()}


# ---------------------------------------------------------------------------------------------------- gradient norms


def _empty_history(kind: Quantile, blocks: int, device: torch.device) -> State:
    history = torch.full((blocks, kind.window), torch.inf, dtype=wide(device), device=device)
    return {"history": history, "count": torch.zeros(blocks, dtype=wide(device), device=device)}


def quantile(kind: Quantile, state: State, value: Tensor) -> tuple[Tensor, State]:
    """The percentile of the last norms with this one, linearly interpolated; the oldest makes room."""
    place = (state["count"] % kind.window).long()[:, None]
    fresh = where_finite(value, {"history": state["history"].scatter(1, place, value[:, None]), "count": state["count"] + 1}, state)
    ordered = _filled(fresh, kind.window).sort(dim=1).values
    rank = (fresh["count"].clamp(max=kind.window) - 1).clamp(min=0) * (kind.percentile / 100)
    low, high = (ordered.gather(1, end.long()[:, None])[:, 0] for end in (rank.floor(), rank.ceil()))
    return torch.lerp(low, high, rank - rank.floor()), fresh


def _filled(state: State, window: int) -> Tensor:
    """The part of the history that holds norms, where looking is free; what is empty is infinite and sorts last."""
    history = state["history"]
    return history[:, : max(1, min(window, int(state["count"].max())))] if may_branch(history) else history


def zscore(kind: ZScore, state: State, value: Tensor) -> tuple[Tensor, State]:
    """Kumar et al., 2025: infinite but for a spike. While warming up the mean and the variance are those of all norms so far (Welford)."""
    mean, var = state["mean"], state["variance"]
    warm, seen = state["count"] < kind.warmup, state["count"] + 1
    score = (value - mean) / var.sqrt()
    spike = ~warm & (score > kind.z)
    limit = torch.where(spike, mean + kind.z**2 / score * var.sqrt(), torch.inf)
    entering = torch.minimum(value, limit)
    new = torch.where(warm, mean + (value - mean) / seen, kind.alpha * mean + (1 - kind.alpha) * entering)
    early = var + ((value - mean) * (value - new) - var) / seen
    late = kind.alpha * var + (1 - kind.alpha) * (entering - new).square()
    return limit, where_finite(value, {"mean": new, "variance": torch.where(warm, early, late), "count": seen}, state)


# ----------------------------------------------------------------------------------------------------- CPR's bounds


def _unbounded(kind: Any, blocks: int, device: torch.device) -> State:
    state = zeros("lambda", "kappa", "step", "before", "growth")(kind, blocks, device)
    state["kappa"].fill_(torch.inf)
    return state


def warm_start(kind: WarmStart, state: State, value: Tensor) -> tuple[Tensor, State]:
    """κ = R after so many steps; before that none."""
    kappa = torch.where(state["step"] == kind.steps, value, state["kappa"])
    return kappa, where_finite(value, {**state, "kappa": kappa, "step": state["step"] + 1}, state)


def inflection(kind: Inflection, state: State, value: Tensor) -> tuple[Tensor, State]:
    """κ = R at the first look at which R grew by less than between the two looks before."""
    step = state["step"]
    look = step % kind.interval == 0
    growth = value - state["before"]
    slower = look & (step >= 2 * kind.interval) & (growth < state["growth"]) & state["kappa"].isinf()
    kappa = torch.where(slower, value, state["kappa"])
    fresh = {"before": torch.where(look, value, state["before"]), "growth": torch.where(look, growth, state["growth"])}
    return kappa, where_finite(value, {**state, **fresh, "kappa": kappa, "step": step + 1}, state)


def stated(kind: Any, state: State, value: Tensor) -> tuple[Tensor, State]:
    """A bound that needs no finding."""
    return state["lambda"], dict(state)


OBSERVERS: dict[type[Any], Observer] = {
    Quantile: Observer(_empty_history, quantile),
    ZScore: Observer(zeros("mean", "variance", "count"), zscore),
    WarmStart: Observer(_unbounded, warm_start),
    Inflection: Observer(_unbounded, inflection),
    float: Observer(zeros("lambda"), stated),
}
"""By the kind of radius; ``float`` stands for every radius that is stated."""
