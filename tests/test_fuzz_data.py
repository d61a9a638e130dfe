"""Two hundred broken and odd data files: each is read, or is one DataError or StudyError; at the command line one sentence."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fuzz_data as fuzz
from normwise import cli
from normwise.errors import DataError, NormwiseError, StudyError
from normwise.experiments.compare import study as compare
from normwise.experiments.framework.store import Store
from normwise.experiments.prune import study as prune_module
from normwise.experiments.race import study as race_module
from normwise.experiments.tasks.data import readers
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.text import load_text

IMAGES, TEXTS, STATES, CHUNK = 112, 44, 44, 22
MEMORY = 64 << 20
"""What reading a few kilobytes may take, whatever they claim to be."""


def seeds(count: int, quick: int, chunk: int) -> list[Any]:
    return [pytest.param(s, id=f"{s}+", marks=() if s < quick else pytest.mark.long) for s in range(0, count, chunk)]


def judged(read: Callable[[], object]) -> str:
    """"read", or "refused" by one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
    except (DataError, StudyError) as error:
        text = str(error)
        assert 10 <= len(text) <= 4000 and "Traceback" not in text and "0x7f" not in text, text
        return "refused"
    return "read"


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(arguments)
    return status, out.getvalue(), err.getvalue()


def one_sentence(*arguments: str) -> str:
    status, out, err = command(*arguments)
    assert (status, out) == (2, ""), (status, out[:300], err[:300])
    assert err.startswith("normwise: ") and len(err.splitlines()) == 1 and "Traceback" not in err, err[:500]
    return err


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands end where the data was read."""

    def ending(module: Any, name: str) -> None:
        real = getattr(module, name)

        def read(*given: Any, **named: Any) -> Any:
            real(*given, **named)
            raise StudyError("the data was read")

        monkeypatch.setattr(module, name, read)

    ending(compare, "load_task")
    ending(prune_module, "load_task")
    ending(race_module, "load_task")


def one_batch(folder: Path, task: str = "cnn") -> None:
    """What was read can be trained on."""
    made = load_task(task, folder, size="tiny")
    torch.manual_seed(0)
    model = made.build()
    x, _ = next(iter(made.batches(4, 0)))
    assert model(x).isfinite().all()


@pytest.mark.parametrize("start", seeds(IMAGES, 28, 14))
def test_folders_of_images(start: int, tmp_path: Path, coverage: Callable[..., None], only_read: None) -> None:
    for seed in range(start, start + 14):
        folder = tmp_path / str(seed)
        folder.mkdir()
        kind = fuzz.image_folder(seed, folder)
        try:
            found = judged(lambda folder=folder: one_batch(folder))
            arguments = [["compare", "cnn"], ["prune", "cnn"], ["race", "cnn"]][seed % 3]
            said = one_sentence(*arguments, "--data", str(folder))
            assert found == "refused" or "the data was read" in said, said
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}: {type(error).__name__}: {str(error)[:500]}") from error
        coverage("fuzzed input: outcomes", "data: folders of images", found)


@pytest.mark.parametrize("start", seeds(TEXTS, 22, CHUNK))
def test_texts(start: int, tmp_path: Path, coverage: Callable[..., None], only_read: None) -> None:
    for seed in range(start, start + CHUNK):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = fuzz.text_file(seed, folder)
        try:
            found = judged(lambda path=path: one_batch(path, "lstm"))
            said = one_sentence("race", "lstm", "--data", str(path))
            assert found == "refused" or "the data was read" in said, said
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:500]}") from error
        coverage("fuzzed input: outcomes", "data: texts", found)


SETTINGS = [{"kind": "run", "seed": n, "lr": 0.1 * n} for n in range(4)]


@pytest.mark.parametrize("start", seeds(STATES, 22, CHUNK))
def test_files_of_finished_runs(start: int, tmp_path: Path, coverage: Callable[..., None]) -> None:
    """What is kept of a damaged file is what was written into it, and only that; new runs can be added to it."""
    sound = tmp_path / "sound.jsonl"
    for settings in SETTINGS:
        Store(sound).add(settings, {"validation_accuracy": settings["lr"], "by_step": {2: 0.5, 10: 0.25}})
    content, truth = sound.read_bytes(), Store(sound).results
    for seed in range(start, start + CHUNK):
        file = tmp_path / f"{seed}.jsonl"
        file.write_bytes(fuzz.state_file(seed, content))

        def use(file: Path = file) -> None:
            store = Store(file)
            assert store.results.items() <= truth.items()
            store.newest("race facts")
            store.add({"kind": "new"}, {"x": 1})
            assert Store(file).get({"kind": "new"}) == {"x": 1}

        try:
            found = judged(use)
            one_sentence("race", "--state", str(file))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:500]}") from error
        coverage("fuzzed input: outcomes", "data: finished runs", found)


# ----------------------------------------------------------------------------------------------------- bounded memory


def peak(read: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**31, 1, 1), (2**31, 28, 28), (2**32 - 1,) * 3, (2**16, 2**14, 1), (2**32 - 1, 2**32 - 1, 1)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_lying_head_allocates_nothing(shape: tuple[int, ...], suffix: str, tmp_path: Path) -> None:
    fuzz.write_idx(tmp_path, fuzz.idx(shape, fuzz.GREY.tobytes()), suffix=suffix)
    assert peak(lambda: load(tmp_path)) < 8 << 20


def test_sizes_whose_product_overflows_are_not_taken_for_the_right_ones(tmp_path: Path) -> None:
    """2³² · 2³¹ · 2 wraps round to 0 in 64 bits."""
    fuzz.write_idx(tmp_path, fuzz.idx((2**31, 2**31, 4), b""), fuzz.idx((30,), bytes(30)))
    with pytest.raises(DataError, match="2147483648×2147483648×4"):
        load(tmp_path)


def test_a_gzip_bomb_is_unpacked_no_further_than_its_head_says(tmp_path: Path) -> None:
    fuzz.write_idx(tmp_path, fuzz.idx((30, 9, 8), bytes(100 << 20)), suffix=".gz")
    assert peak(lambda: load(tmp_path)) < 8 << 20


def test_a_file_is_unpacked_to_a_gibibyte_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert readers.MOST_BYTES == 1 << 30
    monkeypatch.setattr(readers, "MOST_BYTES", 1 << 20)
    fuzz.write_idx(tmp_path, fuzz.idx((2**15, 8, 8), bytes(2 << 20)), suffix=".gz")
    assert peak(lambda: load(tmp_path)) < 8 << 20


def test_labels_of_any_size_allocate_nothing(tmp_path: Path) -> None:
    """Counting up to the largest label took eight gigabytes for a label of a milliard."""
    import pyarrow as pa

    fuzz.parquet(tmp_path / "train.parquet", labels=pa.array([10**9] * 10 + [0] * 20))
    assert peak(lambda: load(tmp_path)) < MEMORY


@pytest.mark.parametrize("side", [5_000, 60_000])
def test_an_image_that_claims_many_pixels_is_not_decoded(side: int, tmp_path: Path) -> None:
    fuzz.parquet(tmp_path / "train.parquet", [{"bytes": f"P5 {side} {side} 255\n".encode(), "path": ""}] * 30)
    with pytest.raises(DataError, match=r"row 0 cannot be read \(.*pixels"):
        load(tmp_path)


def test_a_parquet_file_of_too_many_rows_is_not_read(tmp_path: Path) -> None:
    fuzz.parquet_repeats(random.Random(0), tmp_path)
    assert (tmp_path / "train.parquet").stat().st_size < 1 << 20
    with pytest.raises(DataError, match="20000000"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------- odd places


@pytest.mark.parametrize("source", ["\x00", "a" * 5000, "x/" * 3000, "/dev/null", "/dev/zero", "\ud800"])
def test_places_that_are_none(source: str, only_read: None, capfd: pytest.CaptureFixture[str]) -> None:
    for read in (load, load_text):
        assert judged(lambda read=read: read(source)) == "refused"
    for task in ("cnn", "lstm"):
        one_sentence("race", task, "--data", source)


@pytest.mark.parametrize("seed", range(4))
def test_saved_datasets(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    fuzz.saved_dataset(random.Random(seed), tmp_path)
    for read in (load, load_text):
        assert judged(lambda read=read: read(tmp_path)) == "refused"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="only a user who is not root can be refused by permissions")
def test_what_may_not_be_read(tmp_path: Path, only_read: None) -> None:
    fuzz.write_idx(tmp_path, fuzz.idx(fuzz.GREY.shape, fuzz.GREY.tobytes()))
    (tmp_path / fuzz.TRAIN[0]).chmod(0)
    one_sentence("compare", "cnn", "--data", str(tmp_path))
    tmp_path.chmod(0)
    one_sentence("compare", "cnn", "--data", str(tmp_path))
    tmp_path.chmod(0o700)


def test_a_process_of_its_own_says_one_sentence(tmp_path: Path) -> None:
    fuzz.idx_bomb(random.Random(0), tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "normwise", "compare", "cnn", "--data", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("normwise: ") and len(done.stderr.splitlines()) == 1


def test_results_of_a_sound_folder_are_unchanged(tmp_path: Path) -> None:
    """The bounds let through what is sound, gzipped or not."""
    for suffix in ("", ".gz"):
        folder = tmp_path / f"x{suffix}"
        folder.mkdir()
        fuzz.write_idx(folder, fuzz.idx(fuzz.GREY.shape, fuzz.GREY.tobytes()), suffix=suffix)
        assert np.array_equal(readers.read_folder(folder).train.images[:, 0], fuzz.GREY)
    assert issubclass(DataError, NormwiseError) and gzip.decompress((tmp_path / "x.gz" / f"{fuzz.TRAIN[0]}.gz").read_bytes())
