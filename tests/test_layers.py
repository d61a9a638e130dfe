"""The order of the layers in docs/design.md, held against what every module really imports; and how little ``import normwise`` needs."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "normwise"


def documented() -> list[list[str]]:
    """The rooms of the page's block, from above to below; several on a line stand side by side."""
    block = re.search(r"## Layers\n.*?```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "docs/design.md has no block of layers"
    return [re.split(" {4,}", line)[0].split() for line in block[1].splitlines() if line]


LAYERS = documented()
LEVEL = {name: i for i, line in enumerate(LAYERS) for name in line}


@functools.cache
def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__main__", "cli")


@functools.cache
def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@functools.cache
def imported(path: Path) -> list[tuple[int, str]]:
    """Line and layer of every import of normwise, within functions too; ``""`` for the package as a whole."""
    layers, found = {layer_of(p) for p in modules()}, []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively, which hides the layer"
            names = [f"{node.module}.{a.name}" if node.module == "normwise" else str(node.module) for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "normwise":
                first = rest.split(".")[0]
                found.append((node.lineno, first if first in layers else ""))
    return found


def test_the_page_names_every_layer_that_there_is():
    assert LAYERS[0] == ["errors"] and LAYERS[-2:] == [["experiments"], ["cli"]]
    there = {layer_of(path) for path in modules()}
    assert there - set(LEVEL) == set(), "a room that docs/design.md does not place"
    assert set(LEVEL) - there == set(), "docs/design.md names a room that there is not"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(path):
    """Rooms side by side do not import each other; the package as a whole may be imported only where it is complete, in the last rooms."""
    own = LEVEL[layer_of(path)]
    for line, layer in imported(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        if layer == "":
            assert own >= len(LAYERS) - 2, f"{where} imports the whole package"
        else:
            assert layer == layer_of(path) or LEVEL[layer] < own, f"{where} imports {layer}, which does not stand above {layer_of(path)}"


def test_no_two_layers_import_each_other():
    pairs = {(layer_of(path), layer) for path in modules() for _, layer in imported(path) if layer not in ("", layer_of(path))}
    assert len(pairs) > 15, "imports were not found, so nothing was proved"
    assert {pair for pair in pairs if pair[::-1] in pairs} == set()


def test_nothing_imports_the_command_line():
    assert not [path for path in modules() for _, layer in imported(path) if layer == "cli" and layer_of(path) != "cli"]


def test_importing_normwise_needs_torch_and_little_else():
    """What studies, reports and integrations need is imported where it is used."""
    code = "import torch, sys; before = set(sys.modules); import normwise; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.split(".")[0] for name in out} - {"normwise"} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "numpy"}, f"import normwise brings {sorted(foreign)}"
    assert "torch.distributed.tensor" not in out, "importing DTensor costs 0.4 s"
    assert not [name for name in out if name.startswith(("normwise.experiments", "normwise.cli."))]


KINDS_OF_PACK = {"Split", "SplitPack", "SplitFlat", "Loose", "Entries", "Flat"}
ENGINE_SHARDED = {"engine/program.py", "control.py"}    # where a model without DTensors is spared what only DTensors need


@pytest.mark.parametrize("path", [p for p in modules() if "sharded" not in p.parts], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_outside_of_the_wall_asks_whether_a_pack_is_sharded(path):
    """`engine/sharded` makes packs of either kind, which have the same methods; who asks which one it is writes code for one of them."""
    where, tree = str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"]
    kinds = {"Flat"} if where == "parameters/forward_source/splits.py" else KINDS_OF_PACK    # which has a Split of its own
    asked = [node.lineno for call in calls for node in ast.walk(call.args[1]) if isinstance(node, ast.Name) and node.id in kinds]
    asked += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "sharded" and where not in ENGINE_SHARDED]
    asked += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "normwise.engine.sharded.pack"]
    assert not asked, f"{where} asks in lines {asked}"


ROOMS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()} | {"tasks", "sharded"}


def named_modules(text: str) -> set[str]:
    """What a text calls by its place in the package: ``engine.rules.cpr``."""
    found: list[str] = re.findall(r"``(?:normwise\.)?([a-z_]+(?:\.\w+)+)``", text)
    return {name for name in found if name.split(".")[0] in ROOMS}


def stands(name: str) -> bool:
    """Whether there is such a module, or such a thing in one."""
    start = {"tasks": "experiments.tasks", "sharded": "engine.sharded"}
    first, _, rest = name.partition(".")
    parts = [*start.get(first, first).split("."), *rest.split(".")]
    for cut in range(len(parts), 0, -1):
        place = PACKAGE.joinpath(*parts[:cut])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.exists():
            return all(re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")) for part in parts[cut:])
    return False


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_a_docstring_calls_by_its_place_stands_there(path):
    assert {name for name in named_modules(path.read_text(encoding="utf-8")) if not stands(name)} == set()


def test_a_place_that_is_no_more_is_found():
    assert named_modules("``policy.computed`` and ``engine.sharded.pack``, not ``p.data``") == {"policy.computed", "engine.sharded.pack"}
    assert not stands("policy.computed") and stands("engine.sharded.pack") and not stands("engine.sharded.pack.Split9")
