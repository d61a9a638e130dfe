"""What a policy can be attached to: optimizers with step hooks, in whatever wrapper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from normwise.engine.engine import Engine
from normwise.errors import PolicyError

OWN_THEIR_ITERATES = ("LBFGS", "ScheduleFree")


def optimizers(given: Any) -> list[Optimizer]:
    """One optimizer or several, out of their wrappers; PolicyError for anything else."""
    several = isinstance(given, Iterable) and not isinstance(given, str) and _hooked(given) is None
    found = [_unwrapped(o) for o in (given if several else [given])]
    if not found:
        raise PolicyError("no optimizer was given: attach(model, optimizer, policy) takes one or a list of several.")
    if len({id(o) for o in found}) < len(found):
        raise PolicyError("an optimizer was given twice, and its rules would act twice a step: give each once.")
    return found


def _hooked(optimizer: Any) -> Any:
    """What has step hooks: the optimizer, or the one that Accelerate's and Lightning's wrappers keep in ``.optimizer``; else None."""
    while not hasattr(optimizer, "register_step_pre_hook") or "_optimizer_step_pre_hooks" not in vars(optimizer):
        if (optimizer := getattr(optimizer, "optimizer", None)) is None:
            return None
    return optimizer


def _unwrapped(given: Any) -> Optimizer:
    if (optimizer := _hooked(given)) is None:
        raise PolicyError(f"{given!r} is no optimizer with step hooks: attach(model, optimizer, policy) needs a torch.optim.Optimizer.")
    return optimizer


def may_nest(cls: type) -> bool:
    """Whether an optimizer's class has a ``step`` of its own over that of another optimizer, which it may call."""
    return sum("step" in vars(base) for base in cls.__mro__ if base is not Optimizer) > 1


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
