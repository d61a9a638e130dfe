"""The proof that bounds hold: measured again in float64, on whole blocks, on the weights that the model has now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from normwise.engine.block_tensors import computed_again, noise_of
from normwise.engine.margins import inside, least, relative_margin, subnormal
from normwise.engine.pack import Pack
from normwise.engine.program import Engine
from normwise.engine.rules.base import BoundRule
from normwise.low_precision import ulp
from normwise.norms import Norm, Set
from normwise.parameters.inventory import Entry, Inventory
from normwise.reports import Loggable, table, unique

SPHERE_ULP = 2
"""How many ulp of the weights' dtype a norm may be away from its sphere."""
SHOWN = 20
"""Breaches that are printed."""


@dataclass(frozen=True)
class Breach:
    """One block outside of its bound."""

    rule: str
    parameter: str
    block: int
    value: float
    bound: float
    excess: float

    def __str__(self) -> str:
        return f"{self.parameter}[block {self.block}] is {self.value:.9g}, bound {self.bound:.9g} (by {self.excess:.3g}) in '{self.rule}'"


@dataclass(frozen=True)
class Largest:
    """Of all blocks under one rule the one that is nearest to its bound, or farthest outside."""

    rule: str
    parameter: str
    block: int
    value: float
    bound: float


@dataclass
class Verification(Loggable):
    """What :meth:`Control.verify` found. True in a condition where bounds were measured and every one holds.

    False where a bound is broken, where a rule never ran on something that it should bound, and where nothing could be measured at all.
    """

    prefix: ClassVar[str] = "verify/"
    breaches: list[Breach] = field(default_factory=list)
    blocks: int = 0
    """How many blocks were measured."""
    rules: list[str] = field(default_factory=list)
    """The rules whose bounds were measured."""
    largest: list[Largest] = field(default_factory=list)
    """For each of these the block nearest to its bound, or farthest outside."""
    not_enforced: list[str] = field(default_factory=list)
    """Rules that rested at the last step (``every``, ``start``, ``stop``), and those whose optimizer has not stepped yet: nothing is
    promised now."""
    never_ran: list[str] = field(default_factory=list)
    """Rules that have not acted on what they should bound, each with the reason."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be measured on the weights, each with the reason."""
    zeros: int = 0
    """Zero blocks under a rule that would give them a norm: no direction is theirs to take, so they are left at zero."""

    @property
    def held(self) -> list[str]:
        """The rules whose every measured bound holds."""
        broken = {b.rule for b in self.breaches}
        return [rule for rule in self.rules if rule not in broken]

    @property
    def ok(self) -> bool:
        return not self.breaches and not self.never_ran and bool(self.rules)

    def __bool__(self) -> bool:
        return self.ok

    def numbers(self) -> dict[str, float]:
        """Whether all is well, how many blocks were measured and are broken, and for each rule its largest value and that one's bound."""
        counts: dict[str, float] = {"ok": self.ok, "blocks": self.blocks, "broken": len(self.breaches), "never_ran": len(self.never_ran)}
        for label, one in zip(unique(one.rule for one in self.largest), self.largest, strict=True):
            counts |= {f"{label}/largest": one.value, f"{label}/bound": one.bound}
        return counts

    def __str__(self) -> str:
        shown = [f"  {b}" for b in self.breaches[:SHOWN]]
        if len(self.breaches) > SHOWN:
            shown.append(f"  and {len(self.breaches) - SHOWN} more")
        if self.largest:
            rows = [(one.rule, f"{one.value:.9g}", f"{one.bound:.9g}", f"{one.parameter}[block {one.block}]") for one in self.largest]
            shown += [f"  {line}" for line in table(("rule", "largest", "bound", "where"), rows, right=(1, 2)).splitlines()]
        shown += [f"  never ran: {one}" for one in self.never_ran]
        shown += [f"  not enforced now: {one}" for one in self.not_enforced]
        shown += [f"  not checked: {one}" for one in self.unchecked]
        return "\n".join([self._headline(), *shown])

    def _headline(self) -> str:
        if not self.rules:
            listed = self.never_ran or self.not_enforced or self.unchecked
            return "nothing was checked." if listed else "nothing was checked: no rule bounds weights."
        head = f"{self.blocks} blocks under {len(self.rules)} rule{'s' * (len(self.rules) != 1)} measured in float64: "
        if self.breaches:
            return f"{head}{len(self.breaches)} broken:"
        left = f" {self.zeros} blocks are zero, and stay so." if self.zeros else ""
        return f"{head}every bound holds{', but rules never ran' if self.never_ran else ''}.{left}"


