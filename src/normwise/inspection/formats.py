"""What each kind of file says of its tensors. None of their numbers is read here, and no file can run anything.

A safetensors file is read by its own description, eight bytes and JSON, since its library maps the whole file into memory. A torch file is
unpickled with ``weights_only=True`` onto the meta device, where torch notes at which byte each tensor lies.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normwise import files
from normwise.errors import DataError, printable
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

_OPTIMIZERS = {
    "optim", "opt", "optimizer", "optimizers", "optim_state", "optim_state_dict", "opt_state", "optimizer_state", "optimizer_states",
    "optimizer_state_dict", "lr_scheduler", "lr_schedulers", "lr_scheduler_state_dict", "scheduler", "schedulers", "scheduler_state_dict",
}  # fmt: skip
"""Under which names files keep what is no weight. Whole names, and of parts alone: a layer may be called optimal."""
_STATES = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "prev", "step",
    "step_size", "mu_product", "ax", "eta", "master_param",
}  # fmt: skip
"""What torch's optimizers keep of each parameter."""
_HOLDERS = Mapping, list, tuple
_MOST_AGAIN, _MOST_DEPTH, _MOST_AXES = 1000, 100, 64
_LARGEST = 2**63 - 1
_MOST_REPEATED = 1 << 28
"""Bytes of a tensor that repeats a smaller one."""

Found = tuple[dict[tuple[str, ...], Stored], dict[str, str]]
"""Tensors by the way to them, and of what is not read why."""


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
        described = {name: one for name, one in json.loads(text, object_pairs_hook=_once).items() if name != "__metadata__"}
        entries = [_entry_of(name, one) for name, one in described.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, _Odd) else type(error).__name__
        raise DataError(f"{wrong}: its description cannot be read ({why}).") from error
    found: dict[tuple[str, ...], Stored] = {}
    left: dict[str, str] = {}
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3]):
        known = getattr(torch, _SAFE.get(dtype, ""), None)
        if known is None:
            left[name] = f"{printable(dtype[:20])} is a type that this torch does not have"
        elif end - begin != math.prod(shape) * known.itemsize:
            raise DataError(f"{wrong}: {name} of shape {list(shape)} does not take the {end - begin} bytes that it says.")
        else:
            found[_free((name,), found)] = InFile(name, shape, known, file, 8 + length + begin)
    return found, left


class _Odd(ValueError):
    """What is wrong with a description, in words."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values of one name Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Odd("a name stands in it twice")
    return found


def _entry_of(name: str, one: dict[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, first and last byte; an error for what is none of these."""
    shown, dtype, shape, place = printable(name), one["dtype"], one["shape"], one["data_offsets"]
    if not isinstance(dtype, str):
        raise _Odd(f"the type of {shown[:200]} is no word")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2 or len(shape) > _MOST_AXES:
        raise _Odd(f"the shape or the place of {shown[:200]} is no list of whole numbers")
    if not all(type(n) is int and 0 <= n <= _LARGEST for n in (*shape, *place)):
        raise _Odd(f"the shape or the place of {shown[:200]} is no list of whole numbers from 0 to 2**63 - 1")
    return shown, dtype, tuple(shape), place[0], place[1]


def _free(way: tuple[str, ...], taken: Container[tuple[str, ...]]) -> tuple[str, ...]:
    """The way to a tensor, or where another one has it a way of its own: two names may be one in print."""
    free, times = way, 1
    while free in taken:
        times += 1
        free = (*way[:-1], f"{way[-1]} ({times})")
    return free


def torch_file(path: Path) -> Found:
    """The tensors of a file that ``torch.save`` wrote, of whatever it holds."""
    if not zipfile.is_zipfile(path):
        return _old_torch_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            kinds = {entry.compress_type for entry in archive.infolist()}
        content = _unpickled(path)
    except Exception as error:    # a damaged or planted file raises whatever it likes
        raise DataError(f"{path}: {_refusal(error)}") from error
    if kinds != {zipfile.ZIP_STORED}:
        raise DataError(f"{path}: this is a compressed archive, which torch.save never makes.")
    file = File(path)
    return _sorted_out(path, content, lambda name, t: _where_it_lies(name, t, file))


def _unpickled(path: Path) -> Any:
    try:
        return _loaded(path, map_location="meta")
    except (NotImplementedError, RuntimeError) as error:
        # Quantised and nested tensors cannot be on the meta device. Mapped, they take no memory before they are read.
        if "meta" not in str(error).lower():
            raise
        return _loaded(path, map_location="cpu", mmap=True)


def _loaded(file: Any, **how: Any) -> Any:
    """Without torch's warnings on how it reads: what is wrong with the file is told in one sentence."""
    with warnings.catch_warnings(action="ignore"):
        return torch.load(file, weights_only=True, **how)


