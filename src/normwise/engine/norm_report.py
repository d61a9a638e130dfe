"""Norms, radii and zeros of a run for people and logs: totals, per role, per parameter; before and after the rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from normwise.engine.norm_log import KINDS, NormLog, grads_of, has_norm, norms_of, real_of, weights_of
from normwise.engine.pack import Member, is_sharded
from normwise.engine.program import Engine
from normwise.engine.rules.base import BoundRule
from normwise.engine.sharded.grouping import packs_of
from normwise.norms import L2
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.layouts import block_view
from normwise.policy.radii import Brake, Inflection, Quantile, Relative, StepLength, WarmStart, ZScore
from normwise.reports import Loggable, table, unique

# Parameters that are printed.
SHOWN = 40


@dataclass(frozen=True)
class NormReport(Loggable):
    """L2 norms by kind (``weight``, ``grad``, and with ``log=True`` ``weight_before``, ``grad_before``, ``update``).

    Without a log ``grad`` is that of the gradients there are now, and missing where there are none, as after ``zero_grad``; with one it is
    the last step's. Sparse gradients count by the entries they hold, complex numbers by both of their parts.

    Weights that a module computes from other tensors (``weight_norm``, masks) stand under their own names with the norm that the module
    uses; gradients are those of the raw tensors, under theirs.

    ``total[kind]`` is one number, ``role[kind]`` one a role, ``parameter[kind]`` one a parameter. A total is the norm of all numbers
    together, √Σ‖·‖², not the sum of norms. On request ``largest`` has for each weight matrix the L2 norm of its largest unit and that
    unit's number, and ``history`` the totals of the last steps by kind, oldest first.
    """

    prefix: ClassVar[str] = "norm/"
    total: dict[str, float] = field(default_factory=dict)
    role: dict[str, dict[str, float]] = field(default_factory=dict)
    parameter: dict[str, dict[str, float]] = field(default_factory=dict)
    largest: dict[str, tuple[float, int]] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def measured(
        cls, inventory: Inventory, owner: Mapping[int, int], log: NormLog | None, history: bool = False, largest: bool = False
    ) -> NormReport:
        """The present norms, and what the log recorded at the last step; with ``largest`` also each matrix's largest unit."""
        entries = _held_weights(inventory, owner)
        values: dict[str, dict[str, Tensor]] = {k: dict(v) for k, v in log.values.items() if v} if log else {}
        now = {"weight": weights_of(inventory.weights, entries)}
        if not values.get("grad") and (present := grads_of(entries)):    # what was logged outlives zero_grad
            now["grad"] = present
        values |= norms_of(now)
        roles = {e.name: e.role for e in (*inventory.entries, *inventory.weights)}
        report = cls()
        for kind in (k for k in KINDS if k in values):
            numbers = {name: float(v) for name, v in values[kind].items()}
            report.parameter[kind] = numbers
            report.total[kind] = _together(numbers.values())
            names = {role: [n for n in numbers if roles[n] == role] for role in {roles[n] for n in numbers}}
            report.role[kind] = {role: _together(numbers[n] for n in members) for role, members in sorted(names.items())}
        if largest:
            units = unit_norms(inventory, owner)
            report.largest.update({name: (float(norms.max()), int(norms.argmax())) for name, norms in units.items() if len(norms)})
        if history and log is not None:
            report.history.update({kind: [float(totals[kind]) for totals in log.past if kind in totals] for kind in report.total})
        return report

    def numbers(self) -> dict[str, float]:
        """Totals and roles, ``grad/total``, ``weight/hidden``, and the largest units where they were asked for, ``largest/fc1.weight``."""
        rows = {f"{kind}/total": value for kind, value in self.total.items()}
        rows |= {f"{kind}/{role}": v for kind, per in self.role.items() for role, v in per.items()}
        return rows | {f"largest/{name}": value for name, (value, _) in self.largest.items()}

    def __str__(self) -> str:
        kinds = [kind for kind in KINDS if kind in self.total]
        if not kinds:
            return "there are no norms: no parameter is held by an optimizer."
        names = list(dict.fromkeys(name for kind in kinds for name in self.parameter[kind]))
        roles = list(dict.fromkeys(role for kind in kinds for role in self.role[kind]))

        def row(label: str, found: Mapping[str, Mapping[str, float]], key: str) -> tuple[str, ...]:
            unit = (f"{self.largest[key][0]:.4g} [{self.largest[key][1]}]" if key in self.largest else "-",) if self.largest else ()
            return label, *(f"{found[kind][key]:.4g}" if key in found[kind] else "-" for kind in kinds), *unit

        rows = [row("all", {kind: {"": self.total[kind]} for kind in kinds}, "")]
        rows += [row(f"role {role}", self.role, role) for role in roles] + [row(name, self.parameter, name) for name in names[:SHOWN]]
        text = table(("L2 norm", *kinds, *(("largest unit",) if self.largest else ())), rows, right=range(1, len(rows[0])))
        left = [f"and {len(names) - SHOWN} more parameters"] if len(names) > SHOWN else []
        past = [f"{kind}, last {len(v)} steps: {min(v):.4g} to {max(v):.4g}, now {v[-1]:.4g}" for kind, v in self.history.items() if v]
        return "\n".join([text, *left, *past])


