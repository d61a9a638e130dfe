"""Distributed checkpoints through the restricted reader: whole states come back, planted payloads do not run."""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

import normwise as nw
from normwise.checkpoints import flat, nested
from normwise.errors import DataError
from normwise.integrations.distributed_checkpoint import ALLOWED, SafeReader, load
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


# ------------------------------------------------------------------------------------------- a refusal changes nothing


def text(word: str) -> bytes:
    return b"X" + len(word.encode()).to_bytes(4, "little") + word.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


CLASSES = {name: named(module, name) for module, names in ALLOWED.items() for name in names if "_local" not in module}
STATE = b"}(" + text("planted") + b"K\x01u"
HEAD = b"\x80\x04"
TRICKS: dict[str, bytes] = {
    **{f"BUILD on {name}": CLASSES[name] + STATE + b"b." for name in sorted(CLASSES) if name[0].isupper() or name[0] == "_"},
    **{f"BUILD of slots on {name}": CLASSES[name] + b"N" + STATE + b"\x86b." for name in sorted(CLASSES)},
    "BUILD on a dtype": CLASSES["float32"] + STATE + b"b.",
    "BUILD on a class by GLOBAL": b"ctorch.distributed.checkpoint.metadata\nMetadata\n" + STATE + b"b.",
    "BUILD on a list": b"]" + STATE + b"b.", "BUILD on None": b"N" + STATE + b"b.", "BUILD twice": CLASSES["Metadata"] + b")\x81}b}b.",
    "BUILD with __class__": CLASSES["Metadata"] + b")\x81}(" + text("__class__") + CLASSES["Size"] + b"ub.",
    "BUILD with __setstate__": CLASSES["StorageMeta"] + b")\x81}(" + text("__setstate__") + CLASSES["Size"] + b"ub}b.",
    "a state that is run": CLASSES["TensorProperties"] + b")\x81(K\x01K\x02K\x03K\x04K\x05tb.",
    "REDUCE of a class": CLASSES["Metadata"] + b"}}\x86R.", "REDUCE of a number": b"K\x01)R.", "NEWOBJ of a number": b"K\x01)\x81.",
    "NEWOBJ_EX": CLASSES["Metadata"] + b")}\x92.", "OBJ": b"(" + CLASSES["Metadata"] + b"o.",
    "INST": b"(itorch.distributed.checkpoint.metadata\nMetadata\n.",
    "GLOBAL of os": b"cos\nsystem\n(" + text("true") + b"tR.", "STACK_GLOBAL of os": named("os", "system") + b"(" + text("true") + b"tR.",
    "a dotted name": named("torch", "Size.__init__.__globals__") + b".", "a class's attribute": named("torch", "Size.mro") + b")R.",
    "GLOBAL of builtins": b"cbuiltins\neval\n(" + text("1") + b"tR.", "numbers as names": b"K\x01K\x02\x93.", "lists as names": b"]]\x93.",
    "a name without an end": b"c" + b"x" * 10_000, "EXT1": b"\x82\x01.", "EXT2": b"\x83\x01\x00.", "EXT4": b"\x84\x01\x00\x00\x00.",
    "PERSID": b"Pname\n.", "BINPERSID": text("x") + b"Q.", "NEXT_BUFFER": b"\x97.", "READONLY_BUFFER": b"]\x98.",
    "deep tuples": b")" + b"\x85" * 200_000 + b".", "deep tuples as a key": b"})" + b"\x85" * 200_000 + b"K\x01s.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".", "deep dictionaries": b"}" + b"K\x01}" * 100_000 + b"s" * 100_000 + b".",
    "deep objects": CLASSES["Size"] + b"q\x00)R" + b"\x85h\x00\x86\x94" * 1000 + b".", "marks": b"(" * 1_000_000 + b".",
    "a list in itself": b"]q\x00h\x00a.", "a dictionary in itself": b"}q\x00" + text("a") + b"h\x00s.",
    "a state in itself": CLASSES["Metadata"] + b")\x81q\x00}(" + text("storage_meta") + b"h\x00ub.",
    "a large place in the memo": b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff.", "what is not in the memo": b"h\x07.",
    "a large number": b"\x8b\xff\xff\xff\x7f.", "a negative length": b"\x8b\xff\xff\xff\xff.",
    "long bytes": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "a long text": b"\x8d" + b"\xff" * 7 + b"\x7f.", "a long frame": b"\x95" + b"\xff" * 8 + b"N.",
    "a byte array": b"\x96" + b"\xff" * 7 + b"\x7f.",
    "an empty stack": b".", "pop of nothing": b"0.", "tuple of nothing": b"\x87.", "append to nothing": b"Na.",
    "items of a list": b"](NNu.",
    "items of an odd count": b"}(Nu.", "a mark as a value": b"(.", "a mark in a tuple": b"(\x85.", "a mark in the memo": b"(\x94N.",
    "no end": b"N", "a dictionary as a name": CLASSES["Metadata"] + b"}R.", "sets": b"\x8f(K\x01\x90.", "an old protocol": b"I1\n.",
}  # fmt: skip


