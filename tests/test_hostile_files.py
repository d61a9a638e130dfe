"""Paths and files that somebody chose badly, or on purpose: one sentence each, early, nothing changed, and never a wait."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fuzz_data as fuzz
import normwise as nw
from normwise import checkpoints, cli, files
from normwise.errors import DataError, OutputError
from normwise.experiments.bench import control
from normwise.experiments.compare import run as compare_run
from normwise.experiments.compare import study as compare_study
from normwise.experiments.framework import store as store_module
from normwise.experiments.framework import study as job
from normwise.experiments.framework.store import Store, fits, key_of
from normwise.experiments.framework.study import Options
from normwise.experiments.gan import run as gan_trial
from normwise.experiments.gan import study as gan_module
from normwise.experiments.prune import run as prune_run
from normwise.experiments.prune import study as prune_module
from normwise.experiments.race import study as race_job
from normwise.experiments.race.run import RaceRun
from normwise.experiments.race.study import replay
from normwise.experiments.tasks.data import hub, parquet_pages, readers
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.text import load_text

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and links of this kind are POSIX's")

# ------------------------------------------------------------------------------------------------------- odd places


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.x")
    return folder / "pipe.x"


def socket_file(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "socket.x"))    # a socket's path has 107 characters at most
    return folder / "socket.x"


def linked(folder: Path, target: str | Path) -> Path:
    (folder / "link.x").symlink_to(target)
    return folder / "link.x"


def a_folder(folder: Path) -> Path:
    (folder / "folder.x").mkdir()
    return folder / "folder.x"


def inside_a_file(folder: Path) -> Path:
    (folder / "plain.x").write_bytes(b"")
    return folder / "plain.x" / "inside.x"


ODD: dict[str, Callable[[Path], Path]] = {
    "a pipe": pipe, "a socket": socket_file, "a device": lambda folder: Path("/dev/null"),
    "an endless device": lambda folder: Path("/dev/zero"),
    "a full device": lambda folder: Path("/dev/full"), "a folder": a_folder, "a place inside a file": inside_a_file,
    "a link to nothing": lambda folder: linked(folder, "nowhere"), "a link in a circle": lambda folder: linked(folder, "link.x"),
    "a link to a pipe": lambda folder: linked(folder, pipe(folder)), "a link to a device": lambda folder: linked(folder, "/dev/null"),
    "a long name": lambda folder: folder / ("n" * 300), "a long path": lambda folder: folder / "/".join(["p" * 200] * 30),
    "a name with a zero": lambda folder: folder / "a\0b", "half a surrogate pair": lambda folder: folder / "a\ud800b",
}  # fmt: skip
"""Where no file is to be read or written."""

# ------------------------------------------------------------------------------------------------------- finished runs

RUN = {"kind": "run", "seed": 1}


def line_of(settings: dict[str, Any], result: Any, **more: Any) -> str:
    return json.dumps({"key": key_of(settings), "settings": settings, "result": result, **more})


def test_a_line_without_its_checksum_is_ignored_and_said(tmp_path: Path) -> None:
    """Today's fault: the line was trusted, and a result that lacked what the study reads ended in a KeyError."""
    path = tmp_path / "state.jsonl"
    sound = {"validation_accuracy": 0.5}
    right = store_module._sum(RUN, sound)
    for added in ({}, {"sum": ""}, {"sum": None}, {"sum": 0}, {"sum": []}, {"sum": right[:-1]}, {"sum": right.upper() + "x"}):
        path.write_text(line_of(RUN, sound, **added))
        store = Store(path)
        assert store.get(RUN) is None and store.ignored == 1, added
        assert store.note and "1 line is ignored" in store.note and str(path) in store.note
        assert store.newest("run") == (None, None)
    path.write_text(line_of(RUN, sound, sum=right))
    assert Store(path).get(RUN) == sound and Store(path).note is None


