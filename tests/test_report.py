"""The report: whole, self-contained, escaped, complete, and honest about what it does not know."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

from normwise import files
from normwise.errors import DataError, MissingExtraError, NormwiseError, StudyError, need
from normwise.experiments import report
from normwise.experiments.compare import tables
from normwise.experiments.compare.tables import MISSING
from normwise.experiments.report import charts, page, scale, studies, table, tidy

DATA = Path(__file__).parent / "data"
VOID = {"meta", "link", "br", "hr", "img", "input", "line", "circle", "rect", "path"}
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


def example() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / "compare_example.json").read_text(encoding="utf-8"))
    return loaded


def single(**changes: Any) -> dict[str, Any]:
    results = example()
    cell = copy.deepcopy(results["cells"][0]) | changes
    return results | {"cells": [cell]}


def squeezed(parts: list[str]) -> str:
    return re.sub(r"\s+", " ", " ".join(parts)).strip()


class Page(HTMLParser):
    """Collects tags, attributes, visible text and the blocks of script and style; complains about tags left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.row: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: dict[int, dict[str, str]] = {}
        self.sheets: dict[int, str] = {}
        self.open: tuple[str, Any, int] | None = None  # the entry or sheet being read: its tag, its key, where its words begin
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        self.note(tag, dict(attrs))

    def note(self, tag: str, attrs: dict[str, str | None]) -> None:
        if tag == "a":
            self.row = self.rows.setdefault(int((attrs["href"] or "").removeprefix("#cell-")), {})
        if tag == "td" and "data-label" in attrs:
            self.open = tag, attrs["data-label"], len(self.words)
        if tag == "details" and "id" in attrs:
            self.open = tag, int((attrs["id"] or "").removeprefix("cell-")), len(self.words)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag
        if self.open and self.open[0] == tag:
            _, key, begin = self.open
            (self.row if tag == "td" else self.sheets)[key] = squeezed(self.words[begin:])
            self.open = None

    def handle_data(self, data: str) -> None:
        inside = self.stack[-1] if self.stack else ""
        self.blocks.get(inside, self.words).append(data)

    @property
    def text(self) -> str:
        return squeezed(self.words)

    def specs(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.blocks["script"][0])
        return loaded


def read(results: dict[str, Any]) -> Page:
    parsed = Page(page.render(tidy.finite(results)))
    assert not parsed.stack, f"left open: {parsed.stack}"
    return parsed


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(example(), tmp_path_factory.mktemp("out") / "deep" / "folder")


