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
from normwise.parameters.roles import before_batch_norm, is_normalisation

# f(s·x) = s·f(x) for s > 0: what stands between a layer and its normalisation without harm.
_HOMOGENEOUS = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""They subtract each channel's mean, and with it the layer's bias."""


def scale_free(model: nn.Module, entries: Iterable[Entry]) -> dict[str, str]:
    """The matrices of ``entries`` whose length seems to be divided out: name -> the class of the normalisation.

    A layer with a bias counts only before a BatchNorm or InstanceNorm: elsewhere its bias does not grow with its weight.
    """
    behind = {id(layer): norm for layer, norm in _normalised(model)}
    batch = {id(layer) for layer in before_batch_norm(model)}
    found: dict[str, str] = {}
    for e in entries:
        norm = behind.get(id(e.module))
        bare = getattr(e.module, "bias", None) is None
        if e.role not in ("hidden", "conv", "head") or e.local_name != "weight" or e.adapter or e.tied:
            continue
        if norm is not None and (bare or isinstance(norm, _CHANNELWISE)):
            found[e.name] = type(norm).__name__
        elif id(e.module) in batch:
            found[e.name] = "BatchNorm"
    return found


def _normalised(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(layer, the normalisation that gets its result)."""
    for parent in model.modules():
        children = dict(parent.named_children())
        pairs = forward_source.handed_on(class_of(parent))
        if isinstance(parent, nn.Sequential) and class_of(parent).forward is nn.Sequential.forward:
            pairs = frozenset(zip(children, list(children)[1:], strict=False))
        after = {first: second for first, second in pairs if first in children and second in children}
        for name in after:
            at = after[name]
            while at in after and isinstance(children[at], _HOMOGENEOUS):
                at = after[at]
            if is_normalisation(children[at]):
                yield children[name], children[at]
