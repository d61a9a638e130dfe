"""What a policy was bound to, and whether that still stands: parameters are frozen, moved, converted and replaced while a run goes on."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from normwise.engine.sharded import here
from normwise.parameters.inventory import Inventory

_KIND = operator.attrgetter("dtype", "shape")


class Bindings:
    """The trainable parameters of some optimizers, what they are, and where the model has its parameters.

    ``moved()`` is asked at every step: it compares lists of references, and reads nothing from a device.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.refresh()
        registries: list[tuple[Mapping[str, Any], str, Any]] = []
        for module in model.modules():
            for registry in (module._parameters, module._modules):
                registries += [(registry, name, value) for name, value in registry.items() if value is not None]
        self._registries, self._names, self._registered = map(list, zip(*registries, strict=True)) if registries else ([], [], [])

    def refresh(self) -> None:
        """Takes what the optimizers hold now for what was bound."""
        self.params, self._counts, self._kinds = _trainable(self.optimizers), _counts(self.optimizers), []
        self._kinds = list(map(_KIND, self.params))

    def held_elsewhere(self) -> bool:
        """Whether the optimizers hold other parameters than before, or hold them in another place; freezing counts."""
        now = _trainable(self.optimizers)
        return not (len(now) == len(self.params) and all(map(operator.is_, now, self.params)) and _counts(self.optimizers) == self._counts)

    def converted(self) -> bool:
        """Whether a parameter has another dtype or shape: ``model.bfloat16()``, ``p.data = ...``."""
        return list(map(_KIND, self.params)) != self._kinds

    def registered_elsewhere(self) -> bool:
        """Whether a module of the model has another parameter or submodule under one of its names: a new head, ``assign=True``."""
        return not all(map(operator.is_, map(dict.get, self._registries, self._names), self._registered))


def _trainable(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for o in optimizers for g in o.param_groups for p in g["params"] if p.requires_grad]


def _counts(optimizers: Iterable[Optimizer]) -> list[int]:
    return [len(g["params"]) for o in optimizers for g in o.param_groups]


def replaced(old: Inventory, new: Inventory, held: set[int]) -> list[str]:
    """Names whose parameter is another one than before, which no optimizer holds: training it would need an optimizer that knows it."""
    known = {name: e.param for e in old for name in e.names}
    return [e.name for e in new if e.name in known and known[e.name] is not e.param and id(e.param) not in held]


class Marks:
    """Which tensors there were, and how often each had been written to: tells whether they are still the same without a copy.

    ``skip``: what was decided about the step of gradients that are remembered so.
    """

    def __init__(self, tensors: Iterable[Tensor | None], skip: bool = False) -> None:
        self.skip = skip
        self._marks = [_mark(t) for t in tensors]

    def still(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether none was computed, dropped or changed since."""
        return len(tensors) == len(self._marks) and all(map(_is_marked, tensors, self._marks))

    def any_still(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether at least one has not changed since."""
        return len(tensors) == len(self._marks) and any(map(_is_marked, tensors, self._marks))


def grads(params: Iterable[Tensor]) -> list[Tensor | None]:
    """Their gradients."""
    return [p.grad for p in params]


def _mark(t: Tensor | None) -> tuple[TensorWeakRef, int] | None:
    return None if t is None else (TensorWeakRef(t), here(t)._version)


def _is_marked(t: Tensor | None, mark: tuple[TensorWeakRef, int] | None) -> bool:
    if t is None or mark is None:
        return t is None and mark is None
    return mark[0]() is t and mark[1] == here(t)._version


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to."""
    return [here(t)._version for t in tensors]


def on_meta(t: Tensor) -> bool:
    """Whether a parameter has no values yet."""
    return t.device == torch.device("meta")
