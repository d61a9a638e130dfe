"""The page of ``normwise tune``: the answer, the finalists, every trial, what mattered, and what metric costs in step time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import altair as alt

from normwise.experiments.report import tidy
from normwise.experiments.report.drawing import THEME
from normwise.experiments.report.studies import Page, Said, Section, about, svg, table_of
from normwise.experiments.tune import tables
from normwise.experiments.tune.run import DONE

Results = Mapping[str, Any]
WIDTH, HEIGHT = 620, 240


def page_of(results: Results) -> Page | None:
    """None for the results of something else."""
    if not results.keys() >= {"tune", "finalists", "answer"}:
        return None
    found, answer = results["answer"]["verdict"], results["answer"]
    gained = found is not None and found["significant"]
    policy = [("The policy to load", tables.policy_file(results).strip())]
    sections = [
        Section("The finalists", "Means over the seeds: those of the search, those to choose by, those to judge by.",
                tables=[table_of(tables.finalist_rows(results))], details=policy),
        Section("The search", "One mark for each trial that was not given up, nothing in grey; the line is the best so far.",
                svg(_history(results)), "The metric of each trial against its number."),
        *_mattered(results), _against_time(results),
        Section("Every trial", " ".join(tables.remarks(results)), tables=[table_of(tables.trial_rows(results))]),
        Section("What to try next", " ".join(line.removeprefix("Next: ") for line in results["next"]) or "Nothing stands out."),
    ]  # fmt: skip
    judged = [Said(tables.gain(results), "better" if gained else "none", "Judged")] if found is not None else []
    advice = [Said(told, "none", "Advice")] if (told := tables.advice(results)) else []
    return {
        "task": f"tune {results['target']}", "headline": tables.headline(results),
        "verdicts": [*judged, *advice],
        "about": about(results, Setting=tables.setting(results)), "sections": sections,
        "warning": "Bounds were broken.", "warnings": answer["breaches"],
    }  # fmt: skip


def _mattered(results: Results) -> list[Section]:
    """Nothing where too few trials were done to tell."""
    said = "The share of each choice in whether a trial was among the best (PED-ANOVA)."
    return [Section("What mattered", said, svg(_bars(results)), "The importance of each choice.")] if results["importances"] else []


def _against_time(results: Results) -> Section:
    title, fronts = "Metric against step time", tables.front_rows(results)
    shown = [table_of(fronts, "On the front")] if fronts else []
    if all(row["ms"] is None for row in _rows(results)):
        return Section(title, "No step was timed: a run needs three steps for that.", tables=shown)
    said = "Each trial that is done; the circled ones are beaten by no other in everything."
    return Section(title, said, svg(_trade(results)), "The metric of each trial against the milliseconds of its step.", shown)


def _rows(results: Results) -> list[dict[str, Any]]:
    front = {trial["number"] for trial in tables.front(results)}
    nothing = results["space"]["optimizers"][0]
    return [
        {"number": t["number"], "value": tidy.rounded(t["value"]), "ms": tidy.rounded(t["step_ms"]), "label": t["label"],
         "nothing": t["label"] == nothing, "front": t["number"] in front}
        for t in results["trials"] if t["state"] == DONE
    ]  # fmt: skip


def _history(results: Results) -> dict[str, Any]:
    rows = _rows(results)
    best = accumulate((row["value"] for row in rows), max if results["maximize"] else min)
    rows = [{**row, "best": so_far} for row, so_far in zip(rows, best, strict=True)]
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=alt.X("number:Q", title="Trial", axis=alt.Axis(tickMinStep=1, format="d")))
    title, scale = results["metric"].capitalize(), alt.Scale(zero=False)
    line = base.mark_line(interpolate="step-after", color=tidy.COLOURS[1]).encode(y=alt.Y("best:Q", title=title, scale=scale))
    y = alt.Y("value:Q", title=title, scale=scale)
    return _drawn(alt.layer(line, base.mark_circle(size=60, opacity=1).encode(y=y, color=_grey("nothing"))))


def _bars(results: Results) -> dict[str, Any]:
    rows = [{"name": name, "share": share} for name, share in results["importances"].items()]
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(color=tidy.COLOURS[0]).encode(
        y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)), x=alt.X("share:Q", title=None, axis=alt.Axis(format="~%")),
    )  # fmt: skip
    return _drawn(alt.layer(bars), alt.Step(24))


def _trade(results: Results) -> dict[str, Any]:
    base = alt.Chart(alt.InlineData(values=[row for row in _rows(results) if row["ms"] is not None])).encode(
        x=alt.X("ms:Q", title="Step, ms", scale=alt.Scale(type="log", nice=False, padding=20), axis=alt.Axis(format=",~r", tickCount=5)),
        y=alt.Y("value:Q", title=results["metric"].capitalize(), scale=alt.Scale(zero=False)), color=_grey("nothing"),
    )  # fmt: skip
    circled = base.mark_point(size=190, strokeWidth=1.6).transform_filter("datum.front")
    return _drawn(alt.layer(base.mark_circle(size=60, opacity=1), circled))


def _grey(field: str) -> Any:
    return alt.condition(f"datum.{field}", alt.value(tidy.GREY), alt.value(tidy.COLOURS[0]))


def _drawn(chart: alt.LayerChart | alt.FacetChart, height: Any = HEIGHT) -> dict[str, Any]:
    spec: dict[str, Any] = chart.properties(width=WIDTH, height=height).configure(**THEME).to_dict()
    return spec
