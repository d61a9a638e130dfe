"""Which function a forward pass calls: a method of its module, a function of its file or of another, and how its arguments are filled."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from normwise.parameters.forward_source.trees import plain_tree_of, tree_of, written
from normwise.parameters.forward_source.ways import Way


@dataclass(frozen=True)
class Code:
    """A function whose source can be read. ``method``: whether its first argument is the module or a context; ``function``: None for one
    that is defined within another."""

    tree: ast.FunctionDef
    method: bool = False
    function: Any = None    # a FunctionType, whose __get__ mypy would call

    def filled(self, given: Sequence[tuple[Way, bool]], named: Mapping[str, Way]) -> dict[str, Way]:
        """Argument -> the ways of what it gets. given: in their order, each with whether it is a ``*list``, which may fill all
        that follow."""
        spec = self.tree.args
        names = [a.arg for a in (*spec.posonlyargs, *spec.args)][self.method :]
        ways = [way for way, _ in given]
        for k, (way, starred) in enumerate(given):
            if starred:
                ways = [*ways[:k], *[frozenset().union(way, *ways[k:])] * max(len(names) - k, 1)]
                break
        filled = dict(zip(names, ways, strict=False))
        for rest, extra in ((spec.vararg, ways[len(names) :]), (spec.kwarg, [w for k, w in named.items() if k not in names])):
            if rest is not None:
                filled[rest.arg] = frozenset().union(*extra)
        known = {*names, *(a.arg for a in spec.kwonlyargs)}
        return filled | {name: way for name, way in named.items() if name in known}


def method(cls: type[nn.Module], name: str, above: FunctionType | None = None) -> Code | None:
    """A method of ``cls``; above: the one that ``super().name`` stands for there."""
    bases = [base for base in cls.__mro__ if name in vars(base)]
    if above is not None:
        own = next((k for k, base in enumerate(bases) if written(vars(base)[name]) is above), len(bases))
        bases = bases[own + 1 :]
    member = vars(bases[0])[name] if bases else None
    function = written(member)
    if function is None or isinstance(member, property):
        return None
    static = isinstance(member, staticmethod)
    tree = plain_tree_of(function) if static else tree_of(function)
    return None if tree is None else Code(tree, not static, function)


def named(scope: Mapping[str, object], node: ast.expr) -> Code | None:
    """A function that stands in a file under the name, or in a module that does: ``modulate``, ``layers.modulate``, ``Fused.apply``."""
    if isinstance(node, ast.Name):
        return _plain(scope.get(node.id))
    owner = scope.get(node.value.id) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and node.attr == "apply":    # type: ignore[attr-defined]
        code = _plain(inspect.getattr_static(owner, "forward", None))
        return None if code is None else Code(code.tree, True, code.function)
    return _plain(vars(owner).get(node.attr)) if isinstance(owner, ModuleType) else None    # type: ignore[attr-defined]


def _plain(member: object) -> Code | None:
    function = None if member is None or isinstance(member, type) else written(member)
    tree = None if function is None else plain_tree_of(function)
    return None if tree is None else Code(tree, False, function)
