"""The tensors of a pack's members that rules work on: what lies on this rank of weights, gradients, centers and starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.engine.pack import Pack, here
from normwise.engine.sharded.grouping import placed_like
from normwise.engine.step import Turn
from normwise.errors import PolicyError
from normwise.norms import Norm
from normwise.parameters.layouts import overlaps
from normwise.parameters.names import clean_name
from normwise.policy import Rule


def weights_of(part: Pack) -> list[Tensor]:
    """The weights; those that are computed from other tensors as they are now, in memory that `put_back` writes back."""
    for computed in part.computed:
        computed.read()
    return part.local(part.weights)


def put_back(part: Pack) -> None:
    """Makes the computed weights what a rule has made of those that `weights_of` gave."""
    for computed in part.computed:
        computed.write()


def computed_again(part: Pack) -> list[Tensor]:
    """What a proof measures: the weights as the model computes them now, minus their center; no memory that rules work in is touched."""
    exact = [(m.param.detach() if m.computed is None else m.computed.fresh()).double() for m in part.members]
    return part.local([w if m.center is None else w - m.center.double() for m, w in zip(part.members, exact, strict=True)])


def noise_of(part: Pack, norm: Norm) -> Tensor | float:
    """By how much the norm of each block may differ where another order of operations computes its weight, in float64."""
    found = [None if m.computed is None else m.computed.way.noise() for m in part.members]
    if all(noise is None for noise in found):
        return 0.0
    filled = [torch.zeros_like(m.weight) if noise is None else noise for m, noise in zip(part.members, found, strict=True)]
    return part.measure_whole(norm, part.local(filled)).double()


def grads_of(part: Pack) -> list[Tensor]:
    """The gradients, of a pack whose members all have one."""
    return part.local([p.grad for p in part.params if p.grad is not None])


def offsets_of(part: Pack) -> list[Tensor]:
    """The weights, minus their center where there is one."""
    centers = centers_of(part)
    return list(torch._foreach_sub(weights_of(part), centers)) if centers else weights_of(part)


def centers_of(part: Pack) -> list[Tensor]:
    """The centers; none where the rule has none."""
    return part.local([m.center for m in part.members if m.center is not None])


def starts_of(part: Pack, turn: Turn | None) -> list[Tensor]:
    """The weights before the step where they were kept, which is what an update is relative to; else the present ones."""
    before = {} if turn is None else turn.before
    for m in part.members if part.computed else ():
        if id(m.weight) not in before:
            m.now()
    return part.local([before.get(id(w), w) for w in part.weights])


def recenter_(weights: list[Tensor], centers: list[Tensor], old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """weight ← center + new offset where that changed; elsewhere the weight keeps its bits. Rounded once: the difference of offsets,
    added to the weight, would carry the rounding of an offset that may be many times the radius."""
    for weight, center, o, n in zip(weights, centers, old, new, strict=True):
        weight.copy_(torch.where(o == n, weight, center + n))


def own_grads(params: Iterable[Tensor]) -> None:
    """Gives a copy of its gradient to each parameter whose gradient cannot be written in place: one that is expanded, so that several
    entries are one place in memory, or negated lazily, which foreach does not take."""
    for p in params:
        g = p.grad
        if g is None or g.layout != torch.strided:
            continue
        local = here(g)
        if local.is_neg():
            p.grad = g.resolve_neg()
        elif not local.is_contiguous() and overlaps(local.shape, local.stride()):
            p.grad = g.clone(memory_format=torch.contiguous_format)


def given_center(centers: Any, name: str, weight: Tensor) -> Tensor:
    """One parameter's center; the names may carry the traces of wrappers, as those of a checkpoint do."""
    center = {clean_name(key): value for key, value in centers.items()}
    if name not in center:
        raise PolicyError(f"center= has no weights for {name!r}; it has {', '.join(sorted(center)[:10]) or 'none'}.")
    given = center[name]
    if given.shape != weight.shape:
        raise PolicyError(f"center= gives {name!r} the shape {tuple(given.shape)}, but the parameter has {tuple(weight.shape)}.")
    return placed_like(given.detach().to(weight.device, weight.dtype).clone(), weight)


def make_dense(rule: Rule, part: Pack) -> None:
    """Makes the gradients of a pack ones that can be written in place; PolicyError for a sparse one."""
    grads = [p.grad for p in part.params]
    if all([g is None or (g.layout == torch.strided and g.is_contiguous() and not g.is_neg()) for g in grads]):    # noqa: C419
        return
    own_grads(part.params)
    if any(g is not None and g.layout != torch.strided for g in grads):
        raise PolicyError(
            f"a gradient that rule '{rule.label()}' needs dense is sparse (among {part.members[0].name}, ...): use "
            "Embedding(sparse=False), or exclude the parameter."
        )
