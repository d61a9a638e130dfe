"""docs/design.md, CONTRIBUTING.md and the tree of the source say the same thing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from house import PACKAGE
from test_layers import LAYERS

ROOT = Path(__file__).resolve().parents[1]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^\| (.+\?) \| `([\w/.]+)` \| `(\w+)` \|$", DESIGN, re.MULTILINE)


def rooms() -> list[tuple[str, str]]:
    """(room, what is said of it) of the tree in CONTRIBUTING.md, in its order; rooms within rooms as ``engine/rules``."""
    block = re.search(r"## The rooms, in reading order\n.*?```\nsrc/normwise/\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert block, "CONTRIBUTING.md has no tree"
    found: list[tuple[str, str]] = []
    above = ""
    for line in block[1].splitlines():
        name, _, about = line.strip().partition(" ")
        inner = line.startswith("    ")
        above = above if inner else name
        found.append((f"{above}{name}".strip("/") if inner else name.strip("/"), about.strip()))
    return found


def names_in(path: Path) -> set[str]:
    """Functions, classes and constants of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_tree_is_the_tree() -> None:
    """Every folder, and every file at the top and at the top of experiments, is in the tree, and nothing else."""
    said = {name for name, _ in rooms()}
    folders = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")} - {"."}
    shallow = {folder for folder in folders if folder.count("/") < 2}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    laboratory = {f"experiments/{path.name}" for path in (PACKAGE / "experiments").glob("*.py")} - {"experiments/__init__.py"}
    assert said == shallow | files | laboratory


def test_the_tree_and_the_layers_have_one_order() -> None:
    """Also within a line of layers, where the page could have chosen another."""
    top = [name.removesuffix(".py") for name, _ in rooms() if "/" not in name]
    assert top == [name for line in LAYERS for name in line]


@pytest.mark.parametrize(("room", "about"), rooms())
def test_the_files_that_the_tree_names_exist(room: str, about: str) -> None:
    """``norms/   base, vector, spectral: ...`` names files in their reading order."""
    listed, colon, _ = about.partition(": ")
    if room.endswith(".py") or not colon:
        return
    missing = [name for name in listed.split(", ") if not (PACKAGE / room / f"{name}.py").is_file()]
    assert missing == []


def test_there_are_twelve_questions() -> None:
    assert len(QUESTIONS) == 12 and len({path for _, path, _ in QUESTIONS}) == 12


@pytest.mark.parametrize(("question", "path", "symbol"), QUESTIONS)
def test_a_question_is_answered_where_the_page_says(question: str, path: str, symbol: str) -> None:
    assert (PACKAGE / path).is_file(), f"{question} {path} does not exist"
    assert symbol in names_in(PACKAGE / path), f"{question} {path} has no {symbol}"


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = set(re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|md|jsonl))`", text))
    assert paths
    assert {path for path in paths if not ((PACKAGE / path).is_file() or (ROOT / path).is_file())} == set()
