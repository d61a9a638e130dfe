"""Gradients or updates clipped to what their own history says: a percentile of their norms (AutoClip), or spikes alone (ZClip).

Nothing is read back from a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from normwise.engine.pack import Pack
from normwise.engine.rules.base import runs
from normwise.engine.rules.bounds import Bound
from normwise.engine.rules.memory import Observer, Remembering, State, where_finite, zeros
from normwise.engine.step import Turn
from normwise.norms import Norm, Radius
from normwise.norms.reduce import may_branch, wide
from normwise.policy import actions
from normwise.policy.radii import Quantile, ZScore


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


@runs(radius=Quantile)
@runs(radius=ZScore)
class Adaptive(Remembering, Bound):
    """Gradients or updates clipped to what their own history says. The history grows after the step, and only if it happened: a closure
    that is evaluated several times is one observation."""

    observers: ClassVar[dict[type[Any], Observer]] = {
        Quantile: Observer(_empty_history, quantile),
        ZScore: Observer(zeros("mean", "variance", "count"), zscore),
    }
    _seen: tuple[Turn, list[tuple[Pack, State]]] | None = None

    def radius(self, part: Pack, turn: Turn | None, step: int = 0) -> Radius:
        return math.inf    # known once the norm is measured

    def _scale(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        assert isinstance(self.norm, Norm)
        value = part.measure(self.norm, tensors)
        self._look_for_nonfinite(value, turn)
        if self.watches:
            self._look_at(value, turn)
        limit, fresh = self.observe(self.rule.radius, self._recall(part), value.to(wide(value.device)))
        if self._seen is None or self._seen[0] is not turn:
            self._seen = (turn, [])
        self._seen[1].append((part, fresh))
        self.multiply(part, tensors, actions.factor("clip_norm", value, limit), turn)

    def commit(self, turn: Turn) -> None:
        """Keeps what the turn observed."""
        if self._seen is not None and self._seen[0] is turn:
            for part, fresh in self._seen[1]:
                self._keep(part, fresh, turn.happened)
            self._seen = None
