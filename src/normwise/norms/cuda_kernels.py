"""What :mod:`normwise.norms.native` does on a CPU, on a CUDA device: L2 norms and bounds in one or two launches for all tensors of a shape.

The kernels are written in Triton, which torch's CUDA builds bring. Without it, on a device that it cannot build for, or with
``NORMWISE_KERNELS=0`` set, torch's calls do the same; both are right to the last digits of fp32, which may differ.

Nothing is read back: norms, factors and aims stay on the device, no call waits for it, and a CUDA graph may hold a step. A graph keeps the
addresses of the tensors that it was captured with, so while one is captured a workspace takes only tensors that lie where they lay before.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normwise.norms.native import KINDS, SWITCH, Axes

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 1024
"""Entries that a program works on at once: eight for each thread of four warps."""
LONG = 1 << 15
"""Entries of a block from which on several programs share it, in two launches."""
SHORTEST, PIECES = 1 << 14, 4096
"""Of the pieces that blocks are cut into then: entries at least, and how many there are about at most."""
GRAM_FROM, GRAM_TILE = 512, (128, 64)
"""The shorter side from which on half of X Xᵀ is computed and mirrored. Not yet measured."""
_ABOUT = operator.attrgetter("dtype", "device")


@cache
def library() -> Any | None:
    """The kernels; None where they are switched off, or Triton is not there."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return import_module("normwise.norms.triton_kernels")
    except ImportError:
        return None


def ready(device: torch.device) -> bool:
    """Whether the kernels run on a device. They are tried there once, which takes seconds where they were never built."""
    if device.type not in DEVICES or library() is None:
        return False
    return not captures(device) and _tried(device)


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing can be built or sent to the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _tried(device: torch.device) -> bool:
    x = torch.full((4,), 2.0, device=device)
    workspace = Workspace([x], (1, 1, 4)).aim(math.inf)
    try:
        return workspace.place([x]) and float(bound_([x], workspace)[0]) == 4.0
    except Exception:    # no C compiler for Triton's launcher, a device that is too old, a driver that does not fit
        return False


