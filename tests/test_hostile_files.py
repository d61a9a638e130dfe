"""Paths and files that somebody chose badly, or on purpose: one sentence each, early, nothing changed, and never a wait."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from normwise.errors import DataError, OutputError
from normwise.race.race import replay
from normwise.race.run import RaceRun
from normwise.study import gan_trial, prune_run, trial
from normwise.study import store as store_module
from normwise.study.cells import Cell, Loop
from normwise.study.progress import Progress
from normwise.study.store import Store, fits, key_of

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and links of this kind are POSIX's")

# ------------------------------------------------------------------------------------------------------- odd places


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.x")
    return folder / "pipe.x"


def socket_file(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "socket.x"))    # a socket's path has 107 characters at most
    return folder / "socket.x"


def linked(folder: Path, target: str | Path) -> Path:
    (folder / "link.x").symlink_to(target)
    return folder / "link.x"


def a_folder(folder: Path) -> Path:
    (folder / "folder.x").mkdir()
    return folder / "folder.x"


def inside_a_file(folder: Path) -> Path:
    (folder / "plain.x").write_bytes(b"")
    return folder / "plain.x" / "inside.x"


ODD: dict[str, Callable[[Path], Path]] = {
    "a pipe": pipe, "a socket": socket_file, "a device": lambda folder: Path("/dev/null"), "an endless device": lambda folder: Path("/dev/zero"),
    "a full device": lambda folder: Path("/dev/full"), "a folder": a_folder, "a place inside a file": inside_a_file,
    "a link to nothing": lambda folder: linked(folder, "nowhere"), "a link in a circle": lambda folder: linked(folder, "link.x"),
    "a link to a pipe": lambda folder: linked(folder, pipe(folder)), "a link to a device": lambda folder: linked(folder, "/dev/null"),
    "a long name": lambda folder: folder / ("n" * 300), "a long path": lambda folder: folder / "/".join(["p" * 200] * 30),
    "a name with a zero": lambda folder: folder / "a\0b", "half a surrogate pair": lambda folder: folder / "a\ud800b",
}  # fmt: skip
"""Where no file is to be read or written."""

# ------------------------------------------------------------------------------------------------------- finished runs

RUN = {"kind": "run", "seed": 1}


def line_of(settings: dict[str, Any], result: Any, **more: Any) -> str:
    return json.dumps({"key": key_of(settings), "settings": settings, "result": result, **more})


def test_a_line_without_its_checksum_is_ignored_and_said(tmp_path: Path) -> None:
    """Today's fault: the line was trusted, and a result that lacked what the study reads ended in a KeyError."""
    path = tmp_path / "state.jsonl"
    sound = {"validation_accuracy": 0.5}
    right = store_module._sum(RUN, sound)
    for added in ({}, {"sum": ""}, {"sum": None}, {"sum": 0}, {"sum": []}, {"sum": right[:-1]}, {"sum": right.upper() + "x"}):
        path.write_text(line_of(RUN, sound, **added))
        store = Store(path)
        assert store.get(RUN) is None and store.ignored == 1, added
        assert store.note and "1 line is ignored" in store.note and str(path) in store.note
        assert store.newest("run") == (None, None)
    path.write_text(line_of(RUN, sound, sum=right))
    assert Store(path).get(RUN) == sound and Store(path).note is None


@pytest.mark.parametrize("result", [{}, {"validation_accuracy": None}, {"validation_accuracy": 0.5}, {"validation_accuracy": True}])
def test_a_result_that_lacks_what_the_study_reads_is_run_again(result: dict[str, Any], tmp_path: Path) -> None:
    """The checksum is no secret: a line may be forged with the right one. The runs are done again, and no KeyError ends the study."""
    path = tmp_path / "state.jsonl"
    done = {"validation_accuracy": 0.9, "validation_loss": 0.1, "steps": 1, "diverged": False, "seconds": 0.1}
    reported = done | {"test_accuracy": 0.9, "train_accuracy": 0.9, "sparsity": 0.0, "norms": {}, "breaches": [],
                       "curve": {"step": [], "validation_accuracy": [], "train_loss": [], "norms": {}}}  # fmt: skip

    def made(cell: Cell, numbers: dict[str, float], seed: int, full: bool) -> trial.Run:
        return trial.Run("nothing", "gd", numbers["lr"], {}, seed, 1, 1, (1, 1), 1, full, "x")

    class Pool:
        def __init__(self) -> None:
            self.ran: list[trial.Run] = []

        def submit(self, call: Any, run: trial.Run) -> Any:
            from concurrent.futures import Future

            self.ran.append(run)
            future: Any = Future()
            future.set_result(reported if run.full else done)
            return future

    def runs() -> int:
        pool = Pool()
        cell = Cell("nothing", "gd")
        Loop([cell], made, 9, 2, Store(path), Progress()).run(1, lambda: contextlib.nullcontext(pool))    # type: ignore[arg-type]
        assert len(cell.trials) == 9 and len(cell.finals) == 2
        return len(pool.ran)

    assert runs() == 11 and runs() == 0
    entries = Store(path).entries
    path.unlink()
    for entry in entries:
        Store(path).add(entry["settings"], result)
    assert runs() == 11, "none of the forged results is one"


