"""Radii that a step gives itself: updates of a stated length, and weights whose norm may keep only a share of what a step added."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import starts_of, weights_of
from normwise.engine.pack import Member, Pack
from normwise.engine.rules.base import now, runs
from normwise.engine.rules.bounds import Bound
from normwise.engine.sharded.prefetch import Request
from normwise.engine.step import Turn
from normwise.errors import PolicyError
from normwise.norms import Norm, Radius
from normwise.norms.reduce import wide
from normwise.parameters.inventory import Entry
from normwise.policy import actions
from normwise.policy.radii import Brake, StepLength


@runs(radius=StepLength)
class Stepped(Bound):
    """Updates of length scale · η · (the weight's norm when attached, or before the step, or 1)."""

    paced = True

    def check_group(self, name: str, group: Mapping[str, Any]) -> None:
        """A step that is given its length anew would have the optimizer's own decay in it."""
        decay = float(group.get("weight_decay") or 0.0)
        if decay:
            raise PolicyError(
                f"rule '{self.rule.label()}' sets the length of the step of {name!r}, whose parameter group has weight_decay={decay:g}: "
                "it would be a part of that step, and shrink nothing. Give the group weight_decay=0."
            )
        super().check_group(name, group)

    def _member(self, entry: Entry, optimizer: int) -> Member:
        member = super()._member(entry, optimizer)
        kind = self.rule.radius
        assert isinstance(kind, StepLength)
        if kind.of == "init":
            member.radius = self._initial_norm(member)
        return member

    def refuse_zeros(self, bound_before: Container[str] = ()) -> None:
        """A block of zero would never move."""
        kind = self.rule.radius
        assert isinstance(kind, StepLength)
        for m in self.members if kind.of != "number" and self.rule.floor is None else ():
            if m.radius is not None:
                self._refuse_zero(m.radius, repr(m.name))
            elif m.name not in bound_before:
                self._refuse_zero(self._initial_norm(m), repr(m.name))

    def _measures_starts(self) -> bool:
        return getattr(self.rule.radius, "of", None) == "weight"

    def radius(self, part: Pack, turn: Turn | None, step: int = 0) -> Radius:
        kind = self.rule.radius
        assert isinstance(kind, StepLength) and turn is not None and isinstance(self.norm, Norm)
        length: Radius = 1.0
        if kind.of == "init":
            length = torch.cat([m.radius for m in part.members if m.radius is not None])
        elif kind.of == "weight":
            length = part.measure(self.norm, starts_of(part, turn)).clamp(min=self.rule.floor or 0.0)
        return length * _rates(part, turn) * now(kind.scale, turn.step)


def _rates(part: Pack, turn: Turn) -> Any:
    """η: a number where all members have the same, else one a block."""
    rates = [turn.rate(m) for m in part.members]
    if all(r is rates[0] or (not isinstance(r, Tensor) and r == rates[0]) for r in rates):
        return rates[0]
    device = part.params[0].device
    return torch.cat([torch.as_tensor(r, dtype=wide(device), device=device).reshape(1).expand(part.view.count) for r in rates])


@runs(radius=Brake)
class Braked(Bound):
    """Weights whose norm may keep only a share of what the step added to it."""

    nothing_to_verify = "it brakes a step, and bounds no norm"
    looks_back = True

    def before_begin(self, turn: Turn) -> list[Request]:
        assert isinstance(self.norm, Norm)
        norm, mine = self.norm, [p for p in self.packs if turn.optimizer in p.optimizers]
        return [r for p in mine for r in p.requests(lambda part=p: [(norm, weights_of(part))])]    # type: ignore[misc]

    def begin(self, turn: Turn) -> None:
        """Measures the norms before the step."""
        assert isinstance(self.norm, Norm)
        self._before = {id(p): p.measure(self.norm, weights_of(p)) for p in self.packs if turn.optimizer in p.optimizers}

    def run_pack(self, part: Pack, turn: Turn) -> None:
        brake = self.rule.radius
        assert isinstance(brake, Brake) and isinstance(self.norm, Norm)
        weights, before = weights_of(part), self._before[id(part)]
        value = part.measure(self.norm, weights)
        self.multiply(part, weights, actions.factor("clip_norm", value, before + brake.keep * (value - before)), turn)
