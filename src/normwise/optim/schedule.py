"""The learning rate over a run: a warm-up, then a fall to zero. A torch scheduler, for any optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normwise.errors import PolicyError, nearest
from normwise.policy.schedules import count, is_number

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t, "hold": lambda t: t, "sqrt": lambda t: 1 - math.sqrt(1 - t), "cooldown": lambda t: 1 - math.sqrt(1 - t),
    "concave": lambda t: 1 - (1 - t) ** 2, "flat": lambda t: 1.0,
}  # fmt: skip
"""The fall, by the share of its steps that is left."""


def schedule(optimizer: Optimizer, steps: int, shape: str = "linear", warm_up: float = 0.05) -> LambdaLR:
    """A scheduler that warms the learning rates up and then lets them fall to zero over the run: what ``auto`` was chosen with.

    >>> optimizer = normwise.optim.auto(model)
    >>> schedule = normwise.optim.schedule(optimizer, steps=1000)
    >>> # in the loop, after optimizer.step(): schedule.step()

    Every group rises to its own rate and falls in proportion. ``schedule.state_dict()`` belongs in a checkpoint, as with any scheduler of
    torch. A norm that is held, as on spheres, takes the concave shapes better, since nothing else makes its steps smaller.

    Args:
        optimizer: any; its rates now are the highest ones.
        steps: of the whole run, the warm-up with it. Beyond them the rate stays 0, and the first step there warns.
        shape: of the fall, with t from 0 to 1: ``"linear"`` 1 − t; ``"sqrt"`` 1 − √t; ``"concave"`` 1 − t²; ``"hold"`` held for half of
            the run, then linear; ``"cooldown"`` held for four fifths, then 1 − √t (Hägele et al., 2024, arXiv 2405.18392); ``"flat"`` none.
        warm_up: the share of the steps in which the rate rises in equal parts, at least one step; 0.05, as in every race of docs/race.md.

    Raises:
        PolicyError: no whole number of steps >= 1, an unknown shape, a warm-up outside [0, 1).
        TypeError: what is no optimizer, as torch's schedulers raise.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"schedule was given {optimizer!r:.60}, and needs a torch optimizer: give the one that steps.")
    return LambdaLR(optimizer, Rate(steps, shape, warm_up))


class Rate:
    """The rate at a step, counted from 0, as a share of the highest. A class, since torch saves those and no lambdas."""

    def __init__(self, steps: int, shape: str = "linear", warm_up: float = 0.05) -> None:
        count(steps, "steps", least=1)
        if shape not in SHAPES:
            raise PolicyError(f"shape is {shape!r}.{nearest(str(shape), SHAPES)}")
        if not is_number(warm_up) or not 0 <= warm_up < 1:
            raise PolicyError(f"warm_up is {warm_up!r}, but it is the share of the steps that warm up: 0 or more, and less than 1.")
        self.steps, self.shape, self.warm_up, self.told = steps, shape, float(warm_up), False

    def __call__(self, step: int) -> float:
        warm = max(1, round(self.warm_up * self.steps)) if self.warm_up else 0
        if step < warm:
            return (step + 1) / warm
        if step > self.steps and self.shape != "flat" and not self.told:
            self.told = True
            warnings.warn(f"the schedule ended after {self.steps} steps: the rate is 0 from there on, and nothing is learnt. "
                          "Give the steps of the whole run.", stacklevel=5)    # fmt: skip
        begin = max(warm, {"hold": self.steps // 2, "cooldown": round(0.8 * self.steps)}.get(self.shape, 0))
        return SHAPES[self.shape](min(1.0, max(0, self.steps - step) / max(1, self.steps - begin)))
