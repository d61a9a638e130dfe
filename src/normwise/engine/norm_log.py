"""The norms of each step, recorded while training goes on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from normwise.engine.pack import is_sharded, versions
from normwise.engine.sharded.norms import lengths
from normwise.engine.step import OnePass, Squares
from normwise.norms import native
from normwise.norms.reduce import wide
from normwise.parameters.inventory import Entry, Inventory

KINDS = ("weight", "weight_before", "grad", "grad_before", "update")


class NormLog:
    """Records the norms of each step; nothing is read back until somebody asks.

    Args:
        inventory: the model's parameters.
        owner: which optimizer holds each, by its id.
        past: where the totals of each step go, oldest first, at most as many steps as it holds; shared by the logs of one control.
    """

    def __init__(self, inventory: Inventory, owner: Mapping[int, int], past: deque[dict[str, Tensor]]) -> None:
        self.past, self._in_this_round = past, set[int]()
        self.entries = [e for e in inventory.entries if id(e.param) in owner]
        self.owner, self.weights = owner, inventory.weights
        self.values: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        self._start: dict[str, Tensor] = {}
        self._passes: dict[int, _Passes | None] = {}
        self.squares = Squares()

    def _held(self, optimizers: Iterable[int]) -> list[Entry]:
        wanted = set(optimizers)
        return [e for e in self.entries if self.owner[id(e.param)] in wanted and has_norm(e.param)]

    def before(self, optimizers: Sequence[int], first: bool = True, one_pass: OnePass | None = None) -> None:
        """Before the rules: raw gradients, and where it is the step's ``first`` evaluation the weights as the last step left them.

        one_pass: what may measure the update within the step.
        """
        gradients = grads_of(self._held(optimizers))
        self.squares.clear()
        self._measure("grad_before", gradients)
        for k in optimizers if first else ():
            passes = self._passes_of(k)
            known = passes.before(one_pass is not None and one_pass.alone) if passes is not None else None
            if known is not None:
                self.values["weight_before"] |= known
                continue
            self._passes[k] = None
            weights = weights_of(self.weights, self._held([k]))
            self._record({"weight_before": weights})
            self._start |= {name: w.clone() for name, w in weights.items()}

    def keep(self, optimizer: int) -> None:
        """Right before the step, where nothing measures its update within it."""
        passes = self._passes.get(optimizer)
        if passes is not None:
            passes.keep()

    def after(self, optimizer: int, one_pass: OnePass | None = None) -> None:
        """After the step and its rules. The update is all that changed in the weights, rules included."""
        held, passes = self._held([optimizer]), self._passes.get(optimizer)
        gradients, found = grads_of(held), passes.after(one_pass) if passes is not None else None
        if found is not None:
            self.values["weight"] |= found[0]
            self.values["update"] |= found[1]
        else:
            weights = weights_of(self.weights, held)
            moved = {name: w - self._start.pop(name) for name, w in weights.items() if name in self._start}
            self._record({"weight": weights, "update": moved})
        self._measure("grad", gradients)
        self.squares.clear()
        if self.past.maxlen:
            totals = {kind: _total(found.values()) for kind, found in self.values.items() if found}
            if self.past and self._in_this_round and optimizer not in self._in_this_round:
                self.past[-1] = totals    # several optimizers that step in turn make one step of the history
            else:
                self.past.append(totals)
                self._in_this_round.clear()
            self._in_this_round.add(optimizer)

    def _passes_of(self, k: int) -> _Passes | None:
        if k not in self._passes:
            ids = {id(e.param) for e in self._held([k])}
            own = [e for e in self.weights if e.adapter != "product" and any(id(p) in ids for p in e.parameters)]
            plain = native.library() is not None and native.fit([e.param for e in own]) and all(e.computed is None for e in own)
            self._passes[k] = _Passes({e.name: e.param for e in own}) if own and plain else None
        return self._passes[k]

    def _measure(self, kind: str, gradients: Mapping[str, Tensor]) -> None:
        """Gradients, of which those that were measured in this step, and not changed, are known."""
        listed = list(gradients.values())
        squares = self.squares.of(listed)
        if squares is None and (squares := _squares(listed)) is not None:
            self.squares.keep(listed, squares)
        if squares is None:
            self._record({kind: gradients})
        else:
            self.values[kind] |= _named(gradients, squares)

    def _record(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        known = {kind: _squares(list(tensors.values())) for kind, tensors in found.items()}
        others = norms_of({kind: tensors for kind, tensors in found.items() if known[kind] is None})
        for kind, tensors in found.items():
            squares = known[kind]
            self.values[kind] |= others[kind] if squares is None else _named(tensors, squares)


def _total(norms: Iterable[Tensor]) -> Tensor:
    """The norm of all numbers together, left on the device."""
    listed = list(norms)
    return torch.linalg.vector_norm(torch.stack([n.to(listed[0].device, wide(listed[0].device)) for n in listed]))


class _Passes:
    """What the kernels know of one optimizer's weights: the norm of each as the last step left it, and a copy of each.

    One pass after a step gives the norms of the weights and of the updates, and brings the copies up to date; the next step starts from
    them, unless somebody has written to a weight in between. Where the optimizer's own kernel measures both within the step, and the first
    step has shown that nothing else moves the weights after it, there are no copies.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.names, self.weights = list(weights), list(weights.values())
        self.workspace, self.others = native.Workspace(self.weights), native.Workspace(self.weights)
        self._copies: list[Tensor] = []
        self._left: list[int] = []
        self._trusts: bool | None = None
        self._squares: list[float] = []

    def before(self, told: bool) -> dict[str, Tensor] | None:
        """The norms of the weights that the step starts from; None where the kernels cannot look at them. told: the update may be measured
        within the step."""
        if not self.workspace.place_again(self.weights):
            return None
        changed = self._left != versions(self.weights)
        if told and self._trusts:
            self._copies = []
        else:
            self.keep()
        if changed:
            # The same sums as after a step, to the last digit: a run that is resumed starts here.
            if self._copies:
                native.squared_updates_(self.workspace, self.others)
            else:
                native.sum_of_squares(self.workspace)
            self._squares = list(self.workspace.each)
        self._left = versions(self.weights)
        return _named(self.names, self._squares)

    def keep(self) -> None:
        """Copies of the weights that the step starts from."""
        if not self._copies:
            self._copies = [w.detach().clone(memory_format=torch.contiguous_format) for w in self.weights]
            self.others.place(self._copies)

    def after(self, one_pass: OnePass | None) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The norms of the weights and of the updates; None as before."""
        if not self.workspace.place_again(self.weights):
            return None
        told = self._told(one_pass)
        if self._trusts is None:
            self._trusts = None not in told
        if self._copies:
            native.squared_updates_(self.workspace, self.others)
            found = list(zip(self.workspace.each, self.others.each, strict=True))
        else:
            if None in told:    # something else has written to a weight after the step, which it did not after the first
                self._trusts = False
                native.sum_of_squares(self.workspace)
            found = [(now, math.nan) if pair is None else pair for pair, now in zip(told, self.workspace.each, strict=True)]
        self._left, self._squares = versions(self.weights), [now for now, _ in found]
        return _named(self.names, self._squares), _named(self.names, (moved for _, moved in found))

    def _told(self, one_pass: OnePass | None) -> list[tuple[float, float] | None]:
        """Σ w² and Σ Δw² of each weight as the optimizer's kernel measured them; of one that nobody has written to as it was."""
        if one_pass is None or not one_pass.measured:
            return [None] * len(self.weights)
        was = zip(self.weights, self._left, self._squares, strict=True)
        return [(square, 0.0) if w._version == version else one_pass.squares(w) for w, version, square in was]


