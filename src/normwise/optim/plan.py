"""What a step of one group works on: built once, and used until its parameters, their gradients' presence, state or parts change."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import ALONE_FROM_BYTES, SCRATCH_BYTES, Member, Pack
from normwise.engine.sharded import here, is_sharded
from normwise.engine.sharded.grouping import loose_pack, packs_of
from normwise.errors import LayoutError, PolicyError
from normwise.low_precision import CARRY, NOISE, memory, rounds
from normwise.norms import L2
from normwise.norms.reduce import compute_dtype, wide
from normwise.optim.columns import STATE, acts_on_blocks, apart, needs_matrices, norm_of, stores_radius
from normwise.parameters.layouts import BlockView, Layout, block_view, is_dense, lie_alike

Group = Mapping[str, Any]
State = dict[str, Any]
States = MutableMapping[Tensor, State]

# The group's key that keeps the axes of its parameters, as plain data, in their order.
LAYOUTS = "layouts"
PARTS = ("direction", "act", "norm", "per", "scale", "hold", "rounding")
FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# State in a dtype of its own; torch's `load_state_dict` would round it to the parameter's.
WIDE_STATE = ("radius", "row_squares", CARRY, NOISE)


@dataclass(eq=False)
class Part:
    """A pack with the states of its members, and the radius of each block ``(members · count,)`` where they are not all one."""

    pack: Pack
    states: list[State]
    radii: Tensor | None = None


@dataclass(eq=False)
class Alike:
    """Parameters of one dtype and device for torch's fused AdamW kernel, with their states."""

    params: list[Tensor]
    states: list[State]
    dtensors: bool
    known: list[list[tuple[int, ...]]] = field(default_factory=list)
    """The strides of what :meth:`tensors` gives, when all of it was last found to lie as the kernel needs it."""

    def tensors(self) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """Parameters, gradients, first and second moments as the kernel takes them; and (parameter, copy) where it is to step a copy.

        The CPU's kernel runs over raw memory, whatever the strides: all four must be dense and lie alike. What does is given as it is.
        A parameter with gaps (a slice of a larger tensor) is stepped as a dense copy; a gradient that lies otherwise (transposed,
        expanded), is negated lazily or has another dtype is read from a copy; moments that lie otherwise, as after a change to
        ``channels_last`` or from a checkpoint of before it, are laid out anew. So all of them get the numbers of contiguous copies.
        """
        params, grads = self.params, [p.grad for p in self.params if p.grad is not None]
        every = [params, grads, [s["exp_avg"] for s in self.states], [s["exp_avg_sq"] for s in self.states]]
        if self.dtensors:
            every = [list(map(here, x)) for x in every]
        plain = {g.dtype for g in grads} == {params[0].dtype} and not any(map(IS_NEGATIVE, grads))
        if plain and [list(map(STRIDE, x)) for x in every] == self.known:
            return every, []
        every = [list(x) for x in every]
        copies = [_align(every, i, {} if self.dtensors else s) for i, s in enumerate(self.states)]
        usual = not any(copies)
        self.known = [list(map(STRIDE, x)) for x in every] if usual else []
        return every, [c for made in copies for c in made]


STRIDE, IS_NEGATIVE = Tensor.stride, Tensor.is_neg


def _align(every: list[list[Tensor]], i: int, state: State) -> list[tuple[Tensor, Tensor]]:
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
    """``parts`` for the columns one by one; ``alike`` for torch's fused AdamW kernel, all parameters again."""

    params: list[Tensor]
    parts: list[Part]
    alike: list[Alike]
    built_for: tuple[Any, ...]
    present: list[Tensor]
    states: list[State] = field(default_factory=list)
    rounds: bool = False
    """Whether some weights are rounded in another way than to nearest."""

    def fits(self, group: Group, state: States) -> bool:
        """Whether nothing that it was built for has changed."""
        return (
            same(self.params, group["params"])
            and self.built_for == _built_for(group, self.present)
            and same(self.states, list(map(state.get, self.present)))
        )


def same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether these are the very same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _built_for(group: Group, present: list[Tensor]) -> tuple[Any, ...]:
    parts = tuple([group[column] for column in PARTS])
    kinds = [(p.dtype, p.device) for p in present]
    radii = tuple(group["radius"]) if apart(group) else None    # one number for all may change at every step
    return *parts, radii, group["velocity"] > 0, group["row_beta"] > 0, id(group[LAYOUTS]), kinds


