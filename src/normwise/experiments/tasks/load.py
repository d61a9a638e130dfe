"""A task by its name, on its own data or on the user's."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from typing import Any

from normwise.errors import StudyError, nearest
from normwise.experiments.tasks import models
from normwise.experiments.tasks.task import HELD_OUT, TASKS, Source, Task

__all__ = ["HELD_OUT", "SIZES", "TASKS", "load_task"]

SIZES = ("standard", "half", "tiny")

for _module in pkgutil.iter_modules(models.__path__):
    import_module(f"{models.__name__}.{_module.name}")


def load_task(name: str, data: Source = None, *, size: str = "standard", **options: Any) -> Task:
    """A supervised task, one of ``TASKS``.

    Models run under bf16 autocast where the CPU has instructions for it: on one such core a step takes half of the fp32 time (cnn on
    28×28 0.44, resnet 0.55, lstm 0.55, gpt 0.47) and ends at the same loss; weights stay in fp32.

    Args:
        name: of the task.
        data: a folder or file (see ``tasks.data.splits.load`` and ``tasks.text.load_text``), ``hf:NAME`` for a Hugging Face data set, or
            None for scikit-learn's digits and breast cancer or CPython's reference text.
        size: ``"tiny"``, in fp32, gives the same kind of model in a form that trains in seconds, for tests; ``"half"``, of the tasks
            that have it, the model at half of its width.
        options: of this task, as ``qk_norm=True`` of the GPT.

    Raises:
        StudyError: an unknown name, size or option, or data too small for the model.
        DataError: unusable data.
    """
    if name not in TASKS:
        raise StudyError(f"There is no task {name!r}.{nearest(name, TASKS)}")
    if size not in SIZES:
        raise StudyError(f"There is no size {size!r}.{nearest(size, SIZES)}")
    own = _options(name)
    if size == "half":
        if "half" not in own:
            having = ", ".join(other for other in sorted(TASKS) if "half" in _options(other))
            raise StudyError(f"The task {name} has no size 'half'; those that have it: {having}.")
        options["half"] = True
    for option in options:
        if option not in own:
            raise StudyError(f"The task {name} has no option {option!r}. Allowed: {', '.join(own) or 'none'}.")
    return TASKS[name](data, size == "tiny", **options)


def _options(name: str) -> list[str]:
    """The arguments of a task beside its source and ``tiny``."""
    return list(inspect.signature(TASKS[name]).parameters)[2:]
