"""One pack of parameters through the columns: act, rows, scale, apply, hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import Pack
from normwise.engine.sharded.norms import simple
from normwise.engine.sharded.prefetch import Request
from normwise.low_precision import narrow_, widened
from normwise.norms import L2, Norm
from normwise.norms.base import clip_factor, radial_factor
from normwise.norms.linalg import polar, ridge_inverse
from normwise.optim.columns import apart, norm_of, polar_floor, shape_scale
from normwise.optim.directions import DIRECTIONS
from normwise.optim.plan import Alike, Part, Plan
from normwise.policy import actions

Group = Mapping[str, Any]
States = Sequence[dict[str, Any]]
Update = Callable[[Pack, list[Tensor]], None]
"""What a policy's rules on updates do to the finished updates of a pack, in place."""
RELATIVE_FLOOR = 1e-3
"""The least root mean square that a relative step takes a weight to have, so that zero weights can leave zero (Adafactor, 2018)."""


def step_group(plan: Plan, group: Group, on_update: Update | None = None) -> Iterator[Stepping]:
    """One optimizer step of a group, pack by pack: what is to be taken through ``STAGES``. Gradients are read, never written."""
    if plan.alike and on_update is None and not plan.rounds and _is_plain_adamw(group):
        for alike in plan.alike:
            _fused_adamw(alike, group)
        return
    for part in plan.parts:
        yield Stepping(part, group, on_update)


def _is_plain_adamw(group: Group) -> bool:
    """The row of AdamW is torch's fused kernel: one pass over all it touches, where separate calls need five. The compiler fuses itself."""
    if torch.compiler.is_compiling():
        return False
    plain = (group["direction"], group["act"], group["scale"], group["hold"]) == ("adam", "none", "absolute", "none")
    simple = plain and not apart(group) and group["radius"] > 0 and not group["row_beta"] and not group["velocity"]
    return simple and (group["decay"] in ("none", "weight") or not group["weight_decay"])


def _fused_adamw(alike: Alike, group: Group) -> None:
    (params, grads, firsts, seconds), copies = alike.tensors()
    steps, radius = [s["step"] for s in alike.states], group["radius"]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params, grads, firsts, seconds, [], steps, lr=group["lr"] * radius, beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=group["weight_decay"] / radius if group["decay"] == "weight" else 0.0, eps=group["eps"], amsgrad=False,
        maximize=group["maximize"],
    )  # fmt: skip
    for original, copy in copies:
        original.copy_(copy)


STAGES = ("direct", "turn", "divide", "move", "hold")
"""A new one begins where norms of blocks are needed that were not known before."""


class Stepping:
    """One pack on its way through the columns, stage by stage."""

    def __init__(self, planned: Part, group: Group, on_update: Update | None = None) -> None:
        self.part, self.radii, self.group, self.on_update = planned.pack, planned.radii, group, on_update
        self.states: States = self.part.local_states(planned.states)

    def take(self, stage: str) -> None:
        """One of ``STAGES``."""
        getattr(self, stage)()

    def direct(self) -> None:
        """Decay of gradients, and the direction."""
        part, group = self.part, self.group
        self.params = part.local(part.params)
        grads = _readable(part.local([p.grad for p in part.params if p.grad is not None]), self.params)
        self.grads = list(torch._foreach_neg(grads)) if group["maximize"] else grads
        decayed = _with_decay(self.grads, self.params, group, "gradient")
        update = list(DIRECTIONS[group["direction"]](decayed, self.states, group))
        self.update = _with_decay(update, self.params, group, "direction")

    def turn(self) -> None:
        """Act: the direction under the norm."""
        self.update = _act(self.part, self.update, self.group)

    def divide(self) -> None:
        """Units by their running size."""
        if self.group["row_beta"]:
            self.update = _divide_rows(self.part, self.update, self.states, self.group)
        self.weights = widened(self.params, self.states)

    def move(self) -> None:
        """Scale, decay and step."""
        part, group = self.part, self.group
        lengths = {of: part.measure(L2(), tensors) for of, tensors in self._of_scale().items()}
        factor = _scale(part, lengths, self.states, group, self.radii)
        self.before = part.measure(L2(), self.weights) if group["hold"] == "radial_brake" else None
        _apply(part, self.weights, self.update, factor, self.states, group, self.on_update)

    def hold(self) -> None:
        """What the weights are held to; then they are rounded."""
        _hold(self.part, self.weights, self.states, self.group, self.before)
        narrow_(self.params, self.weights, self.states, self.part.noise_numbers(self.states))

    def _of_scale(self) -> dict[str, list[Tensor]]:
        """What the scale measures, by name."""
        known = {"weights": self.weights, "update": self.update, "grads": self.grads}
        return {of: known[of] for of in MEASURED.get(self.group["scale"], ())}

    def asked(self, stage: str) -> list[Request]:
        """What the stage will measure, in its order."""
        part, group, held = self.part, self.group, self.group["hold"]
        if stage == "turn":
            return [(part, norm, self.update) for norm in _measured_by_act(part, group)]
        if stage == "divide" and group["row_beta"]:
            return part.requests_of_rows(self.update)
        if stage == "move":
            before = [self.weights] if held == "radial_brake" else []
            return [(part, L2(), tensors) for tensors in (*self._of_scale().values(), *before)]
        if stage == "hold" and held in ("sphere", "ball", "radial_brake"):
            return [(part, L2(), self.weights)]
        if stage == "hold" and held == "row_floor":
            return part.requests_of_rows(self.weights)
        return []