def build(group: Group, present: Sequence[int], state: States) -> Plan:
    """The plan of a group whose parameters ``present`` (their indices) have gradients.

    Creates their states. PolicyError, with nothing changed, for a zero block whose initial norm a part needs.
    """
    packs = _packs(group, members(group, present))
    radii = _radii(packs, group, state)
    parts = [Part(p, [_ready(state[t], t, p, group) for t in p.params], _radius_each(p, group)) for p in packs]
    for k, p in enumerate(p for part in packs for p in part.params):
        _remember(state[p], p, group, 4096 * len(state) + k)
    for p, radius in radii:
        state[p].setdefault("radius", radius)
    params = [p for part in parts for p in part.pack.params]
    alike = _alike(params, state) if group["direction"] == "adam" else []
    states = [state[p] for p in params]
    return Plan(list(group["params"]), parts, alike, _built_for(group, params), params, states, rounds(states))


# ---------------------------------------------------------------------------------------------------------- members and packs


def layouts(group: Group) -> list[Layout]:
    """The axes of the group's parameters, in their order: stated, or of a tensor given without its module."""
    given = group.get(LAYOUTS)
    if given is None:
        return [_plain_layout(p, group) for p in group["params"]]
    if len(given) != len(group["params"]):
        raise LayoutError(f"a group states {len(given)} layouts for {len(group['params'])} parameters: give one a parameter.")
    stated = [x if isinstance(x, Layout) else Layout(x[0], tuple(x[1])) for x in given]
    names = names_of(group)
    return [x.check(p.shape or (1,), name) for x, p, name in zip(stated, group["params"], names, strict=True)]


def names_of(group: Group) -> list[str]:
    """What errors call the group's parameters."""
    names: list[str] | None = group.get("param_names")
    return names or [f"parameter {i}" for i in range(len(group["params"]))]


def members(group: Group, indices: Iterable[int]) -> list[Member]:
    """The group's parameters with their blocks; LayoutError where a part asks for blocks that a parameter has not."""
    matrix, names, axes = needs_matrices(group), names_of(group), layouts(group)
    oriented = matrix and norm_of(group).oriented
    found = []
    for i in indices:
        per = group["per"] if acts_on_blocks(group) and _has(axes[i].axes, group["per"]) else _whole(group)
        view = _view(axes[i], per, matrix, oriented, names[i])
        _check_radii(group, view.count, names[i])
        found.append(Member(names[i], group["params"][i], view, 0))
    return found


def _check_radii(group: Group, count: int, name: str) -> None:
    if apart(group) and len(group["radius"]) != count:
        raise PolicyError(
            f"radius has {len(group['radius'])} numbers, one a block, but {name!r} has {count} per={group['per']!r}: give as many, or one "
            "number for all."
        )


def _view(layout: Layout, per: str, matrix: bool, oriented: bool, name: str) -> BlockView:
    try:
        return block_view(layout, per, matrix, oriented=oriented, name=name)
    except LayoutError as error:
        raise LayoutError(f"{error} In an optimizer: route it to a row that needs no such block, by override=.") from error


def _has(axes: str, per: str) -> bool:
    """Blocks by head or by expert where there are such axes; elsewhere each matrix."""
    return {"head": "h" in axes or "H" in axes, "expert": "e" in axes}.get(per, True)


def _whole(group: Group) -> str:
    return "matrix" if acts_on_blocks(group) else "tensor"


def _plain_layout(p: Tensor, group: Group) -> Layout:
    """The axes of a tensor given without its module: outputs first, as torch's Muon reads them; above two dimensions nobody knows."""
    if p.ndim < 2 and needs_matrices(group):
        raise no_matrix(p)
    if p.ndim <= 2:
        return Layout("oi"[: max(p.ndim, 1)], tuple(p.shape) or (1,))
    if needs_matrices(group) or (acts_on_blocks(group) and group["per"] not in ("tensor", "matrix", "global", "element")):
        raise LayoutError(
            f"a tensor of shape {tuple(p.shape)} was given without its module, and its axes cannot be told: give the "
            "model, as nw.optim.auto(model) (they are read from its modules' types), or layouts=[nw.Layout('oikk', shape)] in its group."
        )
    return Layout("o" * p.ndim, tuple(p.shape))


