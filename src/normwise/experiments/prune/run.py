"""One run of the study of smaller networks: train, with or without the group lasso; shrink; go on training; measure."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.errors import StudyError
from normwise.experiments.framework.store import NUMBER, Form, Result, Run
from normwise.experiments.tasks.rates import constant_then_linear
from normwise.experiments.tasks.task import Task
from normwise.prune import cut, shrink, targets

MOMENTUM = 0.9
FINE_TUNING_RATE = 0.1  # of the first rate
LASSO_AFTER = 0.25  # of the steps: on the plateau at the start of training the prox would take every unit, useful or not
_OTHER_BATCHES = 1_000_000  # added to the seed: fine-tuning sees other orders and crops than training


@dataclass(frozen=True)
class PruneRun(Run):
    """Everything that decides a run. strength: of the group lasso, 0 for none. units: removed before training, as ``cut`` takes them,
    so that a network of the smaller shape starts from fresh weights. full: whether the test part is measured. hold: see ``rules``."""

    task: str
    steps: int
    fine_tuning: int
    lr: float
    strength: float
    seed: int
    full: bool
    units: dict[str, list[int]] = field(default_factory=dict)
    versions: tuple[str, str] = ("", "")
    hold: bool = False
    kind: ClassVar[str] = "prune"
    unit: ClassVar[str] = "steps"

    def settings(self) -> dict[str, Any]:
        # The older files of finished runs know nothing of ``hold``.
        return {name: value for name, value in super().settings().items() if self.hold or name != "hold"}

    @property
    def amount(self) -> int:
        return self.steps + self.fine_tuning

    def told(self, result: Result) -> str:
        found = "failed" if "failed" in result else f"{100 * result['fine_tuned']['validation']:.1f}%"
        return f"rate {self.lr:g}, strength {self.strength:g}, seed {self.seed}: {found}"

    def train(self, task: Task, /) -> Result:
        return execute(self, task)

    @property
    def form(self) -> Form:
        # Why it failed, or what it came to.
        names = ("validation", "validation_loss", *(("test",) if self.full else ()))
        scores: Form = dict.fromkeys(names, NUMBER)
        form: dict[str, Form] = {"trained": scores, "fine_tuned": scores, "parameters": int, "multiplications": int}
        if self.strength:
            form |= {"before": scores, "removed": dict, "kept": dict, "units": dict, "difference": NUMBER}
        return {"failed": str}, form


def example(task: Task) -> Tensor:
    """Two inputs of the task."""
    return next(task.batches(2, 0))[0]


def rules(model: nn.Module, inputs: Tensor, strength: float, start: int = 0, hold: bool = False) -> list[nw.Rule]:
    """Group lasso from step ``start`` on all that makes a unit removable; strength · √size for units of ``size`` numbers (Yuan and Lin,
    2006).

    hold: each weight under the lasso then goes back to its initial norm, all of its units by one factor, so that those below the average
    shrink and the others grow. Where the next layer's BatchNorm takes any common factor out again, the loss does not hold such weights
    against the lasso, which without this shortens them all alike, until the last of the layer is gone. Biases and shifts are not held.
    """
    names = defaultdict(list)
    for name, size in targets(model, inputs).items():
        names[size].append(name)
    if not names:
        raise StudyError("this model has no units that could be removed, so there is nothing for the group lasso to do.")
    lasso = [nw.group_lasso(strength * math.sqrt(size), params=list(which), start=start) for size, which in names.items()]
    if not hold:
        return lasso
    weights = [name for which in names.values() for name in which if not name.endswith("bias")]
    return [*lasso, nw.unit_norm(nw.radii.Init(1.0), params=weights, per="tensor", start=start)]


def execute(run: PruneRun, task: Task) -> Result:
    """Trains and measures; plain numbers only.

    Gives ``trained`` and ``fine_tuned``, each with accuracy on validation and, for a full run, test part; ``parameters``,
    ``multiplications`` of one input; where there was a group lasso, ``removed``, ``kept``, ``difference`` and ``before`` shrinking.
    ``failed``: one sentence, where the run diverged or lost a whole layer.
    """
    torch.manual_seed(run.seed)
    started, inputs = time.perf_counter(), example(task)
    model = task.build()
    result: Result = {}
    if run.units:
        model = cut(model, inputs, run.units)
    try:
        lasso = rules(model, inputs, run.strength, round(LASSO_AFTER * run.steps), run.hold) if run.strength else []
        _train(task, model, run.lr, run.steps, run.seed, lasso)
        if lasso:
            result["before"] = _scores(task, model, run.full)
            model, report = shrink(model, inputs)
            result |= {
                "removed": {name: list(gone) for name, gone in report.removed.items()}, "kept": report.kept,
                "units": {name: list(counts) for name, counts in report.units.items()}, "difference": report.difference,
            }  # fmt: skip
    except StudyError as error:
        return {"failed": str(error)}
    result["trained"] = _scores(task, model, run.full)
    _train(task, model, FINE_TUNING_RATE * run.lr, run.fine_tuning, run.seed + _OTHER_BATCHES)
    result["fine_tuned"] = _scores(task, model, run.full)
    return {**result, **size_of(model, inputs), "seconds": time.perf_counter() - started}


def size_of(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """``parameters``, and ``multiplications`` in the convolutions and linear layers for one input."""
    counted: list[int] = []

    def count(layer: Any, args: Any, out: Tensor) -> None:
        places = out[0].numel() // (out.shape[1] if isinstance(layer, nn.Conv2d) else out.shape[-1])
        counted.append(places * layer.weight.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    return {"parameters": sum(p.numel() for p in model.parameters()), "multiplications": sum(counted)}


def _train(task: Task, model: nn.Module, lr: float, steps: int, seed: int, policy: Sequence[nw.Rule] = ()) -> None:
    """SGD with Nesterov momentum, the rate constant for half of the steps, then linearly to zero. StudyError where it diverges."""
    model.train()
    optimizer = sgd(model, lr)
    control = nw.attach(model, optimizer, list(policy)) if policy else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: constant_then_linear(step, steps))
    for step, batch in enumerate(itertools.islice(task.batches(task.batch, seed), steps), start=1):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if not math.isfinite(loss.item()):
            raise StudyError(f"the loss is not finite at step {step} of {steps} at the rate {lr:g}.")
    if control is not None:
        control.remove()


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The study's optimizer."""
    return torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM, nesterov=True)


def _scores(task: Task, model: nn.Module, full: bool) -> Mapping[str, float]:
    validation = task.evaluate(model, "validation")
    scores = {"validation": validation.accuracy, "validation_loss": min(validation.loss, 1e9)}
    return {**scores, "test": task.evaluate(model, "test").accuracy} if full else scores
