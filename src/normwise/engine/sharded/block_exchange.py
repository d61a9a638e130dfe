"""Whole blocks at one owner each: what is split over ranks is brought together there, worked on, and sent back."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normwise.engine.sharded import collectives
from normwise.engine.sharded.placement import Indices, Place
from normwise.parameters.layouts import BlockView


@dataclass(frozen=True)
class Lead:
    """The axis along which a parameter is handed out: its leading block axes within one tensor dimension, as one axis.

    ``shape``, ``order``, ``batch``: the view with these axes merged. ``dim``: the tensor dimension, None where there is one block.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    batch: int
    dim: int | None
    axis: int
    size: int
    stride: int


def lead_of(view: BlockView, shape: tuple[int, ...]) -> Lead:
    """The leading axis of a view of a parameter of ``shape``."""
    if view.batch == 0:
        return Lead(view.shape, view.order, 0, None, 0, 1, 1)
    homes = dims_of_axes(view.shape, shape)
    first = view.order[0]
    run = [first]
    # Only an axis that begins its dimension may be merged with the next: else the merged one would have gaps.
    begins = first == 0 or homes[first - 1] != homes[first]
    while begins and len(run) < view.batch and view.order[len(run)] == run[-1] + 1 and homes[run[-1] + 1] == homes[first]:
        run.append(run[-1] + 1)
    size = math.prod(view.shape[a] for a in run)
    merged = (*view.shape[:first], size, *view.shape[run[-1] + 1 :])
    order = tuple(a if a <= first else a - len(run) + 1 for a in view.order if a not in run[1:])
    stride = math.prod(n for a, n in enumerate(view.shape) if a > run[-1] and homes[a] == homes[first])
    return Lead(merged, order, view.batch - len(run) + 1, homes[first], first, size, stride)


