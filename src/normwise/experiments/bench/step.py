"""``normwise bench step``: what an optimizer step costs against torch's, and what its state weighs.

All is interleaved in one process.

- The AdamW preset against ``torch.optim.AdamW(fused=True)``, and Muon against ``torch.optim.Muon`` on the matrices alone: on the
  parameters of a GPT of 4.8M (six layers, width 256), and on 200 matrices of 64×64. The order of the two alternates, and the ratio is
  the median over the pairs, so that a slow moment of the machine strikes both alike. Muon's own iteration is torch's arithmetic.
- Every preset's state in bytes per fp32 parameter, over the routed parameters of a small model that has each role.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.timing import in_turn, milliseconds, seconds
from normwise.optim import PRESETS, AdamW, Muon

BARS = (Bar("ratio"),)
ROUNDS = 60
WARM_UP = 5
LAYERS, WIDTH, VOCABULARY, CONTEXT = 6, 256, 103, 128
SMALL = [(64, 64)] * 200

Shapes = Sequence[tuple[int, ...]]


def gpt_shapes() -> list[tuple[int, ...]]:
    """The parameters of a GPT of 4.8M: per layer attention, feed-forward, two normalisations; tied head."""
    w = WIDTH
    layer: list[tuple[int, ...]] = [(3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,), (w,), (w,), (w,), (w,)]
    return [(VOCABULARY, w), (CONTEXT, w), *layer * LAYERS, (w,), (w,)]


def run(rounds: int = ROUNDS, threads: int | None = None) -> dict[str, Any]:
    """All measurements; ``rounds`` pairs of steps each, medians in milliseconds."""
    if threads:
        torch.set_num_threads(threads)
    gpt = gpt_shapes()
    matrices, count = [s for s in gpt[2:] if len(s) == 2], sum(torch.Size(s).numel() for s in gpt)
    fused, fast = partial(torch.optim.AdamW, fused=True), partial(Muon, polar="fast")
    rows = [
        _pair("AdamW", f"GPT, {count / 1e6:.1f}M in {len(gpt)} tensors", gpt, fused, AdamW, rounds, 1.1),
        _pair("AdamW", "200 matrices of 64x64", SMALL, fused, AdamW, rounds * 3, 1.1),
        _pair("Muon", f"GPT's {len(matrices)} matrices", matrices, torch.optim.Muon, Muon, max(rounds // 3, 1), 1.1),
        _pair("Muon, polar='fast'", f"GPT's {len(matrices)} matrices", matrices, torch.optim.Muon, fast, max(rounds // 3, 1), 1.0),
        _pair("Muon", "200 matrices of 64x64", SMALL, torch.optim.Muon, Muon, max(rounds // 3, 1), 0.5),
    ]
    memory = [{"preset": name, "state_bytes_per_parameter": state_bytes(build)} for name, build in PRESETS.items()]
    return {"bench": "step", "threads": torch.get_num_threads(), "rounds": rounds, "rows": rows + memory}


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Parameters with gradients, the same at every call."""
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(s, generator=gen)) for s in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn(p.shape, generator=gen)
    return params


Build = Callable[[list[nn.Parameter]], Optimizer]


def _pair(preset: str, case: str, shapes: Shapes, theirs: Build, ours: Build, rounds: int, bar: float) -> dict[str, Any]:
    a, b = theirs(parameters(shapes)), ours(parameters(shapes))
    theirs_s, ours_s = in_turn(
        [lambda: seconds(a.step), lambda: seconds(b.step)], rounds, warm_up=WARM_UP, threads=None, alternate=True
    )
    return {
        "preset": preset, "case": case, "torch_ms": milliseconds(theirs_s), "own_ms": milliseconds(ours_s),
        "ratio": statistics.median(y / x for x, y in zip(theirs_s, ours_s, strict=True)), "bar": bar, "bar_is": "at most",
    }  # fmt: skip


class _Roles(nn.Module):
    """A little of every role, in a language model's proportions: mostly hidden matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50)


def state_bytes(build: Callable[..., Optimizer]) -> float:
    """Bytes of state per parameter after a step on a small model; step counts and other numbers of one entry are left out."""
    torch.manual_seed(0)
    model = _Roles()
    optimizer = build(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.numel() > 1]
    return sum(v.numel() * v.element_size() for v in kept) / sum(p.numel() for p in model.parameters())
