"""What a zero unit still gives to its readers: a constant, which moves into their biases if that is exact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.prune.dependency_groups import Group, Layer, Reader, Writer

_SAME = 1e-9  # relative; measured in float64, where a constant differs from place to place by rounding alone
_NOTHING = 1e-12  # what is left of a running mean after a few hundred steps is not a reason to keep a unit


@torch.no_grad()
def inputs(model: nn.Module, probe: Tensor, layers: Iterable[Layer]) -> dict[Layer, Tensor]:
    """For each layer the value of each of its input columns over all samples and places of ``probe``; nan where it varies."""
    values: dict[Layer, Tensor] = {}

    def keep(layer: Any, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        read = given[0] if given else named["input"]
        columns = read.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        low, high = columns.amin(0), columns.amax(0)
        # The middle of the extremes: a mean over many places would add their rounding.
        middle = (low + high) / 2
        values[layer] = torch.where(high - low <= _SAME * (1 + middle.abs()), middle, math.nan)

    # Measured where it is read: whatever lies between, a pooling or a padding, has then acted on it.
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    model(probe)
    for hook in hooks:
        hook.remove()
    return values


def zero_rows(writer: Writer) -> Tensor:
    """Which of the layer's units do not depend on its input: those whose row is zero, or the gain of each BatchNorm on them."""
    rows = ~writer.layer.weight.detach().flatten(1).any(dim=1)
    gains = _gains(writer)
    return rows if gains is None else rows | (gains == 0)


def nearest_to_zero(writer: Writer) -> float:
    """Of all units the smallest: by the L2 norm of its weights or, where it is smaller, by the largest gain of the BatchNorms behind it."""
    lengths = writer.layer.weight.detach().flatten(1).norm(dim=1)
    gains = _gains(writer)
    return float((lengths if gains is None else torch.minimum(lengths, gains)).min()) if len(lengths) else 0.0


def _gains(writer: Writer) -> Tensor | None:
    """The largest gain on each unit of all BatchNorms behind the layer; None where one of them has none, or there is no BatchNorm."""
    if not writer.norms or not all(norm.affine for norm in writer.norms):
        return None
    return torch.stack([norm.weight.detach().abs() for norm in writer.norms]).amax(0)


def zero_units(group: Group) -> list[int]:
    """The units that do not depend on the input: those that are zero in every layer that writes them. ``group``: without an obstacle."""
    zero: list[int] = torch.stack([zero_rows(writer) for writer in group.writers]).all(0).nonzero().flatten().tolist()
    return zero


def is_unread(group: Group, unit: int) -> bool:
    """Whether no reader looks at the unit: its columns are zero in all of them."""
    return all(not reader.layer.weight[:, reader.columns[unit]].any() for reader in group.readers)


def stays_because(group: Group, unit: int, values: dict[Layer, Tensor]) -> str | None:
    """Why a zero unit cannot be removed exactly, or None where its constant is nothing or moves into its readers' biases."""
    for reader in group.readers:
        columns = reader.columns[unit]
        constants = values[reader.layer][columns]
        if not reader.layer.weight[:, columns].any() or (constants.abs() <= _NOTHING).all():
            continue
        if constants.isnan().any():
            return "the value still varies where it is read"
        layer, padding = reader.layer, getattr(reader.layer, "padding", "valid")    # a linear layer has none
        if getattr(layer, "padding_mode", "") == "zeros" and (padding != "valid" if isinstance(padding, str) else any(padding)):
            return "a constant other than zero meets a convolution padded with zeros"
    return None


def fates(group: Group, values: dict[Layer, Tensor]) -> dict[int, str | None]:
    """Of each unit that is zero, or that nobody reads: why it stays, or None where it goes."""
    if group.obstacle:
        return {}
    found = {unit: stays_because(group, unit, values) for unit in zero_units(group)}
    found |= {unit: None for unit in range(group.size) if is_unread(group, unit)}
    if list(found.values()) == [None] * group.size:
        found[0] = "a layer needs one"
    return dict(sorted(found.items()))


@torch.no_grad()
def move(reader: Reader, units: Sequence[int], values: Tensor) -> None:
    """Adds what the units give to this reader to its bias, or, where it has none, takes it off its BatchNorm's running mean.

    Both are exact in evaluation. In training a BatchNorm subtracts the batch's own mean, so a constant before it has no effect.
    """
    columns = [column for unit in units for column in reader.columns[unit]]
    layer = reader.layer
    weight = layer.weight[:, columns].flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight[:, columns]
    given = weight @ values[columns].nan_to_num()  # a value that varies is met by zero weights alone
    if not given.any():
        return
    if layer.bias is not None:
        layer.bias += given
    elif reader.norm is not None and reader.norm.running_mean is not None:
        reader.norm.running_mean -= given
    else:
        layer.bias = nn.Parameter(given)
