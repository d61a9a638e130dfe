"""Image files as arrays: scikit-learn's digits, folders of parquet files, IDX files. Each either reads all of it or says why not."""

from __future__ import annotations

import gzip
import io
import math
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwise.errors import DataError
from normwise.tasks.cache import Arrays, cached

_GREY_MODES = frozenset({"1", "L", "LA"})
_IDX_NAMES = {"train": ("train",), "test": ("t10k", "test")}
_IDX_UBYTE = 0x08
MOST_BYTES = 1 << 30
"""Of one file once unpacked. The largest sets in these formats are half of that; what claims more is damaged, or made to fill a memory."""
_PIECE = 1 << 20
MOST_ROWS, MOST_PIXELS = 10_000_000, 1 << 24
_LAYOUT = "train*.parquet (and test*.parquet), or IDX files such as train-images-idx3-ubyte[.gz]"


@dataclass(frozen=True)
class Part:
    """Images as unsigned bytes ``(n, channels, height, width)`` and their labels ``(n,)`` from 0."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Part:
        """The given rows, copied."""
        return Part(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class RawImages:
    """What a source holds before it is split: ``test`` is None where the source has no test part of its own."""

    name: str
    train: Part
    test: Part | None


def read_digits() -> RawImages:
    """scikit-learn's bundled digits: 1797 grey images of 8×8 with values 0..16, no test part, no network."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return RawImages("digits", Part(images, bunch.target.astype(np.int64)), None)


def read_folder(folder: Path) -> RawImages:
    """Parquet files or IDX files under ``folder``.

    Parquet: ``train*.parquet`` and, if there is one, ``test*.parquet`` (several shards are joined in the order of their
    names) with the columns that Hugging Face ``datasets`` reads as an image set, ``image: {bytes, path}`` and an integer
    ``label``. IDX: MNIST's ``train-images-idx3-ubyte`` and its siblings, gzipped or not.

    Raises DataError for a folder without such files and for one that is missing, truncated or of another kind; also for a file that
    unpacks to more than 1 GiB, a parquet file of more than 10 million rows, and an image of more than 2²⁴ pixels, before it is unpacked.
    """
    files = _files(folder)
    for reader in (_parquet_part, _idx_part):
        train, test = reader(files, "train"), reader(files, "test")
        if train is not None:
            return RawImages(folder.resolve().name, train, test)
    names = ", ".join(path.name for path in files[:6]) or "no files"
    raise DataError(f"{folder}: found {names}; expected {_LAYOUT}.")


def _files(folder: Path) -> list[Path]:
    try:
        if folder.is_dir():
            return sorted(path for path in folder.rglob("*") if path.is_file())
        found = "a file" if folder.exists() else "nothing"
    except OSError as error:
        found = f"what cannot be read ({error.strerror})"
    raise DataError(f"{folder}: found {found}, expected a folder that holds {_LAYOUT}.")


def _parquet_part(files: list[Path], part: str) -> Part | None:
    shards = [path for path in files if path.suffix == ".parquet" and path.name.startswith(part)]
    return Part(*cached(shards, lambda: _decoded(shards))) if shards else None


def _decoded(shards: list[Path]) -> Arrays:
    images: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    for shard in shards:
        table = _parquet_table(shard)
        labels.append(_integer_labels(shard, table))
        images.extend(decode(shard, row, cell) for row, cell in enumerate(table.column("image").to_pylist()))
    return stack(shards[0], images), np.concatenate(labels)


def _parquet_table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = _bounded(path, pq.ParquetFile(path))
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a parquet file, found one that cannot be read ({first_line(error)}).") from None
    columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
    once = all(table.column_names.count(name) == 1 for name in ("image", "label"))
    is_image = once and pa.types.is_struct(table.schema.field("image").type)
    if not is_image or table.schema.field("image").type.get_field_index("bytes") < 0:
        raise DataError(f"{path}: expected the columns image: {{bytes, path}} and label: int, found {columns or 'none'}.")
    return table


def _bounded(path: Path, file: Any) -> Any:
    """The table of a file whose own account of itself is within bounds."""
    told = file.metadata
    size = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
    if not 0 <= told.num_rows <= MOST_ROWS or not 0 <= size <= MOST_BYTES:
        raise DataError(f"{path}: expected at most {MOST_ROWS} rows and {MOST_BYTES} bytes unpacked, found {told.num_rows} and {size}.")
    return file.read()


