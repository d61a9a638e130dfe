"""One run of ``tune``: a candidate with a seed, to its metric, its step time and its size."""

from __future__ import annotations

import inspect
import math
import os
import sysconfig
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

import normwise
from normwise.errors import NormwiseError, a_kind_of
from normwise.experiments.framework.store import MAYBE, NUMBER, Form, Result, Run
from normwise.experiments.tune import space
from normwise.experiments.tune.apart import apart
from normwise.experiments.tune.storage import REDUCTION, first_rung, trial_of
from normwise.experiments.tune.target import Target, Trial

DONE, GIVEN_UP, REFUSED, FAILED = "done", "given up", "refused", "failed"
"""``refused``: its rules do not fit the model, or its metric is not finite, which the sampler should know; ``failed``: it raised."""


LOST: Result = {
    "state": FAILED, "value": None, "reason": "its worker process was killed, and killed again when it was repeated", "step_ms": None,
    "size": None, "seconds": 0.0, "breaches": [], "rules": "[]\n", "stepper": "", "code": "",
}  # fmt: skip
"""The result of a run that takes its process along."""


@dataclass(frozen=True)
class Watched:
    """Where a run's reports go: a trial of an Optuna study. url, study: of the storage. id: of the trial. spared: it is never given up."""

    url: str
    study: str
    id: int
    spared: bool

    def write(self, steps: int, step: int, value: float) -> Any:
        """Into the storage. Gives the trial there."""
        trial = trial_of(self.url, self.study, self.id, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # a trial that is done again has reported before
            trial.report(value, step)
        return trial

    def __call__(self, steps: int, step: int, value: float) -> bool:
        """Whether to give up."""
        trial = self.write(steps, step, value)
        return step < steps and bool(trial.should_prune()) and not self.spared


@dataclass
class Reports:
    """What a run reports. Successive halving decides at its rungs alone, and a report costs a commit and a look at all trials: the first
    one at or after each rung is told, and the last one. rung: the next. kept: the last report, where it was not told."""

    watched: Watched
    steps: int
    rung: int
    kept: tuple[int, float] | None = None

    def __call__(self, step: int, value: float) -> bool:
        """Whether to give up."""
        if step < self.rung:
            self.kept = (step, value)
            return False
        while self.rung <= step:
            self.rung *= REDUCTION
        self.kept = None
        return self.watched(self.steps, step, value)

    def close(self) -> None:
        """At the end of the run."""
        if self.kept is not None:
            self.watched.write(self.steps, *self.kept)


@dataclass(frozen=True)
class TuneRun(Run):
    """Everything that decides a run. key: of the target. numbers: the candidate. number: of the trial. watched: who is told of reports."""

    key: str
    numbers: dict[str, Any]
    seed: int
    steps: int
    final: bool
    number: int
    watched: Watched | None
    kind: ClassVar[str] = "tune"
    unit: ClassVar[str] = "steps"

    @property
    def amount(self) -> int:
        return self.steps

    @property
    def form(self) -> Form:
        return {"state": str, "value": MAYBE, "reason": str, "seconds": NUMBER}

    def told(self, result: Result) -> str:
        value = result["value"]
        return f"{space.label(self.numbers)}: {result['state'] if value is None else f'{value:.4g}'}"

    def train(self, target: Target, /) -> Result:
        """``state``, ``value`` (None where it is not ``done``), ``reason``, ``step_ms``, ``size``, ``seconds``, ``breaches``, ``rules`` as
        YAML, ``stepper``, the advised optimizer, and ``code``, what makes the optimizer again."""
        watch = Reports(self.watched, self.steps, first_rung(self.steps)) if self.watched else None
        if self.watched:    # a storage out of reach is the study's failure, not the target's
            trial_of(self.watched.url, self.watched.study, self.watched.id, self.steps)
        trial = Trial(self.numbers, self.seed, self.steps, self.final, watch)
        started = time.perf_counter()
        with apart(self.seed):
            state, value, reason = _outcome(target, trial)
        if watch is not None:
            watch.close()
        seconds = round(time.perf_counter() - started, 2)
        breaches: list[str] = []
        size = None
        try:
            breaches = [str(b) for control in trial.controls for b in control.verify().breaches] if state == DONE else []
            size = trial.size()
        except Exception as error:    # weights that the target has taken away
            state, value, reason = FAILED, None, f"the model cannot be looked at after the run: {_said(error)}"
        return {
            "state": state, "value": value, "reason": reason, "step_ms": trial.step_ms(), "size": size,
            "seconds": seconds, "breaches": breaches,
            "rules": trial.rules, "stepper": trial.stepper, "code": trial.code,
        }  # fmt: skip


def _outcome(target: Target, trial: Trial) -> tuple[str, float | None, str]:
    found: Any = None
    try:
        found = target.call(trial)
    except (Exception, SystemExit) as error:    # the target's own code
        # GivenUp, too, is kept in the trial: the target may have turned it into another.
        if trial.ended is None:
            refused = isinstance(error, NormwiseError)
            return REFUSED if refused else FAILED, None, f"{_said(error)}{'' if refused else f' ({_line(error)})'}"
    if trial.ended is not None:    # also where the target swallowed it
        return REFUSED if trial.ended.reason else GIVEN_UP, None, trial.ended.reason
    value = _number(found)
    if value is None:
        return FAILED, None, f"{target.name.rpartition(':')[2]} returned {_kind(found)}: return one number"
    if not math.isfinite(value):
        return REFUSED, None, f"the metric is {value}"
    if missed := trial.missed():
        return FAILED, None, missed
    return (DONE, value, "") if abs(value) < LARGEST else (REFUSED, None, f"the metric is {value:g}, beyond {LARGEST:g}")


LARGEST = 1e100
"""Metrics beyond this have no mean and no difference in floating point that could be trusted."""


def _number(found: Any) -> float | None:
    """What a target returned as a number, if it is one; a text is none, whatever it says."""
    if isinstance(found, str | bytes | bytearray):
        return None
    try:
        return float(found.detach() if isinstance(found, Tensor) else found)
    except Exception:    # also what a __float__ of the user's raises
        return None


def _kind(found: Any) -> str:
    """In words, for a message."""
    if inspect.iscoroutine(found):
        found.close()    # or Python warns that nobody awaited it
        return "a coroutine, as an async function does"
    if inspect.isgenerator(found) or inspect.isasyncgen(found):
        return "a generator, as a function with yield does"
    if found is None or isinstance(found, str | bytes):
        return f"{'the text ' * (found is not None)}{found!r:.40}"
    if isinstance(found, Tensor | np.ndarray):
        return f"{a_kind_of(found)} of shape {tuple(found.shape)}"
    return f"{a_kind_of(found)} that is no float"


def _said(error: BaseException) -> str:
    """The kind and the text, on one line."""
    try:
        text = " ".join(str(error).split())[:300].rstrip(".")
    except Exception:    # an exception that cannot be printed
        text = "without a text"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException) -> str:
    """Where it was raised: the last line of the user's own code, if there is one, else the last that is not ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES) and not frame.filename.startswith("<frozen")]
    last = [*traceback.extract_tb(error.__traceback__), *frames, *own][-1]
    return f"{last.filename.rsplit('/', 1)[-1]}, line {last.lineno}"


_OURS = str(Path(normwise.__file__).parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(kind) + os.sep for kind in ("purelib", "platlib", "stdlib", "platstdlib")})