@pytest.fixture(scope="module")
def parsed(written: Path) -> Page:
    return Page(written.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def bundle_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Bundling Vega takes a second; pages that are only read for their text do without."""
    if "written" not in request.fixturenames and "parsed" not in request.fixturenames:
        monkeypatch.setattr(page, "_vega", lambda: "window.vegaEmbed = null;")


def test_the_committed_example_is_what_its_script_makes() -> None:
    sys.path.insert(0, str(DATA))
    try:
        import make_compare_example
    finally:
        sys.path.remove(str(DATA))
    assert make_compare_example.example() == example()


# The extra

def test_write_gives_a_page_and_the_results_beside_it(written: Path) -> None:
    assert written.name == "index.html"
    assert sorted(path.name for path in written.parent.iterdir()) == ["index.html", "results.json"]
    assert json.loads((written.parent / "results.json").read_text(encoding="utf-8")) == example()
    assert 500_000 < written.stat().st_size < 6_000_000


def test_a_page_is_replaced_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("old")
    report.write(single(), tmp_path)
    assert "<!doctype html>" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "results.json"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "index.html"
    old.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(DataError, match=r"index\.html: No space left on device"):
        files.replace(old, b"new")
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="Give a folder that can be written"):
        report.write(single(), tmp_path / "taken")


@pytest.mark.parametrize("results", [{}, {"cells": []}, {"cells": None}, {"cells": [{"strategy": "nothing"}]}])
def test_results_without_cells_are_refused_before_anything_is_written(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cells|optimizer"):
        report.write(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_extra_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"a report needs no_such_package, .*pip install 'normwise\[report\]'") as caught:
        need("report", "json", "no_such_package", what="a report")
    assert isinstance(caught.value, NormwiseError) and isinstance(caught.value, ModuleNotFoundError)


# Self-contained and safe

def test_nothing_on_the_page_is_fetched(parsed: Page) -> None:
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        for name in ("src", "srcset", "data", "action", "poster", "background"):
            assert name not in attributes, (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    own = "".join(parsed.blocks["style"]) + json.dumps(parsed.specs()) + parsed.blocks["script"][-1]
    assert not re.search(r"//[a-z]|@import|url\(|import\(|fetch\(", own)


def test_the_content_policy_forbids_fetching(parsed: Page) -> None:
    policy = next(a["content"] or "" for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert set(" ".join(rules.values()).split()) == {"'unsafe-inline'", "'unsafe-eval'", "data:"}
    assert not any("data:" in value for name, value in rules.items() if name != "img-src")


def test_vega_is_inside(parsed: Page) -> None:
    assert len(parsed.blocks["script"][1]) > 400_000
    assert "window.vegaEmbed" in parsed.blocks["script"][1]


def test_text_from_the_results_is_never_markup() -> None:
    results = single(strategy=HOSTILE, label=HOSTILE, optimizer=HOSTILE, policy_yaml=HOSTILE, norms={HOSTILE: {HOSTILE: 1.0}})
    for seed in results["cells"][0]["curves"]:
        seed["norms"] = {HOSTILE: [1.0] * len(seed["step"])}
    results |= {"task": HOSTILE, "budget": HOSTILE, "machine": {HOSTILE: HOSTILE}, "baseline_defects": [HOSTILE],
                "protocol": {HOSTILE: HOSTILE, "notes": [HOSTILE], "search": {HOSTILE: HOSTILE * 3}}}
    results["data"] |= {"name": HOSTILE, "shape": [HOSTILE]}
    hostile = read(results)
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in hostile.tags)
    assert len(hostile.blocks["script"]) == 3
    assert hostile.text.count(HOSTILE) > 10
    assert hostile.specs()["curves"]["layer"][0]["encoding"]["color"]["scale"]["domain"] == [HOSTILE]


# Complete

def percents(numbers: dict[str, Any]) -> str:
    return "–" if numbers["mean"] is None else f"{100 * numbers['mean']:.1f} ± {100 * numbers['std']:.1f}"


def reached(numbers: dict[str, Any], form: str) -> str:
    missed = f"missed {numbers['values'].count(None)} of 3" if None in numbers["values"] else ""
    median = "" if numbers["median"] is None else format(numbers["median"], form)
    return f"{median} {missed}".strip()


@pytest.mark.parametrize("index", range(36))
def test_every_row_holds_its_cells_numbers(parsed: Page, index: int) -> None:
    cell, row = example()["cells"][index], parsed.rows[index]
    assert row["Test accuracy, %"] == percents(cell["test_accuracy"])
    assert row["Generalisation gap"] == percents(cell["generalisation_gap"])
    assert row["Steps to baseline"] == reached(cell["steps_to_baseline"], ",").replace(",", " ")
    assert row["Seconds to baseline"] == reached(cell["seconds_to_baseline"], ".3g")
    assert row["Step, ms"] == f"{cell['step_ms']:.3g}"
    assert row["Control’s share"] == f"{100 * cell['control_share']:.1f} %"
    assert row["Zero weights"] == f"{100 * cell['sparsity']['mean']:.1f} %"
    assert row["Violations"] == str(cell["violations"])


def test_every_cells_details_hold_its_seeds_norms_and_policy(parsed: Page) -> None:
    for index, cell in enumerate(example()["cells"]):
        text = parsed.sheets[index]
        assert text.startswith(cell["label"])
        if cell["test_accuracy"]["mean"] is not None:
            assert "(" + ", ".join(f"{100 * value:.1f}" for value in cell["test_accuracy"]["values"]) + ")" in text
        for name, norms in cell["norms"].items():
            assert f"{name} {norms['l2']:.3g} " in text
        assert re.sub(r"\s+", " ", cell["policy_yaml"].strip()) in text


def test_every_entry_of_every_row_is_labelled_for_a_phone(parsed: Page) -> None:
    entries = [a["data-label"] for tag, a in parsed.tags if tag == "td" and "data-label" in a]
    cells = len(example()["cells"])
    names = [column.name for column in table.columns_of(example()["cells"])]
    assert len(entries) == cells * len(names)
    assert entries == names * cells


def test_the_way_to_adams_baseline_has_a_column_where_it_is_told() -> None:
    cells = [cell("nothing", [0.95]), cell("cap", [0.96])]
    assert "Steps to Adam’s" not in [column.name for column in table.columns_of(cells)]
    cells[1]["steps_to_adam"] = {"median": None, "values": [None, 40, None]}
    columns = table.columns_of(cells)
    assert columns == [column for column in table.COLUMNS if column.needs != "test_loss"]
    rows = table.lines(list(enumerate(cells)), columns, scale.fit([0.9], 360), 1)
    assert [next(e.text for e in row.entries if e.name == "Steps to Adam’s") for row in rows] == ["missed 2 of 3", "–"]


def test_a_link_from_each_row_leads_to_its_details(parsed: Page) -> None:
    ids = [a["id"] for tag, a in parsed.tags if tag == "details" and "id" in a]
    links = [a["href"] for tag, a in parsed.tags if tag == "a"]
    assert len(ids) == len(set(ids)) == len(example()["cells"])
    assert sorted(links) == sorted(f"#{one}" for one in ids)


def test_the_sections_stand_in_their_order(parsed: Page) -> None:
    sections = [a["id"] for tag, a in parsed.tags if tag == "section"]
    assert sections == ["results", "curves", "norms", "cost", "cells", "protocol"]


def test_rows_are_sorted_by_accuracy_and_the_unknown_comes_last() -> None:
    group = [(i, cell) for i, cell in enumerate(example()["cells"]) if cell["optimizer"] == "adam"]
    rows = table.lines(group, table.COLUMNS, scale.fit([0.9, 0.98], 360), 1)
    means = [dict(group)[row.index]["test_accuracy"]["mean"] for row in rows]
    known = [mean for mean in means if mean is not None]
    assert len(known) == len(means) - 1 and means[-1] is None
    assert known == sorted(known, reverse=True)


def entries(name: str, optimizer: str = "gd") -> dict[str, table.Entry]:
    group = [(i, cell) for i, cell in enumerate(example()["cells"]) if cell["optimizer"] == optimizer]
    rows = table.lines(group, table.COLUMNS, scale.fit([0.9, 0.98], 360), 1)
    return {row.strategy: next(entry for entry in row.entries if entry.name == name) for row in rows}


@pytest.mark.parametrize(("name", "key", "part", "pick"), [
    ("Test accuracy, %", "test_accuracy", "mean", max), ("Generalisation gap", "generalisation_gap", "mean", min),
    ("Steps to baseline", "steps_to_baseline", "median", min), ("Seconds to baseline", "seconds_to_baseline", "median", min),
])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
def test_the_best_of_a_column_is_marked(name: str, key: str, part: str, pick: Any, optimizer: str) -> None:
    of = {cell["strategy"]: cell[key][part] for cell in example()["cells"] if cell["optimizer"] == optimizer}
    best = pick(value for value in of.values() if value is not None)
    marked = {strategy for strategy, entry in entries(name, optimizer).items() if entry.best}
    assert {strategy for strategy, value in of.items() if value == best} <= marked
    texts = {entries(name, optimizer)[strategy].text for strategy in marked}
    assert len(texts) == 1


def test_the_baseline_does_not_win_the_share_of_a_control_it_has_not() -> None:
    marked = [strategy for strategy, entry in entries("Control’s share").items() if entry.best]
    shares = {c["strategy"]: c["control_share"] for c in example()["cells"] if c["optimizer"] == "gd" and c["control_share"]}
    assert marked == [min(shares, key=lambda strategy: shares[strategy])]


def test_violations_are_marked() -> None:
    bad = {strategy: entry.text for strategy, entry in entries("Violations", "momentum").items() if entry.bad}
    assert bad == {"spectral_cap": "2"}
    assert not any(entry.bad for entry in entries("Violations").values())


# Missing values

def test_missed_seeds_are_counted() -> None:
    values = [None, 320, 340]
    cell = single(steps_to_baseline={"median": 340, "values": values})["cells"][0]
    assert table._to_baseline(cell, "steps_to_baseline") == ("340", "missed 1 of 3")
    cell["steps_to_baseline"] = {"median": None, "values": [None] * 3}
    assert table._to_baseline(cell, "steps_to_baseline") == ("missed 3 of 3", "")
    cell["steps_to_baseline"] = None
    assert table._to_baseline(cell, "steps_to_baseline") == (MISSING, "")


def test_a_page_of_one_cell_with_nothing_but_its_name() -> None:
    bare = read({"cells": [{"strategy": "nothing", "optimizer": "sgd"}]})
    assert "nothing can be said yet about sgd" in bare.text
    assert "No norms were followed" in bare.text
    assert set(bare.specs()) == {"curves", "cost"}


def test_accuracies_that_are_not_finite_print_as_a_dash_and_leave_strict_json(tmp_path: Path) -> None:
    lost = {"mean": math.nan, "std": math.inf, "values": [math.nan, math.nan, -math.inf]}
    results = single(test_accuracy=lost, validation_accuracy=lost, step_ms=math.nan, control_share=math.nan)
    for seed in results["cells"][0]["curves"]:
        seed["validation_accuracy"] = [math.nan] * len(seed["step"])
    written = report.write(results, tmp_path)
    text = Page(written.read_text(encoding="utf-8")).text

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    json.loads(Page(written.read_text(encoding="utf-8")).blocks["script"][0], parse_constant=refuse)
    assert not re.search(r"\b(nan|inf|None)\b", text, re.IGNORECASE)
    assert math.isnan(results["cells"][0]["step_ms"]), "the caller's results were changed"


def test_one_seed_has_no_spread() -> None:
    one = {"mean": 0.98, "std": 0.0, "values": [0.98]}
    assert tables.of_seeds({"test_accuracy": one}, "test_accuracy") == "98.0"


def test_defects_of_the_baseline_are_told_first() -> None:
    results = single() | {"baseline_defects": ["The baseline with gd reaches 11.0%."]}
    text = read(results).text
    assert text.index("reaches 11.0%") < text.index("Results")


def test_a_baseline_without_defects_is_not_called_weak(parsed: Page) -> None:
    assert "baseline is weaker" not in parsed.text


# The sentence

def cell(strategy: str, test: list[float], validation: float = 0.9, optimizer: str = "muon") -> dict[str, Any]:
    spread = {"mean": statistics.fmean(test), "std": statistics.stdev(test) if len(test) > 1 else 0.0, "values": test}
    return {"strategy": strategy, "label": strategy, "optimizer": optimizer, "test_accuracy": spread,
            "validation_accuracy": {"mean": validation}}


def results_of(*cells: dict[str, Any], test: int | None = 10_000, **more: Any) -> dict[str, Any]:
    return {"data": {"name": "digits", "test": test}, "cells": list(cells), **more}


@pytest.mark.parametrize(("test", "kind", "says"), [
    ([0.97, 0.98, 0.99], "better", "norm control helps with Muon (cap, +5.00 points)"),
    ([0.92, 0.93, 0.97], "none", "no difference that these seeds can show with Muon"),
    ([0.86, 0.87, 0.85], "worse", "norm control hurts with Muon (cap, −7.00 points)"),
    ([0.99], "unknown", "nothing can be said yet about Muon"),
])
def test_the_title_claims_no_more_than_the_intervals_allow(test: list[float], kind: str, says: str) -> None:
    base = cell("nothing", [0.92, 0.93, 0.94])
    results = results_of(base, cell("cap", test))
    (verdict,) = tables.verdicts(results)
    assert verdict.kind == kind
    assert tables.headline(results) == f"On digits, {says}."


def test_two_images_of_359_are_no_headline() -> None:
    """However alike the seeds: another 359 images would give other accuracies. Of as many as CIFAR's ten thousand times, they would not."""
    alike = [cell("nothing", [350 / 359] * 3), cell("cap", [352 / 359] * 3)]
    assert tables.headline(results_of(*alike, test=359)) == "On digits, no difference that these seeds can show with Muon."
    assert "overlap" in tables.explained(tables.verdicts(results_of(*alike, test=359))[0])
    assert [one.kind for one in tables.verdicts(results_of(*alike, test=1_000_000))] == ["better"]


def test_a_loss_is_better_the_lower_and_two_seeds_say_little_of_it() -> None:
    def lossy(strategy: str, losses: list[float]) -> dict[str, Any]:
        spread = {"mean": statistics.fmean(losses), "std": statistics.stdev(losses), "values": losses}
        return cell(strategy, [0.5] * 3) | {"test_loss": spread, "validation_loss": spread}

    base = lossy("nothing", [1.90, 1.91, 1.92])
    results = results_of(base, lossy("cap", [1.80, 1.81, 1.82]), lossy("worse", [1.95, 1.95, 1.95]), metric="loss")
    assert tables.headline(results) == "On digits, norm control helps with Muon (cap, −0.100 in loss)."
    few = results_of(lossy("nothing", [1.90, 1.91]), lossy("cap", [1.80, 1.81]), metric="loss")
    assert [one.kind for one in tables.verdicts(few)] == ["none"]


def test_a_task_that_is_judged_by_its_loss_is_drawn_by_its_loss() -> None:
    results = example() | {"metric": "loss"}
    for cell in results["cells"]:
        cell |= {f"{part}_loss": {"mean": 1.5, "std": 0.125, "values": [1.375, 1.625]} for part in ("test", "validation", "train")}
        for seed in cell["curves"]:
            seed["validation_loss"] = [2.25] * len(seed["step"])
    shown = read(results)
    specs = shown.specs()
    assert {value for row in charted(specs["curves"]) for value in row["mean"]} == {2.25}
    assert {(row["low"], row["mean"], row["high"]) for row in charted(specs["cost"])} == {(1.375, 1.5, 1.625)}
    for words in ("Validation loss after so many steps", "Further down is better", "Loss against control cost"):
        assert words in shown.text
    assert "Validation accuracy after" not in shown.text and "logarithmic in the error, since" not in shown.text
    assert all("1.500 ± 0.125 (1.375, 1.625)" in facts for facts in shown.sheets.values())


def charted(spec: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = spec["data"]["values"] if "values" in spec.get("data", {}) else next(iter(spec["datasets"].values()))
    return rows


def test_the_strategy_is_chosen_by_validation_not_by_test() -> None:
    base = cell("nothing", [0.92, 0.93, 0.94])
    (verdict,) = tables.verdicts(results_of(base, cell("lucky", [0.98, 0.98, 0.99], 0.90), cell("chosen", [0.93, 0.93, 0.94], 0.95)))
    assert verdict.best is not None and verdict.best["strategy"] == "chosen"
    assert verdict.kind == "none"


def test_optimizers_are_judged_apart_and_told_in_one_sentence() -> None:
    found = [cell("nothing", [0.90, 0.91, 0.92]), cell("cap", [0.96, 0.97, 0.98]),
             cell("nothing", [0.95, 0.96, 0.97], optimizer="adam"), cell("cap", [0.95, 0.96, 0.97], optimizer="adam"),
             cell("cap", [0.95, 0.96], optimizer="lion")]
    assert tables.headline(results_of(*found)) == (
        "On digits, norm control helps with Muon (cap, +6.00 points); no difference that these seeds can show with Adam; "
        "nothing can be said yet about Lion.")


# The pages of the other studies

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def results_of_study(name: str) -> dict[str, Any]:
    if name == "race":
        from normwise.experiments.race.study import replay

        return replay(RESULTS / "race-lstm.runs.jsonl")
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["race", "gan", "prune-resnet-digits", "prune-cnn-mnist"])
def test_each_study_has_a_page_with_its_verdict_tables_and_pictures_and_no_script(name: str, tmp_path: Path) -> None:
    results = results_of_study(name)
    written = Page(report.write(results, tmp_path).read_text(encoding="utf-8"))
    assert not written.stack and not written.blocks["script"]
    policy = next(a["content"] or "" for tag, a in written.tags if tag == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in written.tags:
        assert tag not in ("link", "script", "iframe", "object", "embed", "base", "img", "form")
        assert not {"src", "srcset", "data", "action", "onload"} & attributes.keys() and (attributes.get("href") or "#").startswith("#")
    assert sum(tag == "table" for tag, _ in written.tags) >= 2 and sum(tag == "figure" for tag, _ in written.tags) == 1
    assert results["machine"]["cpu"] in written.text
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(tidy.finite(results)))


def test_a_picture_of_a_page_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, Any]] = []
    draw = studies.render
    monkeypatch.setattr(studies, "render", lambda spec, suffix: drawn.append(spec) or draw(spec, suffix))
    read(results_of_study("race"))
    assert len(drawn) == 1


