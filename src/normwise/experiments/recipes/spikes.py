"""Spikes: how much of the harm of bad batches does a rule undo?

A small GPT learns text. One batch in twenty is bad: its targets are all one character, drawn anew, and its loss counts ten times, as from a
broken shard. AdamW then steps far, and its second moment holds the later steps short.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.framework.lattice import Axis
from normwise.experiments.recipes.recipe import BASELINE, REFERENCE, Arm, Column, Numbers, Recipe, RecipeRun
from normwise.experiments.tasks.models.gpt import GPT, Attention
from normwise.experiments.tasks.task import Recipe as TaskRecipe
from normwise.experiments.tasks.text import TextData, TextTask, load_text
from normwise.optim import schedule

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 48, 2, 4, 48, 8
JUDGED = 4096  # characters of the validation and of the test part
SHARE, WEIGHT, FIRST = 0.05, 10.0, 0.1    # of batches that are bad; of their loss; of the run before the first of them
HISTORY, ENOUGH = 128, 25                 # steps that skipping looks back at, as OLMo does; ZClip's warm-up
_BAD = 40_000                             # added to the seed: which batches are bad
CLEAN, SKIP, LOGITS = "clean", "skip", "logits"

ARMS = {
    "nothing": Arm("nothing", role=BASELINE),
    "clean": Arm("no bad batches", role=REFERENCE, variant=CLEAN),
    "clip": Arm("clipping", lambda n: [nw.clip_grad_norm(n["max_norm"])], (Axis("max_norm", (1.0,), ratio=3.0, off=1),), BASELINE),
    "skip": Arm("skipping", axes=(Axis("z", (4.0,), ratio=2.0, off=1),), role=BASELINE, variant=SKIP),
    "autoclip": Arm("AutoClip", lambda n: [nw.autoclip(n["percentile"])], (Axis("percentile", (30.0,), ratio=3.0, off=1, most=100.0),)),
    "zclip": Arm("ZClip", lambda n: [nw.zclip(n["z"])], (Axis("z", (2.5,), ratio=2.0, off=1),)),
    "zclip_update": Arm("ZClip of updates", lambda n: [nw.zclip(n["z"], on="update")], (Axis("z", (2.5,), ratio=2.0, off=1),)),
    "qk_clip": Arm(
        "QK-clip", lambda n: [nw.qk_clip(n["tau"], query="*attention.q.weight", key="*attention.k.weight", heads=HEADS)],
        (Axis("tau", (10.0,), ratio=3.0, off=1),), variant=LOGITS,
    ),
}  # fmt: skip


def text_of(source: Any) -> TextTask:
    """``--data``, by default Python's reference, as the small GPT's task."""
    return small_gpt(load_text(source))


def small_gpt(text: TextData) -> TextTask:
    """The task of the recipes on text: 2 layers of width 48 on 48 characters, in fp32, judged by the first 4096 of each part."""
    text = replace(text, validation=text.validation[:JUDGED], test=text.test[:JUDGED])
    model = partial(GPT, len(text.vocabulary), WIDTH, LAYERS, HEADS, CONTEXT)
    return TextTask(TaskRecipe("gpt", False, "loss", BATCH, model, variant=f"{LAYERS}x{WIDTH}"), text, CONTEXT)


@dataclass(frozen=True)
class SpikesRun(RecipeRun):
    """size: steps."""

    kind: ClassVar[str] = "recipe spikes"
    unit: ClassVar[str] = "steps"
    figures: ClassVar[tuple[str, ...]] = ("loss", "worst")

    def measured(self, context: TextTask) -> tuple[int, dict[str, float]]:
        """``loss``: on the validation part, of a run to report on the test part. ``worst``: the highest loss on a good batch once bad
        ones may come. What acted: blocks that the rules changed in all steps, or steps that were skipped."""
        torch.manual_seed(self.seed)
        arm, model, lr = ARMS[self.arm], context.build(), self.numbers["lr"]
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
        control = nw.attach(model, optimizer, arm.rules(self.numbers))
        if arm.variant == LOGITS:
            reports(model, control)
        rates = schedule(optimizer, self.size, "hold")
        chance, skips = torch.Generator().manual_seed(self.seed + _BAD), Skipping(self.numbers) if arm.variant == SKIP else None
        acted, worst = 0, 0.0
        for step, (inputs, answers) in enumerate(itertools.islice(context.batches(BATCH, self.seed), self.size)):
            bad = bool(torch.rand((), generator=chance) < SHARE) and step >= FIRST * self.size and arm.variant != CLEAN
            if bad:
                answers = torch.randint(len(context.data.vocabulary), (1, 1), generator=chance).expand_as(answers)
            loss = context.loss(model, (inputs, answers))
            optimizer.zero_grad()
            (WEIGHT * loss if bad else loss).backward()  # type: ignore[no-untyped-call]
            if skips is None or skips.takes(model):
                optimizer.step()
            rates.step()
            acted += sum(control.violations().values())
            if not bad and step >= FIRST * self.size:
                worst = max(worst, loss.item())
        end = context.evaluate(model, "test" if self.full else "validation")
        return skips.count if skips else acted, {"loss": end.loss, "worst": worst}


class Skipping:
    """Steps that a training loop leaves out: those whose gradient's norm is far above the last ones."""

    def __init__(self, numbers: Numbers) -> None:
        self.z, self.count = numbers["z"], 0
        self.norms: deque[float] = deque(maxlen=HISTORY)

    def takes(self, model: nn.Module) -> bool:
        """Whether the step is to be taken."""
        norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        if len(self.norms) >= ENOUGH and norm > statistics.fmean(self.norms) + self.z * statistics.stdev(self.norms):
            self.count += 1
            return False
        self.norms.append(norm)
        return True


def reports(model: nn.Module, control: nw.Control) -> None:
    """Tells the control the largest logit of every head after each forward pass, as an attention of your own would."""

    def watch(attention: Attention) -> None:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, given, out: seen.update({name: out.detach()})

        def report(*_: Any) -> None:
            logits = seen["q"] @ seen["k"].mT * seen["q"].shape[-1] ** -0.5
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            control.report_max_logits(attention, logits.masked_fill(future, -torch.inf).amax(dim=(0, 2, 3)))

        attention.q_norm.register_forward_hook(keep("q"))
        attention.k_norm.register_forward_hook(keep("k"))
        attention.register_forward_hook(report)

    for module in model.modules():
        if isinstance(module, Attention):
            watch(module)


SPIKES = Recipe(
    "How much of the harm of bad batches does each arm undo?", SpikesRun, ARMS, Axis("lr", (3e-3,), ratio=3.0), 400,
    text_of,
    {"": {"loss": Column("test loss", higher=False), "worst": Column("worst good batch", 2, higher=False)}}, span=("nothing", "clean"),
)  # fmt: skip
