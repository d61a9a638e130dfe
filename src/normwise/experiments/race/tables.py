"""The results of races as words: the target in a sentence, rows for a terminal, tables for docs/results.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from normwise.experiments.framework.figures import NO_DIFFERENCE, differ, geometric_mean, ratio_interval
from normwise.experiments.framework.printing import markdown
from normwise.experiments.framework.provenance import where
from normwise.experiments.race.protocol import PROTOCOLS, RATIO
from normwise.experiments.tasks.load import HELD_OUT

RACED = ("cnn", "resnet", "lstm", "gpt")
"""The tasks of the published races, in the order of their tables."""
TWELVE = ("cnn", "resnet", "vit", "tabular", "lstm", "gpt", "plain", "resnet_gn", "mixer", "unet", "gru", "decoder")
"""The tasks of protocol 2: six for development, then the partner of each, which is held out."""
Results = Mapping[str, Any]
Row = dict[str, str]


def title(results: Results) -> str:
    """The target in one sentence."""
    if results["target"] is None:
        return f"{results['race']}: the baselines are still being tuned, so there is no target yet."
    horizon, seeds = results["horizon"], results["protocol"]["seeds"]
    end = "saturated" if horizon["saturated"] else "not saturated: the budget ends it there"
    return (
        f"{results['race']}: the target is a validation {results['metric']} of {results['target']:.4f}, the median over {seeds} seeds of "
        f"{results['leader']} at {horizon['samples']} samples ({horizon['steps']} steps of the task's batch; {end})."
    )


def verdict(results: Results) -> str:
    """Who is soonest, and whether that may be said: only of those whose intervals do not overlap. Empty where nothing can be said yet."""
    racing = [line for line in _ranked(results) if not line["sets_target"] and line["share"] is not None]
    if results["target"] is None or not results["contenders"]:
        return ""
    if not racing:
        return f"Nobody reaches what {results['leader']} reaches."
    first, *others = racing
    low, high = interval = _interval(first)
    said = f"{first['label']} needs {share(first)} of the samples that {results['leader']} needs"
    if low <= 1.0 <= high:
        return f"{said}: {NO_DIFFERENCE}, since the interval holds 1."
    paired = results["protocol"]["number"] > 1
    alike = [line["label"] for line in others if not (differ_in_pairs(first, line) if paired else differ(interval, _interval(line)))]
    if not alike:
        return f"{said}, the fewest."
    why = "the interval of the ratio holds 1" if paired else "their intervals overlap"
    return f"{said}, the fewest. {NO_DIFFERENCE.capitalize()} between it and {', '.join(alike)}: {why}."


def differ_in_pairs(one: Results, other: Results) -> bool:
    """Whether the ratio of two median shares, the seeds drawn once for both, has an interval without 1. A seed that missed counts as 10⁹
    horizons: the ratio of two infinities would be no number."""
    above, below = ([1e9 if share is None else share for share in line["shares"]] for line in (one, other))
    low, high = ratio_interval(above, below)
    return high < 1.0 or low > 1.0


def breaches(results: Results) -> list[str]:
    """Every bound that a reported run was found to break, once."""
    return sorted({breach for line in results["contenders"] for end in line["ends"] for breach in end["breaches"]})


def _interval(line: Results) -> tuple[float, float]:
    return tuple(math.inf if end is None else end for end in (line["low"], line["high"]))    # type: ignore[return-value]


def rows(results: Results) -> list[Row]:
    """A row a contender, the fastest first, for a terminal."""
    return [_cells(line, results) | {"rate": f"{line['tuned']['numbers']['lr']:g}{_edge(line)}"} for line in _ranked(results)]


def ranked(results: Mapping[str, Results]) -> list[str]:
    """Every contender that has a line in some race: the most races, then the smallest mean share first; baselines last."""
    lines: dict[str, list[Results]] = {}
    for line in (line for one in results.values() for line in one["contenders"]):
        lines.setdefault(line["name"], []).append(line)

    def place(name: str) -> tuple[bool, int, int, float]:
        shares = [line["share"] for line in lines[name] if line["share"] is not None]
        mean = geometric_mean(shares) if shares else math.inf
        return bool(lines[name][0]["baseline"]), len(lines[name]) - len(shares), -len(shares), mean

    return sorted(lines, key=place)


# -------------------------------------------------------------------------------------------------------- docs/results.md


def page(results: Results) -> str:
    """One task: the target, what every contender needed for it and gives beside that, its tuned numbers, and where it was measured."""
    parts = [title(results)]
    if results["contenders"]:
        full = []
        for line in _ranked(results):
            zeros, broken = _mean([end["sparsity"] for end in line["ends"]]), sum(len(end["breaches"]) for end in line["ends"])
            beside = {"zero weights, %": number(None if zeros is None else 100 * zeros, 1), "bounds broken": str(broken)}
            full.append(_cells(line, results) | beside | (_tuning(line) if results["protocol"]["number"] > 1 else {}))
        (_, before), (samples, after) = results["horizon"]["results"][-2:]
        parts += [
            markdown(full),
            f"One more doubling of the horizon, to {samples} samples, took untuned AdamW from {number(before, 4)} to {number(after, 4)}.",
            "Tuned numbers, to use as they are:", markdown(numbers(results)),
        ]  # fmt: skip
    if results["unfinished"]:
        parts.append(f"Not finished: {', '.join(results['unfinished'])}.")
    protocol, data = results["protocol"], f" on {results['data']}" if results["data"] else ""
    reported = PROTOCOLS[protocol["number"]].reported(protocol["seeds"])
    parts.append(
        f"Task `{results['task']}`{data}, protocol {protocol['number']}, budget {results['budget']}: {protocol['trials']} trials a "
        f"contender, reported seeds {reported[0]} to {reported[-1]}; {where(results['machine'])}."
    )
    return "\n\n".join(parts)


def summary(results: Mapping[str, Results]) -> str:
    """All tasks: contender × task, shares of samples / of seconds, and their geometric means over all."""
    known = {task: results[task] for task in RACED if task in results}
    table = []
    for name in ranked(known):
        found = {task: line for task, one in known.items() for line in one["contenders"] if line["name"] == name}
        row = {"contender": next(iter(found.values()))["label"], **dict.fromkeys(RACED, "-")}
        for task, line in found.items():
            row[task] = _shares(line)
        for of, key in (("samples", "share"), ("seconds", "seconds_share")):
            shares = [line[key] for line in found.values() if line[key] is not None]
            row[f"mean, {of}"] = f"{geometric_mean(shares):.2f}" if len(shares) == len(RACED) else "-"
        table.append(row)
    said = (
        "Share of the baseline's training that each method needs for the baseline's result: of its samples / of its seconds. Below 1 is "
        "sooner; *missed*: most seeds did not get there; -: not measured, or a mean over fewer than all four tasks."
    )
    missing = [f"{task} (no runs)" for task in RACED if task not in results]
    missing += [f"{task} ({', '.join(one['unfinished'])})" for task, one in known.items() if one["unfinished"]]
    end = f"Not finished: {'; '.join(missing)}." if missing else "All four races are finished."
    return "\n\n".join([said, *([markdown(table)] if table else []), end])


def hits(results: Mapping[str, Results]) -> str:
    """Every contender over the tasks of protocol 2: on how many it reaches the target within the baseline's samples, and its geometric
    mean shares of samples / of seconds where it does on all. What is not tuned comes first, then the most hits, then the smallest mean.
    """
    table: list[tuple[Any, Row]] = []
    for name in ranked(results):
        found = {task: line for task, one in results.items() for line in one["contenders"] if line["name"] == name}
        if all(line["sets_target"] for line in found.values()):
            continue
        first, trials = next(iter(found.values())), max(line["tuned"]["trials"] for line in found.values())
        row = {"contender": first["label"], "trials": str(trials)}
        for group, held_out in (("all", (False, True)), ("development", (False,)), ("held out", (True,))):
            row[group] = _hits([line for task, line in found.items() if (task in HELD_OUT) in held_out])
        shares = [line["share"] for line in found.values()]
        missed = sum(share is None for share in shares) / len(shares)
        table.append(((trials > 1, missed, geometric_mean(shares) if not missed else 0.0), row))
    return markdown([row for _, row in sorted(table, key=lambda pair: pair[0])]) if table else "No task is raced yet."


def _hits(lines: Sequence[Results]) -> str:
    """``5 of 6``; ``6 of 6: 0.45 / 0.50`` with the means where all are hits."""
    shares = [line["share"] for line in lines if line["share"] is not None]
    seconds = [line["seconds_share"] for line in lines if line["seconds_share"] is not None]
    if not lines:
        return "-"
    said = f"{len(shares)} of {len(lines)}"
    if len(shares) < len(lines):
        return said
    return f"{said}: {geometric_mean(shares):.2f} / {number(geometric_mean(seconds) if len(seconds) == len(lines) else None)}"


def over_hits(results: Mapping[str, Results], name: str = "auto") -> str:
    """Where a contender reaches the target on some tasks and not on all, its mean shares over those; empty otherwise."""
    lines = [line for one in results.values() for line in one["contenders"] if line["name"] == name]
    there = [line for line in lines if line["share"] is not None]
    if len(there) in (0, len(lines)):
        return ""
    samples, seconds = (geometric_mean([line[key] for line in there]) for key in ("share", "seconds_share"))
    name = f"`{_called(there[0])}` over its {len(there)} hits"
    return f"The geometric mean of {name} is {samples:.2f} of the samples and {seconds:.2f} of the seconds."


def _called(line: Results) -> str:
    """A contender's label, with a word where it was tuned."""
    return f"{line['label']}, tuned" if line["tuned"]["trials"] > 1 else str(line["label"])


