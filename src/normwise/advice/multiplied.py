"""Modules that multiply activations by activations: gates, mixtures, bilinear layers. Bounds on their weights bound no such product."""

from __future__ import annotations

import ast
from collections.abc import Iterable

import torch
from torch import nn

from normwise.parameters import forward_source
from normwise.parameters.names import class_of

_CALLS = ("mul", "mul_", "multiply", "matmul", "bmm", "einsum", "bilinear")
_GATED = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.Bilinear, nn.GLU)
_ABOUT = ("shape", "size", "device", "dtype", "ndim", "dim", "numel", "requires_grad")
"""What is asked of a tensor without its numbers."""
_NO_INPUTS = ("mask", "bias", "scale", "cos", "sin")
"""Parts of names of arguments that are no activations."""
Way = frozenset[str]
"""Where numbers come from: names of arguments and of layers."""


def multiplies(module: nn.Module) -> bool:
    """Whether its forward pass multiplies two things that come from its input; read from the source, so a guess. What bends one number by
    itself, as x·σ(x) does, is none."""
    if isinstance(module, _GATED):
        return True
    return any(_Reader(function).found for function in forward_source.functions(class_of(module)))


class _Reader:
    """Goes through the statements in their order; ``held`` has, for each name, the ways by which its numbers came."""

    def __init__(self, function: ast.FunctionDef) -> None:
        given = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        inputs = (a.arg for a in given if a.arg != "self" and not any(part in a.arg for part in _NO_INPUTS))
        self.held: dict[str, Way] = {name: frozenset([name]) for name in inputs}
        self.found = False
        self.read(function.body)

    def read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if isinstance(node, ast.AugAssign):
                way = self.of(node.value)
                if isinstance(node.target, ast.Name):
                    if isinstance(node.op, ast.Mult):
                        self.product([node.target, node.value])
                    self.held[node.target.id] = self.of(node.target) | way
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.bind(target, self.of(node.value))
            elif isinstance(node, ast.For):
                self.bind(node.target, self.of(node.iter))
            else:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self.of(child)
            for part in ("body", "orelse", "finalbody"):
                self.read(getattr(node, part, ()))

    def bind(self, target: ast.AST, way: Way) -> None:
        self.held |= {n.id: way for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

    def of(self, node: ast.AST) -> Way:
        """The ways to an expression; a product within it is looked at."""
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Compare) or (isinstance(node, ast.Attribute) and node.attr in _ABOUT):
            return frozenset()
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            for made in node.generators:
                self.bind(made.target, self.of(made.iter))
        way: Way = frozenset().union(*(self.of(child) for child in ast.iter_child_nodes(node)))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.MatMult):
            self.product([node.left, node.right])
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            owner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            self.found |= name == "glu" and bool(way)
            if name in _CALLS:
                self.product([*owner, *node.args])
            called = ast.unparse(node.func)
            if called.startswith("self.") and way:
                return way | {called}
        return way

    def product(self, factors: list[ast.expr]) -> None:
        """Found where two of them hold numbers of the input and are not one name, bent by itself."""
        ways = [(self.of(factor), {n.id for n in ast.walk(factor) if isinstance(n, ast.Name) and n.id in self.held}) for factor in factors]
        active = [(way, names) for way, names in ways if way]
        if len(active) > 1:
            self.found |= any(active[0] != other for other in active[1:])


def recurs(module: nn.Module) -> bool:
    """Whether it is one of torch's recurrent layers, which multiply by one matrix at each step."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) and not isinstance(module, torch.jit.ScriptModule)
