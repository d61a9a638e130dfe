"""One rule with the parameters that it acts on: what is stored at attach, and how it runs at a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from normwise.engine.block_tensors import given_center, put_back, starts_of
from normwise.engine.inverse_trials import margin_of, refuse_narrow
from normwise.engine.pack import Member, Pack, is_sharded, nothing_to_do, pack
from normwise.engine.sharded.grouping import check_split, lying_here, packs_of, placed_like
from normwise.engine.sharded.prefetch import Request
from normwise.engine.step import OnePass, RowBound, Squares, Turn
from normwise.errors import PolicyError
from normwise.norms import Norm, Radius, Set
from normwise.norms.reduce import wide
from normwise.parameters.adapters import LowRank
from normwise.parameters.inventory import Entry
from normwise.parameters.layouts import BlockView
from normwise.policy import Rule
from normwise.policy.radii import Base, Init, Relative
from normwise.policy.schedules import Scheduled, at


class BoundRule:
    """A :class:`Rule` bound to parameters. ``packs`` are built once.

    A subclass says in ``run_pack`` what it does to one pack at a step, and which rules it runs by `runs`.
    """

    paced = False
    """Whether the rule needs the learning rate."""
    writes = True
    """Whether it writes weights, gradients or updates in place, so that a computed weight is to be put back."""
    counted = False
    """Whether it knows how many blocks it changed."""
    nothing_to_verify: str | None = None
    """Why it leaves no bound on the weights that could be measured; None where it does."""
    in_few_calls = False
    """Whether what it prepared for a step looks itself whether gradients can be written in place, and needs no ``no_grad``."""
    idempotent = False
    """Whether that changes nothing where it is done a second time."""
    rows: Sequence[RowBound] = ()
    """What it does, where that is no more than to bring rows of weights under a fixed radius."""
    one_pass: OnePass | None = None
    """What may have done so before the rule runs."""
    squares: Squares | None = None
    """Where a log keeps what it has measured of the gradients."""
    looks_back = False
    """Whether ``begin`` measures the weights that the step starts from."""
    growing: tuple[str, ...] = ()
    """Of what is found: the tensors whose shapes change in training."""
    remembers = False
    """Whether the rule keeps what it measures, so that every rank must know all of it."""
    watches = False
    """Whether it is the first rule that sees the gradients, and so can tell that something has clipped them before."""

    # ------------------------------------------------------------------------------------------------ bound to parameters

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        self.rule, self.index = rule, index
        self.norm: Norm | Set = rule.norm
        self.phase = rule.phase
        self.flat = rule.per == "global"
        self._owner = owner
        split = any(is_sharded(e.param) for e in entries)    # what only DTensors need is asked of them alone
        present = lying_here(entries, self.flat) if split else list(entries)
        self.elsewhere = {id(e.param) for e in entries} - {id(e.param) for e in present}
        """The ids of parameters that lie on other ranks alone."""
        members = [self._member(e, owner[id(e.param)]) for e in present]
        packs = packs_of(members, self.flat, self.remembers) if split and members else pack(members, self.flat) if members else []
        self.packs = packs
        if split:
            check_split(rule, packs)
        self.optimizers = frozenset[int]().union(*(p.optimizers for p in self.packs))
        self.computes = any(p.computed for p in self.packs)
        """Whether some of the weights are computed from other tensors."""
        self._acted: dict[int, list[tuple[Pack, Tensor]]] = {}
        self.store: dict[str, dict[str, Tensor]] = {}
        """What the rule found in training, by parameter and name: a part of the control's state."""

    def check_group(self, name: str, group: Mapping[str, Any]) -> None:
        """PolicyError where the optimizer's group of a parameter is none that the rule can act beside."""
        if self.paced and group.get("lr") is None:
            raise PolicyError(
                f"rule '{self.rule.label()}' needs the learning rate, and the group of {name!r} has lr=None: its optimizer "
                "finds its own. Give it a learning rate, or leave the rule out."
            )

    def view(self, entry: Entry) -> BlockView:
        """The blocks of a parameter."""
        return self.rule.view(entry)

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
        member = Member(entry.name, entry.param, self.view(entry), optimizer, computed=entry.computed)
        if rule.center == "init":
            member.center = member.now().clone(memory_format=torch.preserve_format)
        elif rule.center is not None:
            member.center = given_center(rule.center, member.name, member.now())
        self.measure_center(member)
        if entry.computed is not None:
            member.depends_on = tuple(entry.trained)
            holders = frozenset(self._owner[id(p)] for p in entry.trained) - {optimizer}
            member.moved_by = holders if self.phase == "weight" else frozenset()    # a bound holds after each of their steps
            member.margin = margin_of(rule, entry, member)
            refuse_narrow(rule, entry, member)
        if isinstance(rule.radius, Init):
            member.radius = self._base_norm(entry, rule.radius) if isinstance(rule.radius, Base) else self._initial_norm(member)
        return member

    def _base_norm(self, entry: Entry, radius: Base) -> Tensor:
        """The norms of the blocks of the weight that a product is added to, ``(count,)``; a quantised one as PEFT dequantises it."""
        assert entry.computed is not None and isinstance(entry.computed.way, LowRank)
        try:
            weight: Any = entry.computed.way.base_weight()
            known = entry.base is not None and math.prod(entry.base.layout.shape) == weight.numel()
            units = replace(entry.layout, shape=(*entry.layout.shape[:-1], weight.numel() // len(weight)))    # packed numbers have no axes
            base = replace(entry, param=weight, computed=None, layout=entry.base.layout if known and entry.base else units)
            value = self._norms(Member(entry.name, weight, self.view(base), 0), weight)
        except Exception as error:    # whatever a library for quantised weights raises
            what = f"radius={radius.label()!r} cannot be measured on the base of {entry.name!r}: {error}"
            raise PolicyError(f"{what} Give a number as the radius.") from error
        self._refuse_zero(value, f"the base of {entry.name!r}", "base")
        return value.to(wide(weight.device))

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
        return value if self.rule.floor is None else value.clamp(min=self.rule.floor)

    def refuse_zeros(self, bound_before: Container[str] = ()) -> None:
        """PolicyError where the first norm of a block is zero: asked when a state has brought what it knows, since a block that became zero
        in training has a first norm that is not. bound_before: the names of members that are bound again."""
        if not isinstance(self.rule.radius, Init) or isinstance(self.rule.radius, Base) or self.rule.floor is not None:
            return
        if self.flat:
            for part in self.packs:
                self._refuse_zero(self._stored(part), f"the {len(self.members)} parameters together")
            return
        for m in self.members:
            assert m.radius is not None
            self._refuse_zero(m.radius, repr(m.name))

    def _refuse_zero(self, value: Tensor, whose: str, kind: str = "init") -> None:
        if value.numel() and not bool((value > 0).all()):
            raise PolicyError(
                f"radius={kind!r} in rule '{self.rule.label()}': {int((value <= 0).sum())} of {value.numel()} blocks of {whose} are "
                "zero when attached, and a radius of zero would keep them there. Give floor= (a smallest radius), or exclude it; where a "
                "checkpoint knows the first norms, load the optimizer's state before you attach."
            )

    # ------------------------------------------------------------------------------------------------ one step

    def before_begin(self, turn: Turn) -> list[Request]:
        """What ``begin`` will measure together with the norms of other rules: (pack, norm, tensors)."""
        return []

    def begin(self, turn: Turn) -> None:
        """Before the optimizer, or a rule, moves a weight."""

    def to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        """What ``run_pack`` will measure of a pack, in its order."""
        return []

    def run_pack(self, part: Pack, turn: Turn) -> None:
        """Acts on the members of ``part``, in place."""
        raise NotImplementedError

    def run_on(self, part: Pack, changes: list[Tensor], turn: Turn) -> None:
        """Acts on updates that are not applied yet: what is about to be added to the parameters of ``part``, in place."""
        raise NotImplementedError

    def hold(self, part: Pack, turn: Turn) -> None:
        """After computed weights are put back: looks again where rounding may have taken them out of a bound."""

    def commit(self, turn: Turn) -> None:
        """After a step that happened."""

    def drop_reports(self, optimizers: Sequence[int]) -> None:
        """Forgets what the user reported for a step of these optimizers, which is over or does not happen."""

    def judge(self, tell: Callable[[str], None]) -> None:
        """Tells what the first steps have shown to be amiss."""

    def penalty(self, steps: Sequence[int]) -> float:
        """strength · Σ penalty of the present weights, each at the step of its own optimizer, of which ``steps`` has the counts; 0 for what
        is no penalty, or not within ``start`` and ``stop``."""
        return 0.0

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
                self.run_pack(part, turn)
                if part.computed and self.writes:
                    put_back(part)
                    self.hold(part, turn)

    def prepared(self, optimizer: int) -> Callable[[Turn], None]:
        """What each step of ``optimizer`` runs: :meth:`run`, or the same in fewer calls where nothing varies from step to step."""
        return self.run

    def steady(self, known: Callable[[Pack], bool] = lambda part: part.plain()) -> bool:
        """Whether a step of packs of a ``known`` kind leaves nothing to ask: no schedule, no center, one optimizer, nothing computed or
        split."""
        return self.rule.center is None and not self.timed() and len(self.optimizers) == 1 and all(map(known, self.packs))

    def _present(self, whole: Pack, turn: Turn) -> Pack | None:
        """The members that take part: a parameter without a gradient takes no step, so only rules on weights mind it."""
        if self.phase == "update":
            return whole.only(lambda m: id(m.weight) in turn.before)
        if self.phase == "weight" or all([p.grad is not None for p in whole.params]):    # noqa: C419 - a list is faster than a generator
            return whole
        return whole.only(lambda m: m.param.grad is not None)

    def functions(self) -> list[tuple[str, Any]]:
        """The schedules that are functions of the user's own; those of normwise cannot fail."""
        given = [(what, x) for what in ("radius", "strength") for v in [getattr(self.rule, what)] for x in (v, getattr(v, "scale", None))]
        return [(what, x) for what, x in given if callable(x) and not isinstance(x, Scheduled)]

    def timed(self) -> bool:
        """Whether what the rule does depends on how many steps were done."""
        r = self.rule
        varies = any(callable(x) or callable(getattr(x, "scale", None)) for x in (r.radius, r.strength))
        return varies or r.every > 1 or r.start > 0 or r.stop is not None

    def ahead(self, turn: Turn) -> list[Request]:
        """What ``run`` will measure together with other rules, in its order. Known ahead, the norms of many rules are one collective."""
        idle = not (turn.spanning or turn.optimizer in self.optimizers) or (self.timed() and not self.rule.active(turn.step()))
        if idle:
            return []
        mine = [p for p in self.packs if turn.spanning or turn.optimizer in p.optimizers]
        present = [part for p in mine if (part := self._present(p, turn)) is not None]
        return [r for p in present for r in p.requests(lambda part=p: self.to_measure(part, turn))]    # type: ignore[misc]

    def strength(self, turn: Turn) -> float:
        """The rule's strength now."""
        strength = self.rule.strength
        assert strength is not None
        return at(strength, turn.step(), "strength") if callable(strength) else strength

    def radius(self, part: Pack, turn: Turn | None, step: int = 0) -> Radius:
        """The radius now: a number, or one a block of the pack."""
        r: Any = self.rule.radius
        count = turn.step if turn is not None else (lambda: step)
        if r is None:
            return 1.0
        if isinstance(r, Init):
            return self._stored(part) * now(r.scale, count)
        if isinstance(r, Relative):
            assert isinstance(self.norm, Norm)
            lengths = part.measure(self.norm, starts_of(part, turn))
            return lengths.clamp(min=r.floor) * now(r.scale, count)
        return now(r, count)

    def _stored(self, part: Pack) -> Tensor:
        """The norms when attached, one a block. L1, L2 and LInf of one vector over several parameters are that norm of their norms."""
        stored = torch.cat([m.radius for m in part.members if m.radius is not None])
        if not self.flat:
            return stored
        assert isinstance(self.norm, Norm)
        return self.norm.measure(stored[None]).clamp(min=self.rule.floor or 0.0)

    def note(self, part: Pack, acted: Tensor, turn: Turn) -> None:
        """Keeps what became of each block, 1 where nothing did, for whoever counts."""
        self._acted[turn.optimizer].append((part, acted))

    def multiply(self, part: Pack, tensors: Sequence[Tensor], factor: Tensor, turn: Turn) -> None:
        """Each block times its factor, in place, where the step is taken."""
        if turn.happened is not None:
            factor = torch.where(turn.happened.to(factor.device) > 0, factor, 1.0)
        self.note(part, factor, turn)
        if not nothing_to_do(factor):
            part.scale_(tensors, factor)

    def violations(self) -> int:
        """How many blocks the rule had to change when it last ran, for each optimizer."""
        return sum(int((part.counted(acted) != 1).sum()) for noted in self._acted.values() for part, acted in noted)


def now(value: Any, step: Callable[[], int]) -> float:
    """A number or a schedule as the number that holds now; ``step`` is asked only where it matters."""
    return at(value, step(), "radius") if callable(value) else float(value)


def _taken_back(saved: Tensor, own: Tensor) -> Tensor:
    """A copy of what was saved, as the rule's own is: its device, dtype and placement."""
    return placed_like(saved.to(own.device, own.dtype, copy=True), own)


# ------------------------------------------------------------------------------------------ which class runs a rule

C = TypeVar("C", bound="type[BoundRule]")


@dataclass(frozen=True)
class _Runner:
    """A class, and the rules that it is for."""

    cls: type[BoundRule]
    actions: tuple[str, ...]
    radius: type[Any] | None
    when: Callable[[Rule], bool] | None
    whole: bool

    def takes(self, rule: Rule, entries: Sequence[Entry]) -> bool:
        named = rule.action in self.actions if self.radius is None else isinstance(rule.radius, self.radius)
        return named and (self.when is None or self.when(rule)) and not (self.whole and any(is_sharded(e.param) for e in entries))


_RUNNERS: list[_Runner] = []


def runs(
    *actions: str, radius: type[Any] | None = None, when: Callable[[Rule], bool] | None = None, whole: bool = False
) -> Callable[[C], C]:
    """Registers a class of bound rules.

    Args:
        actions: the actions that it runs; without any, those of rules with ``radius``.
        radius: the kind of radius that it finds in training; such a rule is not for the class of its action.
        when: for some rules of the action alone. Such a class comes before the one that takes all.
        whole: not where a parameter is a DTensor.
    """

    def register(cls: C) -> C:
        runner = _Runner(cls, actions, radius, when, whole)
        # The more a class asks for, the earlier it is asked.
        _RUNNERS.append(runner)
        _RUNNERS.sort(key=lambda r: (r.when is None, r.radius is None))
        return cls

    return register


def bind(rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> BoundRule:
    """The bound form of a rule: what its radius or its action asks for."""
    return next(r for r in _RUNNERS if r.takes(rule, entries)).cls(rule, entries, owner, index)
