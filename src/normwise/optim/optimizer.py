"""The one norm-based optimizer: every method is a row of parts in a parameter group."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from normwise.engine.optimizer_state import KEY, waiting, with_part
from normwise.engine.sharded.prefetch import align, run_together
from normwise.engine.step import OnePass, makes_state
from normwise.errors import PolicyError, a_kind_of
from normwise.low_precision import NOISE
from normwise.optim.columns import (
    DEFAULTS,
    SETTLED,
    Radius,
    Row,
    check_row,
    complete,
    has_momentum,
    refuse_unused,
    refused_option,
    settle,
)
from normwise.optim.load_state import adapt
from normwise.optim.plan import WIDE_STATE, build, check_params, follow, layouts, members, no_matrix
from normwise.optim.routing import Receipt, Routing, little_covered, route
from normwise.optim.step import GRADIENT, LAYOUTS, PARTS, Plan, step_group
from normwise.parameters.inventory import LayoutLike
from normwise.policy import Policy

KEPT_PLANS = 32    # sets of parameters with gradients that are remembered; alternating losses have a few, not many
BESIDES = ("params", "param_names", LAYOUTS, KEY, "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
"""What a group may have besides the columns: torch's own keys, and those of its schedulers."""

MAPS = {"override": "{'head.*': 'adamw'}: selector -> row", "layouts": "{'*.qkv.weight': nw.Layout(...)}: selector -> axes"}


