"""Pictures of races: every ladder run of one task around its target, and all tasks' shares side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normwise.errors import DataError
from normwise.experiments.race.tables import ranked
from normwise.experiments.report import tidy
from normwise.experiments.report.picture import INK, save, theme
from normwise.experiments.report.tidy import Row

if TYPE_CHECKING:
    import altair as alt

Results = Mapping[str, Any]
TICKS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
WIDEST = 0.85  # the share of all ladder runs that the vertical axis must hold; those beyond are drawn at its edge, as triangles
MISSED = "missed"


def race_picture(results: Results, path: str | Path) -> Path:
    """Writes one task's ladder runs to ``path`` (``.svg`` or ``.png``): a panel a contender, validation result against horizon.

    Raises DataError for another ending, a folder that cannot be written, and a race in which no contender is finished.
    """
    return save(lambda: ladders(results), path)


def races_picture(results: Mapping[str, Results], path: str | Path) -> Path:
    """Writes the shares of all contenders to ``path`` (``.svg`` or ``.png``), a column a task. results: by task, in this order."""
    return save(lambda: shares(results), path)


def drawable(results: Results) -> bool:
    """Whether there is a contender to draw."""
    return bool(results["contenders"])


# ---------------------------------------------------------------------------------------------------------------- one task


def ladders(results: Results) -> dict[str, Any]:
    """The picture of one task as a Vega-Lite specification."""
    if not drawable(results):
        raise DataError(f"The race {results['race']} has no finished contender to draw yet. Let it go on first.")
    names = ranked({results["race"]: results})
    lines = {line["name"]: line for line in results["contenders"]}
    low, high = _window(results)
    rows = [row for name in names if name != results["leader"] for row in _points(lines[name], lines[results["leader"]], results)]
    rows = rows or _points(lines[results["leader"]], lines[results["leader"]], results)
    for row in rows:
        row["beyond"] = not low <= row["result"] <= high
        row["look"] = "beyond the axis" if row["beyond"] else row["kind"]
        row["result"] = min(max(row["result"], low), high)
    spec: dict[str, Any] = _panels(rows, results, (low, high)).to_dict()
    return spec


def _points(line: Results, leader: Results, results: Results) -> list[Row]:
    """A contender's runs and, in the same panel, the runs that set the target."""
    panel = f"{line['label']}: {_said(line)}"
    mine = [_point(panel, run, _kind(run["result"], results)) for run in line["ladder"] if run["result"] is not None]
    theirs = [_point(panel, run, "sets the target") for run in leader["ladder"] if run["result"] is not None]
    return theirs + (mine if line["name"] != leader["name"] else [])


def _point(panel: str, run: Results, kind: str) -> Row:
    return {"panel": panel, "share": tidy.rounded(run["share"]), "result": tidy.rounded(run["result"]), "kind": kind}


def _said(line: Results) -> str:
    return MISSED if line["share"] is None else f"{line['share']:.2f}"


def _kind(result: float, results: Results) -> str:
    better = result >= results["target"] if results["metric"] == "accuracy" else result <= results["target"]
    return "reaches it" if better else "misses it"


def _window(results: Results) -> tuple[float, float]:
    """The results that the axis holds: as far on either side of the target as most runs lie."""
    target = results["target"]
    every = [run["result"] for line in results["contenders"] for run in line["ladder"] if run["result"] is not None]
    away = sorted(abs(result - target) for result in every)
    most = 1.1 * away[min(len(away) - 1, int(WIDEST * len(away)))] or 0.01
    return max(min(every), target - most) - 0.1 * most, min(max(every), target + most) + 0.1 * most