def test_the_page_of_a_race_holds_every_contenders_row_the_soonest_first() -> None:
    from normwise.experiments.race.tables import rows, verdict

    results = results_of_study("race")
    shown = read(results)
    assert verdict(results) in shown.text
    places = [shown.text.index(f"{row['contender']} {row['share of samples']}") for row in rows(results)]
    assert places == sorted(places) and len(places) == len(results["contenders"])


@pytest.mark.parametrize("name", ["race", "gan", "prune-resnet-digits"])
def test_text_from_other_studies_is_never_markup(name: str) -> None:
    results = copy.deepcopy(results_of_study(name))
    results["budget"] = HOSTILE
    results["machine"]["cpu"] = HOSTILE
    for line in results.get("contenders") or results.get("cells") or []:
        line["label"] = HOSTILE + line["label"]
    results["protocol"][HOSTILE] = HOSTILE
    hostile = read(results)
    assert not any(tag in ("img", "script") or "onerror" in attributes for tag, attributes in hostile.tags)
    assert hostile.text.count(HOSTILE) >= 3


# The charts

def drawn(spec: dict[str, Any], **signals: Any) -> str:
    """The chart as SVG, at these signals."""
    import vl_convert

    shown = spec | {"width": 600}
    shown["params"] = [p | ({"value": signals[p["name"]]} if p["name"] in signals else {}) for p in spec["params"]]
    return str(vl_convert.vegalite_to_svg(shown))


