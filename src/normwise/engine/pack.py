"""Packs: members of equal shape, dtype and device that are gathered into one batch of blocks, run at once and written back.

A pack of DTensors (``engine.sharded.pack``) has the same methods, and does more in them. Nobody who has a pack asks which it is:
``engine.sharded.grouping`` decides when it makes them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import PolicyError
from normwise.norms import L2, Norm, Radius, Set, cuda_kernels, native
from normwise.norms.base import radial_factor, two_steps
from normwise.norms.reduce import column_norms, compute_dtype, may_branch, up, wide
from normwise.parameters.computed_weights import Computed, in_batches
from normwise.parameters.layouts import BlockView, overlaps
from normwise.policy import actions

# Tensors above this are run alone: copying them into one batch costs more than the calls it saves.
ALONE_FROM_BYTES = 1 << 20
# One batch of small tensors: what a rule needs of scratch memory at most.
SCRATCH_BYTES = 8 << 20


PLAIN = (Tensor, nn.Parameter)


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor; told without importing it, which costs 0.4 s."""
    # Asked for every tensor at every step: an attribute that is missing costs a microsecond.
    return type(t) not in PLAIN and hasattr(t, "placements") and hasattr(t, "device_mesh")


def here(t: Tensor) -> Tensor:
    """What lies on this rank of a tensor: of a DTensor its part, of another all."""
    return t.to_local() if is_sharded(t) else t    # type: ignore[attr-defined]


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to."""
    return [here(t)._version for t in tensors]


WITNESSES = 8
"""Tensors that are looked at where a step changes all of them or none."""


def witnesses(tensors: Sequence[Any]) -> list[Any]:
    """A few of many tensors, evenly spread."""
    return list(tensors[:: max(1, len(tensors) // WITNESSES)])


class Look:
    """How some weights looked, to tell later whether anybody has moved them: how often each was written to, and the sum of the first row of
    a few, since torch's fused optimizers write without counting."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._versions, self._sums = versions(params), _sums(params)

    def same(self, params: Sequence[Tensor]) -> bool:
        """Whether none has moved, as far as one can tell. Waits for a device where no weight was written to by a counted call."""
        return self._versions == versions(params) and all(map(_equal, self._sums, _sums(params)))


def _sums(params: Sequence[Tensor]) -> list[Tensor]:
    """Of plain tensors, in fp32 at least: what a tensor of another kind gives for a row, nobody knows."""
    rows = [t[:1] if t.ndim else t for t in (here(p.detach()) for p in witnesses(params)) if _has_rows(t)]
    return [row.sum(dtype=row.dtype if row.dtype.itemsize > 2 else torch.float32) for row in rows]


def _has_rows(t: Tensor) -> bool:
    return type(t) is Tensor and t.layout == torch.strided and not t.is_meta and t.is_floating_point()


def _equal(a: Tensor, b: Tensor) -> bool:
    """NaN, too, is what it was."""
    return bool((a == b) | ((a != a) & (b != b)))


FLAT = ("_is_flat_param", "_fsdp_flattened")
"""What FullyShardedDataParallel marks its flat pieces with."""


def refuse_memory(p: Tensor, name: str) -> None:
    """Refuses a parameter of which several entries are one place in memory: a step of one would be a step of all. And a flat piece."""
    if p.layout == torch.strided and overlaps(here(p).shape, here(p).stride()):
        raise PolicyError(
            f"{name} of shape {tuple(p.shape)} and strides {here(p).stride()} has entries that overlap in memory, as those of expand() do: "
            "nothing can be written to one alone. Give a parameter of its own memory: nn.Parameter(tensor.contiguous())."
        )
    if any(getattr(p, mark, False) for mark in FLAT):
        raise PolicyError(
            f"{name} is a flat shard of FullyShardedDataParallel, which no longer knows its matrix: use fully_shard (FSDP2), whose "
            "parameters are DTensors, or attach rules to a model that is not wrapped."
        )


