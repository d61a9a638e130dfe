"""What a step of a group runs, pack by pack: direction, act, rows, scale, apply, hold. ``plan`` prepares it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normwise.engine.pack import Pack, here
from normwise.engine.sharded.prefetch import Request
from normwise.engine.step import OnePass
from normwise.low_precision import narrow_, widened
from normwise.norms import L2, Norm, native
from normwise.norms.base import clip_factor, radial_factor
from normwise.norms.linalg import polar, ridge_inverse
from normwise.norms.reduce import compute_dtype, up
from normwise.parameters.layouts import is_dense, lie_alike
from normwise.policy import actions

Group = Mapping[str, Any]
State = dict[str, Any]
States = Sequence[State]
Update = Callable[[Pack, list[Tensor]], None]
"""What a policy's rules on updates do to the finished updates of a pack, in place."""
LAYOUTS = "layouts"
"""The group's key that keeps the axes of its parameters, as plain data, in their order."""
RELATIVE_FLOOR = 1e-3
"""The least root mean square that a relative step takes a weight to have, so that zero weights can leave zero (Adafactor, 2018)."""
MEASURED = {
    "normuon": ("update",), "init": ("update",), "relative": ("weights", "update"), "lamb": ("weights", "update"),
    "lars": ("weights", "grads"),
}  # fmt: skip
"""The norms that a scale needs."""

# C functions, since all of this is asked of every parameter at every step.
GRADIENT, DTYPE, KIND = operator.attrgetter("grad"), operator.attrgetter("dtype"), operator.attrgetter("__class__", "dtype", "device")
STRIDE, IS_NEGATIVE = Tensor.stride, Tensor.is_neg
PARTS = ("direction", "act", "norm", "per", "scale", "hold", "rounding")
COLUMNS = operator.itemgetter(*PARTS, "polar", "eps")


# ---------------------------------------------------------------------------------------------------------- what is prepared


@dataclass(eq=False)
class Part:
    """A pack with the states of its members, and what its columns come to for blocks of this shape."""

    pack: Pack
    states: list[State]
    radii: Tensor | None
    """The radius of each block, ``(members · count,)``, where they are not all one."""
    norm: Norm
    act_measures: list[Norm]
    """The norm that the act divides by; none where it needs no norm, or whole blocks."""
    polar_floor: float
    polar_scale: float
    """What the polar factor is divided by under a multiple of the spectral norm."""
    shape_scale: float


@dataclass(eq=False)
class Fused:
    """Parameters of one dtype and device for torch's fused AdamW kernel, with their states."""

    params: list[Tensor]
    states: list[State]
    dtensors: bool
    known: list[list[tuple[int, ...]]] = field(default_factory=list)
    """The strides of what :meth:`tensors` gives, when all of it was last found to lie as the kernel needs it."""
    own: tuple[OnePass, native.AdamW] | None = None
    """Our own kernel, and what it was last asked to do in one pass."""

    def step(self, group: Group, one_pass: OnePass | None = None) -> None:
        (params, grads, firsts, seconds), copies = self.tensors()
        steps, radius = [s["step"] for s in self.states], group["radius"]
        decay = group["weight_decay"] / radius if group["decay"] == "weight" else 0.0
        rate, betas, eps, maximize = group["lr"] * radius, group["betas"], group["eps"], group["maximize"]
        squares: list[tuple[float, float]] = []
        if one_pass is None:
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params, grads, firsts, seconds, [], steps, lr=rate, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps,
                amsgrad=False, maximize=maximize,
            )  # fmt: skip
            increment_version(params)    # which torch's fused kernels leave out, and by which others see that a weight has moved
        else:
            if self.own is None or self.own[0] is not one_pass:
                self.own = one_pass, native.AdamW(params, [one_pass.of.get(id(p)) for p in params])
            squares = self.own[1].step_((params, grads, firsts, seconds, steps), one_pass.measured, rate, betas, decay, eps, maximize)
        for original, copy in copies:
            original.copy_(copy)
        if one_pass is not None:
            one_pass.done(self.params, squares)

    def tensors(self) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """Parameters, gradients, first and second moments as the kernel takes them; and (original, copy) where it is to step a copy.

        The CPU's kernel runs over raw memory, whatever the strides: all four must be dense and lie alike. What does is given as it is.
        A parameter with gaps (a slice of a larger tensor) is stepped as a dense copy; a gradient that lies otherwise (transposed,
        expanded), is negated lazily or has another dtype is read from a copy; moments that lie otherwise, as after a change to
        ``channels_last`` or from a checkpoint of before it, are laid out anew. So all of them get the numbers of contiguous copies.
        """
        params, grads = self.params, list(map(GRADIENT, self.params))
        every = [params, grads, [s["exp_avg"] for s in self.states], [s["exp_avg_sq"] for s in self.states]]
        if self.dtensors:
            every = [list(map(here, x)) for x in every]
        plain = set(map(DTYPE, grads)) == {params[0].dtype} and not any(map(IS_NEGATIVE, grads))
        if plain and [list(map(STRIDE, x)) for x in every] == self.known:
            return every, []
        every = [list(x) for x in every]
        back = [pair for i, s in enumerate(self.states) for pair in _lay_out(every, i, {} if self.dtensors else s)]
        self.known = [] if back else [list(map(STRIDE, x)) for x in every]
        return every, back


