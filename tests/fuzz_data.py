"""Broken and odd data from a seed: folders of parquet and IDX files, texts, files of finished runs. Equal seeds give equal bytes."""

from __future__ import annotations

import gzip
import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
GREY: Bytes = np.random.default_rng(5).integers(0, 256, (30, 9, 8), dtype=np.uint8)
LABELS = np.arange(30, dtype=np.int64) % 3
TRAIN = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def encoded(pixels: Bytes, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def flip(rnd: random.Random, content: bytes, least: int = 0) -> bytes:
    """Cut, or with some bytes changed, put in or left out from ``least`` on."""
    if rnd.random() < 0.3:
        return content[: rnd.randrange(len(content) + 1)]
    spoilt = bytearray(content)
    for _ in range(rnd.choice([1, 1, 3, 20])):
        at = rnd.randrange(min(least, len(spoilt) - 1), len(spoilt)) if spoilt else 0
        spoilt[at : at + rnd.randrange(2)] = rnd.randbytes(rnd.choice([1, 1, 1, 0, 5]))
    return bytes(spoilt)


# ------------------------------------------------------------------------------------------------------------- parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(path: Path, images: Any = None, labels: Any = None, kind: Any = IMAGE) -> None:
    cells = [{"bytes": encoded(i), "path": "x.png"} for i in GREY] if images is None else images
    columns = {"image": pa.array(cells, kind), "label": pa.array(LABELS) if labels is None else labels}
    pq.write_table(pa.table(columns), path)


def parquet_bytes_spoilt(rnd: random.Random, folder: Path) -> None:
    file = folder / "train.parquet"
    parquet(file)
    file.write_bytes(flip(rnd, file.read_bytes()))


def parquet_images_spoilt(rnd: random.Random, folder: Path) -> None:
    kind = rnd.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
    images = [encoded(i, kind) for i in GREY]
    for at in rnd.sample(range(len(images)), 3):
        images[at] = flip(rnd, images[at])
    parquet(folder / "train.parquet", [{"bytes": i, "path": "x"} for i in images])


def parquet_columns_wrong(rnd: random.Random, folder: Path) -> None:
    image, label = pa.array([{"bytes": encoded(i), "path": ""} for i in GREY], IMAGE), pa.array(LABELS)
    odd: list[Any] = [
        {}, {"image": image}, {"label": label}, {"image": label, "label": image}, {"image": image, "label": image},
        {"image": image, "label": pa.array([float("nan")] * 30)}, {"image": image, "label": pa.array(["a"] * 30)},
        {"image": image, "label": pa.array([None] * 30, pa.int64())}, {"image": image, "label": pa.array([-1] * 30)},
        {"image": image, "label": pa.array([2**62] * 30)}, {"image": image, "label": pa.array([2**64 - 1] * 30, pa.uint64())},
        {"image": image, "label": pa.array([10**9] * 10 + [0] * 20)}, {"image": image, "label": pa.array([[0]] * 30)},
        {"image": image, "label": pa.array([True, False] * 15)}, {"image": image, "label": pa.array([0] * 30)},
        {"image": image, "label": pa.array([0, 5] * 15)}, {"image": image.slice(0, 0), "label": label.slice(0, 0)},
        {"image": image, "label": pa.array([0] * 30, pa.timestamp("s"))}, {"image": image, "label": label.dictionary_encode()},
        {"image": pa.array([None] * 30, IMAGE), "label": label}, {"image": pa.array([{"bytes": b"", "path": "x"}] * 30, IMAGE),
        "label": label},
        {"image": pa.array([{"bytes": "text", "path": "x"}] * 30), "label": label}, {"image": pa.array([{"bytes": 7}] * 30),
        "label": label},
        {"image": pa.array([{"bytes": [1, 2]}] * 30), "label": label}, {"image": pa.array([{"path": "x"}] * 30), "label": label},
    ]  # fmt: skip
    pq.write_table(pa.table(rnd.choice(odd)), folder / "train.parquet")


def parquet_columns_twice(_: random.Random, folder: Path) -> None:
    image, label = pa.array([{"bytes": encoded(i), "path": ""} for i in GREY], IMAGE), pa.array(LABELS)
    pq.write_table(pa.Table.from_arrays([image, image, label], names=["image", "image", "label"]), folder / "train.parquet")


def parquet_image_bomb(rnd: random.Random, folder: Path) -> None:
    """Few bytes that claim to be very many pixels."""
    side = rnd.choice([5_000, 20_000, 60_000])
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + side.to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00" + b"\x00" * 4
    bomb = rnd.choice([head, f"P5 {side} {side} 255\n".encode(), b"BM" + b"\x00" * 12 + b"\x28\x00\x00\x00" + side.to_bytes(4,
        "little") * 2])
    parquet(folder / "train.parquet", [{"bytes": bomb, "path": "x"}] * 30)


def parquet_repeats(_: random.Random, folder: Path) -> None:
    """One image of a megabyte, told two thousand times: a dictionary makes a small file of it."""
    cell = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000_000, np.int32)), pa.array(["x"]))
    pq.write_table(pa.table({"image": cell, "label": pa.array(np.zeros(20_000_000, np.int8))}), folder / "train.parquet")


