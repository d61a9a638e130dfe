"""Checkpoints that survive an interruption, and states without pickle: flat tensors beside JSON, as safetensors keeps them.

>>> save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "control": control.state_dict()}, "run.pt")
>>> tensors, metadata = flat(control.state_dict())
>>> safetensors.torch.save_file(tensors, "control.safetensors", metadata)
"""

from __future__ import annotations

import base64
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normwise import files
from normwise.errors import NormwiseError, a_kind_of

# Of the one entry of the metadata.
KEY = "normwise"


def save(state: Any, path: str | os.PathLike[str], refuse_nonfinite: bool | Iterable[str] = False) -> None:
    """Saves as ``torch.save`` does, but never half: a process killed at any moment leaves the checkpoint that was there, or the new one.

    Writes ``path`` + ".new" beside it, syncs it to the disk and renames it.

    Args:
        state: what ``torch.save`` takes.
        path: the file.
        refuse_nonfinite: True checks every tensor of the state first. It does not look at what rules found in training, since an empty
            history and a bound that is not found yet are infinite, nor at plain numbers, since a scheduler's best loss begins so. Names,
            as ``["model"]``, check these entries of the state alone, for a model that keeps a mask of −inf in a buffer. Default False,
            since a check costs a pass over the whole state.

    Raises:
        OutputError: if writing fails, or ``path`` is something other than a regular file, such as a device or a pipe.
        DataError: if ``path`` is no path.
        NormwiseError: under ``refuse_nonfinite``, naming the tensors with an entry that is infinite or NaN; the file stays as it is.
    """
    files.check_path(path, " save(state, path) takes the state first.")
    if refuse_nonfinite is not False:
        _refuse_nonfinite(state, path, None if refuse_nonfinite is True else list(refuse_nonfinite))
    with files.whole(path, beside=f"{Path(path).name}.new") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:    # torch stumbles over its half file, and hides what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _refuse_nonfinite(state: Any, path: Any, among: list[str] | None) -> None:
    if among is not None:
        missing = [name for name in among if not isinstance(state, Mapping) or name not in state]
        if missing:
            raise NormwiseError(f"refuse_nonfinite= names {', '.join(map(repr, missing))}, which the state has not.")
        state = {name: state[name] for name in among}
    bad = [f"{where} ({count} of {t.numel()} entries)" for where, t in _tensors(state, "") if (count := _nonfinite(t))]
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise NormwiseError(f"the state is not finite in {', '.join(bad[:10])}{more}. Nothing was written: {str(path)!r} is as it was.")


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with the way to it, without what the rules of a control found."""
    if isinstance(value, Tensor):
        yield path or "the state", value
    elif isinstance(value, Mapping):
        # The control's own states, told by their keys; they may stand anywhere within the user's.
        ours = {"radius", "center", "found"} <= value.keys() or {"version", "steps", "rules"} <= value.keys()
        for key in (key for key in value if not (ours and str(key).startswith("found"))):
            yield from _tensors(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors(inner, f"{path}[{i}]")


def _nonfinite(tensor: Tensor) -> int:
    """How many entries are not finite; of a DTensor those that lie here, of a subclass those of what it is made of."""
    t = tensor.detach()
    if hasattr(t, "to_local"):
        t = t.to_local()
    elif hasattr(t, "__tensor_flatten__"):
        return sum(_nonfinite(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    if t.is_meta or t.is_quantized or not (t.is_floating_point() or t.is_complex()):
        return 0
    if t.is_nested or t.layout != torch.strided:
        t = t.coalesce().values() if t.layout == torch.sparse_coo else t.values()
    if t.element_size() == 1:    # the formats of 8 bits have no test of their own
        t = t.float()
    return int(t.numel() - t.isfinite().sum())


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Loads as ``torch.load`` does, tensors and plain data alone (``weights_only=True``): a planted file runs nothing.

    Args:
        path: the file.
        map_location: where the tensors go, as in ``torch.load``; the CPU by default.

    Raises:
        FileNotFoundError: if there is none.
        DataError: for anything but a path of a regular file; a pipe is not waited for.
    """
    if files.what_is(path) == files.NOTHING:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    with files.opened(path, "a checkpoint") as file:
        return torch.load(file, map_location=map_location, weights_only=True)


def flat(state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turns a state into named tensors and one JSON text that says where each belongs; no pickle.

    A tensor's name is the way to it, with dots. Where two ways would give the same name (``{"a.b": x, "a": {"b": y}}``), both are spelled
    out.

    Args:
        state: dictionaries, lists and tuples of tensors, numbers (also infinite, NaN and complex), texts, bytes, None, dtypes and
            devices. Keys are texts, numbers, None or tuples of these.

    Returns:
        ``(tensors, metadata)``; the tensors are contiguous and have memory of their own.

    Raises:
        NormwiseError: for any other type.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, (), tensors, Counter(map(_name, _ways(state, ()))))
    return tensors, {KEY: json.dumps(tree, allow_nan=False)}


def nested(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Any:
    """Gives back the state that `flat` took apart.

    Raises:
        NormwiseError: for tensors and metadata that `flat` did not make.
    """
    try:
        return _unflatten(json.loads(metadata[KEY]), tensors)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise NormwiseError(f"these tensors and this metadata are none that normwise.checkpoints.flat() made ({error!r}).") from error


def _ways(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The way to every tensor within."""
    if isinstance(value, Tensor):
        yield way
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from _ways(inner, (*way, key))


def _name(way: tuple[Any, ...]) -> str:
    return ".".join(["state", *map(str, way)])


def _flatten(value: Any, way: tuple[Any, ...], tensors: dict[str, Tensor], ways: Mapping[str, int]) -> Any:
    """Plain values as they are, the rest as ``[kind, ...]``."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise NormwiseError(f"{_name(way)} is a {value.layout} tensor of {value.dtype}, and a flat state holds dense ones: densify it.")
        name = _name(way)
        if ways[name] > 1:    # no name of the usual form begins so
            name = "state!" + json.dumps([_plain(key) for key in way])
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return ["tensor", name]
    if isinstance(value, Mapping):
        return ["dict", *([_told(k, f"the key {k!r} of {_name(way)}"), _flatten(v, (*way, k), tensors, ways)] for k, v in value.items())]
    if isinstance(value, list | tuple):
        items = (_flatten(v, (*way, i), tensors, ways) for i, v in enumerate(value))
        return ["tuple" if isinstance(value, tuple) else "list", *items]
    return _told(value, _name(way))


def _told(value: Any, what: str) -> Any:
    try:
        return _plain(value)
    except TypeError as error:
        raise NormwiseError(
            f"{what} is {a_kind_of(value)}, and a state without pickle holds tensors, numbers, texts, bytes, lists and dicts."
        ) from error


def _plain(value: Any) -> Any:
    """A value or a key that is no tensor, as JSON has it; TypeError for what has no such form."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else ["float", repr(float(value))]
    if isinstance(value, complex):
        return ["complex", repr(value.real), repr(value.imag)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, tuple):
        return ["tuple", *map(_plain, value)]
    if isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    raise TypeError(f"{value!r} has no form without pickle")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *items = tree
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "dict":
        return {_unflatten(key, {}): _unflatten(value, tensors) for key, value in items}
    if kind in ("list", "tuple"):
        values = [_unflatten(item, tensors) for item in items]
        return tuple(values) if kind == "tuple" else values
    return _READ[kind](*items)


_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_READ: dict[str, Callable[..., Any]] = {
    "float": float,
    "complex": lambda real, imag: complex(float(real), float(imag)),
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "dtype": _DTYPES.__getitem__,
    "device": torch.device,
}