def by_task(results: Mapping[str, Results]) -> str:
    """Task × contender, as ``front`` has it, and what is not finished."""
    missing = [f"{task} (no runs)" for task in TWELVE if task not in results]
    missing += [f"{task} ({', '.join(one['unfinished'])})" for task, one in results.items() if one["unfinished"]]
    end = f"Not finished: {'; '.join(missing)}." if missing else "All twelve races are finished."
    return "\n\n".join(filter(None, [front(results), end]))


def front(results: Mapping[str, Results], everywhere: bool = False) -> str:
    """Task × contender, shares of samples / of seconds, and the hits of each; empty where nothing is raced. everywhere: without those that
    were not raced on all of these tasks, which otherwise come last. What is not tuned comes first."""
    every = [line for one in results.values() for line in one["contenders"]]
    raced, tuned = Counter(line["name"] for line in every), {line["name"] for line in every if line["tuned"]["trials"] > 1}
    most = max(raced.values(), default=0)
    names = sorted(ranked(results), key=lambda name: (raced[name] < most, name in tuned))
    names, table = [name for name in names if raced[name] == most or not everywhere], []
    labels = {line["name"]: _called(line) for one in results.values() for line in one["contenders"]}
    hit: dict[str, list[bool]] = {name: [] for name in names}
    for task in TWELVE:
        lines = {line["name"]: line for line in results[task]["contenders"]} if task in results else {}
        shares = {labels[name]: _shares(lines[name]) if name in lines else "-" for name in names}
        table += [{"task": f"`{task}`{' (held out)' * (task in HELD_OUT)}", **shares}] if lines else []
        for name in filter(lines.__contains__, names):
            hit[name].append(lines[name]["share"] is not None)
    if not table:
        return ""
    return markdown([*table, {"task": "hits", **{labels[name]: f"{sum(hit[name])} of {len(hit[name])}" for name in names}}])


