"""The phases of a step over every bound rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine import nonfinite
from normwise.engine.binding_changes import Bindings, on_meta, replaced
from normwise.engine.block_tensors import own_grads, refuse_overlap
from normwise.engine.computed_weights import refuse_computed
from normwise.engine.pack import Member, Pack
from normwise.engine.rules.base import BoundRule
from normwise.engine.rules.registry import bind
from normwise.engine.rules.step_length import refuse_foreign_decay
from normwise.engine.sharded import here, is_sharded, reshard
from normwise.engine.sharded.prefetch import align, fulfil, run_all
from normwise.engine.step import Turn
from normwise.errors import PolicyError
from normwise.norms.reduce import may_branch
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.roles import before_batch_norm
from normwise.policy import Policy, Rule
from normwise.policy.conflicts import check
from normwise.policy.schedules import at


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
        check([(rule, {e.name for e in entries}) for rule, entries in targets])
        self.rules = [bind(rule, entries, self.owner, i) for i, (rule, entries) in enumerate(targets)]
        self._bindings = Bindings(model, self.optimizers)
        self._params = [list(self.held(k).values()) for k in range(len(self.optimizers))]
        self.spanning = any(_spans(b) for b in self.phase("penalty", "gradient"))
        _refuse_spanning(self.phase("update", "prox"))
        self._groups: dict[int, tuple[tuple[tuple[int, int], ...], dict[int, dict[str, Any]]]] = {}
        for bound in self.rules:
            refuse_foreign_decay(bound, self._group)
        for bound in self.phase("gradient")[:1]:
            bound.watches = not self.phase("penalty") and bound.flat and bound.rule.action == "clip_norm"
        self._paced = [b for b in self.rules if b.paced]
        self.check_rates()
        self._own = [(b, what, v) for b in self.rules for what, v in b.functions()]
        self.sharded = any(is_sharded(p) for params in self._params for p in params)
        """Whether any parameter is a DTensor."""
        self.inline = False
        """The optimizer hands its updates over before it applies them, so that rules on them need no snapshot of the weights."""
        self._turn: Turn | None = None

    # ------------------------------------------------------------------------------------------------ binding

    def outdated(self, model: nn.Module) -> bool:
        """Whether the rules must be bound anew: where an optimizer holds a parameter of the model that was not there, or was frozen, when
        they were bound; where one that they act on is frozen or held no longer; where parameters have another dtype or shape, or other
        ones stand in their place in the model."""
        bindings = self._bindings
        if bindings.registered_elsewhere():
            if self.sharded:
                reshard(model)
            if not self.sharded or bindings.registered_elsewhere():
                return True
        if not bindings.held_elsewhere():
            return bindings.converted()
        self._groups.clear()
        acted_on = {id(p) for b in self.rules for m in b.members for p in (m.param, *m.depends_on)}
        known = {id(p) for p in bindings.params} | acted_on
        held = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"] if p.requires_grad}
        gone = not acted_on <= held
        owner = _owners(self.inventory, self.optimizers)
        moved = any(owner.get(p, k) != k for p, k in self.owner.items())
        if gone or moved or any(id(p) in held - known for p in model.parameters()):
            return True
        bindings.refresh()
        return False

    def refuse_replaced(self, inventory: Inventory) -> None:
        """PolicyError where the model has another tensor under a name that a rule acts on, and the optimizer still holds the old one."""
        held = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"]}
        mine = {id(m.param) for b in self.rules for m in b.members}
        fresh = {id(e.param) for e in inventory}
        lost = [name for name in replaced(self.inventory, inventory, held) if id(self.inventory.by_name[name].param) in mine - fresh]
        if lost:
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise PolicyError(
                f"the model has another tensor as {shown} than when the rules were attached (a new layer, or "
                "load_state_dict(assign=True)), "
                "and the optimizer still holds the old one: its steps would change nothing that the model uses. Give the new tensor to the "
                "optimizer (add_param_group, or a new optimizer), then attach to that; or load without assign."
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
                    f"rule '{bound.rule.label()}' shortens units of {len(found)} layers whose output a BatchNorm rescales, such as "
                    f"{name} before "
                    f"{norm}: there a shorter filter computes the same, so that hardly any unit becomes zero. Put it on gains and shifts, "
                    "nw.group_lasso(s, params='class:BatchNorm2d'), and exclude these layers; nw.prune.shrink removes what is zero."
                )
        return told

    def check_rates(self) -> None:
        """PolicyError where a rule needs the learning rate and its parameters' group has none."""
        for bound in self._paced:
            for m in bound.members:
                if self._group(m.param).get("lr") is None:
                    raise PolicyError(
                        f"rule '{bound.rule.label()}' needs the learning rate, and the group of {m.name!r} has lr="
                        f"{self._group(m.param).get('lr')!r}: its optimizer finds its own. Give it a learning rate, or leave the rule out."
                    )

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

    def holds(self, param: nn.Parameter) -> bool:
        """Whether one of the optimizers holds a parameter now."""
        return any(param is p for o in self.optimizers for g in o.param_groups for p in g["params"])

    def rate(self, param: nn.Parameter) -> Any:
        """η: the ``lr`` of the parameter's group, times the factor ``d`` that D-Adaptation and Prodigy keep there. A tensor has no
        dimensions, whatever the group has; other numbers, as numpy's, are floats."""
        group = self._group(param)
        rate, factor = group["lr"], group.get("d", 1.0)
        if isinstance(rate, Tensor):
            return (rate.reshape(()) if rate.ndim else rate) * factor
        return float(rate.item() if hasattr(rate, "item") else rate) * factor

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
        token = tuple((id(g), len(g["params"])) for g in groups)
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

    def decay_phase(self, turn: Turn, decays: bool = True) -> None:
        """Decoupled weight decay and CPR's, then the snapshot that rules on updates need.

        decays: False where a step that raised is tried again, whose weights have decayed already.
        """
        self._turn = turn
        if self.sharded:
            fulfil([request for bound in self.rules for request in bound.before_begin(turn)])
        for bound in self.rules:
            bound.begin(turn)
        if decays:
            self._run_all(self.phase("decay", "cpr"), turn)
        for m in self._snapshot_members(turn.optimizer):
            if m.param.grad is not None:
                turn.before.setdefault(id(m.weight), m.now().clone())

    def _snapshot_members(self, optimizer: int) -> list[Member]:
        """What rules on updates compare with, where the optimizer does not hand its updates over."""
        inline = self.inline_rules()
        return [m for b in self.phase("update") if b not in inline for m in b.members if m.optimizer == optimizer]

    def started(self, optimizer: int, decayed: bool = False) -> list[nn.Parameter]:
        """The parameters whose weights at the start of a step matter to some rule: to decay (alone, if ``decayed``), to compare with."""
        early = [m for b in self.phase("decay", "cpr") for m in b.members if m.optimizer == optimizer]
        others = [] if decayed else [m for b in self.rules if b.looks_back for m in b.members if m.optimizer == optimizer]
        others += [] if decayed else self._snapshot_members(optimizer)
        return list({id(p): p for m in (*early, *others) for p in (m.param, *m.depends_on)}.values())

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
        inline = self.inline_rules()
        self._run_all([b for b in self.phase("update", "prox", "qk_clip", "weight") if b not in inline], turn)
        for bound in self.rules:
            bound.commit(turn)

    def drop_reports(self, optimizers: Sequence[int]) -> None:
        """Forgets what was reported for a step that is skipped."""
        for bound in self.rules:
            bound.drop_reports(optimizers)

    def bound_again(self, index: int, entries: list[Entry]) -> BoundRule:
        """One rule on other parameters, beside those that it is bound to: what is frozen now."""
        return bind(self.policy[index], entries, self.owner, index)

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

    def _refuse_sparse(self) -> None:
        """And what is dense can be written in place from here on."""
        for bound in self.phase("penalty", "gradient"):
            for part in bound.packs:
                grads = [p.grad for p in part.params]
                if all([g is None or (g.layout == torch.strided and g.is_contiguous() and not g.is_neg()) for g in grads]):    # noqa: C419
                    continue
                own_grads(part.params)
                if any(g is not None and g.layout != torch.strided for g in grads):
                    raise PolicyError(
                        f"a gradient that rule '{bound.rule.label()}' needs dense is sparse (among {part.members[0].name}, ...): use "
                        "Embedding(sparse=False), or exclude the parameter."
                    )


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
    if on_meta(p):
        raise PolicyError(
            f"{entry.name!r} is on the meta device and has no values yet: materialise the model (to_empty and load, or its own "
            "initialisation), then attach."
        )
    if not p.is_floating_point():
        raise PolicyError(
            f"{entry.name!r} is {p.dtype}, and rule '{rule.label()}' needs real floating-point numbers: exclude it, or train its "
            "torch.view_as_real."
        )
    refuse_overlap(p, repr(entry.name))


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
