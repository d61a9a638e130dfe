"""Distributed checkpoints from strangers: torch's reader, with metadata that cannot run anything.

>>> tensors, metadata = checkpoints.flat(state)
>>> load(tensors, folder)

torch keeps a checkpoint's tensors in files that it loads with ``weights_only=True``, but the metadata beside them in a pickle that it loads
without, and whatever the metadata calls bytes, too. Here the metadata is read as data (see ``integrations.inert_pickle``), checked, and
torch's own description is built from the numbers and words in it, so that nothing in the file ever meets a live class.
"""

from __future__ import annotations

import errno
import io
import math
import os
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from normwise import files
from normwise.errors import DataError, a_kind_of
from normwise.integrations.inert_pickle import Global, Made, NotInert, Pairs, read

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Every class and function that the metadata of torch 2.13 name: descriptions of tensors, none with an effect.
ALLOWED = {
    "torch": {"Size", *_DTYPES},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},    # their home in Python 3.13
}  # fmt: skip
_MOST_METADATA = 1 << 28    # bytes; a piece of a tensor takes about 150
_MOST_PARTS, _MOST_DIMENSIONS, _MOST_COMPARISONS, _MOST_DEPTH = 5_000_000, 64, 20_000_000, 50
_LARGEST = 2**63 - 1


def load(tensors: dict[str, Tensor], folder: str | os.PathLike[str], **options: Any) -> None:
    """``torch.distributed.checkpoint.load`` into the given tensors, DTensors among them, through :class:`SafeReader`.

    To be called on every rank. options: torch's, as ``process_group``. Raises DataError, on every rank and with no tensor changed, for a
    checkpoint that is none, that holds more than tensors, or whose files are missing or too short; and for pieces that are not what the
    metadata says, with no tensor of the rank changed that found it.
    """
    reader = SafeReader(folder)
    reader.read_metadata()
    try:
        state_dict_loader.load(tensors, storage_reader=reader, **options)
    except CheckpointException as error:    # which derives from BaseException, so that no caller's ``except Exception`` sees it
        rank, (cause, _) = min(error.failures.items())
        said = str(cause) if isinstance(cause, DataError) else f"{folder}: rank {rank} cannot load this checkpoint ({_first_line(cause)})."
        raise DataError(said) from error


class SafeReader(FileSystemReader):
    """torch's ``FileSystemReader`` for checkpoints of tensors alone, as :func:`normwise.checkpoints.flat` makes of any state.

    path: the checkpoint's folder. Raises DataError, before anything is read into the given tensors, for metadata that is none, that
    names what ``ALLOWED`` does not list, that holds bytes (which torch would unpickle), or that points out of the folder; whose pieces do
    not make up each tensor exactly once, or lie where their files have nothing; and, before a tensor of this rank is changed, for pieces
    that are not of the type and the size that the metadata says.
    """

    def __init__(self, path: str | os.PathLike[str], without_bytes: bool = False) -> None:
        super().__init__(path)
        self._known: dict[str, Metadata] = {}
        self._without_bytes = without_bytes
        self.left_out: list[str] = []
        """With ``without_bytes``: what the metadata calls bytes, which is not read, instead of being refused."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(checkpoint_id)
        self._known.clear()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = os.fspath(self._get_metadata_path(kwargs.get("rank")))
        if path not in self._known:
            try:
                if files.what_is(path) == files.NOTHING:
                    raise NotInert(os.strerror(errno.ENOENT))
                content = files.content(path, _MOST_METADATA, "metadata, a file")
                described = _Description(read(content, lambda module, name: name in ALLOWED.get(module, ())), self._without_bytes)
                metadata, self.left_out = described.metadata(), described.left_out
            except NotInert as error:
                raise DataError(f"{path}: these are not the metadata of a distributed checkpoint of tensors ({error}).") from error
            except _Problem as error:
                raise DataError(f"{path}: {error} Save tensors alone, as normwise.checkpoints.flat() makes them of a state.") from error
            _check_files(path, Path(self.path), metadata.storage_data)
            self._known[path] = metadata
        metadata = self._known[path]
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Every piece is looked at before the first is copied."""
        [metadata] = self._known.values()
        wanted = {(item.storage_index.fqn, item.storage_index.offset) for item in plan.items}
        for name, offset in wanted:
            described = cast(TensorStorageMetadata, metadata.state_dict_metadata[name])
            sizes = next(chunk.sizes for chunk in described.chunks if chunk.offsets == offset)
            _check_piece(Path(self.path), name, self.storage_data[MetadataIndex(name, offset)], described.properties.dtype, sizes)
        return super().read_data(plan, planner)


