"""The controller: attaches a policy to optimizers through their public hooks. The training loop stays as it was."""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from normwise.engine import Engine, Turn
from normwise.engine import state as states
from normwise.engine.action_report import Receipt
from normwise.engine.detached_control import Detached, yaml_of
from normwise.engine.nonfinite import OnNonFinite
from normwise.engine.norm_log import NormLog
from normwise.engine.norm_report import NormReport, Radii, Zeros, unit_norms
from normwise.engine.optimizer_state import Attached, Part, Traveller, carries, fold, unfold
from normwise.engine.pack import Look, versions, witnesses
from normwise.engine.program import check_model, check_ranks, optimizers_of
from normwise.engine.rules.base import BoundRule
from normwise.engine.rules.qk_clip import report
from normwise.engine.sharded import reshard
from normwise.engine.sharded.collectives import TRAFFIC, Traffic
from normwise.engine.step import Marks, OnePass, Start, Stepper, grads, makes_state, steps_under_way
from normwise.engine.verify import Rested, Verification, verify
from normwise.errors import PolicyError, a_kind_of, nearest
from normwise.logs import Logger, logger_of
from normwise.norms import native
from normwise.parameters.inventory import Inventory, clean_name
from normwise.parameters.names import module_names
from normwise.policy import Policy, Rule