@pytest.mark.parametrize(("optimizer", "lines"), [("gd", 12), ("momentum", 12), ("adam", 11)])
def test_learning_curves_draw_a_line_for_each_strategy_of_the_optimizer(parsed: Page, optimizer: str, lines: int) -> None:
    svg = drawn(parsed.specs()["curves"], optimizer=optimizer)
    strokes = re.findall(r'<path aria-label="[^"]*" role="graphics-symbol" aria-roledescription="line mark"[^>]*>', svg)
    assert len(strokes) == lines  # one strategy diverged under adam and has no curve


def test_focus_fades_the_other_strategies(parsed: Page) -> None:
    svg = drawn(parsed.specs()["curves"], focus=["max_norm"])
    strokes = re.findall(r'aria-roledescription="line mark"[^>]*>', svg)
    faded = [stroke for stroke in strokes if 'opacity="0.12"' in stroke]
    assert (len(strokes), len(faded)) == (12, 11)


def test_the_cost_chart_draws_a_point_and_its_spread_for_each_strategy(parsed: Page) -> None:
    svg = drawn(parsed.specs()["cost"], optimizer="adam")
    assert len(re.findall('aria-roledescription="point"', svg)) == 11
    assert len(re.findall('aria-roledescription="rule mark"', svg)) == 11


