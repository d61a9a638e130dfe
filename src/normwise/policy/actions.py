"""Actions: what a rule of each may say, and what it does to a batch of blocks, as pure functions of (norm, blocks, radius).

The rules for zero blocks and for blocks that are not finite stand in ``norms.base.radial_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normwise.norms import Norm, Radius, Set
from normwise.norms.base import column, radial_factor
from normwise.norms.linalg.checks import peak
from normwise.norms.reduce import may_branch, up
from normwise.parameters.layouts import PER


@dataclass(frozen=True)
class Action:
    """What a rule of this action may say. Which class runs it, ``engine.rules`` says."""

    targets: tuple[str, ...]
    """What it has a meaning for, of "weight", "grad" and "update"; the first is its default."""
    needs: str | None
    """The one number that it cannot do without: "radius", "strength" or none."""
    uses: frozenset[str]
    """The fields that it reads, beside those that every action reads. Any other given one is an error, not ignored."""
    phase: str | None = None
    """When in a step it acts, one of `PHASES`; None for the phase of what it acts on."""
    blocks: tuple[str, ...] = PER
    """The kinds of block that it has a meaning on; it acts on the first of them if it does not read ``per``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are something else than usual where a rule leaves them out."""
    measures: str = ""
    """What it bounds of a block, if that is no norm."""
    bounds: str = ""
    """What its radius is a bound on, if that is nothing that a weight has when attached."""
    power_2: str = ""
    """What ``power=2`` does, if that is not half of the squared norm."""


ACTIONS: dict[str, Action] = {}
"""Every action by its name in a rule."""


def register_action(name: str, targets: str, needs: str | None, uses: str, phase: str | None = None, **more: Any) -> None:
    """Makes an action known by its name; ``targets`` and ``uses`` are lists of words, ``more`` the other fields of `Action`."""
    ACTIONS[name] = Action(tuple(targets.split()), needs, frozenset(uses.split()), phase, **more)


register_action("penalty", "weight", "strength", "strength norm per heads power center", "penalty")
register_action("weight_decay", "weight", "strength", "strength center rounding", "decay")
register_action("prox", "weight", "strength", "strength norm per heads power center rounding", "prox")
register_action("clip_norm", "weight grad update", "radius", "radius norm per heads min_radius rate floor center")
register_action("project", "weight grad update", "radius", "radius norm per heads floor center tolerance")
register_action("normalize", "weight grad update", "radius", "radius norm per heads rate floor center")
register_action("lmo", "grad update", None, "norm per heads")
register_action(
    "cpr", "weight", "radius", "radius strength per heads floor", "cpr", defaults={"strength": 1.0}, measures="mean square",
    blocks=tuple(per for per in PER if per not in ("global", "element")),
)  # fmt: skip
register_action(
    "qk_clip", "weight", "radius", "radius heads power", "qk_clip", blocks=("head",), bounds="attention logits, such as 100",
    power_2="on queries alone",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- on a batch of blocks

LARGE = 1e10    # entries from here on are multiplied at unit scale: three of them leave fp32's range


def scales(action: str, norm: Norm | Set) -> bool:
    """Whether the action only scales a block, so that it needs its norm and never its entries; so does projection onto a round ball."""
    return action in ("clip_norm", "normalize") or (action == "project" and isinstance(norm, Norm) and norm.radial)


def factor(action: str, value: Tensor, radius: Radius, min_radius: Radius | None = None, rate: float = 1.0) -> Tensor:
    """What each block of norm ``value`` (b,) is multiplied by, ``(b,)``; exactly 1 for a block that stays as it is.

    ``normalize`` brings it to the radius, ``clip_norm`` clamps it into [min_radius, radius]. Of the way there the share ``rate`` is gone
    (Keras's MinMaxNorm: rate·clip(value) + (1 − rate)·value).
    """
    if action == "clip_norm" and rate == 1 and min_radius is None and not isinstance(radius, Tensor):
        return radial_factor(value, value.clamp(max=radius))
    limit = torch.as_tensor(radius, dtype=value.dtype, device=value.device).expand_as(value)
    wanted = limit if action == "normalize" else torch.minimum(value, limit)
    if min_radius is not None:
        wanted = wanted.clamp(min=min_radius)
    return radial_factor(value, wanted if rate == 1 else torch.lerp(value, wanted, rate))


def steepest(norm: Norm, x: Tensor) -> Tensor:
    """−lmo(x, 1): the unit step that increases ⟨x, ·⟩ fastest under the norm."""
    return -norm.lmo(x, 1.0)


def prox(norm: Norm, x: Tensor, step: Radius, power: int) -> Tensor:
    """argmin ½‖y − x‖₂² + step·‖y‖ for ``power=1``; of ½‖y‖₂², which is x / (1 + step), for L2 and ``power=2``."""
    if power == 1:
        return norm.prox(x, step)
    return (up(x) / (1 + column(step, x))).to(x.dtype)


def penalty_gradient(norm: Norm, x: Tensor, power: int) -> Tensor:
    """A (sub)gradient of ‖x‖ (``power=1``) or of ½‖x‖² (``power=2``), in the compute dtype."""
    work = up(x)
    if power == 2 and norm.p == 2:
        return work
    direction = norm.subgradient(work)
    if power == 1:
        return direction
    return direction * column(norm.value(work).clamp(max=torch.finfo(work.dtype).max), work)    # 0 times infinity is no number


def penalty_value(value: Tensor, power: int) -> Tensor:
    """Σ over the blocks' norms ``value`` (b,) of ‖x‖ (``power=1``) or ½‖x‖² (``power=2``), a scalar."""
    return value.sum() if power == 1 else value.square().sum() / 2


def orthogonality_gradient(x: Tensor) -> Tensor:
    """The gradient (xxᵀ − I)x of ¼‖xxᵀ − I‖_F², on the shorter side of each matrix ``(b, m, n)``; in the compute dtype."""
    work = up(x)
    if x.numel() and may_branch(x) and not float(work.abs().amax()) < LARGE:    # a product that overflows is met by one of the other sign
        size = peak(work)
        unit = work / size
        excess = _gram_excess(unit, 1 / size / size)
        return (excess @ unit if x.shape[1] <= x.shape[2] else unit @ excess) * size * size * size
    return _gram_excess(work) @ work if x.shape[1] <= x.shape[2] else work @ _gram_excess(work)


def orthogonality_value(x: Tensor) -> Tensor:
    """¼‖xxᵀ − I‖_F² of each block, ``(b,)``."""
    return _gram_excess(up(x)).square().sum((1, 2)) / 4


def _gram_excess(x: Tensor, of: Tensor | float = 1.0) -> Tensor:
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    return gram - of * torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
