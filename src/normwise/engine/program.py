"""A policy bound to what some optimizers hold: what it can be bound to, whether that still stands, and the program that each step runs."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain, takewhile, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine import nonfinite
from normwise.engine.block_tensors import make_dense, own_grads
from normwise.engine.inverse_trials import refuse_computed
from normwise.engine.pack import Member, Pack, here, is_sharded, refuse_memory
from normwise.engine.rules.base import BoundRule, bind
from normwise.engine.sharded import collectives, reshard
from normwise.engine.sharded.prefetch import align, fulfil, run_all
from normwise.engine.step import WORTH, OnePass, Turn
from normwise.errors import PolicyError, a_kind_of
from normwise.norms import native
from normwise.norms.reduce import may_branch
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.scale_free import before_batch_norm
from normwise.policy import Policy, Rule
from normwise.policy.conflicts import check
from normwise.policy.radii import Base
from normwise.policy.schedules import at

_GROUPS, _HELD = operator.attrgetter("param_groups"), operator.itemgetter("params")
_KIND = operator.attrgetter("requires_grad", "dtype", "shape")
INNER = ("base_optimizer", "optim", "_optimizer", "inner_optimizer", "opt", "base")
"""Where wrappers that are not opened keep the optimizer that they drive."""
FORWARDERS = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "deepspeed", "torch")
"""Packages whose wrappers hand a step on and do nothing to the weights after it."""


class Bindings:
    """What rules were bound to: the parameters that some optimizers hold, their kinds, and where the model has its parameters.

    ``stand()`` is asked at every step. It compares lists of references within C, a few calls however many parameters there are, and
    reads nothing from a device.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        registries: list[tuple[Mapping[str, Any], str, Any]] = []
        for module in model.modules():
            held: tuple[Any, ...] = (module._parameters, module._modules)
            for registry in held:
                if not isinstance(registry, dict):    # a scripted module's, which nobody changes
                    continue
                registries += [(registry, name, value) for name, value in registry.items() if value is not None]
        self._registries, self._names, self._registered = map(list, zip(*registries, strict=True)) if registries else ([], [], [])
        self.refresh()

    def refresh(self) -> None:
        """Takes what the optimizers hold now for what was bound."""
        self._groups = list(chain.from_iterable(map(_GROUPS, self.optimizers)))
        self._counts = list(map(len, map(_HELD, self._groups)))
        self._params: list[Tensor] = list(chain.from_iterable(map(_HELD, self._groups)))
        self._kinds = list(map(_KIND, self._params))
        self.group_of: dict[int, dict[str, Any]] = {id(p): g for g in self._groups for p in g["params"]}
        """The group of each parameter that the optimizers hold, by id(parameter)."""

    def stand(self) -> bool:
        """Whether all is as it was: the model's parameters and modules, the optimizers' groups and what they hold, kinds, freezing."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if len(groups) != len(self._groups) or not all(map(operator.is_, groups, self._groups)):    # load_state_dict makes new ones
            return False
        params = groups[0]["params"] if len(groups) == 1 else list(chain.from_iterable(map(_HELD, groups)))
        same = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        counts = len(groups) == 1 or list(map(len, map(_HELD, groups))) == self._counts
        return same and counts and list(map(_KIND, params)) == self._kinds and not self.registered_elsewhere()

    def registered_elsewhere(self) -> bool:
        """Whether a module of the model has another parameter or submodule under one of its names: a new head, ``assign=True``."""
        return not all(map(operator.is_, map(dict.get, self._registries, self._names), self._registered))

    def converted(self) -> bool:
        """Whether a parameter that was trained has another dtype or shape: ``model.bfloat16()``, ``p.data = ...``."""
        return any(kind[0] and kind[1:] != _KIND(p)[1:] for p, kind in zip(self._params, self._kinds, strict=True))

    def trained(self) -> set[int]:
        """The ids of the parameters that were not frozen."""
        return {id(p) for p, kind in zip(self._params, self._kinds, strict=True) if kind[0]}


class Program:
    """What one step of optimizer ``k`` runs.

    Everything that can be known when rules are bound is looked up here, once: a step builds no list, and asks no rule whether it is
    concerned.
    """

    def __init__(self, engine: Engine, k: int) -> None:
        inline = engine.inline_rules()
        self.params = engine.params(k)
        of_gradients = engine.phase("penalty", "gradient")
        # One norm of several optimizers' gradients is measured once for all: the gradient phase is then everybody's.
        spanned = range(len(engine.optimizers)) if engine.spanning else [k]
        self.aligned: list[Tensor] = [p for other in spanned for p in engine.params(other)] if engine.sharded else []
        self.gradient = [b.run for b in of_gradients] if engine.spanning and not engine.sharded else engine.calls(of_gradients, k)
        looking = [b for b in of_gradients if not b.in_few_calls]
        self.dense = [(b, part) for b in looking for part in b.packs if engine.spanning or k in part.optimizers]
        decaying = engine.phase("decay", "cpr")
        self.decays = engine.calls(decaying, k)
        later = [b for b in engine.phase("update", "prox", "qk_clip", "weight") if b not in inline]
        self.after = engine.calls(later, k)
        self.one_pass = _one_pass(engine.optimizers[k], self.params, [b for b in later if k in b.optimizers], not self.decays)
        self.in_few_calls = all(b.in_few_calls for b in (*of_gradients, *later))
        self.begins = [b for b in engine.rules if type(b).begin is not BoundRule.begin]
        self.commits = [b for b in engine.rules if type(b).commit is not BoundRule.commit]
        updated = [m for b in engine.phase("update") if b not in inline for m in b.members if m.optimizer == k]
        self.snapshots: list[Member] = updated
        """What rules on updates compare with, where the optimizer does not hand its updates over."""
        early = [m for b in decaying for m in b.members if m.optimizer == k]
        back = [m for b in engine.rules if b.looks_back for m in b.members if m.optimizer == k]
        self.decaying = _of(early)
        """The parameters that decay before the step."""
        self.starts = _of([*early, *back, *updated])
        """The parameters whose weights at the start of a step matter to some rule: to decay, to compare with."""
        self.once = not all(b.idempotent for b in of_gradients) or bool(inline or updated or self.begins)
        """Whether a step that raises and is tried again must not do everything a second time: a gradient clipped twice is one clipped."""
        self.ascends = bool(engine.phase("penalty"))
        """Whether it matters that a group maximises."""
        choosy = [b for b in engine.rules if type(b).check_group is not BoundRule.check_group]
        firsts = {(i, id(engine.group(m.param))): (b, m) for i, b in enumerate(choosy) for m in b.members if m.optimizer == k}
        self.beside = list(firsts.values())
        """A parameter of each group that some rule can act beside only as it is."""
        busy = self.aligned or self.beside or self.begins or self.commits or engine.foreign or engine.phase("update") or engine.spanning
        self.fast = not busy and all(b.in_few_calls for b in decaying)
        """Whether a step is no more than rules on gradients, decays and what comes after the optimizer."""


def _one_pass(optimizer: Optimizer, params: Sequence[Tensor], later: Sequence[BoundRule], starts: bool) -> OnePass | None:
    """What the kernel of an optimizer of ours may do of the rules that run after its step: of the first of them, each on rows of its own.

    starts: whether no rule writes to a weight before the step.
    """
    if not hasattr(optimizer, "_offered") or native.library() is None or sum(p.numel() for p in params) < WORTH:
        return None
    rules, known = [], set[int]()
    for bound in takewhile(lambda b: b.rows, later):
        mine = {id(m.param) for m in bound.members}
        if mine & known:
            break
        known |= mine
        rules.append(bound)
    found = OnePass([row for b in rules for row in b.rows], alone=starts and len(rules) == len(later))
    for bound in rules:
        bound.one_pass = found
    return found


def _of(members: Sequence[Member]) -> list[nn.Parameter]:
    return list({id(p): p for m in members for p in (m.param, *m.depends_on)}.values())


class Engine:
    """A policy bound to the parameters that some optimizers hold. Binding checks everything and changes nothing.

    resting: a rule may have nothing to act on because all that it matches is frozen, as it may be for a while in training.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, policy: Policy, optimizers: Sequence[Optimizer], resting: bool = False
    ) -> None:
        self.inventory, self.policy, self.optimizers = inventory, policy, list(optimizers)
        self.owner = _owners(inventory, self.optimizers)
        targets = [(rule, self._targets(rule, resting)) for rule in policy]
        if len(targets) > 1:
            check([(rule, {e.name for e in entries}) for rule, entries in targets])
        self.rules = [bind(rule, entries, self.owner, i) for i, (rule, entries) in enumerate(targets)]
        self._bindings = Bindings(model, self.optimizers)
        self._params = [list(self.held(k).values()) for k in range(len(self.optimizers))]
        self.spanning = any(_spans(b) for b in self.phase("penalty", "gradient"))
        for bound in filter(_spans, self.phase("update", "prox")):    # each optimizer steps at its own time and rate
            raise PolicyError(
                f"rule '{bound.rule.label()}' takes parameters of several optimizers as one vector, which on={bound.rule.on!r} with action "
                f"{bound.rule.action!r} has no meaning for: narrow params= to one optimizer's, or use another per=."
            )
        for bound, m in ((b, m) for b in self.rules for m in b.members):
            bound.check_group(m.name, self.group(m.param))
            _refuse_iterates(bound, self.optimizers[m.optimizer])
        for bound in self.phase("gradient")[:1]:
            bound.watches = not self.phase("penalty") and bound.flat and bound.rule.action == "clip_norm"
        self.foreign = [(b, what, v) for b in self.rules for what, v in b.functions()]
        """The schedules that are the user's own functions."""
        self.sharded = any(is_sharded(p) for params in self._params for p in params)
        """Whether any parameter is a DTensor."""
        self._turn: Turn | None = None
        self.inline = False
        """Whether the optimizer hands its updates over before it applies them, so that rules on them need no snapshot of the weights."""
        # Made at the first step: until then the optimizer may still say that it hands over its updates, and attaching costs less.
        self.program: Callable[[int], Program] = cache(partial(Program, self))

    # ------------------------------------------------------------------------------------------------ binding

    def stands(self) -> bool:
        """Whether all is as it was when the rules were bound."""
        return self._bindings.stand()

    def outdated(self, model: nn.Module) -> bool:
        """Whether the rules must be bound anew: where an optimizer holds a parameter of the model that was not there, or was frozen, when
        they were bound; where one that they act on is frozen or held no longer; where parameters have another dtype or shape, or other
        ones stand in their place in the model."""
        bindings = self._bindings
        if bindings.stand():
            return False
        if bindings.registered_elsewhere():
            if self.sharded:
                reshard(model)
            if not self.sharded or bindings.registered_elsewhere():
                return True
        acted_on = {id(p) for b in self.rules for m in b.members for p in (m.param, *m.depends_on)}
        held = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"] if p.requires_grad}
        fresh = held - bindings.trained() - acted_on
        owner = _owners(self.inventory, self.optimizers)
        moved = any(owner.get(p, k) != k for p, k in self.owner.items())
        if bindings.converted() or not acted_on <= held or moved or any(id(p) in fresh for p in model.parameters()):
            return True
        bindings.refresh()
        return False

    def check_groups(self, k: int) -> None:
        """PolicyError, before a step changes anything, where a group of optimizer ``k`` has become one that a rule cannot act beside: a
        schedule may write to it, and ``load_state_dict`` does."""
        for bound, m in self.program(k).beside:
            bound.check_group(m.name, self.group(m.param))

    def refuse_replaced(self, inventory: Inventory) -> None:
        """PolicyError where the model has another tensor under a name that a rule acts on, and the optimizer still holds the old one."""
        held = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"]}
        mine = {id(m.param) for b in self.rules for m in b.members}
        fresh = {id(e.param) for e in inventory}
        known = {name: e.param for e in self.inventory for name in e.names}
        others = [e.name for e in inventory if e.name in known and known[e.name] is not e.param and id(e.param) not in held]
        lost = [name for name in others if id(self.inventory.by_name[name].param) in mine - fresh]
        if lost:
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise PolicyError(
                f"the model has another tensor as {shown} than when the rules were attached (a new layer, or "
                "load_state_dict(assign=True)), and the optimizer still holds the old one: its steps would change nothing that the model "
                "uses. Give the new tensor to the optimizer (add_param_group, or a new optimizer), then attach to that; or load without "
                "assign."
            )

    def lassos_before_batch_norm(self, model: nn.Module) -> list[str]:
        """What to tell of rules that shrink units to zero where a BatchNorm takes their length out again."""
        told = []
        lassos = [b for b in self.rules if b.rule.action == "prox" and b.rule.per == "unit" and b.rule.power == 1]
        normalised = before_batch_norm(model) if lassos else {}
        for bound in lassos:
            modules = {id(m.param): self.inventory.by_name[m.name].module for m in bound.members}
            found = [(m.name, normalised[modules[id(m.param)]]) for m in bound.members if modules[id(m.param)] in normalised]
            if found:
                name, norm = found[0]
                told.append(
                    f"rule '{bound.rule.label()}' shortens units of {len(found)} layers whose output a BatchNorm rescales, such as {name} "
                    f"before {norm}: there a shorter filter computes the same, so that hardly any unit becomes zero. Put it on gains and "
                    "shifts, nw.group_lasso(s, params='class:BatchNorm2d'), and exclude these layers; nw.prune.shrink removes what is "
                    "zero."
                )
        return told

    def _targets(self, rule: Rule, resting: bool) -> list[Entry]:
        matched = rule.targets(self.inventory.entries if rule.phase == "gradient" else self.inventory.weights)
        trainable = [e for e in matched if e.trained]
        held = [e for e in trainable if any(id(p) in self.owner for p in e.trained)]
        if _names_parameters(rule) and len(held) < len(trainable):
            missing = ", ".join(e.name for e in trainable if e not in held)
            raise PolicyError(
                f"rule '{rule.label()}' matches {missing}, which no given optimizer holds, so nothing would act there. "
                "Give the optimizer too, or narrow params=; a role ('role:matrix', the default) takes only what the optimizers hold."
            )
        if not held and not (resting and not trainable):
            why = "frozen (requires_grad=False)" if not trainable else "held by no given optimizer"
            names = ", ".join(e.name for e in matched[:10])
            raise PolicyError(f"rule '{rule.label()}' has nothing to act on: all it matches ({names}) is {why}.")
        for e in held:
            _refuse(e, rule)
        if isinstance(rule.radius, Base) or (rule.phase != "gradient" and any(_is_stored_otherwise(e) for e in held)):
            refuse_computed(held, rule, self.owner)
        return held

    def held(self, optimizer: int) -> dict[str, nn.Parameter]:
        """The parameters of one optimizer, by name."""
        return {e.name: e.param for e in self.inventory.entries if self.owner.get(id(e.param)) == optimizer}

    def params(self, optimizer: int) -> list[nn.Parameter]:
        """The parameters of one optimizer that the model has."""
        return self._params[optimizer]

    def phase(self, *names: str) -> list[BoundRule]:
        """The rules of these phases, in the order of the phases and then of the policy."""
        return [b for name in names for b in self.rules if b.phase == name]

    def holds(self, param: nn.Parameter) -> bool:
        """Whether one of the optimizers holds a parameter now."""
        return any(param is p for o in self.optimizers for g in o.param_groups for p in g["params"])

    def rate(self, param: nn.Parameter) -> Any:
        """η: the ``lr`` of the parameter's group, times the factor ``d`` that D-Adaptation and Prodigy keep there. A tensor has no
        dimensions, whatever the group has; other numbers, as numpy's, are floats."""
        group = self.group(param)
        rate, factor = group["lr"], group.get("d", 1.0)
        if isinstance(rate, Tensor):
            return (rate.reshape(()) if rate.ndim else rate) * factor
        return float(rate.item() if hasattr(rate, "item") else rate) * factor

    def maximizes(self) -> bool:
        """Whether any group of any optimizer has ``maximize=True``."""
        return any(g.get("maximize") for o in self.optimizers for g in o.param_groups)

    def ascends(self, param: nn.Parameter) -> bool:
        """Whether the parameter's group has ``maximize=True``."""
        return bool(self.group(param).get("maximize"))

    def group(self, param: nn.Parameter) -> dict[str, Any]:
        """The parameter's group now; :meth:`outdated` looks for new ones, as ``load_state_dict`` makes them."""
        return self._bindings.group_of[id(param)]

    # ------------------------------------------------------------------------------------------------ phases

    def calls(self, bounds: Sequence[BoundRule], k: int) -> list[Callable[[Turn], Any]]:
        """What a phase of a step of optimizer ``k`` runs. On DTensors it is one call, which measures many norms in one collective."""
        if self.sharded:
            return [partial(run_all, bounds)] if bounds else []
        return [b.prepared(k) for b in bounds if k in b.optimizers]

    def foresee(self, turn: Turn) -> None:
        """Asks the user's own schedules for this step's numbers before anything is changed: one that fails must not fail halfway."""
        for bound, what, value in self.foreign:
            if bound.rule.active(turn.step()):
                at(value, turn.step(), what)

    def gradient_phase(self, turn: Turn) -> None:
        """Penalties, then gradient rules in the policy's order."""
        program = self.program(turn.optimizer)
        for bound, part in program.dense:
            make_dense(bound.rule, part)
        if program.aligned:
            align(program.aligned)
        turn.spanning = self.spanning
        for call in program.gradient:
            call(turn)
        turn.spanning = False

    def decay_phase(self, turn: Turn, decays: bool = True) -> None:
        """Decoupled weight decay and CPR's, then the snapshot that rules on updates need.

        decays: False where a step that raised is tried again, whose weights have decayed already.
        """
        self._turn, program = turn, self.program(turn.optimizer)
        if self.sharded:
            fulfil([request for bound in program.begins for request in bound.before_begin(turn)])
        for bound in program.begins:
            bound.begin(turn)
        for call in program.decays if decays else ():
            call(turn)
        for m in program.snapshots:
            if m.param.grad is not None:
                turn.before.setdefault(id(m.weight), m.now().clone())

    def inline_rules(self) -> list[BoundRule]:
        """The rules on updates that run within the optimizer's step; one global vector is complete only after it."""
        return [b for b in self.phase("update") if not b.flat and not b.computes] if self.inline else []

    @_disable_dynamo    # as the control's hooks
    def act_on_updates(self, part: Pack, changes: list[Tensor]) -> None:
        """Runs the rules on updates on what an optimizer is about to add to the parameters of ``part``, in place."""
        if self._turn is not None:
            for bound in self.inline_rules():
                bound.run_on(part, changes, self._turn)

    def after_phase(self, turn: Turn) -> None:
        """Rules on updates, prox, attention heads, rules on weights; nothing where GradScaler skipped the step and knowing it is free."""
        if turn.happened is not None and may_branch(turn.happened) and not bool(turn.happened):
            self.drop_reports([turn.optimizer])
            return
        program = self.program(turn.optimizer)
        for call in program.after:
            call(turn)
        for bound in program.commits:
            bound.commit(turn)

    def drop_reports(self, optimizers: Sequence[int]) -> None:
        """Forgets what was reported for a step that is skipped."""
        for bound in self.rules:
            bound.drop_reports(optimizers)

    def bound_again(self, index: int, entries: list[Entry]) -> BoundRule:
        """One rule on other parameters, beside those that it is bound to: what is frozen now."""
        return bind(self.policy[index], entries, self.owner, index)

    def refuse_zeros(self, before: Engine | None = None) -> None:
        """PolicyError where a radius that is the first norm of a block is zero. before: what the same rules were bound to."""
        known = [{m.name for m in b.members} for b in before.rules] if before else [set[str]()] * len(self.rules)
        for bound, names in zip(self.rules, known, strict=True):
            bound.refuse_zeros(names)

    def handle_nonfinite(self, optimizers: Sequence[int], mode: str) -> bool:
        """See :func:`normwise.engine.nonfinite.handle`."""
        if mode == "ignore":
            return False
        params = {name: p for k in optimizers for name, p in self.held(k).items()}
        return nonfinite.handle(params, mode)

    def unscale(self, optimizer: int, scale: Tensor) -> None:
        """Divides the gradients of one optimizer by GradScaler's scale."""
        by_device: dict[torch.device, list[Tensor]] = {}
        own_grads(self.params(optimizer))
        for p in self.params(optimizer):
            if p.grad is not None:
                by_device.setdefault(p.grad.device, []).append(here(p.grad))
        for device, grads in by_device.items():
            torch._foreach_mul_(grads, scale.double().reciprocal().float().to(device))


