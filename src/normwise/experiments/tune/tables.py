"""A study as plain data, as rows of tables, in sentences, and as a policy's file."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from normwise.experiments.framework.provenance import where
from normwise.experiments.tune import space as spaces
from normwise.experiments.tune.run import DONE, FAILED, GIVEN_UP, REFUSED

Results = Mapping[str, Any]
EDGE = 1.5
"""How near to the end of its range a number is at the edge: within this factor."""
WORTH = 0.01
"""A gain of 1% that is not significant is worth more seeds."""


# ---------------------------------------------------------------------------------------------------------- plain data


def candidate_of(numbers: spaces.Numbers, result: Results) -> dict[str, Any]:
    """What was tried. result: of one of its runs, which knows the model."""
    optimizer = spaces.CHOICES[numbers["optimizer"]]
    told = result["stepper"] or f"{optimizer.label} ({optimizer.about})"
    return {
        "label": spaces.label(numbers), "optimizer": told, "lr": spaces.rate(numbers), "policy_yaml": result["rules"],
        "code": result.get("code", ""),    # no run of an older study has it
    }  # fmt: skip


def trial_of(trial: Any) -> dict[str, Any]:
    """An Optuna trial that has ended."""
    reports = [list(pair) for pair in sorted(trial.intermediate_values.items())]
    return {
        "number": trial.number, **candidate_of(trial.params, trial.user_attrs["result"]), "numbers": dict(trial.params),
        "reports": reports, **{key: trial.user_attrs["result"][key] for key in SHOWN},
    }  # fmt: skip


SHOWN = ("state", "value", "reason", "step_ms", "size", "seconds")


def importances(study: Any, slots: Sequence[str], maximize: bool) -> dict[str, float]:
    """Which choices, and the rate, decided whether a trial was among the best, as shares (PED-ANOVA); none of too few trials."""
    import optuna

    sign = -1 if maximize else 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # it says that low values count as good, which they are here
            names = ["optimizer", "lr", *slots]
            found = optuna.importance.get_param_importances(study, params=names, target=lambda trial: sign * trial.values[0])
    except (ValueError, RuntimeError):
        return {}
    return {name: round(share, 4) for name, share in found.items() if math.isfinite(share) and share >= 0.005}


def front(results: Results) -> list[dict[str, Any]]:
    """The trials that no other one beats in all objectives; where there is one, in metric and step time."""
    sign = -1 if results["maximize"] else 1
    _, *others = results["objectives"] if len(results["objectives"]) > 1 else ("metric", "step_ms")
    done = [t for t in results["trials"] if t["state"] == DONE and None not in (t[one] for one in others)]
    costs = [(sign * t["value"], *(t[one] for one in others)) for t in done]

    def beaten(cost: tuple[float, ...]) -> bool:
        return any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs)

    return [t for t, cost in zip(done, costs, strict=True) if not beaten(cost)]


# --------------------------------------------------------------------------------------------------------------- words


def headline(results: Results) -> str:
    """The answer in a sentence."""
    answer, found = results["answer"], results["answer"]["verdict"]
    if answer["nothing"] < 0:
        said = f"{results['target']}: no answer, since {results['space']['optimizers'][0]} without rules failed at every rate"
        best = next(iter(results["finalists"]), None)
        return f"{said}." if best is None else f"{said}; of what trained, {named(best)} at rate {best['lr']:g} was best in the search."
    if found is None:
        return f"{results['target']}: no significant gain over nothing: on fresh seeds no leader was better than {answer['label']}."
    leader = next(one for one in results["finalists"] if one["number"] == answer["leader"])
    told = f"{named(leader)} at rate {leader['lr']:g}, {gain(results)}"
    if found["significant"]:
        return f"{results['target']}: {told}."
    return f"{results['target']}: no significant gain over nothing; the leader was {told}."


def named(one: Results) -> str:
    """A finalist; of an advised one the optimizer, too."""
    return f"{one['label']} ({one['optimizer']})" if one["label"] == spaces.ADVISED else str(one["label"])


def gain(results: Results, of: str = "answer") -> str:
    """The judgement in words: the gain, its interval, and over what. of: ``"answer"`` for the leader, ``"advice"``."""
    found, pairs = results[of]["verdict"], len(results[of]["verdict"]["gains"])
    own, others = found.get("failed", (0, 0))
    low, mean, high = (
        f"{sign:+d}"[0] + "inf" if value is None else f"{value:+.4g}"
        for value, sign in zip((found["interval"][0], found["mean"], found["interval"][1]), found.get("beyond", (-1, -1, -1)), strict=True)
    )
    share = "" if found["relative"] is None else f" ({100 * found['relative']:+.1f}%)"
    told = f"gain in {results['metric']} {mean}{share}, 95% interval {low} to {high} over {pairs} pairs of seeds"
    return f"{told}; its runs failed on {own} of the seeds, those of nothing on {others}" if own or others else told


def setting(results: Results) -> str:
    """Protocol, cost and machine in a sentence."""
    plan, states = results["protocol"], Counter(trial["state"] for trial in results["trials"])
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    return (
        f"{results['data'].get('name', results['target'])}; {len(results['trials'])} trials ({told}) of {plan['steps']} steps with one "
        f"seed, {plan['choosing']} fresh seeds to choose, {plan['judging']} to judge; sampler's seed {plan['seed']}; "
        f"{results['seconds'] / 3600:.2f} hours of training, budget {results['budget']}, protocol {plan['number']}; "
        f"{where(results['machine'])}."
    )


def advice(results: Results) -> str:
    """What the advice is worth as it stands, in a sentence; empty where it was not judged."""
    found, answer = results.get("advice"), results["answer"]
    if found is None:
        return ""
    told = f"nw.advise as it stands, {found['optimizer']}: {gain(results, 'advice')}"
    if found["number"] == answer["leader"]:
        return f"{told}; it is the leader."
    kept = share_kept(results)
    return f"{told}." if kept is None else f"{told}; {100 * kept:.0f}% of the leader's gain."


def share_kept(results: Results) -> float | None:
    """The advice's mean gain over the leader's; None where the leader's is not significant, or one of them is not known."""
    found, leader = results.get("advice"), results["answer"]["verdict"]
    if found is None or leader is None or not leader["significant"] or None in (leader["mean"], found["verdict"]["mean"]):
        return None
    return float(found["verdict"]["mean"] / leader["mean"])


