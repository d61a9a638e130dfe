"""Checkpoints that survive an interruption, and states without pickle: flat tensors beside JSON, as safetensors keeps them.

>>> save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "control": control.state_dict()}, "run.pt")
>>> tensors, metadata = flat(control.state_dict())
>>> safetensors.torch.save_file(tensors, "control.safetensors", metadata)
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normwise import files
from normwise.errors import NormwiseError

KEY = "normwise"
"""Of the one entry of the metadata."""


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` that is never half done: a process killed at any moment leaves the checkpoint that was there, or the new one.

    Writes ``path`` + ".new" beside it, hands it to the disk, and renames it. Raises OutputError where that fails, or where ``path`` is no
    regular file, such as a device or a pipe.
    """
    with files.whole(path, beside=f"{Path(path).name}.new") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:    # torch stumbles over its half file, and hides what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """``torch.load`` of tensors and plain data alone (``weights_only=True``): a file that was planted runs nothing.

    Raises FileNotFoundError where there is none, and DataError for what is no regular file; a pipe is not waited for.
    """
    if files.what_is(path) == files.NOTHING:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    with files.opened(path, "a checkpoint") as file:
        return torch.load(file, map_location=map_location, weights_only=True)


def flat(state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state of nested dictionaries, lists, tensors and numbers as ``(tensors, metadata)``: named tensors, contiguous and of memory of
    their own, and one JSON text that says where each belongs. NormwiseError for any other type."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "state", tensors)
    return tensors, {KEY: json.dumps(tree)}


def nested(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Any:
    """The inverse of :func:`flat`; NormwiseError for what it did not make."""
    try:
        return _unflatten(json.loads(metadata[KEY]), tensors)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise NormwiseError(f"these tensors and this metadata are none that normwise.checkpoints.flat() made ({error!r}).") from error


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain values as they are, the rest as ``[kind, ...]``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone(memory_format=torch.contiguous_format)
        return ["tensor", path]
    if isinstance(value, Mapping):
        return ["dict", *([_plain(k), _flatten(v, f"{path}.{k}", tensors)] for k, v in value.items())]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", *(_flatten(v, f"{path}.{i}", tensors) for i, v in enumerate(value))]
    raise NormwiseError(f"{path} is a {type(value).__name__}, and a state without pickle holds tensors, numbers, texts, lists and dicts.")


def _plain(key: Any) -> Any:
    if isinstance(key, str | int):
        return key
    raise NormwiseError(f"a state has the key {key!r}, and one without pickle has texts and integers as keys.")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *items = tree
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in items}
    if kind not in ("list", "tuple"):
        raise ValueError(kind)
    values = [_unflatten(item, tensors) for item in items]
    return tuple(values) if kind == "tuple" else values
