"""Fine-tuning: what is learnt of a second text at equal forgetting of the first?

A small GPT learns the first text, then goes on with the second, whole or by LoRA. *Forgetting* is by how much its loss on the first text
rose. A run is looked at after each tenth of its steps, which gives a line from the start (forgetting 0, nothing learnt) to the end. At a
level of forgetting it has the lowest loss on the second text that lies on this line within the level, as if you had stopped there.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import tarfile
import turtle
import typing
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

import normwise as nw
from normwise.errors import DataError, need_version
from normwise.experiments.framework.lattice import Axis
from normwise.experiments.recipes.recipe import BASELINE, Arm, Column, Recipe, RecipeRun
from normwise.experiments.recipes.spikes import BATCH, small_gpt
from normwise.experiments.tasks.rates import constant_then_linear
from normwise.experiments.tasks.task import Part
from normwise.experiments.tasks.text import TextData, TextTask, load_text

PRETRAINING, RATE = 800, 3e-3    # steps on the first text, and their rate
LOOKS = 10
LEVELS = {"at most 0.05 forgotten": 0.05, "at most 0.1 forgotten": 0.1}    # nats a character of the first text
LORA = "lora"
PRODUCT = "peft:product"
_RADIUS = (Axis("r", (0.1,), ratio=3.0, off=1),)    # relative to the norm of the weight, at the start or of the base


def _base(scale: float) -> str:
    return f"{scale!r}*base"


ARMS = {
    "full": Arm("full", role=BASELINE),
    "l2_sp": Arm(
        "L2-SP", lambda n: [nw.l2_penalty(n["strength"], center="init")], (Axis("strength", (0.1,), ratio=10.0, off=-1),), BASELINE
    ),
    "decay_to_init": Arm(
        "decay to init", lambda n: [nw.decay_to_init(n["strength"])], (Axis("strength", (10.0,), ratio=10.0, off=-1),), BASELINE
    ),
    "lora": Arm("LoRA", role=BASELINE, variant=LORA),
    "ball": Arm("ball", lambda n: [nw.max_norm(n["r"], center="init", relative=True)], _RADIUS),
    "cap": Arm(
        "cap on ΔW",
        lambda n: [nw.Rule(action="project", norm="spectral", center="init", radius=nw.radii.Init(n["r"]), per="matrix")], _RADIUS,
    ),
    "sphere": Arm(
        "sphere of ΔW", lambda n: [nw.Rule(action="normalize", center="init", radius=nw.radii.Init(n["r"]), per="tensor")], _RADIUS
    ),
    "relative": Arm("relative steps", lambda n: [nw.relative_update(n["c"])], (Axis("c", (1.0,), ratio=3.0),)),
    "lora_ball": Arm("LoRA, ball", lambda n: [nw.max_norm(_base(n["r"]), PRODUCT)], _RADIUS, variant=LORA),
    "lora_cap": Arm("LoRA, cap", lambda n: [nw.spectral_cap(_base(n["r"]), PRODUCT)], _RADIUS, variant=LORA),
    "lora_sphere": Arm("LoRA, sphere", lambda n: [nw.unit_norm(_base(n["r"]), PRODUCT, per="tensor")], _RADIUS, variant=LORA),
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Two texts as tasks with one vocabulary, and the models trained on the first, by seed. key, facts: of both."""

    first: TextTask
    second: TextTask
    key: str
    facts: dict[str, Any]
    trained: dict[int, nn.Module] = field(default_factory=dict)

    def start(self, seed: int) -> nn.Module:
        """A copy of the model that this seed trained on the first text: every arm starts there."""
        if seed not in self.trained:
            torch.manual_seed(seed)
            model = self.first.build()
            optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True)
            for _ in steps(self.first, model, optimizer, PRETRAINING, seed):
                pass
            self.trained[seed] = model
        return deepcopy(self.trained[seed])


