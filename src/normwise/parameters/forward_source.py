"""What the source of a module's forward pass says, read and never run: how it applies a bare parameter, and which layers give its outputs.

A class without readable source (compiled, typed into a prompt, traced) says nothing, and neither does a line that is not understood.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import ParamSpec, TypeVar

from torch import nn

# Methods of a tensor that change neither the order nor the number of its axes.
KEPT = (
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "requires_grad_", "cuda", "cpu",
)  # fmt: skip
FLIPPED = ("t", "mT", "T", "transpose", "swapaxes")
LINEAR = ("linear", "_linear", "_batched_linear")
PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "grouped_mm", "_grouped_mm")


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _cached(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``functools.cache`` with the function's own types; a class is read once."""
    return functools.cache(function)    # type: ignore[return-value]


@_cached
def functions(cls: type) -> tuple[ast.FunctionDef, ...]:
    """The syntax trees of the methods of ``cls`` and its bases down to the one that has the forward pass, none of torch's own; a subclass's
    method hides that of its base. What stands below knows nothing of this module's parameters."""
    found: dict[str, ast.FunctionDef | None] = {}
    for base in cls.__mro__:
        if (base.__module__ or "").partition(".")[0] in ("torch", "builtins"):
            break
        own = {name: member for name, member in vars(base).items() if isinstance(member, FunctionType) and name not in found}
        found |= {name: _tree(inspect.unwrap(member)) for name, member in own.items()}
        if "forward" in vars(base):
            break
    return tuple(tree for tree in found.values() if tree is not None)


@_cached
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError, IndexError):
        return None
    return parsed if isinstance(parsed, ast.FunctionDef) else None


def forward_of(cls: type) -> ast.FunctionDef | None:
    """The syntax tree of the forward pass; None for torch's own classes and where there is no source."""
    forward = inspect.unwrap(getattr(cls, "forward", nn.Module.forward))
    if not isinstance(forward, FunctionType) or (forward.__module__ or "").partition(".")[0] == "torch":
        return None
    return _tree(forward)


# --------------------------------------------------------------------------------------------------- parameters in use


@_cached
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
    called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
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


@_cached
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


# --------------------------------------------------------------------------------------------------- what gives outputs


@_cached
def outputs(cls: type[nn.Module], children: frozenset[str]) -> frozenset[str] | None:
    """Those of ``children`` whose results the forward pass returns and hands to no other child, as paths: ``"head"``, ``"net.head"``, and
    ``"layers[-1]"`` of a list that runs one after the other. None where there is no source, or no child is returned.

    A function of a result (a softmax, a reshape, a method of the module) still is that result; the sum of two is both. A class without a
    forward pass is read by all of its methods.
    """
    forward = forward_of(cls)
    returned: set[str] = set()
    flow = _Flow(cls, children)
    for function in functions(cls) if forward is None else [forward]:
        if function.name != "__init__":
            returned |= flow.called(function)
    last = returned - {first for first, second in flow.consumed if first != second}
    chained = {first for first, second in flow.consumed if first == second}
    return frozenset(f"{name}[-1]" if name in chained else name for name in last) or None


