"""The page's charts as Vega-Lite specifications.

Every chart holds all optimizers and listens to two signals: ``optimizer``, the one shown, and ``focus``, the strategies
that the reader has picked out (empty: all). The page's own buttons set them, so that all charts move together and no
legend takes room from a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.compare.tables import stat
from normwise.experiments.report import tidy
from normwise.experiments.report.scale import ErrorScale, as_errors, fit
from normwise.experiments.report.tidy import Cell, Row

Axis = Callable[[str], alt.Y]

MOST_LAYERS = 12  # small multiples beyond that are scrolled past; the numbers are in results.json
PICKED = "length(focus) > 0 && indexof(focus, datum.strategy) >= 0"
FADED = f"length(focus) > 0 && !({PICKED})"


@dataclass(frozen=True)
class Figure:
    """A chart with its heading (of small multiples: the parameter's name), what it shows in one sentence, and how to read it."""

    title: str
    text: str
    spec: dict[str, Any]
    about: str = ""


def learning_curves(cells: Sequence[Cell], samples: Any, metric: str = "accuracy") -> Figure:
    """What the task is judged by, on validation, over steps: the mean of the seeds; their range where a strategy is picked out."""
    rows = [tidy.identity(i, cell) | tidy.curve(cell, f"validation_{metric}") for i, cell in enumerate(cells)]
    about = f"Validation {metric} after so many steps: the mean of the seeds. Pick strategies out to see the range over their seeds."
    if metric == "loss":
        chart = _lines(rows, cells, _linear("Validation loss"), ("Loss", ".3f", "datum.mean"))
    else:
        scale = fit((value for row in rows for value in row["mean"]), samples)
        for row in rows:
            row |= {key: [scale.error(value) for value in row[key]] for key in ("mean", "low", "high")}
        chart = _lines(rows, cells, accuracy_axis(alt.Y, scale, "Validation accuracy"), ("Accuracy", ".2%", "1 - datum.mean"))
        about += " The scale is logarithmic in the error, since the last points are the hard ones."
    text = f"Validation {metric} over training steps, one line for each strategy."
    return Figure("Learning curves", text, _spec(chart, cells, 400), about)


def norm_trajectories(cells: Sequence[Cell]) -> list[Figure]:
    """One small chart for each parameter, weights first, at most ``MOST_LAYERS``."""
    figures = []
    for name in tidy.parameters(cells)[:MOST_LAYERS]:
        rows = [tidy.identity(i, cell) | tidy.norm_curve(cell, name) for i, cell in enumerate(cells)]
        chart = _lines(rows, cells, _linear(None), ("Norm", ".4~r", "datum.mean"))
        figures.append(Figure(name, f"Norm of {name} over training steps, one line for each strategy.", _spec(chart, cells, 200)))
    return figures


def cost(cells: Sequence[Cell], samples: Any, metric: str = "accuracy") -> Figure:
    """What the task is judged by, on the test part, against the control's share of the step, with the spread over seeds."""
    rows = []
    for i, cell in enumerate(cells):
        share, ends = stat(cell, "control_share"), tidy.ends(cell, f"test_{metric}")
        if share is not None and ends:
            own = tidy.rounded((stat(cell, "step_ms") or 0.0) * share)
            rows.append(tidy.identity(i, cell) | {"share": share, "ms": own} | ends)
    if metric == "loss":
        chart, better = _scatter(rows, cells, _linear("Test loss"), ("Test loss", ".3f", "datum.mean")), "Further down is better"
    else:
        y = accuracy_axis(alt.Y, as_errors(rows, samples), "Test accuracy")
        chart = _scatter(rows, cells, y, ("Test accuracy", ".2%", "1 - datum.mean"))
        better = "Further up is more accurate"
    about = f"{better}, further left is cheaper. The bars are ± one standard deviation over seeds."
    text = f"Test {metric} against the control's share of a step."
    return Figure(f"{metric.capitalize()} against control cost", text, _spec(chart, cells, 360), about)


def accuracy_axis(channel: Any, scale: ErrorScale, title: str) -> Callable[[str], Any]:
    """Gives ``alt.X`` or ``alt.Y`` of a field that holds errors on ``scale``, labelled as accuracies."""
    axis = alt.Axis(values=scale.ticks(), labelExpr="format(1 - datum.value, '.2~%')")
    domain = alt.Scale(type="log", domain=[scale.best, scale.worst], reverse=True, nice=False)
    return lambda field: channel(f"{field}:Q", title=title, axis=axis, scale=domain)


def _linear(title: str | None) -> Axis:
    """The axis for losses and norms, as they are."""
    return lambda field: alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))