def _lay_out(every: list[list[Tensor]], i: int, state: State) -> list[tuple[Tensor, Tensor]]:
    """Makes the ``i``-th tensors lie like their parameter, or like a dense copy of it; (original, copy) of what is to be copied back.
    Moments are replaced in ``state``, where they are in it."""
    p, back = every[0][i], []
    work = every[0][i] = p if is_dense(p.shape, p.stride()) else torch.empty_like(p).copy_(p)
    if work is not p:
        back.append((p, work))
    for k, name in ((1, ""), (2, "exp_avg"), (3, "exp_avg_sq")):
        t = every[k][i]
        if t.dtype == p.dtype and not t.is_neg() and lie_alike(p.shape, work.stride(), t.stride()):
            continue
        every[k][i] = torch.empty_like(work).copy_(t)
        if name in state:
            state[name] = every[k][i]
        elif name:
            back.append((t, every[k][i]))
    return back


@dataclass(eq=False)
class Plan:
    """``parts`` for the columns one by one; ``fused`` for torch's AdamW kernel, all parameters again, where the row is that of AdamW."""

    parts: list[Part]
    fused: list[Fused]
    rounds: bool
    """Whether some weights are rounded in another way than to nearest."""
    aligned: list[Tensor]
    """The DTensors, whose gradients are brought to their placements."""
    params: list[Tensor]
    layouts: Any
    columns: tuple[Any, ...]
    present: list[Tensor]
    kinds: list[tuple[Any, ...]]
    states: list[State]

    def fits(self, group: Group, state: MutableMapping[Tensor, State]) -> bool:
        """Whether nothing that it was built for has changed."""
        return (
            self.layouts is group[LAYOUTS]
            and self.columns == columns_of(group)
            and same(self.params, group["params"])
            and self.kinds == list(map(KIND, self.present))
            and same(self.states, list(map(state.get, self.present)))
        )

    def takes_fused(self, group: Group) -> bool:
        """Whether torch's kernel takes the step: one pass over all it touches, where separate calls need five. A compiler fuses itself."""
        if not self.fused or torch.compiler.is_compiling():
            return False
        return group["radius"] > 0 and (group["decay"] in ("none", "weight") or not group["weight_decay"])

    def takes(self, group: Group) -> bool:
        """Whether our own kernel can take the step: AdamW's, on plain fp32 numbers on a CPU."""
        plain = all(b.params[0].is_cpu and b.params[0].dtype == torch.float32 and not b.dtensors for b in self.fused)
        return plain and self.takes_fused(group)


def columns_of(group: Group) -> tuple[Any, ...]:
    """What a plan is built for. One radius for all blocks may change at every step, as rates and decays may."""
    radius = group["radius"]
    return *COLUMNS(group), tuple(radius) if isinstance(radius, tuple | list) else None, group["velocity"] > 0, group["row_beta"] > 0


def same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether these are the very same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


# ---------------------------------------------------------------------------------------------------------- directions


# Each function advances its state and returns new tensors or its own buffers, which are only read.


