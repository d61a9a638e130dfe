"""The controller: attaches a policy to optimizers through their public hooks. The training loop stays as it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine import Engine, Turn, field, given, states
from normwise.engine.finite import OnNonFinite, check_choice
from normwise.engine.marks import Marks
from normwise.engine.measures import NormLog, NormReport
from normwise.engine.sharded.comm import TRAFFIC, Traffic
from normwise.engine.verify import Verification, verify
from normwise.errors import PolicyError
from normwise.policy import Policy, Rule
from normwise.policy.inventory import Inventory, clean_name

Closure = Callable[[], Any]
VERSION = 1
"""Of the form of the control's state."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    policy: Policy | Rule | Iterable[Any],
    *,
    on_nonfinite: OnNonFinite = "ignore",
    log: bool = False,
    timed: bool = False,
) -> Control:
    """Makes ``policy`` hold in every ``optimizer.step()`` from now on.

    Args:
        model: where names, module types and so roles and block axes come from. Its parameters and state-dict keys are not changed.
        optimizer: any ``torch.optim.Optimizer``, or several (one global norm over all of them, measured once a step).
        policy: a :class:`Policy`, a rule, or a list of rules.
        on_nonfinite: what to do about gradients that are not finite. ``"raise"``: an error that names the parameters, before anything was
            changed. ``"skip"``: the step is skipped. ``"zero"``: such entries become 0. ``"ignore"`` (default): nothing is looked at, which
            costs nothing; the blocks concerned are left as they are. The first two cost one scalar synchronisation a step.
        log: record norms before and after at every step for :meth:`Control.norms`; costs a pass over weights and gradients each.
        timed: add up the time spent here in :attr:`Control.seconds`.

    Returns:
        The control; also a context manager that detaches at its end.

    Raises:
        PolicyError: a pattern that matches nothing, a rule that contradicts another, a parameter that no optimizer holds, a zero block
            under ``radius="init"``; before anything is changed or hooked.
        LayoutError: a block that a parameter does not have, or whose axes nobody stated.

    Parameters that are added to the model and its optimizer later, frozen, unfrozen or replaced, are noticed at the next step: the rules
    are bound again and keep what they know by name. Of a new name ``"init"`` means the weights at that step; frozen ones are left alone.

    With a GradScaler nothing changes either: rules see unscaled gradients. Only where one global gradient norm spans several optimizers,
    call ``scaler.unscale_`` on each of them before the first step, as torch asks for any clipping across optimizers.

    >>> control = nw.attach(model, optimizer, [nw.max_norm(3.0), nw.clip_grad_norm(1.0)])
    """
    check_choice(on_nonfinite)
    return Control(model, given.optimizers(optimizer), Policy(policy), on_nonfinite, log, timed)


@dataclass
class _Counter:
    """Steps of one optimizer. ``skips`` adds up what a fused GradScaler skipped, on the device, and is read only when needed."""

    calls: int = 0
    skips: Tensor | None = None

    def steps(self) -> int:
        if self.skips is not None:    # read once a step, however many rules ask
            self.calls, self.skips = self.calls - int(self.skips), None
        return self.calls

    def advance(self, happened: Tensor | None) -> None:
        self.calls += 1
        if happened is not None:
            skipped = 1 - happened.detach().reshape(())
            self.skips = skipped if self.skips is None else self.skips.to(skipped.device) + skipped


