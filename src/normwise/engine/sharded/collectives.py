"""All that is sent: the only module that calls ``torch.distributed``. It counts what it does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normwise.errors import PolicyError


@dataclass
class Traffic:
    """What was sent since the process began, on this rank.

    ``collectives``: calls. ``bytes``: what this rank put into them. ``largest``: the most bytes that one of them brought here.
    """

    collectives: int = 0
    bytes: int = 0
    largest: int = 0

    def add(self, sent: Tensor, got: Tensor) -> None:
        """Counts one collective."""
        self.collectives += 1
        self.bytes += _bytes(sent)
        self.largest = max(self.largest, _bytes(got))

    def since(self, before: Traffic) -> Traffic:
        """What was sent after ``before`` was taken."""
        return Traffic(self.collectives - before.collectives, self.bytes - before.bytes, self.largest)

    def join(self, more: Traffic) -> None:
        """Adds what was sent in another stretch of time."""
        if more.collectives:
            self.collectives, self.bytes = self.collectives + more.collectives, self.bytes + more.bytes
            self.largest = max(self.largest, more.largest)

    def now(self) -> Traffic:
        """A copy, to compare with later."""
        return replace(self)


TRAFFIC = Traffic()
_GROUPS: dict[tuple[Any, tuple[int, ...]], Any] = {}


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def group_of(mesh: Any, dims: tuple[int, ...]) -> Any:
    """The process group of the ranks that differ from this one in the mesh dimensions ``dims`` alone. Made once; every rank of the mesh
    must ask.

    Raises:
        PolicyError: for a mesh of two or more dimensions and a part of the ranks, where ``init_process_group`` was given a ``device_id``.
    """
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    # Making a group takes a collective of its own; the world's is there already.
    if math.prod(mesh.size(d) for d in dims) == dist.get_world_size():
        return dist.group.WORLD
    key = (mesh, dims)
    if key not in _GROUPS or not _exists(_GROUPS[key]):
        _GROUPS[key] = _made(mesh, dims)
    return _GROUPS[key]


def _exists(group: Any) -> bool:
    """Not where all was destroyed and begun anew: a mesh of the same ranks is equal to the one before."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def _made(mesh: Any, dims: tuple[int, ...]) -> Any:
    """Meshes need no names of their dimensions, and may be of a part of all ranks, of which the others know nothing."""
    others = [d for d in range(mesh.ndim) if d not in dims]
    groups = mesh.mesh.permute(*others, *dims).reshape(-1, math.prod(mesh.size(d) for d in dims)).tolist()
    if mesh.size() == dist.get_world_size():
        made = [dist.new_group(ranks) for ranks in groups]    # all ranks make all of them
        return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None:    # NCCL then splits the world's communicator, which waits for all
        raise PolicyError(
            f"a mesh of {mesh.size()} of {dist.get_world_size()} ranks and {mesh.ndim} dimensions needs a process group of its own, which "
            "waits for the ranks outside where init_process_group() was given a device_id: leave device_id out."
        )
    return dist.new_group(next(ranks for ranks in groups if dist.get_rank() in ranks), use_local_synchronization=True)


def ranks_of(group: Any) -> list[int]:
    """The global ranks of a group, in its order."""
    return list(dist.get_process_group_ranks(group))


def all_sum(t: Tensor, group: Any) -> Tensor:
    """The sum of ``t`` over the group, the same bits on all of its ranks."""
    result = t.clone()
    dist.all_reduce(result, group=group)
    TRAFFIC.add(t, result)
    return result


def all_agree(yes: bool, mesh: Any) -> bool:
    """Whether every rank of the mesh says yes."""
    if mesh.get_coordinate() is None or mesh.size() == 1:
        return yes
    # Counted as a sum of refusals: it is exact for any number of ranks.
    no = torch.tensor([0.0 if yes else 1.0], device=mesh.device_type)
    return not bool(all_sum(no, group_of(mesh, tuple(range(mesh.ndim)))))


def all_rows(t: Tensor, group: Any) -> Tensor:
    """``t`` of every rank as one row each, ``(ranks, *t.shape)``."""
    rows = t.new_empty((dist.get_world_size(group), *t.shape))
    dist.all_gather(list(rows.unbind()), t.contiguous(), group=group)
    TRAFFIC.add(t, rows)
    return rows


def largest_on_any(values: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The largest that any rank has of each number, in one collective."""
    rows = all_rows(torch.cat(list(values)), group)
    return list(torch.split(rows.amax(0), [len(v) for v in values]))


def many_processes() -> bool:
    """Whether this is one of several processes that know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def texts_if_different(text: str, mesh: Any) -> list[str]:
    """The texts of all ranks of a mesh, in the order of its ranks, where they are not all the same; empty where they are."""
    if mesh.get_coordinate() is None or mesh.size() == 1:
        return []
    group, coded = group_of(mesh, tuple(range(mesh.ndim))), text.encode()
    # Seven bytes fit an int64. The texts themselves travel only if a digest differs, which ends in an error.
    digest = int.from_bytes(hashlib.sha256(coded).digest()[:7], "big")
    seen = all_rows(torch.tensor([digest, len(coded)], device=mesh.device_type), group)
    if bool((seen == seen[0]).all()):
        return []
    padded = torch.zeros(int(seen[:, 1].max()), dtype=torch.uint8)
    padded[: len(coded)] = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    rows = all_rows(padded.to(mesh.device_type), group).cpu()
    return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(rows, seen[:, 1], strict=True)]


def exchange(sent: Tensor, give: Sequence[int], take: Sequence[int], group: Any) -> Tensor:
    """Sends ``give[r]`` numbers to each rank r of the group, in order, and gets ``take[r]`` from it."""
    got = sent.new_empty(sum(take))
    dist.all_to_all_single(got, sent, list(take), list(give), group=group)
    TRAFFIC.add(sent, got)
    return got


@torch.no_grad()
def placed_as(t: Any, like: Any) -> Any:
    """The DTensor ``t`` with the placements of ``like``: a gradient may be whole where its parameter is split, or not yet summed."""
    if tuple(t.placements) == tuple(like.placements):
        return t
    moved = t.redistribute(like.device_mesh, like.placements)
    if not all(p.is_replicate() or p == q for p, q in zip(t.placements, like.placements, strict=True)):
        TRAFFIC.add(t.to_local(), moved.to_local())
    return moved
