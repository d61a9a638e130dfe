"""``clip_norm``, ``project``, ``normalize`` and ``lmo``: blocks of weights, gradients or updates, scaled or moved to where they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import centers_of, grads_of, make_dense, offsets_of, recenter_, starts_of, weights_of
from normwise.engine.margins import inside, least, relative_margin, room, shy
from normwise.engine.pack import Pack, nothing_to_do
from normwise.engine.rules.base import BoundRule, runs
from normwise.engine.step import Turn, grads
from normwise.norms import Norm, Radius, native
from normwise.norms.base import beyond
from normwise.norms.reduce import may_branch, wide
from normwise.norms.spectral import cut
from normwise.policy import actions
from normwise.policy.radii import Init, Relative
from normwise.policy.schedules import is_number

EARLY = 20
"""Norms of gradients that are looked at for a threshold that something else has put on them."""


@runs("clip_norm", "project", "normalize", "lmo")
class Bound(BoundRule):
    """Blocks brought under their radius, onto it, or onto a set; for ``lmo`` replaced by the steepest step."""

    counted = True
    _told = False
    _early: list[Tensor] | None = None
    _inline_turn: Turn | None = None

    @property
    def nothing_to_verify(self) -> str | None:    # type: ignore[override]
        if self.phase != "weight":
            return f"it acts on {self.phase}s"
        return None if self.rule.rate == 1 else f"at rate={self.rule.rate:g} the bound is reached by and by"

    def run_pack(self, part: Pack, turn: Turn) -> None:
        """Acts on what the rule is on: gradients, updates, or weights with their distance from a center."""
        if self.phase == "gradient":
            self._act(part, grads_of(part), self.radius(part, turn), turn)
        elif self.phase == "update":
            self._around(part, starts_of(part, turn), self.radius(part, turn), turn)
        elif part.members[0].center is not None:
            self._around(part, centers_of(part), self._aimed(part, self.radius(part, turn)), turn)
        else:
            self._act(part, weights_of(part), self._aimed(part, self.radius(part, turn)), turn)

    def prepared(self, optimizer: int) -> Callable[[Turn], None]:
        """A fixed radius for L2 norms of fp32 numbers on a CPU, or a fixed box for entries, leaves nothing to look up in a step: on small
        networks that costs more than measuring, and most steps find nothing to do.
        """
        rule, mine = self.rule, [p for p in self.packs if optimizer in p.optimizers]
        free = rule.rate == 1 and rule.min_radius is None and rule.center is None and not self.timed()
        plain = type(self) is Bound and self.phase != "update" and len(self.optimizers) == 1 and all(p.plain() for p in mine)
        act = self._in_few_calls(mine) if free and plain else None
        self.in_few_calls = self.repeatable = act is not None
        return act or self.run

    def _in_few_calls(self, mine: list[Any]) -> Callable[[Turn], None] | None:
        rule, fixed = self.rule, is_number(self.rule.radius)
        kept = isinstance(rule.radius, Init) and self.phase == "weight" and not self.flat    # one a block, which a loaded state may change
        if self.norm.name == "l2" and (fixed or kept) and rule.action in ("clip_norm", "project", "normalize"):
            radius: Any = rule.radius
            sphere = rule.action == "normalize"
            if not self.flat:
                aims = [None if kept else self._aimed(p, radius) if self.phase == "weight" else radius for p in mine]
                for part, aim in zip(mine if native.library() is not None else [], aims, strict=False):
                    part.room.aim(0.0 if aim is None else aim, sphere)
                return partial(self._bound_blocks, list(zip(mine, aims, strict=True)), sphere)
            if self.phase == "gradient" and not sphere:
                return partial(self._clip_together, mine[0])
        if self.norm.name == "spectral" and fixed and rule.action == "project" and self.phase == "weight":
            shapes = [p.matrix if p.matrix is not None and min(p.matrix) <= native.SMALL else None for p in mine]
            caps = [(p, shape, self._aimed(p, self.radius(p, None))) for p, shape in zip(mine, shapes, strict=True)]
            return partial(self._cap_spectra, caps) if any(shapes) else None
        entrywise = getattr(self.norm, "interval", None) is not None or (self.norm.name == "linf" and fixed)
        if entrywise and rule.action == "project" and rule.per == "tensor":
            return partial(self._clamp_entries, [(p, self._ends(p)) for p in mine])
        return None

    def _ends(self, part: Pack) -> tuple[float, float]:
        """Where the lowest number goes and where the highest: all others stay between."""
        radius = self.radius(part, None)
        aim = self._aimed(part, radius) if self.phase == "weight" else radius
        low, high = self.norm.project(torch.tensor([[-math.inf, math.inf]]), aim)[0].tolist()
        return low, high

    def _clip_together(self, part: Any, turn: Turn) -> None:
        ready = self._ready([part], turn)
        done = None if ready is None else part.clip_(ready[0][0], self.rule.radius, ready[1])
        if done is None:
            self._carefully(turn)
            return
        value, factor = done
        self._acted = {turn.optimizer: [] if factor == 1 else [(part, torch.tensor([factor], dtype=torch.float64))]}
        if self.watches:
            self._look_at(torch.tensor([value], dtype=torch.float64), turn)

    def _clamp_entries(self, boxes: list[tuple[Any, tuple[float, float]]], turn: Turn) -> None:
        ready = self._ready([p for p, _ in boxes], turn)
        if ready is None or native.library() is None or not ready[1]:
            self._carefully(turn)
            return
        self._acted[turn.optimizer] = acted = []
        for (part, (low, high)), mine in zip(boxes, ready[0], strict=True):
            if native.clamp_(mine, part.room, low, high):
                acted.append((part, part.room.factors))

    def _cap_spectra(self, caps: list[tuple[Any, tuple[int, int] | None, Any]], turn: Turn) -> None:
        """Decomposes only what is not proven to be inside."""
        ready = self._ready([p for p, _, _ in caps], turn)
        if ready is None or not ready[1] or native.library() is None:
            self._carefully(turn)
            return
        self._acted[turn.optimizer] = acted = []
        for part, shape, aim in caps:
            outside = None if shape is None else native.beyond(part.room, shape, aim)
            if outside:
                acted.append((part, part.room.factors.clone()))
                self._cut(part, outside, aim)
            elif outside is None:
                self._act_without_graph(part, part.weights, aim, turn)

    @torch.no_grad()
    def _act_without_graph(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        self._act(part, tensors, radius, turn)

    @torch.no_grad()
    def _cut(self, part: Any, outside: list[int], aim: float) -> None:
        """Cuts those of the members, and again with more digits if one is not proven to be inside then."""
        for vectors_in in (torch.float32, torch.float64):
            matrices = [part.weights[i].view(part.matrix) for i in outside]
            found = cut(matrices[0][None] if len(matrices) == 1 else torch.stack(matrices), aim, vectors_in)
            torch._foreach_copy_(matrices, list(found.unbind()))
            if not native.beyond(part.room, part.matrix, self.rule.radius):    # type: ignore[arg-type]
                return

    def _carefully(self, turn: Turn) -> None:
        with torch.no_grad():
            self.run(turn)

    def _ready(self, parts: list[Any], turn: Turn) -> tuple[list[Any], bool] | None:
        """What the rule acts on in each pack, and whether the kernels can; None where the step may be skipped, or a gradient is missing."""
        certain = turn.happened is None
        if self.phase == "weight":
            weights = [p.weights for p in parts]
            return (weights, all([p.ready(p.weights) for p in parts])) if certain else None    # noqa: C419
        found = [grads(p.params) for p in parts]
        if all([native.fit(g) and p.ready(g) for p, g in zip(parts, found, strict=True)]):    # noqa: C419 - as below
            return (found, True) if certain else None
        for part in parts:
            make_dense(self.rule, part)
        found = [grads(p.params) for p in parts]
        there = all([g is not None for of_pack in found for g in of_pack])    # noqa: C419 - a list is faster than a generator
        return (found, False) if certain and there else None

    def _bound_blocks(self, aims: list[tuple[Any, Any]], sphere: bool, turn: Turn) -> None:
        ready = self._ready([p for p, _ in aims], turn) if self.phase == "gradient" else None
        if turn.happened is not None or (self.phase == "gradient" and ready is None):
            self._carefully(turn)
            return
        self._acted[turn.optimizer] = acted = []
        for i, (part, aim) in enumerate(aims):
            mine = part.weights if ready is None else ready[0][i]
            if aim is None:
                aim = self._aimed(part, self.radius(part, turn))
                if native.library() is not None:
                    part.room.aim(aim, sphere)
            done = part.bound_(mine, aim, sphere, ready[1] if ready is not None else part.ready(mine))
            if done is None:
                self._act_without_graph(part, mine, aim, turn)
                continue
            odd, factor = done
            acted.append((part, factor))
            if odd is not None:
                self._look_for_nonfinite(odd, turn)

    def run_on(self, part: Pack, changes: list[Tensor], turn: Turn) -> None:
        if self.timed() and not self.rule.active(turn.step()):
            return
        change = {id(p): c for p, c in zip(part.params, changes, strict=True)}
        if self._inline_turn is not turn:    # the first pack of a step
            self._inline_turn, self._acted[turn.optimizer] = turn, []
        for whole in self.packs:
            mine = whole.only(lambda m: id(m.param) in change)
            if mine is not None:
                self._act(mine, [change[id(p)] for p in mine.params], self.radius(mine, turn), turn)

    def to_measure(self, part: Pack, turn: Turn) -> list[tuple[Norm, Sequence[Tensor]]]:
        if not isinstance(self.norm, Norm) or not actions.scales(self.rule.action, self.norm):
            return []
        starts = [(self.norm, starts_of(part, turn))] if self._measures_starts() else []
        return [*starts, (self.norm, self._measurable(part, self._acted_on(part, turn)))]

    def _acted_on(self, part: Pack, turn: Turn) -> Sequence[Tensor]:
        if self.phase == "update":
            return torch._foreach_sub(weights_of(part), starts_of(part, turn))
        return grads_of(part) if self.phase == "gradient" else offsets_of(part)

    def _measures_starts(self) -> bool:
        return isinstance(self.rule.radius, Relative)

    def _aimed(self, part: Pack, radius: Radius) -> Radius:
        """An inequality is aimed at from a hair inside; a sphere and a set are aimed at as they are."""
        if self.rule.action == "normalize" or not isinstance(self.norm, Norm):
            return radius
        norms = [m.center_norm for m in part.members if m.center_norm is not None]
        if part.margin:
            radius = shy(radius, part.margin, torch.cat(norms) if norms else 0.0)
        clamps = self.rule.action == "project" and self.norm.separable
        aimed = inside(radius, self.norm, part.coarsest, part.block_shape, torch.cat(norms) if norms else 0.0, clamps)
        return aimed if self.rule.min_radius is None else room(self.rule.min_radius, radius, aimed, self._hair(part))

    def _around(self, part: Pack, centers: list[Tensor], radius: Radius, turn: Turn) -> None:
        """Acts on weight − center."""
        weights = weights_of(part)
        old = torch._foreach_sub(weights, centers)
        new = [o.clone() for o in old]
        self._act(part, new, radius, turn)
        recenter_(weights, centers, old, new)

    def _act(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        """clip_norm, project, normalize or lmo, in place; nothing where GradScaler skips the step."""
        if actions.scales(self.rule.action, self.norm):
            self._scale(part, tensors, radius, turn)
            return
        part = part.form(self.rule.action, self.norm)
        blocks = part.gather(tensors)
        moved = self._transform(blocks, part.mine(radius)) if len(blocks) else blocks
        self._replace(part, tensors, blocks, moved, turn)

    def _transform(self, blocks: Tensor, radius: Radius) -> Tensor:
        if self.rule.action == "lmo":
            assert isinstance(self.norm, Norm)
            return actions.steepest(self.norm, blocks)
        moved = self.norm.project(blocks, radius)
        if self.phase == "weight" and blocks.dtype == torch.float64 and isinstance(self.norm, Norm):
            # In float64 nothing is wider to project in: the threshold's error, many times over, may be more than a hair.
            moved = self.norm.clip_norm(moved, radius)
        return moved

    def _replace(self, part: Pack, tensors: Sequence[Tensor], blocks: Tensor, moved: Tensor, turn: Turn) -> None:
        """Writes what has become of the blocks, where the step is taken, and keeps count of those that changed."""
        if turn.happened is not None:
            moved = torch.where(turn.happened.to(blocks.device) > 0, moved, blocks)
        acted = torch.where((moved != blocks).flatten(1).any(1), 0.0, 1.0)
        self.note(part, part.told(acted), turn)
        if not (part.may_branch(acted) and nothing_to_do(acted)):
            part.write_(tensors, moved)

    def _scale(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        rule = self.rule
        assert isinstance(self.norm, Norm)
        value = part.measure(self.norm, self._measurable(part, tensors))
        only_clips = rule.action != "normalize" and rule.min_radius is None
        if self.watches:
            self._look_at(value, turn)
        if only_clips and part.may_branch(value) and bool((value <= radius).all()):
            return
        self._look_for_nonfinite(value, turn)
        low = None if rule.min_radius is None else least(rule.min_radius, radius, self._hair(part))
        factor = actions.factor(rule.action, value, radius, low, rule.rate)
        self.multiply(part, tensors, factor, turn)
        if part.coarsest == torch.float64 and part.may_branch(factor) and beyond(factor):
            self._scale(part, tensors, radius, turn)

    def _measurable(self, part: Pack, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Float64 copies of fp32 weights where a measure in fp32 tells too little: a sphere is to be met to two ulp, and singular values
        may be off by a hundred."""
        exacting = self.rule.action == "normalize" or self.norm.matrix
        if not exacting or self.phase != "weight" or part.coarsest != torch.float32:
            return tensors
        return [t.to(wide(t.device)) for t in tensors]

    def _hair(self, part: Pack) -> float:
        assert isinstance(self.norm, Norm)
        return relative_margin(self.norm, part.coarsest, part.block_shape) + part.margin

    def _look_for_nonfinite(self, value: Tensor, turn: Turn) -> None:
        """Tells once of a norm that is not finite, where looking is free."""
        if not self._told and may_branch(value) and value.numel() and not math.isfinite(float(value.max())):
            self._told = True
            what = {"gradient": "gradients", "update": "updates"}.get(self.phase, "weights")
            turn.tell(
                f"rule '{self.rule.label()}' found {what} whose norm is not finite, in step {turn.step() + 1}. They are left as they "
                "are, and "
                "training goes on with them; attach with on_nonfinite='raise' to have the parameters named, or 'skip'."
            )

    def _look_at(self, value: Tensor, turn: Turn) -> None:
        """Keeps the norms of the first gradients; reading them waits for a device, so that there it is left to ``judge``."""
        if self._early is None:
            self._early = []
        if len(self._early) < EARLY:
            self._early.append(value.detach().reshape(()))
            if len(self._early) == EARLY and may_branch(value):
                self.judge(turn.tell)

    def judge(self, tell: Callable[[str], None]) -> None:
        """Tells once where the norms of the first gradients were all but the same: something clips them before they come here, and a
        history of them is one of the other threshold."""
        if self._early is None or len(self._early) < EARLY:
            return
        seen, self.watches, self._early = torch.stack(self._early).double(), False, None
        middle = seen.median()
        same = int(((seen - middle).abs() <= 1e-5 * middle).sum())
        if same >= 0.9 * EARLY and bool(middle > 0):
            tell(
                f"the gradients that rule '{self.rule.label()}' sees had the norm {float(middle):.6g} in {same} of the first {EARLY} "
                "steps: "
                "something clips them before, such as a trainer's max_grad_norm or gradient_clip_val, or clip_grad_norm_ in the loop. "
                "Turn one "
                "of the two off."
            )
