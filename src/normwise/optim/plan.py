"""What a step of one group works on: built once, and used until its parameters, their gradients' presence, state or parts change."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import ALONE_FROM_BYTES, SCRATCH_BYTES, Member, Pack, is_sharded, refuse_memory
from normwise.engine.sharded.grouping import loose_pack, packs_of
from normwise.engine.sharded.norms import simple
from normwise.errors import LayoutError, PolicyError
from normwise.low_precision import CARRY, NOISE, memory, rounds
from normwise.norms import L2, Norm
from normwise.norms.reduce import compute_dtype, wide
from normwise.optim.columns import STATE, acts_on_blocks, apart, needs_matrices, norm_of, polar_floor, shape_scale, stores_radius
from normwise.optim.step import KIND, LAYOUTS, Fused, Group, Part, Plan, State, columns_of
from normwise.parameters.layouts import Layout, block_view, is_dense

States = MutableMapping[Tensor, State]

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# State in a dtype of its own; torch's `load_state_dict` would round it to the parameter's.
WIDE_STATE = ("radius", "row_squares", CARRY, NOISE)


def build(group: Group, present: Sequence[int], state: States) -> Plan:
    """The plan of a group whose parameters ``present`` (their indices) have gradients.

    Creates their states. PolicyError, with nothing changed, for a zero block whose initial norm a part needs.
    """
    found = members(group, present)
    packs = packs_of(found, False) if acts_on_blocks(group) else _loose(found)
    radii = _radii(packs, group, state)
    parts = [_part(pack, [_ready(state[t], t, pack, group) for t in pack.params], group) for pack in packs]
    params = [p for pack in packs for p in pack.params]
    states = [state[p] for p in params]
    for k, (p, kept) in enumerate(zip(params, states, strict=True)):
        # What the group's way of rounding needs; the number sets the parameters' random numbers apart.
        needed = memory(p, group["rounding"], group["seed"] * 2**31 + 4096 * len(state) + k)
        for name in {NOISE, CARRY} - set(needed):
            kept.pop(name, None)
        for name, value in needed.items():
            kept.setdefault(name, value)
    for p, radius in radii:
        state[p].setdefault("radius", radius)
    rounding = rounds(states)
    fused = _fused(params, states, group) if not rounding else []
    held, kinds = list(group["params"]), list(map(KIND, params))
    aligned = [p for p in held if is_sharded(p)]
    return Plan(parts, fused, rounding, aligned, held, group[LAYOUTS], columns_of(group), params, kinds, states)


def _part(pack: Pack, states: list[State], group: Group) -> Part:
    """The pack with what its columns come to."""
    act, norm, shape = group["act"], norm_of(group), pack.view.block_shape
    base = simple(norm, pack.block_shape) if act in ("normalize", "lmo") else None
    measured: list[Norm] = []
    if base is not None:
        measured = [norm] if act == "normalize" else [L2()] if isinstance(base[0], L2) else []
    radii = None
    if apart(group):    # on the device here, once: a step must not wait for a copy
        device = pack.params[0].device
        radii = torch.tensor([float(r) for r in group["radius"]], dtype=wide(device), device=device).repeat(len(pack.members))
    times = norm.unscaled(tuple(pack.block_shape))[1] if act == "lmo" and norm.polar else 1.0
    scale = shape_scale(group["scale"], shape[0], shape[-1], pack.view.kernel) if len(shape) == 2 else 1.0
    return Part(pack, states, radii, norm, measured, polar_floor(group), times, scale)


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


def follow(group: MutableMapping[str, Any], name: str) -> None:
    """Brings the group's axes to its parameters, where its list was written to: a tensor replaced, added or taken out, as torch allows.

    LayoutError, by what to do instead, for a row that acts on blocks: nobody knows the axes of the new ones.
    """
    check_params(group, name)
    try:
        axes = layouts(group)
    except LayoutError as error:
        if acts_on_blocks(group) or needs_matrices(group):
            raise LayoutError(
                f"{error} The parameters of {name} were changed in their list, and its row acts on blocks, so that it needs the axes of "
                "each. Give new ones to optimizer.add_param_group, or write group['layouts'] = [nw.Layout('oi', shape), ...], too: one a "
                "parameter, in their order."
            ) from None
        axes = [_plain_layout(p, group) for p in group["params"]]
    plain = [(x.axes, x.shape) for x in axes]    # also where the user wrote layouts: checkpoints hold plain data
    if plain != group[LAYOUTS]:
        group[LAYOUTS] = plain


def check_params(group: Group, name: str) -> None:
    """Refuses parameters that no row can step: given twice, with overlapping entries, of integers or complex numbers."""
    params, names = group["params"], names_of(group)
    if len({id(p) for p in params}) < len(params):
        twice = [n for n, p in zip(names, params, strict=True) if sum(p is q for q in params) > 1]
        raise ValueError(f"{name} has a parameter more than once ({', '.join(twice)}): it would take more than one step.")
    for p, whose in zip(params, names, strict=True):
        refuse_memory(p, whose)
        if not p.is_floating_point():
            raise PolicyError(f"a parameter is {p.dtype}: steps under a norm need real floating-point numbers; train its view_as_real.")


def names_of(group: Group) -> list[str]:
    """What errors call the group's parameters: by their places, where the names are not those of the list as it is."""
    names: list[str] = group.get("param_names") or []
    count = len(group["params"])
    return names if len(names) == count else [f"parameter {i}" for i in range(count)]


