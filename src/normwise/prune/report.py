"""What `shrink` reports: what went, what stayed and why, and what that changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from normwise.prune.constant_units import nearest_to_zero, zero_rows
from normwise.prune.dependency_groups import LAYERS, Group, Writer
from normwise.reports import Loggable

_EXACT = 1e-6


@dataclass(frozen=True)
class Report(Loggable):
    """What `shrink` did.

    Attributes:
        units: by layer that lost any, how many it had and has.
        removed: by the same layers, which ones, as indices in the full model; layers joined by a shortcut have the same.
        kept: by layer, how many units that are zero in it stayed, and why.
        whole: by layer without a zero unit, how many units it has and how far the nearest is from zero: the L2 norm of its weights, or
            its BatchNorm's gain.
        parameters: before and after.
        difference: the largest difference of any entry of the outputs, in evaluation and float64, over the example input and 16 samples
            of noise; inf where only one of the two entries is a number.
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
        """Whether `difference` is under 1e-6, whatever the outputs' size.

        If not, ``tolerance`` took units that were not quite zero, or a constant was rounded when it moved into a bias or running mean:
        bfloat16 rounds a bias of 1 by up to 0.004, float16 by up to 0.0005, and float32 one of 100 by up to 4e-6.
        """
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


def told(
    model: nn.Module, found: Sequence[Group], fates: Mapping[str, Mapping[int, str | None]]
) -> tuple[dict[str, str], dict[str, tuple[int, float]]]:
    """``kept`` and ``whole`` of `Report`, by layer; ``found``: what is left when nothing more goes."""
    kept: dict[str, str] = {}
    whole: dict[str, tuple[int, float]] = {}
    zeros = {writer.name: zero_rows(writer).tolist() for group in found for writer in group.writers}
    for writer, its in [(writer, group) for group in found for writer in group.writers]:
        if why := _why(its, zeros, writer.name, fates[its.name]):
            kept[writer.name] = why
        elif not its.obstacle:
            whole[writer.name] = (its.size, nearest_to_zero(writer))
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) and name not in zeros and (n := int(zero_rows(Writer(name, layer, ())).sum())):
            kept[name] = _stay(n, "zero", "autograd does not show who reads the layer")
    return kept, whole


def _why(group: Group, zeros: Mapping[str, Sequence[bool]], name: str, fates: Mapping[int, str | None]) -> str:
    """How many units of a layer stay though they are zero in it, or unread, and why; empty without any."""
    stay: Counter[tuple[str, str]] = Counter()
    for unit, zero in enumerate(zeros[name]):
        if zero or unit in fates:
            stay["zero" if zero else "unread", group.obstacle or fates.get(unit) or _alive(group, zeros, unit)] += 1
    return "; ".join(_stay(n, kind, why) for (kind, why), n in stay.items())


def _alive(group: Group, zeros: Mapping[str, Sequence[bool]], unit: int) -> str:
    other = next(writer.name for writer in group.writers if not zeros[writer.name][unit])
    return f"{other} writes the same channel, and is not zero there"


def _stay(n: int, kind: str, why: str) -> str:
    return f"{n} {kind} {'units stay' if n > 1 else 'unit stays'}: {why}"
