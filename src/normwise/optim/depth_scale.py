"""What a parameter's part in the model says about the size of its step, beside its shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normwise.optim.columns import Radius
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.layouts import QKV

SCORES, VALUES, HEAD_OVER_GATES = 3.0, 0.5, 3.0
"""Found by trial on development seeds, docs/results.md: for queries and keys, for values and output, for the head over gates."""


def role_factors(model: nn.Module) -> dict[str, Radius]:
    """Factors of the steps by what the parameters are for, to be given to a matrix preset: ``Ridge(model, override=role_factors(model))``.

    Three times the step for the queries and keys of every attention, half of it for its values and output, the two circuits of Elhage et
    al. (2021); block by block where q, k and v are one tensor whose layout says so, while one that nobody has told apart keeps one step.
    Three times for the head of a model with recurrent layers. Measured for :func:`Ridge` only, on small networks: docs/results.md.

    Returns selector -> factor, for what ``model`` has and trains; empty where it has none of it. LayoutError for a lazy parameter that has
    no shape yet.
    """
    return factors_of(Inventory(model).trainable)


def factors_of(entries: Sequence[Entry]) -> dict[str, Radius]:
    """:func:`role_factors` of what an inventory found."""
    parts, roles = {e.attention for e in entries}, {e.role for e in entries}
    found: dict[str, Radius] = {}
    if parts & {"q", "k"}:
        found["attention:qk"] = SCORES
    if parts & {"v", "out"}:
        found["attention:ov"] = VALUES
    found |= {e.name: each for e in entries if (each := _block_by_block(e))}
    if {"recurrent", "head"} <= roles:
        found["role:head"] = HEAD_OVER_GATES
    return found


def _block_by_block(entry: Entry) -> tuple[float, ...]:
    """A factor for each matrix of a tensor that holds q, k and v, or k and v; empty where nobody has told them apart."""
    layout = entry.layout
    if entry.attention not in ("qkv", "kv") or not layout.certain:
        return ()
    parts = layout.parts or (QKV if entry.attention == "qkv" and layout.size("s") == len(QKV) else ())
    return tuple({"q": SCORES, "k": SCORES, "v": VALUES}.get(part, 1.0) for part in parts)


def over_convolutions(entries: Sequence[Entry]) -> bool:
    """Whether there is a head over convolutions, with neither attention nor gates."""
    roles = {e.role for e in entries}
    return {"conv", "head"} <= roles and "recurrent" not in roles and not any(e.attention for e in entries)