Closure = Callable[[], Any]
VERSION = 1
"""Of the form of the control's state."""
UNHEARD = 3
"""Changes of the weights between backward passes, without a hook that ran, after which the user is told."""
_AT_WORK: Attached[Control] = Attached()
"""The controls of each optimizer, so that a second one does not act beside the first without a word."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    policy: Policy | Rule | Iterable[Any],
    *,
    on_nonfinite: OnNonFinite = "ignore",
    log: bool | int = False,
    timed: bool = False,
    replace: bool = False,
    in_optimizer_state: bool = True,
) -> Control:
    """Makes ``policy`` hold in every ``optimizer.step()`` from now on.

    Args:
        model: where names, module types and so roles and block axes come from. Its parameters and state-dict keys are not changed.
        optimizer: any ``torch.optim.Optimizer``, or several (one global norm over all of them, measured once a step). A wrapper that has
            the real one in ``.optimizer``, as Accelerate's, is opened.
        policy: a :class:`Policy`, a rule, or a list of rules.
        on_nonfinite: what to do about gradients that are not finite. ``"raise"``: an error that names the parameters, before anything was
            changed. ``"skip"``: the step is skipped. ``"zero"``: such entries become 0. ``"ignore"`` (default): nothing is looked at, which
            costs nothing; the blocks concerned are left as they are, and the first norm that a rule finds not finite is told once, where
            telling needs no synchronisation. ``"raise"`` and ``"skip"`` cost one scalar synchronisation a step.
        log: record norms before and after at every step for :meth:`Control.norms`; costs a pass over weights and gradients each, and memory
            for a copy of the weights, except with ``nw.optim.AdamW``. A number keeps the totals of so many steps as its history; True keeps
            the last step's alone.
        timed: add up the time spent here in :attr:`Control.seconds`. Compiles the kernels at once, so that no step pays for it.
        replace: take earlier controls off these optimizers first, for a notebook cell that you run twice. Without it a second control
            with a rule of the same kind on the same parameters is an error, and one with other rules a warning, since both act.
        in_optimizer_state: True (default): the control's state is a part of ``optimizer.state_dict()`` and comes back with
            ``optimizer.load_state_dict()``, so that whoever saves the optimizer (a Trainer, Accelerate, Lightning, you) resumes bit for
            bit; also where the optimizer's state was loaded before the control is attached. False: only :meth:`Control.state_dict` has it.

    Returns:
        The control; also a context manager that detaches at its end.

    Raises:
        PolicyError: a pattern that matches nothing, a rule that contradicts another, a parameter that no optimizer holds, a zero block
            under ``radius="init"``, an optimizer whose hooks never run, a state in the optimizer that does not fit; before anything is
            changed or hooked.
        LayoutError: a block that a parameter does not have, or whose axes nobody stated.

    Parameters that are added to the model and its optimizer later, frozen, unfrozen, converted (``model.bfloat16()``) or replaced, are
    noticed at the next step: the rules are bound again and keep what they know by name. Of a new name ``"init"`` means the weights at that
    step; frozen ones are left alone. Where the model has a new tensor that the optimizer does not hold, the next step is an error.

    With a GradScaler nothing changes either: rules see unscaled gradients. Only where one global gradient norm spans several optimizers,
    call ``scaler.unscale_`` on each of them before the first step, as torch asks for any clipping across optimizers. A step that raises and
    is tried again has its rules once.

    >>> control = nw.attach(model, optimizer, [nw.max_norm(3.0), nw.clip_grad_norm(1.0)])
    """
    check_model(model, optimizer)
    if on_nonfinite not in get_args(OnNonFinite):
        raise PolicyError(f"on_nonfinite={on_nonfinite!r} is unknown.{nearest(str(on_nonfinite), get_args(OnNonFinite))}")
    return Control(model, optimizers_of(optimizer), Policy(policy), on_nonfinite, log, timed, in_optimizer_state, replace)


class Control:
    """A policy at work. Made by :func:`attach`."""

    def __init__(
        self, model: nn.Module, optimizers: list[Optimizer], policy: Policy, on_nonfinite: OnNonFinite, log: bool | int, timed: bool,
        in_optimizer_state: bool = True, replace: bool = False, built_in: bool = False,
    ) -> None:  # fmt: skip
        self.policy, self.optimizers = policy, optimizers
        self._handles, self._afters = list[Any](), list[int]()
        self.inventory: Inventory
        self.engine: Engine
        if timed:
            native.library()
        self.built_in = built_in
        """Whether it is the ``policy=`` of an optimizer of normwise's own, which :func:`attach` does not replace."""
        self._model = model
        self._kept: list[states.Saved] = [{} for _ in policy]
        self._rested: dict[tuple[int, str], int] = {}
        self._timed = timed
        self._steppers = [Stepper() for _ in optimizers]
        self._noted: list[str] = []
        check_ranks(model, policy, on_nonfinite)
        if not isinstance(log, bool) and not (isinstance(log, int) and log >= 0):
            raise PolicyError(f"log is {log!r}, but log must be True, False, or how many steps to keep the norms of.")
        self._past: deque[dict[str, Tensor]] = deque(maxlen=0 if isinstance(log, bool) else log)
        self._always, self._loggers = bool(log), list[Logger]()
        self._bind(self._always, resting=False)
        self._told: set[str] = set()
        others = controls_of(optimizers)
        replaced = [o for o in others if replace and not o.built_in]
        # All that warns or refuses comes before anything is hooked or taken off: a warning may be an error.
        _check_beside(self, [o for o in others if o not in replaced])
        for message in self.engine.lassos_before_batch_norm(model):
            self._tell(message)
        self.on_nonfinite = on_nonfinite
        self.seconds = 0.0
        """Time spent in the hooks, with ``timed=True``."""
        self._traffic = Traffic()
        self._nests = [_steps_within(type(o)) for o in optimizers]
        self._born = [Look(self.engine.params(k)) for k in range(len(optimizers))]
        self._travellers: list[Traveller] = []
        try:
            if in_optimizer_state:
                self._travel()
            self.engine.refuse_zeros()
        except BaseException:
            self._stay()
            raise
        for other in replaced:
            other.remove()
        self._handles = [h for k, o in enumerate(optimizers) for h in (*self._hook(k, o), *self._listen(k))]
        for o in optimizers:
            _AT_WORK.add(o, self)

    def _bind(self, log: bool, resting: bool) -> None:
        """Finds the parameters of the rules; nothing is changed where that is refused."""
        inventory = Inventory(self._model, self.policy.roles, self.policy.layouts)
        if resting:
            self.engine.refuse_replaced(inventory)
        engine = Engine(self._model, inventory, self.policy, self.optimizers, resting)
        self.inventory, self.engine = inventory, engine
        self._counts_cost = self._timed or engine.sharded
        self._names = module_names(self._model)
        self._replicas = next((m.process_group for m in self._model.modules() if isinstance(m, DistributedDataParallel)), None)
        self._log: NormLog | None = None
        if log:
            self._begin_log()

    def _begin_log(self) -> None:
        self._log = NormLog(self.inventory, self.engine.owner, self._past)
        for bound in self.engine.phase("gradient"):
            bound.squares = self._log.squares

    def _rebind(self) -> None:
        """Binds the rules anew where parameters were added, frozen, unfrozen, converted, replaced or taken away; what was known stays, by
        name, and by the parameter itself where that has a new name."""
        before = {name: getattr(self, name) for name in ("inventory", "engine", "_counts_cost", "_names", "_log", "_kept")}
        old, known = self.engine, self._states()
        try:
            self._bind(self._log is not None, resting=True)
            self._take_over(old, known)
            self.engine.refuse_zeros(old)
        except BaseException:
            vars(self).update(before)    # the next step asks again
            raise
        self.engine.inline = old.inline
        for stepper in self._steppers:
            stepper.ready = None
        self._note_rested(old)

    def _take_over(self, old: Engine, known: list[states.Saved]) -> None:
        """Gives the rules what was known before they were bound anew."""
        news = [_new_names(before, now, self.inventory) for before, now in zip(old.rules, self.engine.rules, strict=True)]
        known = [states.renamed(kept, names) for kept, names in zip(known, news, strict=True)]
        self._kept = [states.beyond(kept, b) for kept, b in zip(known, self.engine.rules, strict=True)]
        for bound, kept in zip(self.engine.rules, known, strict=True):
            states.carry_over(bound, kept)

    def _note_rested(self, old: Engine) -> None:
        """Remembers at which step a rule last acted on what is frozen from now on, so that ``verify`` can measure it still."""
        present = {id(e.param) for e in self.inventory}
        for i, (before, now) in enumerate(zip(old.rules, self.engine.rules, strict=True)):
            bound = {id(m.param) for m in now.members}
            for m in before.members:
                if id(m.param) not in bound and id(m.param) in present:
                    self._rested[i, m.name] = self._steppers[m.optimizer].steps() - 1
                elif id(m.param) not in present and self.engine.holds(m.param):
                    self._tell(
                        f"{m.name} is no longer in the model: rule '{now.rule.label()}' has stopped acting on it, though its optimizer "
                        "still holds it."
                    )
            for m in now.members:
                self._rested.pop((i, m.name), None)

    def _tell(self, message: str) -> None:
        """Warns once."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)

    # ------------------------------------------------------------------------------------------------ hooks

    def _hook(self, k: int, optimizer: Optimizer) -> list[Any]:
        """In a compiled step the hooks run as they are: a compiler that traces what is remembered from step to step gets it wrong."""

        @_disable_dynamo
        def aside(work: Callable[..., Any], *given: Any) -> Any:
            return work(*given)

        # Outside of a compiled step the hooks go without what keeps a compiler out, which costs two microseconds each.
        def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return aside(self._before, k, args, kwargs) if torch.compiler.is_compiling() else self._before(k, args, kwargs)

        def after(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            aside(self._after, k) if torch.compiler.is_compiling() else self._after(k)

        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._afters.append(handles[1].id)
        return handles

    def _listen(self, k: int) -> list[Any]:
        """Tells the user where the weights change from one backward pass to the next and no step hook ever runs: somebody else steps.

        Looks at one parameter, until the first hook runs.
        """
        watched = next((p for p in self.engine.params(k) if p.requires_grad and p.is_leaf and not _renormalised(self.inventory, p)), None)
        if watched is None:
            return []
        mine, name = weakref.ref(self), type(self.optimizers[k]).__name__
        looks: list[Look] = []

        def after_backward(param: Tensor) -> None:
            control = mine()
            if control is None or control._steppers[k].heard:
                handle.remove()
            elif not looks or not looks[-1].same([param]):
                looks.append(Look([param]))
                if len(looks) > UNHEARD:
                    handle.remove()
                    control._tell(
                        f"the weights change from one backward pass to the next, but no step hook of the {name} ran, so that no rule "
                        "acted: another optimizer steps them, or one around it that does not call its step(). Attach to the one that "
                        "steps."
                    )

        handle: Any = watched.register_post_accumulate_grad_hook(after_backward)  # type: ignore[no-untyped-call]
        return [handle]

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Rules act without a graph, and what they cost is counted."""
        start, sent = time.perf_counter(), TRAFFIC.now()
        with torch.no_grad():
            yield
        self._traffic.join(TRAFFIC.since(sent))
        if self._timed:
            self.seconds += time.perf_counter() - start

    def _before(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A closure computes the gradients within the step, so the gradient phase runs after each of its evaluations."""
        stepper, optimizer = self._steppers[k], self.optimizers[k]
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        fast, stepper.fast = stepper.fast, None
        if fast is not None and closure is None and self._before_fast(fast, optimizer):
            stepper.fast = fast
            return None
        if closure is None and not optimizer.state and makes_state(optimizer):
            stepper.turn, stepper.depth = None, 0
            return None
        if self._nests[k] and self._within(k, closure):
            stepper.depth += 1
            return None
        stepper.heard = True
        with self._working() if self._counts_cost else torch.no_grad():
            if self.engine.outdated(self._model):
                self._rebind()
            failed, stepper.turn = stepper.turn, None    # a turn that never ended: that step raised, and this one may be its repetition
            stepper.depth, stepper.evaluated, stepper.owed = 0, False, []
            if closure is None:
                self._begin(k, failed)
                return None
            stepper.ready = None
            stepper.start = self._start(k)
        wrapped = self._wrap(k, closure)
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _before_fast(self, turn: Turn, optimizer: Optimizer) -> bool:
        """The fast path, what `_before` comes to in nearly every step: gradient rules and decays, if all is as it was in the step before.

        On small networks everything that must be asked about a step takes longer than the rules.
        """
        begun, stepper, engine = time.perf_counter(), self._steppers[turn.optimizer], self.engine
        if stepper.turn is not None or not engine.stands() or not (optimizer.state or not makes_state(optimizer)):
            return False
        if self._loggers and self._records():
            return False
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            return False
        program = engine.program(turn.optimizer)
        if program.ascends and engine.maximizes():
            return False
        if program.gradient:
            with nullcontext() if program.in_few_calls else torch.no_grad():
                engine.gradient_phase(turn)
            stepper.acted = Marks(witnesses(grads(program.params))) if program.once else None
        for decay in program.decays:
            decay(turn)
        if program.decays:
            stepper.decayed = Marks(witnesses(program.decaying))
        if program.one_pass is not None:
            self._offer(turn)
        stepper.turn = turn
        if self._timed:
            self.seconds += time.perf_counter() - begun
        return True

    def _after_fast(self, turn: Turn) -> None:
        begun, stepper, program = time.perf_counter(), self._steppers[turn.optimizer], self.engine.program(turn.optimizer)
        with nullcontext() if program.in_few_calls else torch.no_grad():
            for act in program.after:
                act(turn)
        stepper.turn = stepper.acted = stepper.decayed = None
        stepper.calls += 1
        if self._timed:
            self.seconds += time.perf_counter() - begun

    def _prepare_fast(self, k: int) -> None:
        """Puts the next steps on the fast path, where nothing that they are given varies from step to step."""
        engine, stepper = self.engine, self._steppers[k]
        plain = not self._always and self.on_nonfinite == "ignore" and not self._nests[k] and not engine.sharded
        if plain and engine.program(k).fast:
            stepper.fast = Turn(k, stepper.steps, lambda m: engine.rate(m.param), tell=self._tell)

    def _wrap(self, k: int, closure: Closure) -> Closure:
        @_disable_dynamo
        def begin() -> None:
            with self._working():
                self._begin(k)

        def evaluate() -> Any:
            loss = closure()
            begin()
            return loss

        evaluate.wrapped_by = (*getattr(closure, "wrapped_by", ()), self)  # type: ignore[attr-defined]
        return evaluate

    def _within(self, k: int, closure: Closure | None) -> bool:
        """Whether this is the ``super().step()`` of a step that has begun: torch calls the hooks for each class of the two."""
        if closure is not None:
            return self in getattr(closure, "wrapped_by", ())
        marks = self._steppers[k].open
        repeated = steps_under_way(self.optimizers[k]) == 1    # a step that raised and is tried again
        return marks is not None and not repeated and marks.still(grads(self.engine.params(k)))

    def _start(self, k: int) -> Start | None:
        """Where a step with a closure starts. Copies are kept at the first one, and later where that was evaluated elsewhere: SAM moves the
        weights, evaluates, and puts them back, so that what a rule changes in between is lost."""
        params, stepper = self.engine.program(k).starts, self._steppers[k]
        if not params:
            return None
        stepper.closures += 1
        kept = [p.detach().clone() for p in params] if stepper.two_phase or stepper.closures == 1 else None
        return Start(params, versions(params), kept)

    def _begin(self, k: int, failed: Turn | None = None) -> None:
        """All that happens between the gradients and the step. ``failed``: the turn of a step that raised just before."""
        stepper, program = self._steppers[k], self.engine.program(k)
        params = program.params
        ready, stepper.ready = stepper.ready, None
        prepared = ready is not None and ready.still(grads(params))
        if prepared and ready is not None and ready.skip:
            return
        if failed is not None and stepper.acted is not None and stepper.acted.still(witnesses(grads(params))):
            turn = failed    # tried again with gradients that the rules have changed already
        else:
            turn = self._turn(k)
            if not prepared and not self._prepare(k, turn):
                return
        if not stepper.evaluated:
            self._decay(k, turn)
        stepper.evaluated = True
        if program.once or stepper.recorded:
            stepper.acted = Marks(witnesses(grads(params)))
        if self._nests[k]:
            stepper.open = Marks(grads(params))
        stepper.turn = turn
        self._offer(turn)

    def _one_pass(self, turn: Turn) -> OnePass | None:
        """What the optimizer's own kernel may do of a step's rules; nothing where another control acts on the same step, a hook of somebody
        else's comes before the rules, which may write to a weight by its ``.data``, or the step may not be taken."""
        one_pass = self.engine.program(turn.optimizer).one_pass
        if one_pass is None or turn.happened is not None or self._nests[turn.optimizer] or self.engine.spanning:
            return None
        optimizer = self.optimizers[turn.optimizer]
        first = next(iter(optimizer._optimizer_step_post_hooks), None)
        return one_pass if first == self._afters[turn.optimizer] and len(controls_of([optimizer])) == 1 else None

    def _offer(self, turn: Turn) -> None:
        known = self.engine.program(turn.optimizer).one_pass
        if known is not None:
            known.withdraw()
        one_pass = self._one_pass(turn)
        if one_pass is None:
            return
        log = self._log if one_pass.alone and self._steppers[turn.optimizer].recorded else None
        keep = partial(log.keep, turn.optimizer) if log is not None else None
        if (one_pass.bounds or keep) and not one_pass.offer(self.optimizers[turn.optimizer], keep) and keep:
            keep()

    def _decay(self, k: int, turn: Turn) -> None:
        """Once a step that happens, at the weights that it starts from."""
        stepper, decaying, start = self._steppers[k], witnesses(self.engine.program(k).decaying), self._steppers[k].start
        again = stepper.decayed is not None and stepper.decayed.any_still(decaying)    # none: they were restored, and decay anew
        if start is None or versions(start.params) == start.versions:
            self.engine.decay_phase(turn, decays=not again)
        elif start.weights is not None:
            stepper.two_phase = True
            moved = [p.detach().clone() for p in start.params]
            torch._foreach_copy_([p.detach() for p in start.params], start.weights)
            self.engine.decay_phase(turn, decays=not again)
            stepper.owed = [p.detach() - w for p, w in zip(start.params, start.weights, strict=True)]
            torch._foreach_copy_([p.detach() for p in start.params], moved)
        else:
            raise PolicyError(
                f"{type(self.optimizers[k]).__name__} evaluates its closure at other weights than its step starts from, which it did not "
                "in its first step: rules that decay weights, or act on updates, cannot tell where the step starts."
            )
        if decaying:
            stepper.decayed = Marks(decaying)

    def _prepare(self, k: int, turn: Turn) -> bool:
        """The gradient phase: of this optimizer, or of all of them where a rule spans several. False where the step must be skipped.

        Another optimizer finds its gradients prepared when it steps, unless they were computed or changed since.
        """
        spanning = self.engine.spanning
        if spanning and torch._C._current_graph_task_id() != -1:
            raise PolicyError(
                "a gradient norm over several optimizers is not known before the backward pass ends, and this step is taken within it: "
                "step after backward(), or bound the gradient of each tensor by itself, nw.clip_grad_norm(..., per='tensor')."
            )
        concerned = list(range(len(self.optimizers))) if spanning else [k]
        # A fused GradScaler skips the step by itself; reading whether it does would synchronise.
        looks = self.on_nonfinite != "ignore" and turn.happened is None
        skip = looks and self.engine.handle_nonfinite(concerned, self.on_nonfinite)
        if skip:
            self.engine.drop_reports(concerned)
        else:
            if self._log and self._records():
                self._log.before(concerned, self._steppers[k].turn is None, self._one_pass(turn))
                for other in concerned:
                    self._steppers[other].recorded = True
            self.engine.gradient_phase(turn)
        for other, stepper in enumerate(self._steppers):
            stepper.ready = Marks(grads(self.engine.params(other)), skip) if spanning and other != k else None
        return not skip

    def _turn(self, k: int) -> Turn:
        """The turn of optimizer ``k``; unscales the gradients that a fused GradScaler left scaled."""
        engine, optimizer, stepper = self.engine, self.optimizers[k], self._steppers[k]
        turn = Turn(k, stepper.steps, lambda m: engine.rate(m.param), tell=self._tell)
        if stepper.turn is not None:
            turn.before = stepper.turn.before
        if engine.program(k).ascends and engine.maximizes():
            turn.ascends = lambda m: engine.ascends(m.param)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            turn.happened = 1 - found_inf.clamp(max=1)
        engine.check_groups(k)
        if engine.foreign:
            engine.foresee(turn)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None and (self._log or engine.phase("penalty", "gradient")):
            if engine.spanning:
                raise PolicyError(
                    "a gradient norm over several optimizers met gradients that GradScaler has not unscaled: call "
                    "scaler.unscale_(optimizer) for each of them before the first step."
                )
            engine.unscale(k, scale)
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        return turn

    def _after(self, k: int) -> None:
        stepper = self._steppers[k]
        if stepper.fast is not None and stepper.turn is stepper.fast:
            self._after_fast(stepper.fast)
            return
        if stepper.depth:
            stepper.depth -= 1
            return
        stepper.open = None
        turn, stepper.turn = stepper.turn, None
        if turn is None:    # skipped, or a closure that was never called
            return
        with self._working() if self._counts_cost else torch.no_grad():
            if stepper.owed and stepper.start is not None:
                torch._foreach_add_([p.detach() for p in stepper.start.params], stepper.owed)
            self.engine.after_phase(turn)
            if self._log and stepper.recorded:
                self._log.after(k, self._one_pass(turn))
        stepper.recorded = False
        stepper.advance(turn.happened)
        if self._loggers and k == len(self.optimizers) - 1:
            self._write()
        if turn.happened is None:
            self._prepare_fast(k)

    def report_max_logits(self, attention: str | nn.Module, maxima: Tensor) -> None:
        """Tells ``nw.qk_clip`` the largest attention logit of each query head in this step's batches, after scaling, before softmax.

        ``attention`` is the attention module, or its clean name; ``maxima`` has the shape ``(heads,)``. Of several reports before a step
        (gradient accumulation) the larger ones count; the step uses them up, also where the rule rests or the step is skipped. Under FSDP2,
        tensor parallelism and DDP (attach to the wrapped model) the largest of all ranks counts, so each rank must report. Raises
        PolicyError for a module without such a rule.
        """
        known = f"{a_kind_of(attention)} outside of the model" if isinstance(attention, nn.Module) else attention
        report(self.engine.rules, self._names.get(id(attention), clean_name(known)), maxima, self._replicas)

    # ------------------------------------------------------------------------------------------------ logs

    def log_to(self, target: Any, *, every: int = 50, histograms: bool = False) -> None:
        """Writes norms while training goes on, after every ``every``-th step.

        A record has the totals and those of each role, as :meth:`norms` after ``attach(..., log=True)`` gives them (``norm/grad/total``,
        ``norm/update/hidden``, ...), and for each rule how many blocks it had to change (``changed/max_norm``, by the rule's ``name=``, or
        by its action and its place in the policy).

        Args:
            target: a path that ends in ``.jsonl`` or ``.csv``; a ``SummaryWriter`` of TensorBoard; a run of W&B; the ``mlflow`` module; a
                logger of Lightning; a Fabric; an Accelerator; or a function of (numbers, step). Loggers are called by their own method.
            every: steps from one record to the next. Several optimizers count by the steps of the last one.
            histograms: also the L2 norms of the units of each weight, ``units/fc1.weight``: histograms in TensorBoard and W&B, elsewhere
                their extremes, deciles 1 and 9 and median.

        Steps without a record cost nothing: their norms are not measured, and no device is waited for. A file is flushed at each record. A
        run that goes on from a checkpoint takes away the records that come after it, so that each step has one; the file of another run is
        kept beside, under a number. A logger that raises costs its records, and one warning. On many processes the first one writes.

        Raises:
            PolicyError: for a target that is none of these, or a file that is no such log; nothing was written to it.
            DataError: for a file that cannot be written.

        >>> control.log_to("norms.jsonl", every=100)
        """
        self._loggers.append(logger_of(target, every, histograms))
        if self._log is None:
            self._begin_log()

    def _records(self) -> bool:
        """Whether the step that begins is recorded; asks no device."""
        following = self._steppers[-1].calls + 1
        return self._always or any(logger.due(following) for logger in self._loggers)

    @torch.no_grad()
    def _write(self) -> None:
        due = [logger for logger in self._loggers if logger.due(self._steppers[-1].calls)]
        first = not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not due or not (first or self.engine.sharded):    # norms of shards are measured by all ranks together
            return
        numbers = NormReport.measured(self.inventory, self.engine.owner, self._log).flat()
        names = [b.rule.name or f"{b.rule.action}_{b.index + 1}" for b in self._bounds()]
        numbers |= {f"changed/{name}": float(b.violations()) for name, b in zip(names, self._bounds(), strict=True)}
        units = unit_norms(self.inventory, self.engine.owner) if any(logger.histograms for logger in due) else {}
        read = {name: norms.tolist() for name, norms in units.items() if len(norms)}
        for logger in due if first else ():
            logger(self._steppers[-1].steps(), numbers, read)

    # ------------------------------------------------------------------------------------------------ what it knows

    @property
    def steps(self) -> int:
        """Optimizer steps done under this control: the largest count where there are several optimizers."""
        return max(self._counts())

    def _counts(self) -> list[int]:
        return [s.steps() for s in self._steppers]

    @torch.no_grad()
    def norms(self, *, history: bool = False, largest: bool = False) -> NormReport:
        """The L2 norms of weights and gradients: in total, per role and per parameter; with ``log=True`` also before and after the
        last step's rules, and the update's.

        Args:
            history: also the totals of the last steps, as many as ``attach(..., log=STEPS)`` asked for.
            largest: also the norm and the number of each weight matrix's largest unit.

        Returns:
            A report: print it, read ``total``, ``role``, ``parameter``, or log ``flat()``.

        Raises:
            PolicyError: for a history that nobody recorded.
        """
        if history and not self._past.maxlen:
            raise PolicyError("nothing recorded the norms of past steps: attach with log=1000 to keep those of the last 1000 steps.")
        log = self._log if self._always else None    # what log_to records is not the last step's
        report = NormReport.measured(self.inventory, self.engine.owner, log, history, largest)
        self._judge()
        if bad := [kind for kind, total in report.total.items() if total != total or total == float("inf")]:
            self._tell(f"the norm of all {' and all '.join(bad)} values is not finite. on_nonfinite='raise' names where it begins.")
        return report

    @torch.no_grad()
    def radii(self) -> Radii:
        """The radius that each rule holds its blocks to now, smallest and largest a parameter; print it, or log its ``flat()``."""
        return Radii.measured(self.engine, self._counts())

    @torch.no_grad()
    def zeros(self) -> Zeros:
        """How much of each weight is exactly zero, in entries and in units; print it, or log its ``flat()``."""
        return Zeros.measured(self.inventory, self.engine.owner)

    @torch.no_grad()
    def penalty(self) -> float:
        """The value of all penalties (of prox rules too) on the present weights: what they add to the loss that is minimised. Schedules
        are those of each parameter's own optimizer's step."""
        return sum(b.penalty(self._counts()) for b in self.engine.rules)

    def communication(self) -> Traffic:
        """What the rules sent from this rank since they were attached: ``collectives``, and ``bytes`` put into them; all zero without
        DTensors. Divide by ``steps`` for a step's share. What ``verify`` and ``norms`` send is not counted, nor what the optimizer itself
        sends. ``largest`` is the most bytes that one collective of this process brought here."""
        return self._traffic.now()

    def violations(self) -> dict[str, int]:
        """For each rule that may or may not change a gradient, an update or a weight, how many blocks it had to change when it last ran."""
        return {f"{b.index + 1}: {b.rule.label()}": b.violations() for b in self._bounds()}

    def _bounds(self) -> list[BoundRule]:
        return sorted(self.engine.phase("gradient", "cpr", "update", "qk_clip", "weight"), key=lambda b: b.index)

    @torch.no_grad()
    def verify(self) -> Verification:
        """Measures every bound on weights again, in float64 on whole blocks, on the model as it is now, and names what breaks one and by
        how much.

        Inequalities must hold exactly; spheres to two ulp of the weights' dtype. The result is true where bounds were measured and all of
        them hold. It is false where one is broken, where a rule never ran on what it should bound (before the first step; a new layer;
        an optimizer whose hooks never ran), and where nothing could be measured: a policy of gradient rules alone promises nothing about
        weights. A rule that rested at the last step (``every``, ``start``, ``stop``) is listed as not enforced, not as broken. Of
        parameters that are frozen now the bound of the last step that acted on them is measured.
        """
        if self.engine.sharded:
            reshard(self._model)
        inventory = Inventory(self._model, self.policy.roles, self.policy.layouts)
        return verify(self.engine, inventory, self._counts(), self._frozen(inventory), self._silent())

    def _frozen(self, inventory: Inventory) -> Rested:
        """The rules as they were on parameters that are frozen now, or were in the last step, as the other network of a GAN is."""
        bounds = {}
        frozen = [e for e in inventory.weights if id(e.param) in self.engine.owner]
        for i in range(len(self.policy)):
            entries = [e for e in frozen if (i, e.name) in self._rested]
            if entries and not self.engine.rules[i].flat:
                bounds[i] = self.engine.bound_again(i, entries)
                states.carry_over(bounds[i], self._kept[i])
        return Rested(bounds, self._rested)

    def _silent(self) -> dict[int, str]:
        """Why an optimizer that has never stepped here has not, where its weights have moved all the same."""
        found = {}
        for k, stepper in enumerate(self._steppers):
            if not stepper.heard and not self._born[k].same(self.engine.params(k)):
                name = type(self.optimizers[k]).__name__
                found[k] = f"the weights have changed since attach, but no step hook of the {name} ran; attach to what steps them"
        return found

    def receipt(self) -> Receipt:
        """What the rules did in the last step, in a few lines: on how many tensors and blocks each acts, how many it changed, and which
        parameters no rule touches. ``print`` it."""
        self._judge()
        return Receipt.of(self.engine, self._counts(), self._silent())

    def _judge(self) -> None:
        """What steps on a device did not look at, since that waits for it."""
        for bound in self.engine.rules:
            bound.judge(self._tell)

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Step counts, and by parameter name the radii and centers stored at attach and what rules found in training. Plain tensors,
        numbers and texts: safe to load weights-only. It is in ``optimizer.state_dict()`` too, unless ``in_optimizer_state=False``."""
        return {"version": VERSION, "steps": self._counts(), "rules": self._states()}

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
            self._steppers[k].resume(done)
        for i, (bound, saved) in enumerate(zip(self.engine.rules, matched.saved, strict=True)):
            if saved is not None:
                self._kept[i] = states.together(self._kept[i], states.beyond(saved, bound))
                states.carry_over(bound, saved)
        if matched.notes and matched.notes != self._noted:
            warnings.warn(f"the state was saved under other rules: {' '.join(matched.notes)}", stacklevel=3)
        self._noted = matched.notes

    def _travel(self) -> None:
        """Puts the state into the optimizers' own."""
        for k, optimizer in enumerate(self.optimizers):
            if not carries(optimizer):
                self._tell(
                    f"{type(optimizer).__name__} has step hooks and no hooks of its state_dict(), as it never calls Optimizer.__init__: "
                    "the rules act, and their state is not in the optimizer's. Save control.state_dict() too; in_optimizer_state=False "
                    "says that you do."
                )
                continue
            pack, unpack = partial(self._pack, k), partial(self._unpack, k)
            self._travellers.append(Traveller(optimizer, pack, unpack, self._forgets))

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
        folded = fold(rules, [b.growing for b in self.engine.rules], device, [e.name for e in self.inventory.entries])
        return {"version": VERSION, "steps": self._steppers[k].steps(), "inside": self.engine.inline, **folded}

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
        for o in self.optimizers:
            if hasattr(o, "_offered"):
                o._offered = None    # to a step that was never taken
            _AT_WORK.remove(o, self)

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


def controls_of(optimizers: Iterable[Optimizer]) -> list[Control]:
    """The controls that are attached to any of these optimizers."""
    found = {id(c): c for o in optimizers for c in _AT_WORK.of(o) if c._handles}
    return list(found.values())


def _steps_within(kind: type[Optimizer]) -> bool:
    """Whether a class has a ``step`` of its own over that of another optimizer, which it may call. AdamW has not: torch wraps Adam's."""
    return len({inspect.unwrap(vars(base)["step"]) for base in kind.__mro__ if base is not Optimizer and "step" in vars(base)}) > 1


def _check_beside(new: Control, others: Sequence[Control]) -> None:
    """Two controls both act. With rules of one kind on one parameter that is a decay twice, or a bound that stays under a looser one."""
    instead = "Put all rules into one attach; or replace=True takes the earlier control off, as control.remove() does."
    for other in others:
        twice = _same_kind(new, other)
        if twice is not None:
            mine, theirs, name = twice
            what = "policy= of its own" if other.built_in else "control already"
            message = f"the optimizer has a {what}, whose rule '{theirs}' acts on {name!r} too: it and '{mine}' both act at each step."
            if not other.built_in:
                raise PolicyError(f"{message} {instead}")
            warnings.warn(f"{message} Leave one of the two out.", stacklevel=4)
        elif not other.built_in:
            warnings.warn(f"the optimizer has a control already ({other!r}), and both act at each step. {instead}", stacklevel=4)


def _same_kind(new: Control, other: Control) -> tuple[str, str, str] | None:
    """Two rules, by label, that do the same to a parameter, and its name."""
    for mine in new.engine.rules:
        for theirs in other.engine.rules:
            known = {id(m.param) for m in theirs.members}
            shared = [m.name for m in mine.members if id(m.param) in known]
            if mine.rule.kind() == theirs.rule.kind() and shared:
                return mine.rule.label(), theirs.rule.label(), shared[0]
    return None


def _new_names(before: BoundRule, now: BoundRule, inventory: Inventory) -> dict[str, str]:
    """Old name -> new name of what a rule was bound to, where the same tensor has another name now: behind a parametrization, say.

    A weight that is computed is told by its name alone, as long as that exists: its ``param`` is a tensor that it is computed from, which
    always has another name.
    """
    held, found = {m.name for m in now.members}, dict[str, str]()
    for m in before.members:
        if m.name in held:
            continue
        alike = [n.name for n in now.members if n.param is m.param and (n.computed is None) == (m.computed is None)]
        if not alike and m.name not in inventory.by_name:    # frozen, and under another name
            alike = [e.name for e in inventory.weights if e.param is m.param and (e.computed is None) == (m.computed is None)]
        if alike:
            found[m.name] = alike[0]
    return found


def _renormalised(inventory: Inventory, param: nn.Parameter) -> bool:
    """Whether a forward pass changes the parameter, as ``nn.Embedding(max_norm=...)`` does."""
    return any(getattr(e.module, "max_norm", None) is not None for e in inventory if e.param is param)


def _check_state(state: Any, control: Control) -> None:
    """The form of a state, before anything is loaded."""
    saved = state if isinstance(state, Mapping) else {}
    counts = saved.get("steps")
    _check_form(saved, counts if isinstance(counts, list) else [None])
    if len(saved["steps"]) != len(control.optimizers):
        raise PolicyError(f"the state is of {len(saved['steps'])} optimizers, this control has {len(control.optimizers)}.")


def _check_form(saved: Mapping[str, Any], counts: list[Any]) -> None:
    sound = all(type(n) is int and n >= 0 for n in counts) and isinstance(saved.get("rules"), list)
    if type(saved.get("version")) is not int or saved["version"] != VERSION or not sound:
        raise PolicyError(f"the state is none that Control.state_dict() of this version ({VERSION}) gives.")
