"""Image files as arrays: scikit-learn's digits, folders of parquet files, IDX files. Each either reads all of it or says why not."""

from __future__ import annotations

import gzip
import io
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from normwise.errors import DataError, need
from normwise.experiments.tasks.data.cache import Arrays, cached
from normwise.experiments.tasks.data.parquet_pages import unpacked_size
from normwise.files import content, opened, what_is

_GREY_MODES = frozenset({"1", "L", "LA"})
_IDX_NAMES = {"train": ("train",), "test": ("t10k", "test")}
_IDX_UBYTE = 0x08
# Of all images of a source once they are decoded, one byte a pixel and channel. The largest sets in these formats are half of that; what
# claims more is damaged, or made to fill a memory. `$NORMWISE_MOST_BYTES` allows more.
MOST_BYTES = 1 << 30
# Bytes or characters of a text; its numbers take eight times as much memory, as much as images may.
MOST_TEXT = 1 << 27
_PIECE = 1 << 20
MOST_ROWS, MOST_PIXELS = 10_000_000, 1 << 24
_MOST_ENCODED = 1 << 26    # bytes of one encoded image, and of the rows that are taken from a file at a time
# The formats that are read, by how a file of each begins. Pillow knows more, some of which start other programs (EPS: Ghostscript).
_STARTS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",), "JPEG": (b"\xff\xd8\xff",), "GIF": (b"GIF87a", b"GIF89a"), "BMP": (b"BM",), "WEBP": (b"RIFF",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "PPM": tuple(b"P%d" % n for n in range(1, 7)),
}  # fmt: skip
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
    need("study", "sklearn", what="reading the bundled digits")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return RawImages("digits", Part(images, bunch.target.astype(np.int64)), None)


def read_folder(folder: Path) -> RawImages:
    """Parquet files or IDX files under ``folder``.

    Parquet: ``train*.parquet`` and, if there is one, ``test*.parquet`` (several shards are joined in the order of their
    names) with the columns that Hugging Face ``datasets`` reads as an image set, ``image: {bytes, path}`` and an integer
    ``label``. IDX: MNIST's ``train-images-idx3-ubyte`` and its siblings, gzipped or not.

    Raises DataError for a folder without such files and for one that is missing, truncated or of another kind; also, before anything is
    decoded, for images that take more than 1 GiB in all (see ``MOST_BYTES``), a parquet file of more than 10 million rows, an image of more
    than 2²⁴ pixels, and one that is no PNG, JPEG, GIF, BMP, WebP, TIFF or PPM.
    """
    files, room = _files(folder), Room()
    for reader in (_parquet_part, _idx_part):
        train, test = reader(files, "train", room), reader(files, "test", room)
        if train is not None:
            return RawImages(folder.resolve().name, train, test)
    names = ", ".join(path.name for path in files[:6]) or "no files"
    raise DataError(f"{folder}: found {names}; expected {_LAYOUT}.")


def read_one(source: str | Path, ending: str, kind: str) -> tuple[Path, str]:
    """The file that a source is, or the only one under a folder whose name ends so, and its text. kind: of file, in words.

    Raises DataError for a source that is missing or unreadable, a folder with none or several, more than 128 MiB, and what is not UTF-8.
    """
    path = Path(source)
    try:
        if path.is_dir():
            found = sorted(file for file in path.rglob(f"*{ending}") if file.is_file())
            if len(found) != 1:
                names = ", ".join(file.name for file in found[:4]) or "none"
                raise DataError(f"{path}: expected a folder with one *{ending}, found {names}; name the file itself.")
            path = found[0]
        elif not path.is_file():
            raise DataError(f"{path}: found {what_is(path)}, expected a {kind} file or a folder with one *{ending}.")
        return path, content(path, MOST_TEXT, f"a {kind} file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x} at {error.start}.") from None
    except OSError as error:
        raise DataError(f"{source}: expected a readable {kind} file ({error.strerror}).") from None


