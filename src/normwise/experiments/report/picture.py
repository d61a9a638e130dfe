"""One overview picture, for a README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt

from normwise.errors import DataError
from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.compare.tables import optimizer
from normwise.experiments.report import tidy
from normwise.experiments.report.bench import costs
from normwise.experiments.report.charts import accuracy_axis
from normwise.experiments.report.drawing import panels, render
from normwise.experiments.report.race import ladders, shares
from normwise.experiments.report.scale import as_errors
from normwise.files import replace


def picture(results: dict[str, Any], path: str | Path) -> Path:
    """Writes the overview of ``results`` to ``path`` and returns it. Its ending decides: ``.svg``, or ``.png`` at twice the size.

    Of a comparison: one panel for each optimizer, one line for each strategy, with the mean test accuracy and its standard deviation over
    seeds; the grey band is the same of the baseline. Of a race: a panel for each contender, validation result against horizon. Of several
    races, by task: the shares of all contenders, a column for each task. Of ``normwise bench control``: what rules add to a step.

    Raises:
        DataError: another ending, a folder that cannot be written, or a race in which no contender is finished.
        StudyError: results without a cell.
    """
    target = Path(path)
    if target.suffix.lower() not in (".svg", ".png"):
        raise DataError(f"A picture is written as .png or .svg, got {target.name!r}. Give the file one of these endings.")
    if results.get("bench") == "control":
        spec = costs(results)
    elif "contenders" in results:
        spec = ladders(results)
    elif results and all(isinstance(one, dict) and "contenders" in one for one in results.values()):
        spec = shares(results)
    else:
        spec = overview(results)
    return replace(target, render(spec, target.suffix.lower()))


def overview(results: dict[str, Any]) -> dict[str, Any]:
    """The picture of a comparison as a Vega-Lite specification."""
    found = tidy.cells(results)
    rows = [tidy.identity(0, cell) | {"name": optimizer(cell)} | ends for cell in found if (ends := tidy.ends(cell, "test_accuracy"))]
    scale = as_errors(rows, (results.get("data") or {}).get("test"))
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["label"], []).append(row["mean"])
    order = sorted(errors, key=lambda name: sum(errors[name]) / len(errors[name]))    # the smallest mean error over optimizers first
    is_base, x = f"datum.strategy === '{BASELINE}'", accuracy_axis(alt.X, scale, "Test accuracy")
    grey = alt.Chart().transform_filter(is_base)
    band = grey.mark_rect(color=tidy.GREY, opacity=0.18).encode(x=x("low"), x2=alt.X2("high:Q"))
    middle = grey.mark_rule(color=tidy.GREY).encode(x=x("mean"))
    rival = alt.Chart().encode(
        y=alt.Y("label:N", title=None, sort=order, axis=alt.Axis(grid=True, labelLimit=260)),
        color=alt.condition(is_base, alt.value(tidy.GREY), alt.value(tidy.COLOURS[0])),
    )
    bars = rival.mark_rule(strokeWidth=2.2).encode(x=x("low"), x2=alt.X2("high:Q"))
    points = rival.mark_circle(size=75, opacity=1).encode(x=x("mean"))
    layered = alt.layer(band, middle, bars, points).properties(width=230, height=alt.Step(24))
    return panels(layered, "name", rows, list(dict.fromkeys(map(optimizer, found))))
