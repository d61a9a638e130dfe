"""Rules on weights that are computed from other tensors: what is refused, tried on a copy when a rule is bound.

A rule works on the computed weight as on any other; then ``parameters.computed_weights`` looks for raw tensors that give it. Whether
there are any depends on the change that the rule makes: a mask stays a mask under scaling but not under a projection of singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normwise.engine.pack import is_sharded
from normwise.errors import PolicyError, a_kind_of
from normwise.norms import Norm, Set
from normwise.norms.reduce import HALF, up
from normwise.parameters.layouts import BlockView
from normwise.policy import Rule, actions
from normwise.policy.radii import Base
from normwise.policy.rule import norm_label
from normwise.policy.schedules import is_number

if TYPE_CHECKING:
    from normwise.engine.pack import Member
    from normwise.parameters.computed_weights import Way
    from normwise.parameters.inventory import Entry

# How far, relatively, a weight may be from what was assigned; beyond it an inverse is none, not one that rounds.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ROTATION_FREE = ("l2", "spectral", "nuclear", "max_of_units", "sum_of_units")
"""The norms that a rotation of the inputs leaves as they are."""
INSTEAD = "Exclude it (exclude=), use a penalty, which needs no inverse, or remove the parametrization"


def refuse_computed(held: Sequence[Entry], rule: Rule, owner: Mapping[int, int]) -> None:
    """PolicyError for weights whose raw tensors the rule cannot set, as far as no number must be tried for that."""
    if rule.phase == "gradient":
        return
    _refuse_products(held, rule)
    for e in held:
        if e.computed is None:
            _refuse_stored_otherwise(e, rule)
        else:
            _refuse_computed(e, rule, owner)
    if rule.phase != "penalty":    # which may add to a gradient twice
        _refuse_shared(held, rule)


def _refuse_computed(e: Entry, rule: Rule, owner: Mapping[int, int]) -> None:
    computed = e.computed
    assert computed is not None
    how = computed.way.how
    if any(is_sharded(p) for p in computed.parameters):
        raise _refused(e, rule, f"{how} computes it from DTensors, and no rank has all of it", "Exclude it")
    if why := computed.refused(rule.phase):
        no_penalty = rule.phase == "penalty" or not computed.way.differentiable
        raise _refused(e, rule, why, "Exclude it (exclude=)" if no_penalty else INSTEAD)
    if rule.rounding != "nearest" and any(p.dtype in HALF for p in computed.parameters):
        raise _refused(e, rule, f"rounding={rule.rounding!r} is of the weights that are stored, and {how} computes this one", "Exclude it")
    if rule.phase == "update" and len({owner[id(p)] for p in e.trained if id(p) in owner}) > 1:
        raise _refused(e, rule, "several optimizers step the tensors it is computed from, so its update is not one step", "Exclude it")
    loose = [p for p in e.trained if id(p) not in owner]
    if loose:
        shapes = ", ".join(str(tuple(p.shape)) for p in loose)
        why = f"{how} computes it from several tensors, and no given optimizer holds the trainable one of shape {shapes}"
        raise _refused(e, rule, why, "Give the optimizer that holds it, or freeze it")


def _refuse_products(held: Sequence[Entry], rule: Rule) -> None:
    """What a rule cannot mean on LoRA's products, of which only what a rotation of the inputs leaves alone is ever computed; and a radius
    that counts in their bases elsewhere."""
    products = [e for e in held if e.adapter == "product"]
    others = [e for e in held if e.adapter != "product"]
    if isinstance(rule.radius, Base) and others:
        raise _refused(others[0], rule, "only LoRA's products have a base that a radius counts in", "Give params='peft:product', or 'init'")
    rotates = isinstance(rule.norm, Norm) and rule.norm.name in ROTATION_FREE and rule.per not in ("input", "element")
    entries = f"norm {norm_label(rule.norm)!r} per={rule.per!r} needs its entries, which are never formed"
    instead = f"Norms of products are {', '.join(ROTATION_FREE)}, per tensor, matrix, unit, head or global"
    for wrong, why, do in (
        (not rotates and rule.action != "weight_decay", entries, instead),
        (rule.on == "update", "what a step adds to it is no matrix of its rank, since A turns", "Bound the product itself, on='weight'"),
        (rule.center is not None, "LoRA starts from zero, which is its center", "Leave center out"),
        (rule.action in ("cpr", "qk_clip"), f"{rule.action} has no meaning there", "Leave it to other weights"),
        (rule.tolerance > 0, "its singular values are found exactly at little cost", "Leave tolerance out"),
        (rule.layout is not None, "its axes are those of its base", "State those, by layouts="),
    ):
        if products and wrong:
            raise _refused(products[0], rule, why, do)


def _refuse_shared(held: Sequence[Entry], rule: Rule) -> None:
    """What one rule would do to one of two uses of a tensor, it would undo for the other."""
    users: dict[int, Entry] = {}
    for e in held:
        for p in e.parameters:
            other = users.setdefault(id(p), e)
            if other is not e:
                raise _refused(e, rule, f"it shares a tensor with {other.name!r}, which is another weight", "Name one of them in params=")


def _refuse_stored_otherwise(e: Entry, rule: Rule) -> None:
    """Quantised tensors pass for floating-point ones, and keep other numbers than those written to them."""
    p: Any = e.param
    if is_traceable_wrapper_subclass(p) and not is_sharded(p) and not _keeps_what_is_written(p):
        raise _refused(e, rule, f"{a_kind_of(p)} stores its numbers in another form, and rounds what is written to it", "Exclude it")
    if rule.phase == "weight" and isinstance(getattr(e.module, f"{e.local_name}_fake_quant", None), nn.Module):
        raise _refused(e, rule, "fake quantisation rounds it to a grid before it is used, which may take it over a bound", "Exclude it")


def _keeps_what_is_written(p: Any) -> bool:
    try:
        with torch.no_grad():
            copy, wanted = p.detach().clone(), torch.linspace(-1, 1, p.numel(), dtype=p.dtype, device=p.device).view(p.shape)
            copy.copy_(wanted)
            return bool((copy + 0 == wanted).all()) and bool((copy * 0.37 + 0 == wanted * 0.37).all())
    except Exception:    # a class that cannot do one of these cannot take part in a rule
        return False


def _refused(e: Entry, rule: Rule, why: str, do: str = INSTEAD) -> PolicyError:
    return PolicyError(f"rule '{rule.label()}' cannot act on the weight {e.name!r}: {why}. {do}.")


# ------------------------------------------------------------------------------------------------------------ a trial


def margin_of(rule: Rule, entry: Entry, member: Member) -> float:
    """The share by which a norm of the member's weight may differ from that of what the rule assigns.

    Tries on copies what the rule does: raw tensors for a changed weight, and the weight computed from them. PolicyError where that is not
    the changed weight, or where it takes a tensor that must not change.
    """
    if rule.phase == "penalty":
        return 0.0
    computed = entry.computed
    assert computed is not None
    way, worst = computed.way.twin(), 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for change in _changes(rule, member):
            parts = _moved(computed.way, generator)
            old = way.forward(*parts)
            new = change(old, lambda: way.forward(*_moved(computed.way, generator)), generator)
            found = _inverse(way, parts, old, new, entry, rule)
            if entry.trained:    # what is frozen altogether is measured, and no more
                _refuse_frozen(computed.way.parts(), parts, found, entry, rule)
            worst = max(worst, _distance(member.view, new, way.forward(*found), old))
    coarsest = max((part.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).eps)
    if not worst <= TOLERANCE[coarsest]:
        raise _refused(entry, rule, f"{way.how} cannot give what this rule makes of it: tried on a copy, it is off by {worst:.2g}")
    margin = way.margin(old)
    margin = max(margin, 4 * worst) if margin or worst else 0.0
    return 2.0 ** math.ceil(math.log2(margin)) if way.together and margin else margin    # a power of two, which many share in one pack


def refuse_narrow(rule: Rule, entry: Entry, member: Member) -> None:
    """PolicyError for a ball around a center that is narrower than what rounding does to a computed weight as large as the center."""
    radius: Any = rule.radius
    if member.center_norm is None or entry.computed is None or not is_number(radius):
        return
    if bool((member.margin * (member.center_norm + radius) >= radius).any()):
        why = f"it is computed in {entry.computed.site.param.dtype}, whose rounding moves it by more than {radius:g}"
        raise _refused(entry, rule, why, "Give a larger radius, compute it in float32, or exclude it")


_Change = Callable[[Tensor, Callable[[], Tensor], torch.Generator], Tensor]


def _changes(rule: Rule, member: Member) -> list[_Change]:
    """What the rule may do to a weight: (the weight, another weight of the same kind, random numbers) -> the changed weight."""
    norm, view = rule.norm, member.view
    radial = actions.scales(rule.action, norm)

    def scaled(old: Tensor, other: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
        center = member.center if member.center is not None else torch.zeros_like(old)
        return (center + _each_block(view, old, generator) * (old - center)).to(old.dtype)

    def updated(old: Tensor, other: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
        share = _each_block(view, old, generator) if radial else _random(old.shape, old, generator)
        return (old + share * (other() - old)).to(old.dtype)

    def steepest(old: Tensor, other: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
        return (old + (_random(old.shape, old, generator) - 0.5) * old.abs().amax()).to(old.dtype)

    def transformed(by: Callable[[Tensor], Tensor]) -> _Change:
        def change(old: Tensor, other: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
            new, center = old.clone(), member.center if member.center is not None else torch.zeros_like(old)
            view.write_(new, by(view.blocks(old - center)))
            return new + center if member.center is not None else new

        return change

    if rule.phase == "update":
        return [steepest if rule.action == "lmo" else updated]
    if rule.action == "project" and not radial:
        if isinstance(norm, Set):
            return [transformed(lambda blocks: norm.project(blocks, 1.0))]
        return [transformed(lambda blocks: norm.project(blocks, (0.5 * norm.measure(blocks)).to(up(blocks).dtype)))]
    if rule.action == "prox" and rule.power != 2:    # half of the square of L2 scales
        return [transformed(lambda blocks, share=share: _thresholded(norm, blocks, share, rule.power)) for share in (0.3, 10.0)]    # type: ignore[misc]
    return [scaled]


def _thresholded(norm: Norm | Set, blocks: Tensor, share: float, power: int) -> Tensor:
    """The prox with a step that is a share of the one that makes everything zero."""
    assert isinstance(norm, Norm)
    sizes = blocks.abs().flatten(1).amax(1) if norm.p == 1 else norm.measure(blocks)
    return actions.prox(norm, blocks, share * float(sizes.median()), power)


def _each_block(view: BlockView, like: Tensor, generator: torch.Generator) -> Tensor:
    """One random number of (0.3, 1) a block, shaped as the weight."""
    numbers = 0.3 + 0.7 * torch.rand(view.count, generator=generator)
    return view.expand(numbers.to(like.device, up(like).dtype)).expand(view.shape).reshape(like.shape)


def _random(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator).to(like.device, up(like).dtype)


def _moved(way: Way, generator: torch.Generator) -> list[Tensor]:
    """The raw tensors, moved a little, so that what is tried is no special case such as zeros."""
    moved = []
    for part in way.parts():
        size = up(part.detach()).square().mean().sqrt()
        step = torch.where(size > 0, 0.1 * size, 1.0) * (_random(part.shape, part, generator) - 0.5)
        moved.append((part.detach() + step).to(part.dtype))
    return moved


def _inverse(way: Way, parts: Sequence[Tensor], old: Tensor, new: Tensor, entry: Entry, rule: Rule) -> list[Tensor]:
    try:
        found = way.inverse(parts, old, new)
    except Exception as error:
        what = f"asked for what this rule makes of it, right_inverse of {way.how} failed with {type(error).__name__}: {error}"
        raise _refused(entry, rule, what) from error
    fits = len(found) == len(parts) and all(f.shape == p.shape and f.dtype == p.dtype for f, p in zip(found, parts, strict=False))
    if not fits or not all(bool(f.isfinite().all()) for f in found):
        raise _refused(entry, rule, f"right_inverse of {way.how} gives no finite raw tensors for what this rule makes of it")
    return found


def _refuse_frozen(now: Sequence[Tensor], parts: Sequence[Tensor], found: Sequence[Tensor], entry: Entry, rule: Rule) -> None:
    for raw, part, new in zip(now, parts, found, strict=True):
        if not (isinstance(raw, nn.Parameter) and raw.requires_grad) and not torch.equal(part, new):
            kind = "frozen" if isinstance(raw, nn.Parameter) else "a buffer"
            why = f"the rule would have to change a tensor of shape {tuple(raw.shape)} that it is computed from, which is {kind}"
            raise _refused(entry, rule, why, "Unfreeze that, or exclude the weight")


def _distance(view: BlockView, wanted: Tensor, got: Tensor, old: Tensor) -> float:
    """How far the worst block is from what was wanted, relatively; a zero block measured against the largest entry there was."""
    blocks: list[Any] = [view.blocks(t.double()).flatten(1) for t in (wanted, got - wanted)]
    length, off = (torch.linalg.vector_norm(b, dim=1) for b in blocks)
    return float((off / torch.where(length > 0, length, old.double().abs().amax())).max()) if len(off) else 0.0
