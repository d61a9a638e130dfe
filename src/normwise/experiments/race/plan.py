"""What a race does next, as generators: each yields runs, gets their results, and returns what it found.

Finished runs alone decide what comes next, so that neither an interruption nor the number of workers changes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from normwise.experiments.framework.driver import Plan
from normwise.experiments.framework.lattice import best, compass, edges, search
from normwise.experiments.framework.store import Result
from normwise.experiments.framework.study import TUNING_SEED
from normwise.experiments.race.protocol import LADDER_SEED, ROBUST_AT, RUNGS, SATURATED, Protocol, rung
from normwise.experiments.race.run import RaceRun

# contender, numbers, samples, seed, full -> run.
Make = Callable[[str, dict[str, Any], int, int, bool], RaceRun]


@dataclass(frozen=True)
class Rules:
    """make: see ``Make``. accuracy: whether higher results are better. horizon: H in samples. protocol: whose contenders and reported seeds
    they are. target: the result to reach."""

    make: Make
    accuracy: bool
    horizon: int
    protocol: Protocol
    target: float = 0.0

    def score(self, result: Result) -> float:
        """Higher is better, a run that diverged the lowest."""
        if result["diverged"] or result["result"] is None:
            return float("-inf")
        return float(result["result"] if self.accuracy else -result["result"])

    def reached(self, result: Result) -> bool:
        return self.score(result) >= (self.target if self.accuracy else -self.target)


def doubling(rules: Rules, middle: dict[str, Any], samples: int, doublings: int) -> Plan:
    """(samples, result) of the horizons tried: the last but one is H, the last shows what one more doubling would have given."""
    seen: list[tuple[int, float]] = []
    for k in range(doublings + 2):
        [result] = yield [rules.make("adamw", middle, samples << k, TUNING_SEED, False)]
        seen.append((samples << k, rules.score(result) * (1 if rules.accuracy else -1)))
        if k and not pays(seen[-2][1], seen[-1][1], rules.accuracy):
            break
    return seen


def pays(before: float, after: float, accuracy: bool) -> bool:
    """Whether a doubling took more than 2% of the loss, or of the error, away."""
    old, new = (1 - before, 1 - after) if accuracy else (before, after)
    return new < (1 - SATURATED) * old


def tune(rules: Rules, name: str, samples: int, trials: int) -> Plan:
    """The tuned numbers, with the trials that led there."""
    contender = rules.protocol.contenders[name]
    scores, results = yield from search(
        compass, contender.axes, trials, lambda numbers: rules.make(name, numbers, samples, TUNING_SEED, False), rules.score
    )
    chosen = best(scores)
    at_end = len(scores) > 1 and any(axis == 0 for axis, _ in edges(scores, chosen))    # of a single trial nothing is said
    return {
        "numbers": contender.numbers(chosen), "on_edge": at_end, "trials": len(scores), "result": results[chosen]["result"],
        "tried": [{**contender.numbers(p), "result": r["result"]} for p, r in results.items()],
    }  # fmt: skip


def reported(rules: Rules, name: str, numbers: dict[str, Any], samples: int, seeds: int) -> Plan:
    """Full runs with every reported seed at one horizon."""
    results = yield [rules.make(name, numbers, samples, seed, True) for seed in rules.protocol.reported(seeds)]
    return results


def bracket(rules: Rules, name: str, numbers: dict[str, Any]) -> Plan:
    """The last rung that reaches the target with a development seed, -1 where the first does not."""
    low, high = -1, RUNGS
    while high - low > 1:
        middle = (low + high) // 2
        [result] = yield [rules.make(name, numbers, rung(rules.horizon, middle), LADDER_SEED, False)]
        low, high = (middle, high) if rules.reached(result) else (low, middle)
    return low


def ladder(rules: Rules, name: str, numbers: dict[str, Any], start: int, seed: int) -> Plan:
    """The last rung that reaches the target with this seed, None where it missed at H; and all that was tried."""
    tried: dict[int, Result] = {}
    k = min(max(start, 0), RUNGS - 1)
    while k not in tried and 0 <= k < RUNGS:
        [tried[k]] = yield [rules.make(name, numbers, rung(rules.horizon, k), seed, True)]
        k = k + 1 if rules.reached(tried[k]) else k - 1
    passed = [k for k, result in tried.items() if rules.reached(result)]
    return {"seed": seed, "rung": max(passed, default=None), "tried": {k: tried[k] for k in sorted(tried)}}


def robustness(rules: Rules, name: str, numbers: dict[str, Any], samples: int) -> Plan:
    """The results over two decades of the learning rate around the tuned one, whose trial is among them."""
    rates = [float(f"{factor * float(numbers['lr']):.3g}") for factor in (*ROBUST_AT[:2], 1.0, *ROBUST_AT[2:])]
    results = yield [rules.make(name, {**numbers, "lr": rate}, samples, TUNING_SEED, False) for rate in rates]
    return [{"lr": rate, "result": result["result"]} for rate, result in zip(rates, results, strict=True)]
