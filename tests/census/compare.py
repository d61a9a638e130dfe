"""Where the library and an expectation differ, in words."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from census.axes import canonical, matrices
from census.family import MATRIX_ROLES, Expected, Family, expected
from census.seen import MATRIX_ACTS, Seen, look, matrices_of
from normwise.parameters.layouts import Layout


def faults(family: Family, model: nn.Module | None = None, seen: Seen | None = None) -> list[str]:
    """One line a difference; empty where all is as expected. A difference that a warning names is none."""
    model = family.build() if model is None else model
    seen = look(model) if seen is None else seen
    wanted = expected(family, model)
    known = {id(entry.param): entry.name for entry in seen.entries.values()}
    assert wanted.keys() == known.keys(), f"{family.name}: the inventory has {len(known)} parameters, the model {len(wanted)}"
    found = [line for key, name in known.items() for line in _parameter(name, wanted[key], seen, family)]
    return sorted(found) + _attention(family, seen) + _rest(family, seen)


def _parameter(name: str, wanted: Expected, seen: Seen, family: Family) -> list[str]:
    entry = seen.entries[name]
    shape = tuple(entry.param.shape)
    wrong = []
    if entry.role not in wanted.roles:
        wrong.append(f"role {entry.role}, expected {' or '.join(wanted.roles)}")
    if wanted.patterns and not _same_matrices(entry.layout, shape, wanted):
        sure = "" if entry.layout.certain else " ?"
        wrong.append(f"axes {entry.layout}{sure}, expected {' or '.join(wanted.patterns)} {dict(wanted.sizes)}")
    if entry.param.ndim >= 2 and name in seen.muon:
        for preset in ("muon", "auto"):
            matrix = getattr(seen, preset)[name]["act"] in MATRIX_ACTS
            left = _any(name, family.adamw)
            if matrix not in {role in MATRIX_ROLES and not left for role in wanted.roles}:
                wrong.append(f"{preset} steps it by {'a matrix method' if matrix else 'AdamW'}")
    return [f"{name} {shape}: {'; '.join(wrong)}"] if wrong and name not in seen.told else []


def _same_matrices(layout: Layout, shape: tuple[int, ...], wanted: Expected) -> bool:
    got = matrices_of(layout, shape)
    return got is not None and any(_agree(layout, got, matrices(shape, p, wanted.sizes), "m" in p, wanted) for p in wanted.patterns)


def _agree(layout: Layout, got: list[np.ndarray], right: list[np.ndarray], named: bool, wanted: Expected) -> bool:
    """Whether these are the same matrices, each under its name where q, k and v are in one tensor.

    Queries that outnumber the keys may be stated as several matrices of the keys' size, the pieces of one: blocks of a tensor are of one
    shape. They must be called queries, and hold nothing else.
    """
    if not named:
        return canonical(got) == canonical(right)
    if len(layout.parts) != len(got):
        return False
    names = wanted.sizes.get("parts", ("q", "k", "v"))
    stacked = [[m for m, part in zip(got, layout.parts, strict=True) if part == name] for name in names]
    return len(got) == sum(map(len, stacked)) and all(
        pieces and canonical([np.concatenate(pieces)]) == canonical([whole]) for pieces, whole in zip(stacked, right, strict=True)
    )


def _attention(family: Family, seen: Seen) -> list[str]:
    """Parts that weights have and should not, and the reverse."""
    wrong = []
    for name, entry in seen.entries.items():
        if not _any(name, family.attention.get("free", ())) and entry.param.ndim >= 2:
            parts = [part for part, globs in family.attention.items() if part != "free" and _any(name, globs)]
            wanted = parts[0] if parts else ""
            if entry.attention != wanted:
                wrong.append(f"{name}: {entry.attention or 'nothing'} of an attention, expected {wanted or 'nothing'}")
    unused = [g for globs in family.attention.values() for g in globs if not any(fnmatchcase(name, g) for name in seen.entries)]
    assert not unused, f"{family.name}: {unused} match no parameter"
    return wrong


def _any(name: str, globs: object) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)  # type: ignore[attr-defined]


def _rest(family: Family, seen: Seen) -> list[str]:
    """What `auto` says that it does by what a parameter is for.

    The rate of what is no matrix is 0.008 beside normalisation layers and 0.016 without. Queries and keys take three times the step,
    values and outputs half of it, where they lie in one tensor, too.
    """
    rates = {row["lr"] for row in seen.auto.values() if row["act"] not in MATRIX_ACTS}
    wanted = {0.008 if family.normalised else 0.016}
    wrong = [f"auto: the rest has the rates {sorted(rates)}, expected {wanted}"] if rates - wanted else []
    factors = {"q": 3.0, "k": 3.0, "v": 0.5, "out": 0.5}
    for name, row in seen.auto.items():
        entry = seen.entries[name]
        if entry.attention and not _any(name, family.attention.get("free", ())):
            right = [factors[part] for part in (entry.layout.parts if entry.attention == "qkv" else [entry.attention])]
            radius = row["radius"]
            got = list(radius) if isinstance(radius, tuple | list) else [radius] * len(right)
            if got != right:
                wrong.append(f"{name}: auto multiplies its step by {got}, expected {right}")
    return wrong
