"""Rules that remember what they measure, by parameter: named tensors, one row a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normwise.engine.pack import Pack
from normwise.engine.rules.base import BoundRule
from normwise.norms.reduce import wide
from normwise.parameters.inventory import Entry
from normwise.policy import Rule

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


class Remembering(BoundRule):
    """A rule with a state of its own for each parameter (or one for all, ``per="global"``): named tensors, one row a block."""

    remembers = True
    observers: ClassVar[dict[type[Any], Observer]]
    """By the kind of radius; ``float`` stands for every radius that is stated."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        observer = self.observers.get(type(rule.radius), self.observers.get(float))
        assert observer is not None
        self.observe = observer.observe
        for part in self.packs:
            for key, count, device in part.holders():
                self.store[key] = observer.first(rule.radius, count, device)

    def _recall(self, part: Pack) -> State:
        states = [self.store[key] for key, _, _ in part.holders()]
        return states[0] if len(states) == 1 else {name: torch.cat([s[name] for s in states]) for name in states[0]}

    def _keep(self, part: Pack, fresh: State, happened: Tensor | None) -> None:
        places = part.holders()
        for name, values in fresh.items():
            rows = torch.split(values, [count for _, count, _ in places])
            for (key, _, _), row in zip(places, rows, strict=True):
                old = self.store[key][name]
                old.copy_(row if happened is None else torch.where(happened.to(old.device) > 0, row, old))
