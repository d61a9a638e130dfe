"""Fixtures of every test, and the table of what the run has checked, printed at its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch

from coverage_table import collect, record, render

WIDTH = 132

pytest.register_assert_rewrite("norm_checks", "norm_interface")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: more threads each would only wait for one another, in the processes that tests start as well.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def coverage(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``coverage(table, row, column, **facets)``: counts a check in the table at the end; see ``coverage_table.py``."""
    return partial(record, request.node.user_properties)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``long`` run where the command line names the mark, as ``make test-long`` does."""
    if "long" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
    items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what the passed tests recorded; under pytest-xdist this runs in the controller, which has every report."""
    tables = collect(terminalreporter.stats.get("passed", []))
    if tables:
        terminalreporter.section("normwise coverage")
    for name, table in tables.items():
        for line in [*render(name, table, WIDTH), ""]:
            terminalreporter.write_line(line)
