"""``normwise bench control``: what max_norm and clip_grad_norm cost a step.

Against the memory that they must move, and against a loop over tensors.

Two models, each with nothing violated and with every block violated, everything interleaved in one process and the median of many:

- eight 2048×2048 layers: the control's own time over the time that its memory traffic takes at the bandwidth measured between its steps.
  It must read the weights and the gradients; where everything is violated it must also rewrite both, the gradients in a second pass,
  since a global norm is known only after all of them were read.
- 200 matrices of 64×64: a per-tensor loop that does the same rules, over the control's own time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.timing import in_turn, milliseconds, seconds

BARS = (Bar("ratio"),)
RADIUS = 1.0
ROUNDS = 30


def run(rounds: int = ROUNDS, threads: int | None = None) -> dict[str, Any]:
    """All four measurements; ``rounds`` repetitions each, medians in milliseconds."""
    if threads:
        torch.set_num_threads(threads)
    rows = [_traffic(violated, rounds) for violated in (False, True)]
    rows += [_against_loop(violated, rounds * 3) for violated in (False, True)]
    return {"bench": "control", "threads": torch.get_num_threads(), "rounds": rounds, "rows": rows}


class _Bench:
    """A stack of square layers whose weights and gradients are put back before every step, under a control that is timed."""

    def __init__(self, count: int, width: int, violated: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])
        self.weights = [p.detach() for p in self.model.parameters()]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.control = nw.attach(self.model, optimizer, [nw.max_norm(RADIUS), nw.clip_grad_norm(RADIUS)], timed=True)
        self.optimizer, self.length = optimizer, (2.0 if violated else 0.5)
        self.reset()

    def reset(self) -> None:
        """Rows of norm ``length``, and gradients of that norm all together: inside or outside of the bound 1."""
        for w in self.weights:
            w.fill_(self.length / w.shape[1] ** 0.5)
        total = sum(w.numel() for w in self.weights)
        for p in self.model.parameters():
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
            p.grad.fill_(self.length / total**0.5)

    def own_time(self) -> float:
        """Seconds that one step spends in the control's hooks."""
        self.reset()
        before = self.control.seconds
        self.optimizer.step()
        return self.control.seconds - before

    def loop_time(self) -> float:
        """Seconds of the same rules written as loops over the tensors."""
        self.reset()
        return seconds(lambda: _loop(list(self.model.parameters())))


@torch.no_grad()
def _loop(params: Sequence[nn.Parameter]) -> None:
    grads = [p.grad for p in params if p.grad is not None]
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    factor = (RADIUS / total).clamp(max=1.0)
    for g in grads:
        g.mul_(factor)
    for p in params:
        norms = torch.linalg.vector_norm(p, dim=1, keepdim=True)
        p.mul_((RADIUS / norms.clamp(min=1e-12)).clamp(max=1.0))


def _traffic(violated: bool, rounds: int) -> dict[str, Any]:
    bench = _Bench(8, 2048, violated)
    grads = [p.grad for p in bench.model.parameters() if p.grad is not None]

    def over(what: Callable[[Tensor], object]) -> float:
        """Seconds that all weights, and then all gradients, take."""
        return sum(seconds(lambda tensors=tensors: [what(t) for t in tensors]) for tensors in (bench.weights, grads))  # type: ignore[misc]

    own, read, rewrite = in_turn(
        [bench.own_time, lambda: over(Tensor.sum), lambda: over(lambda t: t.mul_(1.0))], rounds, threads=None
    )
    must = [r / 2 + w if violated else r for r, w in zip(read, rewrite, strict=True)]
    size = sum(t.numel() * t.element_size() for t in [*bench.weights, *grads])
    return {
        "case": f"8 layers of 2048x2048, {_state(violated)}", "own_ms": milliseconds(own), "must_ms": milliseconds(must),
        "ratio": statistics.median(a / b for a, b in zip(own, must, strict=True)), "bar": 1.5, "bar_is": "at most",
        "read_gb_s": size / statistics.median(read) / 1e9, "rewrite_gb_s": 2 * size / statistics.median(rewrite) / 1e9,
    }  # fmt: skip


def _against_loop(violated: bool, rounds: int) -> dict[str, Any]:
    bench = _Bench(200, 64, violated)
    loop, own = in_turn([bench.loop_time, bench.own_time], rounds, warm_up=5, threads=None)
    return {
        "case": f"200 matrices of 64x64, {_state(violated)}", "own_ms": milliseconds(own), "loop_ms": milliseconds(loop),
        "ratio": statistics.median(a / b for a, b in zip(loop, own, strict=True)), "bar": 3.0, "bar_is": "at least",
    }  # fmt: skip


def _state(violated: bool) -> str:
    return "every block violated" if violated else "nothing violated"
