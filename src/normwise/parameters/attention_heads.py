"""Attention heads that a plain Linear does not know of: stated in a rule, split off its output axis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

from normwise.errors import LayoutError, PolicyError
from normwise.parameters.layouts import Layout

# How many heads the outputs are; or (matrices, heads) where several matrices are stacked: `(3, 8)` for q, k and v of 8 heads each.
Heads: TypeAlias = int | tuple[int, int]


def convert_heads(value: Any) -> Heads | None:
    """None, a number of heads, or (stacked matrices, heads); a list becomes a tuple."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if value is None:
        return None
    if not all(type(n) is int and n >= 1 for n in listed) or (isinstance(value, list | tuple) and len(listed) != 2):
        raise PolicyError(f"heads is {value!r}, but heads must be a whole number >= 1, or two of them: (stacked matrices, heads).")
    return (listed[0], listed[1]) if len(listed) == 2 else int(listed[0])


def heads_to_data(heads: Heads | None) -> Any:
    """A number or a list of two."""
    return list(heads) if isinstance(heads, tuple) else heads


def split_heads(layout: Layout, heads: Heads, name: str) -> Layout:
    """``layout`` with its output axis split into (stack,) heads and the rest; one that has its heads already must have as many.

    LayoutError where there is no single output axis or its size is no multiple.
    """
    stack, number = heads if isinstance(heads, tuple) else (1, heads)
    if "h" in layout.axes:
        if (layout.size("s"), layout.size("h")) != (stack if isinstance(heads, tuple) else layout.size("s"), number):
            raise LayoutError(f"{name!r} has the axes {layout}, but the rule states heads={heads}: leave heads out.")
        return layout
    lead = (stack, number) if isinstance(heads, tuple) else (number,)
    at = layout.axes.find("o")
    if layout.axes.count("o") != 1 or "s" in layout.axes or layout.shape[at] % math.prod(lead):
        raise LayoutError(f"the outputs of {name!r} (axes {layout}) are no heads={heads}: state them as layout=nw.Layout('hoi', ...).")
    axes = layout.axes[:at] + "sh"[2 - len(lead) :] + layout.axes[at:]
    rest = layout.shape[at] // math.prod(lead)
    return replace(layout, axes=axes, shape=(*layout.shape[:at], *lead, rest, *layout.shape[at + 1 :]))