def _integer_labels(path: Path, table: Any) -> NDArray[np.int64]:
    labels = table.column("label").to_numpy()
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: expected whole numbers without gaps in the column label, found {labels.dtype}.")
    return labels.astype(np.int64)


def decode(path: Path, row: int, cell: Any) -> NDArray[np.uint8]:
    """One image as (channels, height, width): grey stays one channel, every other mode becomes RGB."""
    from PIL import Image, UnidentifiedImageError

    content = cell["bytes"] if cell else None
    if not isinstance(content, bytes) or not content:
        raise DataError(f"{path}: row {row} holds no image bytes; a parquet file must carry its images, not their paths.")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), Image.open(io.BytesIO(content)) as image:
            _check_size(image.size)
            pixels = np.asarray(image.convert("L" if image.mode in _GREY_MODES else "RGB"))
    except UnidentifiedImageError:
        raise DataError(f"{path}: the image in row {row} cannot be read (it is of no known format).") from None
    except Exception as error:    # Pillow's readers pass on what they stumble over, of no common class
        raise DataError(f"{path}: the image in row {row} cannot be read ({first_line(error)}).") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_size(size: tuple[int, int]) -> None:
    if not 1 <= size[0] * size[1] <= MOST_PIXELS:
        raise ValueError(f"it is {size[0]} by {size[1]} pixels, {MOST_PIXELS} at most are read")


def stack(path: Path, images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    sizes = {image.shape[1:] for image in images}
    if len(sizes) != 1:
        listed = ", ".join(f"{height}×{width}" for height, width in sorted(sizes)[:4]) or "no images"
        raise DataError(f"{path}: expected images of one size, found {listed}.")
    channels = max(len(image) for image in images)
    return np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])


def _idx_part(files: list[Path], part: str) -> Part | None:
    images, labels = (_idx_file(files, part, kind) for kind in ("images", "labels"))
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        have, lack = (labels, "images") if images is None else (images, "labels")
        raise DataError(f"{have}: found without its {part} {lack} beside it; expected a file such as {part}-{lack}-idx*-ubyte.")
    pixels, classes = _read_idx(images, dimensions=3), _read_idx(labels, dimensions=1)
    if len(pixels) != len(classes):
        raise DataError(f"{labels}: expected one label for each of the {len(pixels)} images, found {len(classes)}.")
    return Part(pixels[:, None], classes.astype(np.int64))


def _idx_file(files: Iterable[Path], part: str, kind: str) -> Path | None:
    prefixes = tuple(f"{name}-{kind}" for name in _IDX_NAMES[part])
    return next((path for path in files if path.name.startswith(prefixes) and "ubyte" in path.name), None)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    length = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(length)
            shape = _idx_shape(path, head, dimensions)
            content = _at_most(file, math.prod(shape) + 1)    # one more tells a file that is too long, and a bomb is not unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file, found one that is not ({first_line(error)}).") from None
    if len(content) != math.prod(shape):
        more = " or more" if len(content) > math.prod(shape) else ""
        raise DataError(f"{path}: expected {math.prod(shape)} bytes after its head, found {len(content)}{more}; the file is damaged.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _at_most(file: gzip.GzipFile | io.BufferedReader, size: int) -> bytearray:
    """Piece by piece, since one read takes the memory for all that it is asked for, whether it is there or not."""
    content = bytearray()
    while len(content) < size and (piece := file.read(min(size - len(content), _PIECE))):
        content += piece
    return content


def _idx_shape(path: Path, head: bytes, dimensions: int) -> tuple[int, ...]:
    if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, _IDX_UBYTE, dimensions]):
        raise DataError(f"{path}: expected an IDX file of bytes in {dimensions} dimensions, found the start {head[:4].hex()}.")
    shape = tuple(int(size) for size in np.frombuffer(head, ">u4", dimensions, offset=4))
    if not 1 <= math.prod(shape) <= MOST_BYTES:
        told = "×".join(map(str, shape))
        raise DataError(f"{path}: expected at least one and at most {MOST_BYTES} bytes after its head, which says {told}.")
    return shape


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
