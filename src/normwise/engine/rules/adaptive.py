"""Rules whose numbers are measured or found in training: step lengths, brakes, adaptive clipping, CPR, attention heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import starts_of, weights_of
from normwise.engine.pack import Member, Pack
from normwise.engine.rules.base import BoundRule, _now
from normwise.engine.rules.decay import SHRINKING, Shrinking
from normwise.engine.rules.observations import OBSERVERS, State
from normwise.engine.rules.tracked_cap import TrackedCap
from normwise.engine.sharded import is_sharded
from normwise.engine.sharded.prefetch import Request
from normwise.engine.step import Turn
from normwise.errors import PolicyError, nearest
from normwise.norms import L2, Norm, Radius, Set
from normwise.norms.base import clip_factor
from normwise.norms.reduce import may_branch, up, wide
from normwise.parameters.inventory import Entry
from normwise.policy import Rule, actions
from normwise.policy.radii import Brake, Inflection, Init, Quantile, StepLength, WarmStart, ZScore


def bind(rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> BoundRule:
    """The bound form of a rule: what its radius or its action asks for."""
    if rule.action in SHRINKING:
        return Shrinking(rule, entries, owner, index)
    if rule.phase in ("cpr", "qk_clip"):
        return {"cpr": Constrained, "qk_clip": Heads}[rule.phase](rule, entries, owner, index)
    if rule.action == "penalty" and isinstance(rule.norm, Set):
        return OrthogonalPenalty(rule, entries, owner, index)
    if rule.tolerance and not any(is_sharded(e.param) for e in entries):    # whose whole blocks come and go: the exact cap holds too
        return TrackedCap(rule, entries, owner, index)
    kinds: dict[type[Any], type[BoundRule]] = {StepLength: Stepped, Brake: Braked, Quantile: Adaptive, ZScore: Adaptive}
    return kinds.get(type(rule.radius), BoundRule)(rule, entries, owner, index)


def refuse_foreign_decay(bound: BoundRule, group_of: Callable[[Any], Mapping[str, Any]]) -> None:
    """A step that is given its length anew would have the optimizer's own decay in it."""
    for m in bound.members if isinstance(bound, Stepped) else ():
        decay = float(group_of(m.param).get("weight_decay") or 0.0)
        if decay:
            raise PolicyError(
                f"rule '{bound.rule.label()}' sets the length of the step of {m.name!r}, whose parameter group has weight_decay={decay:g}: "
                "it would be a part of that step, and shrink nothing. Give the group weight_decay=0."
            )


# ------------------------------------------------------------------------------------------------- lengths of steps


class Stepped(BoundRule):
    """Updates of length scale · η · (the weight's norm when attached, or before the step, or 1)."""

    def _member(self, entry: Entry, optimizer: int) -> Member:
        member = super()._member(entry, optimizer)
        kind = self.rule.radius
        assert isinstance(kind, StepLength)
        if kind.of != "number":
            first = self._initial_norm(member)    # which refuses a block that could never move
            member.radius = first if kind.of == "init" else None
        return member

    @property
    def paced(self) -> bool:
        return True

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
        return length * _rates(part, turn) * _now(kind.scale, turn.step)


def _rates(part: Pack, turn: Turn) -> Any:
    """η: a number where all members have the same, else one a block."""
    rates = [turn.rate(m) for m in part.members]
    if all(r is rates[0] or (not isinstance(r, Tensor) and r == rates[0]) for r in rates):
        return rates[0]
    device = part.params[0].device
    return torch.cat([torch.as_tensor(r, dtype=wide(device), device=device).reshape(1).expand(part.view.count) for r in rates])


class Braked(BoundRule):
    """Weights whose norm may keep only a share of what the step added to it."""

    promises = False
    looks_back = True

    def before_begin(self, turn: Turn) -> list[Request]:
        assert isinstance(self.norm, Norm)
        norm, mine = self.norm, [p for p in self.packs if turn.optimizer in p.optimizers]
        return [r for p in mine for r in p.requests(lambda part=p: [(norm, weights_of(part))])]    # type: ignore[misc]

    def begin(self, turn: Turn) -> None:
        """Measures the norms before the step."""
        assert isinstance(self.norm, Norm)
        self._before = {id(p): p.measure(self.norm, weights_of(p)) for p in self.packs if turn.optimizer in p.optimizers}

    def _on_weights(self, part: Pack, turn: Turn) -> None:
        brake = self.rule.radius
        assert isinstance(brake, Brake) and isinstance(self.norm, Norm)
        weights, before = weights_of(part), self._before[id(part)]
        value = part.measure(self.norm, weights)
        self._multiply(part, weights, actions.factor("clip_norm", value, before + brake.keep * (value - before)), turn)


