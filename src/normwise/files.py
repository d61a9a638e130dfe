"""Files that a user names. What is read is a regular file, what is written is whole or absent, and nothing here waits forever.

A path may lead anywhere: to a pipe that nobody writes into, a device, a link in a circle. Everything that normwise reads or writes by
name goes through this module, so that each such place gives one clear DataError.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from normwise.errors import DataError, OutputError, a_kind_of

__all__ = [
    "append_to", "cache_folder", "check_apart", "check_file", "check_folder", "check_path", "check_unread", "content", "inside", "names_in",
    "opened", "replace", "what_is", "whole",
]  # fmt: skip

FILE, FOLDER, NOTHING = "a file", "a folder", "nothing"
_KINDS = (
    (stat.S_ISREG, FILE), (stat.S_ISDIR, FOLDER), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
_REASONS = {
    errno.ELOOP: "a link that leads back to itself", errno.ENAMETOOLONG: "a name that is too long",
    errno.ENOTDIR: "a place inside a file", errno.EACCES: "a place that you may not look into",
}  # fmt: skip
_TRIED = 1 << 12    # bytes that a folder is tried with: an empty file can be made on a full disk


def cache_folder() -> Path:
    """``$NORMWISE_CACHE``, else ``normwise`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    own = os.environ.get("NORMWISE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normwise"


def check_path(path: Any, hint: str = "") -> None:
    """DataError for what is no path: another order of arguments, as a rule. ``os`` would take a number for an open file."""
    if not isinstance(path, str | os.PathLike):
        raise DataError(f"a path is a str or a pathlib.Path; given {a_kind_of(path)}.{hint}")


def what_is(path: str | os.PathLike[str]) -> str:
    """``"a file"``, ``"a folder"``, ``"nothing"``, or what else stands there, in words. Follows links, opens nothing, never waits."""
    check_path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if os.path.islink(path) else NOTHING
    except OSError as error:
        return _REASONS.get(error.errno or 0, f"what cannot be read ({error.strerror})")
    except ValueError:    # a zero byte, or half of a surrogate pair
        return "a name that no file can have"
    return next((name for test, name in _KINDS if test(mode)), "what is no file")


def opened(path: str | os.PathLike[str], expected: str = FILE) -> BinaryIO:
    """A regular file, open for reading.

    Raises DataError, "expected ..., found ...", for everything else. A pipe is refused rather than waited for: it is opened without
    blocking and looked at again, since another may have taken the file's place in between.
    """
    kind = what_is(path)
    if kind != FILE:
        raise DataError(f"{path}: expected {expected}, found {kind}.")
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise DataError(f"{path}: expected {expected}, found a file that cannot be read ({error.strerror}).") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataError(f"{path}: expected {expected}, found what is no longer a file.")
    return os.fdopen(handle, "rb")


def content(path: str | os.PathLike[str], most: int, expected: str = FILE) -> bytes:
    """The whole of a regular file of at most ``most`` bytes; DataError for everything else, before it is read."""
    with opened(path, expected) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DataError(f"{path}: expected {expected} of {most} bytes at most, found {size}.")
        try:
            read = file.read(most + 1)    # it may grow while it is read
        except OSError as error:
            raise DataError(f"{path}: expected {expected}, found a file that cannot be read ({error.strerror}).") from None
    if len(read) > most:
        raise DataError(f"{path}: expected {expected} of {most} bytes at most, found more.")
    return read


def names_in(folder: str | os.PathLike[str]) -> set[str]:
    """What a folder holds; DataError for one that may be entered but not listed."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be listed ({error.strerror}); name the file in it, or make it readable.") from None


# ------------------------------------------------------------------------------------------------- tried before the work


def check_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """Makes the folder if it is missing and tries to write into it, which also finds a full disk; DataError if that fails.

    Gives the folders that were made, the innermost first, so that a command that is refused later can take them away again.
    """
    folder = Path(folder)
    if (kind := what_is(folder)) not in (FOLDER, NOTHING):
        raise DataError(f"{folder}: results cannot be written into this folder (it is {kind}); give one that can be.")
    missing = [one for one in (folder, *folder.parents) if what_is(one) == NOTHING]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED))
            file.flush()
            # Many file systems report a full disk only when the data reach it.
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{folder}: results cannot be written into this folder ({error.strerror}); give one that can be.") from None
    return missing


def check_file(path: str | os.PathLike[str] | None) -> list[Path]:
    """DataError if the file, or the folder it would stand in, cannot be written; None passes. Changes no file.

    Gives the folders that were made for it, as :func:`check_folder` does.
    """
    if path is None:
        return []
    path = Path(path)
    kind = what_is(path)
    if kind == FOLDER:
        raise DataError(f"{path}: results cannot be written to a folder; give the name of a file in it.")
    if kind not in (FILE, NOTHING):
        raise DataError(f"{path}: results cannot be written here, since this is {kind}; give the name of a file.")
    made = check_folder(path.parent)
    if kind == NOTHING:
        return made    # making it and removing it again could take away what another process has just begun
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise DataError(f"{path}: this file cannot be written ({error.strerror}); give another one.") from None
    return made


# ------------------------------------------------------------------------------------------------------------- writing


def check_apart(places: Iterable[tuple[str, str | os.PathLike[str] | None]]) -> None:
    """places: what is written, and where, None for nowhere; the same may be written to one place twice.

    Raises:
        DataError: two different things would be.
    """
    seen: dict[str, str] = {}
    for what, path in places:
        other = seen.setdefault(_real(path), what) if path is not None else what
        if other != what:
            raise DataError(f"{path}: {other} and {what} cannot be written to one place; give two files.")


def check_unread(places: Iterable[tuple[str, str | os.PathLike[str] | None]], read: Iterable[str | os.PathLike[str]]) -> None:
    """places: as for :func:`check_apart`. read: files that a command reads.

    Raises:
        DataError: something would be written over a file that is read, whatever it is called there: links of both kinds are followed.
    """
    sources = [(_identities(source), source) for source in read]
    for what, path in places:
        mine = _identities(path) if path is not None else set()
        over = next((source for known, source in sources if known & mine), None)
        if over is not None:
            raise DataError(f"{path}: {what} would be written over {over}, which this command reads; give another name.")


def inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path leads into a folder, at any depth."""
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def _real(path: str | os.PathLike[str]) -> str:
    """Where links lead; a name that no file can have, as it is, since whoever writes there refuses it."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return os.fspath(path)


def _identities(path: str | os.PathLike[str]) -> set[str | tuple[int, int]]:
    """Two paths that share one of these lead to one file."""
    found: set[str | tuple[int, int]] = {_real(path)}
    with suppress(OSError, ValueError):
        about = os.stat(path)
        found.add((about.st_dev, about.st_ino))
    return found


@contextmanager
def whole(path: str | os.PathLike[str], beside: str | None = None) -> Iterator[BinaryIO]:
    """Opens a file to write ``path``'s new content into: a reader, or a kill at any moment, sees the old content or the new, never a half.

    It is written beside ``path``, synced to the disk and renamed at the end; an exception within leaves ``path`` as it was and nothing
    beside it. Links are followed. beside: the name of the file meanwhile; by default one of this process's own.

    Raises OutputError if ``path`` is something other than a regular file, or writing fails.
    """
    target = _place(path)
    fresh = target.with_name(beside or f".{target.name[:40]}.{os.getpid()}.new")
    try:
        if what_is(fresh) not in (FILE, NOTHING):    # a pipe in this place would be waited for
            raise OutputError(f"Cannot write {path}: {fresh} is in the way, which is {what_is(fresh)}. Remove it.")
        with fresh.open("wb") as file:
            yield file
            file.flush()
            # Without it a power cut may keep the rename and lose the content.
            os.fsync(file.fileno())
        if target.exists():
            # A new file has the umask's mode; whoever made the old one readable to others wants it to stay so.
            os.chmod(fresh, stat.S_IMODE(target.stat().st_mode))
        os.replace(fresh, target)
        _sync_folder(target.parent)
    # Ctrl-C too must leave nothing beside the file.
    except BaseException as error:
        if what_is(fresh) == FILE:
            with suppress(OSError):
                fresh.unlink()
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"Cannot write {path}: {error.strerror or error}. Give a place that can be written.") from error
        raise


def replace(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes ``content`` to ``path``, whole or not at all; missing folders are made. OutputError where that fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"Cannot write {path}: {reason}. Give a folder that can be written.") from error
    with whole(path) as file:
        file.write(content)
    return path


def append_to(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, made if it is missing, open for adding to its end without a buffer. OutputError for everything else."""
    try:
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.open("ab", buffering=0)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"Cannot write {path}: {error.strerror or error}. Give a place that can be written.") from error


def _place(path: str | os.PathLike[str]) -> Path:
    """Where a link leads; OutputError for what is neither a file nor nothing, so that no rename takes a device's place."""
    if (kind := what_is(path)) not in (FILE, NOTHING):
        raise OutputError(f"Cannot write {path}: it is {kind}, and only files are written. Give another place.")
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is. Not every file system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
