"""One overview picture, for a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normwise.errors import DataError
from normwise.experiments.catalog import BASELINE
from normwise.experiments.compare.tables import optimizer
from normwise.experiments.report import tidy
from normwise.experiments.report.charts import ACCURACY_TEXT
from normwise.experiments.report.scale import ErrorScale, fit
from normwise.experiments.report.tidy import Cell, Row, stat
from normwise.files import replace

if TYPE_CHECKING:
    import altair as alt

INK = "#24292f"


def picture(results: dict[str, Any], path: str | Path) -> Path:
    """Writes the overview of ``results`` to ``path`` and returns it.

    One panel for each optimizer, one line for each strategy: mean test accuracy and its standard deviation over seeds;
    the grey band is the same of the baseline. The ending of ``path`` decides: ``.svg``, or ``.png`` at twice the size.

    Raises:
        DataError: another ending, or a folder that cannot be written.
        StudyError: results without a cell.
    """
    return save(lambda: overview(results), path)


def save(spec: Callable[[], dict[str, Any]], path: str | Path) -> Path:
    """Writes a Vega-Lite specification as a picture, ``.svg`` or ``.png`` at twice the size. DataError for another ending, before it is
    made, and for a folder that cannot be written."""
    target = Path(path)
    if target.suffix.lower() not in (".svg", ".png"):
        raise DataError(f"A picture is written as .png or .svg, got {target.name!r}. Give the file one of these endings.")
    return replace(target, render(spec(), target.suffix.lower()))


def overview(results: dict[str, Any]) -> dict[str, Any]:
    """The picture as a Vega-Lite specification."""
    found = tidy.cells(results)
    rows = [row for cell in found if (row := _row(cell))]
    scale = fit((value for row in rows for value in (row["low"], row["mean"], row["high"])),
                (results.get("data") or {}).get("test"))
    for row in rows:
        row.update({key: scale.error(row[key]) for key in ("low", "mean", "high")})
    spec: dict[str, Any] = _panels(rows, found, scale).to_dict()
    return spec


def _row(cell: Cell) -> Row | None:
    mean = stat(cell, "test_accuracy")
    if mean is None:
        return None
    std = stat(cell, "test_accuracy", "std") or 0.0
    return tidy.identity(0, cell) | {"name": optimizer(cell), "mean": mean, "low": mean - std, "high": mean + std}


def _panels(rows: list[Row], cells: Sequence[Cell], scale: ErrorScale) -> alt.FacetChart:
    import altair as alt

    is_base = f"datum.strategy === '{BASELINE}'"
    grey = alt.Chart().transform_filter(is_base)
    band = grey.mark_rect(color=tidy.GREY, opacity=0.18).encode(x=_x("low", scale), x2=alt.X2("high:Q"))
    middle = grey.mark_rule(color=tidy.GREY).encode(x=_x("mean", scale))
    rival = alt.Chart().encode(
        y=alt.Y("label:N", title=None, sort=_order(rows), axis=alt.Axis(grid=True, labelLimit=260)),
        color=alt.condition(is_base, alt.value(tidy.GREY), alt.value(tidy.COLOURS[0])),
    )
    bars = rival.mark_rule(strokeWidth=2.2).encode(x=_x("low", scale), x2=alt.X2("high:Q"))
    points = rival.mark_circle(size=75, opacity=1).encode(x=_x("mean", scale))
    layered = alt.layer(band, middle, bars, points).properties(width=230, height=alt.Step(24))
    column = alt.Column("name:N", title=None, sort=tidy.unique(map(optimizer, cells)))
    return layered.facet(column=column, data=alt.InlineData(values=rows)).configure(**theme())


def _x(field: str, scale: ErrorScale) -> alt.X:
    import altair as alt

    return alt.X(f"{field}:Q", title="Test accuracy", axis=alt.Axis(values=scale.ticks(), labelExpr=ACCURACY_TEXT),
                 scale=alt.Scale(type="log", domain=[scale.best, scale.worst], reverse=True, nice=False))


def _order(rows: list[Row]) -> list[str]:
    """Labels, the smallest mean error over optimizers first."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["label"], []).append(row["mean"])
    return sorted(errors, key=lambda name: sum(errors[name]) / len(errors[name]))


def theme() -> dict[str, Any]:
    return {
        "background": "white", "padding": 14, "view": {"stroke": None},
        "axis": {"labelFontSize": 12, "titleFontSize": 12, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal",
                 "gridColor": "#eceff2", "domain": False, "ticks": False, "labelPadding": 6},
        "header": {"labelFontSize": 14, "labelFontWeight": "bold", "labelColor": INK},
    }


def render(spec: dict[str, Any], suffix: str) -> bytes:
    import vl_convert

    if suffix == ".svg":
        return str(vl_convert.vegalite_to_svg(spec)).encode()
    return bytes(vl_convert.vegalite_to_png(spec, scale=2.0))
