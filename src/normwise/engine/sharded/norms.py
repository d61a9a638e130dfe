"""Many norms, one collective: the partial norms of everything on one mesh travel in one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import here, is_sharded
from normwise.engine.sharded import collectives
from normwise.engine.sharded.placement import Place
from normwise.norms import L2, Norm, Set
from normwise.norms.reduce import root_sum_squares, wide


def simple(norm: Norm | Set, block_shape: tuple[int, ...]) -> tuple[Norm, float] | None:
    """``norm`` as a multiple of L1, L2 or LInf of a block's entries, whose norm is that of the norms of its parts; None for others."""
    if isinstance(norm, Set):
        return None
    base, factor = norm.unscaled(block_shape)
    return None if base.p is None else (base, factor)


@dataclass(eq=False)
class Share:
    """What this rank knows of some norms: ``parts``, of its part of each block, over the mesh dimensions ``dims``."""

    norm: Norm
    """One with an exponent ``p``."""
    parts: Tensor
    mesh: Any
    dims: tuple[int, ...]
    place: Any
    precise: bool
    """Of float64 numbers, whose squares may leave the range that they are summed in."""
    total: Tensor | None = None


def complete(shares: Sequence[Share]) -> None:
    """Fills in ``total`` of every share: one collective a mesh."""
    meshes: dict[Any, list[Share]] = {}
    for s in shares:
        if s.dims:
            meshes.setdefault(s.mesh, []).append(s)
        else:
            s.total = s.parts
    for on_mesh in meshes.values():
        _complete_mesh(on_mesh)


def _complete_mesh(shares: list[Share]) -> None:
    dims = tuple(sorted({d for s in shares for d in s.dims}))
    group = collectives.group_of(shares[0].mesh, dims)
    parts = [s.parts if s.place.leads(dims) else torch.zeros_like(s.parts) for s in shares]
    sizes = [len(p) for p in parts]
    if all(s.norm.p == 1 or (s.norm.p == 2 and not s.precise) for s in shares):
        squared = [p.square() if s.norm.p == 2 else p for s, p in zip(shares, parts, strict=True)]
        for s, total in zip(shares, torch.split(collectives.all_sum(torch.cat(squared), group), sizes), strict=True):
            s.total = total.sqrt() if s.norm.p == 2 else total
        return
    for s, rows in zip(shares, torch.split(collectives.all_rows(torch.cat(parts), group), sizes, dim=1), strict=True):
        s.total = over_ranks(s.norm, rows)


def over_ranks(norm: Norm, rows: Tensor) -> Tensor:
    """``(ranks, n) -> (n,)``: the norm of the norms of the parts."""
    if norm.p == 1:
        return rows.sum(0)
    return rows.amax(0) if norm.p == math.inf else root_sum_squares(rows.T.contiguous())


def lengths(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each tensor, of all ranks' parts where it is a DTensor: one collective a mesh."""
    shares = [_length(t) for t in tensors]
    complete(shares)
    return [s.total.reshape(()) for s in shares if s.total is not None]


def over_all(tensors: Sequence[Tensor], measure: Callable[[Tensor], Tensor]) -> Tensor:
    """The norm of all numbers of some tensors together, of any shapes, devices and meshes, a scalar; one collective for each way to be
    split.

    measure: ``(b, n) -> (b,)``, a norm that of a vector is the norm of the norms of its parts. Complex numbers count by their moduli, since
        the real and the imaginary part of one are no two entries.
    """
    places: dict[Any, list[Tensor]] = {}
    for t in tensors:
        place = Place.of(t) if is_sharded(t) else None
        places.setdefault((place.mesh, place.dims) if place is not None else None, []).append(here(t))
    norms = []
    for key, parts in places.items():
        device = parts[0].device
        sizes = (t.abs() if t.is_complex() else t for t in parts)
        found = [measure(s.reshape(1, -1)).to(device, wide(device)) for s in sizes if s.numel()]
        value = measure(torch.cat(found)[None]) if found else torch.zeros(1, dtype=wide(device), device=device)
        if key is not None and key[1]:
            value = measure(collectives.all_rows(value, collectives.group_of(*key)).T.contiguous())
        norms.append(value)
    return measure(torch.cat(norms)[None])[0]


def _length(t: Any) -> Share:
    if not is_sharded(t):
        return Share(L2(), L2().measure(t.reshape(1, -1)), None, (), None, False)
    if any(p.is_partial() for p in t.placements):
        t = t.redistribute(placements=[_summed(p) for p in t.placements])
    place, local = Place.of(t), t.to_local()
    value = L2().measure(local.reshape(1, -1)) if local.numel() else torch.zeros(1, dtype=wide(local.device), device=local.device)
    return Share(L2(), value.to(wide(local.device)), place.mesh, place.dims, place, t.dtype == torch.float64)


def _summed(placement: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate() if placement.is_partial() else placement
