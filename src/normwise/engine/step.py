"""One step of one optimizer: what its rules are told, what is remembered meanwhile, what its kernel does beside it, and who takes it."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine.pack import Member, Pack, here

_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""Of torch's wrapper around every ``step``, which runs the hooks."""
MAKERS = ("_init_optim_state",)
"""Functions of ``torch.distributed.checkpoint.state_dict`` that take a step for the sake of the state that it makes."""


@dataclass
class Turn:
    """What one step of one optimizer is given: everything that a rule may ask of the world around it."""

    optimizer: int
    step: Callable[[], int]
    """The number of steps done; a function, since under a fused GradScaler knowing it costs a synchronisation."""
    rate: Callable[[Member], Any] = lambda member: 1.0
    """η of the parameter's group."""
    happened: Tensor | None = None
    """1 where the step is taken, 0 where GradScaler skips it; None where it is certain."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """The weights before the step by id(parameter), where a rule on updates needs them."""
    spanning: bool = False
    """The gradient phase of every optimizer at once."""
    ascends: Callable[[Member], bool] | None = None
    """Whether the parameter's group has ``maximize=True``; None where no group has."""
    tell: Callable[[str], None] = lambda message: None
    """Warns the user, once a message."""


# ---------------------------------------------------------------------------------------------------- what is remembered