class _Flow:
    """Follows which child gave what a local name holds; every branch is taken. ``consumed``: (child, the child that got its result)."""

    def __init__(self, cls: type, known: frozenset[str]) -> None:
        self.cls, self.known = cls, known
        self.consumed: set[tuple[str, str]] = set()
        self.held: dict[str, frozenset[str]] = {}
        self.children: dict[str, str] = {}
        self.returned: set[str] = set()
        self.depth = 0

    def called(self, function: ast.FunctionDef, given: Sequence[frozenset[str]] = ()) -> frozenset[str]:
        """What a method returns, of arguments that came from these children."""
        outer = self.held, self.children, self.returned
        names = [a.arg for a in function.args.args[1:]]
        self.held, self.children, self.returned = dict(zip(names, given, strict=False)), {}, set()
        self.depth += 1
        self.run(function.body)
        found = frozenset(self.returned)
        self.depth -= 1
        self.held, self.children, self.returned = outer
        return found

    def run(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Return):
            self.returned |= self.source(node.value)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            self.assign(node)
        elif isinstance(node, ast.For):
            self.loop(node)
        elif isinstance(node, ast.If | ast.While):
            self.branch(node)
        elif isinstance(node, ast.With):
            self.run(node.body)
        elif isinstance(node, ast.Try):
            self.run([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.Expr):
            given = self.source(node.value)
            call = node.value
            method = call.func if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else None
            if method is not None and isinstance(method.value, ast.Name) and method.attr in ("append", "extend", "update"):
                name = method.value.id    # outputs.append(self.head(x))
                self.held[name] = self.held.get(name, frozenset()) | given

    def branch(self, node: ast.If | ast.While) -> None:
        """Either side may have run: what a name holds afterwards is what it may hold."""
        before = dict(self.held)
        self.run(node.body)
        first, self.held = self.held, before
        self.run(node.orelse)
        ended = bool(node.body) and isinstance(node.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
        for name in () if ended else first:
            self.held[name] = self.held.get(name, frozenset()) | first[name]

    def loop(self, node: ast.For) -> None:
        """``for layer in self.layers`` makes ``layer`` a child; the second round sees what the first left."""
        self._bind(node.target, self.looped(node.iter))
        self.run([*node.body, *node.body, *node.orelse])

    def looped(self, over: ast.expr) -> str:
        """The child that a loop runs over: ``self.layers[1:]``, ``zip(self.net.layers, masks)``, ``self.heads.items()``."""
        paths = (path for n in ast.walk(over) if isinstance(n, ast.Attribute) and (path := self.child(n)))
        return re.sub(r"\.(items|values|keys)$", "", next(paths, ""))

    def _bind(self, target: ast.expr, child: str) -> None:
        for name in ast.walk(target) if child else ():
            if isinstance(name, ast.Name):
                self.children[name.id] = child

    def assign(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> None:
        value = self.source(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Attribute | ast.Subscript):
                self._bind(target, self.child(node.value))    # head = self.heads[k]
            for name in (n for n in ast.walk(target) if isinstance(n, ast.Name)):
                kept = self.held.get(name.id, frozenset()) if isinstance(node, ast.AugAssign) or name is not target else frozenset()
                self.held[name.id] = value | kept

    def sources(self, nodes: Sequence[ast.expr]) -> frozenset[str]:
        return frozenset().union(*(self.source(n) for n in nodes)) if nodes else frozenset()

    def source(self, node: ast.expr | None) -> frozenset[str]:
        """The children that gave an expression's value."""
        if node is None or isinstance(node, ast.Lambda | ast.Compare):
            return frozenset()
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.IfExp):
            return self.sources([node.body, node.orelse])
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp):
            for made in node.generators:
                self._bind(made.target, self.looped(made.iter))
            return self.source(node.value if isinstance(node, ast.DictComp) else node.elt)
        return self.sources([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)])

    def call(self, node: ast.Call) -> frozenset[str]:
        inside = [*node.args, *(k.value for k in node.keywords)]
        given = [self.source(n) for n in inside]
        named = [n for n in inside if _is_self(n) or isinstance(n, ast.Name)]
        handed = next((path for n in named if (path := self.child(n))), "")    # checkpoint(self.layer, x)
        child = self.child(node.func) or handed
        if child:
            self.consumed |= {(one, child) for one in frozenset().union(*given)}
            return frozenset({child})
        name = node.func.attr if isinstance(node.func, ast.Attribute) and _is_self(node.func) else ""
        if name and self.depth < 6 and (method := _method(self.cls, name)) is not None:
            return self.called(method, given)
        owner = [self.source(node.func.value)] if isinstance(node.func, ast.Attribute) else []
        return frozenset().union(*given, *owner)

    def child(self, called: ast.expr) -> str:
        """``self.head(...)``, ``self.heads[k](...)``, ``self.net.head(...)``, ``layer(...)`` in a loop over ``self.layers``."""
        if isinstance(called, ast.Subscript):
            return self.child(called.value)
        if isinstance(called, ast.Attribute) and _is_self(called):
            return called.attr if called.attr in self.known else ""
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Attribute | ast.Subscript):
            path = self.child(called.value)
            return f"{path}.{called.attr}" if path else ""
        return self.children.get(called.id, "") if isinstance(called, ast.Name) else ""


