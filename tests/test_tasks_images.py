"""The two image tasks: batches, crops and flips equal to a plain loop, scores equal to a plain mean, data kept decoded on disk."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import normwise
from normwise.errors import DataError, StudyError
from normwise.experiments.tasks.data import cache
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask, augment, endless
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.models.resnet import ResNet
from normwise.experiments.tasks.task import Recipe
from normwise.parameters.inventory import find_roles

RNG = np.random.default_rng(11)
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty colour images of 16×16 in three classes, and a test part of twelve."""
    folder = tmp_path_factory.mktemp("colours")
    for name, count in (("train", 60), ("test", 12)):
        write_images(folder / f"{name}.parquet", RNG.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    return folder


def write_images(path: Path, images: np.ndarray) -> None:  # type: ignore[type-arg]
    cells = []
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": "x.png"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind), "label": pa.array(np.arange(len(images)) % 3)}), path)


# ----------------------------------------------------------------------------------------------------------- the models


def test_the_resnet_has_exactly_the_parameters_of_the_pilot() -> None:
    convolutions = 27 * 16 + 9 * (4 * 16**2 + 16 * 32 + 3 * 32**2 + 32 * 64 + 3 * 64**2 + 64 * 128 + 3 * 128**2)
    shortcuts, norms, head = 16 * 32 + 32 * 64 + 64 * 128, 8 * (16 + 32 + 64 + 128), 128 * 10 + 10
    model = ResNet(3, 10)
    assert sum(p.numel() for p in model.parameters()) == convolutions + shortcuts + norms + head == 700_986


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 13)])
def test_the_resnet_takes_images_of_any_size_from_8_on(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    assert ResNet(shape[0], 7)(torch.randn(2, *shape)).shape == (2, 7)


def test_a_block_is_relu_of_convolutions_plus_the_shortcut() -> None:
    torch.manual_seed(0)
    block = ResNet(3, 10).double().eval().blocks[2]  # the first that halves the image
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)

    def normed(images: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        mean, var = (s.view(1, -1, 1, 1) for s in (norm.running_mean, norm.running_var))  # type: ignore[union-attr]
        return (images - mean) / torch.sqrt(var + norm.eps) * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)

    conv = nn.functional.conv2d
    inner = normed(conv(x, block.conv1.weight, stride=2, padding=1), block.norm1).clamp(min=0)
    outer = normed(conv(inner, block.conv2.weight, padding=1), block.norm2) + conv(x, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), outer.clamp(min=0))