def no_matrix(p: Tensor) -> LayoutError:
    """The error for a vector that a method of matrices was given without its module."""
    return LayoutError(
        f"a tensor of shape {tuple(p.shape)} was given without its module, to a method of matrices, and it is none: give the model, as "
        "nw.optim.Muon(model) or nw.optim.auto(model), which then sends vectors, embeddings and heads to AdamW. Or give only the "
        "hidden matrices, and the others to an optimizer of their own."
    )


def _packs(group: Group, found: list[Member]) -> list[Pack]:
    if acts_on_blocks(group):
        return packs_of(found, False)
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for m in found:
        alike.setdefault((m.param.dtype, m.param.device, is_sharded(m.param)), []).append(m)
    return [loose_pack(part) for kind in alike.values() for part in _portions(kind)]


def _portions(found: list[Member]) -> list[list[Member]]:
    """Tensors of any shapes together, up to the scratch memory that one batch may take; large ones alone."""
    portions: list[list[Member]] = []
    room = 0
    for m in sorted(found, key=lambda m: m.param.numel()):
        size = m.param.numel() * m.param.element_size()
        if not portions or size > room or size >= ALONE_FROM_BYTES:
            portions.append([])
            room = SCRATCH_BYTES
        portions[-1].append(m)
        room -= size
    return portions


def _alike(params: list[Tensor], state: States) -> list[Alike]:
    """Parameters by dtype and device, those with gaps apart; nothing where the fused kernel does not know one of them."""
    if not all(p.device.type in ("cpu", "cuda") and p.dtype in FUSED_DTYPES for p in params):
        return []
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype, is_sharded(p), is_dense(p.shape, p.stride())), []).append(p)
    return [Alike(kind, [state[p] for p in kind], is_sharded(kind[0])) for kind in kinds.values()]


# ---------------------------------------------------------------------------------------------------------- state


def _ready(state: State, p: Tensor, part: Pack, group: Group) -> State:
    """The parameter's state with all that the group's parts keep in it."""
    buffers = (*STATE[group["direction"]], *(("velocity",) if group["velocity"] else ()))
    for name in buffers:
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if group["row_beta"] and "row_squares" not in state:
        rows = (part.view.count, part.view.block_shape[0])
        state["row_squares"] = torch.zeros(rows, dtype=compute_dtype(p.dtype), device=p.device)
    if group["direction"] == "adam":
        # Where torch's fused kernel wants it: on the device; on the CPU reading it is free anyway.
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=p.device)
    return state


def _radius_each(part: Pack, group: Group) -> Tensor | None:
    """Put on the device here, once: a step must not wait for a copy."""
    if not apart(group):
        return None
    device = part.params[0].device
    return torch.tensor([float(r) for r in group["radius"]], dtype=wide(device), device=device).repeat(len(part.members))


def _remember(state: State, p: Tensor, group: Group, number: int) -> None:
    """What the group's way of rounding needs in the parameter's state; ``number`` sets the parameters' random numbers apart."""
    needed = memory(p, group["rounding"], group["seed"] * 2**31 + number)
    for name in {NOISE, CARRY} - set(needed):
        state.pop(name, None)
    for name, value in needed.items():
        state.setdefault(name, value)


def _radii(packs: list[Pack], group: Group, state: States) -> list[tuple[Tensor, Tensor]]:
    """R of the parameters that have none yet: the L2 norms of their blocks, ``(count,)``."""
    if not stores_radius(group):
        return []
    found: list[tuple[Tensor, Tensor]] = []
    still = []
    for m in (m for p in packs for m in p.members if "radius" not in state.get(m.param, {})):
        alone = packs_of([m], False, agree=True)[0]
        radius = alone.measure(L2(), alone.local([m.param.detach()])).to(compute_dtype(m.param.dtype))
        found.append((m.param, radius))
        if group["hold"] != "row_floor" and not bool(((radius > 0) & radius.isfinite()).all()):
            still.append(m.name)
    if still:
        raise PolicyError(
            f"{', '.join(still)}: a block is zero (or not finite) when first stepped, and R = ‖w‖ = 0 would keep it there. Initialise it, "
            f"or route it to a row without scale='init' and hold='sphere', as by override={{{still[0]!r}: 'adamw'}}."
        )
    return found
