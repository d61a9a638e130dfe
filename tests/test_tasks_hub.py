"""Hugging Face data sets, read from local folders in their formats: columns by type, splits in their places, errors in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normwise.errors import DataError, MissingExtraError
from normwise.experiments.tasks.data import hub
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.text import load_text

datasets = pytest.importorskip("datasets", reason="the library datasets is not installed; pip install 'normwise[datasets]'")

RNG = np.random.default_rng(2)
PIXELS = RNG.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
CLASSES = np.arange(30) % 3
ROWS = [f"row {i} of a small text, with a few words to fill it up" for i in range(400)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()


def image_set(pixels: Any = PIXELS, classes: Any = CLASSES, **more: Any) -> Any:
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    features |= {name: datasets.Value("int64") for name in more}
    rows = {"picture": list(pixels), "kind": list(classes)} | more
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_saved_image_set_comes_back_as_it_was_with_its_own_test_part(tmp_path: Path) -> None:
    parts = {"train": image_set(serial=list(range(30))), "test": image_set(PIXELS[:6], CLASSES[:6], serial=list(range(6)))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "saved", f"hf:{tmp_path / 'saved'}", Path(f"hf:{tmp_path / 'saved'}")):
        raw = hub.read_images(source)
        np.testing.assert_array_equal(raw.train.images, PIXELS.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(raw.train.labels, CLASSES)
        assert raw.test is not None
        np.testing.assert_array_equal(raw.test.images, PIXELS[:6].transpose(0, 3, 1, 2))
    data = load(tmp_path / "saved")
    assert (data.own_test, data.classes, data.shape) == (True, 3, (3, 8, 8))


def test_a_folder_of_image_files_is_read_by_the_library(tmp_path: Path) -> None:
    from PIL import Image

    for row, (pixels, label) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        folder = tmp_path / "files" / "train" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{row:02}.png")
    raw = hub.read_images(f"hf:{tmp_path / 'files'}")
    order = np.argsort(CLASSES, kind="stable")
    np.testing.assert_array_equal(raw.train.images, PIXELS[order].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(raw.train.labels, CLASSES[order])
    assert raw.test is None


def test_a_parquet_folder_gives_the_same_task_by_either_reader(tmp_path: Path) -> None:
    parts = image_set().rename_columns({"picture": "image", "kind": "label"})
    parts.to_parquet(tmp_path / "train.parquet")
    by_library, by_hand = load_task("resnet", f"hf:{tmp_path}", size="tiny"), load_task("resnet", tmp_path, size="tiny")
    assert by_library.key == by_hand.key


def test_a_text_set_is_its_rows_in_the_order_of_the_parts(tmp_path: Path) -> None:
    parts = {"validation": ROWS[300:350], "train": ROWS[:300], "test": ROWS[350:]}
    tables = {name: datasets.Dataset.from_dict({"words": rows, "n": list(range(len(rows)))}) for name, rows in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    assert hub.read_text(tmp_path / "saved") == "\n".join(ROWS)
    (tmp_path / "plain.txt").write_text("\n".join(ROWS))
    assert load_text(f"hf:{tmp_path / 'saved'}").key == load_text(tmp_path / "plain.txt").key


def test_one_split_alone_is_the_training_split(tmp_path: Path) -> None:
    image_set().save_to_disk(tmp_path / "saved")
    assert len(hub.read_images(tmp_path / "saved").train) == 30


def test_what_cannot_be_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": ROWS, "b": ROWS}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"two: expected one column of kind text, or one called so, found a: string, b: string"):
        load_text(tmp_path / "two")
    with pytest.raises(DataError, match="expected one column of kind image"):
        load(tmp_path / "two")
    with pytest.raises(DataError, match="nowhere: datasets cannot load it"):
        load(f"hf:{tmp_path / 'nowhere'}")
    datasets.DatasetDict({"other": image_set()}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="expected a split train, found other"):
        load(tmp_path / "other")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (load, load_text):
        with pytest.raises(MissingExtraError, match=r"pip install 'normwise\[datasets\]'"):
            read("hf:someone/something")
