"""Whether a forward pass multiplies activations by activations, as gates, mixtures and bilinear layers do."""

from __future__ import annotations

import ast

from torch import nn

from normwise.parameters.forward_source.trees import cached, functions, name_of
from normwise.parameters.forward_source.ways import ABOUT, Term, Way, Ways

_CALLS = ("mul", "mul_", "multiply", "matmul", "bmm", "einsum", "bilinear")
_GATED = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.Bilinear, nn.GLU)
_NO_INPUTS = ("mask", "bias", "scale", "cos", "sin")
"""Parts of names of arguments that are no activations."""


@cached
def multiplies(cls: type[nn.Module]) -> bool:
    """Whether its forward pass multiplies two things that come from its input; read from the source, so a guess. What bends one number by
    itself, as x·σ(x) does, is none."""
    return issubclass(cls, _GATED) or any(_Products(function).found for function in functions(cls))


class _Products(Ways):
    def __init__(self, function: ast.FunctionDef) -> None:
        given = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        super().__init__(function, (a.arg for a in given if a.arg != "self" and not any(part in a.arg for part in _NO_INPUTS)))

    def operate(self, op: ast.operator, left: Term, right: Term) -> None:
        if isinstance(op, ast.Mult | ast.MatMult):
            self.product([left[0], right[0]])

    def of(self, node: ast.AST) -> Way:
        """A product within the expression is looked at."""
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Compare) or (isinstance(node, ast.Attribute) and node.attr in ABOUT):
            return frozenset()
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            for made in node.generators:
                self.assign(made.target, made.iter)
        way: Way = frozenset().union(*(self.of(child) for child in ast.iter_child_nodes(node)))
        if isinstance(node, ast.BinOp):
            self.operate(node.op, (node.left, way), (node.right, way))
        return self.called(node, way) if isinstance(node, ast.Call) else way

    def called(self, node: ast.Call, way: Way) -> Way:
        owner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        self.found |= name_of(node) == "glu" and bool(way)
        if name_of(node) in _CALLS:
            self.product([*owner, *node.args])
        layer = ast.unparse(node.func)
        return way | {layer} if layer.startswith("self.") and way else way

    def product(self, factors: list[ast.expr]) -> None:
        """Found where two of them hold numbers of the input and are not one name, bent by itself."""
        ways = [(self.of(factor), {n.id for n in ast.walk(factor) if isinstance(n, ast.Name) and n.id in self.held}) for factor in factors]
        active = [(way, names) for way, names in ways if way]
        self.found |= len(active) > 1 and any(active[0] != other for other in active[1:])
