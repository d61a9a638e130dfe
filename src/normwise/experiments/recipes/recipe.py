"""What the recipes share: an arm, a run, and what a recipe is made of."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from normwise.experiments.framework.figures import finite
from normwise.experiments.framework.lattice import Axis
from normwise.experiments.framework.store import MAYBE, NUMBER, Form, Result, Run

Numbers = Mapping[str, float]
CONTENDER, BASELINE, REFERENCE = "contender", "baseline", "reference"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        label: for tables.
        rules: the strengths to the rules that are attached; none where all is in ``variant``.
        axes: the strengths to search beside the learning rate.
        role: a ``BASELINE`` is what a ``CONTENDER`` is compared with; a ``REFERENCE`` only shows what could be had.
        variant: what is other than usual about the model or the loop; the recipe knows the word.
    """

    label: str
    rules: Callable[[Numbers], list[Any]] = lambda numbers: []
    axes: tuple[Axis, ...] = ()
    role: str = CONTENDER
    variant: str = ""


@dataclass(frozen=True)
class RecipeRun(Run):
    """Everything that decides a run. numbers: the rate and the arm's strengths. size: how long it is, in the recipe's unit. full: whether
    it is one to report. data: the fingerprint of what it is trained on. versions: of normwise and torch."""

    arm: str
    numbers: dict[str, float]
    seed: int
    size: int
    full: bool
    data: str
    versions: tuple[str, str] = ("", "")
    figures: ClassVar[tuple[str, ...]]
    """The names of what is measured; the first decides."""

    @property
    def amount(self) -> int:
        return self.size

    @property
    def form(self) -> Form:
        return {"seconds": NUMBER, "acted": int, **dict.fromkeys(self.figures, MAYBE)}

    def told(self, result: Result) -> str:
        found = result[self.figures[0]]
        return f"{self.arm}: {self.figures[0]} {'diverged' if found is None else f'{found:.3f}'}"

    def train(self, context: Any, /) -> Result:
        """``measured`` with its time; None for figures that are not finite."""
        started = time.perf_counter()
        acted, found = self.measured(context)
        return {**{name: finite(value) for name, value in found.items()}, "acted": acted, "seconds": time.perf_counter() - started}

    @abstractmethod
    def measured(self, context: Any) -> tuple[int, dict[str, float]]:
        """How many blocks the rules changed, by ``control.violations()`` where the recipe looks at it, and the figures."""


@dataclass(frozen=True)
class Column:
    """A figure as tables show it. digits: behind the point. higher: whether more is better."""

    label: str
    digits: int = 3
    higher: bool = True


@dataclass(frozen=True)
class Recipe:
    """A question with its arms.

    Args:
        question: what the table answers, as a sentence.
        run: the class of its runs.
        arms: by name, the baselines first.
        rate: where the search for the learning rate begins.
        size: of a run of the standard budget. unit: what it counts.
        load: ``--data`` to what runs are trained on; the result has ``key`` and ``facts``.
        columns: what is shown of ``run.figures``, by group: a group is tuned and compared by its first column.
        span: two arms; tables then show how much of the way from the first's figure to the second's an arm goes.
    """

    question: str
    run: type[RecipeRun]
    arms: Mapping[str, Arm]
    rate: Axis
    size: int
    load: Callable[[Any], Any]
    columns: Mapping[str, Mapping[str, Column]]
    span: tuple[str, str] | None = None

    def score(self, group: str, results: Sequence[Result]) -> tuple[float, ...]:
        """By the group's first figure, then by the others; higher is better, and what diverged is last."""
        [result] = results
        signed = ((result[name], 1 if column.higher else -1) for name, column in self.columns[group].items())
        return tuple(float("-inf") if value is None else sign * value for value, sign in signed)
