"""What really happened in a step: on how many tensors and blocks each rule acted, how many it changed, and what no rule touches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from normwise.engine.program import Engine
from normwise.engine.rules.base import BoundRule
from normwise.reports import Loggable, unique


@dataclass(frozen=True)
class Acted:
    """One rule: on how many tensors, numbers and blocks it acts, and how many blocks it changed in the last step (None: not counted)."""

    rule: str
    tensors: int
    numbers: int
    blocks: int
    per: str
    changed: int | None = None
    note: str = ""

    def __str__(self) -> str:
        if not self.tensors:
            return f"{self.rule}: acts on nothing now{self.note}"
        tensors = f"{self.rule} on {_count(self.tensors, 'tensor')}"
        if self.changed is not None:
            tensors += f", {self.changed:,} of {_count(self.blocks, _WORDS.get(self.per, self.per))} changed"
        return tensors + self.note


_WORDS = {"matrix": "matrix", "global": "vector", "element": "entry", "input": "input"}
_PLURALS = {"matrix": "matrices", "entry": "entries"}


@dataclass(frozen=True)
class Receipt(Loggable):
    """Print it, or read ``rules`` and ``untouched`` (names), or log ``flat()``."""

    prefix: ClassVar[str] = "rules/"
    steps: int
    rules: list[Acted] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, engine: Engine, steps: Sequence[int], silent: Mapping[int, str]) -> Receipt:
        """Of rules that are bound; ``steps`` are the optimizers' counts, ``silent`` why one that never stepped has not."""
        touched = {id(m.param) for b in engine.rules for m in b.members}
        untouched = [e.name for e in engine.inventory if id(e.param) not in touched]
        return cls(max(steps), [_acted(b, steps, silent) for b in engine.rules], untouched)

    def numbers(self) -> dict[str, float]:
        """The share of blocks that each rule changed in the last step."""
        labelled = zip(unique(r.rule for r in self.rules), self.rules, strict=True)
        return {label: r.changed / r.blocks for label, r in labelled if r.changed is not None and r.blocks}

    def __str__(self) -> str:
        head = f"after {_count(self.steps, 'step')}:" if self.steps else "no step yet, so that no rule has acted:"
        lines = [head, *(f"  {r}" for r in self.rules)]
        if self.untouched:
            listed = ", ".join(self.untouched[:5]) + (", ..." if len(self.untouched) > 5 else "")
            lines.append(f"  no rule: {len(self.untouched)} ({listed})")
        return "\n".join(lines)


def _acted(bound: BoundRule, steps: Sequence[int], silent: Mapping[int, str]) -> Acted:
    rule, members = bound.rule, bound.members
    counted = bound.violations() if bound.counted else None
    asleep = sorted({silent.get(k, "its optimizer has not stepped yet") for k in bound.optimizers if not steps[k]})
    note = f" ({'; '.join(asleep)})" if asleep else ""
    last = max((steps[k] for k in bound.optimizers), default=0) - 1
    if not note and last >= 0 and not rule.active(last):
        note = " (rested in the last step)"
    blocks = sum(p.count for p in bound.packs)
    return Acted(rule.label(), len(members), sum(m.param.numel() for m in members), blocks, rule.per, counted, note)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what if n == 1 else _PLURALS.get(what, f'{what}s')}"
