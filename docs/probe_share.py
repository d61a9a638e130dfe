"""What does the probe change in advice, and what is that worth? ``python docs/probe_share.py DATA`` asks on the race's twelve tasks and
prints the table of docs/tune.md, into which ``docs/make.py`` writes it.

DATA holds ``cifar10``, ``mnist`` and ``tinyshakespeare``. On each task and seed, ``nw.advise`` is asked for ``speed`` from the model alone
and with a probe of 25 training batches. Where the two answers differ, both are trained as ``normwise tune --budget quick`` judges advice:
with the same seeds, steps and schedule, on the task's test part. Each answer is a line of ``docs/results/probe-share.jsonl`` as soon as it
is there, and is not asked for again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.experiments.framework.printing import markdown
from normwise.experiments.framework.provenance import machine
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import STEPS, Task
from normwise.experiments.tune.study import BUDGETS
from normwise.experiments.tune.target import Target, Trial, load_target

RUNS = Path(__file__).parent / "results" / "probe-share.jsonl"
SEEDS = range(6)    # those that `tune` judges with
DATA = {
    **dict.fromkeys(("cnn", "unet"), "mnist"), **dict.fromkeys(("resnet", "vit", "plain", "mixer", "resnet_gn"), "cifar10"),
    **dict.fromkeys(("lstm", "gpt", "gru", "decoder"), "tinyshakespeare/input.txt"), "tabular": None,
}  # fmt: skip


@dataclass
class Advised(Trial):
    """A run under given advice."""

    advice: nw.advice.Advice | None = None

    def attach(self, model: nn.Module) -> torch.optim.Optimizer:
        assert self.advice is not None
        made = self.advice.optimizer.build(model)
        if self.advice.policy.rules:
            nw.attach(model, made, self.advice.policy)
        return made


def main(folder: Path) -> None:
    """Does what is not done yet, then prints the table."""
    torch.set_num_threads(1)
    done = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    known = {(r["task"], r["seed"]) for r in done}
    for name, where in DATA.items():
        data = None if where is None else folder / where
        seeds = [seed for seed in SEEDS if (name, seed) not in known]
        for seed, task, target in ((seed, load_task(name, data), load_target(name, data)) for seed in seeds):
            done.append(asked(task, target, seed))
            with RUNS.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(f"{name}, seed {seed}: {', '.join(done[-1]['added']) or 'nothing changes'}", flush=True)
    print(markdown(rows(done)))


def asked(task: Task, target: Target, seed: int) -> dict[str, Any]:
    """Both answers for the model of this seed, and where they differ, what each comes to."""
    torch.manual_seed(seed)
    model = task.build()
    alone = nw.advise(model)
    probed = nw.advise(model, batches=task.batches(task.batch, seed), loss=task.loss)
    same = alone.policy == probed.policy and str(alone.optimizer) == str(probed.optimizer)
    steps = round(STEPS[task.name] * BUDGETS["quick"].scale)
    came = {} if same else {
        name: target.call(Advised({}, seed, steps, final=True, advice=advice)) for name, advice in (("alone", alone), ("probed", probed))
    }  # fmt: skip
    added = [call.name for call in probed.calls if call not in alone.calls]
    return {
        "task": task.name, "key": task.key, "metric": target.metric, "seed": seed, "steps": steps, "added": added, "same": same, **came,
        "spikes": list(probed.probe.spikes) if probed.probe else [], "machine": machine(),
    }  # fmt: skip


def rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row a task."""
    table = []
    for task in dict.fromkeys(r["task"] for r in runs):
        of = [r for r in runs if r["task"] == task]
        changed = [r for r in of if not r["same"]]
        sign = 1 if of[0]["metric"] == "accuracy" else -1
        gains = [sign * (r["probed"] - r["alone"]) for r in changed]
        added = ", ".join(sorted({name for r in changed for name in r["added"]}))
        same = "the same advice" if not gains else "no step was clipped" if not any(gains) else ""
        worth = f"0: {same}" if same else f"{fmean(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})"
        table.append({
            "task": f"`{task}`", "the probe changes the advice": f"with {len(changed)} of {len(of)} seeds", "it adds": added or "-",
            "gain by that": f"{of[0]['metric']} {worth}",
        })  # fmt: skip
    return table


if __name__ == "__main__":
    main(Path(sys.argv[1]))