def _squares(tensors: Sequence[Tensor]) -> list[float] | None:
    """Σ x² of each by the kernels; None where these cannot."""
    if native.library() is None or not native.fit(tensors):
        return None
    workspace = native.Workspace(tensors)
    if not workspace.place(tensors):
        return None
    native.sum_of_squares(workspace)
    return list(workspace.each)


def _named(names: Iterable[str], squares: Iterable[float]) -> dict[str, Tensor]:
    """The norms, by name, from their squares."""
    return dict(zip(names, torch.tensor(list(squares), dtype=torch.float64).sqrt_().unbind(), strict=True))


def weights_of(weights: Sequence[Entry], held: Sequence[Entry]) -> dict[str, Tensor]:
    """The weights, by name, that the parameters ``held`` are or are a part of; computed ones in memory that the next reading overwrites.
    Of LoRA the factors, which are all numbers that there are."""
    ids = {id(e.param) for e in held}
    found = [e for e in weights if e.adapter != "product" and any(id(p) in ids for p in e.parameters)]
    return {e.name: e.param.detach() if e.computed is None or e.computed.failure else e.computed.read() for e in found}


def grads_of(entries: Iterable[Entry]) -> dict[str, Tensor]:
    return {e.name: e.param.grad for e in entries if e.param.grad is not None}


def has_norm(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def real_of(t: Tensor) -> Tensor:
    """Real numbers with the same L2 norm: of a sparse tensor the sums of what it holds, of a complex one both parts."""
    if is_sharded(t):
        return t
    if t.layout == torch.sparse_coo:
        t = t.coalesce().values()
    elif t.layout != torch.strided:
        t = t.values()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def norms_of(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The L2 norms, as 0-dim tensors, of tensors by kind and name; one collective a mesh for all of them."""
    norms = iter(lengths([real_of(t) for tensors in found.values() for t in tensors.values()]))
    return {kind: {name: next(norms) for name in tensors} for kind, tensors in found.items()}
