"""Which parameter takes which row: by the user's word, then by its role; shown as a table. And which of them really took a step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from normwise.engine.action_report import Receipt as RuleReceipt
from normwise.errors import PolicyError, nearest
from normwise.optim.columns import Radius, Row, acts_on_blocks, apart, check_row, complete, needs_matrices, norm_of
from normwise.optim.plan import names_of
from normwise.parameters.inventory import Entry, Inventory, LayoutLike, select
from normwise.reports import Loggable, table

if TYPE_CHECKING:
    from normwise.optim.optimizer import NormOptimizer

SKIP = "skip"
"""In the place of a row: another optimizer trains these parameters."""


@dataclass(frozen=True)
class Routing(Loggable):
    """Every trainable parameter with the name of its row; ``print`` it, or read ``of[name]``."""

    prefix: ClassVar[str] = "routing/"
    rows: Mapping[str, Row]
    entries: tuple[Entry, ...]
    of: Mapping[str, str]

    def numbers(self) -> dict[str, float]:
        """How many numbers take each row."""
        return {row: sum(e.param.numel() for e in self.entries if self.of[e.name] == row) for row in dict.fromkeys(self.of.values())}

    def of_shapes(self) -> Routing:
        """The same without the weights: where parameters are replaced, as FSDP2 does, the old ones must not be held here."""
        shapes = (nn.Parameter(torch.empty_like(e.param, device="meta"), e.param.requires_grad) for e in self.entries)
        return replace(self, entries=tuple(replace(e, param=p) for e, p in zip(self.entries, shapes, strict=True)))

    def without_modules(self) -> Routing:
        """The same as plain data, for copies and pickles of the optimizer: a model that is not copied with it must not come along."""
        blank = nn.Module()
        return replace(self, entries=tuple(replace(e, module=blank, owners=(), computed=None, base=None) for e in self.entries))

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for torch: one a row that is used, named parameters in the model's order."""
        members = {name: [e for e in self.entries if self.of[e.name] == name] for name in self.rows}
        return [
            {**self.rows[name], "name": name, "params": [(e.name, e.param) for e in found], "layouts": [e.layout for e in found]}
            for name, found in members.items() if found
        ]  # fmt: skip

    def __str__(self) -> str:
        return table(("parameter", "shape", "role", "row", "direction", "under", "scale", "hold", "lr"), map(self._line, self.entries))

    def _line(self, e: Entry) -> tuple[str, ...]:
        row = self.rows[self.of[e.name]]
        under = "-" if row["act"] == "none" else f"{row['act']} {row['norm']}/{row['per']}"
        hold = row["hold"] if row["hold"] != "none" else f"decay {row['weight_decay']:g}" if row["weight_decay"] else "-"
        shape = "x".join(map(str, e.param.shape)) or "scalar"
        times = "" if row["radius"] == 1 else f" x {row['radius']}"
        return e.name, shape, e.role, self.of[e.name], row["direction"], under, row["scale"] + times, hold, f"{float(row['lr']):g}"


def route(
    model: nn.Module,
    rows: dict[str, Row],
    roles: Mapping[str, str],
    override: Mapping[Any, str | Row | Radius],
    layouts: Mapping[Any, LayoutLike] | None = None,
) -> Routing:
    """Assigns every trainable parameter of ``model`` to a row; each override acts on what those before it left.

    Of a low-rank product B·A (LoRA) only B takes the row of its role: A takes that of role "other", since a step of A moves the product
    through B alone, which is zero at first. Warns of parameters that may be matrices and, since nobody states their axes, are stepped as
    none.

    Raises PolicyError for a row that does not exist, a selector that matches nothing, and, by name, for parameters that nothing covers and
    for complex ones.
    """
    inventory = Inventory(model, layouts=layouts)
    entries = inventory.trainable
    if not entries:
        raise PolicyError("the model has no trainable parameters.")
    rows = dict(rows)
    role_of = {e.name: "other" if e.adapter == "A" and e.role == "hidden" else e.role for e in entries}
    of = {name: roles[role] for name, role in role_of.items() if role in roles}
    unsure = {e.name: e for e in inventory.unsure}
    left: set[str] = set()
    for i, (selector, wanted) in enumerate(override.items()):
        names = [e.name for e in select(entries, selector)]
        if wanted == SKIP:
            left |= set(names)
        elif isinstance(wanted, str | Mapping):
            of |= dict.fromkeys(names, _row(rows, selector, wanted, f"override {i + 1}"))
            unsure = {name: e for name, e in unsure.items() if name not in names}
        else:
            of |= {name: _scaled(rows, of[name], selector, wanted) for name in names if name in of}
    entries = tuple(e for e in entries if e.name not in left)
    of = {name: row for name, row in of.items() if name not in left}
    missing = [f"{e.name} ({e.role})" for e in entries if e.name not in of]
    if missing:
        raise PolicyError(f"no row covers {', '.join(missing)}: route them by override={{selector: row}}. Rows: {', '.join(rows)}.")
    _refuse_complex(entries)
    _check_raw(entries, {e.name: rows[of[e.name]] for e in entries})
    if "hidden" in roles and needs_matrices(rows[roles["hidden"]]):
        _warn_of([e for name, e in unsure.items() if name not in left and not needs_matrices(rows[of[name]])])
    return Routing(rows, entries, of)


