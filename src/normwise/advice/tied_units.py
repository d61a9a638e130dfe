"""Layers whose units no smaller network can do without one by one: what they give is summed or multiplied with other units', put through a
softmax, joined or split. Read from the source, on the safe side: `normwise.prune.shrink` asks autograd, which needs an input."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator

from torch import nn

from normwise.parameters import forward_source
from normwise.parameters.names import class_of, unwrapped
from normwise.parameters.roles import output_layers

_MIXES = (
    "softmax", "log_softmax", "gumbel_softmax", "topk", "argmax", "argsort", "sort", "cat", "concat", "concatenate", "stack", "hstack",
    "add", "add_", "sub", "mul", "mul_", "multiply", "einsum", "bmm", "matmul", "baddbmm", "index_add", "index_add_", "scatter_add",
    "chunk", "split", "unbind", "unflatten", "normalize", "layer_norm", "rms_norm", "group_norm", "glu", "norm",
)  # fmt: skip
_SOFT = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin, nn.GLU)


def tied_units(model: nn.Module) -> set[int]:
    """The ids of these layers."""
    kinds = {id(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
    found: set[int] = set()
    for module in model.modules():
        for path in _mixed(module):
            layers = output_layers(module, path, kinds)
            within = [m for name, m in module.named_children() if name == path.partition(".")[0]] if layers is None else []
            found |= (layers or set()) | {id(inner) for one in within for inner in one.modules()}
    return found


def _mixed(module: nn.Module) -> Iterator[str]:
    """The paths of the children whose results are mixed with others'."""
    cls = class_of(module)
    children = {name: unwrapped(child) for name, child in module.named_children()}
    if isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
        names = [name for name, child in children.items() if isinstance(child, _SOFT) or next(child.parameters(), None) is not None]
        yield from (first for first, second in itertools.pairwise(names) if _mixes_its_input(children[second]))
        return
    tensors = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    flow = _Mixing(cls, frozenset(children), {name for named in tensors for name, _ in named})
    for function in forward_source.functions(cls):
        if function.name == "forward":
            flow.called(function)
    yield from flow.mixed
    for first, second in flow.consumed:
        listed = children.get(second)
        takers = listed.children() if isinstance(listed, nn.ModuleList) else [listed]
        if any(taker is not None and _mixes_its_input(unwrapped(taker)) for taker in takers):
            yield first


def _mixes_its_input(module: nn.Module) -> bool:
    """A softmax, or a block whose shortcut adds to what it gets."""
    return isinstance(module, _SOFT) or forward_source.adds_to_stream(class_of(module))


class _Mixing(forward_source.Flow):
    """``mixed``: the children whose results meet others. tensors: the module's own parameters and buffers, which have the units' size."""

    def __init__(self, cls: type, known: frozenset[str], tensors: set[str]) -> None:
        super().__init__(cls, known)
        self.tensors = tensors | known
        self.mixed: set[str] = set()

    def source(self, node: ast.expr | None) -> frozenset[str]:
        given = super().source(node)
        if isinstance(node, ast.BinOp) and not any(map(self._is_plain, (node.left, node.right))):
            self.mixed |= given
        return given

    def statement(self, node: ast.stmt) -> None:
        super().statement(node)
        if isinstance(node, ast.AugAssign) and not self._is_plain(node.value):
            self.mixed |= self.sources([*self._targets(node.target), node.value])

    def call(self, node: ast.Call) -> frozenset[str]:
        given = super().call(node)
        name = forward_source.name_of(node)
        if (name in _MIXES or (name == "sum" and isinstance(node.func, ast.Name))) and not self.child(node.func):
            self.mixed |= given
        return given

    @staticmethod
    def _targets(target: ast.expr) -> Iterable[ast.expr]:
        return [ast.Name(n.id, ast.Load()) for n in ast.walk(target) if isinstance(n, ast.Name)]

    def _is_plain(self, node: ast.expr) -> bool:
        """A number, also one that the module keeps."""
        steps = ast.unparse(node).split(".")
        kept = len(steps) > 1 and (steps[0] == "math" or (steps[0] == "self" and steps[1].partition("[")[0] not in self.tensors))
        return isinstance(node, ast.Constant) or (kept and not any(isinstance(n, ast.Call) for n in ast.walk(node)))
