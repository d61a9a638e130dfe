"""The page of ``normwise inspect``: norms and singular values against depth, whole spectra, what changed, and every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from normwise.experiments.report import tidy
from normwise.experiments.report.drawing import THEME
from normwise.experiments.report.studies import Page, Said, Section, svg, table_of
from normwise.inspection import tables

Results = Mapping[str, Any]
WIDTH, HEIGHT = 300, 190
MOST = 12
"""Kinds of tensors that are drawn, those with the most entries; the table has all."""
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
FIGURES = {"rms": "RMS of the entries", "sigma": "Largest singular value σ₁", "largest_unit": "Largest unit norm",
           "stable_rank": "Stable rank"}  # fmt: skip
CHANGES = {"relative": "‖ΔW‖ / ‖W₀‖", "rank": "Rank of ΔW", "angle": "Angle between W and W₀, degrees", "sigma": "σ₁ of ΔW"}


def page_of(results: Results) -> Page | None:
    """None for the results of something else."""
    return _page(dict(results)) if results.keys() >= {"inspect", "tensors", "roles"} else None


def _page(results: dict[str, Any]) -> Page:
    policy, machine = results["policy"], results["machine"]
    drawn = _kinds(results["tensors"])
    about = [("Format", results["format"]), ("Machine", f"{machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}")]
    about += [("Against", results["against"])] if results["against"] else []
    broken = [] if policy is None or policy["ok"] else policy["broken"] or ["No bound could be measured."]
    said = [] if policy is None else [Said(policy["says"].splitlines()[0], "better" if policy["ok"] else "worse", "Policy")]
    return {
        "task": f"inspect {results['inspect']}", "headline": tables.headline(results), "about": about,
        "verdicts": [*said, *(Said(note) for note in tables.notes(results))], "warning": "The policy is not kept.", "warnings": broken,
        "sections": [
            Section("By role", "The norms of all tensors of a role together; of ranks the median, of units and σ₁ the extreme.",
                    tables=[table_of(tables.role_rows(results))]),
            *_against_depth(drawn, results), *_spectra(drawn, results),
            Section("Every tensor", tables=[table_of(tables.tensor_rows(results))]),
            *([Section("Not measured", details=[(f"{len(results['skipped'])} tensors", "\n".join(results["skipped"]))])]
              if results["skipped"] else []),
        ],
    }  # fmt: skip


def _kinds(records: Sequence[Results]) -> dict[str, list[Results]]:
    """Matrices by kind, the largest kinds, in the order of the file."""
    kinds: dict[str, list[Results]] = {}
    for record in records:
        if len(record["shape"]) > 1 and record.get("l2") is not None:
            kinds.setdefault(record["kind"], []).append(record)
    largest = sorted(kinds, key=lambda kind: -sum(r["entries"] for r in kinds[kind]))[:MOST]
    return {kind: same for kind, same in kinds.items() if kind in largest}


def _against_depth(drawn: Mapping[str, list[Results]], results: Results) -> list[Section]:
    """Figures of the kinds that there are several of."""
    deep = {kind: same for kind, same in drawn.items() if len(same) > 1}
    names = _short(list(deep))
    sections = []
    for title, figures, part in (("Against depth", FIGURES, None), ("What changed", CHANGES, "change")):
        each = [(names[kind], r["depth"], r if part is None else r.get(part, {})) for kind, same in deep.items() for r in same]
        drawn_rows = [
            (label, [{"kind": name, "depth": depth, "value": tidy.rounded(found[key])} for name, depth, found in each
                     if found.get(key) is not None])
            for key, label in figures.items()
        ]  # fmt: skip
        pictures = [(label, svg(_lines(rows, list(names.values())))) for label, rows in drawn_rows if rows]
        if pictures:
            text = "One line for each kind of matrix, one mark for each layer." + (f" Against {results['against']}." if part else "")
            sections.append(Section(title, text, alt="A figure of each kind of matrix against the layer", pictures=pictures))
    return sections


def _lines(rows: list[dict[str, Any]], kinds: list[str]) -> dict[str, Any]:
    colours = [tidy.COLOURS[i % len(tidy.COLOURS)] for i in range(len(kinds))]
    dashes = [DASHES[i // len(tidy.COLOURS) % len(DASHES)] for i in range(len(kinds))]
    legend = alt.Legend(orient="bottom", columns=2, title=None, labelLimit=130, symbolStrokeWidth=2)
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("depth:Q", title="Layer", axis=alt.Axis(tickMinStep=1, tickCount=6, format="d")),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, format=".4~g")),
        color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=colours), legend=legend),
        strokeDash=alt.StrokeDash("kind:N", scale=alt.Scale(domain=kinds, range=dashes), legend=legend),
    )
    chart = alt.layer(base.mark_line(strokeWidth=2), base.mark_circle(size=28, opacity=1))
    spec: dict[str, Any] = chart.properties(width=WIDTH, height=HEIGHT).configure(**THEME).to_dict()
    return spec


def _spectra(drawn: Mapping[str, list[Results]], results: Results) -> list[Section]:
    sections = []
    parts = (("Spectra", lambda r: r), ("Spectra of what changed", lambda r: r.get("change", {})))
    for title, part in parts:
        pictures = [(kind, svg(_spectrum(rows))) for kind, same in drawn.items() if (rows := _values(same, part))]
        if pictures:
            text = "Singular values over the largest, from first to last, on a log scale; a line for each layer, the later the darker."
            text += (f" Of W − W₀, against {results['against']}." if title != "Spectra" else "")
            sections.append(Section(title, text, alt="Singular values", pictures=pictures))
    return sections


def _values(same: Sequence[Results], part: Any) -> list[dict[str, Any]]:
    """Down to 1e-6: below lies what float32 rounds away."""
    rows = []
    for i, record in enumerate(same):
        values = part(record).get("spectrum") or [0.0]
        shares = [(k / max(len(values) - 1, 1), value / values[0]) for k, value in enumerate(values) if values[0] > 0]
        depth = i / max(len(same) - 1, 1)
        rows += [{"layer": i, "depth": depth, "place": tidy.rounded(p), "share": tidy.rounded(s)} for p, s in shares if s >= 1e-6]
    return rows


def _spectrum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    chart = alt.Chart(alt.InlineData(values=rows)).mark_line(strokeWidth=1.6).encode(
        x=alt.X("place:Q", title="Place among the singular values", axis=alt.Axis(format="~%", tickCount=4)),
        y=alt.Y("share:Q", title="σ / σ₁", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(tickCount=4, format=".4~g")),
        color=alt.Color("depth:Q", scale=alt.Scale(range=["#9ecae1", "#08306b"], domain=[0, 1]), legend=None), detail="layer:N",
    )  # fmt: skip
    spec: dict[str, Any] = chart.properties(width=WIDTH, height=HEIGHT).configure(**THEME).to_dict()
    return spec


def _short(kinds: Sequence[str]) -> dict[str, str]:
    """Kinds without the steps that all of them begin with, and without ``.weight``."""
    steps = [kind.split(".") for kind in kinds]
    same = 0
    while steps and all(len(one) > same + 2 and one[same] == steps[0][same] for one in steps):
        same += 1
    return {kind: ".".join(one[same:]).removesuffix(".weight") for kind, one in zip(kinds, steps, strict=True)}
