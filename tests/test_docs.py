"""The documents say what the committed results say."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_tables_come_from_the_committed_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "make.py"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_variant_that_was_tried_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of each on the bundled text: finite, and what is said to be something else does something else."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tried = importlib.import_module("tried")
    from normwise.experiments.tasks.load import load_task

    task = load_task("gpt", size="tiny")
    late = ("ridge", "ridge-floor")    # it takes some steps until a unit is short
    found = {name: tried.one(task, name, (60 if name in late else 6) * task.batch, 2000)["result"] for name in tried.VARIANTS}
    assert all(value is not None and math.isfinite(value) for value in found.values()), found
    assert len(set(found.values())) == len(found), found


@pytest.mark.long
def test_every_variant_of_the_tuned_form_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the network with gates, so that what is said of gates is tried too; what is said of attention and of kernels, on those that have
    them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tried = importlib.import_module("tried")
    from normwise.experiments.tasks.load import load_task

    gates, attention, kernels = (load_task(name, size="tiny") for name in ("lstm", "gpt", "resnet"))
    found: dict[str, float] = {}
    for name, (_, columns, _) in tried.ON_TUNED.items():
        task = attention if "rates" in columns else kernels if "act" in columns else gates
        found[name] = tried.one(task, name, 6 * task.batch, 2000)["result"]
    for task in (attention, kernels):
        assert tried.one(task, "tuned", 6 * task.batch, 2000)["result"] not in found.values()
    assert all(value is not None and math.isfinite(value) for value in found.values()), found
    assert len(set(found.values())) == len(found), found
    assert not set(tried.ON_TUNED) & set(tried.VARIANTS)


def test_what_the_probe_changes_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the probe adds a rule both answers are trained, by the same steps as ``tune`` takes; where it does not, none is."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    probe_share = importlib.import_module("probe_share")
    import normwise as nw
    from normwise.experiments.tasks.load import load_task
    from normwise.experiments.tune.study import BUDGETS
    from normwise.experiments.tune.target import Trial, load_target

    task, target = load_task("tabular"), load_target("tabular")
    quiet = probe_share.asked(task, target, 0)
    assert quiet["same"] and not quiet["added"] and "probed" not in quiet
    monkeypatch.setattr("normwise.advice.probe.SPIKE", 1.5)
    loud = probe_share.asked(task, target, 0)
    assert loud["added"] == ["zclip"] and loud["spikes"] and math.isfinite(loud["probed"])
    plain = Trial({"optimizer": "advised", "lr": 1 / 3, **dict.fromkeys(("bound", "pull", "clip"), "none")}, 0, loud["steps"], final=True)
    assert loud["steps"] == round(target.steps * BUDGETS["quick"].scale) and target.call(plain) == loud["alone"]
    assert str(nw.advise(task.build()).optimizer) == plain.stepper
    rows = probe_share.rows([quiet, {**loud, "probed": loud["alone"] - 0.25}])
    assert [row["gain by that"] for row in rows] == ["loss +0.2500 (+0.2500 to +0.2500)"], "a lower loss is a gain"
    assert rows[0]["the probe changes the advice"] == "with 1 of 2 seeds"


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as a code host and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower()).replace(" ", "-") for head in heads}


def test_every_link_between_documents_leads_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!http)([^) ]+)\)", page.read_text(encoding="utf-8"))]
    assert len(links) > 200
    known: dict[Path, set[str]] = {}
    broken = []
    for page, link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            broken.append(f"{page.relative_to(ROOT)}: {link}")
        elif anchor and anchor not in known.setdefault(target, anchors(target)):
            broken.append(f"{page.relative_to(ROOT)}: no such heading: {link}")
    assert broken == []


def test_the_readme_speaks_of_what_there_is() -> None:
    """Every ``nw.name`` and ``nw.optim.name`` in the pages exists."""
    import normwise as nw
    import normwise.prune  # a room of its own, which `import normwise` does not bring

    names = {name for page in PAGES for name in re.findall(r"nw\.((?:optim\.)?\w+)", page.read_text())}
    assert {"attach", "max_norm", "optim.Muon"} <= names
    for name in names:
        thing = nw
        for part in name.split("."):
            assert hasattr(thing, part), name
            thing = getattr(thing, part)
