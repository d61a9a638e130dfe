"""``qk_clip``: queries and keys of the heads whose attention logits were reported too large (Kimi K2, 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import weights_of
from normwise.engine.pack import Member, Pack, is_sharded
from normwise.engine.rules.base import BoundRule, runs
from normwise.engine.sharded import collectives
from normwise.engine.step import Turn
from normwise.errors import PolicyError, nearest
from normwise.norms.base import clip_factor
from normwise.norms.reduce import may_branch, wide
from normwise.parameters.inventory import Entry
from normwise.policy import Rule

SILENT_STEPS = 3
"""Steps without a report after which the user is told."""


@runs("qk_clip")
class QKClip(BoundRule):
    """Queries and keys of the heads whose logits were reported too large, shrunk after the step."""

    counted = True
    nothing_to_verify = "only a forward pass shows attention logits"

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
        self.group: Any = None
        """The process group of a DDP model, whose replicas have each seen a batch of their own."""
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
                    "report them before each step, control.report_max_logits(attention, maxima)."
                )

    def _check(self, m: Member, attention: str, maxima: Tensor) -> None:
        heads = m.view.count // len(self._parts(m))
        if maxima.shape != (heads,):
            raise PolicyError(
                f"the maxima reported for {attention!r} have the shape {tuple(maxima.shape)}, but {m.name!r} has {heads} heads: report "
                "one number a query head."
            )

    def run_pack(self, part: Pack, turn: Turn) -> None:
        reported = part.only(lambda m: m.name in self._reports)
        if reported is None:
            return
        tau = self.radius(reported, turn)
        maxima = self._agreed(reported.largest([self._reports.pop(m.name) for m in reported.members]), reported, turn)
        shares = [clip_factor(logits, tau).sqrt() ** self.rule.power for logits in maxima]
        factor = torch.cat([self._over_stack(m, share) for m, share in zip(reported.members, shares, strict=True)])
        self.multiply(reported, weights_of(reported), factor, turn)

    def _agreed(self, maxima: list[Tensor], reported: Pack, turn: Turn) -> list[Tensor]:
        """The largest that any replica has seen: with its own maxima each would scale otherwise, and nothing brings them together again."""
        if self.group is not None:
            return collectives.largest_on_any(maxima, self.group)
        if collectives.many_processes() and not any(is_sharded(m.param) for m in reported.members):
            turn.tell(
                f"rule '{self.rule.label()}' scales by what this process reported, and other processes may report something else, after "
                "which their weights differ. Attach to the DistributedDataParallel model, which lets them agree, or report the largest of "
                "all processes on each."
            )
        return maxima


def _places_of(name: str) -> list[str]:
    """The module of a parameter and the one above: ``a.attn.q_proj.weight`` may be reported as ``a.attn.q_proj`` and ``a.attn``."""
    holder = name.rpartition(".")[0]
    return [holder, holder.rpartition(".")[0]]


def report(rules: Iterable[BoundRule], attention: str, maxima: Any, replicas: Any) -> None:
    """Hands the largest attention logits of a module's heads to the rules that ask for them. replicas: a DDP model's group, or None."""
    asking = [b for b in rules if isinstance(b, QKClip)]
    if not asking:
        raise PolicyError("no rule asks for attention logits: add nw.qk_clip(tau) to the policy.")
    known = {name for b in asking for name in b.attentions()}
    if attention not in known:
        where = "the model itself" if attention == "" else repr(attention)
        raise PolicyError(f"qk_clip scales nothing in {where}.{nearest(attention, {name or 'the model itself' for name in known})}")
    numbers = torch.as_tensor(maxima, dtype=None if isinstance(maxima, Tensor) else torch.float64).detach()    # a list would be fp32
    for b in asking:
        b.group = replicas
        b.report(attention, numbers.to(wide(numbers.device)))
