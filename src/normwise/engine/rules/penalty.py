"""``penalty``: a strength times a norm, or how far matrices are from orthogonal ones, added to the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.engine.block_tensors import grads_of, offsets_of, weights_of
from normwise.engine.pack import Pack
from normwise.engine.rules.base import BoundRule, runs
from normwise.engine.step import Turn
from normwise.norms import Norm, Set
from normwise.norms.reduce import up
from normwise.policy import actions


class Priced(BoundRule):
    """A rule that minimises strength · a value of the weights."""

    nothing_to_verify = "a penalty pulls, and bounds nothing"

    def to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        assert isinstance(self.norm, Norm)
        return part.norms_for(self.rule.action, self.norm, self.rule.power, offsets_of(part))

    def penalty(self, steps: Sequence[int]) -> float:
        total, rule = 0.0, self.rule
        for part in self.packs:
            step = max(steps[k] for k in part.optimizers)
            if rule.start <= step and (rule.stop is None or step < rule.stop):
                total += self.strength(Turn(0, lambda step=step: step)) * float(self.value(part))    # type: ignore[misc]
        return total

    def value(self, part: Pack) -> Tensor:
        """What the strength is a multiple of, a scalar."""
        assert isinstance(self.norm, Norm)
        return actions.penalty_value(part.measure(self.norm, offsets_of(part), agree=True), self.rule.power)


@runs("penalty")
class Penalty(Priced):
    """The gradient of a norm, or of half of its square."""

    writes = False    # of a computed weight the gradient goes to what it is computed from

    def run_pack(self, part: Pack, turn: Turn) -> None:
        grads, strength = grads_of(part), self.strength(turn)
        pulls = self.pulls(part, offsets_of(part))
        if turn.ascends is not None:    # what is maximised is the objective minus the penalty
            pulls = [-p if turn.ascends(m) else p for p, m in zip(pulls, part.members, strict=True)]
        if part.computed:
            for m, grad, pull in zip(part.members, grads, pulls, strict=True):
                if m.computed is not None:
                    m.computed.pull_back(pull * strength)
                else:
                    grad.add_(pull.to(grad.dtype), alpha=strength)
            return
        torch._foreach_add_(grads, [p.to(g.dtype) for p, g in zip(pulls, grads, strict=True)], alpha=strength)

    def pulls(self, part: Pack, offsets: list[Tensor]) -> list[Tensor]:
        """The gradient of the value by the weights, of which ``offsets`` are the distances from their center."""
        assert isinstance(self.norm, Norm)
        if self.norm.p == 2 and self.rule.power == 2:    # x itself, which needs no block
            return offsets
        return part.penalty_gradient(self.norm, offsets, self.rule.power)


@runs("penalty", when=lambda rule: isinstance(rule.norm, Set))
class OrthogonalPenalty(Penalty):
    """The gradient and the value of ¼‖WWᵀ − I‖² on the shorter side."""

    def to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        return []

    def pulls(self, part: Pack, offsets: list[Tensor]) -> list[Tensor]:
        blocks = part.gather(offsets)
        return part.split(actions.orthogonality_gradient(blocks) if len(blocks) else up(blocks))

    def value(self, part: Pack) -> Tensor:
        return part.whole(actions.orthogonality_value, weights_of(part), agree=True).sum()
