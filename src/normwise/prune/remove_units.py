"""Removing units that are exactly zero: the smaller model computes what the full one computed, and the difference is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.errors import StudyError
from normwise.prune import constant_units
from normwise.prune.dependency_groups import LAYERS, Group, Layer, groups
from normwise.reports import Loggable

M = TypeVar("M", bound=nn.Module)

_EXACT = 1e-6
_PROBES = 16


@dataclass(frozen=True)
class Report(Loggable):
    """What `shrink` did.

    Attributes:
        units: by layer that lost any, how many it had and has.
        removed: by the same layers, which ones, as indices in the full model; layers joined by a shortcut have the same.
        kept: by layer, zero units that stayed, and why.
        whole: by layer without a zero unit, how many units it has and how far the nearest is from zero: the L2 norm of its weights, or
            its BatchNorm's gain.
        parameters: before and after.
        difference: the largest difference of any output, in evaluation and float64, over the example input and 16 samples of noise.
    """

    prefix: ClassVar[str] = "shrink/"
    units: dict[str, tuple[int, int]]
    removed: dict[str, tuple[int, ...]]
    kept: dict[str, str]
    parameters: tuple[int, int]
    difference: float
    whole: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the outputs are equal to 1e-6."""
        return self.difference < _EXACT

    def numbers(self) -> dict[str, float]:
        """Parameters before and after, the largest difference of any output, and each layer's units that are left."""
        before, after = self.parameters
        units = {f"units/{name}": left for name, (_, left) in self.units.items()}
        return {"parameters/before": before, "parameters/after": after, "difference": self.difference, **units}

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{name}: {was} units, now {left}" for name, (was, left) in self.units.items()] or ["nothing was removed"]
        lines += [f"{name}: {why}" for name, why in self.kept.items()]
        lines += [f"{name}: {units} units, none of them zero (the nearest {least:.2g} away)" for name, (units, least) in self.whole.items()]
        return "\n".join([*lines, f"parameters: {before}, now {after}; largest output difference {self.difference:.1e}"])


def shrink(model: M, example_input: Tensor, tolerance: float = 0.0) -> tuple[M, Report]:
    """Makes a smaller copy of ``model`` without its zero units; ``model`` itself is not touched.

    A unit is an output channel of a convolution or an output feature of a linear layer. It is removed if its row of weights is zero,
    or the gain of the BatchNorm behind it, or if nobody reads it: its columns in every layer that follows are zero. Removing one can
    leave another unread, so this is repeated until nothing is left to remove. Units that a shortcut joins are removed only together,
    where each of them is zero. The model's outputs are never removed.

    A zero unit still outputs a constant: relu(bias), or relu(shift) behind a BatchNorm. It is measured in evaluation mode and moved
    into the biases of the layers that read it. That is exact unless such a layer pads its input with zeros, since the constant is
    missing at the border. Units with a constant other than zero before such a layer are kept, and reported; drive their bias or shift
    to zero too (``nw.group_lasso(s, params="class:BatchNorm2d", per="unit")``), or below zero where a ReLU follows.

    The parameters are new ones: build the optimizer, and attach a policy, after shrinking. Dtypes, devices, ``requires_grad`` and the
    training mode are kept, gradients are not. Layers that are called twice, tied, grouped or parametrized keep their units, and so do
    units behind anything that mixes channels (LayerNorm, attention, concatenation). torch-pruning does the surgery (Fang et al.,
    DepGraph: Towards any structural pruning, 2023).

    Args:
        example_input: (n, …), as the model takes it; its shape matters, its values do not.
        tolerance: rows and gains of at most this L2 norm are first set to zero. The default 0 takes only exact zeros, which is what
            `normwise.group_lasso` leaves.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        StudyError: every unit of a layer is zero and the output no longer depends on the input. Beside a shortcut such a layer keeps one
            unit.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise StudyError(f"tolerance is {tolerance!r}, but it is the largest L2 norm that counts as zero: a finite number >= 0.")
    small, probe = _opened(model), _probe(example_input)
    for module in small.modules():
        if isinstance(module, LAYERS):
            module.weight.data[module.weight.data.flatten(1).norm(dim=1) <= tolerance] = 0
        elif isinstance(module, _BatchNorm) and module.affine:
            module.weight.data[module.weight.data.abs() <= tolerance] = 0
    left: dict[str, list[int]] = {}
    # Each round may silence or orphan further units; it ends, since every round but the last removes one.
    kept = None
    while kept is None:
        found = groups(small, probe)
        kept = _remove_once(small, probe, found, left)
    _close(small, model)
    # What lost nothing and keeps nothing that is zero: a report without them would leave that to guess.
    others = [(group, w) for group in found for w in group.writers if w.name not in left and group.name not in kept and not group.obstacle]
    whole = {w.name: (group.size, constant_units.nearest_to_zero(w)) for group, w in others}
    sizes = {name: len(model.get_submodule(name).weight) for name in left}  # type: ignore[arg-type]
    gone = {name: tuple(sorted(set(range(sizes[name])) - set(rest))) for name, rest in left.items()}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    with torch.no_grad():
        full, less = _opened(model), _opened(small)
        samples = [x.double() if x.is_floating_point() else x for x in (example_input, probe)]
        difference = max(float((full(x) - less(x)).abs().max()) for x in samples)
    return small, Report({name: (sizes[name], len(rest)) for name, rest in left.items()}, gone, kept, (before, after), difference, whole)


def cut(model: M, example_input: Tensor, units: Mapping[str, Sequence[int]]) -> M:
    """Makes a copy of ``model`` without the given units, zero or not; outputs change, and nothing is moved into biases.

    It gives a network of the smaller shape from other weights, such as fresh ones. units: as in `Report.removed`.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        StudyError: a layer that no group of units begins with.
    """
    small = _opened(model)
    found = {writer.name: group for group in groups(small, _probe(example_input)) for writer in group.writers if not group.obstacle}
    if unknown := sorted(set(units) - set(found)):
        raise StudyError(f"units of {', '.join(unknown)} cannot be removed; layers with units to remove: {', '.join(sorted(found))}.")
    for group, gone in {id(found[name]): (found[name], gone) for name, gone in units.items()}.values():
        group.remove(sorted(gone))
    _close(small, model)
    return small


def targets(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Lists the parameters on which a group lasso makes units removable: name -> how many of its numbers one unit has.

    For a layer that nothing normalises this is its weight. For a layer before a BatchNorm it is that norm's gain and shift. There the
    length of a filter has no meaning, since the BatchNorm divides it out, and a gain of zero silences the channel (Liu et al.,
    Learning efficient convolutional networks through network slimming, 2017). With the shift zero as well its constant is zero, so
    that it can go before a zero padding too. Raises MissingExtraError without torch-pruning.
    """
    opened = _opened(model)
    names = {module: name for name, module in opened.named_modules()}
    found: dict[str, int] = {}
    for writer in (writer for group in groups(opened, _probe(example_input)) if not group.obstacle for writer in group.writers):
        if not writer.norms:
            found[f"{writer.name}.weight"] = writer.layer.weight[0].numel()
        for norm in writer.norms:
            found |= {f"{names[norm]}.{name}": 1 for name, _ in norm.named_parameters()}
    return found


