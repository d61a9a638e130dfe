"""Removing units that are exactly zero: the smaller model computes what the full one computed, and the difference is measured."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.errors import StudyError, a_kind_of
from normwise.policy.schedules import is_number
from normwise.prune import constant_units
from normwise.prune.constant_units import zero_rows
from normwise.prune.dependency_groups import LAYERS, Group, groups
from normwise.prune.outputs import check, difference, outputs, said, same
from normwise.prune.report import Report, told

M = TypeVar("M", bound=nn.Module)

_PROBES = 16


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
    training mode are kept, gradients are not. A constant is rounded to the dtype of the bias or running mean that it moves into, so
    in bfloat16 and float16 removal is only as exact as these are; `Report.difference` measures it.

    Layers that are called twice, tied, grouped or parametrized keep their units, and so do units behind anything that mixes channels
    (LayerNorm, attention, concatenation), and units without which forward fails because a buffer, the input or a number in the code has
    their size. torch-pruning does the surgery (Fang et al., DepGraph: Towards any structural pruning, 2023) and sees what autograd sees.
    So the outputs (a tensor, or tuples, lists, dicts or dataclasses with tensors) are compared in float64, before anything is rounded,
    over the example input and 16 samples of noise; what differs by more than rounding is an error.

    Args:
        example_input: (n, …), as the model takes it. Its shape matters, its values do not, since noise takes their place; but outputs
            are compared on it too. Noise does not take the place of integers: give two inputs or more that differ, some with padding if
            there is a mask.
        tolerance: rows and gains of at most this L2 norm are first set to zero. The default 0 takes only exact zeros, which is what
            `normwise.group_lasso` leaves.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        StudyError: the model does not take the example input, or none of its outputs is finite or has a gradient; every unit of a layer
            is zero and the output no longer depends on the input (beside a shortcut such a layer keeps one unit); the smaller model
            gives other outputs, since an argmax, a detached mean or the like reads the units, which autograd does not show, or since
            the model is random in evaluation mode too.
    """
    if not (is_number(tolerance) and math.isfinite(tolerance) and tolerance >= 0):
        raise StudyError(f"tolerance is {tolerance!r}, but it is the largest L2 norm that counts as zero: a finite number >= 0.")
    full = _opened(model)
    batches = _batches(full, example_input)
    _check_varies(batches[1])
    held: dict[str, str] = {}
    done = None
    while done is None:    # once more, from the full model, for each group of units that turns out to be needed
        small = _opened(model)
        _set_to_zero(small, tolerance)
        expected = outputs(small, batches)
        done = _remove_all(small, batches[1], held)
    sizes = {name: len(model.get_submodule(name).weight) for name in done.left}  # type: ignore[arg-type]
    gone = {name: tuple(sorted(set(range(sizes[name])) - set(rest))) for name, rest in done.left.items()}
    if not same(expected, found := _run(small, batches, gone)):
        raise StudyError(_why_unlike(full, batches, gone, difference(expected, found)))
    _close(small, model)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    apart = difference(outputs(full, batches), outputs(_opened(small), batches))
    units = {name: (sizes[name], len(rest)) for name, rest in done.left.items()}
    return small, Report(units, gone, done.kept, (before, after), apart, done.whole)


def cut(model: M, example_input: Tensor, units: Mapping[str, Sequence[int]]) -> M:
    """Makes a copy of ``model`` without the given units, zero or not; outputs change, and nothing is moved into biases.

    It gives a network of the smaller shape from other weights, such as fresh ones.

    Args:
        example_input: (n, …), as the model takes it; its shape matters, its values do not.
        units: by layer, the indices of the units that go, as in `Report.removed`. Layers that a shortcut joins lose the same units, so
            name one of them, or give all of them the same.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        StudyError: the model does not take the example input; no units of a layer can be removed; its indices are not different whole
            numbers within the layer, or are all that it has; joined layers are given different ones; forward fails without the units.
    """
    small = _opened(model)
    batches = _batches(small, example_input)
    found = {writer.name: group for group in groups(small, batches[1]) for writer in group.writers if not group.obstacle}
    asked = _asked(units, found)
    for group, gone in {id(found[name]): (found[name], gone) for name, gone in asked.items() if gone}.values():
        group.remove(list(gone))
    _run(small, batches, asked)
    _close(small, model)
    return small