def read_tensor(folder: str | os.PathLike[str], metadata: Metadata, name: str) -> Tensor:
    """One tensor of a checkpoint whose metadata a :class:`SafeReader` gave, put together from its pieces.

    It takes the memory of the tensor, and of one piece where there are several. DataError for pieces that are not what the metadata says.
    """
    described = cast(TensorStorageMetadata, metadata.state_dict_metadata[name])
    dtype, whole = described.properties.dtype, torch.empty(0)
    for i, chunk in enumerate(described.chunks):
        info = cast(_StorageInfo, metadata.storage_data[MetadataIndex(name, chunk.offsets)])
        _check_piece(Path(folder), name, info, dtype, chunk.sizes)
        with files.opened(Path(folder) / info.relative_path, "a file of a checkpoint") as file:
            window = _Window(file, info.offset, info.length)
            piece = torch.load(cast(Any, window), map_location="cpu", weights_only=True).detach()
        if len(described.chunks) == 1:
            return piece
        whole = torch.empty(described.size, dtype=dtype) if i == 0 else whole
        whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
    return whole


class _Problem(Exception):
    """What is wrong with a description that can be read."""


class _Description:
    """torch's Metadata from the words and numbers of a pickle, each checked."""

    def __init__(self, root: Any, without_bytes: bool = False) -> None:
        self.root, self.parts = root, 0
        self.without_bytes, self.left_out = without_bytes, list[str]()

    def metadata(self) -> Metadata:
        fields = self.fields(self.root, "torch.distributed.checkpoint.metadata", "Metadata")
        described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
        if type(described) is not Pairs or type(stored) is not Pairs:
            raise _Problem("this is no description of tensors.")
        if fields.get("storage_meta") is None:
            raise _Problem("it does not say how it is stored.")
        meta = self.fields(fields["storage_meta"], "torch.distributed.checkpoint.metadata", "StorageMeta")
        save_id, version = (value if type(value) is str else None for value in (meta.get("save_id"), fields.get("version")))
        tensors: dict[str, TensorStorageMetadata] = {}
        for name, value in described:
            if type(name) is not str or name in tensors:
                raise _Problem("the name of a tensor is no text, or stands twice.")
            if self.without_bytes and type(value) is Made and value.what.name == "BytesStorageMetadata":
                self.left_out.append(name)
            else:
                tensors[name] = self.tensor(name, value)
        pieces = dict(self.piece(index, where) for index, where in stored)
        pieces = {index: where for index, where in pieces.items() if index.fqn in tensors} if self.left_out else pieces
        for name, chunk in ((name, chunk) for name, tensor in tensors.items() for chunk in tensor.chunks):
            if MetadataIndex(name, chunk.offsets) not in pieces:
                raise _Problem(f"it does not say where the piece of {name} at {list(chunk.offsets)} is stored.")
        planner = self.plain(fields.get("planner_data"), 0)
        return Metadata(cast(Any, tensors), planner, pieces, StorageMeta(save_id=save_id), version)

    def fields(self, value: Any, module: str, name: str) -> dict[str, Any]:
        """The state of an object of a dataclass."""
        if type(value) is not Made or (value.what.module, value.what.name) != (module, name) or value.arguments:
            raise _Problem("this is no description of tensors.")
        if type(value.state) is not Pairs or not all(type(key) is str for key, _ in value.state):
            raise _Problem("this is no description of tensors.")
        return dict(value.state)

    def tensor(self, name: str, value: Any) -> TensorStorageMetadata:
        if type(value) is not Made or value.what.name != "TensorStorageMetadata":
            raise _Problem(f"{name} is no tensor but bytes, which may be any program.")
        fields = self.fields(value, "torch.distributed.checkpoint.metadata", "TensorStorageMetadata")
        properties, size, chunks = fields.get("properties"), self.size(fields.get("size"), name), fields.get("chunks")
        if type(properties) is not Made or properties.what.name != "TensorProperties" or type(properties.state) is not tuple:
            raise _Problem(f"it does not say what {name} is made of.")
        dtype = properties.state[0] if properties.state else None
        if type(dtype) is not Global or dtype.module != "torch" or dtype.name not in _DTYPES:
            raise _Problem(f"it does not say of which type {name} is.")
        if type(chunks) is not list:
            raise _Problem(f"it does not say in which pieces {name} is stored.")
        boxes = [self.chunk(name, size, chunk) for chunk in chunks]
        _check_boxes(name, size, boxes)
        return TensorStorageMetadata(TensorProperties(_DTYPES[dtype.name]), size, boxes)

    def chunk(self, name: str, whole: torch.Size, value: Any) -> ChunkStorageMetadata:
        self.count()
        fields = self.fields(value, "torch.distributed.checkpoint.metadata", "ChunkStorageMetadata")
        offsets, sizes = (self.size(fields.get(key), name) for key in ("offsets", "sizes"))
        inside = len(offsets) == len(sizes) == len(whole) and all(o + s <= n for o, s, n in zip(offsets, sizes, whole, strict=True))
        if not inside:
            raise _Problem(f"a piece of {name}, {list(sizes)} at {list(offsets)}, lies outside of its size {list(whole)}.")
        return ChunkStorageMetadata(offsets, sizes)

    def size(self, value: Any, name: str) -> torch.Size:
        """torch.Size of a tuple of whole numbers that a tensor can have."""
        numbers = value.arguments[0] if type(value) is Made and value.what.name == "Size" and len(value.arguments) == 1 else None
        if type(numbers) is not tuple or len(numbers) > _MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
            raise _Problem(f"a size or an offset of {name} is no list of whole numbers >= 0.")
        if math.prod(n or 1 for n in numbers) > _LARGEST:
            raise _Problem(f"a size or an offset of {name} is larger than any tensor.")
        return torch.Size(numbers)

    def piece(self, index: Any, where: Any) -> tuple[MetadataIndex, _StorageInfo]:
        self.count()
        at = self.fields(index, "torch.distributed.checkpoint.metadata", "MetadataIndex")
        info = self.fields(where, "torch.distributed.checkpoint.filesystem", "_StorageInfo")
        name, offset, place = at.get("fqn"), at.get("offset"), info.get("relative_path")
        if type(name) is not str or type(place) is not str:
            raise _Problem("a piece has no name, or no file.")
        if os.path.isabs(place) or ".." in place.replace("\\", "/").split("/") or "\0" in place:
            raise _Problem(f"it points to {place}, out of its folder.")
        start, length = info.get("offset"), info.get("length")
        if type(start) is not int or type(length) is not int or not 0 <= start <= _LARGEST or not 0 <= length <= _LARGEST:
            raise _Problem(f"the place of a piece of {name} in {place} is no whole numbers >= 0.")
        if info.get("transform_descriptors"):
            raise _Problem(f"a piece of {name} is stored in another form than torch.save's.")
        return MetadataIndex(name, None if offset is None else self.size(offset, name)), _StorageInfo(place, start, length)

    def plain(self, value: Any, depth: int) -> Any:
        """What the planner keeps: texts, numbers, and lists, tuples and dictionaries of them."""
        self.count()
        if depth > _MOST_DEPTH:
            raise _Problem("what its planner keeps is nested too deeply.")
        if value is None or type(value) in (str, int, bool, float):
            return value
        if type(value) is Pairs:
            pairs = [(self.plain(key, depth + 1), self.plain(item, depth + 1)) for key, item in value]
            if not all(type(key) in (str, int) for key, _ in pairs):
                raise _Problem("what its planner keeps has keys that are no texts.")
            return dict(pairs)
        if type(value) in (list, tuple):
            return type(value)(self.plain(item, depth + 1) for item in value)
        raise _Problem("what its planner keeps is more than texts and numbers.")

    def count(self) -> None:
        """One list may stand in the pickle once and be meant a million times."""
        self.parts += 1
        if self.parts > _MOST_PARTS:
            raise _Problem(f"it has more than {_MOST_PARTS} parts.")


