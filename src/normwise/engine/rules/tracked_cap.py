"""A spectral cap within a tolerance: it follows the largest singular vectors from step to step instead of decomposing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import SCRATCH_BYTES, Member, Pack, pack
from normwise.engine.rules.base import runs
from normwise.engine.rules.bounds import Bound
from normwise.engine.step import Turn
from normwise.norms import Radius
from normwise.norms.linalg import Tracked, follow
from normwise.norms.reduce import compute_dtype, wide
from normwise.parameters.inventory import Entry
from normwise.policy import Rule

APART_FROM = 1 << 15    # numbers of a tensor from which it is read where it lies: a copy of it costs more than a call


@runs("project", when=lambda rule: rule.tolerance > 0, whole=True)
class TrackedCap(Bound):
    """``project`` under the spectral norm with ``tolerance`` > 0, see :func:`normwise.norms.linalg.cap`.

    What is known of a pack's matrices lies in one batch, of which ``store`` has each parameter's part as a view.
    """

    growing = ("vectors", "reference")

    def __init__(self, rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> None:
        super().__init__(rule, entries, owner, index)
        self.packs = pack(self.members, False, alone_from=SCRATCH_BYTES)    # a search is many small calls: fewer, larger batches
        self._known: dict[int, Tracked] = {}
        self._views: dict[int, tuple[list[Any], list[Tensor]]] = {}
        for m in self.members:
            self.store[m.name] = self._nothing(m)

    @staticmethod
    def _nothing(m: Member) -> dict[str, Tensor]:
        """What is known of a parameter's matrices before they were looked at: no vectors, no reference, no bound."""
        count, columns, dtype, device = m.view.count, m.view.block_shape[-1], m.param.dtype, m.param.device
        return {
            "vectors": torch.zeros(count, 0, min(m.view.block_shape), dtype=compute_dtype(dtype), device=device),
            "reference": torch.zeros(count, 0, columns, dtype=dtype, device=device),
            "reach": torch.zeros(count, dtype=wide(device), device=device),
        }

    def fits(self, own: Tensor, kept: Tensor) -> bool:
        """How many vectors are followed may differ, and before the first step there is no reference."""
        return kept.ndim == own.ndim and own.shape[::2] == kept.shape[::2]

    def current(self, name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """States from before there were references begin anew: the first step then looks at every matrix."""
        return found if "sketch" not in found else self._nothing(next(m for m in self.members if m.name == name))

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._known.clear()
        for part in self.packs:
            self._know(part, self._together(part))

    def _act(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        matrices = self._matrices(part, tensors)
        limit = torch.as_tensor(radius, dtype=wide(tensors[0].device), device=tensors[0].device).expand(len(tensors) * part.view.count)
        before = self._known.get(id(part))
        cut, known = follow(matrices, limit, before, self.rule.tolerance)
        if known is not before:
            self._know(part, known)
        if cut:
            self._write(part, tensors, cut, turn)

    def _matrices(self, part: Pack, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pack's matrices: large ones where they lie, as views that are kept until the weights lie elsewhere."""
        if tensors[0].numel() < APART_FROM:
            return [part.borrow([t.detach() for t in tensors])]
        where = [(t.data_ptr(), t.stride()) for t in tensors]
        kept = self._views.get(id(part))
        if kept is not None and kept[0] == where:
            return kept[1]
        views = [part.view.blocks(t.detach()) for t in tensors]
        lasting = part.members[0].center is None    # the distances from a center are made anew at each step
        if lasting and all(v.data_ptr() == t.data_ptr() for v, t in zip(views, tensors, strict=True)):    # and no copies
            self._views[id(part)] = where, views
        return views

    def _write(self, part: Pack, tensors: Sequence[Tensor], cut: dict[int, Tensor], turn: Turn) -> None:
        """Writes the matrices that were cut, where the step is taken."""
        count = part.view.count
        acted = torch.zeros(len(cut), device=tensors[0].device)
        self.note(part, acted if turn.happened is None else 1 - turn.happened.to(acted).expand(len(cut)), turn)
        for k in sorted({i // count for i in cut}):
            blocks = part.view.blocks(tensors[k])
            new = torch.stack([cut.get(k * count + i, block) for i, block in enumerate(blocks.unbind())])
            part.view.write_(tensors[k], new if turn.happened is None else torch.where(turn.happened.to(new.device) > 0, new, blocks))

    def _know(self, part: Pack, known: Tracked | None) -> None:
        if known is None:
            return
        self._known[id(part)] = known
        parts = zip(*(torch.split(own, part.view.count) for own in known), strict=True)
        for m, own in zip(part.members, parts, strict=True):
            self.store[m.name] |= dict(zip(known._fields, own, strict=True))

    def _together(self, part: Pack) -> Tracked | None:
        """What is stored of a pack's members in one batch; None where they have not been together."""
        kept = [self.store[m.name] for m in part.members]
        if len({(k["vectors"].shape[1], k["reference"].shape[1]) for k in kept}) > 1:
            return None
        return Tracked(*(torch.cat([k[what] for k in kept]) for what in Tracked._fields))
