"""What the library says of a model, in the census's words."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import normwise as nw
from normwise.errors import LayoutError
from normwise.optim.presets import auto
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.layouts import Layout, block_view

MATRIX_ACTS = ("lmo", "ridge")
"""Rows that step a parameter as matrices; the others are AdamW."""


@dataclass(frozen=True)
class Seen:
    """``entries`` by name; ``muon`` and ``auto``: name -> its row's columns; ``told``: warnings of both, one text."""

    entries: Mapping[str, Entry]
    muon: Mapping[str, Mapping[str, object]]
    auto: Mapping[str, Mapping[str, object]]
    told: str

    @property
    def roles(self) -> dict[str, int]:
        """Role -> number of parameters."""
        found: dict[str, int] = {}
        for e in self.entries.values():
            found[e.role] = found.get(e.role, 0) + e.param.numel()
        return found

    def part(self, part: str) -> list[str]:
        return [name for name, e in self.entries.items() if e.attention == part]

    def matrix_share(self, preset: str) -> float:
        """Of the weights of two or more dimensions, the share that the preset steps by a matrix method."""
        rows = getattr(self, preset)
        wide = [e for e in self.entries.values() if e.param.ndim >= 2 and e.name in rows]
        total = sum(e.param.numel() for e in wide)
        return sum(e.param.numel() for e in wide if rows[e.name]["act"] in MATRIX_ACTS) / total if total else 0.0


def look(model: nn.Module) -> Seen:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        entries = {e.name: e for e in Inventory(model)}
        rows = []
        for preset in (nw.optim.Muon, auto):
            routing = preset(model).routing
            assert routing is not None
            rows.append({name: routing.rows[row] for name, row in routing.of.items()})
    return Seen(entries, *rows, "\n".join(str(w.message) for w in said))


def matrices_of(layout: Layout, shape: Sequence[int]) -> list[np.ndarray] | None:
    """The matrices that the library sees in a tensor of this layout, as `axes.matrices` gives them; None where it says it does not know."""
    if not layout.certain:
        return None
    index = torch.arange(int(np.prod(shape))).view(tuple(shape))
    try:
        return list(block_view(layout, "matrix", True).blocks(index).numpy())
    except LayoutError:
        return None
