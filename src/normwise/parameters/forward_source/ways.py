"""Reads a forward pass from its first statement to its last and follows, for each name, by which ways its numbers came."""

from __future__ import annotations

import ast
from collections.abc import Iterable

ABOUT = (
    "shape", "size", "device", "dtype", "ndim", "dim", "numel", "new_empty", "new_full", "new_zeros", "new_ones", "new_tensor",
    "requires_grad", "is_cuda",
)  # fmt: skip
"""What is asked of a tensor without its numbers."""
Way = frozenset[object]
"""Where numbers come from: names of arguments, and the calls of layers that they went through."""
Term = tuple[ast.expr, Way]


def root_of(node: ast.AST) -> str:
    """The name that an expression takes an entry of: ``out`` of ``out``, ``out[:, k]``; "" for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


class Ways:
    """``held`` has the ways by name, ``returned`` those of what is returned. A subclass says what an expression's are (``of``) and sets
    ``found`` where it meets what it looks for. ``losses``: whether the statement is about a loss, whose sums and products are none of the
    network's.

    Args:
        function: the method to read.
        inputs: its arguments that count as inputs.
    """

    def __init__(self, function: ast.FunctionDef, inputs: Iterable[str]) -> None:
        self.held: dict[str, Way] = {name: frozenset([name]) for name in inputs}
        self.found = self.losses = False
        self.returned: Way = frozenset()
        self.read(function.body)

    def read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            self.losses = not hasattr(node, "body") and "loss" in ast.unparse(node)
            if isinstance(node, ast.AugAssign):
                self.augmented(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, node.value)
            elif isinstance(node, ast.For):
                self.assign(node.target, node.iter)
            else:
                ways = [self.of(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                self.returned |= frozenset().union(*ways) if isinstance(node, ast.Return) else frozenset()
            self.inner(node)

    def inner(self, node: ast.stmt) -> None:
        """What stands within a statement."""
        for part in ("body", "orelse", "finalbody"):
            self.read(getattr(node, part, ()))

    def augmented(self, node: ast.AugAssign) -> None:
        way = self.of(node.value)
        name = root_of(node.target)    # of out[:, k] += y, too
        if name:
            before = self.held.get(name, frozenset())
            self.operate(node.op, (node.target, before), (node.value, way))
            self.held[name] = before | way

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        each = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)    # x, skip = f(x), x
        pairs = zip(target.elts, value.elts, strict=True) if each else [(target, value)]    # type: ignore[attr-defined]
        for one, part, way in [(one, part, self.of(part)) for one, part in pairs]:    # all are read before one is bound
            self.bind(one, part, way)

    def bind(self, target: ast.expr, value: ast.expr, way: Way) -> set[str]:
        """Gives the names."""
        names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.held |= dict.fromkeys(names, way)
        return names

    def of(self, node: ast.AST) -> Way:
        """The ways to an expression."""
        raise NotImplementedError

    def operate(self, op: ast.operator, left: Term, right: Term) -> None:
        """Looks at ``left op= right``."""
        raise NotImplementedError
