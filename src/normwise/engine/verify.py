"""The proof that bounds hold: measured again in float64, on whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normwise.engine.bound import BoundRule
from normwise.engine.engine import Engine
from normwise.engine.member_tensors import block_count
from normwise.engine.pack import Flat, Member, Pack
from normwise.engine.rounding import hair, inside, least
from normwise.engine.sharded.split import Split
from normwise.narrow import ulp
from normwise.norms import Norm, Set

SPHERE_ULP = 2
"""How many ulp of the weights' dtype a norm may be away from its sphere."""


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


@dataclass
class Verification:
    """What :meth:`Control.verify` found. True in a condition where every bound holds."""

    breaches: list[Breach] = field(default_factory=list)
    blocks: int = 0
    """How many blocks were measured."""
    rules: list[str] = field(default_factory=list)
    """The rules whose bounds were measured."""
    not_enforced: list[str] = field(default_factory=list)
    """Rules that did not act at the last step, so that nothing is promised now."""
    zeros: int = 0
    """Zero blocks under a rule that would give them a norm: no direction is theirs to take, so they are left at zero."""

    @property
    def ok(self) -> bool:
        return not self.breaches

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"{self.blocks} blocks under {len(self.rules)} rules measured in float64: "
        if self.ok:
            left = f" {self.zeros} blocks are zero, and stay so." if self.zeros else ""
            return f"{head}every bound holds.{left}"
        shown = "".join(f"\n  {b}" for b in self.breaches[:20])
        more = f"\n  and {len(self.breaches) - 20} more" if len(self.breaches) > 20 else ""
        return head + f"{len(self.breaches)} broken:{shown}{more}"


def verify(engine: Engine, steps: Sequence[int]) -> Verification:
    """Measures every bound on weights of ``engine``; ``steps`` are the optimizers' step counts."""
    result = Verification()
    for bound in (b for b in engine.phase("weight") if b.rule.rate == 1 and b.promises):
        acted = [(part, _last_step(part, steps)) for part in bound.packs]
        acted = [(part, last) for part, last in acted if last >= 0 and bound.rule.active(last)]
        (result.rules if acted else result.not_enforced).append(bound.rule.label())
        for part, last in acted:
            _measure(bound, part, last, result)
    return result


def _last_step(part: Pack, steps: Sequence[int]) -> int:
    """The last step of the pack's optimizer; -1 where it has not stepped yet."""
    return max(steps[k] for k in part.optimizers) - 1


def _measure(bound: BoundRule, part: Pack, step: int, result: Verification) -> None:
    radius, exact = bound.radius(part, None, step), part.local([_exact(m) for m in part.members])
    limit = torch.as_tensor(radius, dtype=torch.float64, device=exact[0].device).expand(block_count(part))
    value = _value(bound, part, exact, limit)
    excess = _excess(bound, part, value, limit)
    result.blocks += len(limit)
    result.zeros += int((value == 0).sum()) if _has_least(bound) else 0
    for i in torch.nonzero(~(excess <= 0)).flatten().tolist():
        name, block = _where(part, i)
        result.breaches.append(Breach(bound.rule.label(), name, block, float(value[i]), float(limit[i]), float(excess[i])))


def _has_least(bound: BoundRule) -> bool:
    """Whether the rule keeps a norm large, which a zero block cannot be made."""
    return isinstance(bound.norm, Norm) and (bound.rule.action == "normalize" or bound.rule.min_radius is not None)


def _exact(member: Member) -> Tensor:
    weight = member.now().double()
    return weight if member.center is None else weight - member.center.double()


def _value(bound: BoundRule, part: Pack, exact: list[Tensor], limit: Tensor) -> Tensor:
    """Each block's norm, or how far it is outside of a set; of split parameters by the owners of whole blocks, and known to every rank."""
    if isinstance(bound.norm, Set):
        if isinstance(part, Split):
            return part.whole(bound.norm.excess, exact, limit, agree=True)
        return bound.norm.excess(part.gather(exact), limit)
    if isinstance(part, Split):
        return (part.measure(bound.norm, exact) if isinstance(part, Flat) else part.whole(bound.norm.measure, exact, agree=True)).double()
    return bound.norm.measure(part.gather(exact)).double()


def _excess(bound: BoundRule, part: Pack, value: Tensor, limit: Tensor) -> Tensor:
    """By how much each block is outside: at most 0 where the bound holds."""
    if isinstance(bound.norm, Set):
        return value - (_set_tolerance(limit, part.coarsest) if bound.norm.matrix else 0.0) - part.margin * limit
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
    margin = hair(bound.norm, dtype, part.block_shape) + part.margin
    thin = (low >= limit) | (least(low, aimed, margin) <= low)
    norms = [m.center_norm for m in part.members if m.center_norm is not None]
    drift = (torch.cat(norms) + limit) * torch.finfo(dtype).eps / 2 if norms else 0.0
    measuring = limit * margin if dtype == torch.float64 else 0.0
    measuring = measuring + part.margin * (limit + (torch.cat(norms) if norms else 0.0))    # of computed weights, see member.margin
    return torch.where(thin, SPHERE_ULP * ulp(limit, dtype) + measuring, 0.0) + drift


def _set_tolerance(limit: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonality to rounding: entries of size ≤ radius rounded once, and the decomposition's own error."""
    return limit * torch.finfo(dtype).eps * 32


def _where(part: Pack, index: int) -> tuple[str, int]:
    if isinstance(part, Flat):
        return "all together", 0
    return part.members[index // part.view.count].name, index % part.view.count