def _method(cls: type, name: str) -> ast.FunctionDef | None:
    member = inspect.unwrap(getattr(cls, name)) if hasattr(cls, name) else None
    if not isinstance(member, FunctionType) or (member.__module__ or "").partition(".")[0] == "torch":
        return None
    return _tree(member)


def _is_self(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


# -------------------------------------------------------------------------------------------- several matrices in one layer


@dataclass(frozen=True)
class Split:
    """How the forward pass takes a layer's outputs apart. ``sizes``: expressions of the parts' sizes, None where they are equal;
    ``heads``: the expression of what stands between, "" for nothing; ``inner``: whether the parts lie within each head."""

    count: int
    sizes: tuple[str, ...] | None = None
    heads: str = ""
    inner: bool = False


@_cached
def splits(cls: type[nn.Module]) -> dict[str, frozenset[Split]]:
    """Child -> the ways in which its result is taken apart: ``.chunk(3, -1)``, ``.split(width, dim=2)`` into three names,
    ``.split([a, b, c], -1)``, or a reshape to ``(..., 3, heads, d)`` or ``(..., heads, 3, d)``. A way that is not understood is
    ``Split(0)``: with a second way beside it nothing is known."""
    found: dict[str, set[Split]] = {}
    for node, held in _statements(cls, SAME):
        targets = node.targets[0] if isinstance(node, ast.Assign) else None
        count = len(targets.elts) if isinstance(targets, ast.Tuple) else 0
        for child, way in filter(None, (_split(call, count, held) for call in ast.walk(node) if isinstance(call, ast.Call))):
            found.setdefault(child, set()).add(way)
    return {name: frozenset(ways) for name, ways in found.items()}


_Statement = ast.Assign | ast.AnnAssign | ast.Expr | ast.Return


def _statements(cls: type[nn.Module], kept: Sequence[str], functions: bool = False) -> Iterator[tuple[_Statement, dict[str, str]]]:
    """The statements of the forward pass, with what local names hold there: the result of a child, through methods in ``kept``.
    functions: see `_chain`."""
    function = forward_of(cls)
    held: dict[str, str] = {}
    statements = [n for n in ast.walk(function) if isinstance(n, _Statement)] if function is not None else []
    for node in sorted(statements, key=lambda n: n.lineno):
        yield node, held
        targets = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        child, methods = _chain(node.value, held, functions) if isinstance(targets, ast.Name) and node.value is not None else ("", [])
        for name in (n.id for n in ast.walk(targets) if isinstance(n, ast.Name)) if targets is not None else ():
            held.pop(name, None)
        if isinstance(targets, ast.Name) and child and all(method in kept for method, _ in methods):
            held[targets.id] = child


# Methods after which the outputs are still where they were.
SAME = (*KEPT, "clamp", "clamp_", "unsqueeze")


def _chain(node: ast.expr, held: dict[str, str], functions: bool = False) -> tuple[str, list[tuple[str, ast.Call]]]:
    """The child whose result an expression begins with, and the methods called on it, the first one first. functions: those of
    ``torch.nn.functional`` are looked through as methods are, like torch's own."""
    methods: list[tuple[str, ast.Call]] = []
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            return node.func.attr, methods[::-1]
        method = node.func.attr
        torchs = isinstance(owner, ast.Name) and owner.id == "torch"
        if (torchs or (functions and _is_functional(owner))) and node.args:    # torch.chunk(qkv, 3, dim=-1)
            methods.append((method, ast.Call(node.func, node.args[1:], node.keywords)))
            node = node.args[0]
        else:
            methods.append((method, node))
            node = owner
    return (held.get(node.id, "") if isinstance(node, ast.Name) else ""), methods[::-1]


def _is_functional(owner: ast.expr) -> bool:
    return ast.unparse(owner) in ("F", "functional", "nn.functional", "torch.nn.functional")


def _split(whole: ast.Call, targets: int, held: dict[str, str]) -> tuple[str, Split] | None:
    """The way in which the first method that moves the outputs takes them apart."""
    child, methods = _chain(whole, held)
    moving = [(method, call) for method, call in methods if method not in SAME]
    if not child or not moving:
        return None
    method, call = moving[0]
    named = {k.arg: k.value for k in call.keywords}
    along = ast.unparse(named.get("dim", call.args[1] if len(call.args) > 1 else ast.Constant(0)))
    if method in ("chunk", "split") and along in ("-1", "2") and call.args:
        given = call.args[0]
        if method == "chunk":
            return child, Split(given.value if isinstance(given, ast.Constant) and isinstance(given.value, int) else 0)
        if isinstance(given, ast.List | ast.Tuple):
            return child, Split(len(given.elts), tuple(ast.unparse(e) for e in given.elts))
        return child, Split(targets if len(moving) == 1 else 0)
    return child, _reshaped(call.args) if method in ("view", "reshape", "unflatten") else Split(0)


def _reshaped(arguments: Sequence[ast.expr]) -> Split:
    """Where the 3 stands among the sizes tells what is inside of what."""
    sizes = [ast.unparse(a) for a in arguments]
    if "3" not in sizes:
        return Split(0)
    at = len(sizes) - 1 - sizes[::-1].index("3")
    after, before = sizes[at + 1 :], sizes[at - 1] if at else ""
    if len(after) == 2:
        return Split(3, heads=after[0])
    if len(after) == 1 and "head" in before and "dim" not in before:
        return Split(3, heads=before, inner=True)
    return Split(0)


# ------------------------------------------------------------------------------------------------- what goes where as it is

# Methods that put the outputs elsewhere and leave each number as it is.
MOVED = (*KEPT, "view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze")


# f(s·x) = s·f(x) for s > 0.
POOLS = ("max", "avg", "adaptive_avg", "adaptive_max")
POOLED = tuple(f"{kind}_pool{d}d" for kind in POOLS for d in (1, 2, 3))
HOMOGENEOUS = ("relu", "relu_", "leaky_relu", "dropout", *POOLED)


@_cached
def handed_on(cls: type[nn.Module], bent: bool = True) -> frozenset[tuple[str, str]]:
    """(a child, the one child that gets its result): with nothing between them but what moves axes, and what a factor above zero passes
    through (``F.relu``). bent: False for what a constant passes through, too: a channel's bias."""
    found: set[tuple[str, str]] = set()
    passed = (*MOVED, *(HOMOGENEOUS if bent else POOLED))
    function = forward_of(cls)
    for node, held in _statements(cls, passed, True):
        for call in (n for n in ast.walk(node) if isinstance(n, ast.Call) and _is_self(n.func) and n.args):
            child, methods = _chain(call.args[0], held, True)
            names = {n.id for n in ast.walk(call.args[0]) if isinstance(n, ast.Name) and n.id in held}
            alone = function is not None and all(_read_once(function, name, node) for name in names)
            if child and alone and all(method in passed for method, _ in methods):
                found.add((child, ast.unparse(call.func).partition(".")[2]))
    return frozenset(found)


def _read_once(function: ast.FunctionDef, name: str, node: _Statement) -> bool:
    """Whether nothing but this statement reads what the name holds there: ``x + f(norm(x))`` reads it twice."""
    named = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name]
    bound = sorted(n.lineno for n in named if isinstance(n.ctx, ast.Store))
    first = max((line for line in bound if line < node.lineno), default=0)
    last = min((line for line in bound if line >= node.lineno), default=function.end_lineno or node.lineno)
    end = (node.end_lineno or last) if last == node.lineno else last
    return sum(isinstance(n.ctx, ast.Load) and first < n.lineno <= end for n in named) == 1