def _files(folder: Path) -> list[Path]:
    try:
        if folder.is_dir():
            return sorted(path for path in folder.rglob("*") if path.is_file())
        found = "a file" if folder.exists() else "nothing"
    except OSError as error:
        found = f"what cannot be read ({error.strerror})"
    raise DataError(f"{folder}: found {found}, expected a folder that holds {_LAYOUT}.")


class Room:
    """What the images of a source may take when they are decoded, training and test part together."""

    def __init__(self) -> None:
        told = os.environ.get("NORMWISE_MOST_BYTES", "")
        if told and not (told.isdecimal() and int(told[:30]) > 0):
            raise DataError(f"NORMWISE_MOST_BYTES is {told[:40]!r}, but must be a whole number of bytes >= 1.")
        self.most = int(told[:30]) if told else MOST_BYTES
        self.taken = 0

    def check(self, path: Path | str, size: int) -> None:
        """DataError where ``size`` bytes more are too many."""
        if self.taken + size > self.most:
            before = f" beside the {self.taken} of other parts" if self.taken else ""
            raise DataError(
                f"{path}: expected images of at most {self.most} bytes in all once decoded, found {size}{before}. "
                "Where that is meant, set NORMWISE_MOST_BYTES to what they may take."
            )

    def take(self, path: Path | str, size: int) -> None:
        """The same, and from now on they count."""
        self.check(path, size)
        self.taken += size


class Images:
    """Images of one size, decoded one by one into one array. What they will take is known, and checked, from the head of the first.

    rows: how many there will be. They have as many channels as the one with the most: grey ones among colour ones are repeated.
    """

    def __init__(self, path: Path, rows: int, room: Room) -> None:
        self.path, self.rows, self.room, self.row = path, rows, room, 0
        self.array: NDArray[np.uint8] = np.empty((0, 0, 0, 0), np.uint8)

    def add(self, path: Path, row: int, cell: Any) -> None:
        """The next image. path and row: for the error."""
        with _opened(path, row, cell) as image:
            width, height = image.size
            channels = 1 if image.mode in _GREY_MODES else 3
            had, *size = self.array.shape[1:]
            if self.row and size != [height, width]:
                listed = ", ".join(f"{h}×{w}" for h, w in sorted([tuple(size), (height, width)]))
                raise DataError(f"{self.path}: expected images of one size, found {listed}.")
            if channels > had:
                self.room.check(path, self.rows * channels * height * width)
                wider = np.empty((self.rows, channels, height, width), np.uint8)
                if self.row:
                    wider[: self.row] = self.array[: self.row]
                self.array = wider
            if self.row == self.rows:
                raise DataError(f"{path}: expected {self.rows} rows, found more; the file is damaged.")
            self.array[self.row] = _pixels(path, row, image)
        self.row += 1

    def finished(self) -> NDArray[np.uint8]:
        """All of them, ``(n, channels, height, width)``."""
        if not self.row:
            raise DataError(f"{self.path}: expected images of one size, found no images.")
        if self.row < self.rows:
            raise DataError(f"{self.path}: expected {self.rows} rows, found {self.row}; the file is damaged.")
        return self.array


def _parquet_part(files: list[Path], part: str, room: Room) -> Part | None:
    shards = [path for path in files if path.suffix == ".parquet" and path.name.startswith(part)]
    if not shards:
        return None
    found = Part(*cached(shards, lambda: _decoded(shards, room)))
    room.take(shards[0], found.images.size)
    return found


def _decoded(shards: list[Path], room: Room) -> Arrays:
    rows, most = 0, max(room.most, MOST_BYTES)
    for shard in shards:    # all of them are looked at before one is read
        with _parquet_file(shard) as table:
            rows += table.metadata.num_rows
    images, labels, encoded = Images(shards[0], rows, room), [np.empty(0, np.int64)], 0
    for shard, row, cell, label in _cells(shards):
        encoded += len(cell["bytes"] or b"") if cell else 0
        if encoded > most:
            raise DataError(f"{shard}: expected encoded images of at most {most} bytes in all, found more.")
        if label is not None:
            labels.append(label)
        images.add(shard, row, cell)
    return images.finished(), np.concatenate(labels)


