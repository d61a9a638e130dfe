"""The page of a study: text from words and tables, charts from Vega-Lite, everything in one file that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.compare import tables
from normwise.experiments.compare.tables import MISSING, finite_number, stat
from normwise.experiments.report import charts, checkpoint, studies, table, tidy, tune
from normwise.experiments.report.scale import fit
from normwise.experiments.report.tidy import Cell
from normwise.files import replace

REMARKS = ("on_edge", "fades_out", "breaches")  # what a reader should know before believing a cell
HERE = Path(__file__).parent


def write(results: dict[str, Any], folder: str | Path) -> Path:
    """Writes ``index.html`` and ``results.json`` into ``folder`` (made if need be) and returns the page's path.

    The page opens without a network: styles, pictures, scripts and data are inside, and a content policy in it forbids fetching.
    Both files appear whole or not at all. Values that are not finite are null in ``results.json``.

    Args:
        results: what a command writes with ``--json``: ``compare``, ``race``, ``gan``, ``prune``, ``recipe``, ``tune``, ``inspect``; by its
            keys. Of a comparison anything but ``cells`` may be missing; the page then shows a dash.
        folder: where to write.

    Raises:
        StudyError: results of no study, or a comparison without a cell.
        DataError: a folder that cannot be written.
    """
    clean: dict[str, Any] = tidy.finite(results)
    html = render(clean)
    target = Path(folder)
    replace(target / "results.json", json.dumps(clean, allow_nan=False, indent=1).encode())
    return replace(target / "index.html", html.encode())


def render(results: dict[str, Any]) -> str:
    """The page's HTML; ``results`` must be finite."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    if (own := checkpoint.page_of(results) or tune.page_of(results) or studies.page_of(results)) is not None:
        return environment.get_template("page.html").render(**own, **_protocol(results["protocol"]), style=style)
    return environment.get_template("compare.html").render(**context(results), style=style, vega=Markup(_vega()))


def context(results: dict[str, Any]) -> dict[str, Any]:
    """What the template of a comparison prints."""
    found = tidy.cells(results)
    data = results.get("data") or {}
    digits, metric = tables.digits_of(results), results.get("metric") or "accuracy"
    return {
        "headline": tables.headline(results),
        "verdicts": [studies.Said(tables.explained(one, digits), one.kind, one.optimizer) for one in tables.verdicts(results)],
        "task": f"compare {results.get('task') or ''}".strip(),
        "about": about(results),
        "warning": "A baseline is weaker than it should be, so that gains over it mean little.",
        "warnings": [tidy.describe(defect) for defect in results.get("baseline_defects") or []],
        "columns": [column.name for column in table.columns_of(found)],
        "groups": _groups(found, data.get("test"), digits, metric),
        "sheets": [_sheet(index, cell, digits, metric) for index, cell in enumerate(found)],
        **_protocol(results.get("protocol") or {}),
        **_figures(found, data, metric),
    }