@dataclass(eq=False)
class Member:
    """One parameter under one rule."""

    name: str
    param: nn.Parameter
    view: BlockView
    optimizer: int
    radius: Tensor | None = None
    """``"init"``: the norms of its blocks at attach, ``(count,)``."""
    center: Tensor | None = None
    center_norm: Tensor | None = None
    computed: Computed | None = None
    """How a weight is computed that is no parameter itself; ``param`` is then the one whose gradient and rate count for it."""
    margin: float = 0.0
    """The share by which a norm of a computed weight may differ from that of what was assigned."""
    depends_on: tuple[nn.Parameter, ...] = ()
    """The trained parameters that a computed weight depended on when the rule was bound."""
    moved_by: frozenset[int] = frozenset()
    """Further optimizers whose steps move a computed weight."""
    shape: tuple[int, ...] = field(init=False)
    """That the parameter had when bound."""

    def __post_init__(self) -> None:
        self.shape = tuple(self.param.shape)

    @property
    def weight(self) -> Tensor:
        """What rules on weights work on: the parameter, or the memory that a computed weight is read into."""
        if self.computed is None:
            return self.param
        return self.computed.read() if self.computed.tensor is None else self.computed.tensor

    def now(self) -> Tensor:
        """The weight as it is now."""
        return self.param.detach() if self.computed is None else self.computed.read()