def test_the_library_knows_the_role_of_every_parameter_of_the_resnet() -> None:
    found = find_roles(ResNet(3, 10))
    assert {name: role for name, role in found.items() if "blocks.0" in name or "blocks" not in name} == {
        "stem.weight": "conv", "blocks.0.conv1.weight": "conv", "blocks.0.norm1.weight": "gain", "blocks.0.norm1.bias": "bias",
        "blocks.0.conv2.weight": "conv", "blocks.0.norm2.weight": "gain", "blocks.0.norm2.bias": "bias",
        "head.weight": "head", "head.bias": "bias",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- crops, flips, order


@pytest.mark.parametrize(("shift", "mirror"), [(0, False), (1, False), (2, True), (0, True)])
def test_shifts_and_mirrors_are_one_of_the_crops_of_a_padded_image(shift: int, mirror: bool) -> None:
    """Each image is found among all crops of it, cut by a plain loop; all of them turn up."""
    images = torch.randn(400, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    moved = augment(images, shift, mirror, torch.Generator().manual_seed(1))
    assert moved.shape == images.shape
    seen = set()
    for before, after in zip(images, moved, strict=True):
        found = [place for place, crop in crops(before, shift, mirror).items() if torch.equal(crop, after)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == (2 * shift + 1) ** 2 * (2 if mirror else 1)


def crops(image: Tensor, shift: int, mirror: bool) -> dict[tuple[int, int, bool], Tensor]:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * shift, width + 2 * shift)
    padded[:, shift : shift + height, shift : shift + width] = image
    found = {}
    for top in range(2 * shift + 1):
        for left in range(2 * shift + 1):
            crop = padded[:, top : top + height, left : left + width]
            found[top, left, False] = crop
            if mirror:
                found[top, left, True] = crop.flip(2)
    return found


def test_every_sample_comes_once_a_pass_and_batches_run_on_across_passes() -> None:
    rows = endless(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(rows) for _ in range(10)]).view(4, 10)
    assert torch.equal(drawn.sort(1).values, torch.arange(10).expand(4, 10))
    assert len({tuple(order) for order in drawn.tolist()}) == 4
    assert len(next(endless(10, 25, torch.Generator().manual_seed(0)))) == 25


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_batches_are_decided_by_their_seed(name: str, colours: Path) -> None:
    task = load_task(name, colours, size="tiny")
    torch.manual_seed(0)
    first, again, other = (task.batches(16, seed) for seed in (3, 3, 4))
    for _ in range(6):
        torch.rand(1)
        (x, y), (x2, y2), (x3, _) = next(first), next(again), next(other)
        assert torch.equal(x, x2) and torch.equal(y, y2) and not torch.equal(x, x3)
        assert x.shape == (16, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)


def test_the_cnn_sees_images_as_they_are_and_the_resnet_sees_them_moved(colours: Path) -> None:
    whole, labels = load(colours).tensors("train")
    for name, share in (("cnn", 1.0), ("resnet", 0.0)):
        x, y = next(load_task(name, colours, size="tiny").batches(45, 0))
        same = 0
        for image, label in zip(x, y, strict=True):
            same += any(torch.allclose(image, one) and label == of for one, of in zip(whole, labels, strict=True))
        assert same / len(x) == pytest.approx(share, abs=0.25)


def test_grey_images_are_not_mirrored_and_move_by_a_sixteenth_of_their_side(colours: Path) -> None:
    grey, colour = load_task("resnet", size="tiny"), load_task("resnet", colours, size="tiny")
    assert isinstance(grey, ImageTask) and isinstance(colour, ImageTask)
    assert (grey.shift, grey.mirror) == (1, False)
    assert (colour.shift, colour.mirror) == (max(1, colour.parts["train"][0].shape[-1] // 16), True)


# ----------------------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_a_score_is_the_plain_mean_over_the_part(name: str, part: str, colours: Path) -> None:
    task = load_task(name, colours, size="tiny")
    torch.manual_seed(0)
    model = task.build()
    images, labels = load(colours).tensors(part)
    if part == "train":
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:12]
        images, labels = images[rows], labels[rows]
    exact = double(model)
    losses, right = [], 0
    for image, label in zip(images.double(), labels.tolist(), strict=True):
        logits = exact(image[None])[0].detach()
        losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
        right += int(logits.argmax()) == label
    score = task.evaluate(model, part)  # type: ignore[arg-type]
    assert score.loss == pytest.approx(math.fsum(losses) / 12, rel=1e-5)
    assert score.accuracy == right / 12


def double(model: nn.Module) -> nn.Module:
    from copy import deepcopy

    return deepcopy(model).double().eval()


def test_the_parts_of_a_task_share_no_image(colours: Path) -> None:
    task = load_task("resnet", colours, size="tiny")
    assert isinstance(task, ImageTask)
    images = [{image.numpy().tobytes() for image in task.parts[part][0]} for part in PARTS]
    assert [len(part) for part in images] == [48, 12, 12]
    assert len(set.union(*images)) == 72


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_a_tiny_model_learns_the_digits_in_a_few_dozen_steps(name: str) -> None:
    task = load_task(name, size="tiny")
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batches = task.batches(task.batch, 0)
    for _ in range(80):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert task.evaluate(model, "validation").accuracy > 0.6
    assert model.training


def test_bf16_gives_the_loss_of_fp32_to_two_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.experiments.tasks.task.fast_bf16", lambda: True)
    data = load()
    recipe = Recipe("resnet", False, "accuracy", 16, lambda: ResNet(1, 10))
    plain, fast = (ImageTask(replace(recipe, bf16=bf16), data, augmented=True) for bf16 in (False, True))
    assert plain.key != fast.key == load_task("resnet").key
    torch.manual_seed(0)
    model, batch = plain.build(), next(plain.batches(16, 0))
    wanted, loss = plain.loss(model, batch), fast.loss(model, batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=2e-2)
    assert loss.item() != wanted.item(), "autocast did nothing"


# --------------------------------------------------------------------------------------------------------------- loading


def test_keys_tell_task_size_and_data_apart(colours: Path) -> None:
    tasks = [load_task(name, data, size=size) for name in ("cnn", "resnet") for data in (None, colours) for size in ("tiny", "standard")]
    tasks += [load_task("gpt", size="tiny", qk_norm=qk_norm) for qk_norm in (False, True)]
    assert len({task.key for task in tasks}) == 10
    assert load_task("cnn", colours).key == load_task("cnn", str(colours)).key
    assert [task.batch for task in (load_task("cnn"), load_task("cnn", colours), load_task("resnet"))] == [64, 128, 128]


def test_unknown_words_are_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no task 'gtp'. Did you mean 'gpt'\? Allowed: cnn, decoder, gpt, gru, lstm"):
        load_task("gtp")
    with pytest.raises(StudyError, match=r"no size 'tyny'. Did you mean 'tiny'"):
        load_task("cnn", size="tyny")
    with pytest.raises(StudyError, match=r"The task cnn has no option 'qk_norm'. Allowed: none"):
        load_task("cnn", qk_norm=True)
    with pytest.raises(StudyError, match=r"The task cnn has no size 'half'; those that have it: decoder, gpt, lstm, resnet, vit\."):
        load_task("cnn", size="half")
    for name in ("resnet", "cnn", "lstm", "gpt", "tabular", "unet"):
        with pytest.raises(DataError, match="none: found nothing"):
            load_task(name, tmp_path / "none")


# ----------------------------------------------------------------------------------------------------- the cache on disk


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_WORTH_BYTES", 1)
    return tmp_path / "cache"


def test_decoded_images_come_back_from_the_cache_and_a_changed_file_is_decoded_again(kept: Path, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    write_images(tmp_path / "train.parquet", images)
    first = load(tmp_path)
    (file,) = kept.iterdir()
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["images"], images.transpose(0, 3, 1, 2))
        labels = arrays["labels"]
    np.savez(file, images=255 - images.transpose(0, 3, 1, 2), labels=labels)
    second = load(tmp_path)
    np.testing.assert_array_equal(second.train.images, 255 - first.train.images, "the cache was not read")
    write_images(tmp_path / "train.parquet", images[:36])
    third = load(tmp_path)
    assert len(third.train) + len(third.validation) + len(third.test) == 36
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_damaged_cache_is_decoded_anew(kept: Path, colours: Path, damage: bytes) -> None:
    wanted = load(colours)
    for file in kept.iterdir():
        file.write_bytes(damage)
    assert load(colours).key == wanted.key


def test_a_cache_that_cannot_be_written_is_done_without(kept: Path, colours: Path) -> None:
    wanted = load(colours).key
    for file in kept.iterdir():
        file.unlink()
    kept.rmdir()
    kept.write_text("a file stands where the folder should")
    assert load(colours).key == wanted


def test_small_sources_are_not_kept(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "cache"))
    load(colours)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------------------ a new task

NEW = '''
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.task import Recipe, Source, task
from torch import nn


@task("linear", steps=50)
def linear(source: Source, tiny: bool, bias: bool = True) -> ImageTask:
    """One layer."""
    data = load(source)
    return ImageTask(Recipe("linear", tiny, "accuracy", 16, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias))), data,
                     augmented=False)
'''


def test_a_file_in_the_folder_of_models_is_a_new_task(tmp_path: Path) -> None:
    """In a process of its own, on a copy of the package: what is registered stays registered."""
    package = tmp_path / "normwise"
    shutil.copytree(Path(normwise.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "experiments" / "tasks" / "models" / "linear.py").write_text(NEW)
    asks = (
        "from normwise.experiments.tasks.load import TASKS, load_task\n"
        "task = load_task('linear', size='tiny', bias=False)\n"
        "print(sorted(TASKS), task.key.partition('-1-')[0], len(list(task.build().parameters())))\n"
        "from normwise.experiments.race.protocol import first_horizon\n"
        "print(first_horizon('linear', task.batch, 1.0))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.startswith("['cnn', 'decoder', 'gpt', 'gru', 'linear', 'lstm', 'mixer', 'plain', 'resnet', "
        "'resnet_gn', 'tabular', 'unet', 'vit'] linear-tiny-fp32-"), done.stderr
    assert done.stdout.endswith(" 1\n800\n")
