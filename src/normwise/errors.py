"""Errors write their own message: what was given, what is allowed, what to do. Each is also the built-in kind a caller would expect."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable

# Characters of a message: what is given may be a book, and its beginning and end tell which.
LONGEST = 4000


class NormwiseError(Exception):
    """Base of every error that normwise raises on purpose; its message is one clear sentence."""

    def __init__(self, message: str = "") -> None:
        half = LONGEST // 2 - 10
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} [...] {message[-half:]}")


class PolicyError(NormwiseError, ValueError):
    """A rule or a policy that cannot mean anything, found before anything was changed."""


class LayoutError(NormwiseError, ValueError):
    """A parameter whose axes cannot be read without guessing, or a block that it does not have."""


class NormError(NormwiseError, ValueError):
    """A norm used on a shape, a dtype or a radius that it is not defined for."""


class NonFiniteError(NormwiseError, RuntimeError):
    """Gradients that are not finite, under ``on_nonfinite="raise"``; the message names the parameters."""


class DataError(NormwiseError, ValueError):
    """A missing, truncated or wrong data file, or an output folder that cannot be written."""


class OutputError(DataError, OSError):
    """Results that could not be written after the work, or in the middle of it: a full disk, a folder that is gone.

    What is found before the work is a plain DataError; the command line has a status of its own for each.
    """


class MissingExtraError(NormwiseError, ModuleNotFoundError):
    """Packages of an extra that are not installed; the message has the pip command that installs them."""


class StudyError(NormwiseError, ValueError):
    """A study that cannot be run as asked."""


def need(extra: str, *packages: str, what: str) -> None:
    """Stands before the import of an extra's packages.

    Args:
        extra: of normwise: ``"yaml"``, ``"study"``, ``"report"``, ``"prune"``, ``"inspect"``, ``"datasets"``, ``"dask"``.
        packages: as they are imported; nothing is imported here.
        what: what cannot do without them, as the beginning of a sentence: ``"a report"``.

    Raises:
        MissingExtraError: where one of them is not installed.
    """
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise MissingExtraError(f"{what} needs {', '.join(absent)}, which cannot be found here: pip install 'normwise[{extra}]'")


def need_version(package: str, least: str, what: str) -> None:
    """Stands before the import of a package that normwise works with and does not bring.

    Args:
        package: as pip knows it.
        least: the first version that has what is needed: ``"5.2"``.
        what: what cannot do without it, as the beginning of a sentence.

    Raises:
        MissingExtraError: where it is not installed, or older.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if [int(n) for n in re.findall(r"\d+", found)[:3]] < [int(n) for n in least.split(".")]:
        there = f"version {found} is installed" if found else "it is not installed"
        raise MissingExtraError(f"{what} needs {package} {least} or newer, and {there}: pip install '{package}>={least}'")


def printable(text: str) -> str:
    """What was given, as a name in a file or an argument, with everything escaped that a terminal would take for an order, or that no text
    file can hold."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint for an unknown word: ``" Did you mean 'spectral'?"`` where one is near, then the list of what is allowed.

    Near is a word that begins with what was given (``"clip"``: ``"clip_norm"``), or a like one with the same first letter; with another
    only where it is very like, or ``"zero"`` would be suggested for ``"error"``.
    """
    options = sorted(allowed)
    begun = sorted((o for o in options if given and o.lower().startswith(given.lower())), key=len)
    folded = {o.lower(): o for o in options}
    like = difflib.get_close_matches(given.lower(), folded, n=3, cutoff=0.6)
    likeness = {o: difflib.SequenceMatcher(None, o, given.lower()).ratio() for o in like}
    close = begun[:1] or [folded[o] for o in like if o[0] == given.lower()[0] or likeness[o] >= 0.75]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(options)}."


def a_kind_of(thing: object) -> str:
    """Its class with its article, by the letter: an Adam, a list."""
    name = type(thing).__name__
    return f"a{'n' * name.lower().startswith(tuple('aeio'))} {name}"
