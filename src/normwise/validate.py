"""What a policy can be attached to: a model, and optimizers whose step hooks run, in whatever wrapper."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normwise.engine.program import Engine
from normwise.engine.sharded import collectives, is_sharded
from normwise.errors import PolicyError
from normwise.policy import Policy

OWN_THEIR_ITERATES = ("LBFGS", "ScheduleFree")
INNER = ("base_optimizer", "optim", "_optimizer", "inner_optimizer", "opt", "base")
"""Where wrappers that are not opened keep the optimizer that they drive."""
FORWARDERS = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "deepspeed", "torch")
"""Packages whose wrappers hand a step on and do nothing to the weights after it."""


def check_model(model: Any, optimizer: Any) -> None:
    """PolicyError for what is no module: parameters, swapped arguments."""
    if isinstance(model, nn.Module):
        return
    if isinstance(optimizer, nn.Module):
        raise PolicyError(f"the arguments are swapped, a {type(model).__name__} before a model. Write attach(model, optimizer, rules).")
    what = "parameters" if isinstance(model, Iterable) and not isinstance(model, str) else f"a {type(model).__name__}"
    raise PolicyError(
        f"attach needs the model, given {what}: rules name parameters and ask module types for their axes. Write attach(model, "
        "optimizer, rules)."
    )


def optimizers(given: Any) -> list[Optimizer]:
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
    driven = [f".{where} (a {type(one).__name__})" for where, one in inside if isinstance(one, Optimizer)]
    instead = f" Attach to the optimizer that it drives, {driven[0]}." if driven else " Attach to the optimizer that it drives."
    return f"torch runs no step hooks for this {name}, which does not call Optimizer.__init__, so that no rule would ever act.{instead}"


def check_ranks(model: nn.Module, policy: Policy, on_nonfinite: str) -> None:
    """PolicyError on every rank of a sharded model whose ranks have different rules: other radii would drift apart without a word, other
    rules would wait for each other until the time-out. Nothing is sent for a model without DTensors."""
    meshes = {p.device_mesh: None for p in model.parameters() if is_sharded(p)}    # type: ignore[attr-defined]
    mine = "\n".join([f"on_nonfinite={on_nonfinite!r}", *(re.sub(r" at 0x[0-9a-f]+", "", repr(rule)) for rule in policy)])
    for mesh in meshes:
        texts = collectives.texts_if_different(mine, mesh)
        if not texts:
            continue
        ranks = collectives.ranks_of(collectives.group_of(mesh, tuple(range(mesh.ndim))))
        other = next(i for i, text in enumerate(texts) if text != texts[0])
        first, second = texts[0].split("\n"), texts[other].split("\n")
        pairs = itertools.zip_longest(first, second, fillvalue="nothing")
        here, there = next((a, b) for a, b in pairs if a != b)
        raise PolicyError(
            f"the ranks of this sharded model have different rules: rank {ranks[0]} has {here}, rank {ranks[other]} has {there}. Give "
            "every rank the same policy."
        )


def refuse_iterate_owners(engine: Engine, given: Sequence[Optimizer]) -> None:
    """Updates of an optimizer that keeps its own iterates are not to be changed."""
    for bound in engine.phase("update"):
        for k in {m.optimizer for m in bound.members}:
            name = type(given[k]).__name__
            if any(owner in name for owner in OWN_THEIR_ITERATES):
                raise PolicyError(
                    f"rule '{bound.rule.label()}' would change the updates of {name}, which keeps its own iterates and would drift apart "
                    "from them: use on='grad' or on='weight'."
                )
