"""Writes the tables and the picture of README.md and docs/ from the committed results: ``python docs/make.py``; ``--check`` only compares.

Raw results lie in ``docs/results/``: ``cnn-digits.json`` and ``cnn-mnist.json`` by ``normwise compare cnn --json``, each of their single
runs in ``*.runs.jsonl``; ``race-TASK.runs.jsonl``, of protocol 1, and
``race-2/TASK.runs.jsonl`` by ``normwise race TASK --state``, also of a race under way, ``race-2/elsewhere/*.runs.jsonl`` by the same with
``--horizon``, ``--half`` or another batch; ``other-TASK.runs.jsonl`` by
``normwise race TASK --only auto --state``, on bundled data; ``gan.json`` by
``normwise gan --json``, ``recipe-NAME.json`` by ``normwise recipe NAME --json``, ``bench-NAME.json`` by ``normwise bench NAME --json``;
``tune-NAME.json`` by ``normwise tune TARGET --json``;
``lora-rows.jsonl`` by ``docs/lora_rows.py``, ``probe-share.jsonl`` by ``docs/probe_share.py``. A table stands between ``<!-- NAME -->``
and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from normwise.experiments.bench import runner
from normwise.experiments.catalog.optimizers import TORCH
from normwise.experiments.compare.tables import of_seeds, reached
from normwise.experiments.framework.printing import markdown
from normwise.experiments.framework.provenance import where
from normwise.experiments.prune.tables import networks, trial
from normwise.experiments.race import tables as race_tables
from normwise.experiments.race.study import replay
from normwise.experiments.recipes import tables as recipe_tables
from normwise.experiments.tasks.load import HELD_OUT
from normwise.experiments.tune import space as tune_space
from normwise.experiments.tune import tables as tune_tables
from normwise.experiments.tune.study import BUDGETS
from normwise.policy import listing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import gallery  # noqa: E402 - beside this file

RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {name: one.label for name, one in TORCH.items()}
Cell = dict[str, Any]


def load(name: str) -> dict[str, Any] | None:
    """Results by name: a race from its raw runs, ``race`` for all of them by task; None where there is nothing yet."""
    if name == "race":
        found = {task: race for task in race_tables.RACED if (race := load(f"race-{task}")) is not None}
        return found or None
    if name == "race 2":
        return {task: race for task in race_tables.TWELVE if (race := raced(RESULTS / "race-2" / f"{task}.runs.jsonl")) is not None} or None
    if name == "elsewhere":
        found = [raced(path) for path in sorted((RESULTS / "race-2" / "elsewhere").glob("*.runs.jsonl"))]
        return {"elsewhere": found, "races": load("race 2") or {}} if found else None
    if name.startswith(("race-", "other-")):
        return raced(RESULTS / f"{name}.runs.jsonl")
    if name == "tried":
        return experiments(RESULTS / "tried.runs.jsonl")
    if name == "tune":
        found = sorted(RESULTS.glob("tune-*.json"))
        return {"studies": [json.loads(path.read_text()) for path in found]} if found else None
    if name in ("lora-rows", "probe-share"):
        return {"runs": lines(RESULTS / f"{name}.jsonl")}
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def raced(runs: Path) -> dict[str, Any] | None:
    return {**replay(runs), "core_hours": sum(r["result"].get("seconds", 0) for r in lines(runs)) / 3600} if runs.exists() else None


def lines(runs: Path) -> list[dict[str, Any]]:
    """The finished runs of a file."""
    return [json.loads(line) for line in runs.read_text().splitlines() if line.strip()]


def experiments(runs: Path) -> dict[str, Any] | None:
    """What ``docs/tried.py`` kept."""
    if not runs.exists():
        return None
    return {"runs": [{**r["settings"], **r["result"]} for r in lines(runs)]}


def tried(results: dict[str, Any]) -> str:
    """One table a task, share of its horizon and precision, best first, with every seed's result."""
    from tried import ON_TUNED, VARIANTS  # beside this file

    label = {name: what[0] for name, what in [*VARIANTS.items(), *ON_TUNED.items()]}

    tables = []
    found: dict[tuple[str, float, str], dict[str, dict[int, float | None]]] = {}
    for run in results["runs"]:
        key = run["task"], run["share"], run["key"].split("-")[-3]    # bf16 and fp32 do not mix
        found.setdefault(key, {}).setdefault(run["variant"], {})[run["seed"]] = run["result"]
    for (task, share, precision), runs in found.items():
        sign = -1 if task in ("cnn", "resnet") else 1    # accuracy: higher is better
        mean = {name: statistics.fmean(sign * (9.0 if v is None else v) for v in of.values()) for name, of in runs.items()}
        lines = [f"| `{task}`, {share:.2f} H, {precision} | mean | by seed, from 2000 |", "|---|---|---|"]
        for name in sorted(runs, key=lambda name: mean[name]):
            each = " ".join("diverged" if v is None else f"{v:.4f}" for _, v in sorted(runs[name].items()))
            lines.append(f"| {label[name]} | {sign * mean[name]:.4f} | {each} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def one_race(results: dict[str, Any], drawn: bool = True) -> str:
    """One task's tables, with the picture of its ladder, if it is drawn and there is something to draw."""
    task = results["race"]
    seen = f"![{task}: validation result against horizon](images/race-{task}.svg)\n\n" if drawn and results["contenders"] else ""
    return f"{seen}{race_tables.page(results)} {results['core_hours']:.1f} core-hours of training so far, measured beside other work."


def of_protocol_2(results: dict[str, dict[str, Any]]) -> str:
    """The table of hits, shares by task, how many core-hours."""
    hours = sum(one["core_hours"] for one in results.values())
    drawn = any(one["contenders"] for one in results.values())
    seen = "![shares of all contenders by task](images/race-2.svg)\n\n" if drawn else ""
    said = f"{race_tables.by_task(results)} {_means(results)} {hours:.1f} core-hours of training so far."
    return f"{race_tables.hits(results)}\n\n{seen}{said}"


def _means(results: dict[str, dict[str, Any]]) -> str:
    """Of ``auto``, and of the family of ours that was tuned."""
    return " ".join(filter(None, (race_tables.over_hits(results, name) for name in ("auto", "ridge_roles"))))


def front_of_protocol_2(results: dict[str, dict[str, Any]]) -> str:
    """For the README: the shares by task, and how many of the twelve are raced."""
    raced = [one for one in results.values() if one["contenders"]]
    held = sum(one["race"] in HELD_OUT for one in raced)
    part = f"{held} of" if held < len(HELD_OUT) else "all of"
    said = f"{len(raced)} of the {len(race_tables.TWELVE)} tasks are raced so far, {part} the {len(HELD_OUT)} that are held out."
    if len(raced) == len(race_tables.TWELVE):
        said = f"All twelve tasks have been raced. {_means(results)}".strip()
    return f"{race_tables.front(results, everywhere=True)}\n\n{said}"


def task_by_task(results: dict[str, dict[str, Any]]) -> str:
    """The tables of every task whose baselines are tuned."""
    return "\n\n".join(f"### `{task}`\n{one_race(one, drawn=False)}" for task, one in results.items() if one["contenders"])


def all_races(results: dict[str, dict[str, Any]]) -> str:
    seen = "\n\n![shares of all contenders by task](images/race.svg)" if any(one["contenders"] for one in results.values()) else ""
    return race_tables.summary(results) + seen


def by_strategy(results: dict[str, Any]) -> str:
    """One row a strategy, test accuracy with each optimizer; the best of a column in bold."""
    cells = {(c["strategy"], c["optimizer"]): c for c in results["cells"]}
    optimizers = [o for o in NAMES if any(o == k[1] for k in cells)]
    labels = {c["strategy"]: c["label"] for c in results["cells"]}
    best = {o: max(c["test_accuracy"]["mean"] for k, c in cells.items() if k[1] == o) for o in optimizers}
    lines = ["| test accuracy, % | " + " | ".join(NAMES[o] for o in optimizers) + " |", "|---|" + "---|" * len(optimizers)]
    for strategy, label in labels.items():
        row = [_marked(cells[strategy, o], best[o]) for o in optimizers]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _marked(cell: Cell, best: float) -> str:
    text = of_seeds(cell, "test_accuracy")
    return f"**{text}**" if cell["test_accuracy"]["mean"] == best else text


def in_full(results: dict[str, Any]) -> str:
    """Every cell with what was chosen and what it costs."""
    head = "| optimizer | strategy | test accuracy, % | generalisation gap, % | steps to the baseline's best | step, ms | "
    lines = [head + "control's share | zero weights, % | rate | strength |", "|---" * 10 + "|"]
    for c in sorted(results["cells"], key=lambda c: (list(NAMES).index(c["optimizer"]), -c["test_accuracy"]["mean"])):
        gap, zeros = c["generalisation_gap"]["mean"], c["sparsity"]["mean"]
        found = c["strengths"]
        strength = ", ".join(f"{name} {value:.3g}" for name, value in found.items()) if len(found) > 1 else next(iter(found.values()), "-")
        lines.append(
            f"| {NAMES[c['optimizer']]} | {c['label']} | {of_seeds(c, 'test_accuracy')} | {100 * gap:.1f} | "
            f"{reached(c['steps_to_baseline'])} | {c['step_ms']:.2f} | {100 * c['control_share']:.0f}% | {100 * zeros:.1f} | {c['lr']:g} | "
            f"{strength} |"
        )
    return "\n".join(lines)


def setting(results: dict[str, Any]) -> str:
    """Data, machine, versions, seeds and budget in one sentence."""
    data, protocol = results["data"], results["protocol"]
    return (
        f"{data['name']}: {data['train']} training, {data['validation']} validation, {data['test']} test images; "
        f"{protocol['trials']} trials a cell, {protocol['seeds']} seeds (mean ± sample standard deviation), {protocol['steps']} steps of "
        f"batch {protocol['batch']}; {where(results['machine'])}, protocol {protocol.get('number', 3)}, budget {results['budget']}."
    )


def bench(measured: dict[str, Any]) -> str:
    """A benchmark's tables by heading, with the machine where it is known."""
    tables = [f"**{name}**\n\n{markdown(rows)}" if name else markdown(rows) for name, rows in runner.tables(measured).items()]
    machine = measured.get("machine")
    kernels = "with" if measured.get("kernels") else "without"
    said = [f"{where(machine)}; threads: {measured['threads']}; {kernels} C kernels."] if isinstance(machine, dict) else []
    left_out = [f"Left out: {line}." for line in measured.get("left_out", [])]
    return "\n\n".join([*tables, *said, *left_out])


def drawn_bench(measured: dict[str, Any]) -> str:
    return f"![What rules add to a step, in µs, beside code by hand and the floor](images/bench-control.svg)\n\n{bench(measured)}"


def bars(_: Any) -> str:
    """Of the benchmarks that have results: how many rows keep to each bar, and what misses most."""
    rows = []
    for name in ("control", "trainer", "cap", "inspect", "peft", "probe"):
        measured = load(f"bench-{name}")
        rows += [{"bench": name, **row} for row in runner.kept(runner.named(name), measured)] if measured else []
    return markdown(rows)


def smaller(results: dict[str, Any]) -> str:
    """What ``normwise prune`` found: the setting, the networks, the strengths that were tried."""
    plan, machine, timing = results["protocol"], results["machine"], results["timing"]
    said = (
        f"Learning rate {results['lr']:.3g}, strength {results['strength']:.3g}; {plan['steps']} + {plan['fine_tuning']} steps of batch "
        f"{plan['batch']}, {plan['seeds']} seeds (mean ± sample standard deviation); {machine['cpu']}, 1 thread, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['date'][:10]}, budget {results['budget']}. Largest output difference by removing units: "
        f"{results['summary']['difference']:.0e}. A step under the lasso takes {timing['lasso_ratio']:.2f} times a step without it."
    )
    tried = markdown([trial(line) for line in results["strengths"]])
    return f"{said}\n\n{markdown(networks(results))}\n\nStrengths, with the tuning seed:\n\n{tried}"


def recipe(results: dict[str, Any]) -> str:
    """What ``normwise recipe`` found: verdicts, setting, a table for each group, what to know."""
    parts = [*recipe_tables.verdicts(results), recipe_tables.setting(results)]
    for group, rows in recipe_tables.groups(results).items():
        parts += [f"**{group[:1].upper()}{group[1:]}**"] * bool(group) + [markdown(rows)]
    return "\n\n".join([*parts, *recipe_tables.remarks(results)])


def lora(results: dict[str, Any]) -> str:
    """Which factors of LoRA take the matrix method."""
    from lora_rows import rows  # beside this file

    return markdown(rows(results["runs"]))


def probe_share(results: dict[str, Any]) -> str:
    """What the probe changes in advice, and what that came to."""
    from probe_share import rows  # beside this file

    return f"{markdown(rows(results['runs']))}\n\n{where(results['runs'][0]['machine'])}."


def searched(_: Any) -> str:
    """What ``normwise tune`` searches over, from the code itself."""
    rows = [
        {"slot": slot, "rule": f"`{name}`", "what it does": option.about,
         "numbers": ", ".join(f"{axis} {low:g} to {high:g}" for axis, (low, high) in option.axes.items()),
         "`on`": "matrices, weights" if option.placed else "-", "rate": "-" if option.lr is None else f"{option.lr:g}"}
        for slot, options in tune_space.SLOTS.items() for name, option in options.items()
    ]  # fmt: skip
    rows += [
        {"slot": "optimizer", "rule": f"`{name}`", "what it does": tune_space.CHOICES[name].about, "numbers": "-", "`on`": "-",
         "rate": f"{tune_space.CHOICES[name].lr.values[0]:g}"}
        for name in tune_space.USUAL
    ]  # fmt: skip
    options = [option for slot in tune_space.SLOTS.values() for option in slot.values()]
    ruled = 1 + sum(3 ** len(option.axes) * (1 + option.placed) for option in options)
    grid = tune_space.GRID * (ruled * (len(tune_space.USUAL) - 1) + 1)    # of what is advised the rate alone
    standard = BUDGETS["standard"].trials
    return markdown(rows) + (
        f"\n\nA grid over this table with {tune_space.GRID} rates, three values of each number and at most one rule at a time has {grid} "
        f"runs; the {standard} trials of `standard` are {standard / grid:.0%} of it."
    )


def tuned(studies: dict[str, Any]) -> str:
    """A row for each study that ``normwise tune`` has done."""
    return markdown([row for one in studies["studies"] for row in tune_tables.summary_rows(one)])


def named_rules(_: Any) -> str:
    """From the code itself: the rules, their arguments, the first sentence about each."""
    lines = []
    for line in listing.named_rules().splitlines():
        head, about = line.split(")  ", 1)
        lines.append(f"| `{head})` | {gallery.as_markdown(about.strip()).replace('|', chr(92) + '|')} |")
    return "\n".join(["| rule | what it does |", "|---|---|", *lines])


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "digits": ("cnn-digits", by_strategy),
    "digits setting": ("cnn-digits", setting),
    "digits in full": ("cnn-digits", in_full),
    "mnist": ("cnn-mnist", by_strategy),
    "mnist setting": ("cnn-mnist", setting),
    "mnist in full": ("cnn-mnist", in_full),
    "race": ("race", all_races),
    **{f"race {task}": (f"race-{task}", one_race) for task in race_tables.RACED},
    **{f"other {task}": (f"other-{task}", partial(one_race, drawn=False)) for task in ("cnn", "gpt")},
    "race 2": ("race 2", of_protocol_2),
    "race 2 front": ("race 2", front_of_protocol_2),
    "race 2 tasks": ("race 2", task_by_task),
    "race 2 elsewhere": ("elsewhere", lambda results: race_tables.elsewhere(results["elsewhere"], results["races"])),
    "tried": ("tried", tried),
    "gan setting": ("gan", lambda results: results["setting"]),
    "gan": ("gan", lambda results: markdown(results["rows"])),
    **{f"prune {name}": (f"prune-{name.replace(' ', '-')}", smaller)
       for name in ("cnn digits", "cnn mnist", "resnet digits", "resnet cifar10", "resnet cifar10 held")},
    **{f"recipe {name}": (f"recipe-{name}", recipe) for name in ("plasticity", "spikes", "finetune", "quantise")},
    "lora rows": ("lora-rows", lora),
    "probe share": ("probe-share", probe_share),
    "tune space": (None, searched),
    "tune results": ("tune", tuned),
    "named rules": (None, named_rules),
    "bench bars": (None, bars),
    "bench control": ("bench-control", drawn_bench),
    "bench trainer": ("bench-trainer", bench),
    "bench polar": ("bench-polar", bench),
    "bench step": ("bench-step", bench),
    "bench inspect": ("bench-inspect", bench),
    "bench cap": ("bench-cap", bench),
    "bench probe": ("bench-probe", bench),
    "bench peft": ("bench-peft", bench),
}


def filled(text: str) -> str:
    for name, (source, render) in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        results = load(source) if source else {}
        body = "Not yet measured." if results is None else render(results)
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.S)
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def pictures() -> None:
    """Draws what there are results for."""
    from normwise.experiments.report import picture

    digits = load("cnn-digits")
    if digits is not None:
        picture(digits, IMAGES / "digits.svg")
    races = {task: one for task, one in (load("race") or {}).items() if one["contenders"]}
    for task, one in races.items():
        picture(one, IMAGES / f"race-{task}.svg")
    control = load("bench-control")
    if control is not None:
        picture(control, IMAGES / "bench-control.svg")
    if races:
        picture(races, IMAGES / "race.svg")
    twelve = {task: one for task, one in (load("race 2") or {}).items() if one["contenders"]}
    if twelve:
        picture(twelve, IMAGES / "race-2.svg")


def main() -> int:
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    if "--check" in sys.argv:
        print("\n".join(f"{page.relative_to(ROOT)} is not what docs/make.py writes" for page in stale))
        return 1 if stale else 0
    for page in stale:
        page.write_text(filled(page.read_text()))
    pictures()
    gallery.main()    # its pages have figures of these tables
    return 0


if __name__ == "__main__":
    sys.exit(main())
