"""What a forward pass hands on as it is, adds to a stream, or takes through one layer after the other."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from torch import nn

from normwise.parameters.forward_source.statements import MOVED, Statement, chain, is_functional, statements
from normwise.parameters.forward_source.trees import cached, forward_of, is_self

# f(s·x) = s·f(x) for s > 0.
POOLS = ("max", "avg", "adaptive_avg", "adaptive_max")
POOLED = tuple(f"{kind}_pool{d}d" for kind in POOLS for d in (1, 2, 3))
HOMOGENEOUS = ("relu", "relu_", "leaky_relu", "dropout", *POOLED)


@cached
def handed_on(cls: type[nn.Module], bent: bool = True) -> frozenset[tuple[str, str]]:
    """(a child, the one child that gets its result): with nothing between them but what moves axes, and what a factor above zero passes
    through (``F.relu``). bent: False for what a constant passes through, too: a channel's bias."""
    found: set[tuple[str, str]] = set()
    passed = (*MOVED, *(HOMOGENEOUS if bent else POOLED))
    function = forward_of(cls)
    if function is None:
        return frozenset()
    for node, held in statements(cls, passed, True):
        for call in (n for n in ast.walk(node) if isinstance(n, ast.Call) and is_self(n.func) and n.args):
            child, methods = chain(call.args[0], held, True)
            names = {n.id for n in ast.walk(call.args[0]) if isinstance(n, ast.Name) and n.id in held}
            alone = all(_read_once(function, name, node) for name in names)
            if child and alone and all(method in passed for method, _ in methods):
                found.add((child, ast.unparse(call.func).partition(".")[2]))
    return frozenset(found)


def _read_once(function: ast.FunctionDef, name: str, node: Statement) -> bool:
    """Whether nothing but this statement reads what the name holds there: ``x + f(norm(x))`` reads it twice."""
    named = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name]
    bound = sorted(n.lineno for n in named if isinstance(n.ctx, ast.Store))
    first = max((line for line in bound if line < node.lineno), default=0)
    last = min((line for line in bound if line >= node.lineno), default=function.end_lineno or node.lineno)
    end = (node.end_lineno or last) if last == node.lineno else last
    return sum(isinstance(n.ctx, ast.Load) and first < n.lineno <= end for n in named) == 1


@cached
def called(cls: type[nn.Module]) -> frozenset[str]:
    """The children that the forward pass calls by their names: ``self.conv(x)``."""
    function = forward_of(cls)
    calls = (n for n in ast.walk(function) if isinstance(n, ast.Call)) if function is not None else ()
    return frozenset(n.func.attr for n in calls if isinstance(n.func, ast.Attribute) and is_self(n.func))


# ---------------------------------------------------------------------------------------------------- one after the other

NONEXPANSIVE = ("relu", "relu_", "leaky_relu", "tanh", "sigmoid", "elu", "softplus", "hardtanh", "logsigmoid", "softsign", "dropout", "abs")
"""Functions of one tensor that bring no two inputs further apart, where their slopes are left at 1 or less."""


@cached
def is_chain(cls: type[nn.Module]) -> bool:
    """Whether the forward pass hands one tensor from child to child and through nothing but `MOVED` and `NONEXPANSIVE`: a bound on each is
    then a bound on all. False where that is not plain to see."""
    function = forward_of(cls)
    if function is None or len(function.args.args) != 2 or function.args.vararg or function.args.kwarg or function.args.kwonlyargs:
        return False
    return _Chain(function.args.args[1].arg).runs(function.body)


class _Chain:
    """stream: the name that holds the tensor."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.layers: set[str] = set()

    def runs(self, body: Sequence[ast.stmt]) -> bool:
        return all(self.statement(node) for node in body)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            return node.value is not None and self.hands_on(node.value)
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            fits = self.hands_on(node.value) and len(getattr(node, "targets", [target])) == 1
            self.stream = target.id
            return fits
        if isinstance(node, ast.For):
            self.layers |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
            before = self.stream
            return self.runs([*node.body, *node.orelse]) and self.stream == before
        if isinstance(node, ast.If):
            before = self.stream
            return self.runs(node.body) and self.stream == before and self.runs(node.orelse) and self.stream == before
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)    # the docstring

    def hands_on(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id == self.stream
        if not isinstance(node, ast.Call):
            return False
        child = node.func.value if isinstance(node.func, ast.Subscript) else node.func    # self.layers[k](x)
        if is_self(child) or (isinstance(child, ast.Name) and child.id in self.layers):
            return len(node.args) == 1 and not node.keywords and self.hands_on(node.args[0])
        if not isinstance(node.func, ast.Attribute):
            return False
        owner, name = node.func.value, node.func.attr
        own = node.args[0] if node.args and (is_functional(owner) or ast.unparse(owner) == "torch") else owner
        given = (*node.args[own is not owner :], *(k.value for k in node.keywords))
        gentle = all(isinstance(n, ast.Constant) and isinstance(n.value, int | float) and abs(n.value) <= 1 for n in given)
        steep = name in ("leaky_relu", "elu", "softplus", "hardtanh") and not gentle
        return name in (*MOVED, *NONEXPANSIVE) and not steep and self.hands_on(own)
