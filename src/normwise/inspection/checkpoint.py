"""A checkpoint, whatever trainer wrote it: its tensors by name, in the order in which they lie, and what is to be said of it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from normwise import files
from normwise.errors import DataError, printable
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

    ``place`` is what was read, ``kind`` says of which format it is, ``notes`` are for the user, ``skipped`` says of what is not measured
    why, ``adapter`` is PEFT's configuration where the tensors are those of an adapter.
    """

    place: Path
    kind: str
    tensors: dict[str, Stored]
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
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
        """The files, where they lie, with their sizes and times: another content has another identity.

        Name, size and time of writing do not tell: archives that are made reproducible give every file one time. The last figure, which the
        system sets at each change and nobody else can, tells of a content that was put into the same file.
        """
        found = []
        for path in self.paths:
            try:
                at = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); it was there when the checkpoint was opened.") from error
            found.append([str(path.resolve()), at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns])
        return found


def opened(path: str | Path) -> Checkpoint:
    """A checkpoint by its file or folder.

    Raises:
        DataError: for nothing, for what is no checkpoint, is damaged, lacks a part, or would run code; nothing of it is run.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise DataError(f"a checkpoint is given by its path, a str or a pathlib.Path ({READ}); given {type(path).__name__}.")
    path = Path(path)
    kind = files.what_is(path)
    if kind == files.FOLDER:
        found = _folder(path)
    elif kind == files.FILE:
        found = _index(path) if path.name.endswith(".index.json") else _file(path)
    else:
        raise DataError(f"{path}: expected a checkpoint ({READ}), found {kind}.")
    if not found.tensors:
        left = [f"{name}: {why}" for name, why in found.skipped.items()] or found.notes
        raise DataError(f"{path}: there is no tensor of floating-point numbers in it{f'; {left[0]}' if left else ''}.")
    return found


def _file(path: Path) -> Checkpoint:
    found, notes, left = _read(path)
    if any(re.search(r"\.lora_(embedding_)?[AB](\.|$)", name) for name in found):
        notes.append("factors of LoRA without an adapter_config.json beside them, and so without their scale: each is measured by itself")
    return _made(path, _kind(path), found, notes, left, [path])


def _kind(path: Path) -> str:
    return "safetensors" if path.suffix == ".safetensors" else "torch file"


def _read(path: Path) -> tuple[dict[str, Stored], list[str], dict[str, str]]:
    """The weights of one file by their names in it, notes, and why some are not read."""
    read = _SUFFIXES.get(path.suffix)
    if read is None:
        raise DataError(f"{path}: expected a checkpoint ({READ}), found a file of another kind.")
    raw, left = read(path)
    return *formats.weights_among(raw), left


def _index(path: Path) -> Checkpoint:
    """Shards named by an index, all of which must be there."""
    where = _weight_map(path)
    shards = [path.parent / shard for shard in sorted(set(where.values()))]
    for shard in shards:
        if (kind := files.what_is(shard)) != files.FILE:
            raise DataError(f"{path}: the shard {shard.name} should stand beside it, where there is {kind}.")
    tensors: dict[str, Stored] = {}
    notes, skipped = list[str](), dict[str, str]()
    for shard in shards:
        found, said, left = _read(shard)
        there = {clean_name(name) for name in (*found, *left)}
        missing = [name for name, file in where.items() if file == shard.name and clean_name(name) not in there]
        if missing:
            raise DataError(f"{path}: {missing[0]} should be in {shard.name}, which does not have it.")
        # Where two shards have a name, the index says which one is meant.
        others = [name for name in found if where.get(name, shard.name) != shard.name]
        said += [f"left out: {name} of {shard.name}, which the index has in {where[name]}" for name in others[:3]]
        mine = {name: one for name, one in found.items() if name not in others}
        if twice := mine.keys() & tensors.keys():
            raise DataError(f"{path}: {min(twice)} is in two shards, and the index does not say which one is meant.")
        tensors |= mine
        skipped |= left
        notes += [note for note in said if note not in notes]
    return _made(path, f"{_kind(shards[0])}, {len(shards)} shards", tensors, notes, skipped, [path, *shards])


def _weight_map(path: Path) -> dict[str, str]:
    where = _json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in where.values()):
        raise DataError(f"{path}: this index has no weight_map of tensors to files beside it.")
    if not where:
        raise DataError(f"{path}: the weight_map of this index names no tensor.")
    return {printable(name): shard for name, shard in where.items()}


def _made(
    place: Path, kind: str, raw: dict[str, Stored], notes: list[str], left: Mapping[str, str], paths: list[Path]
) -> Checkpoint:
    """Cleans names, and sets aside what has no norms: integers, packed or quantised numbers, second names of a tensor."""
    found = Checkpoint(place, kind, {}, notes, {clean_name(name): why for name, why in left.items()}, paths=paths)
    lying: dict[tuple[Any, ...], str] = {}
    for name, one in _under_clean_names(raw, notes).items():
        one.name = name
        found.shapes[one.name] = one.shape
        at = (id(one.file), one.at, one.shape) if isinstance(one, InFile) and one.count else (id(one),)
        if at in lying:
            found.aliases[one.name] = lying[at]
        elif one.dtype not in REAL + EIGHT_BITS or not one.count:
            why = "empty" if not one.count else str(one.dtype).removeprefix("torch.")
            found.skipped[one.name] = f"{why}, which has no norm"
        else:
            lying[at] = one.name
            found.tensors[one.name] = one
    found.notes += [f"{name} is the same tensor as {first}" for name, first in list(found.aliases.items())[:3]]
    return found


def _under_clean_names(raw: dict[str, Stored], notes: list[str]) -> dict[str, Stored]:
    """Tensors without the traces of wrappers in their names; where two would have one name, both keep the file's."""
    times = Counter(map(clean_name, raw))
    kept = [name for name in raw if times[clean_name(name)] > 1]
    notes += [f"{', '.join(kept[:4])} differ in the traces of wrappers alone, and keep their names"] if kept else []
    return {name if times[clean_name(name)] > 1 else clean_name(name): one for name, one in raw.items()}


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(folder: Path) -> Checkpoint:
    """What a folder of a trainer, a hub or a distributed checkpoint is read by."""
    names = files.names_in(folder)
    if "adapter_config.json" in names:
        return _adapter(folder, names)
    named = next((name for name in _NAMED if name in names), None)
    if named == ".metadata":
        raw, left, paths = formats.distributed(folder)
        found, notes = formats.weights_among(raw)
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
    ends = [folder / name for name in names if name.endswith(".ckpt") and files.what_is(folder / name) == files.FILE]
    written = sorted(ends, key=lambda path: (path.stat().st_mtime_ns, path.name))
    if numbered:
        last = folder / max(numbered, key=numbered.__getitem__)
    elif written:
        last = written[-1]
    elif inner := next((name for name in _INSIDE if name in names and files.what_is(folder / name) == files.FOLDER), None):
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
    path = folder / named
    raw, notes, left = _read(path)
    kind = printable(str(config.get("peft_type", "of an unknown type"))[:40])
    found = _made(path, f"PEFT adapter ({kind}), {_kind(path)}", raw, notes, left, [path])
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