def test_there_is_a_norm_chart_for_each_parameter_weights_first(parsed: Page) -> None:
    cells = example()["cells"]
    assert tidy.parameters(cells) == ["conv1.weight", "conv2.weight", "head.weight", "conv1.bias", "conv2.bias", "head.bias"]
    assert sum(name.startswith("norm-") for name in parsed.specs()) == 6
    assert len(re.findall('aria-roledescription="line mark"', drawn(parsed.specs()["norm-0"]))) == 12


def test_many_layers_are_cut_and_the_rest_is_told() -> None:
    results = single()
    for cell in results["cells"]:
        for seed in cell["curves"]:
            seed["norms"] = {f"layer{i}.weight": seed["norms"]["conv1.weight"] for i in range(charts.MOST_LAYERS + 3)}
    many = read(results)
    assert sum(name.startswith("norm-") for name in many.specs()) == charts.MOST_LAYERS
    assert "3 further parameters are in results.json" in many.text


def test_curves_are_the_mean_and_range_of_their_seeds() -> None:
    got = tidy.mean_curve([([1, 2, 3], [0.25, 0.5, None]), ([1, 2, 3], [0.75, math.nan, math.nan]), ([2], [1.0])])
    assert got == {"step": [1, 2], "mean": [0.5, 0.75], "low": [0.25, 0.5], "high": [0.75, 1.0]}


