"""One worker process of a study's pool. It is started by its path, so that it listens to its study before anything heavy is imported.

What comes in on standard input and goes out on standard output are messages: eight bytes that tell the length, then a pickle. The first is
the study's ``sys.path``, the second gives what runs are trained on, each other one is a call. The end of the input is the end of the study,
however it came, and ends this process at once, whatever it is doing.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from typing import BinaryIO


def _listen(stream: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> None:
    while len(head := stream.read(8)) == 8:
        message = stream.read(int.from_bytes(head, "little"))
        inbox.put(message)
    os._exit(1)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study to handle
    while (nothing := os.open(os.devnull, os.O_RDWR)) <= 2:  # the study may have no standard error
        pass
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages, inbox), daemon=True).start()
    sys.path[:] = pickle.loads(inbox.get())

    from normwise.experiments.framework.pool import serve

    try:
        serve(inbox.get, answers)
    except BrokenPipeError:  # the study is gone, which the listener is about to hear
        os._exit(1)


if __name__ == "__main__":
    _main()
