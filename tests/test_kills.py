"""A run killed with SIGKILL goes on from its last checkpoint and ends bit for bit as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forks import forks
from kill_worker import EVERY, Run, main
from normwise import NormwiseError, checkpoints


class Worker:
    """A process that trains, and what it has told."""

    def __init__(self, directory: Path, steps: int, dies: int | None = None) -> None:
        self.lines: list[str] = []
        self.told, end = forks.Pipe(duplex=False)
        self.process: BaseProcess = forks.Process(target=main, args=(directory, steps, dies, end))
        self.process.start()
        end.close()    # the worker's alone: what it tells ends with it

    def listen(self, until: str = "") -> None:
        """Up to a line, or to the end of the process."""
        while until not in self.lines:
            try:
                self.lines.append(self.told.recv())
            except EOFError:
                self.process.join()
                break

    @property
    def begun(self) -> int:
        return int(self.lines[0].removeprefix("from "))


def killed(directory: Path, steps: int, at: int, delay: float) -> int:
    """Starts, and kills after step ``at`` was told and ``delay`` seconds; returns the step that it went on from."""
    worker = Worker(directory, steps)
    worker.listen(until=f"step {at}")
    assert worker.lines[-1] == f"step {at}", worker.lines
    time.sleep(delay)
    worker.process.kill()
    worker.process.join()
    assert worker.process.exitcode == -signal.SIGKILL
    return worker.begun


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """Every tensor and number of a nested state by its path."""
    if isinstance(state, dict):
        return {k: v for name, part in state.items() for k, v in leaves(part, f"{path}/{name}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, part in enumerate(state) for k, v in leaves(part, f"{path}/{i}").items()}
    return {path: state}


def differences(a: Any, b: Any) -> list[str]:
    one, two = leaves(a), leaves(b)

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return [path for path in one.keys() | two.keys() if path not in one or path not in two or not equal(one[path], two[path])]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(kills: int, tmp_path: Path, coverage: Callable[..., None]) -> None:
    """Killed at random moments, also while it saves; each time a new process goes on."""
    steps, rng = 6 * kills + 4, random.Random(kills)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = Run()
    for _ in range(steps):
        whole.advance()
    torch.set_num_threads(threads)
    last, resumed = 0, 0
    for kill in range(kills):
        if kill % 5 == 1:
            worker = Worker(tmp_path, steps, last + 2 * EVERY)
            worker.listen()
            assert worker.process.exitcode == -signal.SIGKILL, worker.lines
            assert (tmp_path / "run.pt.new").stat().st_size < (tmp_path / "run.pt").stat().st_size, "half a file beside the whole one"
            begun = worker.begun
        else:
            begun = killed(tmp_path, steps, last + rng.randint(EVERY + 1, 2 * EVERY), rng.uniform(0, 0.01))
        assert begun >= last or kill == 0
        resumed += begun == last
        last = checkpoints.load(tmp_path / "run.pt")["step"]
        coverage("killed with SIGKILL and resumed", "while saving" if kill % 5 == 1 else "at a random step", "one process")
    worker = Worker(tmp_path, steps)
    worker.listen()
    assert worker.process.exitcode == 0 and worker.lines[-1] == "ok True" and worker.begun == last, worker.lines
    assert resumed == kills, "each process went on from the last checkpoint"
    assert differences(checkpoints.load(tmp_path / "end.pt"), whole.state()) == []


# ---------------------------------------------------------------------------------------------------------- states without pickle


def test_flat_states_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Named tensors of memory of their own, and one JSON text: what safetensors takes, and what it gives back."""
    run = Run()
    for _ in range(5):
        run.advance()
    state = run.state()
    files = {name: checkpoints.flat(part) for name, part in state.items()}
    resumed = Run()
    for tensors, metadata in files.values():
        assert all(t.is_contiguous() for t in tensors.values()) and all(isinstance(v, str) for v in metadata.values())
        assert len({t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}) == sum(t.numel() > 0 for t in tensors.values())
    again = {name: checkpoints.nested(*parts) for name, parts in files.items()}
    assert differences(again, state) == []
    resumed.load(again)
    for r in (run, resumed):
        torch.set_rng_state(state["torch"])
        for _ in range(5):
            r.advance()
    assert differences(run.state(), resumed.state()) == []


def test_through_safetensors_itself(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: its form is checked in the test above")
    from safetensors.torch import save_file

    run = Run()
    run.advance()
    state = run.state()
    tensors, metadata = checkpoints.flat(state)
    save_file(tensors, tmp_path / "run.safetensors", metadata)
    with safetensors.safe_open(tmp_path / "run.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}    # noqa: SIM118 - it is no mapping
        assert differences(checkpoints.nested(read, file.metadata()), state) == []


@pytest.mark.parametrize("text", [None, "{", '["tensor", "gone"]', '["set", 1]', "[]", '["dict", 1]', '["tensor", []]'])
def test_what_flat_did_not_make_is_refused(text: str | None) -> None:
    with pytest.raises(NormwiseError, match="none that normwise"):
        checkpoints.nested({}, {} if text is None else {"normwise": text})


def test_what_needs_pickle_is_refused() -> None:
    with pytest.raises(NormwiseError, match=r"state\.a\.1 is a set"):
        checkpoints.flat({"a": [1, {2}]})
    with pytest.raises(NormwiseError, match="the key"):
        checkpoints.flat({frozenset((1, 2)): 3})