def finalist_rows(results: Results) -> list[dict[str, str]]:
    """Nothing and the leaders."""
    return [
        {
            "finalist": named(one) + (", nothing" if one["nothing"] else ""), "rate": f"{one['lr']:g}",
            f"{results['metric']} in the search": f"{one['search']:.4g}", "on seeds to choose": _mean(one["choosing"]),
            "on seeds to judge": "-" if one["judging"] is None else _mean(one["judging"]),
        }
        for one in results["finalists"]
    ]  # fmt: skip


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    failed = f", {len(values) - len(known)} failed" if len(known) < len(values) else ""
    return f"{statistics.fmean(known):.4g}{failed}" if known else "failed"


def importance_rows(results: Results) -> list[dict[str, str]]:
    return [{"mattered": name, "share": f"{100 * share:.0f}%"} for name, share in list(results["importances"].items())[:8]]


def trial_rows(results: Results, most: int | None = None) -> list[dict[str, str]]:
    """The trials, the best first; those without a metric last, in their order."""
    sign = -1 if results["maximize"] else 1
    sizes = len({t["size"] for t in results["trials"] if t["size"] is not None}) > 1    # some rule has made zeros
    ranked = sorted(results["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0.0), t["number"]))
    return [
        {
            "trial": str(t["number"]), "candidate": t["label"], "rate": f"{t['lr']:g}",
            results["metric"]: t["state"] if t["value"] is None else f"{t['value']:.4g}",
            "step, ms": "-" if t["step_ms"] is None else f"{t['step_ms']:.2f}",
            **({"weights": "-" if t["size"] is None else f"{t['size']:,}"} if sizes else {}),
        }
        for t in ranked[:most] if most is None or t["state"] == DONE
    ]  # fmt: skip


def front_rows(results: Results) -> list[dict[str, str]]:
    """Where more than one objective was asked for: the trials that no other one beats."""
    if len(results["objectives"]) == 1:
        return []
    return [{"on the front": row.pop("trial"), **row} for row in trial_rows({**results, "trials": front(results)})]


def fresh_failures(finals: Sequence[Any], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Which finalist failed on fresh seeds, on how many of them, and why."""
    failed = Counter(
        (t.params["finalist"], t.user_attrs["result"]["reason"]) for t in finals if t.user_attrs["result"]["state"] in (FAILED, REFUSED)
    )
    return [{"number": n, "label": labels.get(n, str(n)), "seeds": k, "reason": reason} for (n, reason), k in failed.most_common()]


def remarks(results: Results) -> list[str]:
    """What failed and why, by reason."""
    reasons = Counter(t["reason"] for t in results["trials"] if t["state"] in (FAILED, REFUSED))
    numbers = {reason: [str(t["number"]) for t in results["trials"] if t["reason"] == reason] for reason in reasons}
    said = [f"Failed: trial{'s' * (count > 1)} {', '.join(numbers[reason])}: {reason}." for reason, count in reasons.most_common()]
    fresh = results.get("fresh_failures", [])    # results from before have none
    return said + [f"Failed on {one['seeds']} fresh seed{'s' * (one['seeds'] > 1)}: {one['label']}: {one['reason']}." for one in fresh]


def next_steps(results: Results) -> list[str]:
    """What to try next, as sentences."""
    said, answer, space = [], results["answer"], results["space"]
    found = answer["verdict"]
    if found is not None and not found["significant"] and (found["relative"] or 0) > WORTH:
        said.append(f"The leader's gain of {100 * found['relative']:.1f}% may be real: judge it by more pairs with --seeds "
                    f"{2 * len(found['gains'])}.")  # fmt: skip
    trials = {trial["number"]: trial for trial in results["trials"]}
    for number in dict.fromkeys((answer["leader"], answer["nothing"])):
        said += [f"{trials[number]['label']} is best at the end of its range: {edge}." for edge in _edges(trials.get(number), space)]
    names = [name for slot in space["slots"].values() for name in slot]
    silent = [n for n in names if not any(t["state"] in (DONE, GIVEN_UP) and n in t["numbers"].values() for t in trials.values())]
    if silent:
        said.append(f"No trial with {', '.join(silent)} got to a metric: name them with --only, or give more --trials.")
    if len(trials) < 30:
        said.append("Fewer than 30 trials leave much of the space unseen: the same command with more --trials goes on from here.")
    return [f"Next: {one}" for one in said]


def _edges(trial: Results | None, space: Results) -> list[str]:
    """Numbers of a trial that lie near an end which it may be good to move."""
    if trial is None:
        return []
    numbers, ends = trial["numbers"], {"lr": (space["low"], space["high"])}
    for slot in space["slots"]:
        name = numbers.get(slot, spaces.NONE)
        ends |= {f"{name} {axis}": tuple(span) for axis, span in space["axes"].get(name, {}).items()}
    said = []
    for name, (low, high) in ends.items():
        side = "low" if numbers[name] < low * EDGE else "high" if numbers[name] > high / EDGE else None
        if side and name == "lr":
            said.append(f"rate {trial['lr']:g}, the {side} end; give another --lr")
        elif side:
            said.append(f"{name} {numbers[name]:.3g}, of {low:g} to {high:g}")
    return said


def summary_rows(results: Results) -> list[dict[str, str]]:
    """The study as one row among others."""
    answer, plan = results["answer"], results["protocol"]
    leader = next((one for one in results["finalists"] if one["number"] == answer["leader"]), {"label": "-", "lr": 0.0})
    judged = answer["verdict"] is not None
    said = gain(results).removeprefix("gain in ") if judged else "none on the seeds to choose by"
    return [{
        "study": results["tune"], "data": str(results["data"].get("name", "-")),
        "trials": f"{len(results['trials'])} of {plan['steps']} steps", "leader": named(leader),
        "rate": f"{leader['lr']:g}", "gain over nothing": said,
        "significant": "yes" if judged and answer["verdict"]["significant"] else "no", **_advice_cells(results),
        "core-hours": f"{results['seconds'] / 3600:.2f}",
    }]  # fmt: skip


def _advice_cells(results: Results) -> dict[str, str]:
    """What the advice keeps of the leader's gain, or whether it is better or worse than nothing."""
    found = results.get("advice")
    if found is None:
        return {"advice as it stands": "-"}
    kept, mean, (_, high) = share_kept(results), found["verdict"]["mean"], found["verdict"]["interval"]
    worse = high < 0 if high is not None else found["verdict"].get("beyond", (0, 0, -1))[2] < 0
    sign = "better than nothing" if found["verdict"]["significant"] else "worse than nothing" if worse else "level"
    told = format(mean, "+.4g") if mean is not None else "failed" if found["verdict"].get("failed", (1, 0))[0] else "nothing failed"
    return {"advice as it stands": f"{told}, {sign}"
            + ("" if kept is None else f"; {100 * kept:.0f}% of the gain")}  # fmt: skip


def policy_file(results: Results) -> str:
    """The answer as YAML that ``nw.Policy.load`` reads; what is no policy stands in comments."""
    answer = results["answer"]
    if answer["nothing"] < 0:
        return f"# {headline(results)}\n[]\n"
    rate = f"{answer['lr']:g}" + (" times the advised one" if answer["label"] == spaces.ADVISED else "")
    code = answer.get("code", "").splitlines()    # no study from before has it
    lines = [headline(results), f"Optimizer: {answer['optimizer']}, learning rate {rate}{':' if code else '.'}",
             *(f"    {line}" for line in code),
             f"Trained for {results['protocol']['steps']} steps; {where(results['machine'])}."]  # fmt: skip
    return "".join(f"# {line}\n" for line in lines) + answer["policy_yaml"]
