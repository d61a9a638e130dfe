"""The figures of ``house.py`` keep to their bars: how long the code is, how deep, and how many files one step goes through."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import house
from normwise.norms import native

MISSED = {
    "source lines": 28_634,
}
"""Bars that are still missed, with the figure of the day it was written down. Whoever meets one removes its line: the test says so."""


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    """In a process of its own, so that what other tests have left in caches does not shorten a trace."""
    environment = os.environ | {"PYTHONPATH": str(house.SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, house.__file__, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.xfail(reason=f"{n}: {MISSED[n]:g}", strict=True, raises=AssertionError) if n in MISSED else ())
        for n in house.BARS
    ],
)
def test_the_house_keeps_to_its_bars(name: str, figures: dict[str, float]) -> None:
    if name.startswith("step of [max_norm]") and native.library() is None:
        pytest.skip("without a C compiler a step goes the plain way, through two more files")
    sign, bar = house.BARS[name]
    assert house.met(name, figures[name]), f"{name}: {figures[name]:g}, and the bar is {sign} {bar:g}; see python tests/house.py --where"


def test_every_missed_bar_is_a_bar() -> None:
    assert set(MISSED) <= set(house.BARS)


def function(text: str) -> house.Function:
    found = ast.parse(text).body[0]
    assert isinstance(found, ast.FunctionDef)
    return found


DEEP = '''
@decorated
def f():
    """Two
    lines."""
    if a:
        pass
    elif b:
        pass
    elif c:
        for x in y:
            pass
    else:
        if d:
            while e:
                def g():
                    with h:
                        pass
'''


def test_the_figures_are_measured_as_they_are_said_to_be(tmp_path: Path) -> None:
    """An ``elif`` and an only ``if`` within ``else`` are no deeper than their ``if``; docstrings are no length, marks no comments."""
    f = function(DEEP)
    assert house.length(f) == 14
    assert house.depth(f) == 2
    assert house.depth(function("def f():\n for x in y:\n  try:\n   with a:\n    b()\n  except E:\n   c()")) == 3
    file = tmp_path / "file.py"
    file.write_text("# why\nx = 1  # type: ignore[a]\ny = 2  # noqa: F401\n# ------\nz = '# no comment'  # because\n", encoding="utf-8")
    assert house.comments(file) == 2


def test_cycles_are_found_and_what_only_a_type_checker_sees_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "a": "from p.b import x",
        "b": "def f():\n    import p.c",
        "c": "from p import a",
        "d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.e import y",
        "e": "import p.d",
    }
    (tmp_path / "p").mkdir()
    for name, text in texts.items():
        (tmp_path / "p" / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(house, "SOURCE", tmp_path)
    assert house.cycles(sorted((tmp_path / "p").glob("*.py"))) == [["p.a", "p.b", "p.c"]]


def test_a_trace_sees_the_calls_within_the_package_and_no_others() -> None:
    from normwise.policy.schedules import is_number

    found = house.trace(lambda: [is_number(1.0), len("no"), os.fspath("neither")])
    assert found.calls == [("policy/schedules.py", "is_number")]