# ------------------------------------------------------------------------------------------------------------ one round


def _remove_once(model: nn.Module, probe: Tensor, found: list[Group], left: dict[str, list[int]]) -> dict[str, str] | None:
    """Removes what can be removed from every group. None if anything was; else what is zero and stays, by layer, and why."""
    silent = [group.name for group in found if all(constant_units.is_zero(group, unit) for unit in range(group.size))]
    with torch.no_grad():
        if silent and (out := model(probe)).eq(out[:1]).all():
            raise StudyError(
                f"every unit of {', '.join(silent)} is zero, so the output no longer depends on the input and nothing can be removed: "
                "train with a smaller strength, or give a smaller tolerance."
            )
    values = constant_units.inputs(model, probe, [reader.layer for group in found for reader in group.readers])
    kept: dict[str, str] = {}
    goes = [(group, units) for group in found if (units := _removable(group, values, kept))]
    for group, units in goes:
        for reader in group.readers:
            constant_units.move(reader, units, values[reader.layer])
    for group, units in goes:
        gone = set(units)
        for writer in group.writers:    # which units of the full model are left
            before = left.get(writer.name, list(range(group.size)))
            left[writer.name] = [unit for place, unit in enumerate(before) if place not in gone]
        group.remove(units)
    return None if goes else kept


def _removable(group: Group, values: dict[Layer, Tensor], kept: dict[str, str]) -> list[int]:
    """The units that go. Of those that are zero and stay, ``kept`` gets their number and why."""
    zero = [unit for unit in range(group.size) if constant_units.is_zero(group, unit)]
    whys = {unit: group.obstacle or constant_units.stays_because(group, unit, values) for unit in zero}
    unread = [] if group.obstacle else [unit for unit in range(group.size) if constant_units.is_unread(group, unit)]
    goes = sorted({*unread, *(unit for unit, why in whys.items() if why is None)})
    stay = [why for why in whys.values() if why is not None]
    if len(goes) == group.size:
        goes, stay = goes[1:], ["a layer needs one"]
    if stay:
        kept[group.name] = f"{len(stay)} zero unit{'s stay' if len(stay) > 1 else ' stays'}: {stay[0]}"
    return goes


# --------------------------------------------------------------------------------------------------- before and after


def _opened(model: M) -> M:
    """A float64 copy in evaluation mode whose every parameter has a gradient, as tracing needs it."""
    opened = copy.deepcopy(model).double().eval()
    for parameter in opened.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    return opened


def _close(small: nn.Module, model: nn.Module) -> None:
    """Gives back what the full model has: dtypes, ``requires_grad``, each module's training mode."""
    full = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        like = full.get(name, full.get(name.removesuffix("bias") + "weight"))  # a bias may be new
        if like is not None:
            tensor.data = tensor.data.to(like.dtype)
            tensor.requires_grad_(like.requires_grad)
            tensor.grad = None
    modes = dict(model.named_modules())
    for name, module in small.named_modules():
        module.training = modes[name].training


def _probe(example: Tensor) -> Tensor:
    """Noise in the example's shape: what is constant on it is constant. Indices stay the example's own."""
    if not isinstance(example, Tensor) or example.ndim < 2:
        given = f"a tensor of shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"a {type(example).__name__}"
        raise StudyError(f"example_input is {given}, but it must be one batch as the model takes it, (n, …).")
    if not example.is_floating_point():
        return example
    # A fixed seed: the same model is always shrunk alike.
    noise = torch.randn((_PROBES, *example.shape[1:]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return noise.to(example.device)