def _owners(inventory: Inventory, optimizers: Sequence[Optimizer]) -> dict[int, int]:
    """id(parameter) -> index of the optimizer that holds it. Two could not both be the one whose step a bound holds after."""
    owner: dict[int, int] = {}
    names = {id(e.param): e.name for e in inventory.entries}
    for k, optimizer in enumerate(optimizers):
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            if owner.setdefault(id(p), k) != k:
                raise PolicyError(f"{names.get(id(p), 'a parameter')!r} is held by two of the given optimizers: give one that holds it.")
    return owner


def _refuse(entry: Entry, rule: Rule) -> None:
    p = entry.param
    if p.device.type == "meta":
        raise PolicyError(
            f"{entry.name!r} is on the meta device and has no values yet: materialise the model (to_empty and load, or its own "
            "initialisation), then attach."
        )
    if not p.is_floating_point():
        raise PolicyError(
            f"{entry.name!r} is {p.dtype}, and rule '{rule.label()}' needs real floating-point numbers: exclude it, or train its "
            "torch.view_as_real."
        )
    refuse_memory(p, repr(entry.name))


def _refuse_iterates(bound: BoundRule, optimizer: Optimizer) -> None:
    """PolicyError where an optimizer computes weights from what it keeps itself, so that what a rule does to them would be undone."""
    name, rule = type(optimizer).__name__, bound.rule
    if bound.phase not in ("penalty", "gradient") and _averages(optimizer):
        raise PolicyError(
            f"rule '{rule.label()}' would change the weights that {name} trains with, but not those that you evaluate and save, which it "
            "computes from a sequence of its own: there the rule would not hold. Beside it use penalties and rules on gradients, or take "
            "another optimizer."
        )
    if bound.phase == "update" and "LBFGS" in name:
        raise PolicyError(
            f"rule '{rule.label()}' would change the updates of {name}, which keeps its own iterates and would drift apart from them: use "
            "on='grad' or on='weight'."
        )


