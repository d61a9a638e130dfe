"""How to tell whether gradients are still those that were looked at, without a copy of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from normwise.engine.sharded import here


class Marks:
    """Which gradients some parameters had, and how often each had been written to. ``skip``: what was decided about their step."""

    def __init__(self, params: Sequence[nn.Parameter], skip: bool = False) -> None:
        self.skip = skip
        self._marks = [_mark(p.grad) for p in params]

    def still(self, params: Sequence[nn.Parameter]) -> bool:
        """Whether no gradient was computed, dropped or changed since."""
        return all(_is_marked(p.grad, mark) for p, mark in zip(params, self._marks, strict=True))


def _mark(grad: Tensor | None) -> tuple[TensorWeakRef, int] | None:
    return None if grad is None else (TensorWeakRef(grad), here(grad)._version)


def _is_marked(grad: Tensor | None, mark: tuple[TensorWeakRef, int] | None) -> bool:
    if grad is None or mark is None:
        return grad is None and mark is None
    return mark[0]() is grad and mark[1] == here(grad)._version
