"""Several matrices in one layer: how a forward pass takes its result apart."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from normwise.parameters.forward_source.statements import chain, statements
from normwise.parameters.forward_source.trees import KEPT, cached

# Methods after which the outputs are still where they were.
SAME = (*KEPT, "clamp", "clamp_", "unsqueeze")


@dataclass(frozen=True)
class Split:
    """How the forward pass takes a layer's outputs apart. ``sizes``: expressions of the parts' sizes, None where they are equal;
    ``heads``: the expression of what stands between, "" for nothing; ``inner``: whether the parts lie within each head."""

    count: int
    sizes: tuple[str, ...] | None = None
    heads: str = ""
    inner: bool = False


@cached
def splits(cls: type[nn.Module]) -> dict[str, frozenset[Split]]:
    """Child -> the ways in which its result is taken apart: ``.chunk(3, -1)``, ``.split(width, dim=2)`` into three names,
    ``.split([a, b, c], -1)``, or a reshape to ``(..., 3, heads, d)`` or ``(..., heads, 3, d)``. A way that is not understood is
    ``Split(0)``: with a second way beside it nothing is known."""
    found: dict[str, set[Split]] = {}
    for node, held in statements(cls, SAME):
        targets = node.targets[0] if isinstance(node, ast.Assign) else None
        count = len(targets.elts) if isinstance(targets, ast.Tuple) else 0
        for child, way in filter(None, (_split(call, count, held) for call in ast.walk(node) if isinstance(call, ast.Call))):
            found.setdefault(child, set()).add(way)
    return {name: frozenset(ways) for name, ways in found.items()}


def _split(whole: ast.Call, targets: int, held: dict[str, str]) -> tuple[str, Split] | None:
    """The way in which the first method that moves the outputs takes them apart."""
    child, methods = chain(whole, held)
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