def texts(source: Any) -> Texts:
    """``--data``, by default Python's reference, and the source code of four of its modules: characters that the first lacks left out."""
    need_version("peft", "0.17", what="the recipe finetune")    # now, not when the first arm with LoRA comes
    first = load_text(source)
    try:
        code = "".join(inspect.getsource(module) for module in (argparse, tarfile, turtle, typing))
    except OSError:
        raise DataError("This Python comes without the source code of its modules, which is the second text.") from None
    second = TextData.of("source code of argparse, tarfile, turtle, typing", "".join(c for c in code if c in first.vocabulary))
    places = torch.tensor([first.vocabulary.index(c) for c in second.vocabulary])
    train, validation, test = (places[part] for part in (second.train, second.validation, second.test))
    tasks = small_gpt(first), small_gpt(replace(second, vocabulary=first.vocabulary, train=train, validation=validation, test=test))
    return Texts(*tasks, f"{first.key}-{second.key}", {"name": f"{first.name}, then {second.name}"})


def steps(task: TextTask, model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> Iterator[int]:
    """Trains; yields the number of every step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: constant_then_linear(step, count))
    for step, batch in enumerate(itertools.islice(task.batches(BATCH, seed), count), start=1):
        optimizer.zero_grad()
        task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        yield step


@dataclass(frozen=True)
class FinetuneRun(RecipeRun):
    """size: steps on the second text."""

    kind: ClassVar[str] = "recipe finetune"
    unit: ClassVar[str] = "steps"
    figures: ClassVar[tuple[str, ...]] = tuple(f"{what} {level:g}" for level in LEVELS.values() for what in ("second", "forgetting"))

    def measured(self, context: Texts) -> tuple[int, dict[str, float]]:
        """``second`` and ``forgetting`` at each level, on the validation parts, of a run to report on the test parts. What acted: blocks
        that the rules changed."""
        arm, model = ARMS[self.arm], context.start(self.seed)
        torch.manual_seed(self.seed)    # of LoRA's A: whether the start was trained just now or before must not matter
        if arm.variant == LORA:
            model = adapted(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], self.numbers["lr"], weight_decay=0.0, fused=True)
        control = nw.attach(model, optimizer, arm.rules(self.numbers))
        part: Part = "test" if self.full else "validation"
        looks, acted = [losses(context, model, part)], 0
        for step in steps(context.second, model, optimizer, self.size, self.seed):
            acted += sum(control.violations().values())
            if step % max(1, self.size // LOOKS) == 0:
                looks.append(losses(context, model, part))
        found: dict[str, float] = {}
        for level in LEVELS.values():
            forgotten, learnt = best_within([(first - looks[0][0], second) for first, second in looks], level)
            found |= {f"second {level:g}": learnt, f"forgetting {level:g}": forgotten}
        return acted, found


def losses(context: Texts, model: nn.Module, part: Part) -> tuple[float, float]:
    """On the first and the second text."""
    return context.first.evaluate(model, part).loss, context.second.evaluate(model, part).loss


def best_within(looks: Sequence[tuple[float, float]], level: float) -> tuple[float, float]:
    """Of (forgetting, loss on the second text) the point with the lowest loss, within ``level``, on the line through the looks."""
    points = [look for look in looks if look[0] <= level]
    for (before, high), (after, low) in itertools.pairwise(looks):
        if (before - level) * (after - level) < 0:
            points.append((level, high + (level - before) / (after - before) * (low - high)))
    return min(points, key=lambda point: point[1])


def adapted(model: nn.Module) -> nn.Module:
    """The model with PEFT's LoRA on every matrix of its blocks."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "k", "v", "out", "up", "down"]))


FINETUNE = Recipe(
    "What is learnt of a second text at equal forgetting of the first?", FinetuneRun, ARMS, Axis("lr", (2e-3,), ratio=3.0), 150, texts,
    {name: {f"second {level:g}": Column("loss on the second text", higher=False),
            f"forgetting {level:g}": Column("forgetting of the first", higher=False)} for name, level in LEVELS.items()},
)  # fmt: skip
