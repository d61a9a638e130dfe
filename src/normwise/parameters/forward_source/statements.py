"""The statements of a forward pass, and which child's result an expression is."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from torch import nn

from normwise.parameters.forward_source.trees import KEPT, forward_of

# Methods that put the outputs elsewhere and leave each number as it is.
MOVED = (*KEPT, "view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze")

Statement = ast.Assign | ast.AnnAssign | ast.Expr | ast.Return


def statements(cls: type[nn.Module], kept: Sequence[str], functions: bool = False) -> Iterator[tuple[Statement, dict[str, str]]]:
    """The statements of the forward pass, with what local names hold there: the result of a child, through methods in ``kept``.
    functions: see `chain`."""
    function = forward_of(cls)
    held: dict[str, str] = {}
    found = [n for n in ast.walk(function) if isinstance(n, Statement)] if function is not None else []
    for node in sorted(found, key=lambda n: n.lineno):
        yield node, held
        targets = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        child, methods = chain(node.value, held, functions) if isinstance(targets, ast.Name) and node.value is not None else ("", [])
        for name in (n.id for n in ast.walk(targets) if isinstance(n, ast.Name)) if targets is not None else ():
            held.pop(name, None)
        if isinstance(targets, ast.Name) and child and all(method in kept for method, _ in methods):
            held[targets.id] = child


def chain(node: ast.expr, held: dict[str, str], functions: bool = False) -> tuple[str, list[tuple[str, ast.Call]]]:
    """The child whose result an expression begins with, and the methods called on it, the first one first. functions: those of
    ``torch.nn.functional`` are looked through as methods are, like torch's own."""
    methods: list[tuple[str, ast.Call]] = []
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            return node.func.attr, methods[::-1]
        method = node.func.attr
        torchs = isinstance(owner, ast.Name) and owner.id == "torch"
        if (torchs or (functions and is_functional(owner))) and node.args:    # torch.chunk(qkv, 3, dim=-1)
            methods.append((method, ast.Call(node.func, node.args[1:], node.keywords)))
            node = node.args[0]
        else:
            methods.append((method, node))
            node = owner
    return (held.get(node.id, "") if isinstance(node, ast.Name) else ""), methods[::-1]


def is_functional(owner: ast.expr) -> bool:
    return ast.unparse(owner) in ("F", "functional", "nn.functional", "torch.nn.functional")