def _averages(optimizer: Optimizer) -> bool:
    """Whether it has other weights for evaluation than for training, as schedule-free optimizers have (Defazio et al., 2024)."""
    own = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    return own or "ScheduleFree" in type(optimizer).__name__


def _is_stored_otherwise(entry: Entry) -> bool:
    """Whether a weight may be anything else than the numbers of a plain parameter: computed, quantised, sharded."""
    plain = entry.computed is None and type(entry.param) is nn.Parameter
    return not plain or hasattr(entry.module, f"{entry.local_name}_fake_quant")


def _names_parameters(rule: Rule) -> bool:
    """Whether the user pointed at parameters, rather than at roles, which mean those that are trained."""
    selectors = rule.params if isinstance(rule.params, list | tuple) else [rule.params]
    return any(s is not None and not (isinstance(s, str) and s.startswith("role:")) for s in selectors)


def _spans(bound: BoundRule) -> bool:
    return bound.flat and len({m.optimizer for m in bound.members}) > 1


# ------------------------------------------------------------------------------------------ what a policy can be attached to


def check_model(model: Any, optimizer: Any) -> None:
    """PolicyError for what is no module: parameters, swapped arguments."""
    if isinstance(model, nn.Module):
        return
    if isinstance(optimizer, nn.Module):
        raise PolicyError(f"the arguments are swapped, {a_kind_of(model)} before a model. Write attach(model, optimizer, rules).")
    what = "parameters" if isinstance(model, Iterable) and not isinstance(model, str) else a_kind_of(model)
    raise PolicyError(
        f"attach needs the model, given {what}: rules name parameters and ask module types for their axes. Write attach(model, "
        "optimizer, rules)."
    )