class Marks:
    """Which tensors there were, and how often each had been written to: tells without a copy whether they are still the same.

    ``skip``: what was decided about the step of gradients that are remembered so.
    """

    def __init__(self, tensors: Sequence[Tensor | None], skip: bool = False) -> None:
        self.skip = skip
        # Weak: a mark must not keep a gradient alive that zero_grad() drops. Plain references of Python's, since torch's TensorWeakRef
        # costs a microsecond a tensor when it is made, which happens at every step, and helps only where one is read.
        self._refs = [None if t is None else weakref.ref(t) for t in tensors]
        self._versions = [0 if t is None else here(t)._version for t in tensors]

    def still(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether none was computed, dropped or changed since."""
        return len(tensors) == len(self._refs) and all(self._same(tensors))

    def any_still(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether at least one has not changed since."""
        return len(tensors) == len(self._refs) and any(self._same(tensors))

    def _same(self, tensors: Sequence[Tensor | None]) -> Iterable[bool]:
        for now, ref, version in zip(tensors, self._refs, self._versions, strict=True):
            then: Any = None if ref is None else ref()
            if then is not None:
                then._fix_weakref()    # as TensorWeakRef does: a tensor that C++ alone holds must learn that Python holds it again
            yield now is then and (ref is None) == (now is None) and (now is None or here(now)._version == version)


class Squares:
    """Σ g² of gradients that were measured in the step that is under way: a log and a clip ask for the same."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, float]] = {}    # references, so that no other tensor gets the same id

    def of(self, tensors: Sequence[Tensor]) -> list[float] | None:
        """Of each tensor, where all were measured and nobody has written to them since."""
        found = list(map(self._known.get, map(id, tensors)))
        if not all([f is not None and f[1] == f[0]._version for f in found]):    # noqa: C419 - faster than a generator
            return None
        return [f[2] for f in found if f is not None]

    def keep(self, tensors: Sequence[Tensor], squares: Iterable[float]) -> None:
        self._known |= {id(t): (t, t._version, square) for t, square in zip(tensors, squares, strict=True)}

    def clear(self) -> None:
        self._known = {}


def grads(params: Iterable[Tensor]) -> list[Tensor | None]:
    """Their gradients."""
    return [p.grad for p in params]


@dataclass
class Start:
    """The weights that a step with a closure starts from: how often written to, and copies where the step may be evaluated elsewhere."""

    params: list[nn.Parameter]
    versions: list[int]
    weights: list[Tensor] | None


@dataclass
class Stepper:
    """One optimizer: how many steps it has done, and what is known of the one that is under way."""

    calls: int = 0
    skips: Tensor | None = None
    """What a fused GradScaler skipped, added up on the device, and read only when needed."""
    heard: bool = False
    """Whether a step hook ever ran."""
    turn: Turn | None = None
    """Begun and not ended: the step runs, or has raised."""
    depth: int = 0
    """Calls of ``super().step()`` within the step."""
    evaluated: bool = False
    """Whether the closure was evaluated before in this step."""
    acted: Marks | None = None
    """Gradients that the rules have changed already."""
    decayed: Marks | None = None
    """Weights that have decayed already."""
    ready: Marks | None = None
    """Gradients that the gradient phase of another optimizer has prepared."""
    open: Marks | None = None
    start: Start | None = None
    owed: list[Tensor] = field(default_factory=list)
    """What decays add to the weights after the step, where the closure was evaluated at other weights than the step starts from."""
    two_phase: bool = False
    """Whether it has ever done that."""
    closures: int = 0
    recorded: bool = False
    """Whether the norms of this step are recorded."""
    fast: Turn | None = None
    """What steps on the fast path are given: see ``Control._prepare_fast``."""

    def steps(self) -> int:
        """The number of steps done."""
        if self.skips is not None:    # read once a step, however many rules ask
            self.calls, self.skips = self.calls - int(self.skips), None
        return self.calls

    def advance(self, happened: Tensor | None) -> None:
        """Counts a step, of which a device may know alone whether it was skipped."""
        self.calls += 1
        self.acted = self.decayed = self.start = None
        if happened is not None:
            skipped = 1 - happened.detach().reshape(())
            self.skips = skipped if self.skips is None else self.skips.to(skipped.device) + skipped

    def resume(self, calls: int) -> None:
        """Begins anew after ``calls`` steps: what is known of a step that was begun is of the weights before a state was loaded."""
        self.calls, self.skips, self.owed = calls, None, []
        self.turn = self.acted = self.decayed = self.ready = self.open = self.start = self.fast = None
        self.recorded = False


# ---------------------------------------------------------------------------------------------------- in one pass

WORTH = 1 << 17
"""Entries of weights below which they are in the cache anyway, and asking costs more than reading them again."""
RowBound = tuple[Pack, Any, bool]
"""A pack of rows, the radius that is aimed at, and whether rows below it are brought there, too."""


class OnePass:
    """Offered to an optimizer of ``nw.optim`` before each step. Where all of the step is AdamW's and one kernel takes it, that kernel does
    this, too; otherwise the optimizer declines before it changes anything, and the rules run after the step as ever.

    A rule then finds its work done (:meth:`took`), unless somebody has written to one of its weights since.

    Args:
        bounds: what rules do to rows, each parameter once; nothing else may come between the step and them.
        alone: whether these are all rules that act after the step, so that what the kernel measures is what the step leaves.
    """

    def __init__(self, bounds: Sequence[RowBound], alone: bool) -> None:
        self.bounds, self.alone = bounds, alone
        self.of = {id(p): (part.workspace, i) for part, _, _ in bounds for i, p in enumerate(part.params)}
        self.measured, self._left = False, dict[int, int]()
        self._squares: dict[int, tuple[float, float]] = {}
        self._declined: Callable[[], None] | None = None

    def offer(self, optimizer: Optimizer, declined: Callable[[], None] | None = None) -> bool:
        """Makes the optimizer an offer for its next step; whether it could be made. declined: asks for norms, and is called, with nothing
        changed yet, where the optimizer's kernel will not take the step."""
        self.measured, self._declined = declined is not None, declined
        if not all([part.placed(part.weights, held=True) for part, _, _ in self.bounds]):    # noqa: C419 - faster than a generator
            return False
        for part, aim, sphere in self.bounds:
            workspace = part.workspace.aim(aim, sphere)
            ctypes.memset(workspace.changed, 0, ctypes.sizeof(workspace.changed))
        optimizer._offered = self    # type: ignore[attr-defined]
        return True

    def withdraw(self) -> None:
        """A step begins: what the kernel did in an earlier one says nothing of it, whoever takes it."""
        self.measured, self._left, self._squares = False, {}, {}

    def decline(self) -> None:
        if self._declined is not None:
            self._declined()

    def done(self, params: Sequence[Tensor], squares: Sequence[tuple[float, float]]) -> None:
        """The optimizer's word that its kernel has stepped these, with Σ w² and Σ Δw² of each where they are asked for."""
        ids = list(map(id, params))
        self._left |= zip(ids, [p._version for p in params], strict=True)
        self._squares |= zip(ids, squares, strict=False)    # none where they were not asked for

    def took(self, part: Pack) -> bool:
        """Whether the kernel has done what the rule does to this pack, and nothing has changed since."""
        left = self._left
        return bool(left) and all([left.get(id(p)) == p._version for p in part.params])    # noqa: C419 - faster than a generator

    def squares(self, param: Tensor) -> tuple[float, float] | None:
        """Σ w² and Σ Δw² of a parameter, if the kernel measured them and nothing has changed since."""
        return self._squares.get(id(param)) if self._left.get(id(param)) == param._version else None


# ---------------------------------------------------------------------------------------------------- who takes it


def steps_under_way(optimizer: Optimizer) -> int:
    """How many of torch's step wrappers run for the optimizer at this moment: 2 within a ``super().step()``; 0 in compiled code."""
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        count += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count


@_disable_dynamo    # as the control's hooks
def makes_state(optimizer: Optimizer) -> bool:
    """Whether the step that is about to be taken only makes the optimizer's state, as that of ``torch.distributed.checkpoint`` does before
    it gets or sets one, with rates and gradients of zero. No rule acts in it.

    Told by who takes it: a first step of a user's own, with a rate and gradients of zero, looks the same, and has its rules. Costs a look
    at a dictionary from the second step on; frames are looked at in steps with a rate of zero alone.
    """
    if optimizer.state:
        return False
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if rate is None or bool(rate.any() if isinstance(rate, Tensor) else rate):
            return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in MAKERS:
        frame = frame.f_back
    return frame is not None
