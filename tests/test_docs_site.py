"""The site: a page for every rule, preset and public name, text that both a code host and the site can show, and the build itself."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import normwise as nw
from normwise.policy.named import NAMED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
MODULES = (
    "normwise", "normwise.optim", "normwise.norms", "normwise.norms.linalg", "normwise.prune", "normwise.inspection", "normwise.advice",
)  # fmt: skip
PUBLIC = [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]


@pytest.fixture(scope="module")
def gallery() -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("gallery")
    finally:
        sys.path.remove(str(DOCS))


def test_the_gallery_is_what_its_script_writes(gallery: Any) -> None:
    made = gallery.pages()
    kept = {page.name: page.read_text(encoding="utf-8") for page in (DOCS / "gallery").glob("*.md")}
    stale = [name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name)]
    assert stale == [], "run `python docs/gallery.py`"


def test_every_rule_and_preset_has_a_page_with_a_picture_in_the_index(gallery: Any) -> None:
    names = {*NAMED, *(name.lower() for name in nw.optim.PRESETS), "auto"}
    assert {page.stem for page in (DOCS / "gallery").glob("*.md")} == names | {"index"}
    assert {picture.stem for picture in (DOCS / "gallery" / "images").glob("*.png")} == names
    assert sorted(name for family in gallery.FAMILIES.values() for name in family) == sorted(NAMED)
    assert set(gallery.EXAMPLES) == set(NAMED)


def test_a_table_that_a_page_of_the_gallery_takes_figures_from_is_there(gallery: Any) -> None:
    """Where a marker or a label is misspelt, the page would say that nothing has been measured."""
    for recipe, arms in gallery.IN_RECIPES.items():
        assert set(arms.values()) <= {row["arm"] for row in gallery.rows("recipes.md", f"recipe {recipe}")}
    assert set(gallery.COMPARED.values()) <= {row["strategy"] for row in gallery.rows("compare.md", "digits in full")}
    assert set(gallery.BALANCED.values()) <= {row["strategy"] for row in gallery.rows("results.md", "gan")}
    raced = {name for name in gallery.PRESETS if "Not included in the races" not in gallery.raced(name)}
    assert raced == {"auto", "Ridge", "NorMuon", "Muon", "MuonH", "Scion", "AdamW", "SGD"}
    rows = {name: gallery.cost(name).count("\n|") - 2 for name in gallery.MEASURED}
    assert rows == {"max_norm": 6, "clip_weight_value": 6, "clip_grad_norm": 6, "spectral_cap": 4}    # no cap of GPT-2 has been measured


def test_every_page_is_in_the_navigation() -> None:
    """Those of the gallery are put there by docs/site_hooks.py."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = {line.rpartition(" ")[2] for line in nav.splitlines() if line.endswith(".md")}
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent.name != "gallery" or page.stem == "index"}
    examples = {f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.py")}
    assert pages - named == set(), "a page that mkdocs.yml does not name cannot be found on the site"
    assert named - pages == {"CONTRIBUTING.md", "CHANGELOG.md"} | examples


def documented(name: str) -> bool:
    """Whether a page of the reference has the object, by itself, with its whole module, or by name in a sentence."""
    module, _, short = name.rpartition(".")
    if short in NAMED or short in nw.optim.PRESETS:
        return True    # the gallery, tested above
    thing = getattr(importlib.import_module(module), short)
    home = f"{getattr(thing, '__module__', module)}.{getattr(thing, '__qualname__', short)}"
    whole = re.search(rf"^::: {re.escape(module)}\n(?!.*members:)", REFERENCE, re.MULTILINE) is not None and module != "normwise"
    listed = any(short in re.split(r"[\[\], ]+", line) for line in re.findall(r"members: (\[.*?\])", REFERENCE))
    return whole or listed or f"::: {home}\n" in REFERENCE or bool(re.search(rf"`(?:\w+\.)*{short}`", REFERENCE))


def test_every_public_name_has_a_page() -> None:
    assert len(PUBLIC) > 80
    assert [name for name in PUBLIC if not documented(name)] == []
    assert not documented("normwise.cli.main")    # the test can fail


def test_a_page_reads_alike_on_a_code_host_and_on_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS))
    hooks = importlib.import_module("site_hooks")
    text = "words:\n- one\n  more\n- two\n<!-- races -->\n| a |\n|---|\n| 1 |\n<!-- end races -->\nafter\n```\nx\n- kept\n```"
    assert hooks.spaced(text) == (
        "words:\n\n- one\n  more\n- two\n\n<!-- races -->\n\n| a |\n|---|\n| 1 |\n\n<!-- end races -->\n\nafter\n```\nx\n- kept\n```"
    )
    assert hooks.spaced("| `a\\|b` | \\|c\\| |") == "| `a|b` | \\|c\\| |"
    assert hooks.relinked("[a](docs/race.md) [b](README.md)", "CHANGELOG.md") == "[a](race.md) [b](index.md)"
    assert hooks.relinked("[a](../examples/gpt.py) [b](../CONTRIBUTING.md)", "peft.md") == "[a](examples/gpt.md) [b](CONTRIBUTING.md)"
    assert hooks.relinked("[a](../../examples/gpt.py)", "zh/start.md") == "[a](../examples/gpt.md)"
    assert hooks.gallery.as_markdown("See :func:`~nw.x`, ``y``.\n\n>>> f(1)") == "See `nw.x`, `y`.\n\n\n```python\nf(1)\n```\n"


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > 90
    asks = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"> ]+)")
    assert {(page.name, url) for page, text in pages.items() for url in asks.findall(text)} == set()
    reference = "".join(text for page, text in pages.items() if page.parent.name == "reference")
    shown = set(re.findall(r'id="normwise[\w.]*\.(\w+)"', reference))
    elsewhere = {*NAMED, *nw.optim.PRESETS, "auto"}    # the gallery has them
    modules = {"schedules", "radii", "norms", "optim", "integrations", "prune", "checkpoints"}    # in sentences
    plain = {"PRESETS", "GOALS", "FORMS", "METHODS", *modules}
    assert {name.rpartition(".")[2] for name in PUBLIC} - shown - elsewhere - plain == set()
    assert (tmp_path / "llms.txt").read_text(encoding="utf-8").count("\n- [") > 80
