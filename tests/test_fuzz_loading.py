"""Nothing in the project loads what could run code: no unsafe YAML, pickles, torch files or arrays, no eval or exec."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import normwise as nw
from normwise.experiments.tasks.data import cache

ROOT = Path(__file__).parents[1]
SHIPPED = [path for folder in ("src/normwise", "examples", "docs") for path in sorted((ROOT / folder).rglob("*.py"))]
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
SAFE_LOADERS = {"BaseLoader", "SafeLoader", "CSafeLoader"}


OWN_PIPES = tuple(f"src/normwise/experiments/framework/{name}.py" for name in ("pool", "worker", "elsewhere"))
"""What a study and its workers tell each other: over pipes that nobody else can write into, or over an executor that the user named and
that pickles every call itself, as Dask's does. None of it is read from a file."""


def dangers(source: str) -> list[str]:
    """The calls and imports in a Python text that could run what a file holds."""
    return [f"line {node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _danger(node)]


def _danger(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
        yield from (f"import {name}" for name in names if name.split(".")[0] in UNPICKLERS and not _restricts(node))
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        loader = given.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        if name in RUNS_CODE:
            yield name
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield f"{name} without weights_only=True"
        loads = name in ("yaml.load", "yaml.load_all", "yaml.compose")
        if loads and loader.split(".")[-1] not in SAFE_LOADERS:
            yield f"{name} without a safe loader"
        if name.startswith("yaml.") and name.split(".")[-1].startswith(("unsafe_", "full_")):
            yield name
        if name.split(".")[-1] in ("load", "loads") and given.get("allow_pickle") not in (None, "False"):
            yield f"{name} with allow_pickle"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield f"{name} without allow_pickle=False"


def _restricts(node: ast.Import | ast.ImportFrom) -> bool:
    """``from pickle import Unpickler``, to be subclassed with a ``find_class`` of its own, which another test plants payloads for."""
    return isinstance(node, ast.ImportFrom) and {a.name for a in node.names} <= {"Unpickler", "UnpicklingError"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shipped_file_loads_unsafely(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = dangers(source)
    if str(path.relative_to(ROOT)) in OWN_PIPES:
        found = [danger for danger in found if not danger.endswith("import pickle")]
    assert not found
    if re.search(r"\bUnpickler\b", source):    # not the name in a message of torch's
        assert "def find_class" in source, "an unpickler without a find_class of its own runs whatever it is given"


@pytest.mark.parametrize("line", [
    "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "yaml.load(text, yaml.UnsafeLoader)", "yaml.unsafe_load(text)",
    "yaml.full_load(text)", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "np.load(path, allow_pickle=True)",
    "eval(text)", "exec(text)", "import pickle", "from pickle import loads", "import joblib", "__import__(name)",
])  # fmt: skip
def test_the_search_finds_each_kind(line: str) -> None:
    assert dangers(line)


@pytest.mark.parametrize("line", [
    "yaml.safe_load(text)", "yaml.compose(text, Loader=yaml.BaseLoader)", "torch.load(path, weights_only=True)",
    "np.load(path, allow_pickle=False)", "model.eval()", "re.compile(x)", "torch.compile(f)",
])  # fmt: skip
def test_and_nothing_else(line: str) -> None:
    assert not dangers(line)


@pytest.mark.parametrize("tag", ["object/apply:pathlib.Path.touch", "object/new:pathlib.PosixPath", "object/apply:os.mkdir"])
def test_a_payload_in_yaml_does_not_run(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(nw.PolicyError, match=r"tag.*python/object"):
        nw.Policy.from_yaml(f"- !!python/{tag} ['{mark}']")
    assert not mark.exists()


def test_a_payload_in_the_cache_of_images_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> object:
            return Path.touch, (mark,)

    np.savez(tmp_path / "x.npz", images=np.array([Payload()], dtype=object), labels=np.zeros(1, np.int64))
    assert cache._read(tmp_path / "x.npz") is None
    assert not mark.exists()