def elsewhere(results: Sequence[Results], races: Mapping[str, Results]) -> str:
    """What ``auto`` needs at another horizon, width or batch, beside what it needs in the race of the same task, and how many rungs of the
    ladder lie between the two.

    Args:
        results: of races of a half network, of one with a horizon of its own, or of one in which ``auto`` takes another batch.
        races: the ordinary ones, by task.
    """
    lines = [(one, line) for one in results for line in one["contenders"] if line["name"] in ("auto", *_BATCHES)]
    table = [_changed(one, line, races.get(one["race"])) for one, line in lines if _what(one, line)]
    return markdown(table) if table else "Nothing is raced yet."


def _changed(one: Results, line: Results, race: Results | None) -> Row:
    home = next((o for o in race["contenders"] if o["name"] == "auto"), None) if race is not None else None
    return {
        "task": f"`{one['race']}`{' (held out)' * (one['race'] in HELD_OUT)}", "what is other": _what(one, line),
        "target": f"{one['leader']}, {one['target']:.4f}", "share of samples": share(line),
        "of seconds": number(line["seconds_share"]), "in the race": "-" if home is None else share(home),
        "rungs apart": "-" if home is None else _rungs(line["share"], home["share"]),
    }  # fmt: skip


def _what(one: Results, line: Results) -> str:
    """What is not as in the ordinary race; "" where all is."""
    found = [f"horizon × {one['scale']:g}"] * (one["scale"] != 1.0) + ["half the width"] * ("half" in one["task"].split("-"))
    return ", ".join([*found, *filter(None, [_BATCHES.get(line["name"])])])


