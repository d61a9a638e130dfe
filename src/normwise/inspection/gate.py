"""A policy's bounds on a checkpoint, measured as ``control.verify()`` measures them: by the engine's own rules, norms and margins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from normwise.engine.rules.base import BoundRule, bind
from normwise.engine.verify import Breach, Largest, Verification, measure_all
from normwise.errors import LayoutError, PolicyError
from normwise.inspection.stored import REAL
from normwise.norms import Norm
from normwise.parameters.inventory import Entry
from normwise.policy import Policy, Rule
from normwise.policy.radii import Init
from normwise.policy.schedules import is_number

_OF_PARTS = ("l1", "l2", "linf")
"""Norms of a long vector that are the same norm of the norms of its parts."""


class Gate:
    """The rules of a policy that can be measured on stored weights.

    Args:
        policy: the rules.
        entries: what the checkpoint's tensors are.
        strange: tensors that are not measured, each with the reason, as entries that a selector can match.
        guessed: whether that is guessed, so that nothing is known of modules and attentions.
        based: whether the initial weights are known, for radii and centers of ``"init"``.

    Raises:
        PolicyError: a selector that matches nothing.
    """

    def __init__(
        self, policy: Policy, entries: Iterable[Entry], strange: Mapping[str, tuple[Entry, str]], guessed: bool, based: bool
    ) -> None:
        self.unchecked: list[str] = []
        self.rules: list[tuple[Rule, set[str]]] = []
        every = [*entries, *(entry for entry, _ in strange.values())]
        listed = [replace(e, role=policy.roles.get(e.name, e.role)) for e in every] if policy.roles else every
        for rule in policy:
            if (reason := _why_not(rule, guessed, based)) is not None:
                self.unchecked.append(f"{rule.label()}: {reason}")
                continue
            names = [e.name for e in rule.targets(listed)]
            self.rules.append((rule, set(names) - strange.keys()))
            self.unchecked += [f"{rule.label()}: {name} is not measured: {strange[name][1]}" for name in names if name in strange]

    def concerns(self, name: str) -> bool:
        return any(name in names for _, names in self.rules)

    def look_at(self, entry: Entry, tensor: Tensor, base: Callable[[], Tensor] | None) -> list[dict[str, Any]]:
        """What each rule finds on one tensor, as plain data. base: gives the initial weights, where the rule asks for them."""
        tensor = tensor if tensor.dtype in REAL else tensor.float()
        found = []
        for i, (rule, names) in enumerate(self.rules):
            if entry.name in names:
                found.append({"rule": i, **_look_at(rule, entry, tensor, base)})
        return found

    def verification(self, found: Sequence[Sequence[dict[str, Any]]]) -> Verification:
        """What :meth:`look_at` gave for all tensors, put together."""
        result = Verification(unchecked=list(self.unchecked))
        for i, (rule, _) in enumerate(self.rules):
            mine = [one for each in found for one in each if one["rule"] == i]
            result.unchecked += [f"{rule.label()}: {one['unchecked']}" for one in mine if "unchecked" in one]
            mine = [one for one in mine if "unchecked" not in one]
            if not mine:
                continue
            result.rules.append(rule.label())
            if rule.per == "global":
                _add_global(rule, [one["value"] for one in mine], result)
                continue
            result.blocks += sum(one["blocks"] for one in mine)
            result.zeros += sum(one["zeros"] for one in mine)
            result.breaches += [Breach(**breach) for one in mine for breach in one["breaches"]]
            nearest = [Largest(**largest) for one in mine for largest in one["largest"]]
            result.largest += [max(nearest, key=_by_excess)] if nearest else []
        return result


def _by_excess(one: Largest) -> float:
    excess = one.value - one.bound
    return excess if excess == excess else torch.inf


def _why_not(rule: Rule, guessed: bool, based: bool) -> str | None:
    """Why a checkpoint cannot tell whether the rule's bound holds; None where it can."""
    selectors = [one for s in (rule.params, rule.exclude) for one in (s if isinstance(s, list | tuple) else [s])]
    radius: Any = rule.radius
    scale = radius.scale if isinstance(radius, Init) else radius
    if (reason := _unbounded(rule)) is not None:
        return reason
    if guessed and any(isinstance(one, type) or (isinstance(one, str) and one.startswith(("class:", "attention:"))) for one in selectors):
        return "it selects by modules, which a checkpoint does not have: give --config or --model"
    if any(isinstance(one, str) and one.startswith("peft:") for one in selectors):
        return "it selects an adapter's parts in a model: control.verify() measures it there"
    if rule.every > 1 or rule.stop is not None:
        return "it rests at some steps, and a checkpoint does not tell its step"
    if radius is not None and not is_number(scale):
        return "its radius depends on the step or is found in training, and a checkpoint tells neither"
    if (isinstance(radius, Init) or rule.center == "init") and not based:
        return "its bound is relative to the initial weights: give these with --against"
    if rule.per == "global" and (rule.norm.name not in _OF_PARTS or isinstance(radius, Init) or rule.center is not None):
        return "one norm of all tensors together is measured for l1, l2 and linf and a plain radius alone"
    return None


def _unbounded(rule: Rule) -> str | None:
    if rule.phase in ("gradient", "update"):
        return f"it acts on {rule.phase}s, which no checkpoint has"
    if isinstance(rule.radius, Init) and rule.per == "global":
        return None    # bound to nothing it has no first norm
    return bind(rule, [], {}, 0).nothing_to_verify


def _look_at(rule: Rule, entry: Entry, tensor: Tensor, base: Callable[[], Tensor] | None) -> dict[str, Any]:
    if rule.per == "global":
        assert isinstance(rule.norm, Norm)
        return {"value": float(rule.norm.measure(tensor.double().reshape(1, -1)))}
    initial = isinstance(rule.radius, Init) or rule.center == "init"
    if initial and base is None:
        return {"unchecked": f"{entry.name} has no initial weights in the base"}
    # A rule is bound to the initial weights, and then finds the present ones in their place, as it would after training.
    start = base().to(tensor.dtype).clone() if initial and base is not None else tensor
    if initial and not bool(start.isfinite().all()):
        return {"unchecked": f"{entry.name} has initial weights that are not finite (NaN or infinite) in the base"}
    param = nn.Parameter(start, requires_grad=False)
    result = Verification()
    try:
        bound: BoundRule = bind(rule, [replace(entry, param=param, computed=None)], {id(param): 0}, 0)
        if initial:
            param.data.copy_(tensor)
        measure_all([(bound, part, 0) for part in bound.packs], rule.label(), result)
    except (LayoutError, PolicyError) as error:
        return {"unchecked": str(error)}
    return {
        "blocks": result.blocks, "zeros": result.zeros, "breaches": [asdict(one) for one in result.breaches],
        "largest": [asdict(one) for one in result.largest],
    }  # fmt: skip


def _add_global(rule: Rule, values: list[float], result: Verification) -> None:
    """One norm of all tensors together, as a block."""
    assert isinstance(rule.norm, Norm)
    value = float(rule.norm.measure(torch.tensor([values], dtype=torch.float64)))
    limit: Any = rule.radius
    result.blocks += 1
    result.largest.append(Largest(rule.label(), "all together", 0, value, limit))
    if not value <= limit * (1 + 1e-6 + rule.tolerance):
        result.breaches.append(Breach(rule.label(), "all together", 0, value, limit, value - limit))
