"""The syntax trees of a module's methods."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar

# Methods of a tensor that change neither the order nor the number of its axes.
KEPT = (
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "requires_grad_", "cuda", "cpu",
)  # fmt: skip
_P = ParamSpec("_P")
_R = TypeVar("_R")


def cached(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``functools.cache`` with the function's own types; a class is read once."""
    return functools.cache(function)    # type: ignore[return-value]


@cached
def functions(cls: type) -> tuple[ast.FunctionDef, ...]:
    """The syntax trees of the methods of ``cls`` and its bases down to the one that has the forward pass, none of torch's own; a subclass's
    method hides that of its base. What stands below knows nothing of this module's parameters."""
    found: dict[str, ast.FunctionDef | None] = {}
    for base in cls.__mro__:
        if (base.__module__ or "").partition(".")[0] in ("torch", "builtins"):
            break
        own = {name: member for name, member in vars(base).items() if isinstance(member, FunctionType) and name not in found}
        found |= {name: tree_of(inspect.unwrap(member)) for name, member in own.items()}
        if "forward" in vars(base):
            break
    return tuple(tree for tree in found.values() if tree is not None)


@cached
def tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """Of a method, whose module is called ``self``."""
    parsed = _parsed(function)
    return None if parsed is None else _with_self(parsed)


def _parsed(function: FunctionType) -> ast.FunctionDef | None:
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError, IndexError):
        return None
    return parsed if isinstance(parsed, ast.FunctionDef) else None


plain_tree_of = cached(_parsed)
"""Of a function that belongs to no module."""


def written(member: object) -> FunctionType | None:
    """The function that an author wrote, within decorators, ``torch.jit.script`` and ``torch.compile``; None for torch's own, and for what
    is no function."""
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    for kept in ("_torchdynamo_inline", "_torchdynamo_orig_callable"):
        member = getattr(member, kept, None) or member
    function = inspect.unwrap(member) if callable(member) else None
    return function if isinstance(function, FunctionType) and (function.__module__ or "").partition(".")[0] != "torch" else None


def _with_self(method: ast.FunctionDef) -> ast.FunctionDef:
    """With the module called ``self``, whatever its author calls it."""
    receiver = next((a.arg for a in (*method.args.posonlyargs, *method.args.args)), "self")
    for node in ast.walk(method) if receiver != "self" else ():
        if isinstance(node, ast.Name) and node.id == receiver:
            node.id = "self"
        elif isinstance(node, ast.arg) and node.arg == receiver:
            node.arg = "self"
    return method


def forward_of(cls: type) -> ast.FunctionDef | None:
    """The syntax tree of the forward pass; None for torch's own classes and where there is no source."""
    return method_of(cls, "forward")


def method_of(cls: type, name: str) -> ast.FunctionDef | None:
    member = inspect.getattr_static(cls, name, None)
    function = None if isinstance(member, staticmethod | classmethod | property) else written(member)
    return None if function is None else tree_of(function)


def is_self(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def name_of(call: ast.Call) -> str:
    """The last name of what is called: ``add`` of ``torch.add(...)`` and of ``x.add(...)``; "" where it has none."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
