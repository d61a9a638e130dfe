"""What trainers clip themselves, beside rules that do the same: never twice without a word."""

from __future__ import annotations

import warnings

from normwise.policy import Policy
from normwise.policy.rule import EVERYTHING


def replaced(policy: Policy, setting: str, off: str, by_norm: bool = True) -> bool:
    """Whether a rule takes the place of a trainer's own clipping of the norm of all gradients. Warns of that, and where both act.

    Args:
        setting: how the trainer was told to clip, as its user writes it: ``"max_grad_norm=1.0"``.
        off: how it is told not to: ``"max_grad_norm=0.0"``.
        by_norm: False where it clips every entry instead, which no bound on the norm takes the place of.
    """
    whole = [r for r in policy if r.on == "grad" and r.per == "global" and r.params == EVERYTHING]
    clips = [r for r in whole if r.action in ("clip_norm", "normalize")]
    after = [r for r in policy if r.on == "grad" or r.action == "penalty"]
    if clips and by_norm:
        warnings.warn(
            f"the trainer's own clipping ({setting}) is off, since rule '{clips[0].label()}' takes its place. Write {off}, and this "
            "warning goes.",
            stacklevel=3,
        )
    elif after:
        warnings.warn(
            f"the trainer clips gradients first ({setting}), and rule '{after[0].label()}' acts on what that leaves. To turn the first "
            f"off, write {off}; to clip after penalties, add nw.clip_grad_norm to the rules as well.",
            stacklevel=3,
        )
    return bool(clips) and by_norm
