"""Whether a forward pass multiplies activations by activations, as gates, mixtures and bilinear layers do."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from normwise.parameters.forward_source.calls import Code, method, named
from normwise.parameters.forward_source.trees import KEPT, cached, functions, is_self, name_of
from normwise.parameters.forward_source.ways import ABOUT, Term, Way, Ways, root_of

_CALLS = (
    "mul", "mul_", "multiply", "multiply_", "matmul", "mm", "mv", "bmm", "dot", "vdot", "vecdot", "inner", "outer", "ger", "kron", "cross",
    "tensordot", "einsum", "bilinear", "scaled_dot_product_attention",
)  # fmt: skip
_ADDED = ("addcmul", "addcmul_", "addmm", "addmm_", "addmv", "addr", "addbmm", "baddbmm", "baddbmm_", "lerp", "lerp_")
"""Functions that add the product of their last two arguments."""
_WEIGHED = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
"""Functions of torch that multiply their first argument by their second, which a layer may have made."""
_NO_FACTORS = ("value", "alpha", "beta", "bias", "out", "attn_mask", "training", "inplace")
"""Keywords of these functions that are not multiplied by."""
_GATED = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.Bilinear, nn.GLU)
_NO_INPUTS = ("mask", "bias", "scale", "cos", "sin")
"""Parts of names of arguments that are no activations."""
_TURNS = ("cos", "sin")
_NO_NUMBERS = (
    "len", "isinstance", "type", "id", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli_like",
    "is_tensor", "is_floating_point", "stride",
)  # fmt: skip
"""What is called with a tensor and gives none of its numbers."""
_BENT = (
    *KEPT, "sigmoid", "hardsigmoid", "tanh", "erf", "exp", "expm1", "log", "log1p", "logsigmoid", "softplus", "relu", "relu6", "silu",
    "gelu", "abs", "neg", "sqrt", "rsqrt", "square", "pow", "reciprocal", "clamp", "sin", "cos", "add", "sub", "mul", "div",
)  # fmt: skip
"""Functions of one number at a time."""
_PLAIN = ("int", "float", "bool", "str")
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
DEEPEST = 8
"""Calls within calls that are followed."""


@cached
def multiplies(cls: type[nn.Module], asked: frozenset[str] = frozenset()) -> bool:
    """Whether its forward pass multiplies two things that come from its input; read from the source, so a guess. What bends one number by
    itself, as x·σ(x) does, is none.

    Read are ``forward``, the methods named in ``asked``, which other modules call, and the functions that these hand numbers of their
    input to. A class without a forward pass is read by all of its methods.
    """
    return issubclass(cls, _GATED) or any(_read(cls, name)[0] for name in ("forward", *sorted(asked)))


@cached
def asked_of_others(cls: type[nn.Module]) -> frozenset[str]:
    """Names of methods that its forward pass calls on other modules with numbers of its input: ``mix`` of ``self.gate.mix(x)``. Those of
    tensors are none."""
    return _read(cls, "forward")[1].difference(dir(torch.Tensor), dir(nn.Module))


@cached
def _read(cls: type[nn.Module], entry: str) -> tuple[bool, frozenset[str]]:
    """Whether a product was found from a method on, and which methods are called there on what is no function."""
    whole = entry == "forward" and cls.forward is nn.Module.forward
    entries = [tree.name for tree in functions(cls) if tree.name != "__init__"] if whole else [entry]
    read = [_Products(cls, code) for code in (method(cls, name) for name in entries) if code is not None]
    return any(one.found for one in read), frozenset().union(*(one.asked for one in read))


def _inputs(code: Code) -> list[str]:
    """The arguments of a forward pass that may hold activations: no masks, no numbers."""
    spec = code.tree.args
    given = [*spec.posonlyargs, *spec.args]
    defaults = dict(zip([a.arg for a in given[::-1]], spec.defaults[::-1], strict=False))
    defaults |= {a.arg: value for a, value in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if value is not None}
    found = [*given[code.method :], *spec.kwonlyargs, *([spec.vararg] if spec.vararg else [])]
    return [a.arg for a in found if not (any(part in a.arg for part in _NO_INPUTS) or _is_number(a, defaults.get(a.arg)))]


def _is_number(argument: ast.arg, default: ast.expr | None) -> bool:
    stated = argument.annotation is not None and ast.unparse(argument.annotation) in _PLAIN
    return stated or (isinstance(default, ast.Constant) and default.value is not None)


class _Products(Ways):
    """``same``: name -> tokens of the numbers that it holds. A name bent from another one has that one's."""

    def __init__(self, cls: type[nn.Module], code: Code) -> None:
        self.cls = cls
        self.tokens = itertools.count()
        self.code = code
        self.inside: list[ast.FunctionDef] = [code.tree]
        self.followed: dict[object, Way] = {}
        self.local: dict[str, list[Code]] = {}
        self.asked: set[str] = set()
        names = _inputs(code)
        self.same: dict[str, frozenset[object]] = {name: self.fresh() for name in names}
        super().__init__(code.tree, names)

    def fresh(self) -> frozenset[object]:
        return frozenset([next(self.tokens)])

    # ------------------------------------------------------------------------------------------------------ statements

    def read(self, body: Iterable[ast.stmt]) -> None:
        body = list(body)
        self.local |= {node.name: [Code(node)] for node in body if isinstance(node, ast.FunctionDef)}
        super().read(body)

    def inner(self, node: ast.stmt) -> None:
        """A loop is read twice: the second round sees what the first has left."""
        if isinstance(node, ast.If):
            self.either(node)
            return
        for _ in range(2 if isinstance(node, ast.For | ast.While) else 1):
            super().inner(node)

    def either(self, node: ast.If) -> None:
        """Which side ran is not known: a name may hold what it got on either."""
        before = dict(self.held)
        self.read(node.body)
        first, self.held = self.held, before
        self.read(node.orelse)
        if not isinstance(node.body[-1], _ENDS):
            self.held = {name: first.get(name, frozenset()) | self.held.get(name, frozenset()) for name in {**self.held, **first}}

    def bind(self, target: ast.expr, value: ast.expr, way: Way) -> set[str]:
        bent = self.numbers(value) if self.bends(value) else frozenset()
        if isinstance(target, ast.Name) and "mask" in target.id and _is_aside(target.id, way):
            way = frozenset()
        mentioned = self.mentioned(value)
        names = super().bind(target, value, way)
        for name in names:
            alone = isinstance(target, ast.Name)
            self.same[name] = bent if alone and len(bent) == 1 else self.fresh()
            self.local.pop(name, None)
            if alone and mentioned:    # step = partial(self.mix, 2)
                self.local[name] = mentioned
        for one in ast.walk(target):
            if isinstance(one, ast.Subscript):    # out[:, k] = y
                self.gains(root_of(one), way)
        return names

    def gains(self, name: str, way: Way) -> None:
        """A list, or a tensor that is written to, holds more."""
        if name in self.held and way:
            self.held[name] |= way
            self.same[name] = self.fresh()

    # ----------------------------------------------------------------------------------------------------- expressions

    def of(self, node: ast.AST) -> Way:
        """A product within the expression is looked at."""
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Compare) or (isinstance(node, ast.Attribute) and node.attr in ABOUT):
            return frozenset()
        if isinstance(node, ast.Call):
            return self.called(node)
        if isinstance(node, ast.IfExp):
            return self.of(node.body) | self.of(node.orelse)
        if isinstance(node, ast.BinOp):
            left, right = self.of(node.left), self.of(node.right)
            self.operate(node.op, (node.left, left), (node.right, right))
            return left | right
        for made in node.generators if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) else ():
            self.assign(made.target, made.iter)
        if isinstance(node, ast.NamedExpr):
            self.assign(node.target, node.value)
            return self.held[node.target.id]
        way: Way = frozenset().union(*(self.of(child) for child in ast.iter_child_nodes(node)))
        self.returned |= way if isinstance(node, ast.Yield | ast.YieldFrom) else frozenset()
        return way

    def operate(self, op: ast.operator, left: Term, right: Term) -> None:
        if isinstance(op, ast.Mult | ast.MatMult):
            self.product([left, right])

    def product(self, factors: Iterable[Term]) -> None:
        """Found where two of them hold numbers of the input and are not one name, bent by itself."""
        active = [(way, self.numbers(factor)) for factor, way in factors if way]
        self.found |= not self.losses and len(active) > 1 and any(active[0] != other for other in active[1:])

    def numbers(self, node: ast.AST) -> frozenset[object]:
        """Tokens of the input's numbers in an expression; two slices of one tensor are two."""
        name = root_of(node)
        if name and isinstance(node, ast.Subscript):
            return frozenset([(ast.unparse(node.slice), self.same[name])]) if self.held.get(name) else frozenset()
        if isinstance(node, ast.Name):
            return self.same[node.id] if self.held.get(node.id) else frozenset()
        return frozenset().union(*(self.numbers(child) for child in ast.iter_child_nodes(node)))

    def bends(self, node: ast.expr) -> bool:
        """Whether each number is a function of one number alone, and of what is no input."""
        if root_of(node) or not self.numbers(node):
            return True
        if isinstance(node, ast.BinOp):
            return not isinstance(node.op, ast.MatMult) and self.bends(node.left) and self.bends(node.right)
        if isinstance(node, ast.UnaryOp):
            return self.bends(node.operand)
        if not isinstance(node, ast.Call) or name_of(node) not in _BENT or is_self(node.func):
            return False
        owner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return all(map(self.bends, [*owner, *node.args, *(k.value for k in node.keywords)]))

    # ----------------------------------------------------------------------------------------------------------- calls

    def called(self, node: ast.Call) -> Way:
        name, owner = name_of(node), node.func.value if isinstance(node.func, ast.Attribute) else None
        whose = self.of(node.func)
        given = [self.of(one) for one in node.args]
        keywords = [(k.arg or "", k.value, self.of(k.value)) for k in node.keywords]
        way: Way = whose.union(*given, *(one for _, _, one in keywords))
        if not way or name in _NO_NUMBERS or (isinstance(node.func, ast.Attribute) and name in ABOUT):
            return frozenset()
        starred = [(one, isinstance(arg, ast.Starred)) for one, arg in zip(given, node.args, strict=True)]
        by_name = {key: one for key, _, one in keywords}
        if self.losses:
            return way
        if codes := self.codes(node.func):
            return frozenset().union(*(self.follow(code, starred, by_name) for code in codes))
        self.asked |= {name} if owner is not None and not is_self(node.func) else set()
        for k, argument in enumerate(node.args):    # checkpoint(self.block, x)
            for code in self.codes(argument):
                way |= self.follow(code, starred[k + 1 :], by_name)
        factors = [(value, one) for key, value, one in keywords if key not in _NO_FACTORS]
        terms = [*([(owner, whose)] if owner is not None else []), *zip(node.args, given, strict=True), *factors]
        self.multiplied(node, name, terms)
        if owner is not None and (name in ("append", "extend", "insert", "update") or name.endswith("_")):
            self.gains(root_of(owner), frozenset().union(*given))
        layer = ast.unparse(node.func)
        return way | {layer} if layer.startswith("self.") else way

    def multiplied(self, node: ast.Call, name: str, terms: Sequence[Term]) -> None:
        """terms: its receiver, if it has one, and its arguments."""
        self.found |= name == "glu"
        if name in _CALLS:
            self.product(terms)
        elif name in _ADDED:
            self.product(terms[-2:])
        elif name in _WEIGHED and not ast.unparse(node.func).startswith("self."):
            self.product(terms[1:3] if terms and isinstance(node.func, ast.Attribute) else terms[:2])

    def codes(self, node: ast.expr) -> list[Code]:
        """The functions that an expression may be."""
        if isinstance(node, ast.Name) and node.id in self.local:
            return self.local[node.id]
        if isinstance(node, ast.Name) and node.id in self.held:
            return []
        if isinstance(node, ast.Call):    # vmap(self.mix)(x, y)
            return self.mentioned(node)
        if is_self(node) and isinstance(node, ast.Attribute):
            found = method(self.cls, node.attr)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("super("):
            found = method(self.cls, node.attr, self.code.function)
        else:
            found = named(self.code.function.__globals__, node) if self.code.function is not None else None
        return [] if found is None else [found]

    def mentioned(self, value: ast.expr) -> list[Code]:
        """The functions that an expression hands on without calling them."""
        called = {id(n.func) for n in ast.walk(value) if isinstance(n, ast.Call)}
        named = (n for n in ast.walk(value) if isinstance(n, ast.Name | ast.Attribute) and id(n) not in called)
        return [code for n in named for code in self.codes(n)]

    def follow(self, code: Code, given: Sequence[tuple[Way, bool]], by_name: Mapping[str, Way]) -> Way:
        """What a function returns of these arguments."""
        filled = {name: way for name, way in code.filled(given, by_name).items() if way and not _is_aside(name, way)}
        passed: Way = frozenset().union(*filled.values())
        if not filled or code.tree in self.inside or len(self.inside) > DEEPEST:
            return passed
        key = (code, frozenset(filled.items()))
        if code.function is None or key not in self.followed:
            self.followed[key] = self.within(code, filled)
        return self.followed[key]

    def within(self, code: Code, filled: dict[str, Way]) -> Way:
        outer = self.held, self.same, self.returned, self.local, self.code
        closed = code.function is None    # it sees the names around it
        self.held = {**(self.held if closed else {}), **filled}
        self.same = {**(self.same if closed else {}), **{name: self.fresh() for name in filled}}
        self.local = dict(self.local) if closed else {}
        self.returned, self.code = frozenset(), self.code if closed else code
        self.inside.append(code.tree)
        self.read(code.tree.body)
        self.inside.pop()
        found = self.returned
        self.held, self.same, self.returned, self.local, self.code = outer
        return found


def _is_aside(name: str, way: Way) -> bool:
    """No activations by its name. What a layer has made is one under any, but the angles of a rotation."""
    made = any(str(one).startswith("self.") for one in way) and not any(part in name for part in _TURNS)
    return any(part in name for part in _NO_INPUTS) and not made