@dataclass(frozen=True)
class Radii(Loggable):
    """The radius that each rule holds its blocks to now: ``of[rule][parameter]`` is (smallest, largest) over the blocks.

    A rule without a radius is not listed. Radii that a step has to tell, such as the norm before it, are in ``unknown``, with the reason.
    """

    prefix: ClassVar[str] = "radius/"
    of: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    @classmethod
    def measured(cls, engine: Engine, steps: Sequence[int]) -> Radii:
        """Of bound rules at the optimizers' step counts."""
        report, bounds = cls(), [b for b in engine.rules if b.rule.radius is not None]
        for label, bound in zip(unique(b.rule.label() for b in bounds), bounds, strict=True):
            if (why := _unknown_radius(bound)) is not None:
                report.unknown[label] = why
                continue
            found = report.of.setdefault(label, {})
            for part in bound.packs:
                step = max(0, max(steps[k] for k in part.optimizers) - 1)
                for name, values in _radii_of(bound, part, step):
                    found[name] = float(values.min()), float(values.max())
        return report

    def numbers(self) -> dict[str, float]:
        """The largest radius of each rule and parameter."""
        return {f"{label}/{name}": high for label, per in self.of.items() for name, (_, high) in per.items()}

    def __str__(self) -> str:
        rows = [(label, name, f"{low:.6g}", f"{high:.6g}") for label, per in self.of.items() for name, (low, high) in per.items()]
        text = [table(("rule", "parameter", "smallest", "largest radius"), rows, right=(2, 3))] if rows else ["no radius is known now."]
        return "\n".join([*text, *(f"{label}: {why}" for label, why in self.unknown.items())])


def _unknown_radius(bound: BoundRule) -> str | None:
    """Why nobody can say a rule's radius between two steps."""
    radius = bound.rule.radius
    if isinstance(radius, Brake):
        return "the norm before each step, and a share of its growth"
    if isinstance(radius, Relative | StepLength):
        return f"{radius.label()}, known at each step"
    if isinstance(radius, Quantile | ZScore) and not all(bool((own["count"] > 0).all()) for own in bound.store.values()):
        return "found in training, and no step has been seen yet"
    return None


def _radii_of(bound: BoundRule, part: Any, step: int) -> list[tuple[str, Tensor]]:
    """(parameter, the radii of its blocks), or one pair of all together."""
    radius, members = bound.rule.radius, part.members
    names = [key for key in bound.store if key == "all together"] or [m.name for m in members]
    if isinstance(radius, ZScore):    # what a norm must exceed to count as a spike
        return [(n, bound.store[n]["mean"] + radius.z * bound.store[n]["variance"].sqrt()) for n in names]
    if isinstance(radius, Quantile):
        seen = [(n, bound.store[n]["history"], bound.store[n]["count"].clamp(max=radius.window).long()) for n in names]
        share = radius.percentile / 100
        return [(n, torch.stack([h[:c].quantile(share) for h, c in zip(past, count, strict=True)])) for n, past, count in seen]
    if isinstance(radius, Inflection | WarmStart):
        return [(n, bound.store[n]["kappa"]) for n in names]
    held = bound.radius(part, None, step)
    values = held if isinstance(held, Tensor) else torch.tensor(held, dtype=torch.float64)
    if values.ndim and len(values) == sum(m.view.count for m in members):
        return list(zip([m.name for m in members], torch.split(values, [m.view.count for m in members]), strict=True))
    return [(m.name, values.reshape(-1)) for m in members]


@dataclass(frozen=True)
class Zeros(Loggable):
    """How much of each weight is exactly zero: ``entries[name]`` the share of its numbers, ``units[name]`` (zero units, all units)."""

    prefix: ClassVar[str] = "zeros/"
    entries: dict[str, float] = field(default_factory=dict)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def measured(cls, inventory: Inventory, owner: Mapping[int, int]) -> Zeros:
        """Of every weight that an optimizer holds."""
        held = _held_weights(inventory, owner)
        weights = weights_of(inventory.weights, held)
        entries = {}
        for name, w in weights.items():
            count: Any = (real_of(w) == 0).sum()
            entries[name] = float(count.full_tensor() if is_sharded(w) else count) / max(w.numel(), 1)
        units = {name: (int((norms == 0).sum()), len(norms)) for name, norms in unit_norms(inventory, owner).items()}
        return cls(entries, units)

    def numbers(self) -> dict[str, float]:
        """The share of zero entries of each weight, and the share of its zero units under ``units/``."""
        return {**self.entries, **{f"units/{name}": zero / n for name, (zero, n) in self.units.items() if n}}

    def __str__(self) -> str:
        rows = [(n, f"{share:.1%}", "{} of {}".format(*self.units[n]) if n in self.units else "-") for n, share in self.entries.items()]
        return table(("weight", "zero entries", "zero units"), rows, right=(1, 2))


def _held_weights(inventory: Inventory, owner: Mapping[int, int]) -> list[Entry]:
    return [e for e in inventory.entries if id(e.param) in owner and has_norm(e.param)]


def unit_norms(inventory: Inventory, owner: Mapping[int, int]) -> dict[str, Tensor]:
    """The L2 norm of every unit of the weights that are matrices and whose axes are known, by name."""
    found = {}
    for e in inventory.weights:
        whole = e.role not in ("bias", "gain") and e.adapter != "product" and e.layout.certain
        if not whole or not any(id(p) in owner for p in e.parameters) or not has_norm(e.param):
            continue
        member = Member(e.name, e.param, block_view(e.layout, "unit", False, name=e.name), 0, computed=e.computed)
        [part] = packs_of([member], False, agree=True)
        found[e.name] = part.measure(L2(), part.local([member.now()]))
    return found


def _together(values: Iterable[float]) -> float:
    return math.hypot(*values)
