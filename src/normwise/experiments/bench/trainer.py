"""``normwise bench trainer``: what control adds where people train, and what it keeps.

All on one thread; what is compared takes turns.

- Hugging Face's Trainer on GPT-2 of 4.8M (transposed matrices, 512 random tokens a step, fused AdamW at 3e-4, its own clipping off), with
  control attached and without, a few steps each in turn. ``share`` is the time in the control's hooks over that of the steps (bar: 1.5%).
  ``paired`` is what the steps with control took longer than those without in the same round, over the latter, the median over rounds with
  a 95% interval. The machine's own noise is larger than that bar, so it is the interval's lower end that must keep to it.
- Forward, backward and step of the tasks' GPT at that size: ``nw.optim.AdamW`` under both rules with the norms logged, over torch's fused
  AdamW with nothing (bar: 1.05).
- A step of ``nw.optim.Muon`` and of ``auto`` on that GPT-2, gradients ready (bar for ``auto``: 45 ms).
- The most memory that tensors take beyond what was there, in the first two steps under both rules on eight layers of 2048×2048, as torch's
  profiler counts it (bar: one bucket of scratch and one of those tensors).
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import normwise as nw
from normwise.engine.pack import SCRATCH_BYTES
from normwise.experiments.bench.cells.by_hand import BOTH, RULE_SETS, acted_on
from normwise.experiments.bench.cells.networks import LAYERS, VOCABULARY, WIDTH, gpt2, mlp, tokens, weights_of
from normwise.experiments.bench.cells.states import ALL, NOTHING, Memory
from normwise.experiments.bench.cells.whole_step import training_step
from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.figures import interval, ratio_interval
from normwise.experiments.framework.pool import on_threads
from normwise.experiments.framework.printing import tell
from normwise.experiments.framework.provenance import installed, machine
from normwise.experiments.framework.timing import in_turn, milliseconds, seconds
from normwise.experiments.tasks.models.gpt import GPT
from normwise.norms.native import library

BARS = (
    Bar("share"), Bar("paired_low", "bar"), Bar("ratio", "ratio_bar"), Bar("step_ms", "step_bar"), Bar("peak_mib", "peak_bar"),
)  # fmt: skip
ROUNDS, STEPS, ROWS, LENGTH = 12, 5, 8, 64
RATE, PATIENCE = 3e-4, 15.0    # seconds for each matrix preset
NEEDS = ("transformers", "accelerate")
Row = dict[str, Any]
Build = Callable[[], nn.Module]


def rules() -> list[Any]:
    """Both rules at radii that the first steps of training meet now and then."""
    return [nw.max_norm(1.0), nw.clip_grad_norm(1.0)]


def hyperball() -> list[Any]:
    return [nw.hyperball(params=("role:hidden",))]


POLICIES: dict[str, tuple[Callable[[], list[Any]], bool]] = {
    "max_norm + clip": (rules, False), "max_norm + clip, log=True": (rules, True), "hyperball": (hyperball, False),
}  # fmt: skip
"""Rules, and whether norms are logged."""


def run(rounds: int = ROUNDS, steps: int = STEPS, threads: int = 1) -> dict[str, Any]:
    """All measurements. rounds: of turns; steps: of the Trainer in each turn. Rows that need transformers are left out without it."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    with on_threads(threads):
        found: list[Row] = [] if missing else [*in_trainer(gpt2, rounds, steps), *matrix_steps(gpt2, rounds)]
        found += [own_adamw(partial(GPT, VOCABULARY, WIDTH, LAYERS), rounds)]
        found += [peak_memory(partial(mlp, 8, 2048), state) for state in (NOTHING, ALL)]
    left_out = [f"the rows of GPT-2: {name} is not installed" for name in missing]
    for line in left_out:
        tell(f"Left out: {line}.")
    where = {"machine": machine() | installed(*NEEDS), "kernels": library() is not None, "threads": threads}
    return {"bench": "trainer", **where, "rounds": rounds, "left_out": left_out, "rows": found}


# ------------------------------------------------------------------------------------------------------------ Trainer