def optimizers_of(given: Any) -> list[Optimizer]:
    """One optimizer or several, out of their wrappers; PolicyError for anything else, and where hooks would never run."""
    single = isinstance(given, str | Optimizer) or not isinstance(given, Iterable) or hasattr(given, "optimizer")
    found = [_hooked(o) for o in ([given] if single else given)]
    if not found:
        raise PolicyError("no optimizer was given: attach(model, optimizer, policy) takes one or a list of several.")
    if len({id(o) for o in found}) < len(found):
        raise PolicyError("an optimizer was given twice, and its rules would act twice a step: give each once.")
    return found


def _hooked(given: Any) -> Optimizer:
    """The optimizer itself, or the one in ``.optimizer`` of a wrapper whose own step hooks never run."""
    optimizer, passed = given, []
    while not _runs_hooks(optimizer):
        passed.append(optimizer)
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or any(inner is one for one in passed):
            raise PolicyError(_why_not(given))
        optimizer = inner
    for wrapper in passed:
        if isinstance(wrapper, Optimizer) and type(wrapper).__module__.partition(".")[0] not in FORWARDERS:
            name, inner = type(wrapper).__name__, type(optimizer).__name__
            warnings.warn(
                f"torch runs no step hooks for {name}, which does not call Optimizer.__init__: the rules act in the steps of its "
                f".optimizer, a {inner}. What {name} does to the weights after those steps is not held; control.verify() measures it.",
                stacklevel=5,
            )
    result: Optimizer = optimizer
    return result


