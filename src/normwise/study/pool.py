"""Runs on one thread each, in this process or in several: the numbers do not depend on how many run at a time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

import torch

from normwise.errors import StudyError

_context: Any = None


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread within, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Here(Executor):
    """Runs each job where and when it is submitted: what one worker is, without a second process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with one_thread():
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
        return future


@contextmanager
def open_pool(workers: int, setup: Callable[[], Any]) -> Iterator[Executor]:
    """An executor of ``call(run)``. setup: gives what runs are trained on, once in every process; it is pickled. The processes ignore
    Ctrl-C, which is for the study to handle: it lets the runs that are under way finish, and keeps them."""
    if workers == 1:
        _start(setup, own_process=False)
        yield Here()
        return
    executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(setup,))
    with _ignoring_interrupts():
        for _ in range(workers):  # each submission that finds nobody idle starts one process
            executor.submit(_ready)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def telling_of_lost_workers() -> Iterator[None]:
    """A worker that was killed is one clear StudyError; what had finished is kept by whoever collected it."""
    try:
        yield
    except BrokenProcessPool:
        raise StudyError(
            "A worker process was killed from outside, perhaps for want of memory; finished runs are kept. "
            "Start the same command again, with a smaller --workers if it is memory."
        ) from None


def pool(workers: int, data: Any) -> AbstractContextManager[Executor]:
    """An executor of ``call(run)`` on the data."""
    return open_pool(workers, partial(_itself, data))


def _itself(data: Any) -> Any:
    return data


class Trainable(Protocol):
    """A run that knows how it is trained."""

    def train(self, context: Any, /) -> dict[str, Any]: ...


def call(run: Trainable) -> dict[str, Any]:
    """One run on what this process was set up with."""
    return run.train(_known())


def _known() -> Any:
    if _context is None:
        raise RuntimeError("a run was called outside a pool, so there is no data; call run.train(data).")
    return _context


def _start(setup: Callable[[], Any], own_process: bool = True) -> None:
    global _context
    _context = setup()
    if own_process:
        torch.set_num_threads(1)
        threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose study was killed would wait for its next run for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ready() -> bool:
    return True


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started within inherit that SIGINT is ignored, from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