@dataclass(eq=False)
class Pack:
    """Members with the same view. Every method takes the tensors to work on, in the members' order and shape."""

    members: list[Member]
    view: BlockView = field(init=False)
    params: list[Tensor] = field(init=False)
    weights: list[Tensor] = field(init=False)
    computed: list[Any] = field(init=False)
    """Of the members' weights that are computed from other tensors what reads them before a rule and writes them after it; empty for
    nearly every pack."""
    margin: float = field(init=False)
    optimizers: frozenset[int] = field(init=False)
    coarsest: torch.dtype = field(init=False)
    block_shape: tuple[int, ...] = field(init=False)
    axes: native.Axes | None = field(init=False)
    """A member as (outer, units, inner) in memory, where a block is all entries of one unit: rows, columns, or what lies between."""

    def __post_init__(self) -> None:
        self.view = self.members[0].view
        self.params = [m.param for m in self.members]
        computed = [m.computed for m in self.members if m.computed is not None]
        self.computed = in_batches(computed) if computed else []
        self.weights = [m.weight for m in self.members]
        self.margin = max(m.margin for m in self.members)
        self.optimizers = frozenset(m.optimizer for m in self.members).union(*(m.moved_by for m in self.members))
        self.coarsest = max((w.dtype for w in self.weights), key=lambda dtype: torch.finfo(dtype).eps)
        self.block_shape = self.view.block_shape
        first = self.view.order[0] if self.view.batch else 0
        together = self.view.order[: self.view.batch] == tuple(range(first, first + self.view.batch))
        ends = self.view.shape[:first], self.view.shape[first : first + self.view.batch], self.view.shape[first + self.view.batch :]
        self.axes = tuple(map(math.prod, ends)) if together and self.view.count and math.prod(self.view.shape) else None    # type: ignore[assignment]

    @cached_property
    def workspace(self) -> native.Workspace:
        """For the kernels: kept, since a step that makes it anew takes longer than the kernels."""
        return native.Workspace(self.weights, self.axes or (1, 1, 1))

    def placed(self, tensors: Sequence[Any], held: bool = False) -> bool:
        """Whether there are kernels, and these can work on the tensors, which are then placed in the workspace. held: the weights."""
        if native.library() is None:
            return False
        return self.workspace.place_again(tensors) if held else native.fit(tensors) and self.workspace.place(tensors)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """The shape of a member that is one matrix in memory, or the transpose of one; None where it is neither."""
        view, shape = self.view, self.weights[0].shape
        if view.batch or len(self.block_shape) != 2:
            return None
        if view.order == tuple(range(len(view.order))):
            return self.block_shape[0], self.block_shape[1]
        return (shape[0], shape[1]) if len(shape) == len(view.order) == 2 else None

    # ------------------------------------------------------------------------------------------------ which blocks there are

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return self.view.count * len(self.members)

    def holders(self) -> list[tuple[str, int, torch.device]]:
        """Under which names something is kept for the blocks, in their order: (name, how many of them, device)."""
        return [(m.name, self.view.count, m.param.device) for m in self.members]

    def block(self, index: int) -> tuple[str, int]:
        """The name that has the ``index``-th block, and which of its blocks it is."""
        return self.members[index // self.view.count].name, index % self.view.count

    def only(self, keep: Callable[[Member], bool]) -> Pack | None:
        """This pack with the members that ``keep`` accepts; itself where that is all of them, None where it is none."""
        kept = [m for m in self.members if keep(m)]
        if len(kept) == len(self.members):
            return self
        return type(self)(kept) if kept else None

    # ------------------------------------------------------------------------------------------------ what lies on this rank

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What lies on this rank of tensors like the members: what the other methods take."""
        return list(tensors)

    def local_states(self, states: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """What lies on this rank of the members' states."""
        return states

    def noise_numbers(self, states: Sequence[Mapping[str, Any]]) -> list[int]:
        """For random rounding: which part of each member lies here, so that equal parts round alike. Empty where all of it does."""
        return []

    def mine(self, radius: Radius) -> Radius:
        """Of one number a block those of the blocks that ``gather`` gives on this rank."""
        return radius

    def told(self, acted: Tensor) -> Tensor:
        """One number for each block that ``gather`` gives here as one for every block of the pack."""
        return acted

    def counted(self, acted: Tensor) -> Tensor:
        """What became of blocks (1 where nothing did) on whichever rank they lie."""
        return acted

    def largest(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The largest of what any rank knows."""
        return list(values)

    def may_branch(self, value: Tensor) -> bool:
        """Whether the program may read numbers of the pack: that costs no synchronisation, and no other rank waits for what is left out."""
        return may_branch(value)

    def requests(self, norms: Callable[[], Iterable[tuple[Norm, Sequence[Tensor]]]]) -> list[tuple[Any, Norm, list[Tensor]]]:
        """What is to be measured together with the norms of other packs, in one collective; nothing where all blocks lie here."""
        return []

    def run(self, step: Iterator[Any]) -> list[Iterator[Any]]:
        """Takes a step that stops where it is about to measure, and yields what, to its end: its scratch memory is then free for the next
        pack. Gives back what must wait for other packs, to be measured together: nothing where all blocks lie here."""
        for _ in step:
            pass
        return []

    def norms_for(self, action: str, norm: Norm, power: int, tensors: list[Tensor]) -> list[tuple[Norm, Sequence[Tensor]]]:
        """What ``prox`` or ``penalty_gradient`` will measure of the tensors."""
        return []

    # ------------------------------------------------------------------------------------------------ blocks there and back

    def form(self, action: str, norm: Norm | Set) -> Any:
        """What gives the blocks that the action needs; for an action on single entries these may be entries."""
        return self

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """All blocks, ``(members · count, *block_shape)``; a view where one tensor's strides allow."""
        return self._blocks(tensors, torch.stack)

    def borrow(self, tensors: Sequence[Tensor]) -> Tensor:
        """As ``gather``, in memory that the next measurement overwrites."""
        return self._blocks(tensors, _stacked)

    def split(self, blocks: Tensor) -> list[Tensor]:
        """Blocks as one tensor a member, in the parameter's own shape."""
        view, k = self.view, len(self.members)
        ordered = blocks.reshape(k, *(view.shape[axis] for axis in view.order))
        inverse = [0, *(view.order.index(axis) + 1 for axis in range(len(view.order)))]
        return list(ordered.permute(inverse).reshape(k, *self.weights[0].shape).unbind())

    def _blocks(self, tensors: Sequence[Tensor], stack: Callable[[list[Tensor]], Tensor]) -> Tensor:
        view = self.view
        if len(tensors) == 1:    # as view.blocks, in the fewest calls
            return tensors[0].view(view.shape).permute(view.order).reshape(view.count, *view.block_shape)
        order = [0, *(axis + 1 for axis in view.order)]
        stacked = stack(list(tensors)).view(len(tensors), *view.shape)
        return stacked.permute(order).reshape(len(tensors) * view.count, *view.block_shape)

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Multiplies each block by its factor, in place, rounded once."""
        if stand_ins := self._stand_ins():
            rows = self.view.shape[:-1]
            tensors = [stand_ins[id(t)].view(*rows, -1) if id(t) in stand_ins else t.view(self.view.shape) for t in tensors]
        targets = list(tensors) if tensors[0].shape == self.view.shape else [self.view.open(t) for t in tensors]
        scale_tensors_(targets, self._opened(factor))

    def _stand_ins(self) -> dict[int, Tensor]:
        """What is scaled in the place of weights that are multiples of it, block by block."""
        found: dict[int, Tensor] = {}
        for one in self.computed:
            found |= getattr(one, "scalable", dict)()
        return found

    def plain(self) -> bool:
        """Whether the kernels may work here, and :meth:`cap_`: fp32 on a CPU, and blocks that are rows, or columns, or lie between."""
        kinds = {(type(w) in (nn.Parameter, Tensor), w.is_cpu, w.dtype, w.layout) for w in self.weights}
        known = self.axes is not None and not self.computed and type(self) is Pack
        return known and kinds == {(True, True, torch.float32, torch.strided)}

    def on_device(self) -> bool:
        """Whether the kernels for CUDA devices may work here."""
        known = self.axes is not None if type(self) is Pack else type(self) is Flat
        return known and not self.computed and cuda_kernels.fit(self.weights) and cuda_kernels.ready(self.weights[0].device)

    @torch.no_grad()
    def cap_(self, tensors: list[Tensor], radius: float) -> Tensor | None:
        """Where there are no kernels: scales every block whose L2 norm is above ``radius`` onto it, in place.

        Returns the factors, empty where all blocks are inside. None, with nothing changed, where a norm is not finite or a factor needs
        more care, or where reading a norm would wait for a device: ``measure`` and ``scale_`` take care of that.
        """
        if not tensors[0].is_cpu:    # moved since
            return None
        value = self.measure(L2(), tensors)
        largest = float(value.max())
        if largest <= radius:
            return value[:0]
        if not (largest < math.inf and radius >= 2 * torch.finfo(torch.float32).smallest_normal * largest):
            return None
        factor = radial_factor(value, value.clamp(max=radius))
        shares = self._opened(factor.to(torch.float32))
        targets = tensors if tensors[0].shape == self.view.shape else [w.view(self.view.shape) for w in tensors]
        if len(targets) == 1:
            targets[0].mul_(shares[0])
        else:
            torch._foreach_mul_(targets, list(shares.unbind()))
        return factor

    def _opened(self, factor: Tensor) -> Tensor:
        """One number a block as ``(members, ...)`` that broadcasts against the members with their axes split."""
        view = self.view
        sizes = [view.shape[axis] for axis in view.order[: view.batch]]
        opened = factor.reshape(len(self.members), *sizes, *[1] * (len(view.order) - view.batch))
        return opened.permute(0, *(view.order.index(axis) + 1 for axis in range(len(view.order))))

    def write_(self, tensors: Sequence[Tensor], blocks: Tensor) -> None:
        """Replaces the tensors by the blocks."""
        torch._foreach_copy_(list(tensors), self.split(blocks))

    # ------------------------------------------------------------------------------------------------ norms and what follows from them

    def measure(self, norm: Norm, tensors: Sequence[Tensor], agree: bool = False) -> Tensor:
        """The norm of every block, ``(count,)``. ``agree``: every rank is to know those of blocks that lie on others."""
        if self.axes is not None and norm.name == "l2" and may_branch(tensors[0]):
            value, (outer, units, inner) = native.norms(tensors, self.axes), self.axes
            if value is not None:
                return value
            if outer > 1 and inner == 1 and native.fit(tensors):
                return torch.cat([column_norms(t.view(outer, units)) for t in tensors])
        return norm.measure(self.borrow(tensors))

    def measure_whole(self, norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
        """As ``measure``, of whole blocks and known to every rank: what a proof needs."""
        return norm.measure(self.gather(tensors))

    def whole(self, value: Callable[..., Tensor], tensors: Sequence[Tensor], *given: Radius, agree: bool = False) -> Tensor:
        """``value(blocks, *given)``, one number a block."""
        return value(self.gather(tensors), *given)

    def prox(self, norm: Norm, tensors: Sequence[Tensor], step: Radius, power: int) -> list[Tensor]:
        """As ``actions.prox``, on tensors."""
        return self.split(actions.prox(norm, self.gather(tensors), step, power))

    def penalty_gradient(self, norm: Norm, tensors: Sequence[Tensor], power: int) -> list[Tensor]:
        """As ``actions.penalty_gradient``, on tensors."""
        return self.split(actions.penalty_gradient(norm, self.gather(tensors), power))

    def steepest(self, norm: Norm, tensors: Sequence[Tensor], of_blocks: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """−lmo(x, 1) of every block, by ``of_blocks`` where the norm needs whole ones."""
        return self.split(of_blocks(self.gather(tensors)))

    def normalized(self, norm: Norm, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every block at norm 1."""
        return self.split(norm.normalize(self.gather(tensors), 1.0))

    def requests_of_rows(self, tensors: list[Tensor]) -> list[tuple[Any, Norm, list[Tensor]]]:
        """What ``row_squares`` or ``row_lengths`` will measure, see ``requests``."""
        return []

    def row_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """The mean square of each row of each matrix, ``(count, rows)``."""
        return up(self.gather(tensors)).square().mean(2)

    def over_rows(self, tensors: Sequence[Tensor], divisor: Tensor) -> list[Tensor]:
        """Each row over its number of ``(count, rows)``, in the tensors' dtype."""
        return self.split((up(self.gather(tensors)) / divisor[:, :, None]).to(tensors[0].dtype))

    def row_lengths(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm of each row, ``(count · rows,)``."""
        blocks = self.gather(tensors)
        return L2().measure(blocks.reshape(-1, blocks.shape[2]))

    def scale_rows_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Each row times its factor ``(count · rows,)``, in place."""
        blocks = self.gather(tensors)
        rows = blocks.reshape(-1, blocks.shape[2])
        self.write_(tensors, (up(rows) * factor[:, None]).to(rows.dtype).view_as(blocks))


class Flat(Pack):
    """All members as one block: ``per="global"``. Their shapes, dtypes and devices may differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_shape, self.axes = (sum(w.numel() for w in self.weights),), None
        self._batches = _alike(self.weights)

    @property
    def count(self) -> int:
        return 1

    def holders(self) -> list[tuple[str, int, torch.device]]:
        return [("all together", 1, self.params[0].device)]

    def block(self, index: int) -> tuple[str, int]:
        return "all together", 0

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        device, dtype = tensors[0].device, _widest(tensors)
        return torch.cat([t.reshape(-1).to(device, dtype) for t in tensors])[None]

    def split(self, blocks: Tensor) -> list[Tensor]:
        parts = torch.split(blocks[0], [w.numel() for w in self.weights])
        return [p.view(w.shape).to(w.device) for p, w in zip(parts, self.weights, strict=True)]

    def measure(self, norm: Norm, tensors: Sequence[Tensor], agree: bool = False) -> Tensor:
        """L1, L2 and LInf of a vector are the same norm of the norms of its parts, so nothing is copied together."""
        if norm.name == "l2" and may_branch(tensors[0]) and self.placed(tensors):
            return torch.tensor([native.sum_of_squares(self.workspace)], dtype=torch.float64).sqrt_()
        device = tensors[0].device
        parts = [norm.measure(_rows([tensors[i] for i in batch])).to(device, wide(device)) for batch in self._batches]
        return norm.measure(torch.cat(parts)[None])

    def plain(self) -> bool:
        kinds = {(type(w) is nn.Parameter, w.is_cpu, w.dtype) for w in self.weights}
        return type(self) is Flat and kinds == {(True, True, torch.float32)} and not self.computed

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        stand_ins = self._stand_ins()
        for t in (stand_ins.get(id(t), t) for t in tensors):
            alike.setdefault((t.device, t.dtype), []).append(t)
        for (device, dtype), group in alike.items():
            power, rest = two_steps(factor[0], compute_dtype(dtype))
            for step in (power, rest):
                if step is not None:
                    torch._foreach_mul_(group, step.to(device))


def scale_tensors_(tensors: list[Tensor], factors: Tensor) -> None:
    """Each tensor of one dtype times its ``factors[i]``, which broadcasts, in place. On the CPU a half-precision product with a wider
    factor is slow: it goes up and comes back."""
    # Looked at once for all: each look reads two numbers, and a pack may have hundreds of tensors.
    power, rest = two_steps(factors, compute_dtype(tensors[0].dtype))
    if power is not None:
        for t, p, f in zip(tensors, power.unbind(), rest.unbind(), strict=True):
            t.copy_(up(t).mul(p).mul_(f))
    elif tensors[0].device.type == "cpu" and compute_dtype(tensors[0].dtype) != tensors[0].dtype:
        torch._foreach_copy_(tensors, [t.float().mul_(f) for t, f in zip(tensors, rest.unbind(), strict=True)])
    elif len(tensors) == 1:
        tensors[0].mul_(rest[0])
    else:
        torch._foreach_mul_(tensors, list(rest.unbind()))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {compute_dtype(t.dtype) for t in tensors}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Which tensors to measure in one call: large ones alone, small ones of one shape, dtype and device together, a bucket at most."""
    small: dict[tuple[Any, ...], list[int]] = {}
    for i, t in enumerate(tensors):
        small.setdefault((i,) if _bytes(t) >= ALONE_FROM_BYTES else (t.shape, t.dtype, t.device), []).append(i)
    return [group[k : k + room] for group in small.values() for room in [_room(tensors[group[0]])] for k in range(0, len(group), room)]


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as rows ``(k, numel)``, in memory that the next measurement overwrites."""
    return tensors[0].reshape(1, -1) if len(tensors) == 1 else _stacked(tensors).flatten(1)


class _Scratch(threading.local):
    """One bucket a thread and dtype: two optimizers that step in two threads do not share it."""

    def __init__(self) -> None:
        self.buckets: dict[torch.dtype, Tensor] = {}


_SCRATCH = _Scratch()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape stacked, on the CPU into one bucket of memory that is kept: fresh pages cost more than the copy."""
    first = tensors[0]
    size = len(tensors) * first.numel()
    if not may_branch(first) or size * first.element_size() > SCRATCH_BYTES:
        return torch.stack(list(tensors))
    kept = _SCRATCH.buckets.get(first.dtype)
    if kept is None or kept.numel() < size:
        kept = _SCRATCH.buckets[first.dtype] = torch.empty(size, dtype=first.dtype)
    return torch.stack(list(tensors), out=kept[:size].view(len(tensors), *first.shape))


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _room(t: Tensor, alone_from: int = ALONE_FROM_BYTES) -> int:
    """How many tensors like this one make a bucket."""
    return 1 if _bytes(t) >= alone_from else max(1, SCRATCH_BYTES // max(_bytes(t), 1))


def pack(members: Sequence[Member], flat: bool, alone_from: int = ALONE_FROM_BYTES) -> list[Pack]:
    """Members into packs: one of all for ``per="global"``, otherwise equal views, dtypes, devices and optimizers together.

    alone_from: bytes of a tensor from which it is a pack of its own.
    """
    if flat:
        return [Flat(list(members))]
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for m in members:
        alone = m.computed and (m.margin, m.moved_by)    # a plain weight is not to keep a computed one's distance from its bound
        alike.setdefault((m.view, m.weight.shape, m.weight.dtype, m.weight.device, m.optimizer, alone), []).append(m)
    return [Pack(part) for group in alike.values() for part in _portions(group, alone_from)]


def _portions(group: list[Member], alone_from: int) -> Iterable[list[Member]]:
    room = _room(group[0].weight, alone_from)
    return (group[i : i + room] for i in range(0, len(group), room))


def nothing_to_do(factor: Tensor) -> bool:
    """Whether every factor is 1, where knowing it is free; False elsewhere, and the scaling runs."""
    return may_branch(factor) and not bool((factor != 1).any())
