"""Binds a policy to parameters once, and runs it on packs of equal shape."""

from importlib import import_module
from pkgutil import iter_modules

from normwise.engine import rules
from normwise.engine.program import Engine
from normwise.engine.rules.base import BoundRule
from normwise.engine.step import Turn

__all__ = ["BoundRule", "Engine", "Turn"]

# Every file of the folder registers its classes and actions when it is imported, so that a new one needs no list elsewhere.
for _module in iter_modules(rules.__path__):
    import_module(f"{rules.__name__}.{_module.name}")
