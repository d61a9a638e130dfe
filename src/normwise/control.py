"""The controller: attaches a policy to optimizers through their public hooks. The training loop stays as it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine import Engine, Turn, field, given, states
from normwise.engine.detached import Detached, yaml_of
from normwise.engine.finite import OnNonFinite, check_choice
from normwise.engine.marks import Marks
from normwise.engine.measures import NormLog, NormReport
from normwise.engine.sharded.comm import TRAFFIC, Traffic
from normwise.engine.travel import Part, Traveller, fold, makes_state, unfold
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
    in_optimizer_state: bool = True,
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
        in_optimizer_state: True (default): the control's state is a part of ``optimizer.state_dict()`` and comes back with
            ``optimizer.load_state_dict()``, so that whoever saves the optimizer (a Trainer, Accelerate, Lightning, you) resumes bit for
            bit; also where the optimizer's state was loaded before the control is attached. False: only :meth:`Control.state_dict` has it.

    Returns:
        The control; also a context manager that detaches at its end.

    Raises:
        PolicyError: a pattern that matches nothing, a rule that contradicts another, a parameter that no optimizer holds, a zero block
            under ``radius="init"``, a state in the optimizer that does not fit; before anything is changed or hooked.
        LayoutError: a block that a parameter does not have, or whose axes nobody stated.

    Parameters that are added to the model and its optimizer later, frozen, unfrozen or replaced, are noticed at the next step: the rules
    are bound again and keep what they know by name. Of a new name ``"init"`` means the weights at that step; frozen ones are left alone.

    With a GradScaler nothing changes either: rules see unscaled gradients. Only where one global gradient norm spans several optimizers,
    call ``scaler.unscale_`` on each of them before the first step, as torch asks for any clipping across optimizers.

    >>> control = nw.attach(model, optimizer, [nw.max_norm(3.0), nw.clip_grad_norm(1.0)])
    """
    check_choice(on_nonfinite)
    return Control(model, given.optimizers(optimizer), Policy(policy), on_nonfinite, log, timed, in_optimizer_state)


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
        self, model: nn.Module, optimizers: list[Optimizer], policy: Policy, on_nonfinite: OnNonFinite, log: bool, timed: bool,
        in_optimizer_state: bool = True,
    ) -> None:    # fmt: skip
        self.policy, self.optimizers = policy, optimizers
        self._model = model
        self._kept: list[states.Saved] = [{} for _ in policy]
        self._told: list[str] = []
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
        self._travellers: list[Traveller] = []
        if in_optimizer_state:
            self._travel()
        self._handles = [h for k, o in enumerate(optimizers) for h in self._hook(k, o)]

    def _bind(self, log: bool, resting: bool) -> None:
        """Finds the parameters of the rules; nothing is changed where that is refused."""
        inventory = Inventory(self._model, self.policy.roles)
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
        # torch's step that makes state says closure=None by name; that of a class over another's step may hand it on in its own way
        if closure is None and ("closure" in kwargs or self._nests[k]) and makes_state(self.optimizers[k]):
            self._turns[k], self._depth[k] = None, 0
            return None
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
        """Step counts, and by parameter name the radii and centers stored at attach and what rules found in training. Plain tensors,
        numbers and texts: safe to load weights-only. It is in ``optimizer.state_dict()`` too, unless ``in_optimizer_state=False``."""
        return {"version": VERSION, "steps": [c.steps() for c in self._counters], "rules": self._states()}

    def _states(self) -> list[states.Saved]:
        return [states.saved_of(b, kept) for kept, b in zip(self._kept, self.engine.rules, strict=True)]

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken. PolicyError, with nothing changed, where it is damaged, or of another model.

        Rules are matched by what they do and their order, not by their labels: a changed radius, strength or schedule goes on with what
        the rule knew, a rule that is new starts anew, and one that is gone is left out; one warning says what differs.
        """
        _check_state(state, self)
        matched = states.match(self.engine.rules, state["rules"])
        self._restore(matched, dict(enumerate(state["steps"])))

    def _restore(self, matched: states.Matched, steps: Mapping[int, int]) -> None:
        for k, done in steps.items():
            self._counters[k].calls, self._counters[k].skips = done, None
        for i, (bound, saved) in enumerate(zip(self.engine.rules, matched.saved, strict=True)):
            if saved is not None:
                self._kept[i] = states.together(self._kept[i], states.beyond(saved, bound))
                states.carry_over(bound, saved)
        if matched.notes and matched.notes != self._told:
            warnings.warn(f"the state was saved under other rules: {' '.join(matched.notes)}", stacklevel=3)
        self._told = matched.notes

    def _travel(self) -> None:
        """Puts the state into the optimizers' own."""
        try:
            for k, optimizer in enumerate(self.optimizers):
                pack, unpack = partial(self._pack, k), partial(self._unpack, k)
                self._travellers.append(Traveller(optimizer, pack, unpack, self._forgets))
        except BaseException:
            self._stay()
            raise

    def _stay(self) -> None:
        for traveller in self._travellers:
            traveller.remove()
        self._travellers = []

    def _among(self, k: int) -> Callable[[str], bool]:
        """Whether a name is of optimizer ``k``; those that no optimizer holds now (frozen and taken out) go with the first."""
        owner = {e.name: self.engine.owner.get(id(e.param), 0) for e in self.inventory.entries}
        return lambda name: owner.get(name, 0) == k

    def _pack(self, k: int) -> Part:
        """What belongs to optimizer ``k``: its step count, and of each rule what is known of its parameters."""
        among = self._among(k)
        rules = []
        for kept, bound in zip(self._kept, self.engine.rules, strict=True):
            away = {what: {name: t for name, t in known.items() if among(name)} for what, known in kept.items()}
            rules.append(states.saved_of(bound, away, among))
        device = self.engine.params(k)[0].device if self.engine.params(k) else torch.device("cpu")
        folded = fold(rules, [b.growing for b in self.engine.rules], device)
        return {"version": VERSION, "steps": self._counters[k].steps(), "inside": self.engine.inline, **folded}

    def _unpack(self, k: int, part: Part) -> Callable[[], None]:
        """Checks a part; what it returns loads it. Loaded twice, or after all of a ``state_dict()``, it is the same."""
        saved = part if isinstance(part, Mapping) else {}
        rules = unfold(saved) if isinstance(saved.get("rules"), str) else saved.get("rules")
        _check_form({**saved, "rules": rules}, [saved.get("steps")])
        matched = states.match(self.engine.rules, rules or [], self._among(k))

        def load() -> None:
            with torch.no_grad():
                self._restore(matched, {k: saved["steps"]})

        return load

    def _forgets(self) -> bool:
        """Whether the rules know anything that a fresh control does not: a schedule's step counts, a radius, what was found."""
        known = any(saved[what] for saved in self._states() for what in (*states.KEPT, "found"))
        return known or any(b.timed() for b in self.engine.rules)

    def remove(self) -> None:
        """Takes the hooks off; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stay()

    def __copy__(self) -> Detached:
        return Detached.of(repr(self), self.policy)

    def __deepcopy__(self, memo: object) -> Detached:
        """A model that has its control as an attribute can be copied; the copy's is a :class:`Detached`, which holds nothing and says so:
        torch copies optimizers without their hooks."""
        return Detached.of(repr(self), self.policy)

    def __reduce__(self) -> Any:
        """As a copy, with the policy as YAML."""
        return Detached.of, (repr(self), yaml_of(self.policy))

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
    """The form of a state, before anything is loaded."""
    saved = state if isinstance(state, Mapping) else {}
    counts = saved.get("steps")
    _check_form(saved, counts if isinstance(counts, list) else [None])
    if len(saved["steps"]) != len(control.optimizers):
        raise PolicyError(f"the state is of {len(saved['steps'])} optimizers, this control has {len(control.optimizers)}.")


def _check_form(saved: Mapping[str, Any], counts: list[Any]) -> None:
    sound = all(type(n) is int and n >= 0 for n in counts) and isinstance(saved.get("rules"), list)
    if saved.get("version") != VERSION or not sound:
        raise PolicyError(f"the state is none that Control.state_dict() of this version ({VERSION}) gives.")
