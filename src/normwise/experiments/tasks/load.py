"""A task by its name, on its own data or on the user's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from normwise.errors import StudyError, nearest
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.images import ImageTask
from normwise.experiments.tasks.models.cnn import CNN
from normwise.experiments.tasks.models.gpt import GPT
from normwise.experiments.tasks.models.lstm import CharLSTM
from normwise.experiments.tasks.models.resnet import ResNet
from normwise.experiments.tasks.supervised import Recipe
from normwise.experiments.tasks.task import Task
from normwise.experiments.tasks.text import TextTask, load_text

__all__ = ["SIZES", "TASKS", "load_task"]

SIZES = ("standard", "tiny")
_SMALL_SIDE = 16  # images below this learn from smaller batches: there are few of them in the sets that have them
Source = str | Path | None


def load_task(name: str, data: Path | str | None = None, *, size: str = "standard", qk_norm: bool = False) -> Task:
    """A supervised task.

    ====== ============================================ =========== ========= ======================== ====================
    name   model                                        parameters  metric    batch                    default data
    ====== ============================================ =========== ========= ======================== ====================
    cnn    the article's, see ``tasks.cnn``             by the data accuracy  128, below 16 pixels 64  scikit-learn digits
    resnet 8 residual blocks, BatchNorm, flips, crops   0.70M       accuracy  128                      scikit-learn digits
    lstm   two LSTM layers of 256                       0.96M       loss      32 × 64 characters       ``pydoc_data.topics``
    gpt    pre-norm transformer, width 128, four blocks 0.82M       loss      16 × 128 characters      ``pydoc_data.topics``
    ====== ============================================ =========== ========= ======================== ====================

    data: a folder or file (see ``tasks.data.load`` and ``tasks.text.load_text``), ``hf:NAME`` for a Hugging Face data set, or None.
    Models run under bf16 autocast: on one core with bf16 instructions a step takes half of the fp32 time (cnn on 28×28 0.44, resnet
    0.55, lstm 0.55, gpt 0.47) and ends at the same loss; weights stay in fp32. The cnn on small images, which it slows, is in fp32.
    size: ``"tiny"``, in fp32, gives the same kind of model in a form that trains in seconds, for tests. qk_norm: of the GPT only.

    Raises StudyError for an unknown name or size, and for data too small for the model; DataError for unusable data.
    """
    if name not in TASKS:
        raise StudyError(f"There is no task {name!r}.{nearest(name, TASKS)}")
    if size not in SIZES:
        raise StudyError(f"There is no size {size!r}.{nearest(size, SIZES)}")
    if qk_norm and name != "gpt":
        raise StudyError(f"qk_norm=True is for the task gpt; {name} has no attention.")
    return TASKS[name](data, size, qk_norm)


def _cnn(source: Source, size: str, _: bool) -> Task:
    data = load(source)
    channels = (32, 64) if size == "standard" else (4, 8)
    small = min(data.shape[1:]) < _SMALL_SIDE
    model = partial(CNN, data.shape, data.classes, channels)
    recipe = Recipe("cnn", size, "accuracy", 64 if small else 128, model, bf16=size == "standard" and not small)
    return ImageTask(recipe, data, augmented=False)


def _resnet(source: Source, size: str, _: bool) -> Task:
    data = load(source)
    shape: dict[str, tuple[int, ...] | int] = {} if size == "standard" else {"widths": (8, 16), "depth": 1}
    model = partial(ResNet, data.shape[0], data.classes, **shape)  # type: ignore[arg-type]
    batch = 128 if size == "standard" else 32
    return ImageTask(Recipe("resnet", size, "accuracy", batch, model, bf16=size == "standard"), data, augmented=True)


def _lstm(source: Source, size: str, _: bool) -> Task:
    text = load_text(source)
    width, hidden, batch, context = (128, 256, 32, 64) if size == "standard" else (16, 32, 8, 32)
    model = partial(CharLSTM, len(text.vocabulary), width, hidden)
    return TextTask(Recipe("lstm", size, "loss", batch, model, bf16=size == "standard"), text, context)


def _gpt(source: Source, size: str, qk_norm: bool) -> Task:
    text = load_text(source)
    width, layers, heads, batch, context = (128, 4, 4, 16, 128) if size == "standard" else (32, 2, 2, 8, 32)
    model = partial(GPT, len(text.vocabulary), width, layers, heads, context, qk_norm)
    return TextTask(Recipe("gpt", size, "loss", batch, model, size == "standard", "qknorm" if qk_norm else ""), text, context)


TASKS: dict[str, Callable[[Source, str, bool], Task]] = {"cnn": _cnn, "resnet": _resnet, "lstm": _lstm, "gpt": _gpt}