class NormOptimizer(Optimizer):
    """Steps under a norm: direction → act → scale → decay → apply → hold, one choice a column (see ``normwise.optim.columns``).

    Args:
        params: a module: its parameters are routed by their roles and ``rows``; every one is covered, or named in an error. Or what any
            torch optimizer takes: tensors, named tensors, or groups; these all take the row ``main``, and 2-D ones are read as
            (outputs, inputs), as ``torch.optim.Muon`` reads them.
        rows: name -> row of parts.
        roles: role -> name of a row, for a module.
        main: the row of parameters given without a module.
        override: selector -> what the user routes by hand, before roles: the name of a row; a row; or a number, which multiplies the radius
            of the rows that these parameters take otherwise, and so their steps (a tuple: block by block, as (3.0, 3.0, 0.5) for q, k, v);
            or ``"skip"``: another optimizer trains them.
        layouts: selector -> ``nw.Layout``, or a function of (module, name, tensor) that gives one, where the axes are not what the module's
            type says.
        policy: rules that run inside the step; those on updates need no snapshot of the weights then. Their state is in ``state_dict()``.

    A real ``torch.optim.Optimizer``: groups, per-group options, closures, schedulers, state round trips, hooks. ``.grad`` is never written,
    except by rules on gradients. Sparse and complex parameters are refused. A step that is refused has changed nothing.

    Raises:
        PolicyError: an unknown part, a parameter that no row covers; in the first step, a block of norm zero where its initial norm R is
            what a part keeps to. LayoutError: a matrix method on what is no matrix.
        ValueError: a negative learning rate and the like, as torch's optimizers do.
    """

    routing: Routing | None
    _offered: OnePass | None = None
    """What a control offers to the next step, which the step takes or declines."""

    def __new__(cls, *args: Any, **options: Any) -> NormOptimizer:
        """PolicyError for an option that the signature has not, with the nearest one that it has, or the reason."""
        known = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            for unknown in options.keys() - known.keys():
                raise refused_option(cls.__name__, unknown, options[unknown], list(known)[1:])
        return super().__new__(cls)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        rows: Mapping[str, Row],
        roles: Mapping[str, str],
        main: str,
        override: Mapping[Any, str | Row | Radius] | None = None,
        policy: Any = None,
        layouts: Mapping[Any, LayoutLike] | None = None,
    ) -> None:
        for argument, value in {"override": override, "layouts": layouts}.items():
            if value is not None and not isinstance(value, Mapping):
                raise PolicyError(f"{argument} is {a_kind_of(value)}, and must be a dict, as {MAPS[argument]}.")
        full = {name: complete(row, f"the row {name!r}") for name, row in rows.items()}
        for name, row in full.items():
            check_row(row, f"the row {name!r}")
        ascends = {"maximize": full[main]["maximize"]}    # of a row of the user's own as of the others
        override = {s: {**ascends, **wanted} if isinstance(wanted, Mapping) else wanted for s, wanted in (override or {}).items()}
        self.routing = route(params, full, roles, override, layouts) if isinstance(params, nn.Module) else None
        for name, given in {"override": override, "layouts": layouts}.items():
            if given and self.routing is None:
                raise PolicyError(f"{name}= speaks of names and roles, which only a module tells: give the module instead of its tensors.")
        groups: Any = self.routing.groups() if self.routing is not None else params
        self._settled: dict[int, Any] = {}
        self._of_matrices = full[main] if roles.get("bias", main) != main and full[main]["hold"] == "sphere" else None
        # A new group's columns. Schedulers that cycle a momentum look here for its name: only the one in use is shown.
        momentum = "betas" if full[main]["direction"] in ("adam", "lion") else "momentum" if has_momentum(full[main]) else ""
        super().__init__(groups, {c: v for c, v in full[main].items() if c not in ("momentum", "betas") or c == momentum})
        self.routing = None if self.routing is None else self.routing.of_shapes()
        self._plans: dict[Any, Plan] = {}
        self._told = False
        self._policy_control: Any = None
        if policy is not None:
            if not isinstance(params, nn.Module):
                raise PolicyError("policy= needs the module, since rules name parameters: give the module instead of its tensors.")
            from normwise.control import Control

            self._policy_control = Control(params, [self], Policy(policy, layouts=layouts), "ignore", False, False, built_in=True)
            self._policy_control.engine.inline = True

    @property
    def control(self) -> Any:
        """The :class:`normwise.Control` of ``policy=``; None without one, and in a copy, which torch makes without hooks."""
        return getattr(self, "_policy_control", None)

    # ------------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may state any column of its row, ``nesterov``, and ``layouts`` (one ``nw.Layout`` a parameter). Keys of the
        user's own are kept, as torch keeps them; what is like an option but is none is an error."""
        stated = dict(param_group) if isinstance(param_group, dict) else {}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # Most rows of matrices cannot act on vectors and say so themselves. Hyperball's could: a bias would be held on a sphere.
            row, vectors = getattr(self, "_of_matrices", None), [p for p in group["params"] if p.ndim < 2]
            if row and vectors and LAYOUTS not in group and all(group.get(part, row[part]) == row[part] for part in PARTS):
                raise no_matrix(vectors[0])
            _check_group(group, stated)
            copied = hasattr(self, "_plans") and stated.keys() >= DEFAULTS.keys()    # a copy of a group states every column
            refuse_unused(stated, group, group_name(group), self.param_groups[:-1] if copied else ())
            if "lr" not in stated or (self.routing is not None and not hasattr(self, "_plans")):    # one rate that was given for all
                _own_rate(group, self.param_groups[:-1])
            self._settled[len(self.param_groups) - 1] = settle(group, None, group_name(group), BESIDES)
        except Exception:
            self.param_groups.pop()
            raise

    # ------------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:    # type: ignore[override]
        """One step. ``closure`` re-evaluates the model and returns the loss, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans, one_pass = self._prepare()
        if plans is None:
            return loss
        control = self.control
        on_update = control.engine.act_on_updates if control is not None and control.engine.inline_rules() else None
        pairs = list(zip(self.param_groups, plans, strict=True))
        if one_pass is not None and (on_update is not None or not all(plan.takes(group) for group, plan in pairs)):
            one_pass.decline()
            one_pass = None
        waiting = [one for group, plan in pairs for one in step_group(plan, group, on_update, one_pass)]
        if waiting:
            run_together(waiting)
        return loss

    @_disable_dynamo    # a compiled step compiles the arithmetic, not the bookkeeping
    def _prepare(self) -> tuple[list[Plan] | None, OnePass | None]:
        """A plan for each group, and what a control offers. Everything that can be refused is refused here, before the first group has
        stepped. No plans where the step is taken for the sake of the state alone."""
        one_pass, self._offered = self._offered, None    # now: an offer to a step that is refused does not stand
        only_state = not self.state and makes_state(self)
        self._settle()
        known = len(self.state)
        try:
            plans = [self._plan(index, group) for index, group in enumerate(self.param_groups)]
        except Exception:    # the groups before the refused one have got states by now, the newest entries
            for p in list(self.state)[known:]:
                del self.state[p]
            self._plans.clear()
            raise
        if only_state:
            return None, one_pass
        if not self._told:    # in the first step, once: where a matrix method has little to do, which wrong roles look like
            self._told = True
            message = little_covered(self)
            if message:
                warnings.warn(message, stacklevel=5)
        return plans, one_pass

    def _plan(self, index: int, group: dict[str, Any]) -> Plan:
        grads = list(map(GRADIENT, group["params"]))
        if any([g is not None and g.layout != torch.strided for g in grads]):    # noqa: C419 - faster than a generator
            raise RuntimeError("NormOptimizer does not support sparse gradients: use Embedding(sparse=False), or SparseAdam there.")
        key = (index, *[g is None for g in grads])
        plan = self._plans.get(key)
        if plan is not None and plan.fits(group, self.state):
            if plan.aligned:
                align(plan.aligned)
            return plan
        align(group["params"])
        follow(group, group_name(group))
        if len(self._plans) >= KEPT_PLANS:
            self._plans.clear()
        plan = build(group, [i for i, g in enumerate(grads) if g is not None and g.numel()], self.state)
        self._plans[key] = plan
        return plan

    def receipt(self) -> Receipt:
        """Who takes which step, in a few lines: how many matrices and numbers each method has, which parameters had no gradient so far, and
        what the rules of ``policy=`` did in the last step. ``print`` it."""
        return Receipt.of(self)

    def _settle(self) -> None:
        """Checks and settles the groups that were written to, see :func:`normwise.optim.columns.settle`; before every step, and before a
        group is saved or copied."""
        for index, group in enumerate(self.param_groups):
            last = self._settled.get(index)
            if not _as_settled(group, last):
                self._settled[index] = settle(group, last, group_name(group), BESIDES)

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors and plain data, safe to load weights-only; with ``policy=`` also the state of its rules, in the first
        group."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken, bit for bit, the rules of ``policy=`` too; also from torch's SGD, Adam, AdamW and Muon,
        where the step is the same.

        Options come from the checkpoint, as in torch, the parameters' axes from this optimizer. ValueError, with nothing changed, where
        groups or states do not fit.
        """
        if "policy" in state_dict:    # saved by an earlier version, which kept it beside the groups
            kept = state_dict["policy"]
            state_dict = with_part(state_dict, {**kept, "steps": kept["steps"][0], "inside": True})
        seen: list[dict[str, Any]] = []

        def take(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            seen.append(adapt(self.param_groups, state_dict, state, BESIDES))
            return seen[0]

        handle = self.register_load_state_dict_pre_hook(take)    # after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = seen[0]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        # torch casts floating-point state to the parameter's dtype; what is kept wider for bf16 parameters stays as it was.
        for (i, p), name in product(zip(ids, params, strict=True), WIDE_STATE):
            if name in saved["state"].get(i, {}):
                self.state[p][name] = saved["state"][i][name].to("cpu" if name == NOISE else p.device, copy=True)
        if self.control is None and any(part.get("inside") for part in waiting(self)):
            warnings.warn("the state is of an optimizer with policy=, and this one has none: its rules do not act here.", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        if self.control is not None:
            warnings.warn(
                "the copy of this optimizer has no policy=, since torch copies optimizers without hooks: its bounds do not hold. Attach: "
                "nw.attach(model_copy, optimizer_copy, optimizer.control.policy).load_state_dict(optimizer.control.state_dict()).",
                stacklevel=3,
            )
        self._settle()
        state: dict[str, Any] = super().__getstate__()
        # torch keeps the groups and their state alone. Without these two a copy could not show its routing, and would take any group.
        return {**state, "routing": self.routing and self.routing.without_modules(), "_of_matrices": getattr(self, "_of_matrices", None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._settled = {}, {}
        self._told = True
        self.__dict__.setdefault("routing", None)
        for group in self.param_groups:
            group |= {**DEFAULTS, **group}
        self._settle()

    def __repr__(self) -> str:
        """What each group trains, and how: the columns that are not the defaults."""
        lines = []
        for group in self.param_groups:
            shown = {c: group[c] for c in DEFAULTS if c == "lr" or group[c] != DEFAULTS[c]}
            shown |= {c: v for c, v in group.items() if c not in DEFAULTS and c not in ("params", "param_names", LAYOUTS, "name")}
            numbers = sum(p.numel() for p in group["params"])
            values = " ".join(f"{c}={float(v) if isinstance(v, torch.Tensor) and v.numel() == 1 else v}" for c, v in shown.items())
            lines.append(f"    {group_name(group)}, {len(group['params'])} parameters of {numbers:,} numbers: {values}\n")
        return f"{type(self).__name__} (\n{''.join(lines)})"


def _as_settled(group: dict[str, Any], last: Any) -> bool:
    """Whether nothing but rates was written since. An array in the place of a number cannot be compared: that is a change."""
    try:
        return last is not None and len(group) == last[0] and SETTLED(group) == last[1] and _is_rate(group["lr"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return False


def _is_rate(value: Any) -> bool:
    """Whether a learning rate is one, and a group need not be settled for it. Numbers on other devices are not read: that would wait."""
    if isinstance(value, torch.Tensor):
        return not value.ndim and (not value.is_cpu or 0 <= float(value) < math.inf)
    return type(value) in (float, int) and 0 <= value < math.inf


def _own_rate(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """A tensor of its own for the rate: schedulers write into it, and would multiply a shared one once for each group."""
    rate = group["lr"]
    if isinstance(rate, torch.Tensor) and any(isinstance(o["lr"], torch.Tensor) and o["lr"].data_ptr() == rate.data_ptr() for o in others):
        group["lr"] = rate.clone()


def group_name(group: dict[str, Any]) -> str:
    """What errors call a group."""
    return f"the group {group['name']!r}" if "name" in group else "a parameter group"


def _check_group(group: dict[str, Any], stated: dict[str, Any]) -> None:
    """Completes a new group, of which the user has ``stated`` some keys, and refuses what no step could be made of."""
    name = group_name(group)
    base = {**DEFAULTS, **{column: value for column, value in group.items() if column in DEFAULTS}}
    group.pop("nesterov", None)
    group |= complete({column: value for column, value in stated.items() if column in (*DEFAULTS, "nesterov")}, name, base)
    check_row(group, name, BESIDES, extras=True)
    check_params(group, name)
    group[LAYOUTS] = layouts(group)
    members(group, range(len(group["params"])))
    group[LAYOUTS] = [(x.axes, x.shape) for x in group[LAYOUTS]]
