"""What the rows of several tables are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import normwise as nw
from normwise.experiments.framework.lattice import Axis

Strengths = Mapping[str, float]
BASELINE = "nothing"
"""The row that the others are compared with."""


def axis(name: str, centre: float, ratio: float = 2.0, off: int = 0, most: float = math.inf) -> Axis:
    """An endless axis around a value."""
    return Axis(name, (centre,), ratio=ratio, off=off, most=most)


def rule(name: str, *strengths: str, **fixed: Any) -> Callable[..., list[Any]]:
    """The rule of this name, with these strengths as its first arguments."""

    def rules(numbers: Strengths, samples: int = 0) -> list[Any]:
        return [getattr(nw, name)(*(numbers[strength] for strength in strengths), **fixed)]

    return rules
