"""Distributed checkpoints through the restricted reader: whole states come back, planted payloads do not run."""

from __future__ import annotations

import io
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import BytesStorageMetadata

import normwise as nw
from normwise.checkpoints import flat, nested
from normwise.errors import DataError
from normwise.integrations.distributed_checkpoint import ALLOWED, load
from planted import Payload

pytestmark = pytest.mark.filterwarnings("ignore:.*no-dist:UserWarning", "ignore:.*assuming:UserWarning")


def saved(folder: Path) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").unlink(missing_ok=True)
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def loaded(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    empty = {name: torch.zeros_like(t) for name, t in tensors.items()}
    load(empty, folder, no_dist=True)
    return empty


def change(folder: Path, edit: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(edit(metadata) or metadata))


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    got = loaded(tmp_path, tensors)
    assert all(torch.equal(got[name], t) and got[name].dtype == t.dtype for name, t in tensors.items())


def test_a_control_and_an_optimizer_go_on_from_it(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, nw.optim.NormOptimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = nw.optim.MuonH(model, 0.1, policy=[nw.clip_grad_norm(1.0), nw.zclip()])
        steps(model, optimizer, 0, 3)
        return model, optimizer

    def steps(model: nn.Module, optimizer: nw.optim.NormOptimizer, start: int, stop: int) -> None:
        for seed in range(start, stop):
            optimizer.zero_grad()
            model(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()

    model, optimizer = made(0)
    tensors, metadata = flat({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    steps(model, optimizer, 3, 6)
    other, twin = made(1)
    empty, _ = flat({"model": other.state_dict(), "optimizer": twin.state_dict()})
    load(empty, tmp_path, no_dist=True)
    state = nested(empty, metadata)
    other.load_state_dict(state["model"])
    twin.load_state_dict(state["optimizer"])
    steps(other, twin, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_payload_planted_in_the_metadata_does_not_run(tmp_path: Path) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "checkpoint"
    tensors = saved(folder)
    for plant in (lambda m: Payload(mark), lambda m: setattr(m, "planner_data", Payload(mark)),
                  lambda m: m.state_dict_metadata.update(x=Payload(mark))):  # fmt: skip
        saved(folder)
        change(folder, plant)
        empty = {name: torch.zeros_like(t) for name, t in tensors.items()}
        with pytest.raises(DataError, match="which no checkpoint needs"):
            load(empty, folder, no_dist=True)
        assert not mark.exists() and not any(t.any() for t in empty.values())
    with suppress(BaseException):    # torch's error derives from no other
        dcp.load(dict(tensors), checkpoint_id=folder, no_dist=True)
    assert mark.exists(), "the plain reader runs it, or else this test proves nothing"


def test_bytes_that_take_the_place_of_a_tensor_are_not_unpickled(tmp_path: Path) -> None:
    """torch asks the metadata, not the state to be filled, whether an entry is to be unpickled."""
    mark, folder = tmp_path / "ran", tmp_path / "checkpoint"
    tensors = saved(folder)
    torch.save(Payload(mark), buffer := io.BytesIO())
    data = next(p for p in folder.iterdir() if p.suffix == ".distcp")

    def plant(metadata: Any) -> None:
        metadata.state_dict_metadata["a"] = BytesStorageMetadata()
        [index] = [i for i in metadata.storage_data if i.fqn == "a"]
        info = metadata.storage_data.pop(index)
        metadata.storage_data[type(index)("a")] = type(info)(info.relative_path, data.stat().st_size, len(buffer.getvalue()))

    change(folder, plant)
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    with pytest.raises(DataError, match="a is no tensor but bytes"):
        loaded(folder, tensors)
    assert not mark.exists()
    dcp.load({"a": torch.zeros(2, 3)}, checkpoint_id=folder, no_dist=True)
    assert mark.exists(), "the plain reader runs it, or else this test proves nothing"


@pytest.mark.parametrize("place", ["../other/__0_0.distcp", "/etc/passwd", "..\\other"])
def test_it_does_not_read_out_of_its_folder(tmp_path: Path, place: str) -> None:
    tensors = saved(tmp_path)
    change(tmp_path, lambda m: [setattr(info, "relative_path", place) for info in m.storage_data.values()] and None)
    with pytest.raises(DataError, match="out of its folder"):
        loaded(tmp_path, tensors)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps([])])
def test_what_is_no_metadata_is_told(tmp_path: Path, content: bytes) -> None:
    tensors = saved(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DataError, match=r"not the metadata|no description"):
        loaded(tmp_path, tensors)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(DataError, match="No such file"):
        loaded(tmp_path, tensors)


def test_nothing_that_is_allowed_has_an_effect() -> None:
    """Classes that describe, dtypes, and one function that looks a layout up by its name."""
    from importlib import import_module

    for module, names in ALLOWED.items():
        if module == "pathlib._local" and sys.version_info < (3, 13):
            continue
        for name in names:
            thing = getattr(import_module(module), name)
            assert isinstance(thing, type | torch.dtype) or name == "_get_layout", name
