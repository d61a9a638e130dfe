"""The phases of a step over every bound rule."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine import finite
from normwise.engine.bound import BoundRule
from normwise.engine.effective import refuse_computed
from normwise.engine.field import bind, refuse_foreign_decay
from normwise.engine.pack import Pack
from normwise.engine.sharded import here, is_sharded
from normwise.engine.sharded.ahead import align, fulfil, run_all
from normwise.engine.turn import Turn
from normwise.errors import PolicyError
from normwise.norms.reduce import may_branch
from normwise.policy import Policy, Rule
from normwise.policy.conflicts import check
from normwise.policy.inventory import Entry, Inventory
from normwise.schedules import at


class Engine:
    """A policy bound to the parameters that some optimizers hold. Binding checks everything and changes nothing.

    resting: a rule may have nothing to act on because all that it matches is frozen, as it may be for a while in training.
    """

    def __init__(self, inventory: Inventory, policy: Policy, optimizers: Sequence[Optimizer], resting: bool = False) -> None:
        self.inventory, self.policy, self.optimizers = inventory, policy, list(optimizers)
        self.owner = _owners(inventory, self.optimizers)
        targets = [(rule, self._targets(rule, resting)) for rule in policy]
        check([(rule, {e.name for e in entries}) for rule, entries in targets])
        self.rules = [bind(rule, entries, self.owner, i) for i, (rule, entries) in enumerate(targets)]
        self._seen = _trainable(self.optimizers)
        self._params = [list(self.held(k).values()) for k in range(len(self.optimizers))]
        self.spanning = any(_spans(b) for b in self.phase("penalty", "gradient"))
        _refuse_spanning(self.phase("update", "prox"))
        self._groups: dict[int, tuple[tuple[int, ...], dict[int, dict[str, Any]]]] = {}
        for bound in self.rules:
            refuse_foreign_decay(bound, self._group)
        self._own = [(b, what, v) for b in self.rules for what, v in b.functions()]
        self.sharded = any(is_sharded(p) for params in self._params for p in params)
        """Whether any parameter is a DTensor."""
        self.inline = False
        """The optimizer hands its updates over before it applies them, so that rules on them need no snapshot of the weights."""
        self._turn: Turn | None = None

    # ------------------------------------------------------------------------------------------------ binding

    def outdated(self, model: nn.Module) -> bool:
        """Whether an optimizer holds a parameter of the model that was not there, or was frozen, when the rules were bound; or whether one
        that they act on is frozen, or held no longer."""
        now = _trainable(self.optimizers)
        if len(now) == len(self._seen) and all(map(operator.is_, now, self._seen)):
            return False
        known = {id(p) for p in self._seen} | {id(m.param) for b in self.rules for m in b.members}
        held = {id(p) for p in now}
        acted_on = {id(p) for b in self.rules for m in b.members for p in (m.param, *m.depends_on)}
        gone = not acted_on <= held
        if gone or any(id(p) in held - known for p in model.parameters()):
            return True
        self._seen = now
        return False

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

    def rate(self, param: nn.Parameter) -> Any:
        """η: the ``lr`` of the parameter's group, times the factor ``d`` that D-Adaptation and Prodigy keep there."""
        group = self._group(param)
        return group["lr"] * group.get("d", 1.0)

    def maximizes(self) -> bool:
        """Whether any group of any optimizer has ``maximize=True``."""
        return any(g.get("maximize") for o in self.optimizers for g in o.param_groups)

    def ascends(self, param: nn.Parameter) -> bool:
        """Whether the parameter's group has ``maximize=True``."""
        return bool(self._group(param).get("maximize"))

    def _group(self, param: nn.Parameter) -> dict[str, Any]:
        """The parameter's group now: ``load_state_dict`` replaces the optimizer's groups by new ones."""
        k = self.owner[id(param)]
        groups = self.optimizers[k].param_groups
        token = tuple(id(g) for g in groups)
        if k not in self._groups or self._groups[k][0] != token:
            self._groups[k] = (token, {id(p): g for g in groups for p in g["params"]})
        return self._groups[k][1][id(param)]

    # ------------------------------------------------------------------------------------------------ phases

    def foresee(self, turn: Turn) -> None:
        """Asks the user's own schedules for this step's numbers before anything is changed: one that fails must not fail halfway."""
        for bound, what, value in self._own:
            if bound.rule.active(turn.step()):
                at(value, turn.step(), what)

    def gradient_phase(self, turn: Turn) -> None:
        """Penalties, then gradient rules in the policy's order."""
        self._refuse_sparse()
        if self.sharded:
            align(p for k in (range(len(self.optimizers)) if turn.spanning else [turn.optimizer]) for p in self.params(k))
        self._run_all(self.phase("penalty", "gradient"), turn)

    def _run_all(self, bounds: Sequence[BoundRule], turn: Turn) -> None:
        if self.sharded:
            run_all(bounds, turn)
            return
        for bound in bounds:
            bound.run(turn)

    def decay_phase(self, turn: Turn) -> None:
        """Decoupled weight decay and CPR's, then the snapshot that rules on updates need."""
        self._turn = turn
        if self.sharded:
            fulfil([request for bound in self.rules for request in bound.before_begin(turn)])
        for bound in self.rules:
            bound.begin(turn)
        self._run_all(self.phase("decay", "cpr"), turn)
        inline = self.inline_rules()
        for bound in self.phase("update"):
            for m in bound.members if bound not in inline else ():
                if m.param.grad is not None and m.optimizer == turn.optimizer:
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
            return
        inline = self.inline_rules()
        self._run_all([b for b in self.phase("update", "prox", "qk_clip", "weight") if b not in inline], turn)
        for bound in self.rules:
            bound.commit(turn)

    def handle_nonfinite(self, optimizers: Sequence[int], mode: str) -> bool:
        """See :func:`normwise.engine.finite.handle`."""
        if mode == "ignore":
            return False
        params = {name: p for k in optimizers for name, p in self.held(k).items()}
        return finite.handle(params, mode)

    def unscale(self, optimizer: int, scale: Tensor) -> None:
        """Divides the gradients of one optimizer by GradScaler's scale."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in self.params(optimizer):
            if p.grad is not None:
                by_device.setdefault(p.grad.device, []).append(here(p.grad))
        for device, grads in by_device.items():
            torch._foreach_mul_(grads, scale.double().reciprocal().float().to(device))

    def _refuse_sparse(self) -> None:
        for bound in self.phase("penalty", "gradient"):
            for part in bound.packs:
                if any([p.grad is not None and p.grad.layout != torch.strided for p in part.params]):    # noqa: C419 - faster
                    raise PolicyError(
                        f"a gradient that rule '{bound.rule.label()}' needs dense is sparse (among {part.members[0].name}, ...): use "
                        "Embedding(sparse=False), or exclude the parameter."
                    )


def _trainable(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for o in optimizers for g in o.param_groups for p in g["params"] if p.requires_grad]


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
    if not p.is_floating_point():
        raise PolicyError(
            f"{entry.name!r} is {p.dtype}, and rule '{rule.label()}' needs real floating-point numbers: exclude it, or train its "
            "torch.view_as_real."
        )


def _names_parameters(rule: Rule) -> bool:
    """Whether the user pointed at parameters, rather than at roles, which mean those that are trained."""
    selectors = rule.params if isinstance(rule.params, list | tuple) else [rule.params]
    return any(s is not None and not (isinstance(s, str) and s.startswith("role:")) for s in selectors)


def _spans(bound: BoundRule) -> bool:
    return bound.flat and len({m.optimizer for m in bound.members}) > 1


def _refuse_spanning(rules: Sequence[BoundRule]) -> None:
    """Each optimizer steps at its own time and rate, so their updates are no one vector."""
    for bound in rules:
        if _spans(bound):
            raise PolicyError(
                f"rule '{bound.rule.label()}' takes parameters of several optimizers as one vector, which on={bound.rule.on!r} with action "
                f"{bound.rule.action!r} has no meaning for: narrow params= to one optimizer's, or use another per=."
            )
