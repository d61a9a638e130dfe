"""A run apart from the next one: what the target's code leaves in the process is taken back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from normwise.generators import same_draws


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Within, the generators of Python, NumPy and torch begin with ``seed``: runs of a target that forgets one are still paired.

    Afterwards they are as they were, and so are the folder, NumPy's handling of errors, and torch's gradients, default dtype and device,
    threads, determinism, precision of products and checks of autograd.
    """
    with ExitStack() as stack:
        stack.enter_context(same_draws(seed))
        stack.callback(os.chdir, os.getcwd())    # a target that went elsewhere would take the study's files along
        for read, write in _STATE:
            with suppress(RuntimeError):    # torch tells no precision of products where it was set in its old and its new way
                stack.callback(_put_back, read, write, read())
        torch.manual_seed(seed)    # of devices, too, also those that nobody has used yet
        yield


def _put_back(read: Callable[[], Any], write: Callable[[Any], Any], before: Any) -> None:
    with suppress(RuntimeError):
        if read() == before:
            return
    write(before)


_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    # Without a default torch says "cpu", and a default of "cpu" would be another state: it costs each call a look.
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: torch.backends.cudnn.deterministic, lambda on: setattr(torch.backends.cudnn, "deterministic", on)),
    (lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on)),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda checks: torch.autograd.set_detect_anomaly(*checks),
    ),
    (np.geterr, lambda handling: np.seterr(**handling)),
)  # fmt: skip
"""What a process has one of, that decides what a run does: how it is read, and how it is set."""
