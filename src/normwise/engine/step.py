"""One step of one optimizer, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from normwise.engine.pack import Member


@dataclass
class Turn:
    """What one step of one optimizer is given: everything that a rule may ask of the world around it."""

    optimizer: int
    step: Callable[[], int]
    """The number of steps done; a function, since under a fused GradScaler knowing it costs a synchronisation."""
    rate: Callable[[Member], Any] = lambda member: 1.0
    """η of the parameter's group."""
    happened: Tensor | None = None
    """1 where the step is taken, 0 where GradScaler skips it; None where it is certain."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """The weights before the step by id(parameter), where a rule on updates needs them."""
    spanning: bool = False
    """The gradient phase of every optimizer at once."""
    ascends: Callable[[Member], bool] | None = None
    """Whether the parameter's group has ``maximize=True``; None where no group has."""
    tell: Callable[[str], None] = lambda message: None
    """Warns the user, once a message."""
