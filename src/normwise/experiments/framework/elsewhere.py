"""Runs on any ``concurrent.futures.Executor``, a Dask cluster's among them: several machines work on one study."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch

from normwise import __version__
from normwise.errors import StudyError, need
from normwise.experiments.framework.pool import one_thread
from normwise.experiments.framework.store import Result, Run

_SCHEME = "dask://"
_CONNECTING = 10.0    # seconds to wait for a scheduler
_contexts: dict[bytes, Any] = {}
_turn = threading.Lock()


class Elsewhere(Executor):
    """An executor of ``call(run)`` on another one, whose processes know nothing of the study.

    What runs are trained on travels as its recipe with every run, and is made once in each process. A worker that joins late, or in the
    place of one that died, needs nothing else.

    Args:
        inner: any executor; what it is given is pickled and found by name, so its processes must be able to import normwise.
        setup: gives what runs are trained on; it is pickled.
        slots: how many runs it can do at a time, asked for whenever runs are handed out, since workers come and go.
    """

    def __init__(self, inner: Executor, setup: Callable[[], Any], slots: Callable[[], int]) -> None:
        self.inner, self.slots = inner, slots
        self._setup = pickle.dumps(setup)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """``fn`` is ``call``, whose part ``train_there`` takes."""
        return self.inner.submit(train_there, self._setup, pickle.dumps(args[0]), (__version__, torch.__version__))


def train_there(setup: bytes, run: bytes, versions: tuple[str, str]) -> Result:
    """One run in a process of an executor; StudyError where it has another normwise or torch, which would give other numbers."""
    if versions != (here := (__version__, torch.__version__)):
        study = f"the study {versions[0]} and {versions[1]}"
        raise StudyError(f"a worker has normwise {here[0]} and torch {here[1]}, {study}: install the same everywhere.")
    # One at a time in a process, on one thread: runs seed torch's global generator, and a thread more would change sums.
    with _turn, one_thread():
        if setup not in _contexts:
            _contexts.clear()
            _contexts[setup] = pickle.loads(setup)()
        it: Run = pickle.loads(run)
        return it.train(_contexts[setup])


@contextmanager
def opened(executor: Executor | str, setup: Callable[[], Any]) -> Iterator[Elsewhere]:
    """An executor by its address, ``dask://HOST:PORT``, or one that is there already, which is left open.

    Raises:
        StudyError: for another kind of address, and where no scheduler answers.
        MissingExtraError: without the package distributed.
    """
    if isinstance(executor, Executor):
        yield Elsewhere(executor, setup, lambda: int(getattr(executor, "_max_workers", 1)))
        return
    check_address(executor)
    from distributed import Client

    try:
        client = Client(f"tcp://{executor.removeprefix(_SCHEME)}", timeout=_CONNECTING, set_as_default=False)
    except (OSError, ValueError) as error:
        raise StudyError(f"--executor {executor}: no Dask scheduler answers there ({error}).") from None
    with client:
        # pure=False: with it, two runs of equal settings would be one, and a result that somebody's cluster remembers would do for both.
        yield Elsewhere(client.get_executor(pure=False), setup, lambda: sum(client.nthreads().values()))


def check_address(executor: str) -> None:
    """Before any work: whether an address is one, and whether its package is there."""
    host, _, port = executor.removeprefix(_SCHEME).rpartition(":")
    if not executor.startswith(_SCHEME) or not host or not port.isdecimal():
        raise StudyError(f"--executor {executor!r} is no address of a cluster; give {_SCHEME}HOST:PORT, that of a Dask scheduler.")
    need("dask", "distributed", what="--executor")