@pytest.mark.parametrize("result", [{}, {"validation": None}, {"validation": 0.5}, {"validation": {"accuracy": True, "loss": 0.1}}])
def test_a_result_that_lacks_what_the_study_reads_is_run_again(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum is no secret: a line may be forged with the right one. The runs are done again, and no KeyError ends the study."""
    path, ran, train = tmp_path / "state.jsonl", [], compare_run.train
    monkeypatch.setattr(compare_run, "train", lambda *given: ran.append(given) or train(*given))

    def runs() -> int:
        ran.clear()
        options = Options(only=("nothing", "gd"), seeds=2, state=path, size="tiny")
        found = compare_study.compare(options, budget=compare_study.Budget(9, 0.001, 1, 1))
        assert found["cells"][0]["trials"] == 9 and len(found["cells"][0]["curves"]) == 2
        return len(ran)

    assert runs() == 11 and runs() == 0
    entries = Store(path).entries
    path.unlink()
    for entry in entries:
        Store(path).add(entry["settings"], result)
    assert runs() == 11, "none of the forged results is one"


def test_every_committed_result_has_the_form_that_its_study_asks_for() -> None:
    """Otherwise a study would do its own finished runs again."""
    makers: dict[str, Any] = {"compare": compare_run.CompareRun, "gan": gan_trial.GanRun, "race": RaceRun, "prune": prune_run.PruneRun}
    seen: dict[str, int] = {}
    for path in sorted((ROOT / "docs" / "results").glob("*.runs.jsonl")):
        store = Store(path)
        assert store.ignored == 0 and store.entries, path
        for entry in store.entries:
            kind = entry["settings"]["kind"]
            if kind not in makers:
                continue
            names = {field.name for field in fields(makers[kind])}
            given = {name: value for name, value in entry["settings"].items() if name in names}
            if kind == "compare" and path.stem.startswith("cnn-mnist"):
                continue    # of protocol 3
            if kind == "race":
                given["numbers"] = tuple(given["numbers"].items())
            run = makers[kind](**given)
            assert fits(entry["result"], {"failed": str}) or fits(entry["result"], run.form), (path, entry["result"])
            assert Store.get(store, run.settings(), run.form) is not None or "failed" in entry["result"]
            seen[kind] = seen.get(kind, 0) + 1
    assert min(seen[kind] for kind in ("compare", "gan", "race", "prune")) > 50, seen


def test_forms() -> None:
    form = {"a": (int, float), "b": bool, "c": {"d": [int, int]}}
    good = {"a": 1, "b": True, "c": {"d": [1, 2], "more": 0}}
    assert fits(good, form) and fits({}, {}) and fits(good | {"a": 0.5}, form)
    for change in ({"a": True}, {"a": "1"}, {"a": None}, {"b": 1}, {"c": 3}, {"c": {}}, {"c": {"d": [1]}}, {"c": {"d": [1, 2, 3]}}):
        assert not fits(good | change, form), change
    assert not fits([], form) and not fits({"a": 1}, form)


FACTS = {"kind": "race facts", "protocol": 1, "name": "cnn", "key": "k", "metric": "accuracy", "batch": 64, "budget": "quick", "seeds": 2,
         "contenders": ["adamw", "sgd"]}  # fmt: skip
MACHINE = {"cpu": "x", "cores": 1, "torch": "2", "python": "3", "date": "2026-01-01"}


@pytest.mark.parametrize("change", [
    {"name": "x"}, {"name": None}, {"batch": 0}, {"batch": "64"}, {"batch": -1}, {"budget": 3}, {"seeds": 0}, {"seeds": 10**12},
    {"contenders": ["nobody"]}, {"contenders": [[]]}, {"contenders": "adamw"}, {"contenders": [3]}, {"metric": None}, {"protocol": "1"},
    {"protocol": [1]}, {"budget": "vast"},
])  # fmt: skip
def test_forged_facts_of_a_race_are_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "race.jsonl"
    Store(path).add(FACTS, {"machine": MACHINE})
    assert replay(path)["contenders"] == []
    path.unlink()
    Store(path).add(FACTS | change, {"machine": MACHINE})
    with pytest.raises(DataError, match="expected the runs of a race"):
        replay(path)
    for machine in (None, {}, {"torch": 3}, MACHINE | {"cores": "x"}):
        Store(path).add(FACTS, {"machine": machine})
        with pytest.raises(DataError, match="expected the runs of a race"):
            replay(path)


def test_an_appended_line_is_on_the_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the docstring says: written in full, and synced, before the run counts as kept."""
    synced: list[bytes] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            synced.append((tmp_path / "state.jsonl").read_bytes())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store = Store(tmp_path / "state.jsonl")
    for k in range(3):
        store.add({"kind": "run", "seed": k}, {"x": k})
        assert len(synced) == k + 1 and len(synced[-1].split(b"\n")) == k + 2, "synced after the whole line was written"
        assert synced[-1] == (tmp_path / "state.jsonl").read_bytes()


@contextlib.contextmanager
def full_disk(at: int) -> Iterator[None]:
    """Files of this process may have so many bytes and no more, which is what a full disk is to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_keeps_what_was_kept(tmp_path: Path) -> None:
    """Some runs are kept, the next is one clear error, and no half line is trusted."""
    store, kept = Store(tmp_path / "state.jsonl"), 0
    with full_disk(3000), pytest.raises(OutputError, match="a finished run cannot be kept"):
        for kept in range(100):
            store.add({"kind": "run", "seed": kept}, {"x": "y" * 100})
    assert (tmp_path / "state.jsonl").stat().st_size == 3000, "the last line was cut off"
    again = Store(tmp_path / "state.jsonl")
    assert 5 < kept == len(again.results) == len(store.results) and again.ignored == 1
    again.add({"kind": "run", "seed": -1}, {"x": 1})
    assert len(Store(tmp_path / "state.jsonl").results) == kept + 1


# ------------------------------------------------------------------------------------------------------- images

KINDS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 9\n%%EndComments\n(ran) print\nshowpage\n%%EOF\n"


def cells(content: bytes, rows: int = 30) -> list[dict[str, Any]]:
    return [{"bytes": content, "path": "x"}] * rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_formats_are_read(kind: str, tmp_path: Path) -> None:
    pixels = np.full((9, 8), 100, np.uint8)
    fuzz.parquet(tmp_path / "train.parquet", cells(fuzz.encoded(pixels, kind)))
    found = readers.read_folder(tmp_path).train.images
    assert found.shape == (30, 3 if kind in ("GIF", "WEBP") else 1, 9, 8) and np.abs(found.astype(int) - 100).max() <= 3


def others() -> dict[str, bytes]:
    """An image of every other format that Pillow can write here, and what names itself one."""
    made = {"EPS": EPS, "DOS EPS": b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS, "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(90), "text": b"hello",
            "RIFF": b"RIFF\x00\x00\x00\x00WAVE" + bytes(50), "EPS in RIFF": b"RIFF\x00\x00\x00\x00EPS " + EPS}  # fmt: skip
    Image.init()
    for kind in sorted(set(Image.SAVE) - {*KINDS, "MPO", "DIB", "EPS", "JPG"}):
        with contextlib.suppress(Exception):    # those that only know other modes, or need a plugin
            made[kind] = fuzz.encoded(np.full((9, 8, 3), 100, np.uint8), kind)
    return made


def test_no_other_format_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's fault: an EPS in a cell starts Ghostscript. Pillow's openers of other formats are not even asked."""
    asked: list[str] = []
    for kind, (opener, accept) in list(Image.OPEN.items()):
        if kind not in KINDS:
            monkeypatch.setitem(Image.OPEN, kind, (lambda *given, kind=kind, opener=opener: asked.append(kind) or opener(*given), accept))
    found = others()
    assert len(found) > 15 and Image.open(io.BytesIO(EPS)).format == "EPS" and asked, "Pillow alone opens it, or nothing is proved"
    asked.clear()
    for kind, content in found.items():
        fuzz.parquet(tmp_path / "train.parquet", cells(content))
        with pytest.raises(DataError, match=r"row 0 cannot be read") as caught:
            readers.read_folder(tmp_path)
        if kind not in ("PDF",):
            assert "no known format; PNG, JPEG" in str(caught.value), (kind, str(caught.value))
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0", b"P5"):
        fuzz.parquet(tmp_path / "train.parquet", cells(start + EPS))
        with pytest.raises(DataError, match="row 0 cannot be read"):
            readers.read_folder(tmp_path)
    assert asked == []


def test_every_image_that_is_opened_is_opened_with_a_list_of_formats() -> None:
    """In one place, so that no second one can forget it."""
    calls = [(path.name, line) for path in (ROOT / "src").rglob("*.py") for line in path.read_text().splitlines() if "Image.open(" in line]
    assert [name for name, _ in calls] == ["readers.py"] and all("formats=" in line for _, line in calls)


# ------------------------------------------------------------------------------------------------------- decoded sizes


def png(side: int, content: int = 0, mode: int = 3) -> bytes:
    """A large image of one shade: some kilobytes that are megabytes once decoded."""
    shape = (side, side, 3) if mode == 3 else (side, side)
    return fuzz.encoded(np.full(shape, content, np.uint8))


def repeated(path: Path, content: bytes, rows: int, encoding: str = "dictionary", groups: int = 1) -> None:
    """One image in so many rows of each of some groups, kept once a group."""
    image = pa.StructArray.from_arrays([pa.array([content] * rows, pa.binary())], ["bytes"])
    table = pa.table({"image": image, "label": pa.array(np.arange(rows) % 3)})
    how: dict[str, Any] = {"use_dictionary": True}
    if encoding == "plain":
        how = {"use_dictionary": False}
    if encoding == "delta":
        how = {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY", "label": "PLAIN"}}
    with pq.ParquetWriter(path, table.schema, compression="zstd", **how) as writer:
        for _ in range(groups):
            writer.write_table(table)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the images that were decoded."""
    sizes: list[int] = []
    real = readers._pixels

    def pixels(*given: Any) -> Any:
        found = real(*given)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(readers, "_pixels", pixels)
    return sizes


@pytest.mark.parametrize(("side", "rows", "encoding"), [
    (1000, 2000, "dictionary"), (4000, 135, "dictionary"), (64, 100_000, "dictionary"), (1000, 2000, "delta"), (100, 40_000, "delta"),
])  # fmt: skip
def test_a_small_file_of_many_pixels_is_refused_before_any_is_decoded(
    side: int, rows: int, encoding: str, tmp_path: Path, decoded: list[int]
) -> None:
    """Today's fault: the sizes of the encoded rows were counted, and a file of 1.9 KB reached 6.5 GB."""
    repeated(tmp_path / "train.parquet", png(side), rows, encoding)
    size = (tmp_path / "train.parquet").stat().st_size
    assert size < 2 << 20 and rows * 3 * side * side > 1 << 30
    for part in ("train", "test"):    # a test part counts, too
        (tmp_path / "train.parquet").rename(tmp_path / f"{part}.parquet")
        if part == "test":
            fuzz.parquet(tmp_path / "train.parquet")
        decoded.clear()
        with pytest.raises(DataError, match=r"at most 1073741824 bytes in all once decoded, found \d+.*NORMWISE_MOST_BYTES"):
            load(tmp_path)
        assert sum(decoded) <= 30 * 72


def test_all_parts_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards, and a test part, each within the limit."""
    for name in ("train-0.parquet", "train-1.parquet", "test.parquet"):
        fuzz.parquet(tmp_path / name)
    whole = 3 * fuzz.GREY.size
    monkeypatch.setenv("NORMWISE_MOST_BYTES", str(whole))
    assert len(readers.read_folder(tmp_path).train) == 60
    monkeypatch.setenv("NORMWISE_MOST_BYTES", str(whole - 1))
    size = fuzz.GREY.size
    with pytest.raises(DataError, match=f"at most {whole - 1} bytes in all once decoded, found {size} beside the {2 * size}"):
        readers.read_folder(tmp_path)
    monkeypatch.setenv("NORMWISE_MOST_BYTES", "1e9")
    with pytest.raises(DataError, match="whole number of bytes"):
        readers.read_folder(tmp_path)
    for name in tmp_path.iterdir():
        name.unlink()
    fuzz.write_idx(tmp_path, fuzz.idx(fuzz.GREY.shape, fuzz.GREY.tobytes()))
    monkeypatch.setenv("NORMWISE_MOST_BYTES", str(fuzz.GREY.size + 29))
    with pytest.raises(DataError, match="once decoded"):
        readers.read_folder(tmp_path)
    monkeypatch.setenv("NORMWISE_MOST_BYTES", str(fuzz.GREY.size + 30))
    assert len(readers.read_folder(tmp_path).train) == 30


def test_colour_after_grey_counts_threefold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey, colour = fuzz.encoded(fuzz.GREY[0]), fuzz.encoded(np.stack([fuzz.GREY[0]] * 3, -1))
    fuzz.parquet(tmp_path / "train.parquet", cells(grey, 29) + cells(colour, 1))
    monkeypatch.setenv("NORMWISE_MOST_BYTES", str(30 * 72 * 3))
    images = readers.read_folder(tmp_path).train.images
    assert images.shape == (30, 3, 9, 8) and (images == fuzz.GREY[0]).all()
    monkeypatch.setenv("NORMWISE_MOST_BYTES", str(30 * 72 * 3 - 1))
    with pytest.raises(DataError, match="once decoded"):
        readers.read_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["dictionary", "delta"])
def test_rows_that_repeat_a_large_cell_take_little_memory(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 64 pixels with a megabyte behind its end, in 120 rows: 120 megabytes if the file, or a thousand rows of it, is read at
    once. Limits are a sixteenth of the true ones here."""
    repeated(tmp_path / "train.parquet", png(8, mode=1) + bytes(1 << 20), 60, encoding, groups=2)
    monkeypatch.setattr(readers, "MOST_BYTES", 1 << 26)
    monkeypatch.setattr(readers, "_MOST_ENCODED", 1 << 22)
    before, held, real = pa.total_allocated_bytes(), [], readers.Images.add

    def add(*given: Any) -> None:
        held.append(pa.total_allocated_bytes() - before)
        real(*given)

    monkeypatch.setattr(readers.Images, "add", add)
    with pytest.raises(DataError, match="encoded images of at most 67108864 bytes in all"):
        load(tmp_path)
    assert 60 < len(held) < 66 and max(held) < 24 << 20, f"{max(held) >> 20} MiB"


@pytest.mark.parametrize("how", [
    {}, {"compression": "none"}, {"compression": "gzip"}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"data_page_size": 200},
    {"write_page_index": True}, {"write_statistics": False}, {"row_group_size": 7}, {"column_encoding": "delta"},
])  # fmt: skip
def test_pages_are_measured_as_they_are(how: dict[str, Any], tmp_path: Path) -> None:
    """Their sum is the account's, less the heads; and files of every kind are read as before."""
    if how == {"column_encoding": "delta"}:
        how = {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY", "label": "PLAIN"}}
    images = pa.array([{"bytes": fuzz.encoded(image)} for image in fuzz.GREY], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": images, "label": pa.array(fuzz.LABELS)}), tmp_path / "train.parquet", **how)
    told = pq.ParquetFile(tmp_path / "train.parquet").metadata
    with (tmp_path / "train.parquet").open("rb") as plain:
        for group in range(told.num_row_groups):
            for column in range(told.num_columns):
                chunk = told.row_group(group).column(column)
                size = parquet_pages.unpacked_size(plain, chunk)
                assert 0 < chunk.total_uncompressed_size - size < 500 * (1 + chunk.num_values), (size, chunk.total_uncompressed_size)
    assert np.array_equal(readers.read_folder(tmp_path).train.images[:, 0], fuzz.GREY)


def varint(number: int, length: int) -> bytes:
    """A Thrift number in so many bytes, which may be more than it needs."""
    value, found = number << 1, bytearray()
    while value or len(found) < length:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found[-1] &= 0x7F
    return bytes(found)


def test_an_account_that_lies_about_its_pages_is_not_believed(tmp_path: Path) -> None:
    """Each size in the account at the end is made a kilobyte, in as many bytes as before; the pages are what they are."""
    repeated(tmp_path / "train.parquet", bytes(64 << 20), 2, "plain")
    content = (tmp_path / "train.parquet").read_bytes()
    told = pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(0)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    foot = content[start:]
    for size in (told.total_byte_size, *(told.column(k).total_uncompressed_size for k in range(2))):
        length = len(varint(size, 1))
        foot = foot.replace(varint(size, 1), varint(1000, length))
    (tmp_path / "train.parquet").write_bytes(content[:start] + foot)
    lying = pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(0)
    assert lying.total_byte_size == 1000 and lying.column(0).total_uncompressed_size == 1000, "or else this proves nothing"
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(DataError, match=r"its pages unpack to \d+ bytes, and it says 1000"):
        load(tmp_path)
    assert pa.default_memory_pool().bytes_allocated() - before < 1 << 20


def test_a_data_set_of_the_library_datasets_is_bounded_too(tmp_path: Path, decoded: list[int]) -> None:
    datasets = pytest.importorskip("datasets")
    cell = {"bytes": png(1000), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": [cell] * 400, "label": [k % 3 for k in range(400)]}, features=features)
    made.save_to_disk(tmp_path / "images")
    with pytest.raises(DataError, match="once decoded"):
        load(tmp_path / "images")
    assert decoded == []
    texts = datasets.Dataset.from_dict({"text": ["x" * 1000] * 50})
    texts.save_to_disk(tmp_path / "texts")
    assert len(hub.read_text(tmp_path / "texts")) == 50 * 1001 - 1
    with pytest.raises(DataError, match="40000 characters at most"):
        hub.read_text(tmp_path / "texts", 40_000)


# ------------------------------------------------------------------------------------------------------- places


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """What waits for ever fails."""

    def late(*given: object) -> None:
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sentence(*arguments: object) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(60):
        status = cli.main([str(argument) for argument in arguments])
    assert (status, out.getvalue()) == (2, ""), (status, out.getvalue()[:300], err.getvalue()[:300])
    said = err.getvalue()
    assert said.startswith("normwise: ") and len(said.splitlines()) == 1 and "Traceback" not in said and len(said) < 8000, said
    return said


def state_of(path: Path) -> Any:
    """What may not change: the kind, and the device's numbers."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError) as error:
        return type(error)
    return stat.S_IFMT(found.st_mode), found.st_rdev, found.st_ino


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained: whoever gets so far has checked too late."""
    forbid_work(monkeypatch)


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def worked(*given: Any, **named: Any) -> Any:
        raise AssertionError("the work began")

    for module, name in ((compare_study, "compare"), (race_job, "race"), (gan_module, "study"), (prune_module, "study"), (control, "run")):
        monkeypatch.setattr(module, name, worked)


COMMANDS: list[list[str]] = [["compare", "cnn"], ["race", "cnn"], ["gan"], ["prune", "cnn"], ["bench", "control"]]


@pytest.mark.parametrize("place", ODD)
def test_outputs_and_states_are_tried_before_the_work(place: str, tmp_path: Path, no_work: None) -> None:
    """Today: tracebacks, a wait for ever, or a device that a file has taken the place of, some after all the work."""
    path = ODD[place](tmp_path)
    before = state_of(path)
    for command in COMMANDS:
        for option in ("--json", "--state", "--report"):
            if option == "--report" and (command[0] == "bench" or place in ("a folder", "a long path", "a name with a zero")):
                continue
            if option == "--state" and command[0] == "bench":
                continue
            if place == "a link to nothing" and option == "--report":
                continue    # told below
            said = sentence(*command, option, path)
            assert "cannot be written" in said, (command, option, said)
            assert state_of(path) == before
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_inputs_are_files(tmp_path: Path) -> None:
    for number, (place, make) in enumerate(ODD.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = make(folder)
        before = state_of(path)
        sentence("policies", path)
        sentence("race", "lstm", "--data", path)
        sentence("race", "cnn", "--data", path)
        sentence("race", "--state", path)
        with within(20), pytest.raises((DataError, FileNotFoundError)):
            checkpoints.load(path)
        with within(20), pytest.raises(DataError):
            if place not in ("a link to nothing",):
                checkpoints.save({"a": torch.zeros(2)}, path)
            raise DataError("where nothing stands, it is made")
        assert state_of(path) == before, place


@pytest.mark.parametrize("name", ["train.parquet", fuzz.TRAIN[0], "text.txt"])
def test_a_pipe_among_the_data_is_not_waited_for(name: str, tmp_path: Path) -> None:
    fuzz.write_idx(tmp_path, fuzz.idx(fuzz.GREY.shape, fuzz.GREY.tobytes()))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with within(20):
        for read in (load, load_text):
            with contextlib.suppress(DataError):
                read(tmp_path)


def test_the_files_of_a_report_are_tried_before_the_work(tmp_path: Path, no_work: None) -> None:
    for name in ("index.html", "results.json"):
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / name)
        assert f"{name}: results cannot be written here, since this is a pipe" in sentence("compare", "cnn", "--report", folder)


def test_the_runs_and_the_results_cannot_be_one_file(tmp_path: Path, no_work: None) -> None:
    """The results would take the place of the finished runs."""
    (tmp_path / "link").symlink_to(tmp_path)
    for one, other in (("x.json", "x.json"), ("x.json", "link/x.json"), ("link/x.json", "./x.json")):
        for command in COMMANDS[:4]:
            said = sentence(*command, "--json", tmp_path / one, "--state", tmp_path / other)
            assert "two files" in said, said
    assert "two files" in sentence("compare", "cnn", "--report", tmp_path, "--state", tmp_path / "index.html")


def test_a_device_keeps_its_place(tmp_path: Path) -> None:
    """``--json /dev/null`` replaced the device."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for path in (Path("/dev/null"), tmp_path / "null"):
        if not path.exists():
            continue
        before = state_of(path)
        for write in (lambda p: job.write_json(p, {}), lambda p: files.replace(p, b"x"), lambda p: checkpoints.save({}, p),
                      lambda p: Store(p).add(RUN, {}), lambda p: nw.Policy([]).save(p)):  # fmt: skip
            with pytest.raises((DataError, nw.PolicyError), match="a device"):
                write(path)
            assert state_of(path) == before


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    job.write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    checkpoints.save({"a": 1}, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and checkpoints.load(tmp_path / "real.json") == {"a": 1}


def test_a_disk_that_fills_up_while_results_are_written_leaves_the_old_ones(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    target.write_text("old")
    tensors = {"a": torch.zeros(10_000)}
    with full_disk(2000):
        with pytest.raises(OutputError, match="Cannot write"):
            job.write_json(target, {"a": "x" * 5000})
        with pytest.raises(OutputError, match="Cannot write"):
            checkpoints.save(tensors, target)
        with pytest.raises(DataError, match="cannot be written"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_TRIED", 4000)
            files.check_file(tmp_path / "other.json")
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_odd_name_that_can_be_a_file_is_one(tmp_path: Path) -> None:
    """255 bytes are what a name may have; what is written beside it meanwhile has a shorter one."""
    for name in ("n" * 255, "ü" * 127, "-x", " ", "a\nb"):
        files.check_file(tmp_path / name)
        files.replace(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("strikes", [pytest.param(400, marks=pytest.mark.long)])
def test_strikes_at_random(strikes: int, tmp_path: Path, coverage: Callable[..., None]) -> None:
    """Any place, for any input and output of any command: one sentence, nothing changed, no wait."""
    rnd = random.Random(strikes)
    for strike in range(strikes):
        folder = tmp_path / str(strike)
        folder.mkdir()
        place = rnd.choice(list(ODD))
        path = ODD[place](folder)
        before = state_of(path)
        kind = rnd.choice(["--json", "--state", "--data", "policies", "race --state"])
        if kind == "policies":
            sentence("policies", path)
        elif kind == "race --state":
            sentence("race", "--state", path)
        elif kind == "--data":
            sentence("race", rnd.choice(["cnn", "lstm"]), "--data", path) if place != "a folder" else None
        else:
            with pytest.MonkeyPatch.context() as patch:
                forbid_work(patch)
                sentence(*rnd.choice(COMMANDS[:4]), kind, path)
        assert state_of(path) == before
        coverage("strikes at files: refused in one sentence", place, kind)


NO_PATHS = [{"model": 1}, None, 3, b"x.pt", io.BytesIO(), ["x.pt"], torch.ones(2)]


@pytest.mark.parametrize("given", NO_PATHS, ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("work", [
    lambda path: checkpoints.save({"model": 1}, path), checkpoints.load, nw.Policy.load, nw.Policy([nw.max_norm(1.0)]).save, nw.inspect,
], ids=["save", "load", "Policy.load", "Policy.save", "inspect"])  # fmt: skip
def test_what_is_no_path_is_told_so(work: Callable[[Any], Any], given: Any) -> None:
    """As arguments in another order are: ``save(path, state)``."""
    with pytest.raises(DataError, match=f"str or a pathlib.Path.*; given .*{type(given).__name__}"):
        work(given)
