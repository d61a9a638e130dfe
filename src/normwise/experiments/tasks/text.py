"""Text for a study as numbers of characters, in three parts; and the task of predicting the next character."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normwise.errors import DataError
from normwise.experiments.tasks.data import hub
from normwise.experiments.tasks.data.readers import read_one
from normwise.experiments.tasks.task import Batch, Part, Recipe, Task

__all__ = ["TextData", "TextTask", "load_text"]

_TRAIN_SHARE = 0.9
_LEAST = 10_000  # characters: the held-out parts then have 500 each
_SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class TextData:
    """A text in three parts that follow each other: the first nine tenths, and two halves of the rest.

    name: of the source. vocabulary: all characters of the text, sorted; a character's number is its place there.
    train, validation, test: numbers ``(n,)``, int64. key: a fingerprint of the text.
    """

    name: str
    vocabulary: str
    train: Tensor
    validation: Tensor
    test: Tensor
    key: str

    @classmethod
    def of(cls, name: str, text: str) -> TextData:
        """The parts of a text; DataError for one of fewer than 10,000 characters."""
        if len(text) < _LEAST:
            raise DataError(f"{name}: expected a text of {_LEAST} characters or more, found {len(text)}.")
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        letters, numbers = np.unique(points, return_inverse=True)
        codes = torch.from_numpy(numbers.astype(np.int64))
        first, second = round(len(codes) * _TRAIN_SHARE), round(len(codes) * (1 + _TRAIN_SHARE) / 2)
        vocabulary = "".join(chr(letter) for letter in letters)
        key = hashlib.sha256(points.tobytes()).hexdigest()[:16]
        return cls(name, vocabulary, codes[:first], codes[first:second], codes[second:], key)

    def part(self, name: Part) -> Tensor:
        """The numbers of one part."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class TextTask(Task):
    """Predict every next character; the model maps numbers ``(n, length)`` to logits ``(n, length, vocabulary)``.

    context: characters a sample, of which the model sees the ones before. A batch starts at places drawn evenly from the
    training part. Validation and test are scored on all their characters but the first, in windows of ``context`` that do not
    overlap; the training part on as many windows as the validation part has, evenly spread.
    """

    def __init__(self, recipe: Recipe, data: TextData, context: int) -> None:
        super().__init__(recipe, (len(data.train) - 1) // context, data.key)
        self.data, self.context, sizes = data, context, len(data.vocabulary)
        # Of a model that knows how often each character comes; one more of each, so that none has probability 0.
        seen = torch.bincount(data.train, minlength=sizes) + 1
        self.guess = -float((seen / seen.sum()).log()[data.test].mean())
        self.facts = {
            "name": data.name, "train": len(data.train), "validation": len(data.validation), "test": len(data.test), "classes": sizes,
            "fingerprint": data.key,
        }  # fmt: skip

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        chance = torch.Generator().manual_seed(seed)
        windows = self.data.train.unfold(0, self.context + 1, 1)
        while True:
            yield _asked(windows[torch.randint(len(windows), (batch,), generator=chance)])

    def scored(self, part: Part) -> Iterable[Batch]:
        text = self.data.part(part)
        windows = text.unfold(0, self.context + 1, self.context)
        if part == "train":
            spread = torch.linspace(0, len(windows) - 1, min(len(windows), -(-len(self.data.validation) // self.context)))
            windows = windows[spread.round().long()]
        yield from (_asked(some) for some in torch.split(windows, _SCORED_AT_ONCE))
        rest = text[(len(text) - 1) // self.context * self.context :]
        if part != "train" and len(rest) > 1:
            yield _asked(rest[None])


def _asked(windows: Tensor) -> Batch:
    """Windows ``(n, length + 1)`` as what is read and what is to be predicted."""
    return windows[:, :-1], windows[:, 1:]


def load_text(source: str | Path | None = None) -> TextData:
    """A text in three parts.

    source: a text file, a folder with exactly one ``*.txt`` in it, a Hugging Face data set (see ``tasks.data.hub``), or None for the
    reference text that CPython carries (``pydoc_data.topics``: about half a million characters, which differ between versions
    of Python, so its fingerprint does too).

    Raises DataError, in one sentence, for a source that is missing, empty, too short, longer than 128 MiB or not UTF-8.
    """
    if source is None:
        try:
            topics: dict[str, str] = import_module("pydoc_data.topics").topics
        except ImportError:
            raise DataError("This Python carries no pydoc_data.topics; give a text file with --data.") from None
        return TextData.of("pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)))
    if hub.is_dataset(source):
        return TextData.of(hub.name_of(source), hub.read_text(source))
    path, text = read_one(source, ".txt", "text")
    return TextData.of(str(path), text)
