"""Which children give a module's outputs."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from torch import nn

from normwise.parameters.forward_source.trees import cached, forward_of, functions, is_self, method_of


@cached
def outputs(cls: type[nn.Module], children: frozenset[str]) -> frozenset[str] | None:
    """Those of ``children`` whose results the forward pass returns and hands to no other child, as paths: ``"head"``, ``"net.head"``, and
    ``"layers[-1]"`` of a list that runs one after the other. None where there is no source, or no child is returned.

    A function of a result (a softmax, a reshape, a method of the module) still is that result; the sum of two is both. A class without a
    forward pass is read by all of its methods.
    """
    forward = forward_of(cls)
    returned: set[str] = set()
    flow = Flow(cls, children)
    for function in functions(cls) if forward is None else [forward]:
        if function.name != "__init__":
            returned |= flow.called(function)
    last = returned - {first for first, second in flow.consumed if first != second}
    chained = {first for first, second in flow.consumed if first == second}
    return frozenset(f"{name}[-1]" if name in chained else name for name in last) or None


class Flow:
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
        named = [n for n in inside if is_self(n) or isinstance(n, ast.Name)]
        handed = next((path for n in named if (path := self.child(n))), "")    # checkpoint(self.layer, x)
        child = self.child(node.func) or handed
        if child:
            self.consumed |= {(one, child) for one in frozenset().union(*given)}
            return frozenset({child})
        name = node.func.attr if isinstance(node.func, ast.Attribute) and is_self(node.func) else ""
        if name and self.depth < 6 and (method := method_of(self.cls, name)) is not None:
            return self.called(method, given)
        owner = [self.source(node.func.value)] if isinstance(node.func, ast.Attribute) else []
        return frozenset().union(*given, *owner)

    def child(self, called: ast.expr) -> str:
        """``self.head(...)``, ``self.heads[k](...)``, ``self.net.head(...)``, ``layer(...)`` in a loop over ``self.layers``."""
        if isinstance(called, ast.Subscript):
            return self.child(called.value)
        if isinstance(called, ast.Attribute) and is_self(called):
            return called.attr if called.attr in self.known else ""
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Attribute | ast.Subscript):
            path = self.child(called.value)
            return f"{path}.{called.attr}" if path else ""
        return self.children.get(called.id, "") if isinstance(called, ast.Name) else ""
