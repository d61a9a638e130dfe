"""The threshold at which soft-thresholding lands on the L1 sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.norms.base import Radius, column
from normwise.norms.reduce import sum_abs, up, wide


def clamp_symmetric(x: Tensor, bound: Radius) -> Tensor:
    """Every entry into [−bound, bound]; the bound is a number or broadcasts against ``x``."""
    if isinstance(bound, Tensor):
        limit = bound.to(x.dtype)
        return torch.clamp(x, -limit, limit)
    bound = min(bound, torch.finfo(x.dtype).max)    # a number that the dtype cannot hold is refused by clamp
    return torch.clamp(x, -bound, bound)


def lowered_to(size: Tensor, radius: Radius) -> Tensor:
    """max(size − θ, 0) with θ ≥ 0 such that the sum is the radius, for sizes ≥ 0 whose sum is above it, ``(b, n)`` in a wide dtype.

    By sorting (Held, Wolfe & Crowder, 1974; Duchi et al., 2008). In terms of how far each size is below the largest, which is exact, and
    not of θ itself: of sizes a million radii large θ would have lost the digits that the radius is made of.
    """
    below = size - size.amax(1, keepdim=True)
    ordered = below.sort(dim=1, descending=True).values
    counts = torch.arange(1, size.shape[1] + 1, device=size.device, dtype=size.dtype)
    left = (column(radius, size) - ordered.cumsum(1)) / counts    # of the largest, if so many are left
    active = (ordered + left > 0).sum(1, keepdim=True).clamp(min=1)
    return (below + left.gather(1, active - 1)).clamp(min=0)


def project_l1(x: Tensor, radius: Radius) -> Tensor:
    """The nearest point of the L1 ball, row by row; rows inside, and rows that are not finite, come back as they are."""
    total = sum_abs(x)
    limit = radius if not isinstance(radius, Tensor) else radius.to(total.dtype)
    outside = (total > limit) & total.isfinite()
    work = up(x)
    if x.shape[1] == 0:
        return x.clone()
    lowered = lowered_to(work.abs().to(wide(x.device)), limit)
    return torch.where(outside[:, None], torch.copysign(lowered, work).to(work.dtype), work).to(x.dtype)
