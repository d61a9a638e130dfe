"""What Ctrl-C and a request to end do to a command: one calm sentence, no traceback, no process left behind.

The command's own process ends where it stands: the sentence, then ``os._exit``. What a study has finished is on the disk by then, so
nothing is lost that unwinding would save, and it is unwinding through imports, threads and other libraries that prints tracebacks and
hangs. Only while several workers train does the first Ctrl-C merely ask (``finishing``): the study lets the runs under way finish, and
keeps them.

In a process that belongs to somebody else, which calls ``cli.main([...])``, KeyboardInterrupt is raised instead, and Ctrl-C pressed again
while it travels up is not another one. Functions such as ``compare`` that are called outside of a command find Python's own Ctrl-C.

This module imports nothing but a few of Python's own: it watches while torch is imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C, 130. After SIGTERM it is 143 and after SIGHUP 129, by the same rule of shells."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Seconds within which Ctrl-C pressed again means the same.
_ONE_PRESS = 1.0


def _at_first() -> str:
    return "Interrupted before the work began."


class _Watch:
    def __init__(self) -> None:
        self.own = False  # whether the process is the command's own
        self.on = False
        self.sentence: Callable[[], str] = _at_first
        self.prefix = b""  # what a live bar needs before another line, the cursor shown again
        self.children: set[int] = set()
        self.litter: set[str] = set()  # files that go with the command
        self.asks = False  # whether the first Ctrl-C asks only
        self.asked = False
        self.holds = False  # whether results are being written
        self.held: list[int] = []  # the signals that came meanwhile
        self.raised = -_ONE_PRESS
        self.said = self.ended = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asks and not self.asked:
            self.asked = True
        elif self.holds and len(self.held) < 2:  # whoever insists is obeyed
            self.held.append(number)
        else:
            self.end(number)

    def end(self, number: int) -> None:
        if not self.own:
            if time.monotonic() - self.raised < _ONE_PRESS:
                return
            self.raised = time.monotonic()
            raise KeyboardInterrupt
        if self.ended:  # a signal that came while another one is at the next lines
            return
        self.ended = True
        _end_all(self.children)
        for path in list(self.litter):
            with suppress(OSError):
                os.unlink(path)
        if not self.said:
            _write(self.prefix + self.sentence().encode("ascii", "backslashreplace") + b"\n")
        os._exit(128 + number)


_watch = _Watch()


def watch_command() -> None:
    """To be called before torch is imported: where this process is ``python -m normwise`` or the installed command, it is watched."""
    name = os.path.basename(sys.argv[0])
    if name == "-m":
        name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")  # the word before the command's own arguments
    if name.removesuffix(".exe") in ("normwise", "normwise-script.py"):
        _start(own=True)


@contextmanager
def watching(own: bool) -> Iterator[None]:
    """A command within. own: whether the process ends with it; it then stays watched to its last moment."""
    before = None if _watch.on else _start(own)
    _watch.sentence, _watch.said = _at_first, False
    try:
        yield
    finally:
        if before is not None and not _watch.own:
            _stop(before)


def leave(status: int) -> NoReturn:
    """Ends this process with a status, and stays watched while it does.

    ``sys.exit`` would hand the signals back before the interpreter is taken down, which takes a moment once torch is loaded: a request to
    end that comes then is death by a signal, after all results have been delivered.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):    # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(status)


def say(sentence: Callable[[], str]) -> None:
    """What is to be said if the work is interrupted from now on; it is asked for at that moment."""
    _watch.sentence = sentence


def tell() -> None:
    """Says it on standard error, unless it has been said."""
    if not _watch.said:
        _watch.said = True
        with suppress(OSError, ValueError, AttributeError):
            print(_watch.sentence(), file=sys.stderr, flush=True)


@contextmanager
def finishing() -> Iterator[None]:
    """The first Ctrl-C within asks only, and ``check`` tells."""
    _watch.asks, _watch.asked = True, False
    try:
        yield
    finally:
        unheard, _watch.asks = _watch.asks and _watch.asked, False
    if unheard:  # with the last run, nobody checked any more
        _watch.end(signal.SIGINT)