def _where_it_lies(name: str, t: Tensor, file: File) -> Stored:
    """A tensor as a place in the file, where torch says at which byte its storage begins."""
    offset = getattr(t.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or t.device.type != "meta":
        return Loaded(name, t.shape, t.dtype, t.resolve_neg)
    if t.is_contiguous() and not t.is_neg():
        return InFile(name, t.shape, t.dtype, file, offset + t.storage_offset() * t.itemsize)
    base = InFile(name, (t.untyped_storage().nbytes() // t.itemsize,), t.dtype, file, offset)
    load = partial(torch.as_strided, size=t.shape, stride=t.stride(), storage_offset=t.storage_offset())
    return Loaded(name, t.shape, t.dtype, lambda: load(base.whole()).mul(-1 if t.is_neg() else 1))


def _old_torch_file(path: Path) -> Found:
    """Of torch before 1.6: no archive, so that it is loaded as a whole."""
    try:
        with files.opened(path, "a checkpoint") as opened:
            content = _loaded(opened, map_location="cpu")
    except DataError:
        raise
    except Exception as error:    # as above
        raise DataError(f"{path}: {_refusal(error)}") from error
    return _sorted_out(path, content, lambda name, t: Loaded(name, t.shape, t.dtype, t.resolve_neg))


def _sorted_out(path: Path, content: Any, stored: Callable[[str, Tensor], Stored]) -> Found:
    """What a file holds: tensors that can be measured, and why others cannot."""
    if isinstance(content, Tensor):
        raise DataError(f"{path}: expected tensors by name (a state_dict), found a tensor alone; save it as {{'weight': tensor}}.")
    found: dict[tuple[str, ...], Stored] = {}
    left: dict[str, str] = {}
    for way, t in _tensors(path, content):
        free = _free(way, found)
        name = ".".join(free)
        if (why := _no_plain_tensor(path, name, t)) is not None:
            left[name] = why
        else:
            found[free] = stored(name, t)
    return found, left


def _no_plain_tensor(path: Path, name: str, t: Tensor) -> str | None:
    """Why a tensor is not measured; None where it can be. DataError for one that reaches beyond what is stored of it."""
    if t.is_nested or t.layout != torch.strided:
        return "it is nested" if t.is_nested else f"it is sparse ({str(t.layout).removeprefix('torch.')})"
    if t.is_quantized:
        return f"it is quantised ({str(t.dtype).removeprefix('torch.')}), and has no norm"
    if not t.numel():
        return None
    there = t.untyped_storage().nbytes() // t.itemsize
    last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    if last >= there:
        raise DataError(f"{path}: {name} needs {last + 1} numbers, and the file has {there} of it; it is cut off or damaged.")
    if t.numel() > there and t.numel() * t.itemsize > _MOST_REPEATED:
        return f"it repeats {there} numbers until there are {t.numel()}, which are not read"
    return None


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
    return f"this is no file of torch.save, or it is cut off or damaged ({_first_line(error)})."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _tensors(path: Path, content: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor in dictionaries and lists, by the keys that lead to it. Without recursion: a file may be nested as deep as it likes."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen, again = set[int](), 0
    while waiting:
        way, value = waiting.pop()
        if isinstance(value, Tensor):
            yield way, value.detach()
        elif isinstance(value, _HOLDERS):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            items = [(key, one) for key, one in pairs if isinstance(one, (Tensor, *_HOLDERS))]
            # A few names in a file can stand for more parts than any memory holds, where each is two times the next.
            again += id(value) in seen and bool(items)
            if len(way) > _MOST_DEPTH or again > _MOST_AGAIN:
                raise DataError(f"{path}: it holds itself, or parts within parts {_MOST_DEPTH} deep; save the state_dict alone.")
            seen.add(id(value))
            waiting += [((*way, _word(key)), one) for key, one in reversed(items)]


def _word(key: Any) -> str:
    try:
        return printable(str(key))
    except ValueError:    # a whole number of more digits than Python writes
        return "a long number"


def distributed(folder: Path) -> tuple[dict[tuple[str, ...], Stored], dict[str, str], list[Path]]:
    """The tensors of a folder that ``torch.distributed.checkpoint`` wrote, and its files; what it calls bytes is not read."""
    reader = SafeReader(folder, without_bytes=True)
    metadata = reader.read_metadata()
    found: dict[tuple[str, ...], Stored] = {}
    for name, one in metadata.state_dict_metadata.items():
        planned = (metadata.planner_data or {}).get(name) if isinstance(metadata.planner_data, dict) else None
        way = _free(tuple(map(_word, planned)) if isinstance(planned, list | tuple) and planned else (_word(name),), found)
        dtype, size = one.properties.dtype, one.size    # type: ignore[union-attr]
        found[way] = Loaded(name, size, dtype, lambda name=name: read_tensor(folder, metadata, name))    # type: ignore[misc]
    names = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    left = {_word(name): "it is stored as bytes, which may be any program" for name in reader.left_out}
    return found, left, [folder / ".metadata", *(folder / name for name in sorted(names))]


def weights_among(found: dict[tuple[str, ...], Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The model's weights by name among all tensors of a file, and notes on what is left out."""
    tops: dict[str, int] = {}
    for way in found:
        tops[way[0]] = tops.get(way[0], 0) + (len(way) > 1)
    under = next((top for top in WEIGHTS if tops.get(top)), None)
    if under is not None:
        kept, at = [way for way in found if way[0] == under], 1
    else:
        kept, at = [way for way in found if not _of_optimizer(way)], 0
    others: dict[str, int] = {}
    for way in found.keys() - set(kept):
        others[way[0]] = others.get(way[0], 0) + 1
    notes = [f"the weights are those under {under!r}"] if under is not None else []
    notes += [f"left out: {count} tensors of {top!r}" for top, count in sorted(others.items())[:5]]
    notes += [f"left out: {len(others) - 5} more parts"] if len(others) > 5 else []
    named: dict[tuple[str, ...], Stored] = {}
    for way in kept:    # "a.b", and "b" under "a"
        named[_free((".".join(way[at:]),), named)] = found[way]
    return {name: one for (name,), one in named.items()}, notes


def _of_optimizer(way: tuple[str, ...]) -> bool:
    """Whether a tensor is a part of an optimizer's or a scheduler's state: by the name of the part, or as optimizers save theirs, under
    ``state``, a parameter's number or name, and what is kept of it."""
    within = len(way) > 2 and "state" in way[:-2] and way[-1] in _STATES
    return within or (len(way) > 1 and way[0] in _OPTIMIZERS)
