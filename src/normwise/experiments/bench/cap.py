"""``normwise bench cap``: what a spectral cap within 1% costs a training step.

And what σ₁ is after every step, by float64 SVD.

The tasks' GPT at width 256 and six layers (4.8M parameters, batch 8×128, characters of CPython's own reference text) and their residual CNN
(0.70M, batch 128 of digits at 32×32) are trained with AdamW at 3e-4 under ``spectral_cap(r, tolerance=0.01)`` on all hidden and
convolution weights. ``one radius``: r is 0.98 of the largest σ₁ at the start, so that a part of the matrices is at it; ``own radii``: 0.98
of each matrix's own σ₁, so that all are. In fp32, and, which makes the step shorter and the bar harder, under bf16 autocast as the
tasks train. Reported: the control's own time over the whole step, medians over all steps but the first five (bar: at most 2% with one
radius in fp32, at most 5% elsewhere), how many matrices were cut a step, and in fp32 the largest σ₁ / r after any step, the first included
(bar: 1.01), and the exact cap's share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.timing import milliseconds
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.models.gpt import GPT
from normwise.experiments.tasks.models.resnet import ResNet
from normwise.experiments.tasks.text import load_text
from normwise.norms.decompose import singular_values
from normwise.norms.linalg import paths
from normwise.parameters.inventory import Entry, Inventory

BARS = (Bar("share"), Bar("largest_sigma_over_cap", "sigma_bar"))
STEPS, CHECKED_STEPS, EXACT_STEPS, SETTLE = 40, 100, 1, 5
START = 0.98  # of σ₁ at the start
PLACES, IMAGES, SIDE = 8, 128, 32
MATRICES = ("role:hidden", "role:conv")


def run(steps: int = STEPS, checked_steps: int = CHECKED_STEPS, exact_steps: int = EXACT_STEPS) -> dict[str, Any]:
    """Both networks, in both precisions and with both kinds of radii; medians in milliseconds. checked_steps: after which σ₁
    is measured."""
    # Where products in bf16 are slow a step under autocast takes minutes.
    precisions = (False, True) if paths.bf16_pays(torch.device("cpu")) else (False,)
    rows = [
        _row(Setting(network, radii, bf16), steps, checked_steps, exact_steps)
        for bf16 in precisions for network in ("gpt", "resnet") for radii in ("one radius", "own radii")
    ]  # fmt: skip
    left_out = {} if len(precisions) > 1 else {"left_out": ["bf16: this CPU has no AVX-512, and its steps under autocast take minutes"]}
    facts = left_out | {"threads": torch.get_num_threads(), "steps": steps, "checked_steps": checked_steps, "torch": torch.__version__}
    return {"bench": "cap", **facts, "rows": rows}


@dataclass(frozen=True)
class Setting:
    """What is trained: ``"gpt"`` or ``"resnet"``, under ``"one radius"`` or ``"own radii"``, in fp32 or under bf16 autocast."""

    network: str
    radii: str
    bf16: bool
    tolerance: float = 0.01


@dataclass
class Measured:
    """Seconds of each step after the first few and of the control in it, and what was seen at every step."""

    parameters: int
    whole: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    cut: int = 0

    @property
    def share(self) -> float:
        """Of medians, since a step in which somebody else took the machine says nothing."""
        return statistics.median(self.own) / statistics.median(self.whole)


def _row(setting: Setting, steps: int, checked_steps: int, exact_steps: int) -> dict[str, Any]:
    tracked = _train(setting, steps, SETTLE)
    checked = Measured(0) if setting.bf16 else _train(setting, checked_steps, 0, checked=True)    # apart: an SVD empties the caches
    row = {
        "network": setting.network, "radii": setting.radii, "forward": "bf16" if setting.bf16 else "fp32", "parameters": tracked.parameters,
        "step_ms": milliseconds(tracked.whole), "control_ms": milliseconds(tracked.own), "share": tracked.share,
        "bar": 0.02 if setting.radii == "one radius" and not setting.bf16 else 0.05, "cut_a_step": tracked.cut / (steps + SETTLE),
    }  # fmt: skip
    if setting.bf16:
        return row
    exact = _train(replace(setting, tolerance=0.0), exact_steps, 1)
    return row | {"largest_sigma_over_cap": max(checked.sigmas), "sigma_bar": 1.01, "exact_share": exact.share}


def _train(setting: Setting, steps: int, settle: int, checked: bool = False) -> Measured:
    torch.manual_seed(0)
    net, batches = _gpt() if setting.network == "gpt" else _resnet()
    matrices = [e for e in Inventory(net).entries if e.role in ("hidden", "conv")]
    limits = [START * _sigma(e) for e in matrices]
    one = setting.radii == "one radius"
    limits = [max(limits)] * len(limits) if one else limits
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
    radius = limits[0] if one else f"{START}*init"
    rule = nw.spectral_cap(radius, params=MATRICES, tolerance=setting.tolerance, optional=True)
    control = nw.attach(net, optimizer, rule, timed=True)
    measured = Measured(sum(p.numel() for p in net.parameters()))
    for i in range(steps + settle):
        (x, y), before, start = next(batches), control.seconds, time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            logits = net(x)
        loss: Any = F.cross_entropy(logits.float().flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        if i >= settle:
            measured.whole.append(time.perf_counter() - start)
            measured.own.append(control.seconds - before)
        measured.cut += sum(control.violations().values())
        if checked:
            measured.sigmas.append(max(_sigma(e) / r for e, r in zip(matrices, limits, strict=True)))
    return measured


def _sigma(entry: Entry) -> float:
    return float(singular_values(entry.param.detach().flatten(1).double()[None])[0, 0])


def _gpt() -> tuple[nn.Module, Iterator[Any]]:
    task, text = load_task("gpt"), load_text()
    return GPT(len(text.vocabulary), width=256, layers=6), task.batches(PLACES, 0)


def _resnet() -> tuple[nn.Module, Iterator[Any]]:
    data = load(None)
    images, labels = data.tensors("train")
    images = F.interpolate(images, size=(SIDE, SIDE)).expand(-1, 3, -1, -1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(len(images), (IMAGES,))
            yield images[chosen], labels[chosen]

    return ResNet(3, data.classes), batches()
