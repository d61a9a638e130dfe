"""Images for a study, in three disjoint parts: what is trained on, what choices are made on, what is reported."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwise.errors import DataError
from normwise.experiments.tasks.data import hub
from normwise.experiments.tasks.data.readers import Part, RawImages, read_digits, read_folder

__all__ = ["ImageData", "Part", "load", "stratified"]

_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.2  # of all images where the test part is cut from them too, of the train file otherwise
_VALIDATION_MOST = 5000  # beyond this the spread over seeds, not the size of the part, limits what can be told apart
_LEAST_PER_CLASS = 3
_COUNTED = 1 << 16


@dataclass(frozen=True)
class ImageData:
    """Three disjoint parts of one image set.

    name: of the source. train, validation, test: the parts. classes: how many labels there are. own_test: whether the test
    part is the source's own. available: training images before :meth:`thinned`. key: a fingerprint of all images, labels and
    their places.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    classes: int
    own_test: bool
    available: int
    key: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return int(channels), int(height), int(width)

    @property
    def commonest(self) -> float:
        """The accuracy on the test part of always answering its commonest class."""
        return float(np.bincount(self.test.labels).max() / len(self.test))

    def thinned(self, most: int | None, *, seed: int = 0) -> ImageData:
        """The same with at most ``most`` training images (None: all), chosen once by the seed, every class in proportion."""
        if most is None or most >= len(self.train):
            return self
        kept, _ = stratified(self.train.labels, np.arange(len(self.train)), most, np.random.default_rng(seed))
        train = self.train.take(kept)
        return replace(self, train=train, key=_fingerprint((train, self.validation, self.test)))

    def tensors(self, part: str) -> tuple[Tensor, Tensor]:
        """Images of ``"train"``, ``"validation"`` or ``"test"`` as fp32 and their labels as int64.

        Standardised with the mean and the deviation of all the training part's values, so that the network's small initial
        weights leave their plateau in a short run too.
        """
        chosen: Part = getattr(self, part)
        mean, deviation = self.scale
        images = torch.from_numpy(np.ascontiguousarray(chosen.images)).float().sub_(mean).div_(deviation)
        return images, torch.from_numpy(chosen.labels)

    @property
    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the training part's bytes; a deviation of 1 where all are equal."""
        pixels = self.train.images.reshape(-1)
        # numpy counts bytes by way of an int64 copy: in pieces, that copy stays in the cache.
        counts = sum((np.bincount(pixels[i : i + _COUNTED], minlength=256) for i in range(0, len(pixels), _COUNTED)), np.zeros(256))
        shades = np.arange(256.0)
        mean = float(counts @ shades / counts.sum())
        return mean, float(np.sqrt(counts @ (shades - mean) ** 2 / counts.sum())) or 1.0


def load(folder: str | Path | None = None, *, seed: int = 0) -> ImageData:
    """Images in three parts.

    folder: parquet or IDX files (see ``read_folder``), a Hugging Face data set (``"hf:NAME"``, see ``tasks.data.hub``), or None for
    scikit-learn's digits, which are bundled with it.
    seed: of the split. The test part is the source's own where it has one, else a fifth of the images; the validation part
    is another fifth, 5000 at most. Both are stratified: every class has its share in each part, to within one image.

    Raises DataError, in one sentence, for files that are missing, truncated or of the wrong kind.
    """
    if folder is None:
        raw = read_digits()
    else:
        raw = hub.read_images(folder) if hub.is_dataset(folder) else read_folder(Path(folder))
    _check(raw)
    rng = np.random.default_rng(seed)
    everything = len(raw.train)
    rest = np.arange(everything)
    test, own = raw.test, raw.test is not None
    if test is None:
        chosen, rest = stratified(raw.train.labels, rest, round(everything * _TEST_SHARE), rng)
        test = raw.train.take(chosen)
    size = min(round(everything * _VALIDATION_SHARE), _VALIDATION_MOST)
    validation, rest = stratified(raw.train.labels, rest, size, rng)
    parts = raw.train.take(rest), raw.train.take(validation), test
    classes = int(raw.train.labels.max()) + 1
    return ImageData(raw.name, *parts, classes, own, len(rest), _fingerprint(parts))


def stratified(
    labels: NDArray[np.int64], rows: NDArray[np.int64], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``size`` of the rows, every class in proportion, and the other rows."""
    rows = rng.permutation(rows)
    quantile = np.empty(len(rows))
    for label in np.unique(labels[rows]):
        members = np.flatnonzero(labels[rows] == label)
        # The members of each class are spread evenly over (0, 1): the lowest `size` of all hold each class's share.
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(quantile, kind="stable")
    return np.sort(rows[order[:size]]), np.sort(rows[order[size:]])


def _check(raw: RawImages) -> None:
    parts = [("train", raw.train)] + ([("test", raw.test)] if raw.test is not None else [])
    for name, part in parts:
        if len(part) == 0:
            raise DataError(f"{raw.name}: the {name} part is empty; expected images.")
        if part.labels.min() < 0:
            raise DataError(f"{raw.name}: expected labels from 0 on, found {part.labels.min()} in the {name} part.")
    if (highest := int(raw.train.labels.max())) >= len(raw.train):
        raise DataError(f"{raw.name}: expected labels from 0 on without gaps, found {highest} among {len(raw.train)} training images.")
    counts = np.bincount(raw.train.labels)
    if len(counts) < 2 or counts.min() < _LEAST_PER_CLASS:
        scarce = int(counts.argmin())
        raise DataError(
            f"{raw.name}: expected two or more classes with at least {_LEAST_PER_CLASS} training images each, "
            f"found {len(counts)} with {counts[scarce]} of class {scarce}."
        )
    if raw.test is not None:
        given, wanted = raw.test.images.shape[1:], raw.train.images.shape[1:]
        if given != wanted:
            raise DataError(f"{raw.name}: expected test images of the train part's shape {wanted}, found {given}.")
        if raw.test.labels.max() > highest:
            raise DataError(f"{raw.name}: the test part has the label {raw.test.labels.max()}, the train part ends at {highest}.")


def _fingerprint(parts: tuple[Part, ...]) -> str:
    """Changes with any image, label or place in the split: what a kept run is recognised by."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(np.ascontiguousarray(part.labels).data)
    return digest.hexdigest()[:16]
