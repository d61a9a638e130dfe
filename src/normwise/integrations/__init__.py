"""Other libraries' trainers and files, one file for each; each imports its library, and is imported where it is first used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

MODULES = ("distributed_checkpoint", "lightning", "transformers")

if TYPE_CHECKING:
    from normwise.integrations import distributed_checkpoint as distributed_checkpoint
    from normwise.integrations import lightning as lightning
    from normwise.integrations import transformers as transformers
else:

    def __getattr__(name: str) -> ModuleType:
        """``nw.integrations.transformers``, without an import of its own."""
        if name in MODULES:
            return import_module(f"normwise.integrations.{name}")
        raise AttributeError(f"module 'normwise.integrations' has no attribute {name!r}; there are {', '.join(MODULES)}")