@_cached
def called(cls: type[nn.Module]) -> frozenset[str]:
    """The children that the forward pass calls by their names: ``self.conv(x)``."""
    function = forward_of(cls)
    calls = (n for n in ast.walk(function) if isinstance(n, ast.Call)) if function is not None else ()
    return frozenset(n.func.attr for n in calls if isinstance(n.func, ast.Attribute) and _is_self(n.func))


@_cached
def adds_to_stream(cls: type[nn.Module]) -> bool:
    """Whether the forward pass adds a child's result to something that goes by it: x + f(x), or another child's: s(x) + f(x)."""
    forward = forward_of(cls)
    if forward is not None and any(_goes_by(node) for node in ast.walk(forward)):
        return True
    for node, held in _statements(cls, MOVED):
        for add in (n for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add)):
            for one, other in ((add.left, add.right), (add.right, add.left)):
                beside = isinstance(other, ast.Name) or (isinstance(other, ast.Call) and _chain(other, held)[0])
                if _chain(one, held)[0] and beside and ast.unparse(one) != ast.unparse(other):
                    return True
    function = forward_of(cls)
    added = (n for n in ast.walk(function) if isinstance(n, ast.AugAssign) and isinstance(n.op, ast.Add)) if function else ()
    return any(_chain(node.value, {})[0] for node in added)