def _measured_by_act(part: Pack, group: Group) -> list[Norm]:
    """The norm that an act divides by; none where it needs no norm, or whole blocks."""
    norm = norm_of(group)
    base = simple(norm, part.block_shape)
    if base is None or group["act"] not in ("normalize", "lmo"):
        return []
    return [norm] if group["act"] == "normalize" else [L2()] if isinstance(base[0], L2) else []


MEASURED = {
    "normuon": ("update",), "init": ("update",), "relative": ("weights", "update"), "lamb": ("weights", "update"),
    "lars": ("weights", "grads"),
}  # fmt: skip
"""The norms that a scale needs."""


def _readable(grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Gradients in the weights' dtype, which torch lets them differ from, and without lazy negation, which foreach does not take."""
    pairs = zip(grads, params, strict=True)
    return [g if g.dtype == p.dtype and not g.is_neg() else g.to(p.dtype).resolve_neg() for g, p in pairs]


def _with_decay(tensors: list[Tensor], params: list[Tensor], group: Group, where: str) -> list[Tensor]:
    if group["decay"] != where or not group["weight_decay"]:
        return list(tensors)
    return list(torch._foreach_add(tensors, params, alpha=group["weight_decay"]))


# ---------------------------------------------------------------------------------------------------------- act and scale


def _act(part: Pack, update: list[Tensor], group: Group) -> list[Tensor]:
    if group["act"] == "none":
        return update
    if group["act"] == "ridge":
        blocks = part.gather(update)
        return part.split(ridge_inverse(blocks, float(group["damping"])))
    norm = norm_of(group)
    if group["act"] == "normalize":
        return part.normalized(norm, update)
    return part.steepest(norm, update, lambda blocks: steepest(norm, blocks, group))


def steepest(norm: Norm, blocks: Tensor, group: Group) -> Tensor:
    """−lmo(blocks, 1); under a spectral norm the polar factor by the group's iteration, elsewhere exact."""
    if not norm.polar:
        return actions.steepest(norm, blocks)
    factor, scale = polar(blocks, group["polar"], floor=polar_floor(group)), norm.unscaled(tuple(blocks.shape[1:]))[1]
    return factor if scale == 1 else factor / scale


def _divide_rows(part: Pack, update: list[Tensor], states: States, group: Group) -> list[Tensor]:
    """Each unit over the root of the running mean of its squares (NorMuon, Li et al., 2025)."""
    squares, running = part.row_squares(update), [s["row_squares"] for s in states]
    torch._foreach_lerp_(running, list(squares.to(running[0]).view(len(states), part.view.count, -1).unbind()), 1 - group["row_beta"])
    return part.over_rows(update, torch.stack(running).view_as(squares).sqrt_() + group["eps"])


def _scale(part: Pack, lengths: Mapping[str, Tensor], states: States, group: Group, radii: Tensor | None) -> float | Tensor:
    """What the update is multiplied by before the learning rate: a number, or one a block ``(members · count,)``.

    lengths: the L2 norms of the blocks of what ``MEASURED`` says. radii: of each block, where they are not all one.
    """
    scale, shape = group["scale"], part.view.block_shape
    radius = float(group["radius"]) if radii is None else radii
    number = radius * (shape_scale(scale, shape[0], shape[-1], part.view.kernel) if len(shape) == 2 else 1.0)
    if scale == "normuon":
        return radial_factor(lengths["update"], number)
    if scale == "init":
        return radial_factor(lengths["update"], _radii(part, states)) * number
    if scale in ("relative", "lamb", "lars"):
        return _trust(part, lengths, group) * number
    return number


def _trust(part: Pack, lengths: Mapping[str, Tensor], group: Group) -> Tensor:
    weight = lengths["weights"]
    if group["scale"] == "lars":
        return _lars(weight, lengths["grads"], group)
    length = lengths["update"]
    if group["scale"] == "relative":
        least = RELATIVE_FLOOR * math.prod(part.view.block_shape) ** 0.5
        return torch.where(length > 0, weight.clamp(min=least) / length, 0.0)
    return torch.where((weight > 0) & (length > 0), weight / length, 1.0)


def _lars(weight: Tensor, slope: Tensor, group: Group) -> Tensor:
    ratio = group["trust"] * weight / (slope + group["weight_decay"] * weight)
    return torch.where((weight > 0) & (slope > 0), ratio, 1.0)


def _radii(part: Pack, states: States) -> Tensor:
    return torch.cat([s["radius"] for s in states]) if len(states) > 1 else states[0]["radius"]


# ---------------------------------------------------------------------------------------------------------- apply and hold


def _apply(
    part: Pack, weights: list[Tensor], update: list[Tensor], factor: float | Tensor, states: States, group: Group, on_update: Update | None
) -> None:
    """Decay and step; ``weights`` are the parameters, or what stands for them until they are rounded."""
    lr = float(group["lr"])
    if isinstance(factor, Tensor):
        update = _scaled(part, update, factor)
        factor = 1.0
    if group["velocity"]:
        update, factor = _accelerate(update, lr * factor, states, group), 1.0
        lr = 1.0
    _decay(weights, update, group)
    if on_update is None:
        torch._foreach_add_(weights, [u.to(w.dtype) for u, w in zip(update, weights, strict=True)], alpha=-lr * factor)
    else:
        change: list[Tensor] = list(torch._foreach_mul([u.to(w.dtype) for u, w in zip(update, weights, strict=True)], -lr * factor))
        on_update(part, change)
        torch._foreach_add_(weights, change)


def _scaled(part: Pack, update: list[Tensor], factor: Tensor) -> list[Tensor]:
    copies = [u.clone() for u in update]
    part.scale_(copies, factor)
    return copies


def _accelerate(update: list[Tensor], lr: float, states: States, group: Group) -> list[Tensor]:
    """v ← μ·v + η·u: momentum on the scaled step, so that a changed learning rate does not rescale what is under way (LARS)."""
    velocities = [s["velocity"] for s in states]
    torch._foreach_mul_(velocities, group["momentum"] if group["velocity"] is True else group["velocity"])
    torch._foreach_add_(velocities, update, alpha=lr)
    return velocities


def _decay(weights: list[Tensor], update: list[Tensor], group: Group) -> None:
    share = float(group["lr"]) * group["weight_decay"]
    if group["hold"] == "frank_wolfe":
        torch._foreach_mul_(weights, 1 - float(group["lr"]))
    if not share:
        return
    if group["decay"] == "weight":
        torch._foreach_mul_(weights, 1 - share)
    elif group["decay"] == "cautious":
        for w, u in zip(weights, update, strict=True):
            w.sub_(w * (w * u > 0), alpha=share)


def _hold(part: Pack, weights: list[Tensor], states: States, group: Group, before: Tensor | None) -> None:
    hold = group["hold"]
    if hold in ("none", "frank_wolfe"):
        return
    if hold == "row_floor":
        _floor_rows(part, weights, states, group["limit"])
        return
    value = part.measure(L2(), weights)
    if hold == "sphere":
        factor = radial_factor(value, _radii(part, states))
    elif hold == "ball":
        factor = clip_factor(value, group["limit"])
    else:
        assert before is not None
        grown = value - before
        factor = radial_factor(value, before + torch.where(grown > 0, group["limit"] * grown, grown))
    part.scale_(weights, factor)


def _floor_rows(part: Pack, weights: list[Tensor], states: States, limit: float) -> None:
    rows, length = part.view.block_shape[0], part.row_lengths(weights)
    floor = (_radii(part, states) * limit / rows**0.5).repeat_interleave(rows)
    part.scale_rows_(weights, torch.where(length < floor, radial_factor(length, floor), 1.0))