def _panels(rows: list[Row], results: Results, window: tuple[float, float]) -> alt.FacetChart:
    import altair as alt

    shares_seen = [row["share"] for row in rows]
    y_scale = alt.Scale(domain=list(window), nice=False, zero=False)
    form = ".1%" if results["metric"] == "accuracy" else ".2f"
    y = alt.Y("result:Q", title=f"Validation {results['metric']}", scale=y_scale, axis=alt.Axis(tickCount=5, format=form))
    base = alt.Chart().encode(x=_x(min(shares_seen) * 0.93, 1.08, "Share of the horizon H"))
    kinds = ["sets the target", "reaches it", "misses it", "beyond the axis"]
    shape = alt.Shape("look:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "circle", "cross", "triangle-down"]))
    colour = alt.Color("look:N", title=None, scale=alt.Scale(domain=kinds, range=[tidy.GREY, *(tidy.COLOURS[i] for i in (0, 1, 3))]))
    points = base.mark_point(filled=True, size=42, opacity=0.75).encode(y=y, shape=shape, color=colour)
    own = base.transform_filter("datum.kind !== 'sets the target' && !datum.beyond")
    middle = own.mark_line(strokeWidth=1.6, color=tidy.COLOURS[0], opacity=0.55).encode(y=alt.Y("median(result):Q", scale=y_scale))
    rule = alt.Chart().mark_rule(color=INK, strokeDash=[4, 3]).encode(y=alt.Y(datum=results["target"], scale=y_scale))
    layered = alt.layer(rule, middle, points).properties(width=210, height=150)
    facet = alt.Facet("panel:N", title=None, sort=tidy.unique(row["panel"] for row in rows))
    chart = layered.facet(facet, columns=3, data=alt.InlineData(values=rows), spacing=26)
    return chart.configure(**theme(), legend={"orient": "bottom", "labelFontSize": 12, "labelColor": INK, "symbolSize": 60})


def _x(low: float, high: float, title: str, field: str = "share:Q") -> alt.X:
    import altair as alt

    axis = alt.Axis(values=[tick for tick in TICKS if low <= tick <= high], format=".2~f", labelOverlap="greedy")
    return alt.X(field, title=title, scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


# --------------------------------------------------------------------------------------------------------------- all tasks


def shares(results: Mapping[str, Results]) -> dict[str, Any]:
    """The picture of all tasks as a Vega-Lite specification."""
    import altair as alt

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
    spec: dict[str, Any] = _columns(rows, order, (low, edge * 1.4), alt).to_dict()
    return spec


def _shares(task: str, line: Results) -> list[Row]:
    """A contender's rows of one task: of samples with its interval; of seconds where that is known."""
    label = {"task": task, "label": line["label"], "baseline": line["baseline"]}
    samples = label | {"of": "samples", "share": line["share"], "low": line["low"], "high": line["high"]}
    seconds = label | {"of": "seconds", "share": line["seconds_share"], "low": None, "high": None}
    return [samples | {"what": MISSED if line["share"] is None else "samples"},
            *([seconds | {"what": "seconds"}] if line["seconds_share"] is not None else [])]  # fmt: skip


def _columns(rows: list[Row], order: list[str], domain: tuple[float, float], alt: Any) -> alt.FacetChart:
    kinds = ["samples", "seconds", MISSED]
    x = _x(*domain, "Share of the baseline’s", "shown:Q")
    label = alt.Y("label:N", title=None, sort=order, axis=alt.Axis(grid=True, labelLimit=260))
    base = alt.Chart().encode(y=label, yOffset=alt.YOffset("of:N", sort=["samples", "seconds"]))
    colour = alt.Color("what:N", title=None, scale=alt.Scale(domain=kinds, range=[tidy.COLOURS[0], tidy.COLOURS[1], tidy.GREY]))
    shape = alt.Shape("what:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "diamond", "cross"]))
    even = alt.Chart().mark_rule(color=INK, strokeDash=[4, 3]).encode(x=alt.X(datum=1.0))
    bars = base.transform_filter("datum.of === 'samples' && datum.start < datum.end").mark_rule(strokeWidth=2.2).encode(
        x=alt.X("start:Q"), x2=alt.X2("end:Q"), color=colour)  # fmt: skip
    points = base.mark_point(filled=True, size=75, opacity=1).encode(x=x, color=colour, shape=shape)
    layered = alt.layer(even, bars, points).properties(width=190, height=alt.Step(30, **{"for": "position"}))
    column = alt.Column("task:N", title=None, sort=tidy.unique(row["task"] for row in rows))
    chart = layered.facet(column=column, data=alt.InlineData(values=rows))
    return chart.configure(**theme(), legend={"orient": "bottom", "labelFontSize": 12, "labelColor": INK, "symbolSize": 70})
