"""``normwise demo``: what a few rules do to a small network, in under half a minute. One seed and nothing tuned: it compares nothing."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import nn

import normwise as nw
from normwise.experiments.compare.run import norms_of
from normwise.experiments.framework.printing import for_stream, show_table
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import Task
from normwise.norms import native

STEPS, LOOKS, RATE = 300, 12, 5e-3
NOTES = """longest unit: the largest norm of a unit's weights, through training.
σ₁: the largest singular value. zeros: of the weights. holds: the bound,
measured again in float64. cost: the rules' share of the training time; a large
network's is far smaller. One seed and nothing tuned: accuracies that differ by
a point or two say nothing.

In your own loop: control = nw.attach(model, optimizer, nw.max_norm(1.0))
"""
BARS = "▁▂▃▄▅▆▇█"
Build = Callable[[nn.Module], torch.optim.Optimizer]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True)


CASES: dict[str, tuple[Build, Callable[[], list[nw.Rule]]]] = {
    "AdamW alone": (_adamw, list),
    "+ max_norm(1.0)": (_adamw, lambda: [nw.max_norm(1.0)]),
    "+ spectral_cap(1.5)": (_adamw, lambda: [nw.spectral_cap(1.5)]),
    "+ l1_prox(0.2)": (_adamw, lambda: [nw.l1_prox(0.2)]),
    "+ max_norm, clip": (_adamw, lambda: [nw.max_norm(1.0), nw.clip_grad_norm(1.0)]),
    "optim.auto(model)": (nw.optim.auto, list),
}
"""What is written to an optimizer and the rules beside it."""


@dataclass(frozen=True)
class Shown:
    """name: the case's. lengths: the largest norm of a unit over training. sigma: the largest singular value at the end. zeros: their share
    of the weights. accuracy: on the test part. share: of the time that rules take, None without rules. holds: whether every bound does.
    """

    name: str
    lengths: list[float]
    sigma: float
    zeros: float
    accuracy: float
    share: float | None
    holds: bool | None


def run(stream: TextIO | None = None, progress: Progress | None = None) -> bool:
    """Trains every case, prints the table, and says whether every bound holds."""
    out, progress = stream or sys.stdout, progress or on_stderr()
    task = load_task("cnn")
    native.library()    # compiled on the first use ever: that second is no rule's time
    progress.start(len(CASES))
    shown = []
    for name, (build, rules) in CASES.items():
        shown.append(_case(name, build, rules(), task))
        progress.advance(name)
    progress.stop()
    print(f"A CNN of two convolutions learns {task.facts['train']} of scikit-learn's digits in {STEPS} steps.\n", file=out)
    show_table(_rows(shown, out), out)
    print(NOTES, file=out)
    return all(one.holds is not False for one in shown)


def _case(name: str, build: Build, rules: list[nw.Rule], task: Task) -> Shown:
    torch.manual_seed(0)
    model = task.build()
    optimizer = build(model)
    control = nw.attach(model, optimizer, rules, timed=True) if rules else None
    rates, lengths, seconds = nw.optim.schedule(optimizer, STEPS), [_longest(model)], 0.0
    for step, batch in enumerate(itertools.islice(task.batches(task.batch, 0), STEPS), start=1):
        started = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model, batch).backward()    # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
        seconds += time.perf_counter() - started
        if step % math.ceil(STEPS / LOOKS) == 0:
            lengths.append(_longest(model))
    weights = _weights(model)
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    sigma = max(norms_of(w)["spectral"] or 0.0 for w in weights)
    measured = control.verify() if control is not None else None
    holds = measured.ok if measured is not None and measured.blocks else None    # a prox and a clip of gradients bound no weight
    share = control.seconds / seconds if control is not None else None
    return Shown(name, lengths, sigma, zeros, task.evaluate(model, "test").accuracy, share, holds)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters() if p.ndim > 1]


def _longest(model: nn.Module) -> float:
    return max(norms_of(w)["max_unit"] or 0.0 for w in _weights(model))


def _rows(shown: Sequence[Shown], out: TextIO) -> list[dict[str, str]]:
    highest = max(length for one in shown for length in one.lengths)
    return [
        {
            "trained with": one.name, "accuracy": f"{100 * one.accuracy:.1f}%",
            "longest unit": for_stream(_bars(one.lengths, highest), out) + f" {one.lengths[-1]:.2f}",
            "σ₁": f"{one.sigma:.2f}", "zeros": f"{100 * one.zeros:.0f}%",
            "holds": {None: "-", True: "yes", False: "NO"}[one.holds], "cost": "-" if one.share is None else f"{100 * one.share:.0f}%",
        }
        for one in shown
    ]  # fmt: skip


def _bars(values: Sequence[float], highest: float) -> str:
    """One bar each, from 0 to the highest of all rows."""
    return "".join(BARS[min(len(BARS) - 1, int(value / highest * len(BARS)))] for value in values)
