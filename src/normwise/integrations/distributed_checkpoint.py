"""Distributed checkpoints from strangers: torch's reader, with metadata that cannot run anything.

>>> tensors, metadata = checkpoints.flat(state)
>>> load(tensors, folder)

torch keeps a checkpoint's tensors in files that it loads with ``weights_only=True``, but the metadata beside them in a pickle that it loads
without, and whatever the metadata calls bytes, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from normwise.errors import DataError

ALLOWED = {
    "torch": {"Size", *(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},    # their home in Python 3.13
}  # fmt: skip
"""Every class and function that the metadata of torch 2.13 name: descriptions of tensors, none with an effect."""


def load(tensors: dict[str, Tensor], folder: str | os.PathLike[str], **options: Any) -> None:
    """``torch.distributed.checkpoint.load`` into the given tensors, DTensors among them, through :class:`SafeReader`.

    To be called on every rank. options: torch's, as ``process_group``. Raises DataError, on every rank and with no tensor changed, for a
    checkpoint that is none, or that holds more than tensors.
    """
    reader = SafeReader(folder)
    reader.read_metadata()
    state_dict_loader.load(tensors, storage_reader=reader, **options)


class SafeReader(FileSystemReader):
    """torch's ``FileSystemReader`` for checkpoints of tensors alone, as :func:`normwise.checkpoints.flat` makes of any state.

    path: the checkpoint's folder. Raises DataError, before anything is read into the given tensors, for metadata that is none, that
    names what ``ALLOWED`` does not list, that holds bytes (which torch would unpickle), or that points out of the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with open(path, "rb") as file:
                metadata = _Restricted(file).load()
        except Exception as error:    # a damaged or planted pickle raises whatever it likes
            raise DataError(f"{path}: these are not the metadata of a distributed checkpoint of tensors ({error}).") from error
        problem = next(_problems(metadata), None)
        if problem:
            raise DataError(f"{path}: {problem} Save tensors alone, as normwise.checkpoints.flat() makes them of a state.")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Restricted(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise UnpicklingError(f"they name {module}.{name}, which no checkpoint needs")


def _problems(metadata: Any) -> Iterator[str]:
    parts = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(metadata, Metadata) or not all(isinstance(part, dict) for part in parts):
        yield "this is no description of tensors."
        return
    if metadata.storage_meta is None:
        yield "it does not say how it is stored."
    for name, described in metadata.state_dict_metadata.items():
        if isinstance(described, BytesStorageMetadata) or not isinstance(described, TensorStorageMetadata):
            yield f"{name} is no tensor but bytes, which may be any program."
    for where in metadata.storage_data.values():
        place = str(getattr(where, "relative_path", ".."))
        if os.path.isabs(place) or ".." in place.replace("\\", "/").split("/"):
            yield f"it points to {place}, out of its folder."
