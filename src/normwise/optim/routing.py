"""Which parameter takes which row: by the user's word, then by its role; shown as a table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar

from torch import nn

from normwise.errors import PolicyError, nearest
from normwise.optim.columns import Radius, Row, acts_on_blocks, apart, check_row, complete, needs_matrices
from normwise.parameters.inventory import Entry, Inventory, LayoutLike
from normwise.parameters.selectors import select
from normwise.reports import Loggable, table

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

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for torch: one a row that is used, named parameters in the model's order."""
        return [g for name, row in self.rows.items() if (g := self._group(name, row))["params"]]

    def _group(self, name: str, row: Row) -> dict[str, Any]:
        members = [e for e in self.entries if self.of[e.name] == name]
        return {**row, "name": name, "params": [(e.name, e.param) for e in members], "layouts": [e.layout for e in members]}

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
    of = {e.name: roles[role] for e in entries if (role := _routed_as(e)) in roles}
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
        more = f" and {len(stepped) - 8} more" if len(stepped) > 8 else ""
        warnings.warn(
            f"steps under a norm are taken in raw tensors that weights are computed from: {', '.join(stepped[:8])}{more}. The norm is that "
            "of the raw tensor's step, not of the weight's. "
            "Route them by override= to a row such as 'adamw', or remove the parametrization, if that is not meant.",
            stacklevel=5,    # whoever called the preset
        )


def _routed_as(entry: Entry) -> str:
    return "other" if entry.adapter == "A" and entry.role == "hidden" else entry.role


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
    shown = ", ".join(f"{e.name} ({'x'.join(map(str, e.param.shape))} of {type(e.module).__name__})" for e in unsure[:8])
    more = f" and {len(unsure) - 8} more" if len(unsure) > 8 else ""
    warnings.warn(
        f"{shown}{more}: nothing states the axes of these parameters, so that they are not stepped as matrices. Where they are matrices, "
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
    name = f"{base} x {factor}"
    rows[name] = {**row, "radius": _times(row["radius"], factor)}
    return name


def _times(radius: Radius, factor: Radius) -> Radius:
    """The product, one number for each block where either has one for each."""
    if not isinstance(radius, Sequence) and not isinstance(factor, Sequence):
        return radius * factor
    each = (x if isinstance(x, Sequence) else repeat(x) for x in (radius, factor))
    return tuple(r * f for r, f in zip(*each, strict=False))    # a number for all is repeated without an end