# ------------------------------------------------------------------------------------------------- what is remembered


class Remembering(BoundRule):
    """A rule with a state of its own for each parameter (or one for all, ``per="global"``): named tensors, one row a block."""

    remembers = True

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        observer = OBSERVERS[type(rule.radius)] if type(rule.radius) in OBSERVERS else OBSERVERS[float]
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


class Adaptive(Remembering):
    """Gradients or updates clipped to what their own history says. The history grows after the step, and only if it happened: a closure
    that is evaluated several times is one observation."""

    _seen: tuple[Turn, list[tuple[Pack, State]]] | None = None

    def radius(self, part: Pack, turn: Turn | None, step: int = 0) -> Radius:
        return math.inf    # known once the norm is measured

    def _scale(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        assert isinstance(self.norm, Norm)
        value = part.measure(self.norm, tensors)
        self._look_for_nonfinite(value, turn)
        if self.watches:
            self._look_at(value, turn)
        limit, fresh = self.observe(self.rule.radius, self._recall(part), value.to(wide(value.device)))
        if self._seen is None or self._seen[0] is not turn:
            self._seen = (turn, [])
        self._seen[1].append((part, fresh))
        self._multiply(part, tensors, actions.factor("clip_norm", value, limit), turn)

    def commit(self, turn: Turn) -> None:
        """Keeps what the turn observed."""
        if self._seen is not None and self._seen[0] is turn:
            for part, fresh in self._seen[1]:
                self._keep(part, fresh, turn.happened)
            self._seen = None


class Constrained(Remembering):
    """CPR: λ ← max(0, λ + μ(R − κ)), then w ← w − λ·2w, both at the weights before the step, R their mean square."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        self._pending: dict[int, dict[int, tuple[Pack, State]]] = {}

    def _to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        return [(L2(), weights_of(part))]

    def _run_pack(self, part: Pack, turn: Turn) -> None:
        state, n = self._recall(part), max(1, math.prod(part.block_shape))
        square = part.measure(L2(), weights_of(part)).to(wide(part.params[0].device)).square() / n
        kappa, fresh = self.observe(self.rule.radius, state, square)
        if not isinstance(self.rule.radius, WarmStart | Inflection):
            kappa = self._stated(part, turn, n).expand_as(square)
        multiplier = (state["lambda"] + self.strength(turn) * (square - kappa)).clamp(min=0)
        finite = square.isfinite()
        fresh["lambda"] = torch.where(finite, multiplier, state["lambda"])
        self._pending.setdefault(turn.optimizer, {})[id(part)] = (part, fresh)
        self._multiply(part, weights_of(part), torch.where(finite, 1 - 2 * fresh["lambda"], 1.0), turn)

    def commit(self, turn: Turn) -> None:
        """The multiplier advances with a step that happened, and not twice where one that raised was tried again."""
        for part, fresh in self._pending.pop(turn.optimizer, {}).values():
            self._keep(part, fresh, turn.happened)

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._pending.clear()

    def _stated(self, part: Pack, turn: Turn, n: int) -> Tensor:
        """κ as a mean square: the number, or k times that of the weights when attached."""
        device = part.params[0].device
        bound = torch.as_tensor(self.radius(part, turn), dtype=wide(device), device=device)
        if not isinstance(self.rule.radius, Init):
            return bound
        return bound * torch.cat([m.radius for m in part.members if m.radius is not None]) / n


# --------------------------------------------------------------------------------------------------- attention heads


SILENT_STEPS = 3
"""Steps without a report after which the user is told."""


class Heads(BoundRule):
    """Queries and keys of the heads whose logits were reported too large, shrunk after the step."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        self._names = {e.name: e.names for e in entries}
        self._axes = {e.name: rule.axes(e) for e in entries}
        for m in self.members:
            if m.view.batch > 2 or len(self._parts(m)) > 3:
                raise PolicyError(
                    f"qk_clip cannot tell queries from keys in {m.name!r}: at most three matrices may be stacked, q, k, v. Where several "
                    "query heads share a key, it needs them in a layer of their own: query=, heads= and key_heads=."
                )
        self._reports: dict[str, Tensor] = {}
        self._ever, self._quiet = False, 0
        self._passed: list[bool] | None = None

    def _parts(self, m: Member) -> tuple[str, ...]:
        """What is stacked in the parameter: q, k and v in this order where the layout does not name them."""
        layout = self._axes[m.name]
        return layout.parts or ("q", "k", "v", *[""] * 99)[: layout.size("s")]

    def _over_stack(self, m: Member, share: Tensor) -> Tensor:
        """The factors of all blocks: of q and k, and 1 for v; (part, head), or (head, part) where each head has its parts together."""
        axes = self._axes[m.name].axes
        inner = "s" in axes and axes.index("s") > axes.index("h" if "h" in axes else "H")
        parts = [torch.ones_like(share) if part == "v" else share for part in self._parts(m)]
        return torch.stack(parts, dim=int(inner)).flatten()

    def attentions(self) -> set[str]:
        """The names under which maxima can be reported: of the layers that are scaled, and of the modules that hold them."""
        return {place for names in self._names.values() for name in names for place in _places_of(name)}

    def report(self, attention: str, maxima: Tensor) -> None:
        """Remembers the maxima for the members of an attention, until its next step; of several reports the larger ones."""
        self._ever = True
        self._drop_skipped()
        for m in self.members:
            if any(attention in _places_of(name) for name in self._names[m.name]):
                self._check(m, attention, maxima)
                new, old = maxima.to(m.param.device), self._reports.get(m.name)
                self._reports[m.name] = new if old is None else torch.maximum(old, new)

    def _drop_skipped(self) -> None:
        """Drops reports of a step that never came, as where GradScaler skips it and no hook runs: a backward pass went by since, and its
        gradients are gone."""
        if self._passed is None:
            passed = self._passed = [False]
            for m in self.members:
                if m.param.requires_grad and m.param.is_leaf:
                    m.param.register_post_accumulate_grad_hook(lambda _: passed.__setitem__(0, True))  # type: ignore[no-untyped-call]
                    break
        gone = all(m.param.grad is None or (may_branch(m.param.grad) and not m.param.grad.any()) for m in self.members)
        if self._passed[0] and gone:
            self._reports.clear()
            self._passed[0] = False

    def drop_reports(self, optimizers: Sequence[int]) -> None:
        for m in self.members:
            if m.optimizer in optimizers:
                self._reports.pop(m.name, None)
        if self._passed is not None:
            self._passed[0] = False

    def commit(self, turn: Turn) -> None:
        """Reports are of one step, whether the rule acted in it or rested."""
        self.drop_reports([turn.optimizer])
        if not self._ever and turn.optimizer in self.optimizers:
            self._quiet += 1
            if self._quiet == SILENT_STEPS:
                turn.tell(
                    f"rule '{self.rule.label()}' has heard of no attention logits in {SILENT_STEPS} steps, so that it has never acted: "
                    "report "
                    "them before each step, control.report_max_logits(attention, maxima)."
                )

    def _check(self, m: Member, attention: str, maxima: Tensor) -> None:
        heads = m.view.count // len(self._parts(m))
        if maxima.shape != (heads,):
            raise PolicyError(
                f"the maxima reported for {attention!r} have the shape {tuple(maxima.shape)}, but {m.name!r} has {heads} heads: report "
                "one number a query head."
            )

    def _run_pack(self, part: Pack, turn: Turn) -> None:
        reported = part.only(lambda m: m.name in self._reports)
        if reported is None:
            return
        tau = self.radius(reported, turn)
        maxima = reported.largest([self._reports.pop(m.name) for m in reported.members])
        shares = [clip_factor(logits, tau).sqrt() ** self.rule.power for logits in maxima]
        factor = torch.cat([self._over_stack(m, share) for m, share in zip(reported.members, shares, strict=True)])
        self._multiply(reported, weights_of(reported), factor, turn)


def _places_of(name: str) -> list[str]:
    """The module of a parameter and the one above: ``a.attn.q_proj.weight`` may be reported as ``a.attn.q_proj`` and ``a.attn``."""
    holder = name.rpartition(".")[0]
    return [holder, holder.rpartition(".")[0]]


def report(rules: Iterable[BoundRule], attention: str, maxima: Any) -> None:
    """Hands the largest attention logits of a module's heads to the rules that ask for them."""
    asking = [b for b in rules if isinstance(b, Heads)]
    if not asking:
        raise PolicyError("no rule asks for attention logits: add nw.qk_clip(tau) to the policy.")
    known = {name for b in asking for name in b.attentions()}
    if attention not in known:
        raise PolicyError(f"qk_clip scales nothing in {attention!r}.{nearest(attention, known)}")
    numbers = torch.as_tensor(maxima).detach()
    for b in asking:
        b.report(attention, numbers.to(wide(numbers.device)))


# ------------------------------------------------------------------------------------------------------ orthogonality


class OrthogonalPenalty(BoundRule):
    """The gradient and the value of ¼‖WWᵀ − I‖² on the shorter side."""

    def _pulls(self, part: Pack, offsets: list[Tensor]) -> list[Tensor]:
        blocks = part.gather(offsets)
        return part.split(actions.orthogonality_gradient(blocks) if len(blocks) else up(blocks))

    def _value(self, part: Pack) -> Tensor:
        return part.whole(actions.orthogonality_value, weights_of(part), agree=True).sum()
