"""The extra that the page needs, and files that are whole or absent (see ``normwise.files``)."""

from __future__ import annotations

import importlib.util

from normwise.errors import MissingExtra
from normwise.files import replace

__all__ = ["replace", "require"]


def require(*modules: str) -> None:
    """Checks that ``modules`` can be imported.

    Raises:
        MissingExtra: names those that cannot, and the extra to install.
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtra(f"A report needs {', '.join(absent)}, which cannot be found here. "
                           "Install the extra: pip install 'normwise[report]'.")
