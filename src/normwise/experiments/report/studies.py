"""The pages of ``race``, ``gan``, ``prune`` and ``recipe``: a verdict, pictures, sorted tables, and how it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
from markupsafe import Markup

from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.framework.figures import NO_DIFFERENCE
from normwise.experiments.gan import tables as gan_tables
from normwise.experiments.prune import tables as prune_tables
from normwise.experiments.race import tables as race_tables
from normwise.experiments.recipes import tables as recipe_tables
from normwise.experiments.report import tidy
from normwise.experiments.report.drawing import THEME, panels, render
from normwise.experiments.report.race import ladders
from normwise.experiments.tasks.models.dcgan import LOSSES

Results = Mapping[str, Any]
Table = tuple[str, list[tuple[str, bool]], list[list[str]]]
"""A heading, columns with whether they are words rather than figures, rows."""


@dataclass(frozen=True)
class Said:
    """A sentence under the title. kind: ``better``, ``worse``, ``none`` or ``unknown``, for its colour. about: what it is about."""

    text: str
    kind: str = "none"
    about: str = ""


@dataclass(frozen=True)
class Section:
    """Text, then a picture (SVG; alt says what it shows), then tables, then what is folded away (title, text)."""

    title: str
    text: str = ""
    picture: Any = None
    alt: str = ""
    tables: Sequence[Table] = ()
    details: Sequence[tuple[str, str]] = ()
    pictures: Sequence[tuple[str, Any]] = ()
    """Small ones with their titles, side by side where there is room."""


Page = dict[str, Any]
"""What the template prints, from top to bottom: task, headline, verdicts, about, sections, warning, warnings."""


def table_of(rows: Sequence[Mapping[str, str]], name: str = "") -> Table:
    """Rows of equal columns. Figures are read by their last digits, so that they stand to the right; words to the left.

    A dash says that there is nothing: it makes a column of figures no column of words.
    """
    cells = {column: [row[column] for row in rows if row[column] != "-"] for column in (rows[0] if rows else ())}
    words = [(column, sum(not cell[:1].isdigit() for cell in found) * 2 > len(found)) for column, found in cells.items()]
    return name, words, [list(row.values()) for row in rows]


def svg(spec: dict[str, Any]) -> Any:
    """A picture in the page: Vega escapes the text in it."""
    return Markup(render(spec, ".svg").decode())


def about(results: Results, **first: Any) -> list[tuple[str, str]]:
    """The lines under the title: what comes first, then machine and budget."""
    machine, shown = results["machine"], ("cpu", "cores", "torch", "python", "commit", "date")
    told = " · ".join(f"{machine[key]}" if key in ("cpu", "date") else f"{key} {machine[key]}" for key in shown if machine.get(key))
    return [*((name, str(text)) for name, text in first.items()), ("Machine", told), ("Budget", results["budget"])]


# ------------------------------------------------------------------------------------------------------------------ race


def race(results: Results) -> Page:
    """Who needs how much of the baseline's training."""
    said = race_tables.verdict(results)
    sections = []
    if results["contenders"]:
        spec = ladders(results)
        sections = [
            Section("How much of the baseline’s training each needs",
                    "Sorted by the share of samples, with the 95% bootstrap interval of its median over seeds. Below 1 is less training.",
                    tables=[table_of(race_tables.rows(results))]),
            Section("Validation result against horizon",
                    "One panel for each contender, one mark for each run. The dashed line is the target; the line joins the medians.",
                    svg(spec), "Validation result of every run against its share of the horizon, one panel for each contender."),
            Section("Tuned numbers", "What validation chose, to use as it is.", tables=[table_of(race_tables.numbers(results))]),
        ]  # fmt: skip
    broken = race_tables.breaches(results)
    return {
        "task": f"race {results['race']}", "headline": said or race_tables.title(results),
        "verdicts": [Said(race_tables.title(results))] if said else [],
        "about": about(results, Data=results.get("data") or "bundled data"), "sections": sections,
        "warning": "Bounds were broken." if broken else "Not everything is finished.",
        "warnings": broken + [f"Not finished: {', '.join(results['unfinished'])}."] * bool(results["unfinished"]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- gan


def gan(results: Results) -> Page:
    """Which strategy draws the best images, by loss."""
    cells = sorted(results["cells"], key=gan_tables.rank)
    said = gan_tables.verdict(cells)
    claimed = [one for one in said if NO_DIFFERENCE not in one]
    none = "No strategy draws better images than the baseline at equal time, as far as these seeds can show."
    by_loss = {LOSSES[name].label: [cell for cell in cells if cell["loss"] == name] for name in LOSSES}
    tables = [(name, [{k: v for k, v in row.items() if k != "loss"} for row in gan_tables.rows(group)]) for name, group in by_loss.items()]
    breaches = sorted({breach for cell in cells for breach in cell["breaches"]})
    policies = [(f"{cell['label']}, loss {cell['loss']}", cell["policy_yaml"].strip()) for cell in cells if cell["policy_yaml"]]
    return {
        "task": "gan", "headline": claimed[0] if claimed else none, "verdicts": [Said(one) for one in said if one not in claimed[:1]],
        "about": about(results, Setting=results["setting"]), "warning": "Bounds were broken.", "warnings": breaches,
        "sections": [
            Section("Distance of the drawn images from real ones",
                    "Fréchet distance at equal time: median over seeds, lowest to highest. Further left is better; grey is the baseline.",
                    svg(_distances(cells)), "Fréchet distance of each strategy, one panel for each loss.",
                    [table_of(rows, name) for name, rows in tables if rows]),
            Section("What to know", " ".join(gan_tables.remarks(cells)) or "No cell is at the edge of what was tried."),
            Section("Policies", "What was attached, to load as it is.", details=policies),
        ],
    }  # fmt: skip


def _distances(cells: Sequence[Results]) -> dict[str, Any]:
    rows = []
    for cell in cells:
        known = [value for value in cell["distance_at_equal_time"]["values"] if value is not None]
        if known and cell["distance_at_equal_time"]["median"] is not None:
            rows.append({"loss": LOSSES[cell["loss"]].label, "label": cell["label"], "base": cell["strategy"] == BASELINE,
                         "low": min(known), "middle": cell["distance_at_equal_time"]["median"], "high": max(known)})  # fmt: skip
    base = alt.Chart().encode(
        y=alt.Y("label:N", title=None, sort=list(dict.fromkeys(row["label"] for row in rows)), axis=alt.Axis(grid=True, labelLimit=260)),
        color=alt.condition("datum.base", alt.value(tidy.GREY), alt.value(tidy.COLOURS[0])),
    )
    x = alt.X("low:Q", title="Fréchet distance", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(tickCount=5))
    bars = base.mark_rule(strokeWidth=2.2).encode(x=x, x2=alt.X2("high:Q"))
    points = base.mark_circle(size=75, opacity=1).encode(x=alt.X("middle:Q"))
    return panels(alt.layer(bars, points).properties(width=230, height=alt.Step(24)), "loss", rows)


# ----------------------------------------------------------------------------------------------------------------- prune


def prune(results: Results) -> Page:
    """How much smaller the network is, and what that costs."""
    tried = [line for line in results["strengths"] if "failed" not in line]
    return {
        "task": f"prune {results['task']}", "headline": prune_tables.verdict(results), "verdicts": [], "warning": "", "warnings": [],
        "about": [*about(results, Data=results["data"]),
                  ("Chosen", f"learning rate {results['lr']:.3g}, strength {results['strength']:.3g}")],
        "sections": [
            Section("The networks", "On the test part; mean ± standard deviation over seeds. The last row: the smaller network’s share of "
                    f"the full one. Removing the units changed no output by more than {results['summary']['difference']:.1e} (in float64).",
                    tables=[table_of(prune_tables.networks(results))]),
            Section("Strengths of the group lasso", "With the tuning seed, on validation, fine-tuned. Further left is smaller, further up "
                    "is better; the orange mark is the choice.", svg(_sizes(tried, results["strength"])) if tried else None,
                    "Validation accuracy against the parameters that are left, one mark for each strength.",
                    [table_of([prune_tables.trial(line) for line in results["strengths"]])]),
        ],
    }  # fmt: skip


def _sizes(tried: Sequence[Results], chosen: float) -> dict[str, Any]:
    rows = [
        {"parameters": line["parameters"], "accuracy": line["fine_tuned"], "chosen": line["strength"] == chosen,
         "strength": f"{line['strength']:.2g}"}
        for line in tried
    ]  # fmt: skip
    wide = alt.Scale(type="log", nice=False, padding=20)
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("parameters:Q", title="Parameters left", scale=wide, axis=alt.Axis(format="~s", tickCount=6)),
        y=alt.Y("accuracy:Q", title="Validation accuracy", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(format=".1~%")),
    )
    colour = alt.condition("datum.chosen", alt.value(tidy.COLOURS[1]), alt.value(tidy.COLOURS[0]))
    marks = base.mark_circle(size=90, opacity=1).encode(color=colour)
    names = base.mark_text(dy=-12, fontSize=11).encode(text="strength:N")
    spec: dict[str, Any] = alt.layer(marks, names).properties(width=620, height=260).configure(**THEME).to_dict()
    return spec


# ---------------------------------------------------------------------------------------------------------------- recipe


def recipe(results: Results) -> Page:
    """What each arm of a recipe comes to, a table for each group."""
    said = recipe_tables.verdicts(results)
    named = [(f"{cell['label']}, {cell['group']}".rstrip(", "), cell["policy_yaml"].strip()) for cell in results["cells"]]
    return {
        "task": f"recipe {results['recipe']}", "headline": said[0] if said else results["question"],
        "verdicts": [Said(one) for one in said[1:]], "about": about(results, Data=results["data"]["name"]), "warning": "", "warnings": [],
        "sections": [
            Section(results["question"], f"{recipe_tables.setting(results)} {' '.join(recipe_tables.remarks(results))}",
                    tables=[table_of(rows, group) for group, rows in recipe_tables.groups(results).items()]),
            Section("Policies", "What was attached, to load as it is.", details=[one for one in named if one[1]]),
        ],
    }  # fmt: skip


_PAGES: tuple[tuple[set[str], Callable[[Results], Page]], ...] = (
    ({"race", "contenders", "horizon"}, race), ({"judge", "cells"}, gan), ({"summary", "strengths", "timing"}, prune),
    ({"recipe", "cells"}, recipe),
)  # fmt: skip
"""By the keys that tell a study's results."""


def page_of(results: Results) -> Page | None:
    """The page of a race, a GAN study or a pruning; None for results of none of them."""
    return next((page(results) for keys, page in _PAGES if results.keys() >= keys), None)