def living() -> dict[str, Any]:
    """What a pickle might change: the attributes of every class and function that it may name, and of their modules."""
    from importlib import import_module

    found: dict[str, Any] = {}
    for module, names in ALLOWED.items():
        if module == "pathlib._local" and sys.version_info < (3, 13):
            continue
        loaded = import_module(module)
        found[module] = {key: id(value) for key, value in vars(loaded).items()}
        for name in names:
            found[f"{module}.{name}"] = {key: id(value) for key, value in getattr(getattr(loaded, name), "__dict__", {}).items()}
    return found


@pytest.mark.parametrize("trick", TRICKS)
def test_a_refused_checkpoint_changes_nothing_in_the_process(tmp_path: Path, trick: str) -> None:
    tensors = saved(tmp_path)
    (tmp_path / ".metadata").write_bytes(HEAD + TRICKS[trick])
    before = living()
    empty = {name: torch.zeros_like(t) for name, t in tensors.items()}
    with pytest.raises(DataError) as caught:
        load(empty, tmp_path, no_dist=True)
    assert len(str(caught.value)) < 1500 and not any(t.any() for t in empty.values())
    assert living() == before


def test_plain_unpickling_with_the_same_names_changes_a_class(tmp_path: Path) -> None:
    """Otherwise the test above proves nothing: a restricted unpickler, as there was, sets attributes on a class that it is allowed."""

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            assert name in ALLOWED[module]
            return super().find_class(module, name)

    before = living()
    try:
        Restricted(io.BytesIO(HEAD + TRICKS["BUILD of slots on Metadata"])).load()
        assert living() != before
    finally:
        vars(Metadata).get("planted") and delattr(Metadata, "planted")
    assert living() == before


def test_metadata_of_real_checkpoints_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    saved(tmp_path)
    theirs, wanted = (pickle.loads((tmp_path / ".metadata").read_bytes()) for _ in range(2))
    for described in wanted.state_dict_metadata.values():
        if hasattr(getattr(described, "properties", None), "strides"):
            described.properties.strides = None    # torch 2.15 writes them; whoever reads tensors has no use for them
    for protocol in (2, 3, 4, 5):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(theirs, protocol))
        ours = SafeReader(tmp_path).read_metadata()
        assert ours.state_dict_metadata == wanted.state_dict_metadata and ours.storage_data == theirs.storage_data
        assert ours.planner_data == theirs.planner_data and ours.version == theirs.version
        assert ours.storage_meta is not None and ours.storage_meta.save_id == theirs.storage_meta.save_id


# ------------------------------------------------------------------------------------------------------- false numbers


def info(metadata: Any, name: str) -> Any:
    return next(where for index, where in metadata.storage_data.items() if index.fqn == name)


