"""Rules as sets, and what you would write in your training loop without normwise: torch's own functions and short loops over tensors.

The code by hand is given lists that are made before the clock starts, though most loops make them at every step. Where there are two ways
to write a rule, both are timed and the faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.experiments.bench.cells.networks import Weight

RADIUS = 1.0    # of every rule: the states say where weights and gradients are
MATRICES = ("role:hidden", "role:conv")

Before = Callable[[Sequence[nn.Parameter]], object]
After = Callable[[Sequence[Weight]], object]


def clip(params: Sequence[nn.Parameter]) -> None:
    """The clip of nearly every training loop."""
    torch.nn.utils.clip_grad_norm_(params, RADIUS, foreach=True, error_if_nonfinite=False)


@torch.no_grad()
def loop(weights: Sequence[Weight]) -> None:
    """Max-norm as Keras does it, a tensor at a time."""
    for w in weights:
        norms = torch.linalg.vector_norm(w.tensor, dim=w.others, keepdim=True)
        w.tensor.mul_((RADIUS / norms.clamp(min=1e-12)).clamp(max=1.0))


@torch.no_grad()
def renorm(weights: Sequence[Weight]) -> None:
    """Max-norm by torch's own function for it."""
    for w in weights:
        w.tensor.renorm_(2.0, w.axis, RADIUS)


@torch.no_grad()
def clamp(weights: Sequence[Weight]) -> None:
    for w in weights:
        w.tensor.clamp_(-RADIUS, RADIUS)


@torch.no_grad()
def clamp_foreach(weights: Sequence[Weight]) -> None:
    tensors = [w.tensor for w in weights]
    torch._foreach_clamp_min_(tensors, -RADIUS)
    torch._foreach_clamp_max_(tensors, RADIUS)


@torch.no_grad()
def decompose(weights: Sequence[Weight]) -> None:
    """A spectral cap: the singular value decomposition of each matrix, which is put together again where the largest is above."""
    for w in weights:
        for matrix in w.each_matrix():
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            if s[0] > RADIUS:
                matrix.copy_((u * s.clamp(max=RADIUS)) @ v)


@dataclass(frozen=True)
class RuleSet:
    """Rules with what does the same by hand. sets: what the states set, ``"rows"``, ``"entries"`` or ``"singular values"``."""

    name: str
    rules: Callable[[], list[Any]]
    sets: str = ""
    before: Before | None = None
    after: dict[str, After] = field(default_factory=dict)

    @property
    def gradients(self) -> bool:
        return self.before is not None

    def by_hand(self) -> dict[str, tuple[Before | None, After | None]]:
        """Each way to write it, by name: what runs before the optimizer's step and what after it."""
        if not self.after:
            return {"clip_grad_norm_": (self.before, None)}
        return {name: (self.before, after) for name, after in self.after.items()}


_BOUND: dict[str, After] = {"loop": loop, "renorm": renorm}
MAX_NORM, CLIP, BOTH, VALUE, CAP, CAP_WITHIN = "max_norm", "clip_grad_norm", "both", "clip_weight_value", "spectral_cap", "spectral_cap 1%"
RULE_SETS = {
    one.name: one for one in (
        RuleSet(MAX_NORM, lambda: [nw.max_norm(RADIUS)], "rows", after=_BOUND),
        RuleSet(CLIP, lambda: [nw.clip_grad_norm(RADIUS)], before=clip),
        RuleSet(BOTH, lambda: [nw.max_norm(RADIUS), nw.clip_grad_norm(RADIUS)], "rows", clip, _BOUND),
        RuleSet(VALUE, lambda: [nw.clip_weight_value(RADIUS)], "entries", after={"clamp_": clamp, "foreach clamp": clamp_foreach}),
        RuleSet(CAP, lambda: [nw.spectral_cap(RADIUS, MATRICES, optional=True)], "singular values", after={"svd": decompose}),
        RuleSet(CAP_WITHIN, lambda: [nw.spectral_cap(RADIUS, MATRICES, optional=True, tolerance=0.01)], "singular values",
                after={"svd": decompose}),
    )
}  # fmt: skip


def acted_on(control: nw.Control, weights: Sequence[Weight]) -> list[Weight]:
    """The weights that the control's rules bound, for the code by hand to bound the same."""
    bound = {id(m.param) for b in control.engine.rules if b.phase == "weight" for m in b.members}
    return [w for w in weights if id(w.tensor) in bound]