# ----------------------------------------------------------------------------------------------------------------- IDX


def idx(shape: tuple[int, ...], content: bytes, kind: int = 8, dimensions: int | None = None) -> bytes:
    head = bytes([0, 0, kind, len(shape) if dimensions is None else dimensions])
    return head + b"".join(int(n).to_bytes(4, "big") for n in shape) + content


def write_idx(folder: Path, images: bytes, labels: bytes | None = None, suffix: str = "") -> None:
    for name, content in zip(TRAIN, (images, labels or idx((30,), LABELS.astype(np.uint8).tobytes())), strict=True):
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content, 1) if suffix else content)


def idx_head_lies(rnd: random.Random, folder: Path) -> None:
    big = [2**31, 2**32 - 1, 2**16, 0, 1, 30, 31]
    shape = tuple(rnd.choice(big) for _ in range(3))
    labels = rnd.choice([None, idx((shape[0],), b""), idx((2**32 - 1,), bytes(30))])
    write_idx(folder, idx(shape, GREY.tobytes()), labels, rnd.choice(["", ".gz"]))


def idx_spoilt(rnd: random.Random, folder: Path) -> None:
    content = idx(GREY.shape, GREY.tobytes())
    broken = rnd.choice([flip(rnd, content[:20]) + content[20:], flip(rnd, content), b"", content * 2, idx((30, 72), GREY.tobytes())])
    write_idx(folder, broken, rnd.choice([None, flip(rnd, idx((30,), bytes(30))), idx((30,), bytes([255] * 30))]), rnd.choice(["", ".gz"]))


def idx_gzip_spoilt(rnd: random.Random, folder: Path) -> None:
    write_idx(folder, idx(GREY.shape, GREY.tobytes()), suffix=".gz")
    file = folder / f"{TRAIN[0]}.gz"
    file.write_bytes(rnd.choice([flip(rnd, file.read_bytes()), idx(GREY.shape, GREY.tobytes()), b"\x1f\x8b", file.read_bytes() * 2]))


def idx_bomb(rnd: random.Random, folder: Path) -> None:
    """A hundred megabytes of zeros in a hundred kilobytes, behind a head that says less, more, or the truth beyond the limit."""
    shape = rnd.choice([(30, 9, 8), (2**20, 10, 10), (2**31, 1, 1)])
    write_idx(folder, idx(shape, bytes(100 << 20)), suffix=".gz")


def idx_parts(rnd: random.Random, folder: Path) -> None:
    write_idx(folder, idx(GREY.shape, GREY.tobytes()))
    (folder / rnd.choice(TRAIN)).unlink()
    if rnd.random() < 0.5:
        (folder / "t10k-images-idx3-ubyte").write_bytes(idx(GREY.shape, GREY.tobytes()))


def idx_odd_sizes(rnd: random.Random, folder: Path) -> None:
    shape = rnd.choice([(30, 1, 1), (30, 1, 72), (30, 2, 2), (30, 3, 3), (30, 4, 200), (30, 0, 0), (2, 9, 8)])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(folder, idx(shape, pixels.tobytes()), idx((shape[0],), bytes(i % 3 for i in range(shape[0]))))


# ------------------------------------------------------------------------------------------------------------- folders


