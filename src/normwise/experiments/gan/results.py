"""The cells of a finished GAN study as plain data, and as rows of a table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normwise.experiments.compare import search
from normwise.experiments.compare.tables import median_reached, spread
from normwise.experiments.framework.timing import in_turn, seconds_each
from normwise.experiments.gan.cells import GanCell
from normwise.experiments.gan.strategies import STRATEGIES, axes
from normwise.experiments.gan.trial import JudgedData, Run, Training, batches
from normwise.experiments.tasks.models.dcgan import LOSSES

BASELINE = "nothing"
_BURST = 3


# ---------------------------------------------------------------------------------------------------------------- time


def step_times(runs: Sequence[Run], data: JudgedData, rounds: int) -> list[float]:
    """Milliseconds a step of each run: medians over ``rounds`` rounds, in which every run has a burst of steps in turn."""
    return [1e3 * statistics.median(seconds) for seconds in in_turn([_burst(run, data) for run in runs], rounds)]


def _burst(run: Run, data: JudgedData) -> Callable[[], float]:
    training, images = Training(run, data), batches(run, data)
    return lambda: seconds_each(training.step, itertools.islice(images, _BURST))


# --------------------------------------------------------------------------------------------------------------- cells


def cell_results(cell: GanCell, step_ms: float, baseline_ms: float) -> dict[str, Any]:
    """One cell. baseline_ms: of a step of "nothing" with the same loss; both take as many steps."""
    strategy, numbers = STRATEGIES[cell.strategy], cell.numbers()
    lr, finals = numbers.pop("lr"), [cell.finals[seed] for seed in sorted(cell.finals)]
    ends = [_end(final, len(final["curve"]["step"]) - 1) for final in finals]
    timely = [_end(final, mark_in_time(final, step_ms, baseline_ms)) for final in finals]
    return {
        "strategy": cell.strategy, "label": strategy.label, "about": strategy.about, "loss": cell.loss,
        "lr": lr, "strengths": numbers, "policy_yaml": policy_yaml(cell.strategy, numbers), **_searched(cell),
        "distance": median_reached([end["distance"] for end in ends]),
        "distance_at_equal_time": median_reached([end["distance"] for end in timely]),
        "precision": spread([end["precision"] for end in ends]), "recall": spread([end["recall"] for end in ends]),
        "collapsed": sum(end["collapsed"] for end in ends), "diverged": sum(final["diverged"] for final in finals),
        "step_ms": step_ms, "violations": sum(len(final["breaches"]) for final in finals),
        "breaches": sorted({breach for final in finals for breach in final["breaches"]}),
        "curves": [{"seed": seed, **cell.finals[seed]["curve"]} for seed in sorted(cell.finals)],
    }  # fmt: skip


_NOTHING_DRAWN = {"distance": None, "precision": 0.0, "recall": 0.0, "collapsed": True}


def _end(final: Mapping[str, Any], mark: int) -> Mapping[str, Any]:
    """What was measured at a mark; of a run that diverged, or that reached no mark in time, that it drew nothing."""
    if final["diverged"] or mark < 0:
        return _NOTHING_DRAWN
    return {name: final["curve"][name][mark] for name in _NOTHING_DRAWN}


def mark_in_time(final: Mapping[str, Any], step_ms: float, baseline_ms: float) -> int:
    """The last mark that a run with steps of ``step_ms`` reaches while the baseline takes its ``steps``; -1 where it reaches none."""
    horizon = final["steps"] * baseline_ms * (1 + 1e-9)
    return sum(step * step_ms <= horizon for step in final["curve"]["step"]) - 1


def policy_yaml(strategy: str, strengths: Mapping[str, float]) -> str:
    """The rules at these strengths as YAML; no text where there are none.

    Of the discriminator alone they are its policy, and load as it. Of both networks they are two policies, under the names of the networks:
    one after the other they would load as one policy, of one network.
    """
    import normwise as nw

    chosen = STRATEGIES[strategy]
    rules, others = chosen.rules(strengths), chosen.generator_rules(strengths)
    if not others:
        return f"# of the discriminator\n{nw.Policy(rules).to_yaml()}" if rules else ""
    return "".join(f"{side}:\n{nw.Policy(part).to_yaml()}" for side, part in (("discriminator", rules), ("generator", others)))


def _searched(cell: GanCell) -> dict[str, Any]:
    ends = [(axes(cell.strategy)[axis], sign) for axis, sign in search.edges(cell.scores)]
    return {
        "trials": sum(map(len, cell.trials.values())),
        "on_edge": [f"{axis.name} {'high' if sign > 0 else 'low'}" for axis, sign in ends if sign != axis.off],
        "fades_out": [axis.name for axis, sign in ends if sign == axis.off],
    }


# --------------------------------------------------------------------------------------------------------------- table


def rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A table's rows: each loss, its baseline first."""
    return [_row(cell) for cell in cells]


def _row(cell: Mapping[str, Any]) -> dict[str, str]:
    seeds = len(cell["distance"]["values"])
    return {
        "loss": LOSSES[cell["loss"]].label, "strategy": cell["label"],
        "Fréchet, equal steps": _median(cell["distance"]), "Fréchet, equal time": _median(cell["distance_at_equal_time"]),
        "precision": f"{cell['precision']['mean']:.2f}", "recall": f"{cell['recall']['mean']:.2f}",
        "collapsed": f"{cell['collapsed']} of {seeds}", "diverged": f"{cell['diverged']} of {seeds}",
        "bounds broken": "none" if cell["violations"] == 0 else str(cell["violations"]), "step, ms": f"{cell['step_ms']:.1f}",
        "rate": f"{cell['lr']:g}", "strength": ", ".join(f"{name} {value:g}" for name, value in cell["strengths"].items()) or "-",
    }  # fmt: skip


def _median(distance: Mapping[str, Any]) -> str:
    """The median over seeds, and the lowest to the highest; a seed without a distance is worse than every other."""
    known = [value for value in distance["values"] if value is not None]
    if distance["median"] is None:
        return "diverged"
    worst = "diverged" if len(known) < len(distance["values"]) else f"{max(known):.3f}"
    return f"{distance['median']:.3f} ({min(known):.3f} to {worst})"