@cache
def _products_tried(device: torch.device) -> bool:
    """As ``_tried``, of products: odd shapes, against torch's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16    # Triton's interpreter has no products in bf16
    x = torch.arange(130 * 36, device=device).remainder(7).sub(3).view(130, 36).to(dtype)
    try:
        return torch.equal(_gram(x[None], None, 0.0, 1.0)[0], x @ x.mT)    # of small whole numbers, so that no order of summing matters
    except Exception:
        return False


def fit(tensors: Sequence[Any]) -> bool:
    """Whether the kernels can read and write these: plain tensors of one dtype on one CUDA device, each in one stretch of memory."""
    if not set(map(type, tensors)) <= KINDS or len(about := set(map(_ABOUT, tensors))) != 1:
        return False
    dtype, device = about.pop()
    return dtype in DTYPES and device.type in DEVICES and all(map(Tensor.is_contiguous, tensors))


class Workspace:
    """Where the kernels find tensors of these shapes, and put what they find: made once for tensors that are looked at again and again.

    Args:
        like: tensors of the shapes, the dtype and the device of those that are given later.
        axes: how all of them are seen, where they have one shape; None for all of them together as one block.
    """

    def __init__(self, like: Sequence[Tensor], axes: Axes | None) -> None:
        self.about, self.axes, self.tensors = _ABOUT(like[0]), axes, len(like)
        self.norms = torch.zeros(1 if axes is None else len(like) * axes[1], dtype=torch.float64, device=like[0].device)
        self.factors = torch.ones_like(self.norms)
        self.pieces: Tensor | None = None
        if axes is None or (axes[0] == 1 and axes[2] >= LONG):
            self._cut([t.numel() for t in like])
        self._last: list[int] = []
        self._captured: list[Tensor] = []    # what a graph reads must live as long as it may be replayed

    def _cut(self, sizes: Sequence[int]) -> None:
        """Into pieces of about one length: (tensor, from, to, block) each, those of a block side by side."""
        length = max(SHORTEST, -(-sum(sizes) // PIECES // TILE) * TILE)
        _, units, size = self.axes or (1, 1, 0)
        blocks = [(t, u * size, u * size + (size or n)) for t, n in enumerate(sizes) for u in range(units)]
        cut = [(t, a, min(a + length, to), 0 if self.axes is None else b) for b, (t, start, to) in enumerate(blocks)
               for a in range(start, to, length)]  # fmt: skip
        ends = [0, *(i for i in range(1, len(cut)) if cut[i][3] != cut[i - 1][3]), len(cut)]
        device = self.norms.device
        self.pieces, self.ends = torch.tensor(cut, device=device), torch.tensor(ends, device=device)
        self.sums = torch.empty(len(cut), dtype=torch.float64, device=device)
        self._even = all(start % 16 == 0 for _, start, _, _ in cut)

    def aim(self, radius: float | Tensor) -> Workspace:
        """At a number, or at one a block."""
        given = radius if isinstance(radius, Tensor) else torch.full((1,), radius, dtype=torch.float64, device=self.norms.device)
        self.aims = given.to(torch.float64).contiguous()
        self.each = int(isinstance(radius, Tensor))
        return self

    def place(self, tensors: Sequence[Any]) -> bool:
        """Notes where tensors lie now; False where the kernels cannot work on them, or a graph that is captured would not find them."""
        if len(tensors) != self.tensors or not fit(tensors) or _ABOUT(tensors[0]) != self.about:
            return False
        now, captured = list(map(Tensor.data_ptr, tensors)), captures(self.norms.device)
        if now != self._last:
            if captured or not all(address or not t.numel() for address, t in zip(now, tensors, strict=True)):
                return False
            addresses = torch.tensor(now)
            pinned = addresses.pin_memory() if self.norms.is_cuda else addresses    # so that copying it does not wait for the device
            self.at, self._last = pinned.to(self.norms.device, non_blocking=True), now
            self.aligned = all(address % 16 == 0 for address in now)
        if captured:
            self._captured += [self.at, self.aims]
        return True


def bound_(tensors: Sequence[Tensor], workspace: Workspace, sphere: bool = False) -> tuple[Tensor, Tensor]:
    """Brings each block whose L2 norm is above what the workspace aims at onto it, in place; on a sphere each block but zero.

    Returns the norms before and what the blocks were multiplied by, ``(blocks,)`` in float64 on the device. Both are the workspace's, and
    overwritten by the next call. Blocks whose norms are not finite stay as they are, with a factor of 1. Tensors must have been placed.
    """
    kernels, w = _kernels(), workspace
    common, results = (w.at, tensors[0]), (w.aims, w.each, w.norms, w.factors)
    with torch.cuda.device_of(tensors[0]):    # type: ignore[no-untyped-call]
        if w.pieces is not None:
            count, aligned = len(w.pieces), w.aligned and w._even
            kernels.square_pieces[(count,)](*common, w.pieces, w.sums, EXACT=sphere, ALIGNED=aligned, K=TILE)
            kernels.scale_pieces[(count,)](*common, w.pieces, w.ends, w.sums, *results, SPHERE=sphere, ALIGNED=aligned, K=TILE)
        else:
            outer, units, inner = w.axes or (1, 1, 1)
            # Along rows few units at once, whose entries lie side by side; along columns many, which do so themselves.
            entries = min(TILE, 1 << (-(-inner // 4) - 1).bit_length()) if outer == 1 else 32 if inner == 1 else 64
            rows, grid = TILE // entries, (-(-units // (TILE // entries)), len(tensors))
            kernels.bound_blocks[grid](*common, *results, units, inner, outer * inner, SPHERE=sphere, ROWS=outer == 1,
                                       ALIGNED=w.aligned, B=rows, K=entries)  # fmt: skip
    increment_version(list(tensors))
    return w.norms, w.factors


def gram(x: Tensor, base: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor | None:
    """beta·base + alpha·x xᵀ of wide matrices ``(..., m, n)`` in bf16 or fp16, summed in fp32; half of it is computed, and mirrored.

    ``base``, (..., m, m), must be symmetric. None where torch's product serves as well or the kernels cannot.
    """
    m, n = x.shape[-2:]
    if m < GRAM_FROM or x.dtype not in DTYPES[1:] or torch.compiler.is_compiling() or not ready(x.device):
        return None
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):    # Triton has no tensor cores there, torch has
        return None
    if not _products_tried(x.device):
        return None
    found = _gram(x.reshape(-1, m, n), base, beta, alpha)
    return found.view(*x.shape[:-1], m)


def _gram(x: Tensor, base: Tensor | None, beta: float, alpha: float) -> Tensor:
    """Of a batch (b, m, n)."""
    count, m, n = x.shape
    out = torch.empty((count, m, m), dtype=x.dtype, device=x.device)
    added = out if base is None else base.contiguous()
    tile, k = GRAM_TILE
    tiles = -(-m // tile)
    with torch.cuda.device_of(x):    # type: ignore[no-untyped-call]
        _kernels().gram[tiles, tiles, count](
            x, added, out, m, n, *x.stride(), beta, alpha, ADDS=base is not None, T=tile, K=k, num_warps=8
        )
    return out


def _kernels() -> Any:
    found = library()
    assert found is not None, "ask ready() first"
    return found