def _goes_by(node: ast.AST) -> bool:
    """``x + F.relu(layer(x))``, ``x + 0.5 * f(x)``, ``x += f(x)``: a name, and what a call makes of it."""
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        pairs: list[tuple[ast.expr, ast.expr]] = [(node.target, node.value)]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pairs = [(node.left, node.right), (node.right, node.left)]
    else:
        return False
    return any(isinstance(stream, ast.Name) and _is_made_of(stream.id, made) for stream, made in pairs)


_ABOUT = ("shape", "size", "device", "dtype", "ndim", "dim", "numel", "new_zeros", "new_ones", "new_tensor")
"""What is asked of a tensor without its numbers."""


def _is_made_of(name: str, made: ast.expr) -> bool:
    about = {id(n.value) for n in ast.walk(made) if isinstance(n, ast.Attribute) and n.attr in _ABOUT}
    given = (argument for n in ast.walk(made) if isinstance(n, ast.Call) for argument in n.args)
    return any(isinstance(n, ast.Name) and n.id == name and id(n) not in about for argument in given for n in ast.walk(argument))


# ---------------------------------------------------------------------------------------------------- one after the other

NONEXPANSIVE = ("relu", "relu_", "leaky_relu", "tanh", "sigmoid", "elu", "softplus", "hardtanh", "logsigmoid", "softsign", "dropout", "abs")
"""Functions of one tensor that bring no two inputs further apart, where their slopes are left at 1 or less."""


@_cached
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
        if _is_self(child) or (isinstance(child, ast.Name) and child.id in self.layers):
            return len(node.args) == 1 and not node.keywords and self.hands_on(node.args[0])
        if not isinstance(node.func, ast.Attribute):
            return False
        owner, name = node.func.value, node.func.attr
        own = node.args[0] if node.args and (_is_functional(owner) or ast.unparse(owner) == "torch") else owner
        given = (*node.args[own is not owner :], *(k.value for k in node.keywords))
        gentle = all(isinstance(n, ast.Constant) and isinstance(n.value, int | float) and abs(n.value) <= 1 for n in given)
        steep = name in ("leaky_relu", "elu", "softplus", "hardtanh") and not gentle
        return name in (*MOVED, *NONEXPANSIVE) and not steep and self.hands_on(own)


def number(text: str, module: nn.Module) -> int:
    """What an expression of whole numbers and attributes of ``self`` comes to, read off the module; 0 where it is anything else."""
    try:
        return _evaluated(ast.parse(text, mode="eval").body, module)
    except (SyntaxError, ValueError, ArithmeticError):
        return 0


def _evaluated(node: ast.expr, module: nn.Module) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Attribute):
        path = ast.unparse(node).split(".")
        held: object = module
        for step in path[1:] if path[0] == "self" else ["?"]:
            held = vars(held).get(step) if hasattr(held, "__dict__") else None
        if type(held) is int:
            return held
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left, module), _evaluated(node.right, module)
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
    raise ValueError("not a number")