def _check_boxes(name: str, size: torch.Size, boxes: list[ChunkStorageMetadata]) -> None:
    """_Problem unless the pieces hold every entry of a tensor once. torch would leave what lies in none of them as it was."""
    if sum(math.prod(box.sizes) for box in boxes) != math.prod(size):
        raise _Problem(f"the pieces of {name} do not make up its size {list(size)}.")
    full = [box for box in boxes if math.prod(box.sizes)]
    if not boxes or not size:
        if len(boxes) != 1:
            raise _Problem(f"{name} is in {len(boxes)} pieces.")
        return
    # Inside, and as many entries together as the whole: they are all of it unless two overlap. Swept along the axis that is cut most.
    axis = max(range(len(size)), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[ChunkStorageMetadata] = []
    left = _MOST_COMPARISONS
    for box in sorted(full, key=lambda b: b.offsets[axis]):
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > box.offsets[axis]]
        left -= len(active) + 1
        if left < 0:
            raise _Problem(f"the pieces of {name} are cut in a way that cannot be checked.")
        sides = [zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True) for other in active]
        if any(all(a < b + n and b < a + m for a, m, b, n in side) for side in sides):
            raise _Problem(f"two pieces of {name} overlap at {list(box.offsets)}.")
        active.append(box)


def _check_files(path: str, folder: Path, stored: dict[MetadataIndex, _StorageInfo]) -> None:
    """DataError where a file is missing or none, or ends before a piece does."""
    lengths: dict[str, int] = {}
    for index, info in stored.items():
        place, known = folder / info.relative_path, info.relative_path in lengths
        if not known and (kind := files.what_is(place)) != files.FILE:
            raise DataError(f"{path}: {index.fqn} is in the file {info.relative_path}, where there is {kind}.")
        if not known:
            lengths[info.relative_path] = place.stat().st_size
        if info.offset + info.length > lengths[info.relative_path]:
            raise DataError(f"{path}: {index.fqn} lies beyond the end of {info.relative_path}; the checkpoint is damaged or incomplete.")


