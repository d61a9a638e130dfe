"""``clip_norm``, ``project``, ``normalize`` and ``lmo``: blocks of weights, gradients or updates, scaled or moved to where they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normwise.engine.block_tensors import (
    centers_of,
    computed_again,
    grads_of,
    make_dense,
    noise_of,
    offsets_of,
    put_back,
    recenter_,
    starts_of,
    weights_of,
)
from normwise.engine.margins import inside, least, relative_margin, room, shy
from normwise.engine.pack import Pack, nothing_to_do
from normwise.engine.rules.base import BoundRule, runs
from normwise.engine.step import Turn, grads
from normwise.norms import Norm, Radius, cuda_kernels, native
from normwise.norms.base import beyond
from normwise.norms.reduce import may_branch, wide
from normwise.norms.spectral import cut
from normwise.policy import actions
from normwise.policy.radii import Init, Relative
from normwise.policy.schedules import is_number

LOOKS = 3
"""How often float64 weights that are computed from others are measured again at most. The second look nearly always finds them inside."""
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

    @torch.no_grad()
    def hold(self, part: Pack, turn: Turn) -> None:
        """Measures float64 weights again as a proof does, and shrinks what is outside: there is nothing wider to compute them in, so how
        far rounding moves them depends on the condition of what they are computed from, which training changes."""
        bounds = isinstance(self.norm, Norm) and self.rule.action in ("clip_norm", "project") and self.nothing_to_verify is None
        for _ in range(LOOKS if bounds and part.coarsest == torch.float64 else 0):
            assert isinstance(self.norm, Norm)
            value, noise = part.measure_whole(self.norm, computed_again(part)).double(), noise_of(part, self.norm)
            limit = torch.as_tensor(self.radius(part, turn), dtype=value.dtype, device=value.device) * (1 + self.rule.tolerance)
            low = 0.0 if self.rule.min_radius is None else self.rule.min_radius
            hair = relative_margin(self.norm, part.coarsest, part.block_shape)
            factor = torch.where((value > 0) & (value - noise < low), low / (value - noise) * (1 + hair), 1.0)
            factor = torch.where((value + noise > limit) & value.isfinite(), limit / (value + noise) * (1 - hair), factor)
            factor = factor if turn.happened is None else torch.where(turn.happened.to(factor.device) > 0, factor, 1.0)
            if nothing_to_do(factor):
                return
            self._times(part, factor)
            put_back(part)

    def _times(self, part: Pack, factor: Tensor) -> None:
        """Each block's distance from its center, times its factor."""
        weights, centers = weights_of(part), centers_of(part)
        if not centers:
            part.scale_(weights, factor)
            return
        old = torch._foreach_sub(weights, centers)
        new = [o.clone() for o in old]
        part.scale_(new, factor)
        recenter_(weights, centers, old, new)

    # ------------------------------------------------------------------------------------------------ in few calls

    def prepared(self, optimizer: int) -> Callable[[Turn], None]:
        """A fixed radius for L2 norms of fp32 numbers on a CPU, or a fixed box for entries, leaves nothing to look up in a step: on small
        networks that costs more than measuring, and most steps find nothing to do. On a CUDA device many calls become one or two.
        """
        free = self.rule.rate == 1 and self.rule.min_radius is None and type(self) is Bound and self.phase != "update"
        act = self._in_few_launches() if free and self.steady(Pack.on_device) else None
        if act is None and free and self.steady():
            act = self._in_few_calls()
        self.in_few_calls = self.idempotent = act is not None
        return act or self.run

    def _in_few_calls(self) -> Callable[[Turn], None] | None:
        rule, norm, sphere = self.rule, self.norm.name, self.rule.action == "normalize"
        fixed, on_weights = is_number(rule.radius), self.phase == "weight"
        if norm == "l2" and rule.action in ("clip_norm", "project", "normalize"):
            if self.flat:
                return self._clip_together if fixed and not on_weights and not sphere else None
            # Initial norms are asked for at each step, since a state that is loaded brings others.
            aims = [self._aim(p) if fixed else None for p in self.packs]
            rows = all(p.axes is not None and p.axes[0] == 1 and p.axes[2] <= native.LONGEST for p in self.packs)
            if fixed and on_weights and rows:
                self.rows = [(p, aim, sphere) for p, aim in zip(self.packs, aims, strict=True)]
            return partial(self._bound_blocks, aims, sphere) if fixed or (isinstance(rule.radius, Init) and on_weights) else None
        if norm == "spectral" and fixed and rule.action == "project" and on_weights:
            shapes = [p.matrix if p.matrix is not None and min(p.matrix) <= native.SMALL else None for p in self.packs]
            return partial(self._cap_spectra, list(zip(shapes, map(self._aim, self.packs), strict=True))) if any(shapes) else None
        entrywise = getattr(self.norm, "interval", None) is not None or (norm == "linf" and fixed)
        if entrywise and rule.action == "project" and rule.per == "tensor":
            # Where the lowest number goes, and where the highest: all others stay between.
            ends = [self.norm.project(torch.tensor([[-math.inf, math.inf]]), self._aim(p))[0].tolist() for p in self.packs]
            return partial(self._clamp_entries, ends)
        return None

    def _aim(self, part: Pack) -> Any:
        radius = self.radius(part, None)
        return self._aimed(part, radius) if self.phase == "weight" else radius

    def _found(self, turn: Turn) -> list[tuple[Pack, Any, bool]] | None:
        """Each pack with what the rule acts on, and whether the kernels can. None where that takes more care: the step may be skipped, or a
        gradient is missing, or none that they can take."""
        held = self.phase == "weight"
        if turn.happened is not None:
            return None
        found = [(p, mine, p.placed(mine, held)) for p in self.packs for mine in [p.weights if held else grads(p.params)]]
        return found if held or all([placed for _, _, placed in found]) else None    # noqa: C419 - a list is faster than a generator

    def _clip_together(self, turn: Turn) -> None:
        found, radius = self._found(turn), self.rule.radius
        if found is None:
            self._carefully(turn)
            return
        part, tensors, _ = found[0]
        known = self.squares.of(tensors) if self.squares is not None else None
        value = math.sqrt(native.sum_of_squares(part.workspace) if known is None else sum(known))
        factor = 1.0 if value <= radius else radius / value    # type: ignore[operator]
        if not (value < math.inf and factor >= torch.finfo(torch.float32).smallest_normal):
            self._carefully(turn)
            return
        self._acted = {turn.optimizer: []}
        if factor != 1:
            native.multiply_(tensors, part.workspace, factor)
            if self.squares is not None and known is not None:
                self.squares.keep(tensors, [square * factor**2 for square in known])
            self._acted[turn.optimizer].append((part, torch.tensor([factor], dtype=torch.float64)))
        if self.watches:
            self._look_at(torch.tensor([value], dtype=torch.float64), turn)

    def _bound_blocks(self, aims: list[Any], sphere: bool, turn: Turn) -> None:
        found = self._found(turn)
        if found is None:
            self._carefully(turn)
            return
        self._acted[turn.optimizer] = acted = []
        for (part, tensors, placed), given in zip(found, aims, strict=True):
            aim = self._aim(part) if given is None else given
            if placed:
                if self.one_pass is not None and self.one_pass.took(part):
                    value, factor, finite = native.left_in(part.workspace, any(part.workspace.changed[: len(tensors)]))
                else:
                    part.workspace.aim(aim, sphere)
                    value, factor, finite = native.bound_(tensors, part.workspace)
                acted.append((part, factor))
                if not finite:
                    self._look_for_nonfinite(value, turn)
                continue
            capped = None if sphere or isinstance(aim, Tensor) else part.cap_(tensors, aim)
            if capped is None:
                self._act_without_graph(part, tensors, aim, turn)
            else:
                acted.append((part, capped))

    def _clamp_entries(self, ends: list[list[float]], turn: Turn) -> None:
        found = self._found(turn)
        if found is None or not all([placed for _, _, placed in found]):    # noqa: C419 - as above
            self._carefully(turn)
            return
        self._acted[turn.optimizer] = acted = []
        for (part, tensors, _), (low, high) in zip(found, ends, strict=True):
            if native.clamp_(tensors, part.workspace, low, high):
                acted.append((part, part.workspace.factors))

    def _cap_spectra(self, caps: list[tuple[tuple[int, int] | None, float]], turn: Turn) -> None:
        """Decomposes only what is not proven to be inside. Matrices without a shape are too large for the kernels."""
        found = self._found(turn)
        if found is None:
            self._carefully(turn)
            return
        self._acted[turn.optimizer] = acted = []
        for (part, tensors, placed), (shape, aim) in zip(found, caps, strict=True):
            if shape is None or not placed:
                self._act_without_graph(part, tensors, aim, turn)
            elif outside := native.exceeding(part.workspace, shape, aim):
                acted.append((part, part.workspace.factors.clone()))
                self._cut(part, shape, outside, aim)

    @torch.no_grad()
    def _cut(self, part: Pack, shape: tuple[int, int], outside: list[int], aim: float) -> None:
        """Cuts those of the members, and again with more digits if one is not proven to be inside then."""
        for vectors_in in (torch.float32, torch.float64):
            matrices = [part.weights[i].view(shape) for i in outside]
            found = cut(matrices[0][None] if len(matrices) == 1 else torch.stack(matrices), aim, vectors_in)
            torch._foreach_copy_(matrices, list(found.unbind()))
            if not native.exceeding(part.workspace, shape, self.rule.radius):    # type: ignore[arg-type]
                return

    def _in_few_launches(self) -> Callable[[Turn], None] | None:
        """On a CUDA device: one workspace for all packs whose members are seen alike."""
        rule, fixed = self.rule, is_number(self.rule.radius)
        kept = fixed or (isinstance(rule.radius, Init) and self.phase == "weight")
        if self.norm.name != "l2" or rule.action not in ("clip_norm", "project", "normalize") or not kept:
            return None
        alike: dict[Any, list[Pack]] = {}
        for p in self.packs:
            alike.setdefault((p.axes, p.coarsest, p.weights[0].device), []).append(p)
        launches = [(parts, cuda_kernels.Workspace([w for p in parts for w in p.weights], axes)) for (axes, *_), parts in alike.items()]
        for parts, workspace in launches if fixed else ():
            workspace.aim(self._aim(parts[0]))
        return partial(self._launch, launches, fixed)

    def _launch(self, launches: list[tuple[list[Pack], cuda_kernels.Workspace]], fixed: bool, turn: Turn) -> None:
        held = self.phase == "weight"
        found: list[list[Any]] = [[t for p in parts for t in (p.weights if held else grads(p.params))] for parts, _ in launches]
        placed = [workspace.place(mine) for mine, (_, workspace) in zip(found, launches, strict=True)]
        if turn.happened is not None or not all(placed):
            self._carefully(turn)
            return
        acted: list[tuple[Pack, Tensor]] = []
        self._acted[turn.optimizer] = acted
        for mine, (parts, workspace) in zip(found, launches, strict=True):
            if not fixed:
                workspace.aim(torch.cat([self._aim(p) for p in parts]))
            values, factors = cuda_kernels.bound_(mine, workspace, self.rule.action == "normalize")
            acted += zip(parts, torch.split(factors, [p.count for p in parts]), strict=True)
            if self.watches:    # a copy: the next step's takes the place of this one
                self._look_at(values.clone(), turn)

    def _carefully(self, turn: Turn) -> None:
        for part in self.packs if self.phase == "gradient" else ():
            make_dense(self.rule, part)
        with torch.no_grad():
            self.run(turn)

    @torch.no_grad()
    def _act_without_graph(self, part: Pack, tensors: Sequence[Tensor], radius: Radius, turn: Turn) -> None:
        self._act(part, tensors, radius, turn)

    # ------------------------------------------------------------------------------------------------ one pack

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
            if turn.happened is not None and not bool(turn.happened):    # GradScaler skips the step, as it is meant to
                return
            self._told = True
            what = {"gradient": "gradients", "update": "updates"}.get(self.phase, "weights")
            turn.tell(
                f"rule '{self.rule.label()}' found {what} whose norm is not finite, in step {turn.step() + 1}. They are left as they are, "
                "and training goes on with them; attach with on_nonfinite='raise' to have the parameters named, or 'skip'."
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
                "steps: something clips them before, such as a trainer's max_grad_norm or gradient_clip_val, or clip_grad_norm_ in the "
                "loop. Turn one of the two off."
            )
