"""``normwise bench probe``: what the probe of ``nw.advise`` costs.

A probe of 25 batches takes turns with as many training steps under AdamW on the same batches. `share` is the probe's time over that of 1500
such steps (bar: 0.02), the median over rounds. In a process of its own a stack of linear layers of 604 MB is probed in place, and `over_mb`
is how far the peak of memory rises over that of a training step, which holds gradients too (bar: 1024); `copy_mb` is the same with
``copy=True``, which has no bar.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normwise.advice.probe import STEPS, probe
from normwise.experiments.bench.inspect import peak_resident
from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.provenance import machine
from normwise.experiments.framework.timing import in_turn, seconds
from normwise.experiments.tasks.load import load_task

BARS = (Bar("share"), Bar("over_mb", "memory_bar_mb"))
BATCHES, RUN = STEPS, 1500
TASKS = ("cnn", "resnet", "lstm", "gpt")


def run(tasks: tuple[str, ...] = TASKS, size: str = "standard", repeats: int = 5, layers: int = 36, width: int = 2048) -> dict[str, Any]:
    """A row for each task, and one of memory."""
    rows = [_time(name, size, repeats) for name in tasks] + [_memory(layers, width)]
    return {"bench": "probe", "machine": machine(), "threads": 1, "rows": rows}


def _time(name: str, size: str, repeats: int) -> dict[str, Any]:
    task = load_task(name, size=size)
    torch.manual_seed(0)
    model, batches = task.build(), list(islice(task.batches(task.batch, 0), BATCHES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        for batch in batches:
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model, batch))
            optimizer.step()

    turns: list[Callable[[], float]] = [lambda: seconds(train), lambda: seconds(lambda: probe(model, batches, task.loss, BATCHES))]
    trained, probed = in_turn(turns, repeats, warm_up=1, alternate=True)
    share = statistics.median(p / t for p, t in zip(probed, trained, strict=True)) * BATCHES / RUN
    step, whole = statistics.median(trained) / BATCHES, statistics.median(probed)
    return {"case": name, "step_ms": 1e3 * step, "probe_s": whole, "share": share, "bar": 0.02}


def _memory(layers: int, width: int) -> dict[str, Any]:
    found = []
    for copy in (False, True):
        code = f"from {__name__} import measure; measure({layers}, {width}, {copy})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout) / 1e6)
    megabytes = 4 * layers * width * width / 1e6
    return {"case": f"{layers} linear layers", "weights_mb": megabytes, "over_mb": found[0], "memory_bar_mb": 1024.0, "copy_mb": found[1]}


def measure(layers: int, width: int, copy: bool) -> None:
    """In a process of its own: prints the peak of memory of a probe over that of a training step, in bytes."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    batches = [torch.ones(4, width)] * 8

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch).square().mean()
        return out

    torch.autograd.backward(loss(model, batches[0]))
    before = peak_resident()
    model.zero_grad()
    probe(model, batches, loss, steps=len(batches), copy=copy)
    print(json.dumps(peak_resident() - before))