def chunked(metadata: Any, *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """``a`` in these pieces, each stored where ``a`` was."""
    where = info(metadata, "a")
    metadata.storage_data = {index: w for index, w in metadata.storage_data.items() if index.fqn != "a"}
    metadata.state_dict_metadata["a"].chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
    for offset, _ in boxes:
        metadata.storage_data[MetadataIndex("a", offset)] = where


def set_tensor(metadata: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(metadata.state_dict_metadata["a"], name, value)


def set_chunk(metadata: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(metadata.state_dict_metadata["a"].chunks[0], name, value)


def set_info(metadata: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(info(metadata, "a"), name, value)


FALSE: dict[str, Any] = {
    "an offset beyond the file": lambda m: set_info(m, offset=10**12), "a negative offset": lambda m: set_info(m, offset=-1),
    "another's offset": lambda m: set_info(m, offset=info(m, "b").offset), "an offset in between": lambda m: set_info(m, offset=17),
    "a length beyond the file": lambda m: set_info(m, length=10**12), "a negative length": lambda m: set_info(m, length=-5),
    "a length of nothing": lambda m: set_info(m, length=0), "a short length": lambda m: set_info(m, length=30),
    "a huge length": lambda m: set_info(m, length=2**70), "an offset of a float": lambda m: set_info(m, offset=1.0),
    "an offset of True": lambda m: set_info(m, offset=True), "no offset": lambda m: set_info(m, offset=None),
    "another file": lambda m: set_info(m, relative_path="gone.distcp"), "a folder": lambda m: set_info(m, relative_path="."),
    "a file without a name": lambda m: set_info(m, relative_path=""), "a file of a number": lambda m: set_info(m, relative_path=3),
    "a zero in a name": lambda m: set_info(m, relative_path="a\0b"), "another form": lambda m: set_info(m, transform_descriptors=["zstd"]),
    "a negative piece": lambda m: set_chunk(m, sizes=torch.Size([-2, 3])), "a negative place": lambda m: set_chunk(m, offsets=(-1, 0)),
    "a piece outside": lambda m: set_chunk(m, offsets=torch.Size([1, 0])),
    "a piece of less": lambda m: set_chunk(m, sizes=torch.Size([1, 3])),
    "a piece of one axis": lambda m: set_chunk(m, sizes=torch.Size([6])),
    "a huge piece": lambda m: set_chunk(m, sizes=torch.Size([2**62, 3])),
    "sizes that overflow": lambda m: set_tensor(m, size=torch.Size([2**40, 2**40])),
    "a negative size": lambda m: set_tensor(m, size=(-2, 3)),
    "a size of a list": lambda m: set_tensor(m, size=[2, 3]), "no pieces": lambda m: set_tensor(m, chunks=[]),
    "pieces of None": lambda m: set_tensor(m, chunks=None), "pieces of numbers": lambda m: set_tensor(m, chunks=[1]),
    "two pieces that overlap": lambda m: chunked(m, ((0, 0), (1, 3)), ((0, 0), (1, 3))),
    "pieces that overlap by one": lambda m: chunked(m, ((0, 0), (2, 2)), ((0, 1), (1, 2))),
    "pieces that leave a hole": lambda m: chunked(m, ((0, 0), (1, 3)), ((1, 1), (1, 2))),
    "a piece too many": lambda m: chunked(m, ((0, 0), (2, 3)), ((0, 0), (0, 3)), ((1, 1), (1, 1))),
    "another type": lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.int32),
    "a wider type": lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.float64),
    "another tensor's piece": lambda m: m.storage_data.update({i: info(m, "b") for i in m.storage_data if i.fqn == "a"}),
    "a piece that is not stored": lambda m: [m.storage_data.pop(i) for i in list(m.storage_data) if i.fqn == "a"] and None,
    "a tensor of another size":
        lambda m: [f(m, **{k: torch.Size([3, 2])}) for f, k in ((set_tensor, "size"), (set_chunk, "sizes"))] and None,
    "a tensor that is missing": lambda m: m.state_dict_metadata.pop("a") and None, "no storage": lambda m: setattr(m, "storage_data", None),
    "no tensors": lambda m: setattr(m, "state_dict_metadata", None), "odd planner data": lambda m: setattr(m,
    "planner_data", torch.Size([1])),
    "storage in a list": lambda m: setattr(m, "storage_data", [1]), "odd keys": lambda m: m.storage_data.update({3: info(m, "a")}),
    "no properties": lambda m: set_tensor(m, properties=None), "no storage meta": lambda m: setattr(m, "storage_meta", None),
}  # fmt: skip


@pytest.mark.parametrize("what", FALSE)
def test_false_numbers_are_one_data_error_and_change_no_tensor(tmp_path: Path, what: str) -> None:
    """Before: BaseExceptions of torch's, memory without end, or tensors that were silently left as they were."""
    tensors = saved(tmp_path)
    change(tmp_path, FALSE[what])
    given = {name: torch.full_like(t, 7) for name, t in tensors.items()}
    with pytest.raises(DataError) as caught:
        load(given, tmp_path, no_dist=True)
    assert len(str(caught.value)) < 1500 and "Traceback" not in str(caught.value)
    assert all((t == 7).all() for t in given.values())


def test_pieces_that_make_up_a_tensor_are_accepted(tmp_path: Path) -> None:
    """A grid, as two-dimensional sharding leaves it, pieces without entries among them."""
    saved(tmp_path)
    change(tmp_path, lambda m: chunked(m, ((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (1, 1)), ((1, 1), (1, 2)), ((2, 0), (0, 3))))
    assert len(SafeReader(tmp_path).read_metadata().state_dict_metadata["a"].chunks) == 5    # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["cut", "gone", "pipe", "folder", "empty", "noise", "link in a circle"])
def test_damaged_files_are_one_data_error(tmp_path: Path, kind: str) -> None:
    tensors = saved(tmp_path)
    data = next(p for p in tmp_path.iterdir() if p.suffix == ".distcp")
    content = data.read_bytes()
    data.unlink()
    if kind in ("cut", "empty", "noise"):
        data.write_bytes({"cut": content[:-10], "empty": b"", "noise": bytes(len(content))}[kind])
    elif kind == "pipe":
        os.mkfifo(data)
    elif kind == "folder":
        data.mkdir()
    elif kind != "gone":
        data.symlink_to(data.name)
    with pytest.raises(DataError):
        loaded(tmp_path, tensors)


def test_a_piece_that_is_compressed_or_larger_than_it_says_is_not_unpacked(tmp_path: Path) -> None:
    """A zip of some kilobytes may hold a terabyte."""
    tensors = saved(tmp_path)
    data = next(p for p in tmp_path.iterdir() if p.suffix == ".distcp")
    packed, buffer = io.BytesIO(), io.BytesIO()
    torch.save(tensors["a"], packed)
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (bytes(50 << 20) if name.endswith("data/0") else b""))
    start = data.stat().st_size
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    change(tmp_path, lambda m: set_info(m, offset=start, length=len(buffer.getvalue())))
    with pytest.raises(DataError, match="compressed"):
        loaded(tmp_path, tensors)


@pytest.mark.parametrize("value", [torch.zeros(2, 3).to_sparse(), torch.zeros(3, 2), {"a": 1}, torch.zeros(2, 3, dtype=torch.int32), [], 3])
def test_a_piece_that_is_something_else_is_told(tmp_path: Path, value: Any) -> None:
    tensors = saved(tmp_path)
    data = next(p for p in tmp_path.iterdir() if p.suffix == ".distcp")
    torch.save(value, buffer := io.BytesIO())
    start = data.stat().st_size
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    change(tmp_path, lambda m: set_info(m, offset=start, length=len(buffer.getvalue())))
    given = {name: torch.full_like(t, 7) for name, t in tensors.items()}
    with pytest.raises(DataError, match=r"but the metadata says|cannot be read"):
        load(given, tmp_path, no_dist=True)
    assert all((t == 7).all() for t in given.values())


def test_a_payload_in_a_piece_does_not_run(tmp_path: Path) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "checkpoint"
    tensors = saved(folder)
    data = next(p for p in folder.iterdir() if p.suffix == ".distcp")
    torch.save(Payload(mark), buffer := io.BytesIO())
    start = data.stat().st_size
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    change(folder, lambda m: set_info(m, offset=start, length=len(buffer.getvalue())))
    with pytest.raises(DataError, match="cannot be read"):
        loaded(folder, tensors)
    assert not mark.exists()


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.long)], ids=["60", "3000"])
def test_metadata_with_bytes_changed_at_random(tmp_path: Path, seeds: range, coverage: Callable[..., None]) -> None:
    """Read, or one DataError; what is read is what was saved, and the process is as it was."""
    tensors = saved(tmp_path)
    content, before = (tmp_path / ".metadata").read_bytes(), living()
    for seed in seeds:
        rnd = random.Random(seed)
        spoilt = bytearray(content)
        for _ in range(rnd.choice([1, 1, 2, 8])):
            at = rnd.randrange(len(spoilt))
            spoilt[at : at + rnd.randrange(2)] = rnd.randbytes(rnd.choice([0, 1, 1, 1, 3]))
        (tmp_path / ".metadata").write_bytes(spoilt)
        given = {name: torch.full_like(t, 7) for name, t in tensors.items()}
        try:
            load(given, tmp_path, no_dist=True)
            outcome = "read"
            assert all(torch.equal(given[name], t) for name, t in tensors.items()), seed
        except DataError as error:
            outcome = "refused"
            assert len(str(error)) < 1500 and all((t == 7).all() for t in given.values()), seed
        coverage("distributed checkpoints with bytes changed", "metadata", outcome)
    assert living() == before
