"""Whether a forward pass adds what came by two ways from the same input: a residual branch, two towers."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from torch import nn

from normwise.parameters.forward_source.trees import cached, forward_of, is_self, name_of
from normwise.parameters.forward_source.ways import ABOUT, Term, Way, Ways

_ADDS = re.compile(r"(.*_)?add_?")
"""``torch.add``, ``x.add_``, ``dropout_add``."""
_PLACES = re.compile(r"(^|_)pos(_|$|ition)|interpolate")
"""Layers and methods that give positions: an embedding's sum is no branch."""
_ASIDE = re.compile(r"mask|bias|pos|cache|index|offset|past")
"""Arguments that are added to logits or places."""
_TUPLES = (ast.Tuple, ast.List)


@cached
def adds_to_stream(cls: type[nn.Module]) -> bool:
    """Whether the forward pass adds two tensors that come from one input and not through the same layers: x + f(x), s(x) + f(x)."""
    if issubclass(cls, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):    # torch's own
        return True
    function = forward_of(cls)
    return function is not None and _Sums(function).found


class _Sums(Ways):
    def __init__(self, function: ast.FunctionDef) -> None:
        self.layers: set[str] = set()
        given = (*function.args.posonlyargs, *function.args.args[1:], *function.args.kwonlyargs)
        super().__init__(function, (a.arg for a in given))

    def operate(self, op: ast.operator, left: Term, right: Term) -> None:
        if isinstance(op, ast.Add):
            self.add(left, right)

    def bind(self, target: ast.expr, value: ast.expr, way: Way) -> set[str]:
        names = super().bind(target, value, way)
        if not way and any(is_self(n) for n in ast.walk(value)):    # `for block in self.blocks`, `layer = self.layers[k]`
            self.layers |= names
        return names

    def of(self, node: ast.AST) -> Way:
        """The ways to an expression; a sum within it is looked at."""
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Attribute):
            return frozenset() if node.attr in ABOUT or is_self(node) else self.of(node.value)
        if isinstance(node, ast.Compare):
            return frozenset()
        if isinstance(node, ast.IfExp):
            return self.of(node.body) | self.of(node.orelse)
        parts = [self.of(child) for child in ast.iter_child_nodes(node)]
        way: Way = frozenset().union(*parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            self.add((node.left, parts[0]), (node.right, parts[2]))
        if isinstance(node, ast.Call):
            self.called(node, parts)
            layer = node.func.value if isinstance(node.func, ast.Subscript) else node.func
            if isinstance(layer, ast.Attribute) and is_self(layer) and _PLACES.search(layer.attr):
                return frozenset()
            if is_self(layer) or (isinstance(layer, ast.Name) and layer.id in self.layers):
                return way | {(node.lineno, node.col_offset)} if way else way
        return way

    def called(self, node: ast.Call, ways: Sequence[Way]) -> None:
        """ways: of the function, whose receiver may be a term (``x.add(y)``), and of what it is given."""
        name = name_of(node)
        if not _ADDS.fullmatch(name) or is_self(node.func):
            return
        terms = list(zip([node.func, *node.args], ways, strict=False))[0 if ways[0] else 1 :]
        if len(terms) > 1:
            self.add(terms[0], terms[1])

    def add(self, left: Term, right: Term) -> None:
        """Looks at a sum of two terms."""
        (term, one), (also_term, other) = left, right
        if self.losses or isinstance(term, _TUPLES) or isinstance(also_term, _TUPLES):
            return
        shared = any(isinstance(n, str) for n in one & other)
        passed, also = ({n for n in way if not isinstance(n, str)} for way in (one, other))
        # An argument beside what layers made of another one: f(x) + residual.
        beside = (_is_stream(term, one) and also) or (_is_stream(also_term, other) and passed)
        self.found |= bool((shared and passed != also) or beside)


def _is_stream(term: ast.expr, way: Way) -> bool:
    return isinstance(term, ast.Name) and len(way) == 1 and all(isinstance(n, str) and not _ASIDE.search(n) for n in way)