class _Lane:
    """A model in training by Hugging Face's Trainer, with control or without."""

    def __init__(self, build: Build, folder: str, policy: list[Any], log: bool) -> None:
        torch.manual_seed(0)
        self.model, self.folder = build(), folder
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        self.control = nw.attach(self.model, self.optimizer, policy, log=log, timed=True) if policy else None

    def burst(self, steps: int) -> tuple[float, float]:
        """Seconds of so many steps after a first one, and of the control's hooks in them."""
        transformers: Any = import_module("transformers")
        at: list[tuple[float, float]] = []

        class Clock(transformers.TrainerCallback):    # type: ignore[misc]
            def on_step_end(_, *args: Any, **kwargs: Any) -> None:
                at.append((time.perf_counter(), 0.0 if self.control is None else self.control.seconds))

        options = transformers.TrainingArguments(
            self.folder, max_steps=steps + 1, per_device_train_batch_size=ROWS, max_grad_norm=0.0, lr_scheduler_type="constant",
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        )
        data = [{"input_ids": x, "labels": x} for x in torch.randint(VOCABULARY, (ROWS * (steps + 1), LENGTH))]
        trainer = transformers.Trainer(self.model, options, train_dataset=data, optimizers=(self.optimizer, None), callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return at[-1][0] - at[0][0], at[-1][1] - at[0][1]


def in_trainer(build: Build, rounds: int, steps: int) -> list[Row]:
    """A row for each policy; all of them and the plain one take turns."""
    tell("GPT-2 in the Trainer")
    with tempfile.TemporaryDirectory() as folder:
        lanes = [_Lane(build, folder, [], log=False), *(_Lane(build, folder, make(), log) for make, log in POLICIES.values())]
        plain, *controlled = in_turn([partial(lane.burst, steps) for lane in lanes], rounds, warm_up=1, threads=None, alternate=True)
    return [_trainer_row(name, [t for t, _ in plain], taken, steps) for name, taken in zip(POLICIES, controlled, strict=True)]


def _trainer_row(name: str, plain: Sequence[float], taken: Sequence[tuple[float, float]], steps: int) -> Row:
    shares = [own / whole for whole, own in taken]
    paired = [whole / without - 1 for (whole, _), without in zip(taken, plain, strict=True)]
    low, high = interval(paired)
    return {
        "case": "GPT-2, Trainer", "rules": name, "step_ms": milliseconds(plain) / steps,
        "control_ms": milliseconds(own for _, own in taken) / steps, "share": statistics.median(shares), "bar": 0.015,
        "paired": statistics.median(paired), "paired_low": low, "paired_high": high,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- steps of our own


def own_adamw(build: Build, rounds: int) -> Row:
    """Whole steps of our AdamW with everything, over those of torch's with nothing."""
    tell("GPT, AdamW of normwise and of torch")
    models, loss = [], tokens(ROWS, LENGTH)
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build())
    fused = torch.optim.AdamW(models[0].parameters(), lr=RATE, weight_decay=0.0, fused=True)
    ours = nw.optim.AdamW(models[1], lr=RATE, weight_decay=0.0)
    nw.attach(models[1], ours, rules(), log=True)
    steps = [partial(training_step, model, loss, optimizer) for model, optimizer in zip(models, (fused, ours), strict=True)]
    theirs_s, ours_s = in_turn([partial(seconds, step) for step in steps], 2 * rounds, threads=None, alternate=True)
    low, high = ratio_interval(ours_s, theirs_s)
    return {
        "case": "GPT, forward, backward and step", "way": "nw.optim.AdamW, both rules, log=True", "torch_ms": milliseconds(theirs_s),
        "own_ms": milliseconds(ours_s), "ratio": statistics.median(ours_s) / statistics.median(theirs_s), "low": low, "high": high,
        "ratio_bar": 1.05,
    }  # fmt: skip


def matrix_steps(build: Build, rounds: int) -> list[Row]:
    """A step of each matrix preset alone, beside forward and backward of the same tokens; fewer rounds than asked for where it is slow."""
    loss, found = tokens(ROWS, LENGTH), []
    for name, make, bar in (("Muon", nw.optim.Muon, {}), ("auto", nw.optim.auto, {"step_bar": 45.0})):
        tell(f"GPT-2, steps of {name}")
        torch.manual_seed(0)
        model = build()
        optimizer, taken = make(model), []
        count, started = 0, time.perf_counter()
        while count < rounds and (count < 2 or time.perf_counter() - started < PATIENCE):
            optimizer.zero_grad()
            passes = seconds(lambda model=model: loss(model).backward())    # type: ignore[misc,no-untyped-call]
            taken.append((passes, seconds(optimizer.step)))
            count += 1
        first = taken[1:] or taken    # the first step builds the plan
        found.append({
            "case": "GPT-2, step alone", "optimizer": name, "passes_ms": milliseconds(p for p, _ in first),
            "step_ms": milliseconds(s for _, s in first), **bar,
        })  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------------------- memory


def peak_memory(build: Build, state: str) -> Row:
    """The most that the first two steps under both rules allocate at a time, above what the optimizer's own step does."""
    tell(f"memory of a step, {state}")
    torch.manual_seed(0)
    model, both = build(), RULE_SETS[BOTH]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    with nw.attach(model, optimizer, both.rules()) as control:
        memory = Memory(model, acted_on(control, weights_of(model)), both, state)

        def steps() -> None:
            for _ in range(2):
                memory.put_back()
                optimizer.step()

        peak = peak_bytes(steps)
    largest = max(p.numel() * p.element_size() for p in memory.params)
    return {"case": f"{len(memory.weights)} layers, peak memory", "state": state, "peak_mib": peak / 2**20,
            "peak_bar": (SCRATCH_BYTES + largest) / 2**20}  # fmt: skip


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors at a time during the call, beyond those before it; on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")    # that the profiler starts and stops is no news
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
