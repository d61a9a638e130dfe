"""A checkpoint, whatever trainer wrote it: its tensors by name, in the order in which they lie, and what is to be said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from normwise import files
from normwise.errors import DataError
from normwise.inspection import formats
from normwise.inspection.stored import EIGHT_BITS, REAL, InFile, Stored
from normwise.parameters.names import clean_name

_MOST_JSON = 64 << 20
_SUFFIXES: dict[str, Callable[[Path], formats.Found]] = {
    ".safetensors": formats.safetensors, ".bin": formats.torch_file, ".pt": formats.torch_file, ".pth": formats.torch_file,
    ".ckpt": formats.torch_file,
}  # fmt: skip
_NAMED = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin", ".metadata")
"""What a folder is read by, the first that it has."""
_INSIDE = ("pytorch_model_fsdp_0", "model", "checkpoints")
"""Folders in which trainers keep the weights."""
READ = "a .safetensors, .bin, .pt, .pth or .ckpt file, an index.json of such files, or a folder that a trainer wrote"


@dataclass
class Checkpoint:
    """The floating-point tensors of a checkpoint.

    ``place`` is what was read, ``kind`` says of which format it is, ``notes`` are for the user, ``skipped`` says what is not measured and
    why, ``adapter`` is PEFT's configuration where the tensors are those of an adapter.
    """

    place: Path
    kind: str
    tensors: dict[str, Stored]
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    adapter: dict[str, Any] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    """Of tied tensors, which are listed once, the further names."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of all tensors, those that are skipped, too."""
    paths: list[Path] = field(default_factory=list)
    """The files."""

    def get(self, name: str) -> Stored | None:
        return self.tensors.get(self.aliases.get(name, name))

    def identity(self) -> list[list[Any]]:
        """The files with their sizes and times: another content has another identity."""
        about = [(path.name, path.stat()) for path in self.paths]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in about]


def opened(path: str | Path) -> Checkpoint:
    """A checkpoint by its file or folder.

    Raises:
        DataError: for nothing, for what is no checkpoint, is damaged, lacks a part, or would run code; nothing of it is run.
    """
    path = Path(path)
    kind = files.what_is(path)
    if kind == files.FOLDER:
        found = _folder(path)
    elif kind == files.FILE:
        found = _index(path) if path.name.endswith(".index.json") else _file(path)
    else:
        raise DataError(f"{path}: expected a checkpoint ({READ}), found {kind}.")
    if not found.tensors:
        left = f"; {found.skipped[0]}" if found.skipped else ""
        raise DataError(f"{path}: there is no tensor of floating-point numbers in it{left}.")
    return found


def _file(path: Path) -> Checkpoint:
    read = _SUFFIXES.get(path.suffix)
    if read is None:
        raise DataError(f"{path}: expected a checkpoint ({READ}), found a file of another kind.")
    raw, left = read(path)
    found, notes = formats.weights_among(raw)
    kind = "safetensors" if read is formats.safetensors else "torch file"
    return _made(path, kind, found, notes, left, [path])


def _index(path: Path) -> Checkpoint:
    """Shards named by an index, all of which must be there."""
    content = _json(path)
    where = content.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in where.values()):
        raise DataError(f"{path}: this index has no weight_map of tensors to files beside it.")
    shards = [path.parent / shard for shard in sorted(set(where.values()))]
    for shard in shards:
        if (kind := files.what_is(shard)) != files.FILE:
            raise DataError(f"{path}: the shard {shard.name} should stand beside it, where there is {kind}.")
    tensors: dict[str, Stored] = {}
    notes, skipped = list[str](), list[str]()
    aliases: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        part = _file(shard)
        tensors |= part.tensors
        notes += [note for note in part.notes if note not in notes]
        skipped += part.skipped
        aliases |= part.aliases
        shapes |= part.shapes
        there = {*part.shapes, *(one.partition(":")[0] for one in part.skipped)}
        missing = [name for name, file in where.items() if file == shard.name and clean_name(name) not in there]
        if missing:
            raise DataError(f"{path}: {missing[0]} should be in {shard.name}, which does not have it.")
    kind = "safetensors" if shards[0].suffix == ".safetensors" else "torch file"
    whole = _made(path, f"{kind}, {len(shards)} shards", tensors, notes, skipped, shards)
    whole.aliases |= aliases
    whole.shapes |= shapes
    return whole