class Control:
    """A policy at work. Made by :func:`attach`."""

    def __init__(
        self, model: nn.Module, optimizers: list[Optimizer], policy: Policy, on_nonfinite: OnNonFinite, log: bool, timed: bool
    ) -> None:
        self.policy, self.optimizers = policy, optimizers
        self._model = model
        self._kept: list[states.Saved] = [{} for _ in policy]
        self._bind(log, resting=False)
        self.on_nonfinite = on_nonfinite
        self.seconds = 0.0
        """Time spent in the hooks, with ``timed=True``."""
        self._timed = timed
        self._traffic = Traffic()
        self._counters = [_Counter() for _ in optimizers]
        self._turns: dict[int, Turn | None] = {}
        self._decayed: set[int] = set()
        self._ready: dict[int, Marks] = {}
        self._nests = [given.may_nest(type(o)) for o in optimizers]
        self._depth: dict[int, int] = {}
        self._open: dict[int, Marks] = {}
        self._handles = [h for k, o in enumerate(optimizers) for h in self._hook(k, o)]

    def _bind(self, log: bool, resting: bool) -> None:
        """Finds the parameters of the rules; nothing is changed where that is refused."""
        inventory = Inventory(self._model, self.policy.roles, self.policy.layouts)
        engine = Engine(inventory, self.policy, self.optimizers, resting)
        given.refuse_iterate_owners(engine, self.optimizers)
        self.inventory, self.engine = inventory, engine
        self._names = {id(module): clean_name(name) for name, module in self._model.named_modules(remove_duplicate=False)}
        self._log = NormLog(inventory, engine.owner) if log else None

    def _follow(self) -> None:
        """Binds the rules anew where parameters were added, frozen, unfrozen, replaced or taken away; what was known stays, by name."""
        if not self.engine.outdated(self._model):
            return
        known, inline = self._states(), self.engine.inline
        self._bind(self._log is not None, resting=True)
        self.engine.inline = inline
        self._ready.clear()
        self._kept = [states.beyond(kept, b) for kept, b in zip(known, self.engine.rules, strict=True)]
        for bound, kept in zip(self.engine.rules, known, strict=True):
            states.carry_over(bound, kept)

    # ------------------------------------------------------------------------------------------------ hooks

    def _hook(self, k: int, optimizer: Optimizer) -> list[Any]:
        """In a compiled step the hooks run as they are: a compiler that traces what is remembered from step to step gets it wrong."""

        @_disable_dynamo
        def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._clock():
                return self._before(k, args, kwargs)

        @_disable_dynamo
        def after(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with self._clock():
                self._after(k)

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    @contextmanager
    def _clock(self) -> Any:
        start = time.perf_counter() if self._timed else 0.0
        sent = TRAFFIC.now()
        with torch.no_grad():
            yield
        self._traffic.join(TRAFFIC.since(sent))
        if self._timed:
            self.seconds += time.perf_counter() - start

    def _before(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A closure computes the gradients within the step, so the gradient phase runs after each of its evaluations."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._nests[k] and self._within(k, closure):
            self._depth[k] += 1
            return None
        self._follow()
        self._turns[k], self._depth[k] = None, 0
        self._decayed.discard(k)
        if closure is None:
            self._begin(k)
            return None
        self._ready.pop(k, None)
        wrapped = self._wrap(k, closure)
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrap(self, k: int, closure: Closure) -> Closure:
        @_disable_dynamo
        def begin() -> None:
            with self._clock():
                self._begin(k)

        def evaluate() -> Any:
            loss = closure()
            begin()
            return loss

        evaluate.wrapped_by = self  # type: ignore[attr-defined]
        return evaluate

    def _within(self, k: int, closure: Closure | None) -> bool:
        """Whether this is the ``super().step()`` of a step that has begun: torch calls the hooks for each class of the two."""
        if closure is not None:
            return getattr(closure, "wrapped_by", None) is self
        return k in self._open and self._open[k].still(self.engine.params(k))

    def _begin(self, k: int) -> None:
        """All that happens between the gradients and the step."""
        ready = self._ready.pop(k, None)
        prepared = ready is not None and ready.still(self.engine.params(k))
        if prepared and ready is not None and ready.skip:
            return
        turn = self._turn(k)
        if not prepared and not self._prepare(k, turn):
            return
        if k not in self._decayed:
            self._decayed.add(k)
            self.engine.decay_phase(turn)
        if self._nests[k]:
            self._open[k] = Marks(self.engine.params(k))
        self._turns[k] = turn

    def _prepare(self, k: int, turn: Turn) -> bool:
        """The gradient phase: of this optimizer, or of all of them where a rule spans several. False where the step must be skipped.

        Another optimizer finds its gradients prepared when it steps, unless they were computed or changed since.
        """
        concerned = list(range(len(self.optimizers))) if self.engine.spanning else [k]
        skip = self.engine.handle_nonfinite(concerned, "ignore" if _skips_itself(turn) else self.on_nonfinite)
        if not skip:
            if self._log:
                self._log.before(concerned, first=self._turns.get(k) is None)
            turn.spanning = self.engine.spanning
            self.engine.gradient_phase(turn)
            turn.spanning = False
        self._ready = {other: Marks(self.engine.params(other), skip) for other in concerned if other != k}
        return not skip

    def _turn(self, k: int) -> Turn:
        """The turn of optimizer ``k``; unscales the gradients that a fused GradScaler left scaled."""
        optimizer = self.optimizers[k]
        earlier = self._turns.get(k)
        turn = Turn(k, self._counters[k].steps, lambda m: self.engine.rate(m.param))
        if earlier is not None:
            turn.before = earlier.before
        if self.engine.maximizes():
            turn.ascends = lambda m: self.engine.ascends(m.param)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            turn.happened = 1 - found_inf.clamp(max=1)
        self.engine.foresee(turn)
        self._unscale(k, optimizer)
        return turn

    def _unscale(self, k: int, optimizer: Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        if scale is None or not self._reads_gradients():
            return
        if self.engine.spanning:
            raise PolicyError(
                "a gradient norm over several optimizers met gradients that GradScaler has not unscaled: call scaler.unscale_(optimizer) "
                "for each of them before the first step."
            )
        self.engine.unscale(k, scale)
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _reads_gradients(self) -> bool:
        return bool(self._log) or bool(self.engine.phase("penalty", "gradient"))

    def _after(self, k: int) -> None:
        if self._depth.get(k):
            self._depth[k] -= 1
            return
        self._open.pop(k, None)
        turn = self._turns.get(k)
        if turn is None:    # skipped, or a closure that was never called
            return
        self.engine.after_phase(turn)
        if self._log:
            self._log.after(k)
        self._counters[k].advance(turn.happened)
        self._turns[k] = None

    def report_max_logits(self, attention: str | nn.Module, maxima: Tensor) -> None:
        """Tells ``nw.qk_clip`` the largest attention logit of each query head in this step's batches, after scaling, before softmax.

        ``attention`` is the attention module, or its clean name; ``maxima`` has the shape ``(heads,)``. Of several reports before a step
        (gradient accumulation) the larger ones count; the step uses them up. Raises PolicyError for a module without such a rule.
        """
        known = f"a {type(attention).__name__} outside of the model" if isinstance(attention, nn.Module) else attention
        field.report(self.engine.rules, self._names.get(id(attention), clean_name(known)), maxima)

    # ------------------------------------------------------------------------------------------------ what it knows

    @property
    def steps(self) -> int:
        """Optimizer steps done under this control: the largest count where there are several optimizers."""
        return max(c.steps() for c in self._counters)

    @torch.no_grad()
    def norms(self) -> NormReport:
        """The L2 norms of weights and gradients: in total, per role and per parameter; with ``log=True`` also before and after the
        last step's rules, and the update's."""
        return NormReport.measured(self.inventory, self.engine.owner, self._log)

    @torch.no_grad()
    def penalty(self) -> float:
        """The value of all penalties (of prox rules too) on the present weights: what they add to the loss that is minimised."""
        return sum(b.penalty(self.steps) for b in self.engine.rules)

    def communication(self) -> Traffic:
        """What the rules sent from this rank since they were attached: ``collectives``, and ``bytes`` put into them; all zero without
        DTensors. Divide by ``steps`` for a step's share. What ``verify`` and ``norms`` send is not counted, nor what the optimizer itself
        sends. ``largest`` is the most bytes that one collective of this process brought here."""
        return self._traffic.now()

    def violations(self) -> dict[str, int]:
        """For each rule that may or may not change a gradient, an update or a weight, how many blocks it had to change when it last ran."""
        bounds = sorted(self.engine.phase("gradient", "cpr", "update", "qk_clip", "weight"), key=lambda b: b.index)
        return {f"{b.index + 1}: {b.rule.label()}": b.violations() for b in bounds}

    @torch.no_grad()
    def verify(self) -> Verification:
        """Measures every bound on weights again, in float64 on whole blocks, and names what breaks it and by how much.

        Inequalities must hold exactly; spheres to two ulp of the weights' dtype. A rule that did not run at the last step (``every``,
        ``start``, ``stop``) is listed as not enforced, not as broken.
        """
        return verify(self.engine, [c.steps() for c in self._counters])

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Step counts, and by parameter name the radii and centers stored at attach and what rules found in training. Plain tensors and
        numbers: safe to load weights-only."""
        return {"version": VERSION, "steps": [c.steps() for c in self._counters], "rules": self._states()}

    def _states(self) -> list[states.Saved]:
        return [states.together(kept, states.state_of(b)) for kept, b in zip(self._kept, self.engine.rules, strict=True)]

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken. PolicyError, with nothing changed, where it belongs to another policy or model."""
        _check_state(state, self)
        for counter, steps in zip(self._counters, state["steps"], strict=True):
            counter.calls, counter.skips = int(steps), None
        self._kept = [states.beyond(saved, b) for saved, b in zip(state["rules"], self.engine.rules, strict=True)]
        for bound, saved in zip(self.engine.rules, state["rules"], strict=True):
            bound.restore(saved)

    def remove(self) -> None:
        """Takes the hooks off; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __reduce_ex__(self, protocol: object) -> Any:
        """Neither copied nor pickled: a copy of an optimizer has no hooks, so a copied control would hold nothing."""
        raise PolicyError(
            "a control cannot be copied or pickled, since torch copies optimizers without their hooks. Attach its policy to the copies: "
            "twin = nw.attach(model_copy, optimizer_copy, control.policy); twin.load_state_dict(control.state_dict())."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        rules = "; ".join(r.label() for r in self.policy)
        return f"Control({len(self.optimizers)} optimizer(s), {self.steps} steps: {rules})"


def _skips_itself(turn: Turn) -> bool:
    """A fused GradScaler skips the step by itself; reading whether it does would synchronise."""
    return turn.happened is not None


def _check_state(state: Any, control: Control) -> None:
    """Everything that could fail in loading, before anything is loaded."""
    saved = state if isinstance(state, Mapping) else {}
    steps, rules = saved.get("steps"), saved.get("rules")
    counts = steps if isinstance(steps, list) and all(type(n) is int and n >= 0 for n in steps) else None
    if saved.get("version") != VERSION or counts is None or not isinstance(rules, list):
        raise PolicyError(f"the state is none that Control.state_dict() of this version ({VERSION}) gives.")
    if len(counts) != len(control.optimizers):
        raise PolicyError(f"the state is of {len(counts)} optimizers, this control has {len(control.optimizers)}.")
    states.check_rules(control.engine.rules, rules)