def dims_of_axes(fine: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """For each axis of a split shape the tensor dimension that it is a part of."""
    homes, dim, left = [], 0, shape[0] if shape else 1
    for size in fine:
        # An axis of size 1 belongs to the dimension at hand: it splits nothing.
        while size > 1 and left == 1 and dim < len(shape) - 1:
            dim, left = dim + 1, shape[dim + 1]
        homes.append(dim)
        left //= max(size, 1)
    return homes


@dataclass(frozen=True)
class Slab:
    """The blocks ``start`` to ``stop`` along the leading axis of one member, and the rank of the group that owns them."""

    member: int
    start: int
    stop: int
    owner: int


@dataclass(eq=False)
class Piece:
    """What one rank holds of one slab: where that lies in its part, and where in the slab."""

    slab: Slab
    local: Indices
    within: Indices

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(i) for i in self.within)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Owners:
    """Which rank works on which blocks of ``members`` parameters of one view and place; built once.

    Blocks that lie whole on a rank stay there. The others are handed out evenly by cost; ``loads``, one number a rank, is kept over packs
    so that each does not begin with the same rank.
    """

    def __init__(self, view: BlockView, place: Place, members: int, loads: dict[Any, list[float]], cost: float = 1.0) -> None:
        self.view, self.place, self.members = view, place, members
        self.lead = lead_of(view, place.shape)
        self.peers = place.peers()
        self.held = [place.indices(c) for c in self.peers]
        self.me = self.peers.index(place.here) if place.here is not None else 0
        self.homes = self._homes()
        self.whole_here = self.homes is not None
        self.slabs = self._at_home() if self.homes is not None else self._handed_out(loads, cost)
        self.mine = [s for s in self.slabs if s.owner == self.me]
        self.give = [self._piece(s, self.me) for s in sorted(self.slabs, key=lambda s: s.owner)]
        self.take = [[self._piece(s, r) for s in self.mine] for r in range(len(self.peers))]

    # ------------------------------------------------------------------------------------------------ who owns what

    def _homes(self) -> list[int] | None:
        """For each place on the leading axis the rank that holds it whole; None where there is one that nobody does."""
        homes = [-1] * self.lead.size
        for r, held in enumerate(self.held):
            whole = all(len(i) == n for d, (i, n) in enumerate(zip(held, self.place.shape, strict=True)) if d != self.lead.dim)
            for x in self._complete(held) if whole else ():
                homes[x] = r
        return homes if -1 not in homes else None

    def _complete(self, held: Indices) -> list[int]:
        lead = self.lead
        if lead.dim is None:
            return [0]
        # A place counts as whole only if this rank has every index of it, in each of the dimensions.
        counts = torch.bincount(self._coordinate(held[lead.dim]), minlength=lead.size)
        return torch.nonzero(counts * lead.size == self.place.shape[lead.dim]).flatten().tolist() if lead.size else []

    def _coordinate(self, indices: Tensor) -> Tensor:
        """The coordinate on the leading axis of indices of its tensor dimension."""
        return torch.div(indices, self.lead.stride, rounding_mode="floor") % max(self.lead.size, 1)

    def _at_home(self) -> list[Slab]:
        assert self.homes is not None
        edges = [x for x in range(self.lead.size) if x == 0 or self.homes[x] != self.homes[x - 1]]
        spans = list(zip(edges, [*edges[1:], self.lead.size], strict=True))
        return [Slab(m, a, b, self.homes[a]) for m in range(self.members) for a, b in spans]

    def _handed_out(self, loads: dict[Any, list[float]], cost: float) -> list[Slab]:
        ranks, size = len(self.peers), self.lead.size
        load = loads.setdefault((self.place.mesh, self.place.dims), [0.0] * ranks)
        # Always to the rank with the least work so far; the loads are kept over packs, or rank 0 would begin each of them.
        heap = [(carried, r) for r, carried in enumerate(load)]
        heapq.heapify(heap)
        quota = [0] * ranks
        for _ in range(self.members * size):
            least, r = heap[0]
            heapq.heapreplace(heap, (least + cost, r))
            quota[r] += 1
            load[r] += cost
        # Each rank gets neighbouring blocks, so that few slabs are sent and most are views.
        return list(self._runs(quota, size))

    def _runs(self, quota: list[int], size: int) -> Any:
        at = 0
        for owner, items in enumerate(quota):
            end = at + items
            while at < end:
                member, start = divmod(at, size)
                stop = min(size, start + end - at)
                yield Slab(member, start, stop, owner)
                at += stop - start

    def _piece(self, slab: Slab, rank: int) -> Piece:
        held, lead = self.held[rank], self.lead
        local, within = [torch.arange(len(i)) for i in held], list(held)
        if lead.dim is not None:
            coordinate = self._coordinate(held[lead.dim])
            inside = (coordinate >= slab.start) & (coordinate < slab.stop)
            local[lead.dim] = torch.nonzero(inside).flatten()
            within[lead.dim] = torch.searchsorted(self._span(slab), held[lead.dim][inside])
        return Piece(slab, tuple(local), tuple(within))

    def _span(self, slab: Slab) -> Tensor:
        """The indices of a slab in the tensor dimension that it is cut from."""
        assert self.lead.dim is not None
        every = torch.arange(self.place.shape[self.lead.dim])
        coordinate = self._coordinate(every)
        return every[(coordinate >= slab.start) & (coordinate < slab.stop)]

    def _shape(self, slab: Slab) -> tuple[int, ...]:
        sizes = list(self.place.shape)
        if self.lead.dim is not None:
            sizes[self.lead.dim] = sizes[self.lead.dim] // max(self.lead.size, 1) * (slab.stop - slab.start)
        return tuple(sizes)

    # ------------------------------------------------------------------------------------------------ there and back

    @property
    def owned(self) -> Tensor:
        """The indices, in the pack, of the blocks that this rank owns."""
        rest = self.view.count // max(self.lead.size, 1)
        spans = [torch.arange(s.start * rest, s.stop * rest) + s.member * self.view.count for s in self.mine]
        return torch.cat(spans) if spans else torch.arange(0)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The blocks that this rank owns, ``(owned, *block_shape)``, from everybody's parts."""
        first = tensors[0]
        if self.whole_here:
            wholes = [_cut(tensors[p.slab.member], p.local) for p in self.take[self.me]]
        else:
            wholes = self._receive(tensors)
        blocks = [self._blocks(w, s) for w, s in zip(wholes, self.mine, strict=True)]
        return torch.cat(blocks) if blocks else first.new_empty((0, *self.view.block_shape))

    def _receive(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        sent = [_cut(tensors[p.slab.member], p.local).reshape(-1) for p in self.give]
        got = collectives.exchange(torch.cat(sent), self._given(), self._taken(), self._group())
        wholes = {s: got.new_empty(self._shape(s)) for s in self.mine}
        pieces = [p for row in self.take for p in row]
        for p, numbers in zip(pieces, torch.split(got, [p.numel for p in pieces]), strict=True):
            _put_(wholes[p.slab], p.within, numbers.view(p.shape))
        return [wholes[s] for s in self.mine]

    def scatter(self, blocks: Tensor, into: Sequence[Tensor]) -> None:
        """Writes the blocks that this rank owns, and those that others own, into everybody's parts."""
        rest = self.view.count // max(self.lead.size, 1)
        parts = torch.split(blocks, [(s.stop - s.start) * rest for s in self.mine])
        wholes = {s: self._unblocked(part, s) for s, part in zip(self.mine, parts, strict=True)}
        if self.whole_here:
            for p in self.take[self.me]:
                _put_(into[p.slab.member], p.local, wholes[p.slab])
            return
        sent = [_cut(wholes[p.slab], p.within).reshape(-1) for row in self.take for p in row]
        # The empty tensor gives a dtype to a rank that owns nothing and must still take part.
        got = collectives.exchange(torch.cat([blocks.new_empty(0), *sent]), self._taken(), self._given(), self._group())
        for p, numbers in zip(self.give, torch.split(got, [p.numel for p in self.give]), strict=True):
            _put_(into[p.slab.member], p.local, numbers.view(p.shape))

    def _blocks(self, whole: Tensor, slab: Slab) -> Tensor:
        return whole.reshape(self._opened(slab)).permute(self.lead.order).reshape(-1, *self.view.block_shape)

    def _unblocked(self, blocks: Tensor, slab: Slab) -> Tensor:
        opened, order = self._opened(slab), self.lead.order
        inverse = [order.index(axis) for axis in range(len(order))]
        return blocks.reshape([opened[axis] for axis in order]).permute(inverse).reshape(self._shape(slab))

    def _opened(self, slab: Slab) -> tuple[int, ...]:
        sizes = list(self.lead.shape)
        if self.lead.dim is not None:
            sizes[self.lead.axis] = slab.stop - slab.start
        return tuple(sizes)

    def _given(self) -> list[int]:
        counts = [0] * len(self.peers)
        for p in self.give:
            counts[p.slab.owner] += p.numel
        return counts

    def _taken(self) -> list[int]:
        return [sum(p.numel for p in row) for row in self.take]

    def _group(self) -> Any:
        return collectives.group_of(self.place.mesh, self.place.dims)


def _cut(t: Tensor, indices: Indices) -> Tensor:
    for d, wanted in enumerate(indices):
        if len(wanted) != t.shape[d]:
            t = t.narrow(d, int(wanted[0]), len(wanted)) if _in_row(wanted) else t.index_select(d, wanted.to(t.device))
    return t


def _put_(t: Tensor, indices: Indices, numbers: Tensor) -> None:
    if all(_in_row(i) for i in indices):
        for d, wanted in enumerate(indices):
            t = t.narrow(d, int(wanted[0]), len(wanted))
        t.copy_(numbers)
    # Indices with gaps, as strided splits leave them; a part may also be empty.
    elif numbers.numel():
        t[torch.meshgrid(*(i.to(t.device) for i in indices), indexing="ij")] = numbers.to(t.dtype)


def _in_row(indices: Tensor) -> bool:
    return len(indices) > 0 and int(indices[-1]) - int(indices[0]) == len(indices) - 1