def about(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines on data, machine and protocol under the title."""
    data, machine = results.get("data") or {}, results.get("machine") or {}
    parts = [f"{tidy.plain(data[part])} {part}" for part in ("train", "validation", "test") if data.get(part) is not None]
    shape = "×".join(map(str, data.get("shape") or []))
    facts = [str(data.get("name") or MISSING), shape, f"{tidy.plain(data.get('classes'))} classes", *parts]
    # A version is text that looks like words already; a key in front of it says what it is a version of.
    box = [str(value) if key == "cpu" else f"{tidy.words(key)} {tidy.describe(value)}" for key, value in machine.items()]
    return [("Data", _joined(facts)), ("Machine", _joined(box)), ("Budget", tidy.describe(results.get("budget")))]


def _protocol(protocol: dict[str, Any]) -> dict[str, Any]:
    """Numbers and short words as facts, sentences (``notes``) as they are, longer lists to open."""
    notes = protocol.get("notes") or []
    rest = {tidy.words(key): value for key, value in protocol.items() if key != "notes"}
    lists = {key: _items(value) for key, value in rest.items() if _items(value)}
    return {
        "notes": notes if isinstance(notes, list) else [tidy.describe(notes)],
        "protocol": [(key, tidy.describe(value)) for key, value in rest.items() if key not in lists],
        "lists": lists,
    }


def _items(value: Any) -> list[str]:
    """The entries of a list or dictionary of phrases; nothing for what fits on one line."""
    if isinstance(value, dict):
        value = [f"{key}: {tidy.describe(item)}" for key, item in value.items()]
    long = isinstance(value, list) and sum(len(tidy.describe(item)) for item in value) > 60
    return [tidy.describe(item) for item in value] if long else []


def _joined(parts: Sequence[str]) -> str:
    return " · ".join(part for part in parts if part) or MISSING


def _groups(found: Sequence[Cell], samples: Any, digits: int, metric: str) -> list[tuple[str, str, list[table.Line]]]:
    """Each optimizer's key, its name and its rows."""
    shown = [ends for cell in found if (ends := tidy.ends(cell, "test_accuracy"))]
    bases = [stat(cell, "test_accuracy") for cell in found if cell["strategy"] == BASELINE]
    scale = fit((value for ends in shown for value in ends.values()), samples).around(bases)
    columns = table.columns_of(found)
    groups: dict[str, list[tuple[int, Cell]]] = {}
    for index, cell in enumerate(found):
        groups.setdefault(cell["optimizer"], []).append((index, cell))
    return [(key, tables.optimizer(group[0][1]), table.lines(group, columns, scale, digits, metric)) for key, group in groups.items()]


def _figures(found: Sequence[Cell], data: dict[str, Any], metric: str) -> dict[str, Any]:
    curves, costs = charts.learning_curves(found, data.get("validation"), metric), charts.cost(found, data.get("test"), metric)
    norms = charts.norm_trajectories(found)
    return {
        "looks": tidy.looks(found),
        "curves": curves,
        "norms": norms,
        "norms_left_out": tidy.parameters(found)[charts.MOST_LAYERS :],
        "cost": costs,
        "specs": {"curves": curves.spec, "cost": costs.spec} | {f"norm-{i}": one.spec for i, one in enumerate(norms)},
    }


def _sheet(index: int, cell: Cell, digits: int, metric: str) -> dict[str, Any]:
    """One cell's details: what was chosen, what its seeds gave, its norms at the end, its policy."""
    facts = [("About", str(cell["about"]))] if cell.get("about") else []
    facts += [("Chosen", table.setting(cell) or MISSING), ("Trials", tidy.plain(cell.get("trials")))]
    facts += [(tidy.words(key).capitalize(), tidy.describe(cell[key])) for key in REMARKS if cell.get(key)]
    for title, part in (("Test", "test"), ("Validation", "validation"), ("Training", "train")):
        facts.append((f"{title} {metric}{', %' if metric == 'accuracy' else ''}", _seeds(cell, f"{part}_{metric}", digits)))
    norms: dict[str, Any] = cell.get("norms") or {}
    kinds = list(dict.fromkeys(kind for values in norms.values() for kind in values))
    return {
        "index": index, "label": tables.label(cell), "optimizer": tables.optimizer(cell), "facts": facts,
        "kinds": [tidy.words(kind) for kind in kinds], "policy": str(cell.get("policy_yaml") or "").strip(),
        "norms": [
            (name, [tidy.plain(tidy.rounded(finite_number(values.get(kind)), 3)) for kind in kinds]) for name, values in norms.items()
        ],
    }  # fmt: skip


def _seeds(cell: Cell, key: str, digits: int) -> str:
    """Mean ± spread, and in brackets each seed's own value: accuracies in percent, losses as they are."""
    values = [finite_number(value) for value in (cell.get(key) or {}).get("values") or []]
    each = ", ".join(tidy.plain(value) if key.endswith("_loss") else tidy.percent(value, digits) for value in values)
    return tables.of_seeds(cell, key, digits) + (f" ({each})" if each else "")


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, at the version that Altair writes for."""
    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE)