def _check_raw(entries: Sequence[Entry], row_of: Mapping[str, Row]) -> None:
    """A step moves the raw tensors of a weight that is computed from them (weight_norm, masks, parametrizations). To hold a raw tensor
    holds no norm of the weight, and is refused; to step under a norm there is another method than with the weight itself, and is told."""
    raw = [e for e in entries if e.aliases and e.role not in ("gain", "bias")]
    for e in raw:
        if row_of[e.name]["hold"] != "none":
            raise PolicyError(
                f"the weight {e.aliases[0]!r} is computed from {e.name!r}, and hold={row_of[e.name]['hold']!r} would hold that raw tensor, "
                "not the weight. Route it to a row that holds nothing, by override=, or use a preset without a hold and a rule on weights, "
                "which acts on the computed weight (policy=[nw.max_norm(...)] or nw.unit_norm)."
            )
    stepped = [f"{e.name} (of {e.aliases[0]})" for e in raw if acts_on_blocks(row_of[e.name])]
    if stepped:
        warnings.warn(
            f"steps under a norm are taken in raw tensors that weights are computed from: {_first(stepped)}. The norm is that "
            "of the raw tensor's step, not of the weight's. "
            "Route them by override= to a row such as 'adamw', or remove the parametrization, if that is not meant.",
            stacklevel=5,    # whoever called the preset
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refuse_complex(entries: Sequence[Entry]) -> None:
    names = [e.name for e in entries if e.param.is_complex()]
    if names:
        raise PolicyError(
            f"{', '.join(names)}: complex numbers, and steps under a norm need real floating-point numbers. Leave them to another "
            f"optimizer by override={{{names[0]!r}: 'skip'}}, torch.optim.AdamW takes them; or train their view_as_real."
        )


def _warn_of(unsure: Sequence[Entry]) -> None:
    if not unsure:
        return
    shown = _first([f"{e.name} ({'x'.join(map(str, e.param.shape))} of {type(e.module).__name__})" for e in unsure])
    warnings.warn(
        f"{shown}: nothing states the axes of these parameters, so that they are not stepped as matrices. Where they are matrices, "
        f"state it: layouts={{{unsure[0].name!r}: nw.Layout(...)}}, or nw.register_layout({type(unsure[0].module).__name__}, ..., "
        "role='hidden'). Where they are none, say which row they take, by override=, and this warning goes.",
        stacklevel=5,    # whoever called the preset
    )


def _row(rows: dict[str, Row], selector: Any, wanted: str | Row, new: str) -> str:
    """The name of the row that an override asks for; a row of the user's own is added as ``new``."""
    if not isinstance(wanted, str):
        rows[new] = complete(wanted, new)
        check_row(rows[new], new)
        return new
    if wanted not in rows:
        raise PolicyError(f"override sends {selector!r} to the row {wanted!r}.{nearest(wanted, rows)}")
    return wanted


def _scaled(rows: dict[str, Row], base: str, selector: Any, factor: Radius) -> str:
    """The name of the row ``base`` with its radius times ``factor``; added where it is new."""
    row = rows[base]
    check_row({**row, "radius": factor}, f"override of {selector!r}")
    if isinstance(factor, tuple | list) and apart(row) and len(factor) != len(row["radius"]):
        raise PolicyError(f"override multiplies {selector!r} by {len(factor)} numbers, whose row {base!r} has {len(row['radius'])}.")
    radius = row["radius"]
    if isinstance(radius, Sequence) or isinstance(factor, Sequence):    # one number for each block where either has one for each
        each = (x if isinstance(x, Sequence) else repeat(x) for x in (radius, factor))
        product: Radius = tuple(r * f for r, f in zip(*each, strict=False))    # a number for all is repeated without an end
    else:
        product = radius * factor
    name = f"{base} x {factor}"
    rows[name] = {**row, "radius": product}
    return name


# ---------------------------------------------------------------------------------------------------------- who takes which step


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
        entries = () if optimizer.routing is None else optimizer.routing.entries
        roles = {e.name: e.role for e in entries}
        groups = [_stepped(group, roles, optimizer.state) for group in optimizer.param_groups if group["params"]]
        control = optimizer.control
        numbers = sum(g.numbers for g in groups)
        return cls(groups, numbers, _covered(optimizer), None if control is None else control.receipt())

    def numbers(self) -> dict[str, float]:
        """Each row's share of the parameters, the share of ``covered``, and the numbers of the rules."""
        shares = {f"share/{g.row}": g.numbers / max(self.size, 1) for g in self.groups}
        return {**shares, **({} if self.covered is None else {"covered": self.covered}), **(self.rules.flat() if self.rules else {})}

    def __str__(self) -> str:
        lines = []
        for g in self.groups:
            plurals = ((n, kind if n == 1 else {"matrix": "matrices"}.get(kind, f"{kind}s")) for kind, n in g.kinds.items() if n)
            shown = ", ".join(f"{n} {kind}" for n, kind in plurals)
            share = g.numbers / max(self.size, 1)
            lines.append(f"{shown} under {g.method} ({share:.0%} of the parameters; row '{g.row}')")
        idle = [name for g in self.groups for name in g.idle]
        if idle:
            lines.append(f"not stepped yet, without a gradient: {len(idle)} ({', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''})")
        return "\n".join([*lines, *([str(self.rules)] if self.rules else [])])


def _stepped(group: Mapping[str, Any], roles: Mapping[str, str], state: Mapping[Tensor, Any]) -> Stepped:
    kinds = {"matrix": 0, "embedding": 0, "head": 0, "vector": 0}
    for name, p in zip(names_of(group), group["params"], strict=True):
        role = roles.get(name, "")
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
    # LoRA's A: the matrix methods step B of the product, and leave A to AdamW.
    others = set() if optimizer.routing is None else {e.name for e in optimizer.routing.entries if e.adapter == "A"}
    listed = [(needs_matrices(g), name, p) for g in groups for name, p in zip(names_of(g), g["params"], strict=True)]
    sizes = [(matrix, p.numel()) for matrix, name, p in listed if p.ndim >= 2 and name not in others]
    whole = sum(n for _, n in sizes)
    return sum(n for matrix, n in sizes if matrix) / whole if whole else None


def little_covered(optimizer: NormOptimizer) -> str | None:
    """A warning where a matrix method steps less than half of the weights of two or more dimensions, with the largest of the others."""
    covered = _covered(optimizer)
    if covered is None or covered >= HALF or optimizer.routing is None:
        return None
    rows, of = optimizer.routing.rows, optimizer.routing.of
    others = [e for e in optimizer.routing.entries if e.param.ndim >= 2 and not needs_matrices(rows[of[e.name]])]
    largest = sorted(others, key=lambda e: -e.param.numel())[:3]
    matrix_row = next(name for name, row in rows.items() if needs_matrices(row))
    named = ", ".join(f"{e.name} ({e.role}, {'x'.join(map(str, e.param.shape))})" for e in largest)
    return (
        f"the matrix method of this {type(optimizer).__name__} steps {covered:.0%} of the weights of two or more dimensions; the largest "
        f"of the others are {named}. If they should take it, route them: override={{{largest[0].name!r}: {matrix_row!r}}}. "
        "print(optimizer.receipt()) shows who takes what."
    )
