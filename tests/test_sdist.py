"""What is shipped runs: the source distribution holds all that its own tests need, and the pinned environment is pinned to the end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("dev",)


def collected(folder: Path) -> tuple[int, set[str]]:
    """The exit status of collecting, and the tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode, {line for line in done.stdout.splitlines() if "::" in line}


def environment(folder: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(folder / "src")}


@pytest.mark.long
def test_the_tests_of_the_source_distribution_are_all_there_and_collect(tmp_path: Path) -> None:
    """Today's fault: 19 errors, since setuptools takes tests/test_*.py along and nothing that they import."""
    copy = tmp_path / "copy"
    left = (".git", ".venv", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left))
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    [folder] = (tmp_path / "unpacked").iterdir()
    here, there = collected(ROOT), collected(folder)
    assert there == here and len(there[1]) > 3000
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"docs/make.py", "docs/results/race-gpt.json", "examples/gpt.py", "constraints.txt", "tests/norm_cases.py"} <= files
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    quick = ["tests/test_docs.py", "tests/test_layers.py", "tests/test_article.py", "-k", "not variant"]
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *quick], cwd=folder,
                         env=environment(folder), capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), lines
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def needed() -> set[str]:
    """Everything that the extra dev needs here, to the end; of packages that are not installed nothing is known."""
    waiting: list[tuple[str, frozenset[str]]] = [("normwise", frozenset(EXTRAS))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            listed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in listed:
            requirement = Requirement(line)
            holds = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""}))
            if holds:
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen} - {"normwise"}


def test_every_package_of_the_environment_is_pinned_to_the_end() -> None:
    pins = pinned()
    assert pins["torch"] == "2.13.0" and len(pins) > 60
    if not metadata.version("torch").startswith(pins["torch"]):
        pytest.skip(f"the pins are for torch {pins['torch']}, and this is {metadata.version('torch')}")
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    lacking = {name for name in needed() & installed if name not in pins}
    assert lacking == set(), f"not in constraints.txt: {sorted(lacking)}"


def test_no_pin_is_of_torchs_companions() -> None:
    """They would pull another build of torch."""
    assert not {"torchvision", "torchaudio", "timm"} & set(pinned())
