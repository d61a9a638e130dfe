"""Images come back as they were written, in three disjoint parts, and a file that is damaged or of another kind is told in one sentence."""

from __future__ import annotations

import gzip
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from normwise.errors import DataError
from normwise.experiments.tasks.data.readers import Part, read_folder
from normwise.experiments.tasks.data.splits import load

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (30, 9, 8), dtype=np.uint8)
LABELS = np.arange(30, dtype=np.int64) % 3


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: object) -> None:
    cells = [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(cells, kind), "label": pa.array(labels)}), path)


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, part: str, images: NDArray[np.uint8], labels: NDArray[np.int64], pack: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in (("images-idx3", idx(images)), ("labels-idx1", idx(labels.astype(np.uint8)))):
        name = folder / f"{part}-{kind}-ubyte{'.gz' if pack else ''}"
        name.write_bytes(gzip.compress(content) if pack else content)


def counted(*parts: Part) -> Counter[tuple[bytes, int]]:
    return Counter((image.tobytes(), int(label)) for part in parts for image, label in zip(part.images, part.labels, strict=True))


# ----------------------------------------------------------------------------------------------------------- the split


def test_the_three_parts_of_the_digits_are_all_of_them_once() -> None:
    bunch = load_digits()
    everything = Counter((image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True))
    data = load()
    assert counted(data.train, data.validation, data.test) == everything
    assert (len(data.test), len(data.validation)) == (359, 359)
    assert (data.shape, data.classes, data.own_test) == ((1, 8, 8), 10, False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_class_has_its_share_in_each_part(seed: int) -> None:
    data = load(seed=seed)
    totals = np.bincount(load_digits().target)
    for part in (data.train, data.validation, data.test):
        share = totals * len(part) / totals.sum()
        assert np.abs(np.bincount(part.labels) - share).max() <= 2  # one for each of the two cuts


def test_the_split_is_the_seeds() -> None:
    assert load(seed=3).key == load(seed=3).key != load(seed=4).key


def test_a_thinned_training_part_is_a_stratified_part_of_it() -> None:
    data = load()
    few = data.thinned(200)
    assert len(few.train) == 200
    assert not counted(few.train) - counted(data.train)
    assert np.abs(np.bincount(few.train.labels) - 200 * np.bincount(data.train.labels) / len(data.train)).max() <= 1
    assert (few.test, few.validation, few.available) == (data.test, data.validation, len(data.train))
    assert few.key != data.key
    assert data.thinned(None) is data.thinned(10**6) is data


def test_all_parts_are_standardised_with_the_training_part() -> None:
    data = load()
    reference = data.train.images.astype(np.float64)
    for part in ("train", "validation", "test"):
        images, labels = data.tensors(part)
        given = getattr(data, part)
        assert np.allclose(images.numpy(), (given.images - reference.mean()) / reference.std(), atol=1e-6)
        assert (labels.numpy() == given.labels).all()


def test_a_constant_image_set_is_not_divided_by_zero(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", np.full_like(GREY, 7), LABELS)
    assert load(tmp_path).tensors("train")[0].abs().max() == 0


# ------------------------------------------------------------------------------------------------------- what is read


def test_parquet_shards_come_back_as_written(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [png(image) for image in GREY[:20]], LABELS[:20])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [png(image) for image in GREY[20:]], LABELS[20:])
    raw = read_folder(tmp_path)
    assert (raw.train.images == GREY[:, None]).all()
    assert (raw.train.labels == LABELS).all()
    assert raw.test is None


def test_colour_images_keep_their_channels_and_grey_ones_among_them_are_repeated(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (29, 9, 8, 3), dtype=np.uint8)
    write_parquet(tmp_path / "train.parquet", [png(GREY[0]), *map(png, colour)], LABELS)
    images = read_folder(tmp_path).train.images
    assert images.shape == (30, 3, 9, 8)
    assert (images[1:] == colour.transpose(0, 3, 1, 2)).all()
    assert (images[0] == GREY[0][None]).all()


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files_come_back_as_written_and_keep_their_own_test_part(tmp_path: Path, pack: bool) -> None:
    write_idx(tmp_path, "train", GREY, LABELS, pack)
    write_idx(tmp_path, "t10k", GREY[:5], LABELS[:5], pack)
    data = load(tmp_path)
    assert data.own_test
    assert (data.test.images == GREY[:5, None]).all()
    assert (data.test.labels == LABELS[:5]).all()
    assert counted(data.train, data.validation) == Counter((i.tobytes(), int(n)) for i, n in zip(GREY, LABELS, strict=True))


def mnist() -> Path | None:
    places = [os.environ.get("NORMWISE_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    found = (Path(place) / "mnist" for place in places if place)
    return next((folder for folder in found if folder.is_dir()), None)


@pytest.mark.long
@pytest.mark.skipif(mnist() is None, reason="MNIST is not here; NORMWISE_DATA may name the folder that holds mnist/")
def test_mnist_as_parquet() -> None:
    data = load(mnist())
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    assert (data.shape, data.classes) == ((1, 28, 28), 10)
    assert np.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.images.mean() == pytest.approx(33.3, abs=0.2)


# ----------------------------------------------------------------------------------------------------------- bad input


def parquet_pngs(folder: Path, labels: object = LABELS, **change: bytes | None) -> None:
    images: list[bytes | None] = [png(image) for image in GREY]
    for row, content in change.items():
        images[int(row.removeprefix("row"))] = content
    write_parquet(folder / "train.parquet", images, labels)


def truncated_parquet(folder: Path) -> None:
    parquet_pngs(folder)
    content = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(content[: len(content) // 2])


def other_columns(folder: Path) -> None:
    pq.write_table(pa.table({"image": [1, 2], "text": ["a", "b"]}), folder / "train.parquet")


def another_size(folder: Path) -> None:
    parquet_pngs(folder, row3=png(GREY[0][:5]))


def idx_with(folder: Path, change: Callable[[bytes], bytes], name: str = "train-images-idx3-ubyte") -> None:
    write_idx(folder, "train", GREY, LABELS)
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def cut_gzip(folder: Path) -> None:
    write_idx(folder, "train", GREY, LABELS, pack=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-40])


def lonely_images(folder: Path) -> None:
    write_idx(folder, "train", GREY, LABELS)
    (folder / "train-labels-idx1-ubyte").unlink()


def test_part(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    write_idx(folder, "train", GREY, LABELS)
    write_idx(folder, "t10k", images, labels)


test_part.__test__ = False  # type: ignore[attr-defined]

BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (lambda f: None, "found no files"),
    "another kind of file": (lambda f: (f / "notes.txt").write_text("x"), "found notes.txt"),
    "a truncated parquet file": (truncated_parquet, "train.parquet: expected a parquet file"),
    "a text file called parquet": (lambda f: (f / "train.parquet").write_text("hello"), "train.parquet: expected a parquet file"),
    "other columns": (other_columns, "expected the columns image"),
    "a broken image": (lambda f: parquet_pngs(f, row4=png(GREY[4])[:60]), "the image in row 4 cannot be read"),
    "bytes that are no image": (lambda f: parquet_pngs(f, row4=b"hello"), "the image in row 4 cannot be read"),
    "a path without bytes": (lambda f: parquet_pngs(f, row2=None), "row 2 holds no image bytes"),
    "labels that are no numbers": (lambda f: parquet_pngs(f, labels=["a"] * 30), "expected whole numbers"),
    "a label that is missing": (lambda f: parquet_pngs(f, labels=[None, *LABELS[1:].tolist()]), "expected whole numbers"),
    "a label under zero": (lambda f: parquet_pngs(f, labels=[-1, *LABELS[1:].tolist()]), "expected labels from 0 on, found -1"),
    "images of two sizes": (another_size, "images of one size, found 5×8, 9×8"),
    "no images": (lambda f: write_parquet(f / "train.parquet", [], pa.array([], pa.int64())), "no images"),
    "one class": (lambda f: parquet_pngs(f, labels=[0] * 30), "two or more classes"),
    "two images of a class": (lambda f: parquet_pngs(f, labels=[0] * 14 + [1] * 14 + [2] * 2), "2 of class 2"),
    "a truncated IDX file": (lambda f: idx_with(f, lambda b: b[:-7]), "expected 2160 bytes after its head, found 2153"),
    "an IDX file that is too long": (lambda f: idx_with(f, lambda b: b + b"x"), "found 2161"),
    "an IDX head cut off": (lambda f: idx_with(f, lambda b: b[:9]), "expected an IDX file"),
    "an IDX file of floats": (lambda f: idx_with(f, lambda b: b"\0\0\x0d\3" + b[4:]), "expected an IDX file of bytes in 3"),
    "labels where images should be": (lambda f: idx_with(f, lambda b: idx(LABELS.astype(np.uint8))), "in 3 dimensions"),
    "a truncated gzip file": (cut_gzip, "train-images-idx3-ubyte.gz: expected a readable IDX file"),
    "fewer labels than images": (
        lambda f: idx_with(f, lambda b: idx(LABELS[:9].astype(np.uint8)), "train-labels-idx1-ubyte"), "found 9"),
    "images without labels": (lonely_images, "without its train labels"),
    "a test part of another shape": (lambda f: test_part(f, GREY[:, :7], LABELS), "found (1, 7, 8)"),
    "a test part with another class": (lambda f: test_part(f, GREY, LABELS + 1), "has the label 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_told_in_one_sentence(tmp_path: Path, case: str) -> None:
    make, expected = BAD[case]
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing, expected a folder"):
        load(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="found a file, expected a folder"):
        load(tmp_path / "file")
