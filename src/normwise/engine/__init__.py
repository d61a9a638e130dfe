"""Binds a policy to parameters once, and runs it on packs of equal shape."""

from normwise.engine.program import Engine
from normwise.engine.rules.base import BoundRule
from normwise.engine.rules.registry import load
from normwise.engine.step import Turn

__all__ = ["BoundRule", "Engine", "Turn"]

load()
