"""Two threads that share work out among themselves. torch's own threads would wait for each other at every call, busily: on a machine that
does other work, too, a decomposition takes twenty times as long with them as without."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def alone() -> Iterator[None]:
    """torch with one thread within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_out(work: Callable[[int], None], count: int, helped: bool = True) -> None:
    """``work(i)`` for every i below ``count``, by this thread and, if ``helped``, another one. What one of them raises is raised here."""
    places, raised = itertools.count(), list[BaseException]()

    def worker() -> None:
        try:
            while (i := next(places)) < count and not raised:
                work(i)
        except BaseException as error:    # the other thread stops, and the caller hears of it
            raised.append(error)

    def helping() -> None:
        torch.set_num_threads(1)    # what a thread finds is the machine's, not its starter's
        worker()

    helper = threading.Thread(target=helping, daemon=True) if helped and count > 1 else None
    if helper is not None:
        helper.start()
    worker()
    if helper is not None:
        helper.join()
    if raised:
        raise raised[0]
