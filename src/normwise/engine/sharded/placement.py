"""Which part of a parameter lies on which rank."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from normwise.engine.sharded import collectives
from normwise.errors import PolicyError

# For each dimension of a parameter the indices that a rank holds; it holds their cross product.
Indices = tuple[Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where a DTensor lies: its mesh, what each mesh dimension does to it, and its whole shape."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, t: Any, name: str = "a parameter") -> Place:
        """The place of a DTensor. PolicyError for one that is no split into parts, or whose parts are not where they should be."""
        place = cls(t.device_mesh, tuple(t.placements), tuple(t.shape))
        if any(p.is_partial() for p in place.placements):
            raise PolicyError(f"{name!r} has the placements {place.placements}: sums that are not complete have no norm; redistribute it.")
        local = tuple(t.to_local().shape)
        if place.here is not None and tuple(len(i) for i in place.indices(place.here)) != local:
            raise PolicyError(
                f"{name!r} of shape {place.shape} under {place.placements} has the part {local} here, which is not what these placements "
                "give: split it evenly, or keep it whole."
            )
        return place

    @cached_property
    def here(self) -> tuple[int, ...] | None:
        """This rank's coordinate in the mesh; None outside of it."""
        found = self.mesh.get_coordinate()
        return None if found is None else tuple(found)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The mesh dimensions that split the parameter, over more than one rank."""
        if self.here is None:    # nothing lies here, and the others do not wait for this rank
            return ()
        return tuple(i for i, p in enumerate(self.placements) if hasattr(p, "dim") and self.mesh.size(i) > 1)

    @property
    def number(self) -> int:
        """Of the part that lies here: from 1 on, the same for copies; 0 for a parameter that is whole here, or not here at all."""
        if self.here is None or not self.dims:
            return 0
        # Mixed radix over the mesh dimensions that split it: copies along the others get the same number.
        index = 0
        for d in self.dims:
            index = index * self.mesh.size(d) + self.here[d]
        return 1 + index

    def indices(self, coordinate: tuple[int, ...]) -> Indices:
        """What the rank at ``coordinate`` holds. A strided split (FSDP over tensor parallelism) happens after the plain ones."""
        held = [torch.arange(n) for n in self.shape]
        # The order matters: FSDP over tensor parallelism cuts rows that the inner split has cut before.
        for i in sorted(self.dims, key=lambda i: (1, -i) if hasattr(self.placements[i], "split_factor") else (0, i)):
            dim = self.placements[i].dim % len(self.shape)
            held[dim] = _piece(held[dim], self.mesh.size(i), coordinate[i])
        return tuple(held)

    def leads(self, dims: tuple[int, ...]) -> bool:
        """Whether this rank speaks for its part among its copies along ``dims``: what is replicated counts once."""
        return self.here is not None and all(self.here[d] == 0 for d in dims if d not in self.dims)

    def peers(self) -> list[tuple[int, ...]]:
        """The coordinates of the ranks that hold the other parts beside this rank's own, in the order of their group."""
        assert self.here is not None
        ranks = collectives.ranks_of(collectives.group_of(self.mesh, self.dims)) if self.dims else []
        spans = [range(self.mesh.size(i)) if i in self.dims else [c] for i, c in enumerate(self.here)]
        found = {int(self.mesh.mesh[c]): c for c in itertools.product(*spans)}
        return [found[r] for r in ranks] or [self.here]


def _piece(held: Tensor, parts: int, which: int) -> Tensor:
    """The ``which``-th of ``parts``, as ``torch.chunk`` cuts: the last ones may be short, or empty."""
    size = -(-len(held) // parts)
    return held[which * size : (which + 1) * size]