def plain(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    return grads


def heavy_ball(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    buffers = [s["momentum_buffer"] for s in states]
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, grads)
    return buffers


def nesterov(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    return list(torch._foreach_add(grads, heavy_ball(grads, states, group), alpha=group["momentum"]))


def ema(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    buffers = [s["momentum_buffer"] for s in states]
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    return buffers


def ema_nesterov(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    return list(torch._foreach_lerp(grads, ema(grads, states, group), group["momentum"]))


def lion(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    buffers = [s["momentum_buffer"] for s in states]
    first, second = group["betas"]
    mixed = list(torch._foreach_lerp(buffers, grads, 1 - first))
    torch._foreach_lerp_(buffers, grads, 1 - second)
    return mixed


def adam(grads: list[Tensor], states: States, group: Group) -> list[Tensor]:
    first, second = group["betas"]
    torch._foreach_add_([s["step"] for s in states], 1)
    averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    torch._foreach_lerp_(averages, grads, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - second)
    averages, squares = [up(a) for a in averages], [up(v) for v in squares]    # in fp16 eps would be 0
    roots = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(roots, _corrections(states, second, 0.5))
    torch._foreach_add_(roots, group["eps"])
    directions = list(torch._foreach_div(averages, roots))
    torch._foreach_div_(directions, _corrections(states, first, 1.0))
    return directions


def _corrections(states: States, beta: float, power: float) -> Any:
    """(1 − βᵗ) to ``power``; as tensors where reading the step count would break a compiled graph or wait for a device."""
    if torch.compiler.is_compiling() or states[0]["step"].device.type != "cpu":
        return [(1 - beta ** s["step"].double()).pow(power).to(compute_dtype(s["exp_avg"].dtype)) for s in states]
    return [(1 - beta ** float(s["step"])) ** power for s in states]


DIRECTIONS: dict[str, Callable[[list[Tensor], States, Group], list[Tensor]]] = {
    "plain": plain, "heavy_ball": heavy_ball, "nesterov": nesterov, "ema": ema, "ema_nesterov": ema_nesterov, "lion": lion, "adam": adam,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- a pack's way


def step_group(plan: Plan, group: Group, on_update: Update | None, one_pass: OnePass | None = None) -> list[Iterator[list[Request]]]:
    """One step of a group. Returns what is left to do: packs of DTensors wait for those of the other groups.

    one_pass: for our own kernel, where all groups take it.
    """
    if on_update is None and plan.takes_fused(group):
        for batch in plan.fused:
            batch.step(group, one_pass)
        return []
    return [going for part in plan.parts for going in part.pack.run(take(part, group, plan.rounds, on_update))]


def take(part: Part, group: Group, rounds: bool, on_update: Update | None) -> Iterator[list[Request]]:
    """One pack through the columns. Gradients are read, never written.

    It stops four times, each time before norms of blocks are needed that were not known before, and yields what it will measure. Packs of
    DTensors go from stop to stop together, so that all of it travels in one collective. Of a plain pack there is nothing to send.
    """
    pack, hold = part.pack, group["hold"]
    states, params = pack.local_states(part.states), pack.local(pack.params)
    decay = group["decay"] if group["weight_decay"] else "none"
    given: list[Any] = [p.grad for p in pack.params]    # a compiler knows no attrgetter
    pairs = zip(pack.local(given), params, strict=True)
    # torch lets a gradient's dtype differ, and negates lazily, which foreach does not take. Asking for that would break a compiled graph.
    compiled = torch.compiler.is_compiling()
    grads = [g if g.dtype == p.dtype and not (compiled or g.is_neg()) else g.to(p.dtype).resolve_neg() for g, p in pairs]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    update = grads if decay != "gradient" else list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    update = list(DIRECTIONS[group["direction"]](update, states, group))
    if decay == "direction":
        update = list(torch._foreach_add(update, params, alpha=group["weight_decay"]))

    yield pack.requests(lambda: [(norm, update) for norm in part.act_measures])
    update = _act(part, update, group)

    yield pack.requests_of_rows(update) if group["row_beta"] else []
    if group["row_beta"]:
        update = _divide_rows(pack, update, states, group)

    weights = widened(params, states) if rounds else params
    known = {"weights": weights, "update": update, "grads": grads}
    scaled_by = {of: known[of] for of in MEASURED.get(group["scale"], ())}
    braked = [weights] if hold == "radial_brake" else []
    yield pack.requests(lambda: [(L2(), tensors) for tensors in (*scaled_by.values(), *braked)])
    factor = _scale(part, {of: pack.measure(L2(), tensors) for of, tensors in scaled_by.items()}, states, group)
    before = pack.measure(L2(), weights) if braked else None
    _apply(pack, weights, update, factor, states, group, on_update)

    rows = hold == "row_floor"
    yield pack.requests_of_rows(weights) if rows else pack.requests(lambda: [(L2(), weights)] if hold in HELD_BY_NORM else [])
    if hold not in ("none", "frank_wolfe"):
        _hold(pack, weights, states, group, before)
    if rounds:
        narrow_(params, weights, states, pack.noise_numbers(states))


HELD_BY_NORM = ("sphere", "ball", "radial_brake")


def _act(part: Part, update: list[Tensor], group: Group) -> list[Tensor]:
    """The direction under the norm: −lmo(d, 1) and the like."""
    act, pack, norm = group["act"], part.pack, part.norm
    if act == "none":
        return update
    if act == "ridge":
        return pack.split(ridge_inverse(pack.gather(update), float(group["damping"])))
    if act == "normalize":
        return pack.normalized(norm, update)
    if not norm.polar:
        return pack.steepest(norm, update, partial(actions.steepest, norm))
    # Under a spectral norm by the group's iteration, elsewhere exact.
    factors = pack.steepest(norm, update, partial(polar, method=group["polar"], floor=part.polar_floor))
    return factors if part.polar_scale == 1 else list(torch._foreach_div(factors, part.polar_scale))


def _divide_rows(pack: Pack, update: list[Tensor], states: States, group: Group) -> list[Tensor]:
    """Each unit over the root of the running mean of its squares (NorMuon, Li et al., 2025)."""
    squares, running = pack.row_squares(update), [s["row_squares"] for s in states]
    torch._foreach_lerp_(running, list(squares.to(running[0]).view(len(states), pack.view.count, -1).unbind()), 1 - group["row_beta"])
    return pack.over_rows(update, torch.stack(running).view_as(squares).sqrt_() + group["eps"])


def _scale(part: Part, lengths: Mapping[str, Tensor], states: States, group: Group) -> float | Tensor:
    """What the update is multiplied by before the learning rate: a number, or one a block ``(members · count,)``.

    lengths: the L2 norms of the blocks of what ``MEASURED`` says.
    """
    scale = group["scale"]
    number = (float(group["radius"]) if part.radii is None else part.radii) * part.shape_scale
    if scale not in MEASURED:
        return number
    if scale == "normuon":
        return radial_factor(lengths["update"], number)
    if scale == "init":
        return radial_factor(lengths["update"], _radii(states)) * number
    weight = lengths["weights"]
    if scale == "lars":
        slope = lengths["grads"]
        ratio = group["trust"] * weight / (slope + group["weight_decay"] * weight)
        return torch.where((weight > 0) & (slope > 0), ratio, 1.0) * number
    length = lengths["update"]
    if scale == "relative":
        least = RELATIVE_FLOOR * math.prod(part.pack.view.block_shape) ** 0.5
        return torch.where(length > 0, weight.clamp(min=least) / length, 0.0) * number
    return torch.where((weight > 0) & (length > 0), weight / length, 1.0) * number


def _radii(states: States) -> Tensor:
    """R of every block: its norm when first stepped."""
    return torch.cat([s["radius"] for s in states]) if len(states) > 1 else states[0]["radius"]


def _apply(
    pack: Pack, weights: list[Tensor], update: list[Tensor], factor: float | Tensor, states: States, group: Group, on_update: Update | None
) -> None:
    """Decay and step; ``weights`` are the parameters, or what stands for them until they are rounded."""
    rate = float(group["lr"])
    step, share = rate, rate * group["weight_decay"]
    if isinstance(factor, Tensor):
        if group["act"] == "none" and not group["row_beta"]:    # it may be a buffer of the direction's
            update = [u.clone() for u in update]
        pack.scale_(update, factor)
    else:
        step = rate * factor
    if group["velocity"]:
        # v ← μ·v + η·u: momentum on the scaled step, so that a changed rate does not rescale what is under way (LARS).
        velocities = [s["velocity"] for s in states]
        torch._foreach_mul_(velocities, group["momentum"] if group["velocity"] is True else group["velocity"])
        torch._foreach_add_(velocities, update, alpha=step)
        update, step = velocities, 1.0
    if group["hold"] == "frank_wolfe":
        torch._foreach_mul_(weights, 1 - rate)
    if share and group["decay"] == "weight":
        torch._foreach_mul_(weights, 1 - share)
    elif share and group["decay"] == "cautious":
        for w, u in zip(weights, update, strict=True):
            w.sub_(w * (w * u > 0), alpha=share)
    if update[0].dtype != weights[0].dtype:    # they are of one dtype each
        update = [u.to(w.dtype) for u, w in zip(update, weights, strict=True)]
    if on_update is None:
        torch._foreach_add_(weights, update, alpha=-step)
    else:
        change = list(torch._foreach_mul(update, -step))
        on_update(pack, change)
        torch._foreach_add_(weights, change)


def _hold(pack: Pack, weights: list[Tensor], states: States, group: Group, before: Tensor | None) -> None:
    """Brings the weights back to what holds them. before: their norms before the step, where a brake needs them."""
    hold, limit = group["hold"], group["limit"]
    if hold == "row_floor":
        rows, length = pack.view.block_shape[0], pack.row_lengths(weights)
        floor = (_radii(states) * limit / rows**0.5).repeat_interleave(rows)
        pack.scale_rows_(weights, torch.where(length < floor, radial_factor(length, floor), 1.0))
        return
    value = pack.measure(L2(), weights)
    if hold == "sphere":
        factor = radial_factor(value, _radii(states))
    elif hold == "ball":
        factor = clip_factor(value, limit)
    else:
        assert before is not None
        grown = value - before
        factor = radial_factor(value, before + torch.where(grown > 0, limit * grown, grown))
    pack.scale_(weights, factor)
