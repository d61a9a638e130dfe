"""Pictures of races: every ladder run of one task around its target, and all tasks' shares side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from normwise.errors import DataError
from normwise.experiments.race.tables import ranked
from normwise.experiments.report import tidy
from normwise.experiments.report.drawing import INK, THEME, panels
from normwise.experiments.report.tidy import Row

Results = Mapping[str, Any]
TICKS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
WIDEST = 0.85  # the share of all ladder runs that the vertical axis must hold; those beyond are drawn at its edge, as triangles
MISSED = "missed"
LEGEND = {"orient": "bottom", "labelFontSize": 12, "labelColor": INK}


def ladders(results: Results) -> dict[str, Any]:
    """The picture of one task as a Vega-Lite specification; DataError where no contender is finished."""
    if not results["contenders"]:
        raise DataError(f"The race {results['race']} has no finished contender to draw yet. Let it go on first.")
    names = ranked({results["race"]: results})
    lines = {line["name"]: line for line in results["contenders"]}
    low, high = window = _window(results)
    rows = [row for name in names if name != results["leader"] for row in _points(lines[name], lines[results["leader"]], results)]
    rows = rows or _points(lines[results["leader"]], lines[results["leader"]], results)
    for row in rows:
        row["beyond"] = not low <= row["result"] <= high
        row["look"] = "beyond the axis" if row["beyond"] else row["kind"]
        row["result"] = min(max(row["result"], low), high)
    y_scale = alt.Scale(domain=list(window), nice=False, zero=False)
    form = ".1%" if results["metric"] == "accuracy" else ".2f"
    y = alt.Y("result:Q", title=f"Validation {results['metric']}", scale=y_scale, axis=alt.Axis(tickCount=5, format=form))
    base = alt.Chart().encode(x=_x(min(row["share"] for row in rows) * 0.93, 1.08, "Share of the horizon H"))
    kinds = ["sets the target", "reaches it", "misses it", "beyond the axis"]
    shape = alt.Shape("look:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "circle", "cross", "triangle-down"]))
    colour = alt.Color("look:N", title=None, scale=alt.Scale(domain=kinds, range=[tidy.GREY, *(tidy.COLOURS[i] for i in (0, 1, 3))]))
    points = base.mark_point(filled=True, size=42, opacity=0.75).encode(y=y, shape=shape, color=colour)
    own = base.transform_filter("datum.kind !== 'sets the target' && !datum.beyond")
    middle = own.mark_line(strokeWidth=1.6, color=tidy.COLOURS[0], opacity=0.55).encode(y=alt.Y("median(result):Q", scale=y_scale))
    rule = alt.Chart().mark_rule(color=INK, strokeDash=[4, 3]).encode(y=alt.Y(datum=results["target"], scale=y_scale))
    layered = alt.layer(rule, middle, points).properties(width=210, height=150)
    facet = alt.Facet("panel:N", title=None, sort=list(dict.fromkeys(row["panel"] for row in rows)))
    chart = layered.facet(facet, columns=3, data=alt.InlineData(values=rows), spacing=26)
    spec: dict[str, Any] = chart.configure(**THEME, legend=LEGEND | {"symbolSize": 60}).to_dict()
    return spec


def _points(line: Results, leader: Results, results: Results) -> list[Row]:
    """A contender's runs and, in the same panel, the runs that set the target."""
    panel = f"{line['label']}: {MISSED if line['share'] is None else format(line['share'], '.2f')}"
    sign = 1 if results["metric"] == "accuracy" else -1

    def of(one: Results, kind: str = "") -> list[Row]:
        return [
            {"panel": panel, "share": tidy.rounded(run["share"]), "result": tidy.rounded(run["result"]),
             "kind": kind or ("reaches it" if sign * run["result"] >= sign * results["target"] else "misses it")}
            for run in one["ladder"] if run["result"] is not None
        ]  # fmt: skip

    return of(leader, "sets the target") + (of(line) if line["name"] != leader["name"] else [])


def _window(results: Results) -> tuple[float, float]:
    """The results that the axis holds: as far on either side of the target as most runs lie."""
    target = results["target"]
    every = [run["result"] for line in results["contenders"] for run in line["ladder"] if run["result"] is not None]
    away = sorted(abs(result - target) for result in every)
    most = 1.1 * away[min(len(away) - 1, int(WIDEST * len(away)))] or 0.01
    return max(min(every), target - most) - 0.1 * most, min(max(every), target + most) + 0.1 * most


def _x(low: float, high: float, title: str, field: str = "share:Q") -> alt.X:
    axis = alt.Axis(values=[tick for tick in TICKS if low <= tick <= high], format=".2~f", labelOverlap="greedy")
    return alt.X(field, title=title, scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


def shares(results: Mapping[str, Results]) -> dict[str, Any]:
    """The picture of all tasks as a Vega-Lite specification."""
    rows = [row for task, one in results.items() for line in one["contenders"] for row in _shares(task, line)]
    if not rows:
        raise DataError("No race has a finished contender to draw yet. Let one go on first.")
    known = [row[key] for row in rows for key in ("share", "low", "high") if row[key]]
    low, edge = min(known) * 0.9, max(1.0, *known)
    for row in rows:
        row["shown"], row["end"] = row["share"] or edge * 1.18, row["high"] or edge * 1.18
        row["start"] = row["low"] or row["shown"]
    labels = {line["name"]: line["label"] for one in results.values() for line in one["contenders"]}
    order = [labels[name] for name in ranked(results)]
    kinds = ["samples", "seconds", MISSED]
    x = _x(low, edge * 1.4, "Share of the baseline’s", "shown:Q")
    label = alt.Y("label:N", title=None, sort=order, axis=alt.Axis(grid=True, labelLimit=260))
    base = alt.Chart().encode(y=label, yOffset=alt.YOffset("of:N", sort=["samples", "seconds"]))
    colour = alt.Color("what:N", title=None, scale=alt.Scale(domain=kinds, range=[tidy.COLOURS[0], tidy.COLOURS[1], tidy.GREY]))
    shape = alt.Shape("what:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "diamond", "cross"]))
    even = alt.Chart().mark_rule(color=INK, strokeDash=[4, 3]).encode(x=alt.X(datum=1.0))
    bars = base.transform_filter("datum.of === 'samples' && datum.start < datum.end").mark_rule(strokeWidth=2.2).encode(
        x=alt.X("start:Q"), x2=alt.X2("end:Q"), color=colour)  # fmt: skip
    points = base.mark_point(filled=True, size=75, opacity=1).encode(x=x, color=colour, shape=shape)
    layered = alt.layer(even, bars, points).properties(width=190, height=alt.Step(30, **{"for": "position"}))
    return panels(layered, "task", rows, legend=LEGEND | {"symbolSize": 70})


def _shares(task: str, line: Results) -> list[Row]:
    """A contender's rows of one task: of samples with its interval; of seconds where that is known."""
    label = {"task": task, "label": line["label"], "baseline": line["baseline"]}
    samples = label | {"of": "samples", "share": line["share"], "low": line["low"], "high": line["high"]}
    seconds = label | {"of": "seconds", "share": line["seconds_share"], "low": None, "high": None}
    return [samples | {"what": MISSED if line["share"] is None else "samples"},
            *([seconds | {"what": "seconds"}] if line["seconds_share"] is not None else [])]  # fmt: skip
