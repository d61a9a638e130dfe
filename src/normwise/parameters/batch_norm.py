"""Layers whose output a BatchNorm rescales: there the length of a unit's weights means nothing, and shrinking it removes no unit."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def before_batch_norm(model: nn.Module) -> dict[nn.Module, str]:
    """Each such layer with the name of its BatchNorm: the next sibling with as many channels, or the one with the same number in its name
    (``conv2`` and ``bn2``)."""
    return {layer: name for path, parent in model.named_modules() for layer, name in _pairs(path, parent)}


def _pairs(path: str, parent: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    children = [(name, child) for name, child in parent._modules.items() if child is not None]
    for i, (name, layer) in enumerate(children):
        if not isinstance(layer, LAYERS):
            continue
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        number = "".join(filter(str.isdigit, name))
        numbered = [c for c in children if number and "".join(filter(str.isdigit, c[0])) == number] if not name.isdigit() else []
        near = (*children[i + 1 : i + 2], *numbered)
        fits = [other for other, norm in near if isinstance(norm, _BatchNorm) and norm.num_features == channels]
        if fits:
            yield layer, f"{path}.{fits[0]}".lstrip(".")
