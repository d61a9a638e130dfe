"""What each kind of file says of its tensors. None of their numbers is read here, and no file can run anything.

A safetensors file is read by its own description, eight bytes and JSON, since its library maps the whole file into memory. A torch file is
unpickled with ``weights_only=True`` onto the meta device, where torch notes at which byte each tensor lies.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normwise import files
from normwise.errors import DataError
from normwise.inspection.stored import File, InFile, Loaded, Stored
from normwise.integrations.distributed_checkpoint import SafeReader, read_tensor

MOST_HEADER = 100 << 20
"""Bytes of a safetensors description, as its library has it."""
_SAFE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")
"""Under which names files keep a model's weights beside other things."""

Found = tuple[dict[tuple[str, ...], Stored], list[str]]
"""Tensors by the way to them, and what is not read, each with the reason."""


def safetensors(path: Path) -> Found:
    """The tensors of one safetensors file."""
    file = File(path)
    wrong = f"{path}: this is no safetensors file, or a damaged one"
    with files.opened(path, "a safetensors file") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, max(file.size - 8, 0)):
            raise DataError(f"{wrong}: its description should take {length} bytes, and the file has {file.size}.")
        text = opened.read(length)
    try:
        described = {name: one for name, one in json.loads(text).items() if name != "__metadata__"}
        entries = [(name, one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in described.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{wrong}: its description cannot be read ({type(error).__name__}).") from error
    found: dict[tuple[str, ...], Stored] = {}
    left = []
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: str(entry[3]).zfill(20)):
        known = getattr(torch, _SAFE.get(dtype, ""), None)
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise DataError(f"{wrong}: the shape or the place of {name} is no list of whole numbers.")
        if known is None:
            left.append(f"{name}: {dtype} is a type that this torch does not have")
        elif end - begin != math.prod(shape) * known.itemsize:
            raise DataError(f"{wrong}: {name} of shape {list(shape)} does not take the {end - begin} bytes that it says.")
        else:
            found[(name,)] = InFile(name, shape, known, file, 8 + length + begin)
    return found, left


def torch_file(path: Path) -> Found:
    """The tensors of a file that ``torch.save`` wrote, of whatever it holds."""
    if not zipfile.is_zipfile(path):
        return _old_torch_file(path)
    try:
        kinds = {entry.compress_type for entry in zipfile.ZipFile(path).infolist()}
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:    # a damaged or planted file raises whatever it likes
        raise DataError(f"{path}: {_refusal(error)}") from error
    if kinds != {zipfile.ZIP_STORED}:
        raise DataError(f"{path}: this is a compressed archive, which torch.save never makes.")
    file = File(path)
    found: dict[tuple[str, ...], Stored] = {}
    left = []
    for way, t in _tensors(content, ()):
        name = ".".join(way)
        offset = None if t.layout != torch.strided else getattr(t.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or t.is_quantized:
            left.append(f"{name}: it is {'quantised' if t.is_quantized else 'sparse, or no plain tensor'}")
        elif t.is_contiguous():
            found[way] = InFile(name, t.shape, t.dtype, file, offset + t.storage_offset() * t.itemsize)
        else:
            base = InFile(name, (t.untyped_storage().nbytes() // t.itemsize,), t.dtype, file, offset)
            load = partial(torch.as_strided, size=t.shape, stride=t.stride(), storage_offset=t.storage_offset())
            found[way] = Loaded(name, t.shape, t.dtype, lambda base=base, load=load: load(base.whole()))    # type: ignore[misc]
    return found, left


def _old_torch_file(path: Path) -> Found:
    """Of torch before 1.6: no archive, so that it is loaded as a whole."""
    try:
        with files.opened(path, "a checkpoint") as opened:
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:    # as above
        raise DataError(f"{path}: {_refusal(error)}") from error
    found: dict[tuple[str, ...], Stored] = {}
    for way, t in _tensors(content, ()):
        found[way] = Loaded(".".join(way), t.shape, t.dtype, lambda t=t: t)    # type: ignore[misc]
    return found, []


def _refusal(error: Exception) -> str:
    """Why torch does not load a file, in one sentence."""
    text = str(error)
    named = re.search(r"(?:GLOBAL|global|class|function)[^\w]*([A-Za-z_][\w.]*\.[\w.]+)", text)
    if "weights_only" in text.lower() or "WeightsUnpickler" in text or "Unsupported" in text:
        what = f"it names {named[1].rstrip('.')}, which is" if named else "it holds what is"
        return (
            f"this file is not read, and nothing in it was run: {what} no tensor or plain data. "
            "Save the state_dict alone, or as safetensors."
        )
    first = (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    return f"this is no file of torch.save, or it is cut off or damaged ({first})."


def _tensors(value: Any, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield way, value.detach()
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _tensors(inner, (*way, str(key)))


def distributed(folder: Path) -> Found:
    """The tensors of a folder that ``torch.distributed.checkpoint`` wrote; what it calls bytes is not read."""
    reader = SafeReader(folder, without_bytes=True)
    metadata = reader.read_metadata()
    found: dict[tuple[str, ...], Stored] = {}
    for name, one in metadata.state_dict_metadata.items():
        planned = (metadata.planner_data or {}).get(name) if isinstance(metadata.planner_data, dict) else None
        way = tuple(map(str, planned)) if isinstance(planned, list | tuple) and planned else (name,)
        dtype, size = one.properties.dtype, one.size    # type: ignore[union-attr]
        found[way] = Loaded(name, size, dtype, lambda name=name: read_tensor(folder, metadata, name))    # type: ignore[misc]
    return found, [f"{name}: it is stored as bytes, which may be any program" for name in reader.left_out]


def weights_among(found: dict[tuple[str, ...], Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The model's weights by name among all tensors of a file, and notes on what is left out."""
    tops: dict[str, int] = {}
    for way in found:
        tops[way[0]] = tops.get(way[0], 0) + (len(way) > 1)
    under = next((top for top in WEIGHTS if tops.get(top)), None)
    if under is not None:
        kept, at = [way for way in found if way[0] == under], 1
    else:
        kept, at = [way for way in found if not way[0].startswith(("optim", "lr_scheduler"))], 0
    others: dict[str, int] = {}
    for way in found.keys() - set(kept):
        others[way[0]] = others.get(way[0], 0) + 1
    notes = [f"the weights are those under {under!r}"] if under is not None else []
    notes += [f"left out: {count} tensors of {top!r}" for top, count in sorted(others.items())[:5]]
    notes += [f"left out: {len(others) - 5} more parts"] if len(others) > 5 else []
    return {".".join(way[at:]): found[way] for way in kept}, notes
