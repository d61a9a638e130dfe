"""The cells of a GAN study as plain data, as rows of a table, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import normwise as nw
from normwise.experiments.catalog.gan import GAN_STRATEGIES
from normwise.experiments.catalog.parts import BASELINE
from normwise.experiments.cells import Cell, strengths_of
from normwise.experiments.cells import remarks as cell_remarks
from normwise.experiments.framework.figures import NO_DIFFERENCE, differ, interval, median_reached, spread
from normwise.experiments.framework.provenance import where
from normwise.experiments.tasks.models.dcgan import LOSSES

Results = Mapping[str, Any]


def cell_results(cell: Cell, step_ms: float, baseline_ms: float) -> dict[str, Any]:
    """One cell. baseline_ms: of a step of "nothing" with the same loss; both take as many steps."""
    strategy, finals = GAN_STRATEGIES[cell.strategy], cell.finals
    ends = [_end(final, len(final["curve"]["step"]) - 1) for final in finals]
    timely = [_end(final, mark_in_time(final, step_ms, baseline_ms)) for final in finals]
    return {
        **cell.told(strategy.label, strategy.about, policy_yaml(cell.strategy, strengths_of(cell.numbers))), "loss": cell.group,
        "distance": median_reached([end["distance"] for end in ends]),
        "distance_at_equal_time": median_reached([end["distance"] for end in timely]),
        "precision": spread([end["precision"] for end in ends]), "recall": spread([end["recall"] for end in ends]),
        "collapsed": sum(end["collapsed"] for end in ends), "diverged": sum(final["diverged"] for final in finals),
        "step_ms": step_ms,
    }  # fmt: skip


_NOTHING_DRAWN = {"distance": None, "precision": 0.0, "recall": 0.0, "collapsed": True}


def _end(final: Results, mark: int) -> Results:
    """What was measured at a mark; of a run that diverged, or that reached no mark in time, that it drew nothing."""
    if final["diverged"] or mark < 0:
        return _NOTHING_DRAWN
    return {name: final["curve"][name][mark] for name in _NOTHING_DRAWN}


def mark_in_time(final: Results, step_ms: float, baseline_ms: float) -> int:
    """The last mark that a run with steps of ``step_ms`` reaches while the baseline takes its ``steps``; -1 where it reaches none."""
    horizon = final["steps"] * baseline_ms * (1 + 1e-9)
    return sum(step * step_ms <= horizon for step in final["curve"]["step"]) - 1


def policy_yaml(strategy: str, strengths: Mapping[str, float]) -> str:
    """The rules at these strengths as YAML; no text where there are none.

    Of the discriminator alone they are its policy, and load as it. Of both networks they are two policies, under the names of the networks:
    one after the other they would load as one policy, of one network.
    """
    chosen = GAN_STRATEGIES[strategy]
    rules, others = chosen.rules(strengths), chosen.generator_rules(strengths)
    if not others:
        return f"# of the discriminator\n{nw.Policy(rules).to_yaml()}" if rules else ""
    return "".join(f"{side}:\n{nw.Policy(part).to_yaml()}" for side, part in (("discriminator", rules), ("generator", others)))


# --------------------------------------------------------------------------------------------------------------- table


def rank(cell: Results) -> tuple[int, float]:
    """By loss, the smallest distance at equal time first: a strategy has to pay for its steps."""
    middle = cell["distance_at_equal_time"]["median"]
    return list(LOSSES).index(cell["loss"]), math.inf if middle is None else middle


def verdict(cells: Sequence[Results]) -> list[str]:
    """A sentence a loss: the best strategy against the baseline, and whether the difference may be claimed."""
    said = []
    for loss in dict.fromkeys(cell["loss"] for cell in cells):
        group = sorted((cell for cell in cells if cell["loss"] == loss), key=rank)
        base = next(cell for cell in group if cell["strategy"] == BASELINE)
        first = next((cell for cell in group if cell is not base), base)
        about = f"{LOSSES[loss].label}: at equal time {first['label']} has the Fréchet distance"
        if first is base or first["distance_at_equal_time"]["median"] is None:
            continue
        told = f"{about} {_median(first['distance_at_equal_time'])}, {base['label']} {_median(base['distance_at_equal_time'])}"
        sure = differ(*(interval([math.inf if v is None else v for v in c["distance_at_equal_time"]["values"]]) for c in (first, base)))
        said.append(f"{told}." if sure else f"{told}: {NO_DIFFERENCE}, since the intervals of the medians overlap.")
    return said


def setting(found: Results) -> str:
    """Data, judge, protocol, cost and machine in a few sentences."""
    data, judge, protocol = (found[name] for name in ("data", "judge", "protocol"))
    return (
        f"{data['name']}: {data['train']} images to train, {data['validation']} to choose on, {data['test']} to test. The judging "
        f"classifier is right on {100 * judge['accuracy']:.1f}% of the test images; the Fréchet distance between real validation and real "
        f"test images is {judge['floor']:.4f}, that of perfect images of the best single class {judge['one_class']:.3f}. Each cell: "
        f"{protocol['trials']} + {protocol['again']} trials, {protocol['seeds']} seeds (median, lowest to highest; means), "
        f"{protocol['steps']} steps of {protocol['batch']} images ({protocol['samples']} samples). {found['cost']:.2f} core-hours, budget "
        f"{found['budget']}; {where(found['machine'])}."
    )


def remarks(cells: Sequence[Results]) -> list[str]:
    """What to know about single cells."""
    broken = [f"{cell['label']} with the loss {cell['loss']} ({', '.join(cell['breaches'])})" for cell in cells if cell["breaches"]]
    return cell_remarks(cells, lambda cell: f"{cell['label']} with the loss {cell['loss']}", **{"Bounds broken": broken})


def rows(cells: Sequence[Results]) -> list[dict[str, str]]:
    """A table's rows, in the order of the cells."""
    return [
        {
            "loss": LOSSES[cell["loss"]].label, "strategy": cell["label"],
            "Fréchet, equal steps": _median(cell["distance"]), "Fréchet, equal time": _median(cell["distance_at_equal_time"]),
            "precision": f"{cell['precision']['mean']:.2f}", "recall": f"{cell['recall']['mean']:.2f}",
            "collapsed": f"{cell['collapsed']} of {(seeds := len(cell['distance']['values']))}",
            "diverged": f"{cell['diverged']} of {seeds}", "bounds broken": str(cell["violations"] or "none"),
            "step, ms": f"{cell['step_ms']:.1f}", "rate": f"{cell['lr']:g}",
            "strength": ", ".join(f"{name} {value:g}" for name, value in cell["strengths"].items()) or "-",
        }
        for cell in cells
    ]  # fmt: skip


def _median(distance: Results) -> str:
    """The median over seeds, and the lowest to the highest; a seed without a distance is worse than every other."""
    known = [value for value in distance["values"] if value is not None]
    if distance["median"] is None:
        return "diverged"
    worst = "diverged" if len(known) < len(distance["values"]) else f"{max(known):.3f}"
    return f"{distance['median']:.3f} ({min(known):.3f} to {worst})"
