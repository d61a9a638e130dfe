"""Files that are whole or absent, and the extra that the page needs."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from normwise.errors import DataError, MissingExtra


def require(*modules: str) -> None:
    """Checks that ``modules`` can be imported.

    Raises:
        MissingExtra: names those that cannot, and the extra to install.
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtra(f"A report needs {', '.join(absent)}, which cannot be found here. "
                           "Install the extra: pip install 'normwise[report]'.")


def replace(path: Path, content: bytes) -> Path:
    """Writes ``content`` beside ``path``, then moves it there: a reader sees the old file or the new one, never a half.

    Raises:
        DataError: the folder cannot be made or written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Give a folder that can be written.") from error
    return path
