"""One rule with the parameters that it acts on: what is stored at attach, and how it runs at a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import (
    centers_of,
    given_center,
    grads_of,
    offsets_of,
    put_back,
    recenter_,
    starts_of,
    weights_of,
)  # fmt: skip
from normwise.engine.computed_weights import margin_of, refuse_narrow
from normwise.engine.margins import inside, least, relative_margin, room, shy
from normwise.engine.pack import Member, Pack, nothing_to_do
from normwise.engine.sharded.grouping import check_split, lying_here, packs_of, placed_like
from normwise.engine.sharded.prefetch import Request
from normwise.engine.step import Turn
from normwise.errors import PolicyError
from normwise.norms import Norm, Radius, Set
from normwise.norms.base import beyond
from normwise.norms.reduce import may_branch, wide
from normwise.parameters.inventory import Entry
from normwise.parameters.layouts import block_view
from normwise.policy import Rule, actions
from normwise.policy.radii import Init, Relative
from normwise.policy.schedules import Scheduled, at

EARLY = 20
"""Norms of gradients that are looked at for a threshold that something else has put on them."""


class BoundRule:
    """A :class:`Rule` bound to parameters. ``packs`` are built once."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        self.rule, self.index = rule, index
        self.norm: Norm | Set = rule.norm
        self.phase = rule.phase
        self.flat = rule.per == "global" and rule.action != "weight_decay"
        self._owner = owner
        present = lying_here(entries, self.flat)
        self.elsewhere = {id(e.param) for e in entries} - {id(e.param) for e in present}
        """The ids of parameters that lie on other ranks alone."""
        members = [self._member(e, owner[id(e.param)]) for e in present]
        self.packs = packs_of(members, self.flat, self.remembers) if members else []
        check_split(rule, self.packs)
        self.optimizers = frozenset[int]().union(*(p.optimizers for p in self.packs))
        self.computes = any(p.computed for p in self.packs)
        """Whether some of the weights are computed from other tensors."""
        self._acted: dict[int, list[tuple[Pack, Tensor]]] = {}
        self._inline_turn: Turn | None = None
        self._told = False
        self._early: list[Tensor] | None = []
        self.watches = False
        """Whether it is the first rule that sees the gradients, and so can tell that something has clipped them before."""
        if self.flat and isinstance(rule.radius, Init) and rule.floor is None:
            self._refuse_zero(self._stored(self.packs[0]), f"the {len(members)} parameters together")
        self.store: dict[str, dict[str, Tensor]] = {}
        """What the rule found in training, by parameter and name: a part of the control's state."""

    promises = True
    """Whether a rule on weights leaves a bound behind that can be verified."""

    looks_back = False
    """Whether ``begin`` measures the weights that the step starts from."""

    @property
    def paced(self) -> bool:
        """Whether the rule needs the learning rate."""
        return self.phase in ("decay", "prox")

    growing: tuple[str, ...] = ()
    """Of what is found: the tensors whose shapes change in training."""

    remembers = False
    """Whether the rule keeps what it measures, so that every rank must know all of it."""

    def begin(self, turn: Turn) -> None:
        """Before the optimizer, or a rule, moves a weight."""

    def commit(self, turn: Turn) -> None:
        """After a step that happened."""

    def drop_reports(self, optimizers: Sequence[int]) -> None:
        """Forgets what the user reported for a step of these optimizers, which is over or does not happen."""

    def fits(self, own: Tensor, kept: Tensor) -> bool:
        """Whether a stored tensor can take the place of this rule's own."""
        return own.shape == kept.shape

    def current(self, name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a state found for a parameter, as this version keeps it."""
        return found

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes back what was stored at attach and found in training; ``saved`` has been checked."""
        for m in self.members:
            if m.radius is not None:
                m.radius.copy_(saved["radius"][m.name])
            if m.center is not None:
                m.center.copy_(saved["center"][m.name])
            self.measure_center(m)
        for name, found in self.store.items():
            kept = self.current(name, saved["found"][name])
            found |= {what: _taken_back(kept[what], own) for what, own in found.items()}

    @property
    def members(self) -> list[Member]:
        return [m for p in self.packs for m in p.members]

    def _member(self, entry: Entry, optimizer: int) -> Member:
        rule = self.rule
        whole = rule.action == "weight_decay"    # which knows no blocks, and so asks for no orientation
        view = block_view(entry.layout, "tensor", False, name=entry.name) if whole else rule.view(entry)
        member = Member(entry.name, entry.param, view, optimizer, computed=entry.computed)
        self._remember_center(member)
        if entry.computed is not None:
            member.depends_on = tuple(entry.trained)
            holders = frozenset(self._owner[id(p)] for p in entry.trained) - {optimizer}
            member.moved_by = holders if self.phase == "weight" else frozenset()    # a bound holds after each of their steps
            member.margin = margin_of(rule, entry, member)
            refuse_narrow(rule, entry, member)
        if isinstance(rule.radius, Init):
            member.radius = self._initial_norm(member)
        return member

    def _remember_center(self, member: Member) -> None:
        if self.rule.center is None:
            return
        weight = member.now()
        if self.rule.center == "init":
            member.center = weight.clone(memory_format=torch.preserve_format)
        else:
            member.center = given_center(self.rule.center, member.name, weight)
        self.measure_center(member)

    def measure_center(self, member: Member) -> None:
        """The norms of a center's blocks, which tell how far rounding moves what is measured from there."""
        if member.center is not None and self.phase == "weight" and isinstance(self.norm, Norm):
            member.center_norm = self._norms(member, member.center)

    def _norms(self, member: Member, tensor: Tensor) -> Tensor:
        """The norms of the blocks of a tensor like the member's parameter, ``(count,)``."""
        assert isinstance(self.norm, Norm)
        part = packs_of([member], False, agree=True)[0]
        return part.measure(self.norm, part.local([tensor]))

    def _initial_norm(self, member: Member) -> Tensor:
        assert isinstance(self.norm, Norm)
        weight = member.now()
        # From the initial weights every block has moved nothing yet: there a radius counts in the norms of the weights themselves.
        if member.center is not None and self.rule.center != "init":
            weight = weight - member.center
        value = self._norms(member, weight).to(wide(weight.device))
        if self.flat:    # one block of all members: only a zero of all of them is one
            return value
        if self.rule.floor is not None:
            return value.clamp(min=self.rule.floor)
        self._refuse_zero(value, repr(member.name))
        return value

    def _refuse_zero(self, value: Tensor, whose: str) -> None:
        if value.numel() and not bool((value > 0).all()):
            raise PolicyError(
                f"radius='init' in rule '{self.rule.label()}': {int((value <= 0).sum())} of {value.numel()} blocks of {whose} are "
                "zero when attached, and a radius of zero would keep them there. Give floor= (a smallest radius), or exclude it."
            )

    # ------------------------------------------------------------------------------------------------ one step

    def run(self, turn: Turn) -> None:
        """Acts on the parameters of the turn's optimizer (of every optimizer, for a global rule)."""
        concerned = turn.spanning or turn.optimizer in self.optimizers
        if not concerned or (self.timed() and not self.rule.active(turn.step())):
            return
        if turn.spanning or self.flat:
            self._acted.clear()
        self._acted[turn.optimizer] = []
        for whole in self.packs:
            part = self._present(whole, turn) if turn.spanning or turn.optimizer in whole.optimizers else None
            if part is not None:
                self._run_pack(part, turn)
                if part.computed and self.phase != "penalty":
                    put_back(part)

    def _present(self, whole: Pack, turn: Turn) -> Pack | None:
        """The members that take part: a parameter without a gradient takes no step, so only rules on weights mind it."""
        if self.phase == "update":
            return whole.only(lambda m: id(m.weight) in turn.before)
        if self.phase == "weight" or all([p.grad is not None for p in whole.params]):    # noqa: C419 - a list is faster than a generator
            return whole
        return whole.only(lambda m: m.param.grad is not None)

    def run_on(self, part: Pack, changes: list[Tensor], turn: Turn) -> None:
        """Acts on updates that are not applied yet: what is about to be added to the parameters of ``part``, in place."""
        if self.timed() and not self.rule.active(turn.step()):
            return
        change = {id(p): c for p, c in zip(part.params, changes, strict=True)}
        if self._inline_turn is not turn:    # the first pack of a step
            self._inline_turn, self._acted[turn.optimizer] = turn, []
        for whole in self.packs:
            mine = whole.only(lambda m: id(m.param) in change)
            if mine is not None:
                self._act(mine, [change[id(p)] for p in mine.params], self.radius(mine, turn), turn)

    def functions(self) -> list[tuple[str, Any]]:
        """The schedules that are functions of the user's own; those of normwise cannot fail."""
        given = [(what, x) for what in ("radius", "strength") for v in [getattr(self.rule, what)] for x in (v, getattr(v, "scale", None))]
        return [(what, x) for what, x in given if callable(x) and not isinstance(x, Scheduled)]

    def timed(self) -> bool:
        """Whether what the rule does depends on how many steps were done."""
        r = self.rule
        varies = any(callable(x) or callable(getattr(x, "scale", None)) for x in (r.radius, r.strength))
        return varies or r.every > 1 or r.start > 0 or r.stop is not None

    def before_begin(self, turn: Turn) -> list[Request]:
        """What ``begin`` will measure on split packs: (pack, norm, tensors)."""
        return []

    def ahead(self, turn: Turn) -> list[Request]:
        """What ``run`` will measure on split packs, in its order. Known ahead, the norms of many rules are one collective."""
        idle = not (turn.spanning or turn.optimizer in self.optimizers) or (self.timed() and not self.rule.active(turn.step()))
        if idle:
            return []
        mine = [p for p in self.packs if turn.spanning or turn.optimizer in p.optimizers]
        present = [part for p in mine if (part := self._present(p, turn)) is not None]
        return [r for p in present for r in p.requests(lambda part=p: self._to_measure(part, turn))]    # type: ignore[misc]

    def _to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        if not isinstance(self.norm, Norm):
            return []
        if self.phase in ("penalty", "prox"):
            return part.norms_for(self.rule.action, self.norm, self.rule.power, offsets_of(part))
        if not self._is_radial():
            return []
        starts = [(self.norm, starts_of(part, turn))] if self._measures_starts() else []
        return [*starts, (self.norm, self._measurable(part, self._acted_on(part, turn)))]

    def _acted_on(self, part: Pack, turn: Turn) -> Sequence[Tensor]:
        if self.phase == "update":
            return torch._foreach_sub(weights_of(part), starts_of(part, turn))
        return grads_of(part) if self.phase == "gradient" else offsets_of(part)

    def _measures_starts(self) -> bool:
        return isinstance(self.rule.radius, Relative)

    def _run_pack(self, part: Pack, turn: Turn) -> None:
        {
            "penalty": self._penalize,
            "gradient": self._on_gradients,
            "update": self._on_updates,
            "weight": self._on_weights,
        }[self.phase](part, turn)

    def strength(self, turn: Turn) -> float:
        """The rule's strength now."""
        strength = self.rule.strength
        assert strength is not None
        return at(strength, turn.step(), "strength") if callable(strength) else strength

    def radius(self, part: Pack, turn: Turn | None, step: int = 0) -> Radius:
        """The radius now: a number, or one a block of the pack."""
        r: Any = self.rule.radius
        now = turn.step if turn is not None else (lambda: step)
        if r is None:
            return 1.0
        if isinstance(r, Init):
            return self._stored(part) * _now(r.scale, now)
        if isinstance(r, Relative):
            assert isinstance(self.norm, Norm)
            lengths = part.measure(self.norm, starts_of(part, turn))
            return lengths.clamp(min=r.floor) * _now(r.scale, now)
        return _now(r, now)

    def _stored(self, part: Pack) -> Tensor:
        """The norms when attached, one a block. L1, L2 and LInf of one vector over several parameters are that norm of their norms."""
        stored = torch.cat([m.radius for m in part.members if m.radius is not None])
        if not self.flat:
            return stored
        assert isinstance(self.norm, Norm)
        return self.norm.measure(stored[None]).clamp(min=self.rule.floor or 0.0)

    def _penalize(self, part: Pack, turn: Turn) -> None:
        grads, strength = grads_of(part), self.strength(turn)
        pulls = offsets_of(part)
        if getattr(self.norm, "name", "") != "l2" or self.rule.power != 2:
            pulls = self._pulls(part, pulls)
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

    def _pulls(self, part: Pack, offsets: list[Tensor]) -> list[Tensor]:
        assert isinstance(self.norm, Norm)
        return part.penalty_gradient(self.norm, offsets, self.rule.power)

    def _on_gradients(self, part: Pack, turn: Turn) -> None:
        self._act(part, grads_of(part), self.radius(part, turn), turn)

    def _on_updates(self, part: Pack, turn: Turn) -> None:
        self._around(part, starts_of(part, turn), self.radius(part, turn), turn)

    def _on_weights(self, part: Pack, turn: Turn) -> None:
        aimed = self._aimed(part, self.radius(part, turn))
        if part.members[0].center is not None:
            self._around(part, centers_of(part), aimed, turn)
        else:
            self._act(part, weights_of(part), aimed, turn)

    def _aimed(self, part: Pack, radius: Radius) -> Radius:
        """An inequality is aimed at from a hair inside; a sphere and a set are aimed at as they are."""
        if self.rule.action == "normalize" or not isinstance(self.norm, Norm):
            return radius
        norms = [m.center_norm for m in part.members if m.center_norm is not None]
        if part.margin:
            radius = shy(radius, part.margin, torch.cat(norms) if norms else 0.0)
        clamps = self.rule.action == "project" and self.norm.separable
        aimed = inside(radius, self.norm, part.coarsest, part.block_shape, torch.cat(norms) if norms else 0.0, clamps)
        return aimed if self.rule.min_radius is None else room(self.rule.min_radius, radius, aimed, self._hair(part))

    def _around(self, part: Pack, centers: list[Tensor], radius: Radius, turn: Turn) -> None:
        """Acts on weight − center."""
        weights = weights_of(part)
        old = torch._foreach_sub(weights, centers)
        new = [o.clone() for o in old]
        self._act(part, new, radius, turn)
        recenter_(weights, centers, old, new)

    def _act(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        """clip_norm, project, normalize or lmo, in place; nothing where GradScaler skips the step."""
        if self._is_radial():
            self._scale(part, tensors, radius, turn)
            return
        part = part.form(self.rule.action, self.norm)
        blocks = part.gather(tensors)
        moved = self._transform(blocks, part.mine(radius)) if len(blocks) else blocks
        self._replace(part, tensors, blocks, moved, turn)

    def _replace(self, part: Pack, tensors: Sequence[Tensor], blocks: Tensor, moved: Tensor, turn: Turn) -> None:
        """Writes what has become of the blocks, where the step is taken, and keeps count of those that changed."""
        if turn.happened is not None:
            moved = torch.where(turn.happened.to(blocks.device) > 0, moved, blocks)
        acted = torch.where((moved != blocks).flatten(1).any(1), 0.0, 1.0)
        self._note(part, part.told(acted), turn)
        if not (part.may_branch(acted) and nothing_to_do(acted)):
            part.write_(tensors, moved)

    def _note(self, part: Pack, acted: Tensor, turn: Turn) -> None:
        self._acted[turn.optimizer].append((part, acted))

    def _scale(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        rule = self.rule
        assert isinstance(self.norm, Norm)
        value = part.measure(self.norm, self._measurable(part, tensors))
        only_clips = rule.action != "normalize" and rule.min_radius is None
        if self.watches:
            self._look_at(value, turn)
        if only_clips and part.may_branch(value) and bool((value <= radius).all()):
            return
        self._look_for_nonfinite(value, turn)
        low = None if rule.min_radius is None else least(rule.min_radius, radius, self._hair(part))
        factor = actions.factor(rule.action, value, radius, low, rule.rate)
        self._multiply(part, tensors, factor, turn)
        if part.coarsest == torch.float64 and part.may_branch(factor) and beyond(factor):
            self._scale(part, tensors, radius, turn)

    def _look_for_nonfinite(self, value: Tensor, turn: Turn) -> None:
        """Tells once of a norm that is not finite, where looking is free."""
        if not self._told and may_branch(value) and value.numel() and not math.isfinite(float(value.max())):
            self._told = True
            what = {"gradient": "gradients", "update": "updates"}.get(self.phase, "weights")
            turn.tell(
                f"rule '{self.rule.label()}' found {what} whose norm is not finite, in step {turn.step() + 1}. They are left as they "
                "are, and "
                "training goes on with them; attach with on_nonfinite='raise' to have the parameters named, or 'skip'."
            )

    def _look_at(self, value: Tensor, turn: Turn) -> None:
        """Keeps the norms of the first gradients; reading them waits for a device, so that there it is left to ``judge``."""
        if self._early is not None and len(self._early) < EARLY:
            self._early.append(value.detach().reshape(()))
            if len(self._early) == EARLY and may_branch(value):
                self.judge(turn.tell)

    def judge(self, tell: Callable[[str], None]) -> None:
        """Tells once where the norms of the first gradients were all but the same: something clips them before they come here, and a
        history of them is one of the other threshold."""
        if self._early is None or len(self._early) < EARLY:
            return
        seen, self._early = torch.stack(self._early).double(), None
        middle = seen.median()
        same = int(((seen - middle).abs() <= 1e-5 * middle).sum())
        if same >= 0.9 * EARLY and bool(middle > 0):
            tell(
                f"the gradients that rule '{self.rule.label()}' sees had the norm {float(middle):.6g} in {same} of the first {EARLY} "
                "steps: "
                "something clips them before, such as a trainer's max_grad_norm or gradient_clip_val, or clip_grad_norm_ in the loop. "
                "Turn one "
                "of the two off."
            )

    def _multiply(self, part: Pack, tensors: Sequence[Tensor], factor: Tensor, turn: Turn) -> None:
        """Each block times its factor, in place, where the step is taken."""
        if turn.happened is not None:
            factor = torch.where(turn.happened.to(factor.device) > 0, factor, 1.0)
        self._note(part, factor, turn)
        if not nothing_to_do(factor):
            part.scale_(tensors, factor)

    def _hair(self, part: Pack) -> float:
        assert isinstance(self.norm, Norm)
        return relative_margin(self.norm, part.coarsest, part.block_shape) + part.margin

    def _measurable(self, part: Pack, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Float64 copies of fp32 weights where a measure in fp32 tells too little: a sphere is to be met to two ulp, and singular values
        may be off by a hundred."""
        exacting = self.rule.action == "normalize" or self.norm.matrix
        if not exacting or self.phase != "weight" or part.coarsest != torch.float32:
            return tensors
        return [t.to(wide(t.device)) for t in tensors]

    def _is_radial(self) -> bool:
        """Projection onto an L2 ball is radial too."""
        return self.rule.action in actions.RADIAL or (self.rule.action == "project" and isinstance(self.norm, Norm) and self.norm.radial)

    def _transform(self, blocks: Tensor, radius: Radius) -> Tensor:
        if self.rule.action == "lmo":
            assert isinstance(self.norm, Norm)
            return actions.steepest(self.norm, blocks)
        moved = actions.project(self.norm, blocks, radius)
        if self.phase == "weight" and blocks.dtype == torch.float64 and isinstance(self.norm, Norm):
            # In float64 nothing is wider to project in: the threshold's error, many times over, may be more than a hair.
            moved = self.norm.clip_norm(moved, radius)
        return moved

    def violations(self) -> int:
        """How many blocks the rule had to change when it last ran, for each optimizer."""
        return sum(int((part.counted(acted) != 1).sum()) for noted in self._acted.values() for part, acted in noted)

    def penalty(self, steps: Sequence[int]) -> float:
        """strength · Σ penalty of the present weights, each at the step of its own optimizer, of which ``steps`` has the counts; 0 for what
        is no penalty, or not within ``start`` and ``stop``."""
        if self.rule.action not in ("penalty", "prox"):
            return 0.0
        total = 0.0
        for part in self.packs:
            step = max(steps[k] for k in part.optimizers)
            if _within(self.rule, step):
                total += self.strength(Turn(0, lambda step=step: step)) * float(self._value(part))    # type: ignore[misc]
        return total

    def _value(self, part: Pack) -> Tensor:
        assert isinstance(self.norm, Norm)
        return actions.penalty_value(part.measure(self.norm, offsets_of(part), agree=True), self.rule.power)


def _within(rule: Rule, step: int) -> bool:
    return rule.start <= step and (rule.stop is None or step < rule.stop)


def _now(value: Any, step: Callable[[], int]) -> float:
    return at(value, step(), "radius") if callable(value) else float(value)


def _taken_back(saved: Tensor, own: Tensor) -> Tensor:
    """A copy of what was saved, as the rule's own is: its device, dtype and placement."""
    return placed_like(saved.to(own.device, own.dtype, copy=True), own)
