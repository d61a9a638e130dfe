"""``cpr``: constrained parameter regularisation (Franke et al., 2024), a decay whose strength is the multiplier of a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from normwise.engine.block_tensors import weights_of
from normwise.engine.pack import Pack
from normwise.engine.rules.base import runs
from normwise.engine.rules.memory import Observer, Remembering, State, where_finite, zeros
from normwise.engine.step import Turn
from normwise.norms import L2, Norm
from normwise.norms.reduce import wide
from normwise.parameters.inventory import Entry
from normwise.policy import Rule
from normwise.policy.radii import Inflection, Init, WarmStart


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


@runs("cpr")
class Constrained(Remembering):
    """CPR: λ ← max(0, λ + μ(R − κ)), then w ← w − λ·2w, both at the weights before the step, R their mean square."""

    counted = True
    nothing_to_verify = "it pulls towards its bound, and may be above it"
    observers: ClassVar[dict[type[Any], Observer]] = {
        WarmStart: Observer(_unbounded, warm_start),
        Inflection: Observer(_unbounded, inflection),
        float: Observer(zeros("lambda"), stated),
    }

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        self._pending: dict[int, dict[int, tuple[Pack, State]]] = {}

    def to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        return [(L2(), weights_of(part))]

    def run_pack(self, part: Pack, turn: Turn) -> None:
        state, n = self._recall(part), max(1, math.prod(part.block_shape))
        square = part.measure(L2(), weights_of(part)).to(wide(part.params[0].device)).square() / n
        kappa, fresh = self.observe(self.rule.radius, state, square)
        if not isinstance(self.rule.radius, WarmStart | Inflection):
            kappa = self._stated(part, turn, n).expand_as(square)
        multiplier = (state["lambda"] + self.strength(turn) * (square - kappa)).clamp(min=0)
        finite = square.isfinite()
        fresh["lambda"] = torch.where(finite, multiplier, state["lambda"])
        self._pending.setdefault(turn.optimizer, {})[id(part)] = (part, fresh)
        self.multiply(part, weights_of(part), torch.where(finite, 1 - 2 * fresh["lambda"], 1.0), turn)

    def commit(self, turn: Turn) -> None:
        """The multiplier advances with a step that happened, and not twice where one that raised was tried again."""
        for part, fresh in self._pending.pop(turn.optimizer, {}).values():
            self._keep(part, fresh, turn.happened)

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._pending.clear()

    def _stated(self, part: Pack, turn: Turn, n: int) -> Tensor:
        """κ as a mean square: the number, or k times that of the weights when attached."""
        device = part.params[0].device
        bound = torch.as_tensor(self.radius(part, turn), dtype=wide(device), device=device)
        if not isinstance(self.rule.radius, Init):
            return bound
        return bound * torch.cat([m.radius for m in part.members if m.radius is not None]) / n
