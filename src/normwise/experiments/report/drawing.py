"""What every drawn picture shares: its colours and letters, panels side by side, and how a specification becomes a file's content."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

INK = "#24292f"
THEME: dict[str, Any] = {
    "background": "white", "padding": 14, "view": {"stroke": None},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal",
             "gridColor": "#eceff2", "domain": False, "ticks": False, "labelPadding": 6},
    "header": {"labelFontSize": 14, "labelFontWeight": "bold", "labelColor": INK},
}  # fmt: skip


ABREAST = 4
"""Panels in a row: more would be too small to read on a page."""


def panels(
    layered: alt.LayerChart | alt.FacetChart, by: str, rows: list[dict[str, Any]], order: Sequence[str] | None = None, **more: Any
) -> dict[str, Any]:
    """A column for each value of the field ``by``, in the order of the rows, as a Vega-Lite specification; more than `ABREAST` in even
    rows. more: for the theme."""
    values = list(order or dict.fromkeys(row[by] for row in rows))
    data = alt.InlineData(values=rows)
    if len(values) > ABREAST:
        columns = math.ceil(len(values) / math.ceil(len(values) / ABREAST))
        whole = layered.facet(facet=alt.Facet(f"{by}:N", title=None, sort=values), columns=columns, data=data)
    else:
        whole = layered.facet(column=alt.Column(f"{by}:N", title=None, sort=values), data=data)
    spec: dict[str, Any] = whole.configure(**THEME, **more).to_dict()
    return spec


def render(spec: dict[str, Any], suffix: str) -> bytes:
    """A picture as ``.svg``, or as ``.png`` at twice the size."""
    if suffix == ".svg":
        return str(vl_convert.vegalite_to_svg(spec)).encode()
    return bytes(vl_convert.vegalite_to_png(spec, scale=2.0))
