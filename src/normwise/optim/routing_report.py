"""Which parameters really take which step, in a few lines; and a word where a matrix method has little to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from normwise.engine.action_report import Receipt as RuleReceipt
from normwise.optim.columns import needs_matrices, norm_of
from normwise.optim.plan import names_of
from normwise.reports import Loggable

if TYPE_CHECKING:
    from normwise.optim.optimizer import NormOptimizer

# The share of the weights of two or more dimensions below which a matrix method is told to have little to do.
HALF = 0.5


@dataclass(frozen=True)
class Stepped:
    """The parameters of one group: tensors and numbers by kind (matrices, embeddings, vectors), and those that have not stepped yet."""

    row: str
    method: str
    kinds: Mapping[str, int]
    numbers: int
    matrix_method: bool
    idle: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Receipt(Loggable):
    """Print it, or read ``groups``, ``covered`` (the share of the weights of two or more dimensions under a matrix method; None where no
    row is one) and ``rules``."""

    prefix: ClassVar[str] = "steps/"
    groups: list[Stepped]
    size: int
    """How many numbers all groups hold."""
    covered: float | None
    rules: RuleReceipt | None = None

    @classmethod
    def of(cls, optimizer: NormOptimizer) -> Receipt:
        """Of the optimizer's groups and state as they are now."""
        roles = _roles(optimizer)
        groups = [_stepped(group, roles, optimizer.state) for group in optimizer.param_groups if group["params"]]
        control = optimizer.control
        numbers = sum(g.numbers for g in groups)
        return cls(groups, numbers, _covered(optimizer), None if control is None else control.receipt())

    def numbers(self) -> dict[str, float]:
        """Each row's share of the parameters, the share of ``covered``, and the numbers of the rules."""
        shares = {f"share/{g.row}": g.numbers / max(self.size, 1) for g in self.groups}
        return {**shares, **({} if self.covered is None else {"covered": self.covered}), **(self.rules.flat() if self.rules else {})}

    def __str__(self) -> str:
        lines = [_line(g, self.size) for g in self.groups]
        idle = [name for g in self.groups for name in g.idle]
        if idle:
            lines.append(f"not stepped yet, without a gradient: {len(idle)} ({', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''})")
        return "\n".join([*lines, *([str(self.rules)] if self.rules else [])])


def _line(g: Stepped, numbers: int) -> str:
    shown = ", ".join(f"{n} {_plural(kind, n)}" for kind, n in g.kinds.items() if n)
    share = g.numbers / max(numbers, 1)
    return f"{shown} under {g.method} ({share:.0%} of the parameters; row '{g.row}')"


def _plural(kind: str, n: int) -> str:
    return kind if n == 1 else {"matrix": "matrices"}.get(kind, f"{kind}s")


def _roles(optimizer: NormOptimizer) -> dict[int, str]:
    entries = () if optimizer.routing is None else optimizer.routing.entries
    return {id(e.param): e.role for e in entries}


def _stepped(group: Mapping[str, Any], roles: Mapping[int, str], state: Mapping[Tensor, Any]) -> Stepped:
    kinds = {"matrix": 0, "embedding": 0, "head": 0, "vector": 0}
    for p in group["params"]:
        role = roles.get(id(p), "")
        kinds[role if role in kinds else "matrix" if p.ndim >= 2 else "vector"] += 1
    idle = [name for name, p in zip(names_of(group), group["params"], strict=True) if p not in state and group["direction"] != "plain"]
    numbers = sum(p.numel() for p in group["params"])
    return Stepped(str(group.get("name", "main")), _method(group), kinds, numbers, needs_matrices(group), idle)


def _method(group: Mapping[str, Any]) -> str:
    if group["act"] == "none":
        return {"adam": "AdamW" if group["hold"] == "none" else "Adam", "plain": "gradient descent"}.get(group["direction"], "momentum")
    if group["act"] == "ridge":
        return "the ridge inverse"
    name = getattr(norm_of(group), "name", str(group["norm"]))
    return f"the {name} LMO" if group["act"] == "lmo" else f"normalisation by {name}"


def _covered(optimizer: NormOptimizer) -> float | None:
    """Of the numbers in weights of two or more dimensions the share that a matrix method steps; None where no row is one."""
    groups = optimizer.param_groups
    if not any(map(needs_matrices, groups if optimizer.routing is None else optimizer.routing.rows.values())):
        return None
    others = _meant_for_others(optimizer)
    sizes = [(needs_matrices(g), p.numel()) for g in groups for p in g["params"] if p.ndim >= 2 and id(p) not in others]
    whole = sum(n for _, n in sizes)
    return sum(n for matrix, n in sizes if matrix) / whole if whole else None


def _meant_for_others(optimizer: NormOptimizer) -> set[int]:
    """LoRA's A: the matrix methods step B of the product, and leave A to AdamW."""
    return set() if optimizer.routing is None else {id(e.param) for e in optimizer.routing.entries if e.adapter == "A"}


def little_covered(optimizer: NormOptimizer) -> str | None:
    """A warning where a matrix method steps less than half of the weights of two or more dimensions, with the largest of the others."""
    covered = _covered(optimizer)
    if covered is None or covered >= HALF or optimizer.routing is None:
        return None
    rows, of = optimizer.routing.rows, optimizer.routing.of
    others = [e for e in optimizer.routing.entries if e.param.ndim >= 2 and not needs_matrices(rows[of[e.name]])]
    largest = sorted(others, key=lambda e: -e.param.numel())[:3]
    named = ", ".join(f"{e.name} ({e.role}, {'x'.join(map(str, e.param.shape))})" for e in largest)
    return (
        f"the matrix method of this {type(optimizer).__name__} steps {covered:.0%} of the weights of two or more dimensions; the largest "
        f"of the others are {named}. If they should take it, route them: override={{{largest[0].name!r}: {_matrix_row(optimizer)!r}}}. "
        "print(optimizer.receipt()) shows who takes what."
    )


def _matrix_row(optimizer: NormOptimizer) -> str:
    assert optimizer.routing is not None
    return next(name for name, row in optimizer.routing.rows.items() if needs_matrices(row))
