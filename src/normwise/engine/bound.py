"""One rule with the parameters that it acts on: what is stored at attach, and how it runs at a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise import actions
from normwise.engine.pack import Member, Pack, nothing_to_do, pack
from normwise.engine.rounding import hair, inside, least, room
from normwise.engine.turn import Turn
from normwise.errors import PolicyError
from normwise.layouts import block_view
from normwise.norms import LInf, Norm, Radius, Set
from normwise.norms.reduce import may_branch, wide
from normwise.policy import Rule
from normwise.policy.inventory import Entry
from normwise.policy.names import clean_name
from normwise.schedules import Init, Relative, Scheduled, at


class BoundRule:
    """A :class:`Rule` bound to parameters. ``packs`` are built once."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        self.rule, self.index = rule, index
        self.norm: Norm | Set = rule.norm
        self.phase = rule.phase
        self.flat = rule.per == "global" and rule.action != "weight_decay"
        members = [self._member(e, owner[id(e.param)]) for e in entries]
        self.packs = pack(members, self.flat) if members else []
        self.optimizers = frozenset(m.optimizer for m in members)
        self._acted: dict[int, list[Tensor]] = {}
        self._inline_turn: Turn | None = None
        if self.flat and isinstance(rule.radius, Init) and rule.floor is None:
            self._refuse_zero(self._stored(self.packs[0]), f"the {len(members)} parameters together")
        self.store: dict[str, dict[str, Tensor]] = {}
        """What the rule found in training, by parameter and name: a part of the control's state."""

    promises = True
    """Whether a rule on weights leaves a bound behind that can be verified."""

    def begin(self, turn: Turn) -> None:
        """Before the optimizer, or a rule, moves a weight."""

    def commit(self, turn: Turn) -> None:
        """After a step that happened."""

    def fits(self, own: Tensor, kept: Tensor) -> bool:
        """Whether a stored tensor can take the place of this rule's own."""
        return own.shape == kept.shape

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes back what was stored at attach and found in training; ``saved`` has been checked."""
        for m in self.members:
            if m.radius is not None:
                m.radius.copy_(saved["radius"][m.name])
            if m.center is not None:
                m.center.copy_(saved["center"][m.name])
            self.measure_center(m)
        for name, found in self.store.items():
            found |= {what: saved["found"][name][what].to(own.device, own.dtype, copy=True) for what, own in found.items()}

    @property
    def members(self) -> list[Member]:
        return [m for p in self.packs for m in p.members]

    def _member(self, entry: Entry, optimizer: int) -> Member:
        rule = self.rule
        whole = rule.action == "weight_decay"    # which knows no blocks, and so asks for no orientation
        view = block_view(entry.layout, "tensor", False, name=entry.name) if whole else rule.view(entry)
        member = Member(entry.name, entry.param, view, optimizer)
        self._remember_center(member)
        if isinstance(rule.radius, Init):
            member.radius = self._initial_norm(member)
        return member

    def _remember_center(self, member: Member) -> None:
        if self.rule.center is None:
            return
        weight = member.param.detach()
        if self.rule.center == "init":
            member.center = weight.clone(memory_format=torch.preserve_format)
        else:
            member.center = _given_center(self.rule.center, member.name, weight)
        self.measure_center(member)

    def measure_center(self, member: Member) -> None:
        """The norms of a center's blocks, which tell how far rounding moves what is measured from there."""
        if member.center is not None and self.phase == "weight" and isinstance(self.norm, Norm):
            member.center_norm = self.norm.measure(member.view.blocks(member.center))

    def _initial_norm(self, member: Member) -> Tensor:
        assert isinstance(self.norm, Norm)
        weight = member.param.detach()
        value = self.norm.measure(member.view.blocks(weight if member.center is None else weight - member.center))
        value = value.to(wide(weight.device))
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
        if not concerned or (self._timed() and not self.rule.active(turn.step())):
            return
        if turn.spanning or self.flat:
            self._acted.clear()
        self._acted[turn.optimizer] = []
        for whole in self.packs:
            part = self._present(whole, turn) if turn.spanning or turn.optimizer in whole.optimizers else None
            if part is not None:
                self._run_pack(part, turn)

    def _present(self, whole: Pack, turn: Turn) -> Pack | None:
        """The members that take part: a parameter without a gradient takes no step, so only rules on weights mind it."""
        if self.phase == "update":
            return whole.only(lambda m: id(m.param) in turn.before)
        if self.phase == "weight" or all([p.grad is not None for p in whole.params]):    # noqa: C419 - a list is faster than a generator
            return whole
        return whole.only(lambda m: m.param.grad is not None)

    def run_on(self, part: Pack, changes: list[Tensor], turn: Turn) -> None:
        """Acts on updates that are not applied yet: what is about to be added to the parameters of ``part``, in place."""
        if self._timed() and not self.rule.active(turn.step()):
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

    def _timed(self) -> bool:
        r = self.rule
        varies = any(callable(x) or callable(getattr(x, "scale", None)) for x in (r.radius, r.strength))
        return varies or r.every > 1 or r.start > 0 or r.stop is not None

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
            lengths = part.measure(self.norm, _starts(part, turn))
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
        assert isinstance(self.norm, Norm)
        grads, strength = _grads(part), self.strength(turn)
        pulls = _offsets(part)
        if self.norm.name != "l2" or self.rule.power != 2:
            pulls = part.split(actions.penalty_gradient(self.norm, part.gather(pulls), self.rule.power))
        if turn.ascends is not None:    # what is maximised is the objective minus the penalty
            pulls = [-p if turn.ascends(m) else p for p, m in zip(pulls, part.members, strict=True)]
        torch._foreach_add_(grads, [p.to(g.dtype) for p, g in zip(pulls, grads, strict=True)], alpha=strength)

    def _on_gradients(self, part: Pack, turn: Turn) -> None:
        self._act(part, _grads(part), self.radius(part, turn), turn)

    def _on_updates(self, part: Pack, turn: Turn) -> None:
        self._around(part, _starts(part, turn), self.radius(part, turn), turn)

    def _on_weights(self, part: Pack, turn: Turn) -> None:
        aimed = self._aimed(part, self.radius(part, turn))
        if part.members[0].center is not None:
            self._around(part, _centers(part), aimed, turn)
        else:
            self._act(part, _weights(part), aimed, turn)

    def _aimed(self, part: Pack, radius: Radius) -> Radius:
        """An inequality is aimed at from a hair inside; a sphere and a set are aimed at as they are."""
        if self.rule.action == "normalize" or not isinstance(self.norm, Norm):
            return radius
        norms = [m.center_norm for m in part.members if m.center_norm is not None]
        clamps = self.rule.action == "project" and isinstance(self.norm, LInf)
        aimed = inside(radius, self.norm, part.coarsest, part.block_shape, torch.cat(norms) if norms else 0.0, clamps)
        return aimed if self.rule.min_radius is None else room(self.rule.min_radius, radius, aimed, self._hair(part))

    def _around(self, part: Pack, centers: list[Tensor], radius: Radius, turn: Turn) -> None:
        """Acts on weight − center."""
        weights = _weights(part)
        old = torch._foreach_sub(weights, centers)
        new = [o.clone() for o in old]
        self._act(part, new, radius, turn)
        _recenter_(weights, centers, old, new)

    def _act(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        """clip_norm, project, normalize or lmo, in place; nothing where GradScaler skips the step."""
        if self._is_radial():
            self._scale(part, tensors, radius, turn)
            return
        blocks = part.gather(tensors)
        self._replace(part, tensors, blocks, self._transform(blocks, radius), turn)

    def _replace(self, part: Pack, tensors: Sequence[Tensor], blocks: Tensor, moved: Tensor, turn: Turn) -> None:
        """Writes what has become of the blocks, where the step is taken, and keeps count of those that changed."""
        if turn.happened is not None:
            moved = torch.where(turn.happened.to(blocks.device) > 0, moved, blocks)
        acted = torch.where((moved != blocks).flatten(1).any(1), 0.0, 1.0)
        self._acted[turn.optimizer].append(acted)
        if not nothing_to_do(acted):
            part.write_(tensors, moved)

    def _scale(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        rule = self.rule
        assert isinstance(self.norm, Norm)
        value = part.measure(self.norm, self._measurable(part, tensors))
        only_clips = rule.action != "normalize" and rule.min_radius is None
        if only_clips and may_branch(value) and bool((value <= radius).all()):
            return
        low = None if rule.min_radius is None else least(rule.min_radius, radius, self._hair(part))
        factor = actions.factor(rule.action, value, radius, low, rule.rate)
        self._multiply(part, tensors, factor, turn)

    def _multiply(self, part: Pack, tensors: Sequence[Tensor], factor: Tensor, turn: Turn) -> None:
        """Each block times its factor, in place, where the step is taken."""
        if turn.happened is not None:
            factor = torch.where(turn.happened.to(factor.device) > 0, factor, 1.0)
        self._acted[turn.optimizer].append(factor)
        if not nothing_to_do(factor):
            part.scale_(tensors, factor)

    def _hair(self, part: Pack) -> float:
        assert isinstance(self.norm, Norm)
        return hair(self.norm, part.coarsest, part.block_shape)

    def _measurable(self, part: Pack, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Float64 copies of fp32 weights where a measure in fp32 tells too little: a sphere is to be met to two ulp, and singular values
        may be off by a hundred."""
        exacting = self.rule.action == "normalize" or self.norm.matrix
        if not exacting or self.phase != "weight" or part.coarsest != torch.float32:
            return tensors
        return [t.to(wide(t.device)) for t in tensors]

    def _is_radial(self) -> bool:
        """Projection onto an L2 ball is radial too."""
        return self.rule.action in actions.RADIAL or (self.rule.action == "project" and getattr(self.norm, "name", "") == "l2")

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
        return sum(int((a != 1).sum()) for acted in self._acted.values() for a in acted)

    def penalty(self, step: int) -> float:
        """strength · Σ penalty of the present weights; 0 for what is no penalty, or not within ``start`` and ``stop`` at ``step``."""
        if self.rule.action not in ("penalty", "prox") or not _within(self.rule, step):
            return 0.0
        return self.strength(Turn(0, lambda: step)) * sum(float(self._value(p)) for p in self.packs)

    def _value(self, part: Pack) -> Tensor:
        assert isinstance(self.norm, Norm)
        return actions.penalty_value(self.norm, part.gather(_offsets(part)), self.rule.power)


def _within(rule: Rule, step: int) -> bool:
    return rule.start <= step and (rule.stop is None or step < rule.stop)


def _now(value: Any, step: Callable[[], int]) -> float:
    return at(value, step(), "radius") if callable(value) else float(value)


def _weights(part: Pack) -> list[Tensor]:
    return list(part.params)


def _grads(part: Pack) -> list[Tensor]:
    return [p.grad for p in part.params if p.grad is not None]


def _offsets(part: Pack) -> list[Tensor]:
    """The weights, minus their center where there is one."""
    centers = _centers(part)
    return list(torch._foreach_sub(_weights(part), centers)) if centers else _weights(part)


def _centers(part: Pack) -> list[Tensor]:
    return [m.center for m in part.members if m.center is not None]


def _starts(part: Pack, turn: Turn | None) -> list[Tensor]:
    """The weights before the step where they were kept, which is what an update is relative to; else the present ones."""
    before = {} if turn is None else turn.before
    return [before.get(id(p), p) for p in part.params]


def _recenter_(weights: list[Tensor], centers: list[Tensor], old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """weight ← center + new offset where that changed; elsewhere the weight keeps its bits. Rounded once: the difference of offsets,
    added to the weight, would carry the rounding of an offset that may be many times the radius."""
    for weight, center, o, n in zip(weights, centers, old, new, strict=True):
        weight.copy_(torch.where(o == n, weight, center + n))


def _given_center(given_center: Any, name: str, weight: Tensor) -> Tensor:
    """One parameter's center; the names may carry the traces of wrappers, as those of a checkpoint do."""
    center = {clean_name(key): value for key, value in given_center.items()}
    if name not in center:
        raise PolicyError(f"center= has no weights for {name!r}; it has {', '.join(sorted(center)[:10]) or 'none'}.")
    given = center[name]
    if given.shape != weight.shape:
        raise PolicyError(f"center= gives {name!r} the shape {tuple(given.shape)}, but the parameter has {tuple(weight.shape)}.")
    return given.detach().to(weight.device, weight.dtype).clone()
