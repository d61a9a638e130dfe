"""``weight_decay`` and ``prox``: weights a little smaller at each step, decoupled from the gradient, in any rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import recenter_, weights_of
from normwise.engine.pack import Member, Pack
from normwise.engine.rules.base import BoundRule, runs
from normwise.engine.rules.penalty import Priced
from normwise.engine.step import Turn
from normwise.low_precision import memory, narrow_, rounds, widened
from normwise.norms import Norm, Radius
from normwise.norms.reduce import may_branch
from normwise.parameters.inventory import Entry
from normwise.parameters.layouts import BlockView, block_view
from normwise.policy import Rule
from normwise.policy.schedules import is_number

LARGEST = torch.finfo(torch.float32).max


class Shrinking(BoundRule):
    """With ``rounding``, each fp16 or bf16 weight has in ``store`` what that needs to remember."""

    paced = True

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        for k, m in enumerate(self.members):
            needed = memory(m.weight, rule.rounding, 4096 * index + k)
            if needed:
                self.store[m.name] = needed

    def run_pack(self, part: Pack, turn: Turn) -> None:
        states: Sequence[dict[str, Any]] = [self.store.get(m.name, {}) for m in part.members] if self.store else []
        if rounds(states) and turn.happened is not None and may_branch(turn.happened) and not bool(turn.happened):
            return    # what is remembered advances where the step happens
        mine, states = weights_of(part), part.local_states(states)
        weights = widened(mine, states)
        self.shrink_(part, weights, turn)
        narrow_(mine, weights, states, part.noise_numbers(states))

    def shrink_(self, part: Pack, weights: list[Tensor], turn: Turn) -> None:
        """Acts on the weights, or on what stands for them until they are rounded."""
        raise NotImplementedError

    def prepared(self, optimizer: int) -> Callable[[Turn], None]:
        """What treats every entry alike, at a fixed strength and one rate, is a few calls for all weights."""
        fixed = is_number(self.rule.strength) and not self.flat and not self.store
        self.in_few_calls = fixed and self.of_entries() and self.steady()
        return partial(self._at_once, [w for p in self.packs for w in p.weights], self.members) if self.in_few_calls else self.run

    @torch.no_grad()
    def _at_once(self, weights: list[Tensor], members: list[Member], turn: Turn) -> None:
        rates = [turn.rate(m) for m in members]
        one = all([type(r) is float and r == rates[0] for r in rates])    # noqa: C419 - a list is faster than a generator
        if one and turn.happened is None and all([m.param.grad is not None for m in members]):    # noqa: C419
            self.shrink_entries_(weights, rates[0] * self.rule.strength)
        else:
            self.run(turn)

    def of_entries(self) -> bool:
        """Whether every entry is treated alike, by ``shrink_entries_``."""
        return True

    def shrink_entries_(self, weights: list[Tensor], amount: float) -> None:
        """Acts on all weights, by η·strength."""
        raise NotImplementedError


@runs("weight_decay")
class WeightDecay(Shrinking):
    """w − η·strength·(w − center)."""

    nothing_to_verify = "a decay pulls, and bounds nothing"

    def view(self, entry: Entry) -> BlockView:
        """Of the whole parameter: a decay knows no blocks, and so asks for no orientation."""
        return block_view(entry.layout, "tensor", False, name=entry.name)

    def shrink_entries_(self, weights: list[Tensor], amount: float) -> None:
        torch._foreach_mul_(weights, 1 - amount)

    def shrink_(self, part: Pack, weights: list[Tensor], turn: Turn) -> None:
        strength = self.strength(turn)
        for eta, chosen in _by_rate(part, turn):
            share = eta * strength if turn.happened is None else eta * strength * turn.happened.to(weights[0].device)
            mine = [weights[i] for i in chosen]
            centers = part.local([c for i in chosen if (c := part.members[i].center) is not None])
            if centers:
                pull = torch._foreach_sub(mine, centers)
                torch._foreach_mul_(pull, -share)
                torch._foreach_add_(mine, pull)
            else:
                _shrink_(mine, 1 - share)


@runs("prox")
class Prox(Shrinking, Priced):
    """The prox of η·strength·‖w − center‖."""

    nothing_to_verify = "a prox pulls, and bounds nothing"

    def of_entries(self) -> bool:
        return isinstance(self.norm, Norm) and self.norm.name == "l1" and self.rule.power == 1

    def shrink_entries_(self, weights: list[Tensor], amount: float) -> None:
        """The soft threshold: w less its projection onto the ball of the dual norm, the box."""
        inside = torch._foreach_clamp_min(weights, -min(amount, LARGEST))
        torch._foreach_clamp_max_(inside, min(amount, LARGEST))
        torch._foreach_sub_(weights, inside)

    def shrink_(self, part: Pack, weights: list[Tensor], turn: Turn) -> None:
        strength = self.strength(turn)
        if self.flat:
            self._prox_members(part, weights, turn.rate(part.members[0]) * strength, turn)
            return
        for eta, chosen in _by_rate(part, turn):
            wanted = {id(part.members[i]) for i in chosen}
            mine = part if len(chosen) == len(part.members) else part.only(lambda m, wanted=wanted: id(m) in wanted)    # type: ignore[misc]
            assert mine is not None
            self._prox_members(mine, [weights[i] for i in chosen], eta * strength, turn)

    def _prox_members(self, part: Pack, weights: list[Tensor], step: Radius, turn: Turn) -> None:
        assert isinstance(self.norm, Norm)
        if turn.happened is not None:
            step = step * turn.happened
        centers = part.local([m.center for m in part.members if m.center is not None])
        offsets = list(torch._foreach_sub(weights, centers)) if centers else weights
        amount = step.expand(part.count) if isinstance(step, Tensor) else step
        moved = part.prox(self.norm, offsets, amount, self.rule.power)
        if centers:
            recenter_(weights, centers, offsets, moved)
        else:
            torch._foreach_copy_(weights, moved)


def _by_rate(part: Pack, turn: Turn) -> list[tuple[Any, list[int]]]:
    """The step sizes η of a pack, each with the members that have it, by their place."""
    places: dict[Any, list[int]] = {}
    rates: dict[Any, Any] = {}
    for i, m in enumerate(part.members):
        eta = turn.rate(m)
        key = id(eta) if isinstance(eta, Tensor) else eta
        rates[key] = eta
        places.setdefault(key, []).append(i)
    return [(rates[key], chosen) for key, chosen in places.items()]


def _shrink_(weights: list[Tensor], factor: Any) -> None:
    if isinstance(factor, Tensor):
        factor = factor.to(weights[0].device)
    torch._foreach_mul_(weights, factor)