def _cells(shards: list[Path]) -> Iterator[tuple[Path, int, Any, NDArray[np.int64] | None]]:
    """Shard, row and cell of the column image, and with the first cell of each batch the batch's labels."""
    for shard in shards:
        with _parquet_file(shard) as table:
            yield from ((shard, row, *found) for row, found in enumerate(_rows(shard, table)))


def _rows(path: Path, table: Any) -> Iterator[tuple[Any, NDArray[np.int64] | None]]:
    batches = table.iter_batches(_rows_at_once(table), columns=["image.bytes", "label"])
    while True:
        with _parquet_errors(path):
            batch = next(batches, None)
        if batch is None:
            return
        found = batch.column(batch.schema.get_field_index("label")).to_numpy(zero_copy_only=False)
        if found.dtype.kind not in "iu":
            raise DataError(f"{path}: expected whole numbers without gaps in the column label, found {found.dtype}.")
        labels: NDArray[np.int64] | None = found.astype(np.int64)
        for cell in batch.column(batch.schema.get_field_index("image")):
            yield cell.as_py(), labels
            labels = None


def _rows_at_once(table: Any) -> int:
    """So many that they cannot take much memory together. A file may hold one image and say that a million rows have it: only without
    such encodings rows take no more than the file says."""
    unsure = [c.total_uncompressed_size for c in _chunks(table.metadata) if not set(c.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}]
    largest = max(unsure, default=0)
    return min(1024, max(1, _MOST_ENCODED // largest)) if largest else 256


def _chunks(told: Any) -> list[Any]:
    """The column chunks that a parquet file's own account lists."""
    return [told.row_group(group).column(column) for group in range(told.num_row_groups) for column in range(told.num_columns)]


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """One DataError for whatever pyarrow raises."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a parquet file, found one that cannot be read ({first_line(error)}).") from None


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """The file, not read yet, with the right columns and its own account of itself within bounds."""
    need("study", "pyarrow", "PIL", what="reading a parquet file")
    import pyarrow.parquet as pq

    with opened(path, "a parquet file") as plain:
        with _parquet_errors(path):
            file = pq.ParquetFile(plain)
            _check_account(path, file.metadata, file.schema_arrow)
            _check_pages(plain, file.metadata)
        yield file


def _check_pages(plain: BinaryIO, told: Any) -> None:
    """ValueError where the pages that are read unpack to more than the file's account says."""
    for chunk in (chunk for chunk in _chunks(told) if chunk.path_in_schema in ("image.bytes", "label")):
        size = unpacked_size(plain, chunk)
        if size > chunk.total_uncompressed_size:
            raise ValueError(f"its pages unpack to {size} bytes, and it says {chunk.total_uncompressed_size}")


def _check_account(path: Path, told: Any, schema: Any) -> None:
    import pyarrow as pa

    size = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
    if not 0 <= told.num_rows <= MOST_ROWS or not 0 <= size <= MOST_BYTES:
        raise DataError(f"{path}: expected at most {MOST_ROWS} rows and {MOST_BYTES} bytes unpacked, found {told.num_rows} and {size}.")
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    once = all(schema.names.count(name) == 1 for name in ("image", "label"))
    is_image = once and pa.types.is_struct(schema.field("image").type)
    if not is_image or schema.field("image").type.get_field_index("bytes") < 0:
        raise DataError(f"{path}: expected the columns image: {{bytes, path}} and label: int, found {columns or 'none'}.")


@contextmanager
def _opened(path: Path, row: int, cell: Any) -> Iterator[Any]:
    """The image in a cell with its head read and its pixels not: of a format that is read, and not too large."""
    from PIL import Image

    content = cell["bytes"] if cell else None
    if not isinstance(content, bytes) or not content:
        raise DataError(f"{path}: row {row} holds no image bytes; a parquet file must carry its images, not their paths.")
    kind = next((kind for kind, starts in _STARTS.items() if content.startswith(starts)), None)
    if kind is None or (kind == "WEBP" and content[8:12] != b"WEBP"):
        known = ", ".join(_STARTS)
        raise DataError(f"{path}: the image in row {row} cannot be read (it is of no known format; {known} are read).")
    if len(content) > _MOST_ENCODED:
        raise DataError(f"{path}: the image in row {row} cannot be read (it has {len(content)} bytes, {_MOST_ENCODED} at most are read).")
    with _image_errors(path, row), warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        image = Image.open(io.BytesIO(content), formats=(kind,))
        width, height = image.size
        if not 1 <= width * height <= MOST_PIXELS:
            raise ValueError(f"it is {width} by {height} pixels, {MOST_PIXELS} at most are read")
    with image:
        yield image


def _pixels(path: Path, row: int, image: Any) -> NDArray[np.uint8]:
    """An open image as (channels, height, width): grey stays one channel, every other mode becomes RGB."""
    with _image_errors(path, row):
        pixels = np.asarray(image.convert("L" if image.mode in _GREY_MODES else "RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@contextmanager
def _image_errors(path: Path, row: int) -> Iterator[None]:
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise DataError(f"{path}: the image in row {row} cannot be read (it is of no known format).") from None
    except Exception as error:    # Pillow's readers pass on what they stumble over, of no common class
        raise DataError(f"{path}: the image in row {row} cannot be read ({first_line(error)}).") from None


def _idx_part(files: list[Path], part: str, room: Room) -> Part | None:
    def named(kind: str) -> Path | None:
        prefixes = tuple(f"{name}-{kind}" for name in _IDX_NAMES[part])
        return next((path for path in files if path.name.startswith(prefixes) and "ubyte" in path.name), None)

    images, labels = named("images"), named("labels")
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        have, lack = (labels, "images") if images is None else (images, "labels")
        raise DataError(f"{have}: found without its {part} {lack} beside it; expected a file such as {part}-{lack}-idx*-ubyte.")
    pixels, classes = _read_idx(images, 3, room), _read_idx(labels, 1, room)
    if len(pixels) != len(classes):
        raise DataError(f"{labels}: expected one label for each of the {len(pixels)} images, found {len(classes)}.")
    return Part(pixels[:, None], classes.astype(np.int64))


def _read_idx(path: Path, dimensions: int, room: Room) -> NDArray[np.uint8]:
    try:
        with opened(path, "an IDX file") as plain, gzip.open(plain) if path.suffix == ".gz" else plain as file:
            shape = _idx_shape(path, file.read(4 + 4 * dimensions), dimensions, room)
            content = _at_most(file, math.prod(shape) + 1)    # one more tells a file that is too long, and a bomb is not unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file, found one that is not ({first_line(error)}).") from None
    if len(content) != (size := math.prod(shape)):
        more = " or more" if len(content) > size else ""
        raise DataError(f"{path}: expected {size} bytes after its head, found {len(content)}{more}; the file is damaged.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _at_most(file: gzip.GzipFile | BinaryIO, size: int) -> bytearray:
    """Piece by piece, since one read takes the memory for all that it is asked for, whether it is there or not."""
    content = bytearray()
    while len(content) < size and (piece := file.read(min(size - len(content), _PIECE))):
        content += piece
    return content


def _idx_shape(path: Path, head: bytes, dimensions: int, room: Room) -> tuple[int, ...]:
    if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, _IDX_UBYTE, dimensions]):
        raise DataError(f"{path}: expected an IDX file of bytes in {dimensions} dimensions, found the start {head[:4].hex()}.")
    shape = tuple(int(size) for size in np.frombuffer(head, ">u4", dimensions, offset=4))
    if not 1 <= math.prod(shape) <= room.most:
        told = "×".join(map(str, shape))
        raise DataError(f"{path}: expected at least one and at most {room.most} bytes after its head, which says {told}.")
    room.take(path, math.prod(shape))
    return shape


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
