"""What is tuned: a built-in task or a user's function, and the trial that it gets."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.control import controls_of
from normwise.errors import StudyError
from normwise.experiments.framework.provenance import data_name
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import STEPS, Task
from normwise.experiments.tune import space
from normwise.inspection.architecture import function_of

STEPS_OF_A_FUNCTION = 1000
LOOKS = (0.25, 0.5)
"""Shares of the steps at which successive halving asks."""


class GivenUp(Exception):
    """Ends a run from within ``report``: where others were better, or the metric is not finite (``reason``)."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "others were better at this step")
        self.reason = reason


@dataclass
class Trial:
    """One run, as a target sees it.

    Args:
        numbers: the candidate, see ``tune.space``.
        seed: everything random follows from it.
        steps: how long to train.
        final: whether the run judges the winner, and the metric should be that of data which no choice has seen.
        watch: gets each report, and says whether to give up; None where nobody asks.
    """

    numbers: space.Numbers
    seed: int
    steps: int
    final: bool = False
    watch: Callable[[int, float], bool] | None = None
    models: list[nn.Module] = field(default_factory=list)
    controls: list[nw.Control] = field(default_factory=list)
    ended: GivenUp | None = None
    policies: list[tuple[str, nw.Policy]] = field(default_factory=list)
    steppers: list[tuple[str, str]] = field(default_factory=list)
    codes: list[tuple[str, str]] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    stepped: bool = False
    ruled: bool = False
    told_for: float = 0.0

    def policy(self, model: nn.Module) -> nw.Policy:
        """The rules for ``model``; none for "nothing"."""
        self.asked.add("policy")
        found = space.policy(self.numbers, model)
        self.policies.append((type(model).__name__, found))
        return found

    @property
    def rules(self) -> str:
        """As YAML; of several models, as in a GAN, that have rules of their own, each one's after its name."""
        parts = [(f"# {name}\n", policy.to_yaml()) for name, policy in self.policies if policy.rules]
        if len({text for _, text in parts}) == 1 and len(parts) == len(self.policies):
            return parts[0][1]
        return "".join(f"{name}{text}" for name, text in parts) or "[]\n"

    @property
    def stepper(self) -> str:
        """The advised optimizer, of several models each one's."""
        told = dict.fromkeys(text for _, text in self.steppers)
        return next(iter(told)) if len(told) == 1 else "; ".join(f"{name}: {text}" for name, text in self.steppers)

    @property
    def code(self) -> str:
        """What makes the optimizer again, of several models each one's after its name."""
        told = dict.fromkeys(text for _, text in self.codes)
        return next(iter(told)) if len(told) == 1 else "\n".join(f"# {name}\n{text}" for name, text in self.codes)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of ``model``'s parameters, without rules: attach :meth:`policy` to it, or use :meth:`attach`."""
        self.asked.add("optimizer")
        self.codes.append((type(model).__name__, space.code(self.numbers, model)))
        made = space.built(self.numbers, model)
        if self.numbers["optimizer"] == space.ADVISED:
            self.steppers.append((type(model).__name__, str(nw.advise(model).optimizer)))
        made.register_step_post_hook(self._after_step)
        if not self.models:    # of several, as in a GAN, the first one's steps are timed
            made.register_step_post_hook(lambda *_: self.ticks.append(time.perf_counter() - self.told_for))
        self.models.append(model)
        return made

    def attach(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer with the rules attached: step it as any other. Of several models each has its own."""
        made, rules = self.optimizer(model), self.policy(model)
        if rules.rules:
            self.controls.append(nw.attach(model, made, rules))
        return made

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Steps are what tells that a candidate trained, and rules have to be at work in one: trainers take them off at their end."""
        self.stepped = True
        self.ruled = self.ruled or bool(controls_of([optimizer]))

    def missed(self) -> str:
        """What the target never asked for, or asked for and did not use, so that its metric says nothing about the candidate; "" for
        nothing."""
        lacks = {"optimizer": "its optimizer (trial.attach, or trial.optimizer)", "policy": "its rules (trial.attach, or trial.policy)"}
        named = [text for name, text in lacks.items() if name not in self.asked]
        if named:
            return f"the target never asked the trial for {' and for '.join(named)}"
        if not self.stepped:
            return "the trial's optimizer was never stepped"
        if any(policy.rules for _, policy in self.policies) and not self.ruled:
            return "the trial's rules were never attached to its optimizer: call trial.attach, or nw.attach(model, optimizer, policy)"
        return ""

    def report(self, step: int, value: float | Tensor) -> None:
        """Tells the metric after ``step`` steps, a whole number from 0 to 2³¹ - 1.

        Raises:
            GivenUp: where the run is of no more use. Let it pass through.
            StudyError: for another step.
        """
        started = time.perf_counter()
        value = float(value.detach() if isinstance(value, Tensor) else value)
        if not 0 <= int(step) < 1 << 31:
            raise StudyError(f"report was given step {step}: give a whole number from 0 to {(1 << 31) - 1}")
        if not math.isfinite(value):
            self.ended = GivenUp(f"the metric is {value} at step {step}")
        elif self.watch is not None and self.watch(int(step), value):
            self.ended = GivenUp()
        self.told_for += time.perf_counter() - started    # no part of a step
        if self.ended is not None:
            raise self.ended

    def step_ms(self) -> float | None:
        """The median time from one step to the next; None for a run of less than three."""
        apart = [1e3 * (after - before) for before, after in pairwise(self.ticks)]
        return statistics.median(apart) if len(apart) > 1 else None

    def size(self) -> int | None:
        """How many weights are not zero."""
        weights = {id(p): p for model in self.models for p in model.parameters()}
        return sum(int((p != 0).sum()) for p in weights.values()) if self.models else None


@dataclass(frozen=True)
class Target:
    """call: trains a trial and gives its metric. name, key, facts: what it is, and what decides a run of it. steps: the usual ones.
    source: a hash of the file that has the function; "" for a built-in task, whose version says it, and where no file is to be found."""

    call: Callable[[Trial], Any]
    name: str
    metric: str
    key: str
    facts: dict[str, Any]
    steps: int
    maximize: bool = False
    source: str = ""


def load_target(name: str, data: Path | str | None = None, size: str = "standard") -> Target:
    """A built-in task by its name, or a function as ``package.module:function``, found from the folder where the command was started.

    Raises:
        StudyError: an unknown task, a function that is not there or cannot be called with a trial alone, ``data`` with a function.
        DataError: unusable data.
    """
    if ":" not in name:
        task = load_task(name, data, size=size)
        facts = {**task.facts, "name": data_name(data)}    # never where a folder lies
        return Target(partial(_on_task, task), task.name, task.metric, task.key, facts, STEPS[task.name], task.metric == "accuracy")
    if data is not None:
        raise StudyError(f"--data is for built-in tasks; {name} finds its data by itself.")
    # For what the function imports when it runs, too, and for the workers, which get this process's path.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = function_of(name, "target")
    if inspect.iscoroutinefunction(function):
        raise StudyError(f"the target {name!r} is an async function: give an ordinary one, def train(trial).")
    try:
        inspect.signature(function).bind(None)
    except ValueError:    # a compiled function tells no signature
        pass
    except TypeError:
        taken = inspect.signature(function)
        raise StudyError(f"the target {name!r} takes {taken}, but must take one argument, the trial: def train(trial).") from None
    return Target(function, name, "metric", name, {"name": name}, STEPS_OF_A_FUNCTION, source=_hash_of(function))


def _hash_of(function: Callable[..., Any]) -> str:
    """Of the file in which a function, what a partial calls, or an object's class is written; "" where there is none."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    for one in (function, type(function)):
        with suppress(TypeError, OSError):    # built in, compiled, or made without a file
            return hashlib.sha256(Path(inspect.getsourcefile(one) or "").read_bytes()).hexdigest()
    return ""


def _on_task(task: Task, trial: Trial) -> float:
    """A run on a built-in task: the rate warms up and falls to zero, the metric is that of the task."""
    torch.manual_seed(trial.seed)
    model = task.build()
    optimizer = trial.attach(model)
    schedule = nw.optim.schedule(optimizer, trial.steps)
    looks = {math.ceil(trial.steps * share) for share in LOOKS} if trial.watch is not None else set()
    for step, batch in enumerate(islice(task.batches(task.batch, trial.seed), trial.steps), start=1):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        if not math.isfinite(loss.item()):
            return math.nan
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step in looks:
            trial.report(step, getattr(task.evaluate(model, "validation"), task.metric))
    return float(getattr(task.evaluate(model, "test" if trial.final else "validation"), task.metric))