_BATCHES = {"auto_half_batch": "half the batch", "auto_double_batch": "twice the batch"}


def _rungs(share: float | None, home: float | None) -> str:
    """How far apart two shares are, with the sign of what is later; "-" where one of them missed."""
    if share is None or home is None:
        return "-"
    apart = round(math.log(home / share) / math.log(RATIO), 1)
    return f"{apart:+.1f}" if apart else "0"


def _shares(line: Results) -> str:
    return "missed" if line["share"] is None else f"{line['share']:.2f} / {number(line['seconds_share'])}"


def numbers(results: Results) -> list[Row]:
    return [
        {
            "contender": line["label"], "trials": str(line["tuned"]["trials"]),
            f"validation {results['metric']}, tuned": number(line["tuned"]["result"], 4),
            "numbers": ", ".join(
                f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in line["tuned"]["numbers"].items()
            ) + _edge(line),
            "share of each seed": " ".join("missed" if s is None else f"{s:.2f}" for s in line["shares"]),
        }
        for line in _ranked(results)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ cells


def _ranked(results: Results) -> list[Results]:
    """The fastest first, those that missed last."""
    return sorted(results["contenders"], key=lambda c: math.inf if c["share"] is None else c["share"])


def _cells(c: Results, results: Results) -> Row:
    metric = results["metric"]
    ends = [end["test"][metric] for end in c["ends"] if end["test"][metric] is not None]
    gaps = [end["test"]["loss"] - end["train"]["loss"] for end in c["ends"] if None not in (end["test"]["loss"], end["train"]["loss"])]
    return {
        "contender": c["label"], "share of samples": share(c), "of seconds": number(c["seconds_share"]),
        "missed": f"{c['missed']} of {len(c['shares'])}", f"test {metric} there": number(_mean(ends), 3),
        "gap in loss": number(_mean(gaps), 2),
        "step, ms": number(c["step_ms"], 0 if (c["step_ms"] or 0) >= 10 else 2), "batch": str(c["batch"]),
        "spikes": str(sum(end["spikes"] for end in c["ends"])),
        "result at rate × 0.1, 0.3, 1, 3, 10": " ".join(number(r["result"], 2) for r in c["robustness"]) or "-",
    }  # fmt: skip


def _tuning(c: Results) -> Row:
    """What the tuning cost, and what it came to for the seconds of AdamW's."""
    return {"tuning, × AdamW's seconds": number(c["tuning_cost"]), "best for AdamW's": number(c["within_cost"], 4)}


def _edge(c: Results) -> str:
    return " (rate at the edge of those tried)" if c["tuned"]["on_edge"] else ""


def share(c: Results) -> str:
    """The median over seeds with its interval, whose upper end may be that the target is missed. The baseline that set the target has
    no interval: it is what the others are measured in."""
    if c["sets_target"]:
        return "1 (sets the target)"
    if c["share"] is None:
        return "missed" if c["low"] is None else f"missed [{c['low']:.2f}, missed]"
    return f"{c['share']:.2f} [{number(c['low'])}, {'missed' if c['high'] is None else number(c['high'])}]"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
