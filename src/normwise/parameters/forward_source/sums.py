"""Whether a forward pass adds what came by two ways from the same input: a residual branch, two towers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from torch import nn

from normwise.parameters.forward_source.trees import cached, forward_of, is_self

_ABOUT = (
    "shape", "size", "device", "dtype", "ndim", "dim", "numel", "new_zeros", "new_ones", "new_tensor", "requires_grad", "is_cuda",
)  # fmt: skip
"""What is asked of a tensor without its numbers."""
_ADDS = re.compile(r"(.*_)?add_?")
"""``torch.add``, ``x.add_``, ``dropout_add``."""
_PLACES = re.compile(r"(^|_)pos(_|$|ition)|interpolate")
"""Layers and methods that give positions: an embedding's sum is no branch."""
_ASIDE = re.compile(r"mask|bias|pos|cache|index|offset|past")
"""Arguments that are added to logits or places."""
_TUPLES = (ast.Tuple, ast.List)
Way = frozenset[object]
"""Where numbers come from: names of arguments, and the places of the calls of layers that they went through."""


@cached
def adds_to_stream(cls: type[nn.Module]) -> bool:
    """Whether the forward pass adds two tensors that come from one input and not through the same layers: x + f(x), s(x) + f(x)."""
    if issubclass(cls, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):    # torch's own
        return True
    function = forward_of(cls)
    return function is not None and _Ways(function).found


class _Ways:
    """Reads the statements in their order and keeps, for each name, the ways by which its numbers came."""

    def __init__(self, function: ast.FunctionDef) -> None:
        given = (*function.args.posonlyargs, *function.args.args[1:], *function.args.kwonlyargs)
        self.held: dict[str, Way] = {a.arg: frozenset([a.arg]) for a in given}
        self.layers: set[str] = set()
        self.found = self.losses = False
        self.read(function.body)

    def read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            self.losses = not hasattr(node, "body") and "loss" in ast.unparse(node)    # a sum of losses is no branch
            if isinstance(node, ast.AugAssign):
                self.augmented(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, node.value)
            elif isinstance(node, ast.For):
                self.assign(node.target, node.iter)
            else:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self.of(child)
            for part in ("body", "orelse", "finalbody"):
                self.read(getattr(node, part, ()))

    def augmented(self, node: ast.AugAssign) -> None:
        way = self.of(node.value)
        if isinstance(node.target, ast.Name):
            before = self.held.get(node.target.id, frozenset())
            if isinstance(node.op, ast.Add):
                self.add((node.target, before), (node.value, way))
            self.held[node.target.id] = before | way

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        each = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)    # x, skip = f(x), x
        pairs = zip(target.elts, value.elts, strict=True) if each else [(target, value)]    # type: ignore[attr-defined]
        for one, part, way in [(one, part, self.of(part)) for one, part in pairs]:    # all are read before one is bound
            self.bind(one, part, way)

    def bind(self, target: ast.expr, value: ast.expr, way: Way) -> None:
        names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.held |= dict.fromkeys(names, way)
        if not way and any(is_self(n) for n in ast.walk(value)):    # `for block in self.blocks`, `layer = self.layers[k]`
            self.layers |= names

    def of(self, node: ast.AST) -> Way:
        """The ways to an expression; a sum within it is looked at."""
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Attribute):
            return frozenset() if node.attr in _ABOUT or is_self(node) else self.of(node.value)
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
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        if not _ADDS.fullmatch(name) or is_self(node.func):
            return
        terms = list(zip([node.func, *node.args], ways, strict=False))[0 if ways[0] else 1 :]
        if len(terms) > 1:
            self.add(terms[0], terms[1])

    def add(self, left: tuple[ast.expr, Way], right: tuple[ast.expr, Way]) -> None:
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
