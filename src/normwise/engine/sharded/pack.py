"""Packs of DTensors. The tensors that their methods take and give are the parts that lie on this rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import Flat, Member, Pack, here, is_sharded, scale_tensors_
from normwise.engine.sharded import collectives
from normwise.engine.sharded.block_exchange import Owners
from normwise.engine.sharded.block_parts import Pieces
from normwise.engine.sharded.norms import Share, complete, simple
from normwise.engine.sharded.placement import Place
from normwise.low_precision import NOISE
from normwise.norms import L2, Norm, Radius, Set
from normwise.norms.base import clip_factor, radial_factor
from normwise.norms.reduce import compute_dtype, wide
from normwise.parameters.layouts import BlockView
from normwise.policy import actions

# What the owners of whole blocks have been given so far, by mesh.
Loads = dict[Any, list[float]]


def acts_on_entries(action: str, norm: Norm | Set) -> bool:
    """Whether the action changes every number by itself, so that nothing must be sent."""
    return action in ("project", "lmo") and norm.separable


class Split(Pack):
    """What packs of DTensors have in common."""

    agree = False
    """Whether every rank must know the norms of blocks that lie on others."""

    def _prepare(self) -> None:
        self._kept: dict[tuple[int, ...], Split] = {}
        self._measured: dict[Norm, list[Tensor]] = {}

    @functools.cached_property
    def _numbers(self) -> list[int]:
        return [Place.of(p).number if is_sharded(p) else 0 for p in self.params]

    def noise_numbers(self, states: Sequence[Mapping[str, Any]]) -> list[int]:
        """Of the part of each member that lies here, see ``Place.number``, where some state asks for it; 0 for members that are no
        DTensors."""
        return self._numbers if any(NOISE in s for s in states) else []

    def _smaller(self, members: list[Member]) -> Split:
        raise NotImplementedError

    def only(self, keep: Callable[[Member], bool]) -> Pack | None:
        """As of a plain pack; the same members are the same pack again."""
        kept = tuple(i for i, m in enumerate(self.members) if keep(m))
        if not kept or len(kept) == len(self.members):
            return self if kept else None
        if kept not in self._kept:
            self._kept[kept] = self._smaller([self.members[i] for i in kept])
        return self._kept[kept]

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [here(t) for t in tensors]

    def local_states(self, states: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        return [{name: here(value) for name, value in s.items()} for s in states]

    def may_branch(self, value: Tensor) -> bool:
        """Never: the ranks would decide differently, and wait for each other."""
        return False

    # ------------------------------------------------------------------------------------------------ norms

    def measure(self, norm: Norm, tensors: Sequence[Tensor], agree: bool = False) -> Tensor:
        """The norm of every block, the same on all ranks. Where each block lies whole on one rank nothing is sent, and blocks of others
        are 0, unless ``agree``."""
        if self._measured.get(norm):
            return self._measured[norm].pop(0)
        shares = self.shares(norm, tensors, agree)
        if shares is None:
            return self.whole(norm.measure, tensors, agree=agree)
        complete(shares)
        return self.finished(norm, shares)

    def shares(self, norm: Norm, tensors: Sequence[Tensor], agree: bool = False) -> list[Share] | None:
        """What this rank knows of the norms of the blocks; None where they need whole blocks."""
        raise NotImplementedError

    def finished(self, norm: Norm, shares: Sequence[Share]) -> Tensor:
        """The norms, once the shares are complete."""
        raise NotImplementedError

    def whole(self, value: Callable[..., Tensor], tensors: Sequence[Tensor], *given: Radius, agree: bool = False) -> Tensor:
        """``value(blocks, *given)``, one number a block, computed by the owners of whole blocks."""
        raise NotImplementedError

    def measure_whole(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        return self.whole(norm.measure, tensors, agree=True)

    def requests(self, norms: Callable[[], Iterable[tuple[Norm, Sequence[Tensor]]]]) -> list[tuple[Any, Norm, list[Tensor]]]:
        return [(self, norm, list(tensors)) for norm, tensors in norms()]

    def run(self, step: Iterator[Any]) -> list[Iterator[Any]]:
        return [step]

    def expect(self, norm: Norm, value: Tensor) -> None:
        """Keeps a value that the next ``measure`` of that norm returns."""
        self._measured.setdefault(norm, []).append(value)

    def forget(self) -> None:
        """Drops what was kept and not asked for."""
        for part in (self, *self._kept.values()):
            part._measured.clear()

    # ------------------------------------------------------------------------------------------------ actions

    def form(self, action: str, norm: Norm | Set) -> Any:
        """What gives the blocks that the action needs: single entries, or whole blocks at their owners."""
        return Entries(self) if acts_on_entries(action, norm) else self

    def each(self, values: Tensor) -> Tensor:
        """One number a block as one for each entry on this rank."""
        raise NotImplementedError

    def prox(self, norm: Norm, tensors: Sequence[Tensor], step: Radius, power: int) -> list[Tensor]:
        """As ``actions.prox``, on tensors: of L1 and L2 without any whole block."""
        base = simple(norm, self.block_shape)
        if base is not None and base[0].p == 2:
            if power == 2:
                steps = torch.as_tensor(step, dtype=torch.float64, device=self.params[0].device).expand(self.count)
                return self._scaled(tensors, 1 / (1 + steps))
            length = self.measure(L2(), tensors)
            return self._scaled(tensors, torch.where(length.isfinite(), 1 - clip_factor(length, step * base[1]), 1.0))
        form: Any = Entries(self) if norm.p == 1 else self
        blocks = form.gather(tensors)
        return form.split(actions.prox(norm, blocks, form.mine(step), power) if len(blocks) else blocks)

    def penalty_gradient(self, norm: Norm, tensors: Sequence[Tensor], power: int) -> list[Tensor]:
        """As ``actions.penalty_gradient``, on tensors."""
        base = simple(norm, self.block_shape)
        wider = [t.to(compute_dtype(t.dtype)) for t in tensors]
        if base is None or base[0].p == math.inf:
            blocks = self.gather(wider)
            return self.split(actions.penalty_gradient(norm, blocks, power) if len(blocks) else blocks)
        if base[0].p == 1:
            signs = [t.sign() * base[1] for t in wider]
            return signs if power == 1 else self._scaled(signs, self.measure(norm, tensors))
        if power == 2:
            return [t * base[1] ** 2 for t in wider]
        length = self.measure(norm, tensors) / base[1]
        return self._scaled(wider, torch.where(length > 0, base[1] / length, 0.0))

    def steepest(self, norm: Norm, tensors: Sequence[Tensor], of_blocks: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """−lmo(x, 1) of every block: signs and directions without whole blocks, others by ``of_blocks`` at their owners."""
        base = simple(norm, self.block_shape)
        if base is not None and base[0].p == math.inf:
            return [t.sign() / base[1] for t in tensors]
        if base is not None and base[0].p == 2:
            return self._scaled(tensors, radial_factor(self.measure(L2(), tensors), 1 / base[1]))
        blocks = self.gather(tensors)
        return self.split(of_blocks(blocks).to(tensors[0].dtype) if len(blocks) else blocks)

    def normalized(self, norm: Norm, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._scaled(tensors, radial_factor(self.measure(norm, tensors), 1.0))

    def norms_for(self, action: str, norm: Norm, power: int, tensors: list[Tensor]) -> list[tuple[Norm, Sequence[Tensor]]]:
        base = simple(norm, self.block_shape)
        if base is None or base[0].p == math.inf or (base[0].p == 2 and power == 2):
            return []
        if action == "prox":
            return [(L2(), tensors)] if base[0].p == 2 else []
        return [(norm, tensors)] if base[0].p == 2 or power == 2 else []

    def _scaled(self, tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
        copies = [t.clone() for t in tensors]
        self.scale_(copies, factor)
        return copies

    def counted(self, acted: Tensor) -> Tensor:
        for mesh, dims in self.spans():
            acted = 1 - collectives.all_rows((acted != 1).double(), collectives.group_of(mesh, dims)).amax(0)
        return acted

    def spans(self) -> list[tuple[Any, tuple[int, ...]]]:
        """The meshes, and the dimensions of each, that the members are split over."""
        raise NotImplementedError


class SplitPack(Split):
    """Members with the same view, mesh and placements."""

    def __init__(self, members: list[Member], agree: bool = False, loads: Loads | None = None) -> None:
        self.agree, self.loads = agree, {} if loads is None else loads
        super().__init__(members)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prepare()
        places = [Place.of(m.param, m.name) for m in self.members]    # each is checked
        self.place = places[0]
        self.pieces = Pieces(self.view.shape, self.view.order[: self.view.batch], self.place)
        self._owners: Owners | None = None
        self._rows: SplitPack | None = None

    def _smaller(self, members: list[Member]) -> SplitPack:
        return SplitPack(members, self.agree, self.loads)

    @property
    def owners(self) -> Owners:
        """Made when first asked for, by every rank: rules that need no whole block have none."""
        if self._owners is None:
            shape = self.view.block_shape
            cost = math.prod(shape) * (min(shape) if len(shape) == 2 else 1)
            self._owners = Owners(self.view, self.place, len(self.members), self.loads, float(cost))
        return self._owners

    def rows(self) -> SplitPack:
        """The same parameters with each row of each matrix as a block, known to every rank."""
        if self._rows is None:
            self._rows = SplitPack([Member(m.name, m.param, _row_view(m.view), m.optimizer) for m in self.members], agree=True)
        return self._rows

    def requests_of_rows(self, tensors: list[Tensor]) -> list[tuple[Any, Norm, list[Tensor]]]:
        return [(self.rows(), L2(), tensors)]

    def row_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        return (self.row_lengths(tensors).square() / self.view.block_shape[1]).view(self.count, -1)

    def over_rows(self, tensors: Sequence[Tensor], divisor: Tensor) -> list[Tensor]:
        return self.rows()._scaled(tensors, 1 / divisor.flatten())

    def row_lengths(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.rows().measure(L2(), tensors)

    def scale_rows_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        self.rows().scale_(tensors, factor)

    def spans(self) -> list[tuple[Any, tuple[int, ...]]]:
        return [(self.place.mesh, self.place.dims)] if self.place.dims else []

    def shares(self, norm: Norm, tensors: Sequence[Tensor], agree: bool = False) -> list[Share] | None:
        base = simple(norm, self.block_shape)
        if base is None:
            return None
        dims = self.place.dims if agree or self.agree or self.pieces.cut else ()
        parts = self.pieces.measure(base[0], tensors)
        return [Share(base[0], parts, self.place.mesh, dims, self.place, self.coarsest == torch.float64)]

    def finished(self, norm: Norm, shares: Sequence[Share]) -> Tensor:
        base = simple(norm, self.block_shape)
        assert base is not None and shares[0].total is not None
        return shares[0].total * base[1]

    def whole(self, value: Callable[..., Tensor], tensors: Sequence[Tensor], *given: Radius, agree: bool = False) -> Tensor:
        owners, blocks = self.owners, self.gather(tensors)
        known = self.spread(value(blocks, *(self.mine(g) for g in given)) if len(blocks) else torch.empty(0))
        silent = not self.place.dims or (owners.whole_here and not (agree or self.agree))
        return known if silent else collectives.all_sum(known, collectives.group_of(self.place.mesh, self.place.dims))

    def spread(self, values: Tensor) -> Tensor:
        """One number for each owned block as one for each block of the pack, 0 for those of others."""
        device = self.params[0].device
        every = torch.zeros(self.count, dtype=wide(device), device=device)
        every[self.owners.owned.to(device)] = values.to(every)
        return every

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        opened = self.pieces.expand(factor.view(len(tensors), -1))
        scale_tensors_(list(tensors), opened)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The blocks that this rank owns, ``(owned, *block_shape)``."""
        return self.owners.gather(tensors)

    def mine(self, radius: Radius) -> Radius:
        return radius[self.owners.owned.to(radius.device)] if isinstance(radius, Tensor) and radius.ndim else radius

    def split(self, blocks: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(t, dtype=blocks.dtype) for t in self.local(self.params)]
        self.owners.scatter(blocks, parts)
        return parts

    def write_(self, tensors: Sequence[Tensor], blocks: Tensor) -> None:
        self.owners.scatter(blocks.to(tensors[0].dtype), tensors)

    def largest(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The largest of what all ranks of the mesh know: each has seen its own part of the batch, or of the heads."""
        mesh = self.place.mesh
        return collectives.largest_on_any(values, collectives.group_of(mesh, tuple(range(mesh.ndim))))

    def told(self, acted: Tensor) -> Tensor:
        return 1 - self.spread(1 - acted)

    def each(self, values: Tensor) -> Tensor:
        parts = self.local(self.params)
        opened = self.pieces.expand(values.view(len(parts), -1))
        return torch.cat([o.expand(p.shape).reshape(-1) for o, p in zip(opened.unbind(), parts, strict=True)])


class Loose(Split):
    """DTensors of any shapes, for steps that act on entries alone."""


class SplitFlat(Split, Flat):
    """All members as one block, some of them DTensors, of any meshes; plain ones are the same on every rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prepare()
        self.places = {id(m.param): Place.of(m.param, m.name) for m in self.members if is_sharded(m.param)}

    def _smaller(self, members: list[Member]) -> SplitFlat:
        return SplitFlat(members)

    def measure_whole(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        return self.measure(norm, tensors)

    def spans(self) -> list[tuple[Any, tuple[int, ...]]]:
        return list({(p.mesh, p.dims): None for p in self.places.values() if p.dims})

    def shares(self, norm: Norm, tensors: Sequence[Tensor], agree: bool = False) -> list[Share] | None:
        """One for each way that members are split, and one of those that are whole."""
        base = simple(norm, self.block_shape)
        assert base is not None, "one vector of all is measured in entrywise norms"
        alike: dict[Any, list[Tensor]] = {}
        places: dict[Any, Place] = {}
        for p, t in zip(self.params, tensors, strict=True):
            place = self.places.get(id(p))
            key = (place.mesh, place.dims) if place is not None and place.dims else None
            alike.setdefault(key, []).append(t)
            if place is not None:
                places[key] = place
        return [self._share(base[0], parts, places.get(key) if key else None) for key, parts in alike.items()]

    def _share(self, norm: Norm, parts: list[Tensor], place: Place | None) -> Share:
        device = parts[0].device
        values = [norm.measure(t.reshape(1, -1)).to(device, wide(device)) for t in parts if t.numel()]
        value = norm.measure(torch.cat(values)[None]) if values else torch.zeros(1, dtype=wide(device), device=device)
        mesh, dims = (place.mesh, place.dims) if place is not None else (None, ())
        return Share(norm, value, mesh, dims, place, self.coarsest == torch.float64)

    def finished(self, norm: Norm, shares: Sequence[Share]) -> Tensor:
        base = simple(norm, self.block_shape)
        assert base is not None
        totals = [s.total for s in shares if s.total is not None]
        return base[0].measure(torch.cat(totals)[None]) * base[1]

    def each(self, values: Tensor) -> Tensor:
        return values.expand(sum(t.numel() for t in self.local(self.params)))


@dataclass(eq=False)
class Entries:
    """The numbers of a pack on this rank as blocks of one each, for what acts on each by itself."""

    pack: Split

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """``(entries, 1)``."""
        return torch.cat([t.reshape(-1) for t in tensors])[:, None]

    def mine(self, radius: Radius) -> Radius:
        """One number a block as one an entry."""
        return self.pack.each(radius) if isinstance(radius, Tensor) and radius.ndim else radius

    def split(self, blocks: Tensor) -> list[Tensor]:
        """The entries in the shapes of this rank's parts."""
        parts = self.pack.local(self.pack.params)
        return [b.view(p.shape) for b, p in zip(torch.split(blocks[:, 0], [p.numel() for p in parts]), parts, strict=True)]

    def write_(self, tensors: Sequence[Tensor], blocks: Tensor) -> None:
        """Replaces the tensors by the entries."""
        torch._foreach_copy_(list(tensors), self.split(blocks))

    def told(self, acted: Tensor) -> Tensor:
        """1 for each block of which nothing here changed."""
        blocks = self.pack.each(torch.arange(self.pack.count, device=acted.device))[acted != 1]
        return torch.ones(self.pack.count, dtype=acted.dtype, device=acted.device).index_fill(0, blocks, 0.0)

    def counted(self, acted: Tensor) -> Tensor:
        """See :meth:`Split.counted`."""
        return self.pack.counted(acted)

    def may_branch(self, value: Tensor) -> bool:
        """See :meth:`Split.may_branch`."""
        return False


def _row_view(view: BlockView) -> BlockView:
    """The view whose blocks are the rows of a view's matrices."""
    axes, rows = 0, 1
    while rows < view.block_shape[0]:
        rows *= view.shape[view.order[view.batch + axes]]
        axes += 1
    return BlockView(view.shape, view.order, view.batch + axes, view.block_shape[1:], view.count * rows, view.kernel)
