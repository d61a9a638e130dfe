"""Runs on one thread each, in this process or in several: the numbers do not depend on how many run at a time."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from normwise.errors import StudyError
from normwise.experiments.framework import interrupts
from normwise.experiments.framework.store import Result, Run

_WORKER = Path(__file__).with_name("worker.py")
_POLL = 0.2  # seconds between two looks at whether Ctrl-C was pressed
STOPPING = "Stopping: {} runs are under way; they are finished and kept. Ctrl-C once more ends them."
_context: Any = None


class WorkerKilled(StudyError):
    """A worker process is gone, and the run with it."""


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch on so many threads within, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """torch on one thread within."""
    return on_threads(1)


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


class Workers(Executor):
    """Processes that do one call at a time (see ``worker.py``), each led by a thread of this process that writes to it and reads from it.

    Nothing but those threads ever waits for a worker, and a pipe to a process that is gone is an error at once: a worker that dies, at
    whatever moment, ends the pool with BrokenProcessPool in every future that is not done. So does what ``setup`` raises in a worker, as it
    is. Workers see no Ctrl-C and end when this process does, also when it is killed.
    """

    def __init__(self, count: int, setup: Callable[[], Any]) -> None:
        self._hello = pickle.dumps(list(sys.path)), pickle.dumps(setup)
        self._jobs: queue.SimpleQueue[tuple[Future[Any], bytes] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        try:
            for _ in range(count):
                self._processes.append(_process())
        except OSError as error:
            self.kill()
            raise StudyError(f"A worker process cannot be started ({error.strerror or error}); give a smaller --workers.") from None
        except BaseException:
            self.kill()
            raise
        for process in self._processes:
            self._threads.append(threading.Thread(target=self._lead, args=(process,), daemon=True))
            self._threads[-1].start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        job = future, pickle.dumps(partial(fn, *args, **kwargs))
        with self._lock:
            if self._error is None:
                self._jobs.put(job)
            else:
                future.set_exception(self._error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """What was submitted is done first, unless it is cancelled."""
        if cancel_futures:
            self._drain(Future.cancel)
        for _ in self._threads:
            self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def kill(self) -> None:
        """The end of all workers, whatever they are doing."""
        for process in self._processes:
            with suppress(OSError):
                process.kill()
        for process in self._processes:
            process.wait()
            interrupts.disown(process.pid)
        for thread in self._threads:
            thread.join(1.0)  # the end of its pipe, or of the queue, ends it
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close() if pipe is not None else None

    # ----------------------------------------------------------------------------------------- in the thread of a worker

    def _lead(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        under_way: Future[Any] | None = None
        try:
            for message in self._hello:
                _send(process.stdin, message)
            good, error = _receive(process.stdout)
            if not good:
                raise error
            while (job := self._jobs.get()) is not None:
                if not job[0].set_running_or_notify_cancel():
                    continue
                under_way = job[0]
                _send(process.stdin, job[1])
                good, value = _receive(process.stdout)
                under_way = None
                job[0].set_result(value) if good else job[0].set_exception(value)
        except (EOFError, BrokenPipeError, ConnectionError):
            self._fail(BrokenProcessPool("a worker process is gone"), under_way)
        except BaseException as error:
            self._fail(error, under_way)

    def _fail(self, error: BaseException, under_way: Future[Any] | None) -> None:
        with self._lock:
            self._error = self._error or error
        if under_way is not None:
            under_way.set_exception(self._error)
        self._drain(lambda future: future.set_exception(self._error) if future.set_running_or_notify_cancel() else None)

    def _drain(self, what: Callable[[Future[Any]], object]) -> None:
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    what(job[0])


def _process() -> subprocess.Popen[bytes]:
    """-P: the folder of worker.py is no place to import from."""
    command, flags = [sys.executable, "-P", os.fspath(_WORKER)], getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows: no Ctrl-C
    with interrupts.no_interrupts():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, creationflags=flags)
        interrupts.own(process.pid)
    return process


def _send(stream: Any, message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def _receive(stream: Any) -> Any:
    head = stream.read(8)
    message = stream.read(int.from_bytes(head, "little")) if len(head) == 8 else b""
    if len(head) < 8 or len(message) < int.from_bytes(head, "little"):
        raise EOFError
    return pickle.loads(message)


def serve(receive: Callable[[], bytes], answers: BinaryIO) -> None:
    """What a worker does: sets itself up with the first message, then answers calls, for ever."""
    first = True
    while True:
        message = receive()
        try:
            if first:
                _start(pickle.loads(message))
                torch.set_num_threads(1)
            answer = pickle.dumps((True, None if first else pickle.loads(message)()))
        except Exception as error:
            answer = pickle.dumps((False, _portable(error)))
        first = False
        _send(answers, answer)


def _portable(error: Exception) -> Exception:
    """With the worker's traceback, which would be lost; as a RuntimeError where it cannot travel."""
    told = "".join(traceback.format_exception(error))
    error.add_note(f"In a worker process:\n{told}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(told)
    return error


# ----------------------------------------------------------------------------------------------------- for the studies


@contextmanager
def open_pool(workers: int, setup: Callable[[], Any], context: Any = None) -> Iterator[Executor]:
    """An executor of ``call(run)``. setup: gives what runs are trained on, once in every process; it is pickled. context: the same, for
    this process, where it is there already."""
    if workers == 1:
        _start(setup if context is None else lambda: context)
        yield Here()
        return
    executor = Workers(workers, setup)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        executor.kill()


@contextmanager
def working(executor: Executor) -> Iterator[None]:
    """For the loop that hands runs out and collects them with ``finished``. A worker that was killed is one clear StudyError; what had
    finished is kept by whoever collected it. With several workers the first Ctrl-C of a command is a KeyboardInterrupt out of ``finished``,
    so that the loop can let the runs that are under way finish."""
    try:
        if isinstance(executor, Here):  # a run that is under way is in this process, and goes with it
            yield
        else:
            with interrupts.finishing():
                yield
    except Exception as error:
        if isinstance(error, CancelledError) or type(error).__module__.startswith("distributed"):
            raise StudyError(
                f"The cluster gave a run up ({type(error).__name__}: {str(error)[:200]}); finished runs are kept. "
                "Start the same command again when it has workers."
            ) from None
        if not isinstance(error, BrokenExecutor):
            raise
        raise WorkerKilled(
            "A worker process was killed from outside, perhaps for want of memory; finished runs are kept. "
            "Start the same command again, with a smaller --workers if it is memory."
        ) from None


def finished(pending: Collection[Future[Any]]) -> list[Future[Any]]:
    """Waits until some of them are done, and gives these, those that failed last."""
    while True:
        interrupts.check()
        done, _ = wait(pending, _POLL, FIRST_COMPLETED)
        if done:
            return sorted(done, key=lambda future: future.exception() is not None)


def call(run: Run) -> Result:
    """One run on what this process was set up with."""
    if _context is None:
        raise RuntimeError("a run was called outside a pool, so there is no data; call run.train(data).")
    return run.train(_context)


def _start(setup: Callable[[], Any]) -> None:
    global _context
    _context = setup()