@pytest.mark.parametrize("length", [1, 99, 100, 101, 5000])
def test_long_curves_are_thinned_and_keep_their_ends(length: int) -> None:
    steps = list(range(length))
    kept = tidy.thin(steps)
    assert len(kept) == min(length, tidy.MOST_POINTS) == len(set(kept))
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == length - 1


def test_strategies_look_different_and_the_baseline_is_grey() -> None:
    found = [{"strategy": f"s{i}", "optimizer": "sgd"} for i in range(24)]
    every = tidy.looks([*found, {"strategy": "nothing", "optimizer": "sgd"}])
    assert every[0].strategy == "nothing" and every[0].colour == tidy.GREY
    assert len({(look.colour, tuple(look.dash)) for look in every}) == len({(look.colour, look.shape) for look in every}) == 25


@pytest.mark.parametrize("accuracies", [[0.1, 0.97, 0.995], [0.95, 0.96], [1.0], [0.0], [], [None, 0.5]])
def test_the_accuracy_scale_holds_its_values_and_is_a_scale(accuracies: list[float | None]) -> None:
    fitted = scale.fit(accuracies, 360)
    assert 0 < fitted.best < fitted.worst <= 1
    shares = [fitted.share(value) for value in accuracies if value is not None]
    assert all(0 <= share <= 1 for share in shares)
    assert all(fitted.best <= tick <= fitted.worst for tick in fitted.ticks())
    wide = fitted.worst / fitted.best > 1.5
    assert not wide or len(fitted.ticks()) >= 2


def test_a_cut_scale_stays_a_scale_when_the_baseline_is_perfect() -> None:
    fitted = scale.fit([0.1, 1.0], 360).around([1.0])
    assert 0 < fitted.best < fitted.worst <= 1


# The picture

def test_the_picture_is_written_as_its_ending_says(tmp_path: Path) -> None:
    svg = report.picture(example(), tmp_path / "a" / "overview.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg") and svg.count('aria-roledescription="circle"') == 35
    assert "normalise &lt;units&gt;" in svg and "gradient descent" in svg
    assert report.picture(example(), str(tmp_path / "overview.png")).read_bytes().startswith(b"\x89PNG")


def test_a_picture_with_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.png or \.svg, got 'overview\.gif'"):
        report.picture(example(), tmp_path / "overview.gif")
    assert not list(tmp_path.iterdir())