def members(group: Group, indices: Iterable[int]) -> list[Member]:
    """The group's parameters with their blocks; LayoutError where a part asks for blocks that a parameter has not."""
    matrix, names, axes = needs_matrices(group), names_of(group), layouts(group)
    oriented = matrix and norm_of(group).oriented
    of_blocks, wanted = acts_on_blocks(group), group["per"]
    found = []
    for i in indices:
        # Blocks by head or by expert where there are such axes; elsewhere each matrix.
        has = {"head": {"h", "H"}, "expert": {"e"}}.get(wanted)
        per = ("matrix" if has and not has & set(axes[i].axes) else wanted) if of_blocks else "tensor"
        try:
            view = block_view(axes[i], per, matrix, oriented=oriented, name=names[i])
        except LayoutError as error:
            raise LayoutError(f"{error} In an optimizer: route it to a row that needs no such block, by override=.") from error
        if apart(group) and len(group["radius"]) != view.count:
            raise PolicyError(
                f"radius has {len(group['radius'])} numbers, one a block, but {names[i]!r} has {view.count} per={wanted!r}: give as many, "
                "or one number for all."
            )
        found.append(Member(names[i], group["params"][i], view, 0))
    return found


def _plain_layout(p: Tensor, group: Group) -> Layout:
    """The axes of a tensor given without its module: outputs first, as torch's Muon reads them; above two dimensions nobody knows."""
    if p.ndim < 2 and needs_matrices(group):
        raise no_matrix(p)
    if p.ndim <= 2:
        return Layout("oi"[: max(p.ndim, 1)], tuple(p.shape) or (1,))
    if needs_matrices(group) or (acts_on_blocks(group) and group["per"] not in ("tensor", "matrix", "element")):
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


def _loose(found: list[Member]) -> list[Pack]:
    """Packs for a row that acts on entries alone: tensors of any shapes together."""
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


def _fused(params: list[Tensor], states: list[State], group: Group) -> list[Fused]:
    """Parameters by dtype and device, those with gaps apart; nothing where the row is not AdamW's, or the kernel does not know one."""
    plain = (group["direction"], group["act"], group["scale"], group["hold"]) == ("adam", "none", "absolute", "none")
    if not plain or apart(group) or group["row_beta"] or group["velocity"]:
        return []
    if not all(p.device.type in ("cpu", "cuda") and p.dtype in FUSED_DTYPES for p in params):
        return []
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(params):
        kinds.setdefault((p.device, p.dtype, is_sharded(p), is_dense(p.shape, p.stride())), []).append(i)
    return [Fused([params[i] for i in kind], [states[i] for i in kind], key[2]) for key, kind in kinds.items()]


# ---------------------------------------------------------------------------------------------------------- state


def _ready(state: State, p: Tensor, part: Pack, group: Group) -> State:
    """The parameter's state with all that the group's parts keep in it, in the dtype that the parameter has now: ``model.double()`` may
    come after the first step."""
    buffers = (*STATE[group["direction"]], *(("velocity",) if group["velocity"] else ()))
    for name in buffers:
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state[name] = state[name].to(p.dtype)
    for name in {"radius", "row_squares"} & set(state):
        state[name] = state[name].to(compute_dtype(p.dtype))
    if group["row_beta"] and "row_squares" not in state:
        rows = (part.view.count, part.view.block_shape[0])
        state["row_squares"] = torch.zeros(rows, dtype=compute_dtype(p.dtype), device=p.device)
    if group["direction"] == "adam":
        # Where torch's fused kernel wants it: on the device; on the CPU reading it is free anyway.
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=p.device)
    return state


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