def odd_folder(rnd: random.Random, folder: Path) -> None:
    kind = rnd.randrange(7)
    if kind == 1:
        (folder / "train.parquet").mkdir()
    if kind == 2:
        (folder / "train.parquet").symlink_to("train.parquet")
    if kind == 3:
        (folder / "again").symlink_to(".")
        (folder / "up").symlink_to("..")
    if kind == 4:
        (folder / TRAIN[0]).symlink_to("/nowhere/at/all")
        (folder / TRAIN[1]).mkdir()
    if kind == 5:
        (folder / "dataset_info.json").write_bytes(rnd.choice([b"", b"{", b"[]", b"{}", b"\xff"]))
    if kind == 6:
        for name in ("train.parquet", "a.txt", "b.txt", "test.parquet"):
            (folder / name).write_bytes(b"")


def saved_dataset(rnd: random.Random, folder: Path) -> None:
    """What ``save_to_disk`` leaves, with something of it spoilt."""
    told = b'{"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}'
    state = b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "a"}'
    (folder / "dataset_info.json").write_bytes(flip(rnd, told))
    (folder / "state.json").write_bytes(flip(rnd, state))
    (folder / "data-00000-of-00001.arrow").write_bytes(rnd.randbytes(200))


IMAGES: list[Callable[[random.Random, Path], None]] = [
    parquet_bytes_spoilt, parquet_images_spoilt, parquet_columns_wrong, idx_head_lies, idx_spoilt, idx_gzip_spoilt, idx_parts,
    idx_odd_sizes,
    odd_folder, parquet_columns_wrong, parquet_image_bomb, parquet_bytes_spoilt, parquet_columns_twice, parquet_images_spoilt,
]  # fmt: skip


def image_folder(seed: int, folder: Path) -> str:
    """Writes the folder of a seed; the name of what is wrong with it."""
    make = IMAGES[seed % len(IMAGES)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(random.Random(seed), folder)
    return make.__name__


# ---------------------------------------------------------------------------------------------------------------- text


def text_file(seed: int, folder: Path) -> Path:
    """A text, or what stands in its place."""
    rnd = random.Random(seed)
    path, long = folder / "text.txt", "the quick brown fox \n" * 600
    contents: list[bytes] = [
        b"", b"x", b"\x00", b"\x00" * 20_000, b"\xff" * 20_000, long.encode("utf-16"), long.encode("utf-32"), flip(rnd, long.encode()),
        "\U0001f600".encode() * 3000, b"\xed\xa0\x80" * 5000, long.encode() + b"\xc3", b"\xef\xbb\xbf" + long.encode(), b"a" * 9_999,
        b"a" * 10_000, rnd.randbytes(30_000), b"\r\n" * 6000, gzip.compress(long.encode()),
    ]  # fmt: skip
    kind = seed % (len(contents) + 5)
    if kind < len(contents):
        path.write_bytes(contents[kind])
    elif kind == len(contents):
        path.mkdir()
    elif kind == len(contents) + 1:
        path.symlink_to("text.txt")
    elif kind == len(contents) + 2:
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text(long)
        return folder
    elif kind == len(contents) + 3:
        with path.open("wb") as file:
            file.truncate(1 << 40)    # a file with a hole: it takes no room on the disk
    return path


# ------------------------------------------------------------------------------------------------------- finished runs


def state_file(seed: int, sound: bytes) -> bytes:
    """The lines of finished runs, spoilt."""
    rnd = random.Random(seed)
    lines = sound.split(b"\n")
    odd = rnd.choice([
        b"[" * 100_000, b'{"key": [], "settings": {}, "result": {}}', b'{"key": "a"}', b'{"key": "a", "settings": 3, "result": {}}',
        b"null",
        b'{"key": "a", "settings": {}, "result": 3}', b"\xff\xfe", b"\x00" * 100, b"9" * 10_000, b'{"key": NaN}', b'"', b"{" * 50_000,
        b"\x85",
        b'{"key": "a", "settings": {"kind": []}, "result": []}', b"",
    ])  # fmt: skip
    kind = rnd.randrange(6)
    if kind == 0:
        return odd
    if kind == 1:
        return b"\n".join([*lines, odd])
    if kind == 2:
        return flip(rnd, sound)
    at = rnd.randrange(len(lines))
    if kind == 3 and lines[at]:
        entry = json.loads(lines[at])
        entry[rnd.choice(["key", "settings", "result", "sum"])] = rnd.choice([None, 3, [], {}, "x", {"validation_accuracy": "x"}])
        lines[at] = json.dumps(entry).encode()
    elif kind == 4:
        lines[at : at + 1] = [lines[at], odd, lines[at]]
    else:
        lines[at] = flip(rnd, lines[at] or b"x")
    return b"\n".join(lines)
