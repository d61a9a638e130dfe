"""The picture of ``normwise bench control``: what rules add to a step, beside code by hand and the floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from normwise.experiments.report import tidy
from normwise.experiments.report.drawing import INK, panels

STATES = ("nothing violated", "all violated")
RULES = {"max_norm": "max_norm", "clip_grad_norm": "clip", "both": "both"}
LEGEND = {"orient": "bottom", "labelFontSize": 12, "labelColor": INK}


def costs(results: Mapping[str, Any]) -> dict[str, Any]:
    """A panel for nothing and for everything violated, a line for each network and rule, as a Vega-Lite specification."""
    rows = [
        {"state": row["state"], "name": f"{row['case']}: {RULES[row['rules']]}", "by hand": tidy.rounded(row["hand_us"]),
         "control": tidy.rounded(row["added_us"]), "floor": tidy.rounded(row["floor_us"])}
        for row in results["rows"] if row.get("state") in STATES and row.get("rules") in RULES
    ]  # fmt: skip
    scale = alt.Scale(type="log", nice=False)
    colours = alt.Scale(domain=["floor", "by hand", "control"], range=[tidy.GREY, INK, tidy.COLOURS[0]])
    names = list(dict.fromkeys(row["name"] for row in rows))
    base = alt.Chart().encode(y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)))

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title="Added to a step, µs", scale=scale, axis=alt.Axis(format=",~r", tickCount=5))

    def at(mark: Any, field: str) -> Any:
        colour = alt.Color("what:N", title=None, scale=colours)
        return mark.transform_calculate(what=f"'{field}'").encode(x=x(field), color=colour)

    line = base.mark_rule(color=tidy.GREY, opacity=0.5, strokeWidth=2).encode(x=x("floor"), x2=alt.X2("control:Q"))
    floor, hand = at(base.mark_tick(thickness=2, size=9), "floor"), at(base.mark_tick(thickness=3, size=13), "by hand")
    own = at(base.mark_circle(size=70, opacity=1), "control")
    layered = alt.layer(line, floor, hand, own).properties(width=250, height=alt.Step(19))
    return panels(layered, "state", rows, STATES, legend=LEGEND)
