"""The coverage table itself: what passed is counted, what failed is not, and the controller sees what the workers did."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from coverage_table import collect, record, render

CHECKS = """
import pytest

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_good(dtype, coverage):
    coverage("law × norm", "triangle", "l2", dtype=dtype, position="inside")
    coverage("law × norm", "triangle", "l2", dtype=dtype, position="outside")

def test_bad(coverage):
    coverage("law × norm", "triangle", "l1", dtype="float32", position="inside")
    assert False
"""


def reports(*records: tuple[str, str, str, dict[str, str]]) -> list[SimpleNamespace]:
    properties: list[tuple[str, object]] = [("another plugin's", 1)]
    for table, row, column, facets in records:
        record(properties, table, row, column, **facets)
    return [SimpleNamespace(user_properties=properties)]


def test_a_cell_is_the_count_and_the_values_of_each_facet() -> None:
    table = collect(reports(*[("t", "r", "c", {"dtype": d, "position": p}) for d in "ab" for p in "xyz"], ("t", "s", "d", {})))["t"]
    assert table.cell("r", "c") == "6 2×3"
    assert table.cell("s", "d") == "1"
    assert table.cell("r", "d") == "·"


@pytest.mark.parametrize("width", [30, 60, 400])
def test_columns_break_into_bands_that_fit(width: int) -> None:
    names = [f"column{i}" for i in range(12)]
    tables = collect(reports(*[("t", row, column, {}) for row in ("one", "two") for column in names]))
    grid = render("t", tables["t"], width)[1:]
    assert max(map(len, grid)) <= width
    assert all(sum(name in line.split() for line in grid) == 1 for name in names), "each column has one place"


@pytest.mark.long
@pytest.mark.parametrize("workers", [["-p", "no:xdist"], ["-n", "2"]], ids=["one process", "two workers"])
def test_the_table_is_printed_at_the_end(workers: list[str], tmp_path: Path) -> None:
    for name in ("conftest.py", "coverage_table.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path)
    (tmp_path / "test_checks.py").write_text(CHECKS)
    command = [sys.executable, "-m", "pytest", *workers, "--rootdir", str(tmp_path), str(tmp_path)]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout
    assert "normwise coverage" in printed
    assert "law × norm: 1 × 1, 4 checks" in printed, printed
    assert "triangle  4 2×2" in printed
