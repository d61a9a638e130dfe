"""Weights whose length does not reach the model's output, because a normalisation right behind their layer divides it out.

Told by the order of layers and by the source of forward passes, so it is a guess: code between the two that is not read, or a second use of
the layer's result, would make it wrong. ⟨w, ∇w⟩ = 0 on a batch proves it (Euler's theorem on homogeneous functions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from normwise.parameters import forward_source
from normwise.parameters.inventory import Entry
from normwise.parameters.names import class_of
from normwise.parameters.roles import HOMOGENEOUS, STRAIGHT, before_batch_norm, is_normalisation, keeps_bias

_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""They subtract each channel's mean, and with it the layer's bias."""


def scale_free(model: nn.Module, entries: Iterable[Entry]) -> dict[str, str]:
    """The matrices of ``entries`` whose length seems to be divided out: name -> the class of the normalisation.

    A layer with a bias counts only before a BatchNorm or InstanceNorm: elsewhere its bias does not grow with its weight.
    """
    def divides(norm: nn.Module) -> bool:
        """A BatchNorm that is frozen, by its class or within a model in train(), is affine."""
        return (norm.training or not model.training) and "Frozen" not in class_of(norm).__name__

    behind = {id(layer): (norm, straight) for layer, norm, straight in _normalised(model) if divides(norm)}
    batch = {
        id(layer): keeps_bias(model, layer, name) for layer, name in before_batch_norm(model).items()
        if divides(model.get_submodule(name))
    }  # fmt: skip
    found: dict[str, str] = {}
    for e in entries:
        norm, straight = behind.get(id(e.module), (None, False))
        bare = getattr(e.module, "bias", None) is None
        if e.role not in ("hidden", "conv", "head") or e.local_name != "weight" or e.adapter or e.tied:
            continue
        if norm is not None and (bare or (straight and isinstance(norm, _CHANNELWISE))):
            found[e.name] = type(norm).__name__
        elif id(e.module) in batch and (bare or batch[id(e.module)]):
            found[e.name] = "BatchNorm"
    return found


def _normalised(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, bool]]:
    """(layer, the normalisation that gets its result, whether a constant gets there as it is, too)."""
    for parent in model.modules():
        children = {name: child for name, child in parent._modules.items() if child is not None}    # a module that runs twice counts twice
        pairs, unbent = forward_source.handed_on(class_of(parent)), forward_source.handed_on(class_of(parent), False)
        if isinstance(parent, nn.Sequential) and class_of(parent).forward is nn.Sequential.forward:
            pairs = unbent = frozenset(zip(children, list(children)[1:], strict=False))
        after = {first: second for first, second in pairs if first in children and second in children}
        for name in after:
            at, straight = after[name], (name, after[name]) in unbent
            while at in after and isinstance(children[at], HOMOGENEOUS):
                straight &= isinstance(children[at], STRAIGHT) and (at, after[at]) in unbent
                at = after[at]
            if is_normalisation(children[at]):
                yield children[name], children[at], straight
