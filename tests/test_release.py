"""What a release promises agrees with itself: versions, supported Pythons and torches, what is packed."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import normwise

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def test_the_version_is_one() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    heading = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading and str(citation["date-released"]) == heading[2]
    assert {PROJECT["version"], normwise.__version__, citation["version"], heading[1]} == {normwise.__version__}


def test_the_workflow_tries_what_is_supported() -> None:
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    matrix = JOBS["versions"]["strategy"]["matrix"]
    assert set(matrix["python"]) == claimed and f">={min(claimed, key=lambda v: int(v[2:]))}" == PROJECT["requires-python"]
    [torch] = [need for need in PROJECT["dependencies"] if need.startswith("torch")]
    assert torch == f"torch>={matrix['torch'][0].removesuffix('.0')}"
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    commands = [step.get("run", "") for step in JOBS["pinned"]["steps"]]
    assert pinned and commands[-1] == ".ci/run" and f"torch=={pinned[1]}" in commands[-2]


@pytest.mark.long
def test_a_release_is_built_and_holds_what_its_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="pip install 'normwise[release]'")
    pytest.importorskip("twine", reason="pip install 'normwise[release]'")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], check=True, capture_output=True)
    with tarfile.open(sdist) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert {name for name in tracked if name != ".gitignore" and not name.startswith(".ci/")} <= held
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "normwise").rglob("*") if path.is_file()}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in source if "__pycache__" not in name} <= names and not any(name.startswith("tests") for name in names)