def _lines(rows: list[Row], cells: Sequence[Cell], y: Axis, tip: tuple[str, str, str]) -> alt.LayerChart | alt.FacetChart:
    """Lines over steps. ``y`` gives the vertical axis for a field; ``tip`` is the tooltip's title, format and expression."""
    title, form, value = tip
    base = alt.Chart(alt.InlineData(values=rows)).transform_filter("datum.optimizer === optimizer")
    base = base.transform_flatten(["step", "mean", "low", "high"]).transform_calculate(shown=value)
    base = base.encode(
        x=alt.X("step:Q", title="Step", scale=alt.Scale(nice=False), axis=alt.Axis(tickCount=5, format=",d")),
        color=_look(cells, alt.Color, "colour"), detail="cell:N",
    )
    band = base.mark_area(clip=True).encode(y=y("low"), y2=alt.Y2("high:Q"), opacity=_when(PICKED, 0.18, 0.0))
    line = base.mark_line(clip=True, strokeCap="round").encode(
        y=y("mean"), strokeDash=_look(cells, alt.StrokeDash, "dash"), opacity=_when(FADED, 0.12, 1.0),
        strokeWidth=_when(f"datum.strategy === '{BASELINE}'", 3.2, 1.8),
    )
    dots = base.mark_circle(size=70, opacity=0, clip=True).encode(y=y("mean"), tooltip=[
        alt.Tooltip("label:N", title="Strategy"), alt.Tooltip("step:Q", title="Step", format=","),
        alt.Tooltip("shown:Q", title=title, format=form),
    ])
    return alt.layer(band, line, dots)


def _scatter(rows: list[Row], cells: Sequence[Cell], y: Axis, tip: tuple[str, str, str]) -> alt.LayerChart | alt.FacetChart:
    """Points over the control's share of a step; ``y`` and ``tip`` as for ``_lines``."""
    title, form, value = tip
    base = alt.Chart(alt.InlineData(values=rows)).transform_filter("datum.optimizer === optimizer")
    base = base.transform_calculate(shown=value).encode(
        x=alt.X("share:Q", title="Control’s share of the step", axis=alt.Axis(format="~%", tickCount=6)),
        color=_look(cells, alt.Color, "colour"), opacity=_when(FADED, 0.12, 1.0),
    )
    bars = base.mark_rule(strokeWidth=1.6).encode(y=y("low"), y2=alt.Y2("high:Q"))
    points = base.mark_point(filled=True, size=110).encode(y=y("mean"), shape=_look(cells, alt.Shape, "shape"), tooltip=[
        alt.Tooltip("label:N", title="Strategy"), alt.Tooltip("shown:Q", title=title, format=form),
        alt.Tooltip("share:Q", title="Share of the step", format=".1%"), alt.Tooltip("ms:Q", title="Control, ms a step"),
    ])
    return alt.layer(bars, points)


def _when(test: str, then: float, otherwise: float) -> Any:
    return alt.condition(test, alt.value(then), alt.value(otherwise))


def _look(cells: Sequence[Cell], channel: Any, what: str) -> Any:
    """Colour, dash or shape by strategy; the page's own buttons are the legend."""
    every = tidy.looks(cells)
    scale = alt.Scale(domain=[look.strategy for look in every], range=[getattr(look, what) for look in every])
    return channel("strategy:N", scale=scale, legend=None)


def _spec(chart: alt.LayerChart | alt.FacetChart, cells: Sequence[Cell], height: int) -> dict[str, Any]:
    shown = chart.add_params(alt.param(name="optimizer", value=cells[0]["optimizer"]), alt.param(name="focus", value=[]))
    spec: dict[str, Any] = shown.properties(width="container", height=height).to_dict()
    # The schema is an address that nothing fetches; without it the page can be searched for addresses in earnest.
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}
