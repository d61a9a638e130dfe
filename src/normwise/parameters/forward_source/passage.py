"""What a forward pass hands on as it is, adds to a stream, or takes through one layer after the other."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import nn

from normwise.parameters.forward_source.statements import MOVED, Statement, chain, statements
from normwise.parameters.forward_source.trees import cached, forward_of, is_self, name_of, written
from normwise.parameters.forward_source.ways import ABOUT

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

NONEXPANSIVE = ("relu", "relu_", "tanh", "sigmoid", "logsigmoid", "softsign", "abs")
"""Functions of one tensor that bring no two inputs further apart. Not among them: GELU (slopes up to 1.13), SiLU (1.10), Mish (1.09), SELU
(1.76), Hardswish (1.5), and what divides by what it sees."""
BENT = ("leaky_relu", "elu", "hardtanh", "softplus")
"""Functions that do so unless their arguments make them steep."""
LEAST_THRESHOLD = 20.0
"""Where `softplus` goes over to x: below, it jumps there."""
DROPOUTS = {
    "dropout": True, "dropout1d": True, "dropout2d": True, "dropout3d": True, "alpha_dropout": False, "feature_alpha_dropout": False,
}  # fmt: skip
"""Dropouts of ``torch.nn.functional`` and whether they drop where ``training`` is not given: after training, too."""
_FLOATS = ("float", "float16", "float32", "float64", "half", "bfloat16", "double", "dtype", "device", "weight", "bias")
"""What ends the name of a type or a tensor to which numbers may be cast; whole numbers would jump."""
_ASKED = ("isinstance", "len", "hasattr", *ABOUT)
_LISTS = ("enumerate", "zip", "range", "reversed", "len", "list", "tuple")


@cached
def passed_through(cls: type[nn.Module]) -> frozenset[str] | None:
    """The attributes of the module that its forward pass hands one tensor through, one after the other, with nothing between but `MOVED`
    and what brings no two inputs further apart: a bound on each is then a bound on all. None where that is not plain to see."""
    function, author = forward_of(cls), written(cls.forward)
    if function is None or author is None:
        return None
    spec = function.args
    if len(spec.args) != 2 or spec.vararg or spec.kwarg or spec.kwonlyargs or any(isinstance(n, ast.NamedExpr) for n in ast.walk(function)):
        return None
    chain = _Chain(spec.args[1].arg, author.__globals__)
    return frozenset(chain.attributes) if chain.runs(function.body) else None


class _Chain:
    """stream: the name that holds the tensor. scope: what names stand for in the file."""

    def __init__(self, stream: str, scope: Mapping[str, object]) -> None:
        self.stream, self.scope = stream, scope
        self.numbers = {stream}
        self.layers: set[str] = set()
        self.attributes: set[str] = set()

    def runs(self, body: Sequence[ast.stmt]) -> bool:
        return all(self.statement(node) for node in body)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            return node.value is not None and self.hands_on(node.value)
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            fits = self.hands_on(node.value) and len(getattr(node, "targets", [target])) == 1
            self.stream = target.id
            self.numbers.add(target.id)
            return fits
        if isinstance(node, ast.For):
            before = self.stream
            return self.lists(node) and self.runs([*node.body, *node.orelse]) and self.stream == before
        if isinstance(node, ast.If):
            before = self.stream
            steady = self.is_steady(node.test, _ASKED)
            return steady and self.runs(node.body) and self.stream == before and self.runs(node.orelse) and self.stream == before
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)    # the docstring

    def lists(self, node: ast.For) -> bool:
        """Whether a loop runs over children, or counts; its names are layers then."""
        known = {"self", *self.layers, *_LISTS}
        self.layers |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        if any(isinstance(n, ast.Name) and n.id not in known for n in ast.walk(node.iter)):    # a list of who knows what
            return False
        self.attributes |= {n.attr for n in ast.walk(node.iter) if isinstance(n, ast.Attribute) and is_self(n)}
        return self.is_steady(node.iter, _LISTS)

    def is_steady(self, node: ast.AST, calls: Sequence[str]) -> bool:
        """Whether it is the same for all inputs of a shape, and calls nothing but these: by what the numbers are, two close inputs could go
        two ways."""
        if isinstance(node, ast.Attribute) and node.attr in ABOUT:
            return True
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name) or (isinstance(node.func, ast.Attribute) and node.func.attr in ABOUT)
            told = name_of(node) in ("isinstance", "len", "hasattr", *ABOUT)    # whatever it is asked of
            return plain and name_of(node) in calls and (told or all(self.is_steady(n, calls) for n in node.args))
        if isinstance(node, ast.Tuple | ast.List) or (isinstance(node, ast.Name) and node.id in self.numbers):
            return False
        return all(self.is_steady(n, calls) for n in ast.iter_child_nodes(node))

    def hands_on(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id == self.stream
        if not isinstance(node, ast.Call):
            return False
        child = node.func.value if isinstance(node.func, ast.Subscript) else node.func    # self.layers[k](x)
        if is_self(child) or (isinstance(child, ast.Name) and child.id in self.layers):
            steady = not isinstance(node.func, ast.Subscript) or self.is_steady(node.func.slice, ())
            self.attributes |= {child.attr} if isinstance(child, ast.Attribute) else set()
            return steady and len(node.args) == 1 and not node.keywords and self.hands_on(node.args[0])
        if not isinstance(node.func, ast.Attribute):
            return False
        owner, name = node.func.value, node.func.attr
        torchs = self.is_torchs(owner)
        own = node.args[0] if node.args and torchs else owner
        given, named = node.args[own is not owner :], {k.arg or "": k.value for k in node.keywords}
        return _is_gentle(name, given, named, torchs and ast.unparse(owner) != "torch") and self.hands_on(own)

    def is_torchs(self, owner: ast.expr) -> bool:
        """Whether it is ``torch`` or ``torch.nn.functional``, under whatever name, and not something else under theirs."""
        first, *rest = ast.unparse(owner).split(".")
        held = self.scope.get(first)
        for name in rest:
            held = getattr(held, name, None) if isinstance(held, ModuleType) else None
        return held in (torch, torch.nn.functional)


def _is_gentle(name: str, given: Sequence[ast.expr], named: Mapping[str, ast.expr], functional: bool) -> bool:
    """Whether a function of a tensor brings no two inputs further apart with these arguments."""
    if name in DROPOUTS or name == "feature_dropout":
        return _is_off(name, given, named, functional)
    if name in ("to", "type", "type_as", "view"):
        cast = [*(named[key] for key in ("dtype", "other") if key in named), *given]
        moved = given and name == "view" and not any(ast.unparse(one).startswith("torch.") for one in cast) and "dtype" not in named
        return bool(moved) or (name != "view" and all(_is_float(one) for one in cast))
    if name in MOVED:
        return True
    named = {key: value for key, value in named.items() if key != "inplace"}
    if name in NONEXPANSIVE:
        return not named and all(isinstance(one, ast.Constant) and isinstance(one.value, bool) for one in given)
    constants = [n.value for n in (*given, *named.values()) if isinstance(n, ast.Constant) and isinstance(n.value, int | float)]
    if name not in BENT or len(constants) < len(given) + len(named):
        return False
    if name != "softplus":
        return all(abs(n) <= 1 for n in constants)
    threshold = named.get("threshold", given[1] if len(given) > 1 else ast.Constant(LEAST_THRESHOLD))
    beta = named.get("beta", given[0] if given else ast.Constant(1.0))
    return threshold.value >= LEAST_THRESHOLD and beta.value > 0    # type: ignore[attr-defined]


def _is_off(name: str, given: Sequence[ast.expr], named: Mapping[str, ast.expr], functional: bool) -> bool:
    """Whether a dropout drops nothing once training is over."""
    key = "training" if functional else "train"
    said = named.get(key, given[1] if len(given) > 1 else None)
    if said is None:
        return functional and DROPOUTS.get(name) is False
    return ast.unparse(said) in ("self.training", "False")


def _is_float(node: ast.expr) -> bool:
    """A type of floats, a device, a layer's own weight; or a text that names a device."""
    text = ast.unparse(node)
    said = node.value if isinstance(node, ast.Constant) else None
    device = isinstance(said, str) and said.partition(":")[0] in ("cpu", "cuda", "mps", "xpu")
    return device or (isinstance(node, ast.Attribute) and text.rpartition(".")[2] in _FLOATS)
