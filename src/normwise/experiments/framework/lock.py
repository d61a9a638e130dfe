"""One study at a time on a file of finished runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from normwise.errors import DataError, StudyError
from normwise.experiments.framework import interrupts

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST = 240


@contextmanager
def locked(path: Path | None, note: Callable[[str], None] = lambda text: None, option: str = "--state") -> Iterator[None]:
    """Within, no other study works on the file of finished runs ``path``; nothing for None.

    The lock is the system's, on a file ``.NAME.lock`` beside it: it goes with the process, however that ends, so none is left over, and it
    holds when the file itself is replaced. Links to a file lead to the same lock. Where there are no such locks ``note`` says so. option:
    that names the file.

    Raises StudyError that names the other process, and DataError where the lock cannot be made.
    """
    if path is None:
        yield
        return
    beside = _beside(path)
    fd = _take(path, beside, note, option)
    if fd is None:
        yield
        return
    try:
        with interrupts.passing(beside):  # removed while it is held; whoever has just opened it sees that it is gone, see _take
            yield
    finally:
        os.close(fd)


def _beside(path: Path) -> Path:
    real = Path(os.path.realpath(path))
    name = f".{real.name}.lock"
    if len(os.fsencode(name)) > _LONGEST:
        name = f".{hashlib.sha256(os.fsencode(real.name)).hexdigest()[:20]}.lock"
    return real.with_name(name)


def _take(path: Path, beside: Path, note: Callable[[str], None], option: str) -> int | None:
    try:
        import fcntl
    except ImportError:
        note(f"{path}: this system has no locks on files; see to it that no other study works on it.")
        return None
    while True:
        try:
            fd = os.open(beside, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise DataError(
                f"{path}: finished runs cannot be kept there, {beside.name} cannot be made beside it ({error.strerror}); "
                f"give a {option} in a folder that can be written."
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(fd, beside):
                os.ftruncate(fd, 0)
                about = {"pid": os.getpid(), "host": platform.node(), "start": time.strftime("%Y-%m-%d %H:%M:%S"),
                         "command": " ".join(sys.argv)[:200]}  # fmt: skip
                os.write(fd, json.dumps(about).encode())
                return fd
            os.close(fd)  # it was another study's, which ended in between and took it away
        except BlockingIOError:
            other = _about(fd)
            os.close(fd)
            raise StudyError(
                f"{path}: another study works on this file: {other}. Wait until it has ended, or end it, or give another {option}."
            ) from None
        except OSError as error:
            os.close(fd)
            if error.errno not in _NO_LOCKS:
                raise DataError(f"{path}: this file cannot be locked ({error.strerror}); give another {option}.") from None
            note(f"{path}: its folder has no locks on files; see to it that no other study works on it.")
            return None


def _same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _about(fd: int) -> str:
    """What the other study wrote; it may have taken the lock this very moment."""
    for _ in range(20):
        try:
            told = json.loads(os.pread(fd, 4096, 0))
            return f"process {int(told['pid'])} on {told['host']}, started {told['start']} ({told['command']})"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.02)
    return "a process that did not say which"