def _runs_hooks(optimizer: Any) -> bool:
    """torch wraps ``step`` when an instance is initialised, class by class; a class of its own that never does has hooks that never run."""
    if not isinstance(optimizer, Optimizer):
        return hasattr(optimizer, "register_step_pre_hook")
    return "_optimizer_step_pre_hooks" in vars(optimizer) and getattr(type(optimizer).step, "hooked", False)


def _why_not(given: Any) -> str:
    if not isinstance(given, Optimizer):
        created = " Its .optimizer is not created yet: attach later." if hasattr(given, "optimizer") else ""
        return f"{given!r} is no optimizer with step hooks: attach(model, optimizer, policy) needs a torch.optim.Optimizer.{created}"
    name = type(given).__name__
    inside = [(where, getattr(given, where, None)) for where in INNER]
    driven = [f".{where} ({a_kind_of(one)})" for where, one in inside if isinstance(one, Optimizer)]
    instead = f" Attach to the optimizer that it drives, {driven[0]}." if driven else " Attach to the optimizer that it drives."
    return f"torch runs no step hooks for this {name}, which does not call Optimizer.__init__, so that no rule would ever act.{instead}"


def check_ranks(model: nn.Module, policy: Policy, on_nonfinite: str) -> None:
    """PolicyError on every rank of a sharded model whose ranks have different rules: other radii would drift apart without a word, other
    rules would wait for each other until the time-out. Nothing is sent for a model without DTensors."""
    meshes = {p.device_mesh: None for p in model.parameters() if is_sharded(p)}    # type: ignore[attr-defined]
    if not meshes:
        return
    mine = "\n".join([f"on_nonfinite={on_nonfinite!r}", *(re.sub(r" at 0x[0-9a-f]+", "", repr(rule)) for rule in policy)])
    for mesh in meshes:
        texts = collectives.texts_if_different(mine, mesh)
        if not texts:
            continue
        ranks = collectives.ranks_of(collectives.group_of(mesh, tuple(range(mesh.ndim))))
        other = next(i for i, text in enumerate(texts) if text != texts[0])
        first, second = texts[0].split("\n"), texts[other].split("\n")
        pairs = zip_longest(first, second, fillvalue="nothing")
        own, other_one = next((a, b) for a, b in pairs if a != b)
        raise PolicyError(
            f"the ranks of this sharded model have different rules: rank {ranks[0]} has {own}, rank {ranks[other]} has {other_one}. Give "
            "every rank the same policy."
        )
