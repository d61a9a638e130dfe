"""``penalty``: a strength times a norm, or how far matrices are from orthogonal ones, added to the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import grads_of, make_dense, offsets_of, weights_of
from normwise.engine.pack import Pack
from normwise.engine.rules.base import BoundRule, runs
from normwise.engine.step import Turn, grads
from normwise.norms import Norm, Set, native
from normwise.norms.reduce import up
from normwise.policy import actions
from normwise.policy.schedules import is_number


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

    def prepared(self, optimizer: int) -> Callable[[Turn], None]:
        """A fixed multiple of the weights themselves or of their signs is one or two calls for all of them."""
        rule, weights = self.rule, [w for p in self.packs for w in p.weights]
        of_entries = type(self) is Penalty and isinstance(self.norm, Norm) and (self.norm.name, rule.power) in (("l2", 2), ("l1", 1))
        self.in_few_calls = of_entries and is_number(rule.strength) and not self.flat and self.steady()
        return partial(self._pull, weights, [p for part in self.packs for p in part.params]) if self.in_few_calls else self.run

    @torch.no_grad()
    def _pull(self, weights: list[Tensor], params: list[Tensor], turn: Turn) -> None:
        found: list[Any] = grads(params)
        if turn.happened is not None or turn.ascends is not None or not native.fit(found):
            for part in self.packs:
                make_dense(self.rule, part)
            self.run(turn)
            return
        pulls = weights if self.rule.power == 2 else torch._foreach_sign(weights)
        torch._foreach_add_(found, pulls, alpha=self.rule.strength)    # type: ignore[arg-type]

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