def targets(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Lists the parameters on which a group lasso makes units removable: name -> how many of its numbers one unit has.

    For a layer that nothing normalises this is its weight. For a layer before a BatchNorm it is that norm's gain and shift. There the
    length of a filter has no meaning, since the BatchNorm divides it out, and a gain of zero silences the channel (Liu et al.,
    Learning efficient convolutional networks through network slimming, 2017). With the shift zero as well its constant is zero, so
    that it can go before a zero padding too.

    Args:
        example_input: (n, …), as the model takes it; its shape matters, its values do not.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        StudyError: the model does not take the example input, or none of its outputs is finite or has a gradient.
    """
    opened = _opened(model)
    batches = _batches(opened, example_input)
    names = {module: name for name, module in opened.named_modules()}
    found: dict[str, int] = {}
    for writer in (writer for group in groups(opened, batches[1]) if not group.obstacle for writer in group.writers):
        if not writer.norms:
            found[f"{writer.name}.weight"] = writer.layer.weight[0].numel()
        for norm in writer.norms:
            found |= {f"{names[norm]}.{name}": 1 for name, _ in norm.named_parameters()}
    return found


# ------------------------------------------------------------------------------------------------------- round by round


class _Removed(NamedTuple):
    """By layer, which units of the full model are left; the rest as in `Report`."""

    left: dict[str, list[int]]
    kept: dict[str, str]
    whole: dict[str, tuple[int, float]]


def _set_to_zero(model: nn.Module, tolerance: float) -> None:
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.weight.data[module.weight.data.flatten(1).norm(dim=1) <= tolerance] = 0
        elif isinstance(module, _BatchNorm) and module.affine:
            module.weight.data[module.weight.data.abs() <= tolerance] = 0


def _remove_all(model: nn.Module, probe: Tensor, held: dict[str, str]) -> _Removed | None:
    """Removes what can be removed from every group.

    None where forward fails without a group's units: ``held`` then has the group's name and why, and ``model`` is of no more use.
    """
    left: dict[str, list[int]] = {}
    while True:    # each round may silence or orphan further units; it ends, since every round but the last removes one
        found = [replace(group, obstacle=group.obstacle or held.get(group.name)) for group in groups(model, probe)]
        _check_reads_input(model, probe, found)
        values = constant_units.inputs(model, probe, [reader.layer for group in found for reader in group.readers])
        fates = {group.name: constant_units.fates(group, values) for group in found}
        goes = [(group, units) for group in found if (units := [unit for unit, why in fates[group.name].items() if why is None])]
        if not goes:
            kept, whole = told(model, found, fates)
            return _Removed(left, kept, {name: of for name, of in whole.items() if name not in left})
        for reader, units in [(reader, units) for group, units in goes for reader in group.readers]:
            constant_units.move(reader, units, values[reader.layer])
        failed = next(((group, why) for group, units in goes if (why := _fails_without(model, probe, group, units))), None)
        if failed is not None:
            held[failed[0].name] = failed[1]
            return None
        for name, size, units in [(writer.name, group.size, units) for group, units in goes for writer in group.writers]:
            before = left.get(name, list(range(size)))
            left[name] = [unit for place, unit in enumerate(before) if place not in units]


def _fails_without(model: nn.Module, probe: Tensor, group: Group, units: list[int]) -> str | None:
    """Removes the units. Why they are needed: autograd does not show buffers, the input, and numbers in the code."""
    try:
        group.remove(units)
        outputs(model, [probe])
    except Exception as error:
        return f"forward fails once it is gone; a buffer, the input or a number in the code probably has its size ({said(error)})"
    return None


# ------------------------------------------------------------------------------------------------------- what is refused


def _check_varies(probe: Tensor) -> None:
    if not probe.is_floating_point() and (probe == probe[:1]).all():
        raise StudyError(
            f"example_input is of {probe.dtype}, so noise cannot take its place, and all of its inputs ({len(probe)}) are alike, so what "
            "is constant cannot be told from what varies: give a batch of two inputs or more that differ."
        )


def _check_reads_input(model: nn.Module, probe: Tensor, found: list[Group]) -> None:
    silent = [group.name for group in found if all(zero_rows(writer).all() for writer in group.writers)]
    other = probe.roll(1, 0)
    if probe.is_floating_point():
        other = -other    # a mean over the batch does not see its order
    if silent and difference(outputs(model, [probe]), outputs(model, [other])) == 0:
        raise StudyError(
            f"every unit of {', '.join(silent)} is zero, so the output no longer depends on the input and nothing can be removed: "
            "train with a smaller strength, or give a smaller tolerance."
        )


def _run(small: nn.Module, batches: Sequence[Tensor], gone: Mapping[str, Sequence[int]]) -> list[Tensor]:
    try:
        return outputs(small, batches)
    except Exception as error:
        raise StudyError(
            f"without {_units(gone)} the model's forward fails ({said(error)}). A buffer, the input or a number in the code probably has "
            "the layer's size, which autograd does not show; leave these units in."
        ) from error


def _why_unlike(full: nn.Module, batches: Sequence[Tensor], gone: Mapping[str, Sequence[int]], apart: float) -> str:
    if not same(outputs(full, batches, seed=0), outputs(full, batches, seed=1)):
        return (
            "the model gives other outputs each time it is called, though in evaluation mode, so a smaller one cannot be compared with it: "
            "turn off what draws random numbers (F.dropout needs training=self.training) or keeps a state from call to call."
        )
    return (
        f"without {_units(gone)} the model gives other outputs: they differ by {apart:.1e}, which is more than rounding. The units are "
        "probably read where autograd does not show it: by an argmax, through a detach, or as a count of channels. Where gradients pass, "
        "they stay; otherwise keep the full model."
    )


def _units(gone: Mapping[str, Sequence[int]]) -> str:
    """``units 0, 3 of conv1 and 5 of conv2``."""
    kind = "units" if sum(map(len, gone.values())) > 1 else "unit"
    return f"{kind} " + " and ".join(f"{', '.join(map(str, units))} of {name}" for name, units in gone.items())


def _asked(units: Mapping[str, Sequence[int]], found: Mapping[str, Group]) -> dict[str, list[int]]:
    """``units``, in order. StudyError where they are not what `cut` can remove."""
    if not isinstance(units, Mapping):
        raise StudyError(f"units is {a_kind_of(units)}, but it must be a dict of lists, such as {{'conv1': [0, 3]}}.")
    if unknown := sorted(map(str, set(units) - set(found))):
        there = ", ".join(sorted(found)) or "none"
        raise StudyError(f"units of {', '.join(unknown)} cannot be removed; layers with units to remove: {there}.")
    asked = {name: _indices(name, given, found[name].size) for name, given in units.items()}
    for name, other in itertools.combinations(asked, 2):
        if found[name] is found[other] and asked[name] != asked[other]:
            raise StudyError(
                f"{name} and {other} are joined and lose the same units, but {asked[name]} and {asked[other]} are given: name one of the "
                "two, or give both the same."
            )
    return asked


def _indices(name: str, given: object, size: int) -> list[int]:
    units = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    listed = list(units) if isinstance(units, Collection) else [None]
    whole = [int(unit) for unit in listed if isinstance(unit, Integral) and is_number(unit) and 0 <= int(unit) < size]
    if not len(set(whole)) == len(listed) < size:
        raise StudyError(
            f"the units of {name} are given as {given!r:.200}, but they must be a list of whole numbers from 0 to {size - 1}, none of them "
            "twice, and not all: a layer needs one."
        )
    return sorted(whole)


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


def _batches(opened: nn.Module, example: Tensor) -> tuple[Tensor, Tensor]:
    """The example in float64, and noise in its shape: what is constant on it is constant. Integers stay the example's own.

    StudyError where it is no batch, or the model does not take it.
    """
    if not isinstance(example, Tensor) or example.ndim < 2 or not example.numel():
        given = f"a tensor of shape {tuple(example.shape)}" if isinstance(example, Tensor) else a_kind_of(example)
        raise StudyError(f"example_input is {given}, but it must be one batch as the model takes it, (n, …), and not empty.")
    batches = (example, example)
    if example.is_floating_point():
        # A fixed seed: the same model is always shrunk alike.
        noise = torch.randn((_PROBES, *example.shape[1:]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        batches = (example.double(), noise.to(example.device))
    check(opened, batches)
    return batches