def test_every_committed_result_has_the_form_that_its_study_asks_for() -> None:
    """Otherwise a study would do its own finished runs again."""
    makers: dict[str, Any] = {"run": trial.Run, "gan": gan_trial.Run, "race": RaceRun, "prune": prune_run.Run}
    seen: dict[str, int] = {}
    for path in sorted((ROOT / "docs" / "results").glob("*.runs.jsonl")):
        store = Store(path)
        assert store.ignored == 0 and store.entries, path
        for entry in store.entries:
            kind = entry["settings"]["kind"]
            if kind not in makers:
                continue
            names = {field.name for field in fields(makers[kind])}
            given = {name: value for name, value in entry["settings"].items() if name in names}
            if kind == "race":
                given["numbers"] = tuple(given["numbers"].items())
            run = makers[kind](**given)
            assert fits(entry["result"], {"failed": str}) or fits(entry["result"], run.form), (path, entry["result"])
            assert Store.get(store, run.settings(), run.form) is not None or "failed" in entry["result"]
            seen[kind] = seen.get(kind, 0) + 1
    assert min(seen[kind] for kind in makers) > 50, seen


def test_forms() -> None:
    form = {"a": (int, float), "b": bool, "c": {"d": [int, int]}}
    good = {"a": 1, "b": True, "c": {"d": [1, 2], "more": 0}}
    assert fits(good, form) and fits({}, {}) and fits(good | {"a": 0.5}, form)
    for change in ({"a": True}, {"a": "1"}, {"a": None}, {"b": 1}, {"c": 3}, {"c": {}}, {"c": {"d": [1]}}, {"c": {"d": [1, 2, 3]}}):
        assert not fits(good | change, form), change
    assert not fits([], form) and not fits({"a": 1}, form)


FACTS = {"kind": "race facts", "protocol": 1, "name": "cnn", "key": "k", "metric": "accuracy", "batch": 64, "budget": "quick", "seeds": 2,
         "contenders": ["adamw", "sgd"]}  # fmt: skip
MACHINE = {"cpu": "x", "cores": 1, "torch": "2", "python": "3", "date": "2026-01-01"}


@pytest.mark.parametrize("change", [
    {"name": "x"}, {"name": None}, {"batch": 0}, {"batch": "64"}, {"batch": -1}, {"budget": 3}, {"seeds": 0}, {"seeds": 10**12},
    {"contenders": ["nobody"]}, {"contenders": [[]]}, {"contenders": "adamw"}, {"contenders": [3]}, {"metric": None}, {"protocol": "1"},
])  # fmt: skip
def test_forged_facts_of_a_race_are_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "race.jsonl"
    Store(path).add(FACTS, {"machine": MACHINE})
    assert replay(path)["contenders"] == []
    path.unlink()
    Store(path).add(FACTS | change, {"machine": MACHINE})
    with pytest.raises(DataError, match="expected the runs of a race"):
        replay(path)
    for machine in (None, {}, {"torch": 3}, MACHINE | {"cores": "x"}):
        Store(path).add(FACTS, {"machine": machine})
        with pytest.raises(DataError, match="expected the runs of a race"):
            replay(path)


def test_an_appended_line_is_on_the_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the docstring says: written in full, and synced, before the run counts as kept."""
    synced: list[bytes] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            synced.append((tmp_path / "state.jsonl").read_bytes())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store = Store(tmp_path / "state.jsonl")
    for k in range(3):
        store.add({"kind": "run", "seed": k}, {"x": k})
        assert len(synced) == k + 1 and len(synced[-1].split(b"\n")) == k + 2, "synced after the whole line was written"
        assert synced[-1] == (tmp_path / "state.jsonl").read_bytes()


@contextlib.contextmanager
def full_disk(at: int) -> Iterator[None]:
    """Files of this process may have so many bytes and no more, which is what a full disk is to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_keeps_what_was_kept(tmp_path: Path) -> None:
    """Some runs are kept, the next is one clear error, and no half line is trusted."""
    store, kept = Store(tmp_path / "state.jsonl"), 0
    with full_disk(3000), pytest.raises(OutputError, match="a finished run cannot be kept"):
        for kept in range(100):
            store.add({"kind": "run", "seed": kept}, {"x": "y" * 100})
    assert (tmp_path / "state.jsonl").stat().st_size == 3000, "the last line was cut off"
    again = Store(tmp_path / "state.jsonl")
    assert 5 < kept == len(again.results) == len(store.results) and again.ignored == 1
    again.add({"kind": "run", "seed": -1}, {"x": 1})
    assert len(Store(tmp_path / "state.jsonl").results) == kept + 1
