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
from normwise.parameters.roles import is_normalisation

# f(x + c) = f(x) + c for a channel's constant c, and f(s·x) = s·f(x) for s > 0.
_STRAIGHT: tuple[type, ...] = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
# f(s·x) = s·f(x) for s > 0: what stands between a layer and its normalisation without harm.
_HOMOGENEOUS: tuple[type, ...] = (*_STRAIGHT, nn.ReLU, nn.LeakyReLU, nn.modules.dropout._DropoutNd)
_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""They subtract each channel's mean, and with it the layer's bias."""


def scale_free(model: nn.Module, entries: Iterable[Entry]) -> dict[str, str]:
    """The matrices of ``entries`` whose length seems to be divided out: name -> the class of the normalisation."""
    divided = _divided(model)
    matrices = (e for e in entries if e.role in ("hidden", "conv", "head") and e.local_name == "weight" and not e.adapter and not e.tied)
    return {e.name: type(model.get_submodule(divided[e.module])).__name__ for e in matrices if e.module in divided}


def before_batch_norm(model: nn.Module) -> dict[nn.Module, str]:
    """Each layer whose output a BatchNorm rescales, with that one's name: there the length of a unit's weights means nothing, and shrinking
    it removes no unit."""
    batch = nn.modules.batchnorm._BatchNorm
    return {layer: norm for layer, norm in _divided(model).items() if isinstance(model.get_submodule(norm), batch)}


def _divided(model: nn.Module) -> dict[nn.Module, str]:
    """Each layer whose length a normalisation divides out -> the path of that one.

    A layer with a bias counts only before a BatchNorm or InstanceNorm, and only if nothing bends its result before: elsewhere its bias does
    not grow with its weight. A BatchNorm that is frozen, by its class or within a model in train(), is affine.
    """
    found: dict[nn.Module, str] = {}
    for layer, path, straight in (one for name, parent in model.named_modules() for one in _normalised(name, parent)):
        norm = model.get_submodule(path)
        divides = (norm.training or not model.training) and "Frozen" not in class_of(norm).__name__
        if divides and (getattr(layer, "bias", None) is None or (straight and isinstance(norm, _CHANNELWISE))):
            found[layer] = path
    return found


def _normalised(path: str, parent: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """(child, the path of the normalisation that gets its result, whether a constant gets there as it is, too): by the order of a
    Sequential and by the source; where that does not call both, by what stands side by side or has one number (``conv2`` and ``bn2``)."""
    children = {name: child for name, child in parent._modules.items() if child is not None}    # a module that runs twice counts twice
    ordered = isinstance(parent, nn.Sequential) and class_of(parent).forward is nn.Sequential.forward
    pairs, unbent = (forward_source.handed_on(class_of(parent), bent) for bent in (True, False))
    if ordered:
        pairs = unbent = frozenset(zip(children, list(children)[1:], strict=False))
    read = set(children) if ordered else forward_source.called(class_of(parent))
    for name, norm in _neighbours(children):
        if not {name, norm} <= read:
            yield children[name], f"{path}.{norm}".lstrip("."), True
    after = {first: second for first, second in pairs if first in children and second in children}
    for name in after:
        at, straight = after[name], (name, after[name]) in unbent
        while at in after and isinstance(children[at], _HOMOGENEOUS):
            straight &= isinstance(children[at], _STRAIGHT) and (at, after[at]) in unbent
            at = after[at]
        if is_normalisation(children[at]):
            yield children[name], f"{path}.{at}".lstrip("."), straight


def _neighbours(children: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """(layer, BatchNorm) with as many channels: the next sibling, or the one with the same number in its name."""
    names = list(children)
    for i, name in enumerate(names):
        layer, number = children[name], "" if name.isdigit() else _number(name)
        channels = getattr(layer, "out_features", None) if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", None)
        near = [*names[i + 1 : i + 2], *(other for other in names if number and _number(other) == number)]
        norms = ((other, children[other]) for other in near)
        fits = (other for other, norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_features == channels)
        if (first := next(fits, None)) is not None:
            yield name, first


def _number(name: str) -> str:
    return "".join(filter(str.isdigit, name))