def check() -> None:
    """Raises KeyboardInterrupt, once, where Ctrl-C asked the study to stop."""
    if _watch.asked and _watch.asks:
        _watch.asks = False
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """For the moment in which results are written: a signal within acts when it is over; a third one at once."""
    _watch.holds = True
    try:
        yield
    finally:
        _watch.holds = False
        if _watch.held:
            _watch.end(_watch.held.pop(0))


def live(prefix: bytes = b"") -> None:
    """What must be written to the terminal before any other line; nothing where no bar is live."""
    _watch.prefix = prefix


def own(pid: int) -> None:
    """A child process that has to end with the command."""
    _watch.children.add(pid)


def disown(pid: int) -> None:
    """A child process that has ended."""
    _watch.children.discard(pid)


@contextmanager
def passing(path: str | os.PathLike[str]) -> Iterator[None]:
    """A file that is of no use after this: it is removed at the end, also where a signal ends the command within."""
    _watch.litter.add(name := os.fspath(path))
    try:
        yield
    finally:
        _watch.litter.discard(name)
        with suppress(OSError):
            os.unlink(name)


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Processes started within never see a Ctrl-C, from their first instruction on: they inherit that it is blocked. Pressed meanwhile,
    it reaches this process afterwards; none is lost."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------------------------- details


def _start(own: bool) -> dict[int, Any] | None:
    """What was there before; None where nothing can be watched. A signal that is ignored stays so (nohup, a shell's background jobs), and
    a handler of somebody else's is left alone."""
    if threading.current_thread() is not threading.main_thread():
        return None
    _watch.__init__()  # type: ignore[misc]
    _watch.own, _watch.on = own, True
    # Where a standard stream is closed (``>&-``), the next file that is opened would take its place, and get what is printed.
    with suppress(OSError):
        while own and (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        if own:
            os.close(fd)
    usual = (signal.SIG_DFL, signal.default_int_handler)
    mine = [number for number in (_SIGNALS if own else _SIGNALS[:1]) if signal.getsignal(number) in usual]
    before: dict[int, Any] = {number: signal.signal(number, _watch.handle) for number in mine}
    if not own:
        before[0], sys.unraisablehook = sys.unraisablehook, _again
    return before


def _stop(before: dict[int, Any]) -> None:
    sys.unraisablehook = before.pop(0)
    for number, handler in before.items():
        signal.signal(number, handler)
    _watch.on = False


def _again(unraisable: Any) -> None:
    """Python swallows an exception that is raised in a finalizer or a callback, and prints it: Ctrl-C is to act after it instead."""

    def press() -> None:
        main = threading.main_thread().ident
        if hasattr(signal, "pthread_kill") and main is not None:
            signal.pthread_kill(main, signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)

    if unraisable.exc_type is KeyboardInterrupt:
        _watch.raised = -_ONE_PRESS
        later = threading.Timer(0.02, press)
        later.daemon = True
        later.start()
    else:
        sys.__unraisablehook__(unraisable)


def _end_all(pids: set[int]) -> None:
    """They would end by themselves when this process has: a moment later."""
    kill = getattr(signal, "SIGKILL", signal.SIGTERM)
    for pid in list(pids):
        with suppress(OSError):
            os.kill(pid, kill)
    end = time.monotonic() + 1.0
    for pid in list(pids):
        with suppress(OSError):  # no child any more
            while hasattr(os, "WNOHANG") and os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < end:
                time.sleep(0.002)


def _write(line: bytes) -> None:
    """Past Python's buffers, which the signal may have found half written; a terminal or pipe that takes nothing is not waited for."""
    import select

    with suppress(OSError, ValueError):
        if os.name == "posix" and not select.select([], [2], [], 1.0)[1]:
            return
    with suppress(OSError):
        os.write(2, line)
