"""Norms of a run for people and logs: totals, per role, per parameter; before and after the rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normwise.engine.sharded import is_sharded
from normwise.engine.sharded.norms import lengths
from normwise.parameters.inventory import Entry, Inventory

KINDS = ("weight", "weight_before", "grad", "grad_before", "update")


class NormLog:
    """Records the norms of each step; nothing is read back until somebody asks."""

    def __init__(self, inventory: Inventory, owner: Mapping[int, int]) -> None:
        self.entries = [e for e in inventory.entries if id(e.param) in owner]
        self.owner, self.weights = owner, inventory.weights
        self.values: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        self._start: dict[str, Tensor] = {}

    def _held(self, optimizers: Iterable[int]) -> list[Entry]:
        wanted = set(optimizers)
        return [e for e in self.entries if self.owner[id(e.param)] in wanted and _has_norm(e.param)]

    def before(self, optimizers: Sequence[int], first: bool = True) -> None:
        """Before the rules: raw gradients, and where it is the step's ``first`` evaluation the weights as the last step left them."""
        held = self._held(optimizers)
        found = {"grad_before": _grads(held)}
        if first:
            weights = _weights(self.weights, held)
            found["weight_before"] = weights
            self._start = {**self._start, **{name: w.clone() for name, w in weights.items()}}
        self._record(found)

    def after(self, optimizer: int) -> None:
        """After the step and its rules. The update is all that changed in the weights, rules included."""
        held = self._held([optimizer])
        weights = _weights(self.weights, held)
        moved = {name: w - self._start.pop(name) for name, w in weights.items() if name in self._start}
        self._record({"weight": weights, "update": moved, "grad": _grads(held)})

    def _record(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        for kind, norms in _norms(found).items():
            self.values[kind] |= norms


@dataclass(frozen=True)
class NormReport:
    """L2 norms by kind (``weight``, ``grad``, and with ``log=True`` ``weight_before``, ``grad_before``, ``update``).

    Without a log ``grad`` is that of the gradients there are now, and missing where there are none, as after ``zero_grad``; with one it is
    the last step's. Sparse gradients count by the entries they hold, complex numbers by both of their parts.

    Weights that a module computes from other tensors (``weight_norm``, masks) stand under their own names with the norm that the module
    uses; gradients are those of the raw tensors, under theirs.

    ``total[kind]`` is one number, ``role[kind]`` one a role, ``parameter[kind]`` one a parameter. A total is the norm of all numbers
    together, √Σ‖·‖², not the sum of norms.
    """

    total: dict[str, float] = field(default_factory=dict)
    role: dict[str, dict[str, float]] = field(default_factory=dict)
    parameter: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def measured(cls, inventory: Inventory, owner: Mapping[int, int], log: NormLog | None) -> NormReport:
        """The present norms, and what the log recorded at the last step."""
        entries = [e for e in inventory.entries if id(e.param) in owner and _has_norm(e.param)]
        values: dict[str, dict[str, Tensor]] = {k: dict(v) for k, v in log.values.items() if v} if log else {}
        now = {"weight": _weights(inventory.weights, entries)}
        if not values.get("grad") and (present := _grads(entries)):    # what was logged outlives zero_grad
            now["grad"] = present
        values |= _norms(now)
        roles = {e.name: e.role for e in (*inventory.entries, *inventory.weights)}
        report = cls()
        for kind in (k for k in KINDS if k in values):
            numbers = {name: float(v) for name, v in values[kind].items()}
            report.parameter[kind] = numbers
            report.total[kind] = _together(numbers.values())
            names = {role: [n for n in numbers if roles[n] == role] for role in {roles[n] for n in numbers}}
            report.role[kind] = {role: _together(numbers[n] for n in members) for role, members in sorted(names.items())}
        return report

    def flat(self, prefix: str = "norm/") -> dict[str, float]:
        """Totals and roles as one flat mapping, for loggers: ``norm/grad/total``, ``norm/weight/hidden``."""
        rows = {f"{prefix}{kind}/total": value for kind, value in self.total.items()}
        return rows | {f"{prefix}{kind}/{role}": v for kind, per in self.role.items() for role, v in per.items()}


def _weights(weights: Sequence[Entry], held: Sequence[Entry]) -> dict[str, Tensor]:
    """The weights, by name, that the parameters ``held`` are or are a part of; computed ones in memory that the next reading overwrites."""
    ids = {id(e.param) for e in held}
    found = [e for e in weights if any(id(p) in ids for p in e.parameters)]
    return {e.name: e.param.detach() if e.computed is None or e.computed.failure else e.computed.read() for e in found}


def _grads(entries: Iterable[Entry]) -> dict[str, Tensor]:
    return {e.name: e.param.grad for e in entries if e.param.grad is not None}


def _has_norm(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def _real(t: Tensor) -> Tensor:
    """Real numbers with the same L2 norm: of a sparse tensor the sums of what it holds, of a complex one both parts."""
    if is_sharded(t):
        return t
    if t.layout == torch.sparse_coo:
        t = t.coalesce().values()
    elif t.layout != torch.strided:
        t = t.values()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _norms(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The L2 norms, as 0-dim tensors, of tensors by kind and name; one collective a mesh for all of them."""
    norms = iter(lengths([_real(t) for tensors in found.values() for t in tensors.values()]))
    return {kind: {name: next(norms) for name in tensors} for kind, tensors in found.items()}


def _together(values: Iterable[float]) -> float:
    return math.hypot(*values)
