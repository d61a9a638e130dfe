"""How a forward pass multiplies by a bare parameter."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from normwise.parameters.forward_source.trees import KEPT, cached, functions, name_of

FLIPPED = ("t", "mT", "T", "transpose", "swapaxes")
LINEAR = ("linear", "_linear", "_batched_linear")
PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "grouped_mm", "_grouped_mm")


@cached
def uses(cls: type[nn.Module]) -> dict[str, frozenset[str]]:
    """Attribute -> the ways in which the methods of ``cls`` multiply by it: "oi" for ``F.linear(x, w)``, "io" for ``x @ w``, "[]oi" and
    "[]io" where one entry of its first axis is taken (``w[e]``), "batch io" for ``torch.bmm(x, w)``, "table" for ``F.embedding``.

    Found are attributes under their own name, through local names (``w = self.w[e]``), casts and transposes.
    """
    found: dict[str, set[str]] = {}
    for function in functions(cls):
        names = _aliases(function)
        for weight, use in (product for node in ast.walk(function) for product in _products(node)):
            name, indexed, flipped = _attribute(weight, names)
            found.setdefault(name, set()).add(f"{'[]' * indexed}{_flip(use) if flipped else use}")
    return {name: frozenset(all_) for name, all_ in found.items() if name}


def _products(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """(the expression that is multiplied by, how)."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield node.right, "io"
    if not isinstance(node, ast.Call):
        return
    called = name_of(node)
    weight = next((k.value for k in node.keywords if k.arg == "weight"), None)
    method = isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name | ast.Attribute)
    tensor = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id not in ("torch", "F")
    if called in LINEAR and (weight is not None or len(node.args) >= 2):
        yield weight or node.args[1], "oi"
    elif called == "embedding" and (weight is not None or len(node.args) >= 2):
        yield weight or node.args[1], "table"
    elif called in PRODUCTS:
        added = called.endswith(("addmm", "addbmm", "baddbmm"))
        at = 0 if (method or tensor) and not added else 2 if added else 1
        if len(node.args) > at:
            yield node.args[at], "batch io" if called.endswith("bmm") else "io"


def _flip(use: str) -> str:
    return use.replace("io", "OI").replace("oi", "io").replace("OI", "oi")


def _aliases(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """Local names that are assigned once, to something that is looked through: ``w = self.w[e]``. Others may be anything."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def _attribute(node: ast.expr, names: dict[str, ast.expr], depth: int = 0) -> tuple[str, bool, bool]:
    """The attribute of ``self`` that an expression is, whether one entry of it is taken, and whether its last two axes are swapped."""
    if depth > 8:
        return "", False, False
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr, False, False
        if node.attr in FLIPPED:
            name, indexed, flipped = _attribute(node.value, names, depth + 1)
            return name, indexed, not flipped
    if isinstance(node, ast.Subscript):
        name, indexed, flipped = _attribute(node.value, names, depth + 1)
        single = not isinstance(node.slice, ast.Slice | ast.Tuple) and not indexed and not flipped
        return (name, True, False) if single else ("", False, False)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (*KEPT, *FLIPPED):
        name, indexed, flipped = _attribute(node.func.value, names, depth + 1)
        return name, indexed, flipped ^ (node.func.attr in FLIPPED)
    if isinstance(node, ast.Name) and node.id in names:
        return _attribute(names[node.id], names, depth + 1)
    return "", False, False


@cached
def contractions(cls: type[nn.Module]) -> dict[str, frozenset[str]]:
    """Attribute -> its axes' letters as ``torch.einsum`` contracts them: summed letters are ``i``, letters of the output that the other
    operands have too are ``s``, its own letters of the output ``o``."""
    found: dict[str, set[str]] = {}
    for function in functions(cls):
        names = _aliases(function)
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "einsum"]
        for name, axes in (one for call in calls for one in _einsum(call, names)):
            found.setdefault(name, set()).add(axes)
    return {name: frozenset(all_) for name, all_ in found.items()}


def _einsum(node: ast.Call, names: dict[str, ast.expr]) -> Iterator[tuple[str, str]]:
    equation = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
    if not isinstance(equation, str) or "->" not in equation:
        return
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != len(node.args) - 1:
        return
    for k, (term, operand) in enumerate(zip(terms, node.args[1:], strict=True)):
        name, indexed, flipped = _attribute(operand, names)
        others = "".join(terms[:k] + terms[k + 1 :])
        if name and not indexed and "." not in term:
            axes = "".join("i" if c not in output else "s" if c in others else "o" for c in term)
            yield name, axes[:-2] + axes[:-3:-1] if flipped else axes