@dataclass
class Rested:
    """Rules bound to parameters that are frozen now, and at which step each last acted on them."""

    bounds: Mapping[int, BoundRule]
    steps: Mapping[tuple[int, str], int]


def verify(
    engine: Engine, inventory: Inventory, steps: Sequence[int], rested: Rested, silent: Mapping[int, str]
) -> Verification:
    """Measures every bound on weights.

    engine: the rules as bound at the last step. inventory: the model as it is now. steps: the optimizers' step counts. rested: what is
    frozen now, and was under a rule before. silent: why an optimizer that never stepped under the control did not, by its index.
    """
    result = Verification()
    present = {id(e.param): e for e in inventory}
    for i, bound in enumerate(engine.rules):
        label = bound.rule.label()
        if (reason := bound.nothing_to_verify) is not None:
            result.unchecked.append(f"{label}: {reason}")
            continue
        known = {name for k, name in rested.steps if k == i}
        result.never_ran += [f"{label}: {what}" for what in _outside(bound, engine, inventory, present, known)]
        packs = [(bound, part, _last_step(part, steps)) for part in bound.packs]
        if i in rested.bounds:
            frozen = rested.bounds[i]
            packs += [(frozen, part, max(rested.steps.get((i, m.name), -1) for m in part.members)) for part in frozen.packs]
        acted, resting = [], False
        asleep: dict[str, list[str]] = {}
        for owner, part, last in packs:
            kept = part.only(lambda m: id(m.param) in present and tuple(m.param.shape) == m.shape)
            if kept is None:
                continue
            if last < 0:
                reason = "; ".join(sorted({silent[k] for k in kept.optimizers if k in silent}))
                asleep.setdefault(reason, []).extend(m.name for m in kept.members)
            elif bound.rule.active(last):
                acted.append((owner, kept, last))
            else:
                resting = True
        for reason, names in asleep.items():
            note = f"{label}: {_listed(names)}: {reason or 'its optimizer has not stepped yet'}"
            (result.never_ran if reason else result.not_enforced).append(note)
        if acted:
            result.rules.append(label)
            measure_all(acted, label, result)
        elif bound.elsewhere and not packs:
            result.rules.append(label)
            result.unchecked.append(f"{label}: nothing of it lies on this rank; the others measure it")
        elif resting or not packs:
            result.not_enforced.append(label if resting else f"{label}: all that it matches is frozen")
    return result


def _outside(bound: BoundRule, engine: Engine, inventory: Inventory, present: Mapping[int, Entry], rested: Collection[str]) -> list[str]:
    """What the rule should bound by its selector and does not know, or knows and the model has no longer."""
    mine = {id(m.param) for m in bound.members} | bound.elsewhere
    gone = {m.name for m in bound.members if id(m.param) not in present}
    changed = [m.name for m in bound.members if id(m.param) in present and tuple(m.param.shape) != m.shape]
    fresh = [e for e in bound.rule.matched(inventory.weights) if id(e.param) not in mine and e.trained and e.name not in rested]
    replaced = [e.name for e in fresh if e.name in gone]
    added = [e.name for e in fresh if e.name not in gone and engine.holds(e.param)]
    reasons = (
        (replaced, "the model has another tensor there now, on which the rule never acted"),
        (added, "joined the optimizer after its last step; the rule acts from the next one on"),
        (changed, "has another shape now; the rule acts from the next step on"),
    )
    return [f"{_listed(names)}: {reason}" for names, reason in reasons if names]


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _last_step(part: Pack, steps: Sequence[int]) -> int:
    """The last step of the pack's optimizer; -1 where it has not stepped yet."""
    return max(steps[k] for k in part.optimizers) - 1


