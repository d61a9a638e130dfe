"""The parts of blocks in one rank's part of a parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normwise.engine.sharded.block_exchange import dims_of_axes
from normwise.engine.sharded.placement import Place
from normwise.norms import Norm
from normwise.norms.reduce import wide


class Pieces:
    """The parts of blocks that lie in one rank's part of a parameter, and which blocks they are parts of."""

    def __init__(self, shape: tuple[int, ...], batch: tuple[int, ...], place: Place) -> None:
        self.held = place.indices(place.here) if place.here is not None else tuple(torch.arange(0) for _ in place.shape)
        homes = dims_of_axes(shape, place.shape)
        self.count = math.prod(shape[a] for a in batch)
        self.coordinates = [_block_part(i, d, shape, batch, homes) for d, i in enumerate(self.held)]
        alone = [math.prod(shape[a] for a in range(len(shape)) if homes[a] == d and a not in batch) for d in range(len(place.shape))]
        self.mixed = [d for d, n in enumerate(alone) if self.coordinates[d] is not None and n > 1]
        split = {place.placements[i].dim % len(place.shape) for i in place.dims}
        # Whether any block lies on more than one rank.
        self.cut = any(alone[d] > 1 and not _even(place, d, self._block_of(d, shape, batch, homes)) for d in split)
        self.ids = self._ids()

    @staticmethod
    def _block_of(d: int, shape: tuple[int, ...], batch: tuple[int, ...], homes: list[int]) -> Callable[[Tensor], Tensor | None]:
        return lambda indices: _block_part(indices, d, shape, batch, homes)

    def _ids(self) -> Tensor:
        """The block of every entry here, of a shape that broadcasts against the part."""
        ids = torch.zeros([1] * len(self.held), dtype=torch.long)
        for d, c in enumerate(self.coordinates):
            if c is not None:
                ids = ids + c.view([-1 if k == d else 1 for k in range(len(self.held))])
        return ids

    def expand(self, values: Tensor) -> Tensor:
        """``(k, count)``, one number a block, as ``(k, ...)`` that broadcasts against the parts."""
        return values[:, self.ids.to(values.device)]

    def measure(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        """The norms of the parts of blocks that are here, ``(k · count,)``; 0 for others."""
        first, k = tensors[0], len(tensors)
        found = torch.zeros(k, self.count, dtype=wide(first.device), device=first.device)
        if first.numel():
            stacked = torch.stack(list(tensors)) if k > 1 else first[None]
            self._measure(norm, stacked, self.ids.to(first.device), list(self.mixed), found)
        return found.view(-1)

    def _measure(self, norm: Norm, stacked: Tensor, ids: Tensor, mixed: list[int], found: Tensor) -> None:
        if mixed:
            self._by_block(norm, stacked, ids, mixed, found)
            return
        batch = [d for d, c in enumerate(self.coordinates) if c is not None and ids.shape[d] > 1]
        order = [0, *(d + 1 for d in batch), *(d + 1 for d in range(len(self.held)) if d not in batch)]
        rows = stacked.permute(order).reshape(stacked.shape[0] * math.prod(stacked.shape[d + 1] for d in batch), -1)
        found[:, ids.reshape(-1)] = norm.measure(rows).to(found.dtype).view(stacked.shape[0], -1)

    def _by_block(self, norm: Norm, stacked: Tensor, ids: Tensor, mixed: list[int], found: Tensor) -> None:
        """A dimension of which a block has several indices: block by block."""
        d, coordinate = mixed[0], self.coordinates[mixed[0]]
        assert coordinate is not None
        for value in sorted(set(coordinate.tolist())):
            where = torch.nonzero(coordinate == value).flatten().to(stacked.device)
            self._measure(norm, stacked.index_select(d + 1, where), ids.index_select(d, where[:1]), mixed[1:], found)


def _block_part(indices: Tensor, d: int, shape: tuple[int, ...], batch: tuple[int, ...], homes: list[int]) -> Tensor | None:
    """What the indices of tensor dimension ``d`` add to the number of a block; None where it holds no block axis."""
    mine = [a for a in batch if homes[a] == d]
    if not mine:
        return None
    total = torch.zeros_like(indices)
    for a in mine:
        stride = math.prod(n for b, n in enumerate(shape) if b > a and homes[b] == d)
        weight = math.prod(shape[b] for b in batch[batch.index(a) + 1 :])
        total += torch.div(indices, stride, rounding_mode="floor") % shape[a] * weight
    return total


def _even(place: Place, d: int, block_of: Callable[[Tensor], Tensor | None]) -> bool:
    """Whether every block's indices of dimension ``d`` lie on one rank."""
    seen: set[int] = set()
    if place.here is None:
        return True
    parts = {tuple(place.indices(c)[d].tolist()) for c in place.peers()}
    for part in parts:
        blocks = block_of(torch.tensor(part, dtype=torch.long))
        mine = set(blocks.tolist()) if blocks is not None else {0}
        if mine & seen:
            return False
        seen |= mine
    return True
