"""The answer of ``advise``: a policy, an optimizer, and lines that say why."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from normwise import optim
from normwise.advice.probe import Probe
from normwise.policy import NAMED, Policy, Rule
from normwise.reports import finite

Verdict = Literal["do", "leave", "know"]
Basis = Literal["model", "guess", "probe"]
WIDTH = 100


@dataclass(frozen=True)
class Call:
    """A named rule and its arguments: ``str()`` is the code, ``rules()`` what it makes."""

    name: str
    arguments: Mapping[str, Any]

    def rules(self) -> list[Rule]:
        made = NAMED[self.name](**self.arguments)
        return [made] if isinstance(made, Rule) else made

    def __str__(self) -> str:
        first = next(iter(inspect.signature(NAMED[self.name]).parameters))
        shown = [repr(value) if key == first else f"{key}={value!r}" for key, value in self.arguments.items()]
        return f"nw.{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class Recipe:
    """A ready optimizer: a class of ``nw.optim``, or ``"torch.optim.…"``, and its arguments. ``str()`` is the code. Figures of ours were
    measured with the schedule of ``nw.optim.schedule``."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer of ``model``'s trainable parameters."""
        if self.name.startswith("torch."):
            cls: type[Optimizer] = getattr(torch.optim, self.name.rpartition(".")[2])
            return cls([p for p in model.parameters() if p.requires_grad], **self.arguments)
        made: Optimizer = getattr(optim, self.name)(model, **self.arguments)
        return made

    def __str__(self) -> str:
        given = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
        if self.name.startswith("torch."):
            return f"{self.name}([p for p in model.parameters() if p.requires_grad]{given})"
        return f"nw.optim.{self.name}(model{given})"


@dataclass(frozen=True)
class Line:
    """One piece of advice.

    verdict: ``"do"`` (it is in the policy or the optimizer), ``"leave"`` (you need not), ``"know"`` (nothing here does it for you).
    on: which parameters, with ``tensors`` and ``numbers`` how many. basis: what tells it, the model, a guess from its code, or the probe.
    needs: the rule or optimizer without which it says nothing, "" for none.
    """

    verdict: Verdict
    what: str
    on: str
    why: str
    source: str
    cost: str = ""
    basis: Basis = "model"
    rules: tuple[Call, ...] = ()
    tensors: int = 0
    numbers: int = 0
    needs: str = ""

    def data(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "rules": [str(rule) for rule in self.rules]}


@dataclass(frozen=True)
class Advice:
    """What to start with. ``print`` it; the parts are attributes.

    goal: what was asked for. model: the class, and its size. policy: attaches to the model that was asked about, possibly empty.
    optimizer: see :class:`Recipe`. lines: in the order in which they matter. probe: what was measured, or None. on_nonfinite: for
    ``nw.attach``.
    """

    goal: str
    model: str
    policy: Policy
    optimizer: Recipe
    lines: tuple[Line, ...]
    probe: Probe | None = None
    on_nonfinite: str = "ignore"
    made_by: str = ""
    """``package.module:function`` that makes the model, for :meth:`python`."""
    settings: tuple[str, ...] = ()
    """Code that changes the model before an optimizer is built."""

    @property
    def calls(self) -> list[Call]:
        """The named rules that the policy is made of."""
        return [call for line in self.lines for call in line.rules]

    def yaml(self) -> str:
        """The policy as a YAML file, with the reasons as comments; ``nw.Policy.from_yaml`` reads it."""
        lines = [f"Advice for {self.goal}: {self.model}.", f"Optimizer: {self.optimizer}"]
        lines += [f"{line.what}: {line.why} ({line.source})" for line in self.lines if line.rules]
        comments = [wrapped for text in lines for wrapped in textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="#   ")]
        return "\n".join(comments) + f"\n{self.policy.to_yaml()}"

    def python(self) -> str:
        """Code that makes optimizer and control; it needs ``model``, which it makes itself where the function is known."""
        module, _, function = self.made_by.partition(":")
        lines = ["import normwise as nw", *(["import torch"] if self.optimizer.name.startswith("torch.") else [])]
        if module:
            top = function.partition(".")[0]
            lines += [f"from {module} import {top}", "", f"model = {function}()", "model = model[0] if isinstance(model, tuple) else model"]
        lines += [*([""] if self.settings else []), *self.settings]
        lines += ["", f"policy = nw.Policy([{''.join(f'{chr(10)}    {call},' for call in self.calls)}{chr(10) if self.calls else ''}])"]
        extra = "" if self.on_nonfinite == "ignore" else f", on_nonfinite={self.on_nonfinite!r}"
        bare = not self.calls and not extra
        attached = "# no rule is advised: nothing to attach" if bare else f"control = nw.attach(model, optimizer, policy{extra})"
        lines += [f"optimizer = {self.optimizer}", attached]
        lines += ["# schedule = nw.optim.schedule(optimizer, steps=1000)    # your steps; schedule.step() after each optimizer.step()"]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Everything as JSON; what is not finite is null."""
        data = {
            "goal": self.goal, "model": self.model, "optimizer": {"name": self.optimizer.name, "arguments": dict(self.optimizer.arguments)},
            "policy": [rule.to_data() for rule in self.policy], "python": self.python(), "on_nonfinite": self.on_nonfinite,
            "lines": [line.data() for line in self.lines], "probe": None if self.probe is None else dataclasses.asdict(self.probe),
        }  # fmt: skip
        return json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        how = f"and a probe of {self.probe.batches} batches" if self.probe is not None else "nothing was run"
        head = f"Advice for {self.goal}: {self.model}. Told by the model, {how}."
        parts = [textwrap.fill(head, WIDTH), "", f"{'':3}{'verdict':9}{'advice':58}on"]
        return "\n".join([*parts, *(text for i, line in enumerate(self.lines, 1) for text in _shown(i, line))])


def _shown(number: int, line: Line) -> list[str]:
    """A row of the table, and under it the reasons, at most `WIDTH` columns wide."""
    what, on = textwrap.wrap(line.what, 56), textwrap.wrap(line.on, WIDTH - 70)
    verdict = line.verdict if line.basis != "guess" else f"{line.verdict}?"
    left = zip_longest([f"{number:<3}{verdict:9}"], what, on, fillvalue="")
    rows = [f"{start:12}{text:58}{where}".rstrip() for start, text, where in left]
    guessed = " Guessed from the model's code." if line.basis == "guess" else ""
    notes = [line.why + guessed, f"Source: {line.source}." + (f" Cost: {line.cost}" if line.cost else "")]
    return rows + [wrapped for note in notes for wrapped in textwrap.wrap(note, WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12)]
