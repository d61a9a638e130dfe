"""Data sets of the Hugging Face hub, or folders in its formats, through the library ``datasets`` (the extra of that name).

Columns are found by the type of their feature: the one ``Image``; the one ``ClassLabel``, or else the one whole number; the one
string. A source that has several of a kind is an error that lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from normwise.errors import DataError, need
from normwise.experiments.tasks.data.readers import MOST_BYTES, MOST_ROWS, MOST_TEXT, Images, Part, RawImages, Room, first_line
from normwise.files import content

__all__ = ["is_dataset", "name_of", "read_images", "read_text"]

_PREFIX = "hf:"
_ROWS_AT_ONCE = 64
_SAVED = ("dataset_dict.json", "dataset_info.json")
_SPLITS: tuple[str, ...] = ("train", "validation", "test")
_HELD_OUT = ("test", "validation")


def is_dataset(source: str | Path) -> bool:
    """Whether a source is ``hf:NAME``, ``hf:FOLDER``, or a folder written by ``save_to_disk``."""
    try:
        return str(source).startswith(_PREFIX) or any((Path(source) / name).is_file() for name in _SAVED)
    except OSError:    # a name that is too long, or a folder that may not be entered: who reads it says so
        return False


def name_of(source: str | Path) -> str:
    """``NAME`` of ``hf:NAME``, a folder's path as it is."""
    return str(source).removeprefix(_PREFIX)


def read_images(source: str | Path) -> RawImages:
    """Images and their labels; the test part is the split ``test``, or else ``validation``, or else None.

    Raises DataError for a data set that cannot be loaded, has no split ``train`` or no such columns.
    """
    splits = _splits(source)
    if "train" not in splits:
        raise DataError(f"{name_of(source)}: expected a split train, found {', '.join(splits) or 'none'}.")
    held_out = next((name for name in _HELD_OUT if name in splits), None)
    room = Room()
    test = _images(source, splits[held_out], room) if held_out else None
    return RawImages(name_of(source), _images(source, splits["train"], room), test)


def read_text(source: str | Path, most: int = MOST_TEXT) -> str:
    """The rows of the one string column, joined by line ends, of train, validation and test in this order; ``most`` characters at most."""
    splits = _splits(source)
    known = [name for name in _SPLITS if name in splits] or list(splits)
    columns = {
        name: _column(source, splits[name], "text", lambda f: getattr(f, "dtype", None) in ("string", "large_string")) for name in known
    }
    rows: list[str] = []
    size = 0
    for batch in (b[columns[name]] for name in known for b in splits[name].select_columns([columns[name]]).iter(_ROWS_AT_ONCE)):
        rows += (row for row in batch if row)
        size += sum(len(row) + 1 for row in batch if row)
        if size > most:
            raise DataError(f"{name_of(source)}: expected a text of {most} characters at most, found more.")
    return "\n".join(rows)


def _splits(source: str | Path) -> dict[str, Any]:
    """The splits by name; a folder that ``save_to_disk`` wrote of one split alone is its train split."""
    need("datasets", "datasets", what=str(source))
    import datasets

    name = name_of(source)
    try:
        saved = any((Path(name) / file).is_file() for file in _SAVED)
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # the library passes on what its readers, the network and its builders raise, of no common class
        raise DataError(f"{name}: datasets cannot load it ({first_line(error)}).") from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _images(source: str | Path, split: Any, room: Room) -> Part:
    import datasets

    if len(split) > MOST_ROWS:
        raise DataError(f"{name_of(source)}: expected at most {MOST_ROWS} rows, found {len(split)}.")
    image = _column(source, split, "image", lambda feature: isinstance(feature, datasets.Image))
    # The one ClassLabel, or else the one whole number.
    named = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
    column = named[0] if len(named) == 1 else _column(
        source, split, "label", lambda f: isinstance(f, datasets.ClassLabel) or str(getattr(f, "dtype", "")).startswith(("int", "uint"))
    )
    labels = np.asarray(split.with_format("numpy")[column][:])
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name_of(source)}: expected whole numbers without gaps in the column {column}, found {labels.dtype}.")
    path = Path(name_of(source))
    images, batches = Images(path, len(split), room), split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    for row, cell in enumerate(cell for batch in batches.iter(_ROWS_AT_ONCE) for cell in batch[image]):
        # Folders of image files keep paths, parquet files the bytes.
        on_disk = cell and not cell["bytes"] and cell["path"] and Path(cell["path"]).is_file()
        images.add(path, row, {"bytes": content(cell["path"], MOST_BYTES, "an image")} if on_disk else cell)
    room.take(path, images.finished().size)
    return Part(images.finished(), labels.astype(np.int64))


def _column(source: str | Path, split: Any, wanted: str, fits: Callable[[Any], bool]) -> str:
    """The one column whose feature fits, or among several the one that is called as wanted."""
    found = [name for name, feature in split.features.items() if fits(feature)]
    if len(found) != 1 and wanted not in found:
        listed: Iterable[str] = (f"{name}: {getattr(feature, 'dtype', feature)}" for name, feature in split.features.items())
        raise DataError(f"{name_of(source)}: expected one column of kind {wanted}, or one called so, found {', '.join(listed)}.")
    return found[0] if len(found) == 1 else wanted
