"""``normwise demo``: short, and what it prints is measured."""

from __future__ import annotations

import io

import pytest

from normwise import cli
from normwise.experiments import demo


def test_the_demo_shows_what_rules_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "STEPS", 30)
    assert cli.main(["demo"]) == 0
    said = capsys.readouterr().out
    rows = {line[:22].strip(): line.split() for line in said.splitlines() if "%" in line}
    assert list(rows) == list(demo.CASES) and all(len(line) <= 80 for line in said.splitlines())
    assert said.count(" yes ") == 3 and " NO " not in said


def test_a_bound_that_does_not_hold_is_told_and_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = demo.Shown("+ max_norm(1.0)", [0.5, 2.0], 3.0, 0.25, 0.5, 0.1, False)
    monkeypatch.setattr(demo, "_case", lambda *given: shown)
    out = io.StringIO()
    assert not demo.run(out) and " NO " in out.getvalue() and "25%" in out.getvalue() and "▃█ 2.00" in out.getvalue()


def test_the_kernels_are_compiled_before_a_rule_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first use ever that takes a second, which would be two thirds of the first rule's time."""
    done: list[str] = []
    case = demo._case
    monkeypatch.setattr(demo, "CASES", dict(list(demo.CASES.items())[:1]))
    monkeypatch.setattr(demo, "STEPS", 12)
    monkeypatch.setattr(demo.native, "library", lambda: done.append("compiled"))
    monkeypatch.setattr(demo, "_case", lambda *given: done.append("trained") or case(*given))
    demo.run(io.StringIO())
    assert done[:2] == ["compiled", "trained"]