def _check_piece(folder: Path, name: str, info: _StorageInfo, dtype: torch.dtype, sizes: torch.Size) -> None:
    """DataError unless a piece is one tensor of this type and size, stored as it is. Its numbers are not read yet."""
    wrong = f"{folder / info.relative_path}: the piece of {name} at byte {info.offset} "
    if math.prod(sizes) * dtype.itemsize > info.length:
        raise DataError(f"{wrong}is too short for {list(sizes)} of {dtype}.")
    with files.opened(folder / info.relative_path, "a file of a checkpoint") as file:
        view = _Window(file, info.offset, info.length)
        try:
            with zipfile.ZipFile(cast(Any, view)) as packed:
                if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > info.length for entry in packed.infolist()):
                    raise DataError(f"{wrong}is compressed, which torch.save never does.")
            view.seek(0)
            with torch.serialization.skip_data():
                found = torch.load(cast(Any, view), map_location="cpu", weights_only=True)
        except DataError:
            raise
        except Exception as error:    # a damaged or planted piece raises whatever it likes
            raise DataError(f"{wrong}cannot be read ({_first_line(error)}).") from error
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.dtype != dtype or found.size() != sizes:
        told = f"{list(found.size())} of {found.dtype}" if isinstance(found, Tensor) else a_kind_of(found)
        raise DataError(f"{wrong}is {told}, but the metadata says {list(sizes)} of {dtype}.")


class _Window(io.RawIOBase):
    """A part of a file, as a file. torch has one too, which counts places from the end in the wrong direction."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        count: int = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.at += count
        return count

    def readline(self, size: int | None = -1) -> bytes:
        raise OSError("a piece of a checkpoint has no lines")

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500].rstrip(".")
