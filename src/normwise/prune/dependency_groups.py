"""Which units of a model can go only together: the groups of torch-pruning's dependency graph, in our own words.

A *group* is one axis of channels or features with everything that has it: the layers that write it (their rows), the BatchNorms on it,
the layers that read it (their columns). A shortcut adds two layers' outputs, so both write one group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from normwise.errors import StudyError, need
from normwise.prune.outputs import said, tensors

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

# What keeps channels apart and a constant channel constant, by the name of its backward node. A product with something that varies
# and an average over a zero border do not: those show when the constant is measured.
_CHANNEL_BY_CHANNEL = frozenset({
    "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Tanh", "Sigmoid", "Softplus", "Hardtanh", "Hardswish", "Hardsigmoid",
    "MaxPool1D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
    "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D",
    "Add", "Sub", "Mul", "Div", "Clone", "ToCopy", "Mean",
})  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """A layer whose rows are the units; ``norms``: the BatchNorms that read it, if nothing else does."""

    name: str
    layer: Layer
    norms: tuple[_BatchNorm, ...]


@dataclass(frozen=True)
class Reader:
    """A layer with ``columns[unit]``, its input columns of each unit: several after a flattened image. ``norm``: its one BatchNorm."""

    layer: Layer
    columns: list[list[int]]
    norm: _BatchNorm | None


@dataclass(frozen=True)
class Group:
    """Units 0 … size−1 with all that writes and reads them.

    ``obstacle``: why none of them can be removed, or None: then unit u is row u of each layer that writes it.
    """

    name: str
    size: int
    writers: list[Writer]
    readers: list[Reader]
    obstacle: str | None
    remove: Callable[[list[int]], None]


def groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Every group that a convolution or a linear layer writes. ``model``: in evaluation mode, all parameters with gradients.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        StudyError: no output has a gradient, or torch-pruning fails on the model.
    """
    need("prune", "torch_pruning", what="removing units")
    import torch_pruning

    ends: set[Any] = set()

    def forward(model: nn.Module, batch: Tensor) -> list[Tensor]:
        given = [tensor for tensor in tensors(model(batch)) if tensor.grad_fn is not None]
        if not given:
            raise StudyError(
                "no output of the model has a gradient, and the gradient's graph tells which layers read which: let forward run without "
                "torch.no_grad or inference_mode, and return what comes before an argmax or a detach."
            )
        ends.update(tensor.grad_fn for tensor in given)
        return given

    unfit, names = _unfit(model, example), {module: name for name, module in model.named_modules()}
    try:
        with torch.enable_grad(), _without_caches(model):
            graph = torch_pruning.DependencyGraph().build_dependency(model, example, forward_fn=forward, verbose=False)
        return [_group(graph, found, names, unfit, ends) for found in graph.get_all_groups(root_module_types=LAYERS)]
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(
            f"torch-pruning, which finds the units that go together, fails on this model ({said(error)}): give it the part of the model "
            "whose units are zero, as a model of its own."
        ) from error


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Joining keys and values to an empty cache, as Hugging Face's models do, leaves torch-pruning in an endless search."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if getattr(config, "use_cache", None) is True]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


@torch.no_grad()
def _unfit(model: nn.Module, example: Tensor) -> dict[nn.Module, str]:
    """Layers that must keep their shape, and why."""
    calls: Counter[nn.Module] = Counter()
    hooks = [m.register_forward_hook(lambda module, given, out: calls.update([module])) for m in model.modules()]
    model(example)
    for hook in hooks:
        hook.remove()
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    whys: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        joined = getattr(module, "groups", 1)    # of a user's own module it may be anything
        if calls[module] > 1:
            whys[module] = f"{name} is called {calls[module]} times"
        elif parametrize.is_parametrized(module):
            whys[module] = f"{name} is parametrized"
        elif any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            whys[module] = f"{name} shares a parameter"
        elif isinstance(joined, int) and joined > 1:
            whys[module] = f"{name} is a grouped convolution"
    return whys


def _group(graph: Any, found: Any, names: dict[nn.Module, str], unfit: dict[nn.Module, str], ends: set[Any]) -> Group:
    root = found[0].dep.target.module
    handler, size = found[0].dep.handler, len(found[0].idxs)
    writers: list[Writer] = []
    readers: list[Reader] = []
    whys: list[str | None] = []
    crossed: list[str] = []
    for item in found:
        node, layer = item.dep.target, item.dep.target.module
        norms, is_layer = _norms_behind(node), isinstance(layer, LAYERS)
        reads = is_layer and graph.is_in_channel_pruning_fn(item.dep.handler)
        whys.append(unfit.get(layer) or (None if reads else _obstacle(node, ends)))
        if reads:
            readers.append(Reader(layer, _columns(item, size), norms[0] if len(norms) == 1 else None))
            crossed += [names[layer]] if sorted(item.idxs) != list(range(layer.weight.shape[1])) else []
        if is_layer and graph.is_out_channel_pruning_fn(item.dep.handler):
            writers.append(Writer(names[layer], layer, norms))
            straight = size == len(layer.weight) and list(item.idxs) == list(item.root_idxs) == list(range(size))
            crossed += [] if straight else [names[layer]]
    whys += [f"between it and {name} a view mixes units with other axes" for name in crossed]
    obstacle = next(filter(None, whys), None)
    return Group(names[root], size, writers, readers, obstacle, lambda units: graph.get_pruning_group(root, handler, units).prune())


def _norms_behind(node: Any) -> tuple[_BatchNorm, ...]:
    after = [output.module for output in node.outputs]
    return tuple(after) if all(isinstance(module, _BatchNorm) for module in after) else ()


def _columns(item: Any, size: int) -> list[list[int]]:
    columns: list[list[int]] = [[] for _ in range(size)]
    for column, unit in zip(item.idxs, item.root_idxs, strict=True):
        columns[unit].append(column)
    return columns


def _obstacle(node: Any, ends: set[Any]) -> str | None:
    """Why a group with this node must stay as it is; None where its channels stay apart. ``ends``: the backward nodes of the outputs."""
    module = node.module
    if not node.outputs or node.grad_fn in ends:
        return "it is the model's output"
    kind = type(module).__name__.strip("_")
    if isinstance(module, (*LAYERS, _BatchNorm)) or kind == "ReshapeOp":
        return None
    if isinstance(module, nn.Parameter):
        return f"it meets a parameter of shape {tuple(module.shape)}"
    operation = re.sub(r"Backward\d*$", "", node.grad_fn.name())
    if _within_linear(node, operation):
        return None
    apart = kind == "ElementWiseOp" and operation in _CHANNEL_BY_CHANNEL
    if apart and operation == "Mean":    # over the places of (n, channels, places…), not over channels
        dimensions = len(node.grad_fn._saved_self_sym_sizes)
        # Autograd keeps −1 as 2⁶⁴ − 1.
        axes = {(axis - 2**64 if axis >= 2**63 else axis) % dimensions for axis in node.grad_fn._saved_dim}
        apart = dimensions > 3 and axes <= set(range(2, dimensions))
    return None if apart else f"it passes through {operation if kind == 'ElementWiseOp' else node.name or operation}"


def _within_linear(node: Any, operation: str) -> bool:
    """A linear layer's own weight, transposed; its own product where it folds more axes than two into one and back."""
    if operation == "T":
        return not node.inputs
    ends = [output.grad_fn for output in node.outputs if isinstance(output.module, nn.Linear)]
    folded = all("View" in end.name() and end.next_functions[0][0] is node.grad_fn for end in ends)
    return operation in ("Addmm", "Mm") and folded and len(ends) == len(node.outputs) == 1