def _made(
    place: Path, kind: str, raw: dict[str, Stored], notes: list[str], left: Iterable[str], paths: list[Path]
) -> Checkpoint:
    """Cleans names, and sets aside what has no norms: integers, packed or quantised numbers, second names of a tensor."""
    found = Checkpoint(place, kind, {}, notes, list(left), paths=paths)
    lying: dict[tuple[Any, ...], str] = {}
    for name, one in raw.items():
        one.name = clean_name(name)
        found.shapes[one.name] = one.shape
        at = (id(one.file), one.at, one.shape) if isinstance(one, InFile) and one.count else (id(one),)
        if at in lying:
            found.aliases[one.name] = lying[at]
        elif one.dtype not in REAL + EIGHT_BITS or not one.count:
            why = "empty" if not one.count else str(one.dtype).removeprefix("torch.")
            found.skipped.append(f"{one.name}: {why}, which has no norm")
        else:
            lying[at] = one.name
            found.tensors[one.name] = one
    found.notes += [f"{name} is the same tensor as {first}" for name, first in list(found.aliases.items())[:3]]
    return found


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(folder: Path) -> Checkpoint:
    """What a folder of a trainer, a hub or a distributed checkpoint is read by."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        return _adapter(folder, names)
    named = next((name for name in _NAMED if name in names), None)
    if named == ".metadata":
        raw, left = formats.distributed(folder)
        found, notes = formats.weights_among(raw)
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        return _made(folder, "distributed checkpoint", found, notes, left, paths)
    if named is not None:
        return _index(folder / named) if named.endswith(".index.json") else _file(folder / named)
    return _only_file(folder, names) or _latest(folder, names)


def _only_file(folder: Path, names: set[str]) -> Checkpoint | None:
    """The only file of weights in a folder; None where there is none, or several that no index puts together."""
    indexes = sorted(name for name in names if name.endswith(".index.json"))
    if indexes:
        return _index(folder / indexes[0])
    shards = sorted(name for name in names if re.search(r"-\d+-of-\d+\.(safetensors|bin)$", name))
    if shards:
        raise DataError(f"{folder}: {shards[0]} is a shard, but there is no index.json that says what is where; copy that, too.")
    of_weights = sorted(name for name in names if Path(name).suffix in (".safetensors", ".pth", ".pt") and "optim" not in name)
    return _file(folder / of_weights[0]) if len(of_weights) == 1 else None


def _latest(folder: Path, names: set[str]) -> Checkpoint:
    """Of a run's folder the last checkpoint."""
    numbered = {name: int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))}
    written = sorted((path for path in folder.glob("*.ckpt")), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if numbered:
        last = folder / max(numbered, key=numbered.__getitem__)
    elif written:
        last = written[-1]
    elif inner := next((name for name in _INSIDE if name in names and (folder / name).is_dir()), None):
        last = folder / inner
    else:
        shown = ", ".join(sorted(names)[:5]) or "nothing"
        raise DataError(f"{folder}: expected a checkpoint ({READ}), found a folder with {shown}.")
    read, several = opened(last), len(numbered or written)
    read.notes.insert(0, f"{last.name} is the last of {several} checkpoints in the folder" if several > 1 else f"read from {last.name}")
    return read


def _adapter(folder: Path, names: set[str]) -> Checkpoint:
    """A folder of PEFT."""
    config = _json(folder / "adapter_config.json")
    named = next((name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in names), None)
    if named is None:
        raise DataError(f"{folder}: there is an adapter_config.json, but no adapter_model.safetensors or adapter_model.bin beside it.")
    found = _file(folder / named)
    found.kind = f"PEFT adapter ({config.get('peft_type', 'of an unknown type')}), {found.kind}"
    found.adapter = config
    found.paths.append(folder / "adapter_config.json")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.content(path, _MOST_JSON, "a JSON file"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is no JSON file, or it is cut off ({str(error)[:100]}).") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of a file are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
