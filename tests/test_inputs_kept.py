"""No command writes over what it reads, whatever that is called there, and a refusal leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from normwise import cli, files
from normwise.errors import DataError
from normwise.inspection import architecture

MODULE = "import torch\nraise_if_imported = open('imported', 'w')\ndef make():\n    return torch.nn.Linear(4, 3)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that a command can read, under the names that the cases below use."""
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.ones(3, 4)}, "good.safetensors")
    os.link("good.safetensors", "hard.json")
    os.symlink("good.safetensors", "soft.json")
    Path("p.yaml").write_text("- max_norm: {radius: 3.0, params: '*weight'}\n")
    for step in (1, 20):
        Path(f"run/checkpoint-{step}").mkdir(parents=True)
        save_file({"a.weight": torch.ones(3, 4)}, f"run/checkpoint-{step}/model.safetensors")
        Path(f"run/checkpoint-{step}/config.json").write_text('{"architectures": ["none"]}')
    Path("shards").mkdir()
    save_file({"a.weight": torch.ones(3, 4)}, "shards/model-1.safetensors")
    Path("shards/model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "model-1.safetensors"}}')
    Path("mine/inner").mkdir(parents=True)
    for name in ("mine_alone.py", "mine/__init__.py", "mine/inner/__init__.py", "mine/inner/made.py"):
        Path(name).write_text(MODULE)
    Path("d.csv").write_text("a,b\n1,2\n")
    Path("data").mkdir()
    Path("data/part.csv").write_text("a,b\n1,2\n")
    Path("data/notes.json").write_text('{"mine": 1}')
    Path("kept.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize("arguments", [
    "inspect good.safetensors --json good.safetensors",
    "inspect good.safetensors --json ./run/../good.safetensors",
    "inspect good.safetensors --json hard.json",
    "inspect good.safetensors --json soft.json",
    "inspect good.safetensors --state hard.json",
    "inspect run/checkpoint-1 --against good.safetensors --json good.safetensors",
    "inspect good.safetensors --policy p.yaml --json p.yaml",
    "inspect shards --json shards/model.safetensors.index.json",
    "inspect shards/model.safetensors.index.json --json shards/model-1.safetensors",
    "inspect run --json run/checkpoint-20/model.safetensors",
    "inspect run --json run/checkpoint-20/config.json",
    "inspect good.safetensors --against run --json run/checkpoint-1/config.json",
    "advise mine_alone:make --python mine_alone.py",
    "advise mine_alone:make --yaml mine_alone.py",
    "advise mine.inner.made:make --json mine/inner/made.py",
    "advise mine.inner.made:make --python mine/__init__.py",
    "tune mine_alone:make --policy mine_alone.py",
    "tune mine_alone:make --json mine_alone.py",
    "tune tabular --data d.csv --policy d.csv",
    "compare tabular --data d.csv --json d.csv",
    "compare tabular --data d.csv --state d.csv",
    "race cnn --data data --json data/part.csv",
    "race cnn --data data --json data/notes.json",
    "race --state kept.jsonl --json kept.jsonl",
    "gan --data data --json data/part.csv",
    "recipe plasticity --data hf:data --json data/part.csv",
    "prune cnn --data data --json data/part.csv",
])  # fmt: skip
def test_what_is_read_is_not_written_over(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "would be written over" in err and "give another name" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "nor is any module imported before"


def test_earlier_results_in_a_folder_that_is_read_are_replaced(folder: Path) -> None:
    asked = ["inspect", "run", "--json", "run/found.json", "--report", "run/checkpoint-20"]
    assert cli.main(asked) == 0 and cli.main(asked) == 0


def test_the_files_of_a_function_are_found_without_being_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {path.resolve() for path in architecture.source_files("mine.inner.made:make")}
    assert found == {folder / "mine/__init__.py", folder / "mine/inner/__init__.py", folder / "mine/inner/made.py"}
    assert not (folder / "imported").exists()
    for nothing in ("nowhere.at.all:make", "mine..made:make", "mine", ":make", "sys:exit", "mine.none:f.g"):
        assert not {path.name for path in architecture.source_files(nothing)} & {"made.py"}


@pytest.mark.parametrize("arguments", [
    "inspect nothere.pt --report deep/down --json other/x.json",
    "inspect good.safetensors --policy nothere.yaml --json deep/down/x.json",
    "compare cnn --data nowhere --report deep/down --json other/x.json",
    "inspect good.safetensors --json deep/down/x.json --report good.safetensors",
    "inspect good.safetensors --json deep/down/x.json --state deep/down/x.json",
])  # fmt: skip
def test_a_refusal_leaves_no_folders(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    before = set(folder.rglob("*"))
    assert cli.main(arguments.split()) == 2
    assert set(folder.rglob("*")) == before


def test_a_folder_that_may_not_be_listed_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of mode 711, which stops no administrator, and so no test that one runs."""

    def refuse(real: Callable[..., object]) -> Callable[..., object]:
        def listed(path: str | Path = ".") -> object:
            if Path(path).resolve() == (folder / "run").resolve():
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return listed

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    for asked in (["inspect", "run"], ["inspect", "good.safetensors", "--against", "run"]):
        assert cli.main(asked) == 2
        assert "run: this folder cannot be listed (Permission denied)" in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot be listed"):
        files.names_in("run")