def measure_all(acted: Sequence[tuple[BoundRule, Pack, int]], label: str, result: Verification) -> None:
    """Adds what the blocks of these packs are at this step to ``result``: breaches, counts, and the one nearest to its bound."""
    nearest: list[tuple[float, Largest]] = []
    for bound, part, step in acted:
        radius, exact = bound.radius(part, None, step), computed_again(part)
        limit = torch.as_tensor(radius, dtype=torch.float64, device=exact[0].device).expand(part.count)
        value = _value(bound, part, exact, limit)
        excess = _excess(bound, part, value, limit)
        result.blocks += len(limit)
        result.zeros += int((value == 0).sum()) if _has_least(bound) else 0
        for i in torch.nonzero(~(excess <= 0)).flatten().tolist():
            name, block = part.block(i)
            result.breaches.append(Breach(label, name, block, float(value[i]), float(limit[i]), float(excess[i])))
        if len(value):
            worst = int(torch.argmax(torch.nan_to_num(value - limit, nan=torch.inf)))
            name, block = part.block(worst)
            nearest.append((float((value - limit)[worst]), Largest(label, name, block, float(value[worst]), float(limit[worst]))))
    if nearest:
        result.largest.append(max(nearest, key=lambda one: one[0] if one[0] == one[0] else torch.inf)[1])


def _has_least(bound: BoundRule) -> bool:
    """Whether the rule keeps a norm large, which a zero block cannot be made."""
    return isinstance(bound.norm, Norm) and (bound.rule.action == "normalize" or bound.rule.min_radius is not None)


def _value(bound: BoundRule, part: Pack, exact: list[Tensor], limit: Tensor) -> Tensor:
    """Each block's norm, or how far it is outside of a set; of split parameters by the owners of whole blocks, and known to every rank."""
    if isinstance(bound.norm, Set):
        return part.whole(bound.norm.excess, exact, limit, agree=True)
    return part.measure_whole(bound.norm, exact).double()


def _excess(bound: BoundRule, part: Pack, value: Tensor, limit: Tensor) -> Tensor:
    """By how much each block is outside: at most 0 where the bound holds."""
    if isinstance(bound.norm, Set):
        rounding = noise_of(part, bound.norm.sphere) if bound.norm.sphere is not None else 0.0
        return value - (_set_tolerance(limit, part.coarsest) if bound.norm.matrix else 0.0) - part.margin * limit - rounding
    if not _has_least(bound):
        return value - limit * (1 + bound.rule.tolerance)
    low = limit if bound.rule.min_radius is None else torch.full_like(limit, bound.rule.min_radius)
    away = torch.maximum(value - limit, low - value)
    return torch.where(value == 0, 0.0, away - _sphere_tolerance(bound, part, low, limit))


def _sphere_tolerance(bound: BoundRule, part: Pack, low: Tensor, limit: Tensor) -> Tensor:
    """Two ulp for a sphere, and for a shell too thin to keep a hair from both of its ends; none elsewhere. For float64 weights, what
    measuring in float64 errs by is added; around a center, the rounding of numbers as large as the center's."""
    assert isinstance(bound.norm, Norm)
    dtype = part.coarsest
    aimed = torch.as_tensor(inside(limit, bound.norm, dtype, part.block_shape))
    margin = relative_margin(bound.norm, dtype, part.block_shape) + part.margin
    thin = (low >= limit) | (least(low, aimed, margin) <= low)
    norms = [m.center_norm for m in part.members if m.center_norm is not None]
    drift = (torch.cat(norms) + limit) * torch.finfo(dtype).eps / 2 if norms else 0.0
    measuring = limit * margin if dtype == torch.float64 else 0.0
    measuring = measuring + part.margin * (limit + (torch.cat(norms) if norms else 0.0))    # of computed weights, see member.margin
    measuring = measuring + noise_of(part, bound.norm)
    measuring = measuring + subnormal(bound.norm, dtype, part.block_shape)    # entries there are rounded to multiples, not to a share
    return torch.where(thin, SPHERE_ULP * ulp(limit, dtype) + measuring, 0.0) + drift


def _set_tolerance(limit: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonality to rounding: entries of size ≤ radius rounded once, and the decomposition's own error."""
    return limit * torch.finfo(dtype).eps * 32

