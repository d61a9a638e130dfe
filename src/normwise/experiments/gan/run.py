"""One run of the GAN: a strategy, a loss, a learning rate, strengths and a seed to the numbers that come out."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import normwise as nw
from normwise.experiments.catalog.gan import GAN_STRATEGIES
from normwise.experiments.framework.store import MAYBE, NUMBER, Form, Result, Run
from normwise.experiments.framework.timing import in_turn, milliseconds, seconds_each
from normwise.experiments.tasks.data.splits import ImageData
from normwise.experiments.tasks.fidelity import Judge
from normwise.experiments.tasks.models.dcgan import LOSSES, NOISE, Discriminator, Generator, Loss, brightest, scaled

_LAST = 3
_CURVE = ("step", "samples", "distance", "precision", "recall", "collapsed")
# Seed of the noise that is judged: one and the same in every run, and none that is trained on.
_JUDGED_NOISE = 20_000
# Added to a run's seed.
_NOISE, _BETWEEN = 10_000, 30_000
_CHUNK = 250
_BURST = 3


@dataclass(frozen=True)
class JudgedData(ImageData):
    """Images with the judge that was trained on them, so that both reach a worker together."""

    judge: Judge

    @staticmethod
    def of(data: ImageData, judge: Judge) -> JudgedData:
        return JudgedData(**{part.name: getattr(data, part.name) for part in fields(data)}, judge=judge)


@dataclass(frozen=True)
class GanRun(Run):
    """Everything that decides a run's outcome; two equal runs give equal numbers on one machine.

    steps: of both sides, one of the discriminator then one of the generator. batch: real images a step. width: of both networks.
    drawn: images judged at a mark. full: whether the run is one to report, judged by the test part at every mark, or a trial, judged by
    the validation part at its last marks. data: the split's fingerprint. versions: of normwise and torch.
    """

    strategy: str
    loss: str
    lr: float
    strengths: dict[str, float]
    seed: int
    steps: int
    batch: int
    width: int
    marks: int
    drawn: int
    full: bool
    data: str
    versions: tuple[str, str] = ("", "")
    kind: ClassVar[str] = "gan"

    @property
    def form(self) -> Form:
        curve: Form = dict.fromkeys(_CURVE, list)
        return {
            "distance": MAYBE, "diverged": bool, "steps": int, "samples": int, "seconds": NUMBER, "breaches": list, "curve": curve,
        }  # fmt: skip

    @property
    def amount(self) -> int:
        return self.steps * self.batch

    def told(self, result: Result) -> str:
        found = "diverged" if result["diverged"] else f"distance {result['distance']:.3f}"
        return f"{self.strategy} with the loss {self.loss}: {found}"

    def train(self, data: JudgedData, /) -> Result:
        return train(self, data)


class Training:
    """Both networks on their way: what a step needs, built from a run."""

    def __init__(self, run: GanRun, data: ImageData) -> None:
        torch.manual_seed(run.seed)
        self.generator = Generator(data.shape, run.width)
        self.discriminator = Discriminator(data.shape, run.width)
        self.loss: Loss = LOSSES[run.loss]
        self.strategy, self.strength = GAN_STRATEGIES[run.strategy], run.strengths.get("penalty", 0.0)
        self.strategy.wrap(self.discriminator)
        # Strategies are compared step by step: their noise must not depend on what one of them draws itself, nor repeat the weights'.
        self.noise, self.between = (torch.Generator().manual_seed(run.seed + offset) for offset in (_NOISE, _BETWEEN))
        self.generator_optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(side.parameters(), run.lr, self.loss.betas, fused=True) for side in (self.generator, self.discriminator)
        )
        sides = (
            (self.discriminator, self.discriminator_optimizer, self.strategy.rules(run.strengths)),
            (self.generator, self.generator_optimizer, self.strategy.generator_rules(run.strengths)),
        )
        self.controls = [nw.attach(model, optimizer, rules) for model, optimizer, rules in sides if rules]

    def step(self, real: Tensor) -> tuple[float, float]:
        """A step of the discriminator on real and as many drawn images, then one of the generator on the same drawn images as the new
        discriminator sees them. Gives both losses, penalty included, before their steps."""
        drawn = self.generator(torch.randn(len(real), NOISE, generator=self.noise))
        return self._discriminate(real, drawn.detach()), self._generate(drawn)

    def _discriminate(self, real: Tensor, drawn: Tensor) -> float:
        self.discriminator_optimizer.zero_grad()
        of_real, of_drawn = self.discriminator(torch.cat([real, drawn])).chunk(2)    # one pass: an image's logit depends on it alone
        loss = self.loss.discriminator(of_real, of_drawn)
        if self.strategy.penalty is not None:
            loss = loss + self.strength * self.strategy.penalty(self.discriminator, real, drawn, self.between)
        loss.backward()  # type: ignore[no-untyped-call]
        self.discriminator_optimizer.step()
        return loss.item()

    def _generate(self, drawn: Tensor) -> float:
        self.generator_optimizer.zero_grad()
        loss = self.loss.generator(self.discriminator(drawn))
        loss.backward(inputs=list(self.generator.parameters()))  # type: ignore[no-untyped-call]
        self.generator_optimizer.step()
        return loss.item()

    @torch.no_grad()
    def draw(self, count: int) -> Tensor:
        """``count`` images of the generator in evaluation mode, from noise that is the same in every run."""
        noise = torch.randn(count, NOISE, generator=torch.Generator().manual_seed(_JUDGED_NOISE))
        self.generator.eval()
        images = torch.cat([self.generator(chunk) for chunk in torch.split(noise, _CHUNK)])
        self.generator.train()
        return images


def batches(run: GanRun, data: ImageData) -> Iterator[Tensor]:
    """Real images in [-1, 1] without end: every epoch in its own order, which depends on the seed alone; a short last batch is left
    out."""
    samples, top, order = len(data.train), brightest(data), np.random.default_rng(run.seed)
    size = min(run.batch, samples)
    while True:
        for rows in order.permutation(samples)[: samples - samples % size].reshape(-1, size):
            yield scaled(data.train.images[rows], top)


def marks_of(run: GanRun) -> list[int]:
    """The steps after which a run is judged: evenly spread, the last at the end; a trial is judged at its last three only."""
    marks = sorted({max(1, round(run.steps * (mark + 1) / run.marks)) for mark in range(run.marks)})
    return marks if run.full else marks[-_LAST:]


def train(run: GanRun, data: JudgedData) -> Result:
    """Trains and judges. Plain numbers only, None in place of those that are not finite.

    Gives ``distance``, the mean over the last three marks so that one lucky moment decides nothing, ``diverged``, ``steps``,
    ``samples`` (real images shown), ``seconds``, ``breaches`` and the ``curve`` at the marks: step, samples, distance, precision,
    recall, collapsed. Training stops where a loss is not finite; such a run has diverged, and has no distance.
    """
    training, marks = Training(run, data), set(marks_of(run))
    reference = data.judge.references["test" if run.full else "validation"]
    seen: list[tuple[Any, ...]] = []
    started, step, diverged = time.perf_counter(), 0, False
    for step, real in enumerate(itertools.islice(batches(run, data), run.steps), start=1):
        diverged = not all(map(math.isfinite, training.step(real)))
        if diverged:
            break
        if step in marks:
            found = reference.judged(data.judge.features(training.draw(run.drawn)))
            seen.append((step, step * len(real), found.distance, found.precision, found.recall, reference.collapsed(found)))
    curve = {name: [line[k] for line in seen] for k, name in enumerate(_CURVE)}
    distances = curve["distance"][-_LAST:]
    diverged = diverged or None in distances
    return {
        "distance": None if diverged else sum(distances) / len(distances), "diverged": diverged, "steps": step,
        "samples": step * min(run.batch, len(data.train)), "seconds": time.perf_counter() - started,
        "breaches": [str(breach) for control in training.controls for breach in control.verify().breaches], "curve": curve,
    }  # fmt: skip


def score(results: Sequence[Result]) -> tuple[float, float]:
    """Higher is better: the share of runs that did not diverge, then minus their mean distance."""
    distances = [result["distance"] for result in results if not result["diverged"]]
    return len(distances) / len(results), -statistics.fmean(distances) if distances else float("-inf")


def step_times(runs: Sequence[GanRun], data: JudgedData, rounds: int) -> list[float]:
    """Milliseconds a step of each run: medians over ``rounds`` rounds, in which every run has a burst of steps in turn."""

    def burst(run: GanRun) -> Callable[[], float]:
        training, images = Training(run, data), batches(run, data)
        return lambda: seconds_each(training.step, itertools.islice(images, _BURST))

    return [milliseconds(seconds) for seconds in in_turn([burst(run) for run in runs], rounds)]
