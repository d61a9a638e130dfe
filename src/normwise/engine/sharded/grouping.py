"""Members into packs, plain and split ones; what split ones cannot do is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from normwise.engine.pack import SCRATCH_BYTES, Member, Pack, is_sharded, pack
from normwise.engine.sharded.norms import simple
from normwise.engine.sharded.pack import Loads, Loose, SplitFlat, SplitPack, acts_on_entries
from normwise.errors import PolicyError
from normwise.parameters.inventory import Entry
from normwise.policy import Rule


def packs_of(members: Sequence[Member], flat: bool, agree: bool = False) -> list[Pack]:
    """Members as packs; those of DTensors by view, dtype, mesh and placements. ``agree``: every rank is to know the norms of all blocks."""
    split = [m for m in members if is_sharded(m.param)]
    if not split:
        return pack(members, flat)
    if flat:
        return [SplitFlat(list(members))]
    plain = [m for m in members if not is_sharded(m.param)]
    loads: Loads = {}
    parts = [SplitPack(bucket, agree, loads) for group in _alike(split) for bucket in _buckets(group)]
    return [*(pack(plain, False) if plain else ()), *parts]


def loose_pack(members: list[Member]) -> Pack:
    """Members of any shapes, all DTensors or none, for steps that act on entries alone."""
    return Loose(members) if is_sharded(members[0].param) else Pack(members)


def lying_here(entries: Sequence[Entry], flat: bool) -> list[Entry]:
    """Without the parameters whose mesh this rank is not in: nothing of them is here, and nobody waits for this rank."""
    outside = [e for e in entries if is_sharded(e.param) and e.param.device_mesh.get_coordinate() is None]    # type: ignore[attr-defined]
    if flat and outside:
        raise PolicyError(
            f"{outside[0].name!r} lies on a mesh that this rank is not in, so that it cannot know a norm of all parameters together: give "
            "each mesh its own rule, or use per='tensor'."
        )
    return [e for e in entries if e not in outside]


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for m in members:
        p: Any = m.param
        key = (m.view, p.shape, p.dtype, p.device, m.optimizer, p.device_mesh, tuple(p.placements))
        alike.setdefault(key, []).append(m)
    return list(alike.values())


def _buckets(group: list[Member]) -> list[list[Member]]:
    """As many members as give each rank of the mesh one bucket of scratch memory, or one parameter: then all of them have work."""
    p: Any = group[0].param
    size = p.numel() * p.element_size()
    room = p.device_mesh.size() * max(1, SCRATCH_BYTES // max(size, 1))
    return [group[i : i + room] for i in range(0, len(group), room)]


def check_split(rule: Rule, packs: Sequence[Pack]) -> None:
    """Refuses one vector over all ranks where its entries would be needed together on one of them."""
    for part in packs:
        if isinstance(part, SplitFlat) and not _is_separable(rule):
            raise PolicyError(
                f"rule '{rule.label()}' needs all of its parameters in one place, and some of them are DTensors, whose parts no rank could "
                "hold together: use per='tensor', or clip_norm in place of project."
            )


def _is_separable(rule: Rule) -> bool:
    base = simple(rule.norm, (1,))
    if rule.action in ("clip_norm", "normalize", "cpr", "weight_decay"):
        return True
    if rule.action in ("prox", "penalty"):
        return base is not None and base[0].p in (1, 2)
    return acts_on_entries(rule.action, rule.norm) or (base is not None and base[0].p == 2)


def placed_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, split as ``like`` is; nothing is sent."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    of: Any = like
    if isinstance(whole, DTensor):
        return whole.redistribute(of.device_mesh, of.placements)
    return distribute_tensor(whole, of.device_mesh, of.placements, src_data_rank=None)
