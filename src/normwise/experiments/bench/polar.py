"""``normwise bench polar``: the polar factor against torch.optim.Muon's own iteration.

Speed and error, in one process.

Both orthogonalise the same fp32 matrices, on a CUDA device, where there is one, of the shapes of GPT-2 of 124M. torch's function is called
one matrix after the other, as torch.optim.Muon calls it.
The two are timed alternately, so that what else the machine does falls on both, in a process that has freed a block of 30 MB before, as
any training step has: until then malloc hands every temporary of a few megabytes back to the system, and both pay for fresh pages.
"""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.pool import on_threads
from normwise.experiments.framework.timing import device, in_turn, milliseconds, seconds
from normwise.norms.decompose import svd
from normwise.norms.linalg import polar

BARS = (Bar("faster", sense="at least"), Bar("ours_max", "torch_max"), Bar("ours_median", "torch_median"))
FASTER = {(200, 64, 64): 10.0, (24, 256, 256): 1.5, (12, 1024, 256): 1.3, (8, 1024, 1024): 1.25}
ON_CUDA = {(12, 768, 768): 2.0, (12, 2304, 768): 2.0, (12, 3072, 768): 2.0}
TORCH_STEPS = (3.4445, -4.7750, 2.0315)
MEASURED = 12     # how many matrices of a batch the error is measured on: a float64 SVD costs far more than the iteration
FREED = 30 << 20  # bytes: a block that large is freed once before anything is timed; above 32 MB glibc would learn nothing from it
RELEVANT = 0.01   # errors are summarised over the singular values above this share of the largest


def run(repeats: int = 15, threads: int = 2) -> dict[str, Any]:
    """Measures every shape on every kind of input; returns ``{"rows": [...], ...}``, one row a shape and input.

    repeats: timed rounds a cell. threads: torch's intra-op threads while it runs.
    """
    with on_threads(threads):
        torch.ones(FREED, dtype=torch.uint8)    # and freed at once
        rows = []
        for shape, bar in (ON_CUDA if device() == "cuda" else FASTER).items():
            for kind, make in INPUTS.items():
                print(f"{shape[0]} of {shape[1]}×{shape[2]}, {kind} …", file=sys.stderr, flush=True)
                rows.append(_measure(kind, shape, make(shape).to(device()), repeats, bar))
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device() == "cuda":
        machine = torch.cuda.get_device_name()
    return {"bench": "polar", "repeats": repeats, "threads": threads, "torch": torch.__version__, "machine": machine, "rows": rows}


def torch_iteration(x: Tensor) -> list[Tensor]:
    """torch.optim.Muon's five bf16 steps, matrix by matrix."""
    function = import_module("torch.optim._muon")._zeropower_via_newtonschulz
    return [function(matrix, TORCH_STEPS, 5, 1e-7) for matrix in x.unbind()]


def _measure(kind: str, shape: tuple[int, int, int], x: Tensor, repeats: int, bar: float) -> dict[str, Any]:
    theirs, ours = in_turn([lambda: seconds(lambda: torch_iteration(x)), lambda: seconds(lambda: polar(x))], repeats, threads=None)
    few = x[:MEASURED if shape[1] * shape[2] < 1 << 20 else 2]
    torch_max, torch_median = errors(few, torch.stack(torch_iteration(few)))
    ours_max, ours_median = errors(few, polar(few))
    faster = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    met = faster >= bar and ours_max <= torch_max and ours_median <= torch_median
    return {"matrices": "{} of {}×{}".format(*shape), "input": kind, "torch_ms": milliseconds(theirs), "ours_ms": milliseconds(ours),
            "faster": faster, "bar": bar, "torch_max": torch_max, "ours_max": ours_max, "torch_median": torch_median,
            "ours_median": ours_median, "met": met}  # fmt: skip


def errors(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(max, median) of ``|σ - 1|`` over the input's singular values above 0.01 σ₁, by float64 SVD of the input.

    σ of a result Y is uᵀ Y v on the input's own singular vectors: what became of that singular value.
    """
    u, s, vh = svd(x.double())
    became = torch.einsum("bmk,bmn,bkn->bk", u, y.double(), vh)
    error = (became - 1).abs()[s > RELEVANT * s[:, :1]]
    return float(error.max()), float(error.median())


def gaussian(shape: tuple[int, int, int]) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def log_uniform(shape: tuple[int, int, int]) -> Tensor:
    """Singular values log-uniform in [1e-3, 1], the largest exactly 1, between random orthogonal factors."""
    batch, m, n = shape
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(batch, m, min(m, n), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(batch, n, min(m, n), generator=generator))
    s = 10 ** (-3 * torch.rand(batch, 1, min(m, n), generator=generator))
    s[..., 0] = 1.0
    return (left * s) @ right.mT


def momenta(shape: tuple[int, int, int]) -> Tensor:
    """Momentum buffers (0.95) of the (m, n) matrices of a residual character model, recorded while it trains."""
    batch, m, n = shape
    torch.manual_seed(2)
    model = _CharacterModel(m, n, layers=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.95, nesterov=True)
    topics: dict[str, str] = import_module("pydoc_data.topics").topics    # text that needs no download
    text = torch.tensor(list("".join(topics[k] for k in sorted(topics)).encode("latin-1", "replace")))
    recorded: list[Tensor] = []
    generator = torch.Generator().manual_seed(3)
    for step in range(10 + -(-batch // 4)):
        starts = torch.randint(0, len(text) - CONTEXT - 1, (128,), generator=generator)
        window = text[starts[:, None] + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(window[:, :-1]), window[:, -1]))
        optimizer.step()
        if step >= 10:
            recorded += [optimizer.state[weight]["momentum_buffer"].clone() for weight in model.up_projections()]
    return torch.stack(recorded[:batch])


INPUTS: dict[str, Callable[[tuple[int, int, int]], Tensor]] = {
    "Gaussian": gaussian, "log-uniform": log_uniform, "momenta": momenta}
CONTEXT = 16


class _CharacterModel(nn.Module):
    """The next character from the ``CONTEXT`` before it: an embedding of each place, then residual blocks n -> m -> n."""

    def __init__(self, m: int, n: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256 * CONTEXT, n)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(n, m, bias=False), nn.ReLU(), nn.Linear(m, n, bias=False)) for _ in range(layers))
        self.head = nn.Linear(n, 256)

    def up_projections(self) -> list[nn.Parameter]:
        """The (m, n) weights, block by block."""
        return [p for name, p in self.blocks.named_parameters() if name.endswith(".0.weight")]

    def forward(self, window: Tensor) -> Tensor:
        x = self.embedding(window + 256 * torch.arange(CONTEXT)).sum(1) / CONTEXT**0.5
        for block in self.blocks:
            x = x + block(nn.functional.layer_norm(x, x.shape[-1:]))
        logits: Tensor = self.head(x)
        return logits
