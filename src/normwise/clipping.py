"""``nw.clip_grad_norm_``: torch's function, safe against overflow, gradients that are not finite, and thresholds that erase or flip."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from normwise.engine.block_tensors import own_grads
from normwise.engine.pack import here, is_sharded
from normwise.engine.sharded import collectives
from normwise.engine.sharded.norms import over_all
from normwise.errors import NonFiniteError, NormError
from normwise.norms import L1, L2, LInf, Norm
from normwise.norms.base import clip_factor, radial_factor, two_steps
from normwise.norms.reduce import compute_dtype, max_abs, up, wide

DOUBLE = (torch.float64, torch.complex128)
SMALLER = 2.0**-64
"""What float64 gradients are multiplied by where their norm is beyond float64; so many of them that it still is do not exist."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales the gradients of ``parameters``, as one vector, by min(1, max_norm / ‖g‖); a drop-in for ``torch.nn.utils.clip_grad_norm_``.

    Args:
        parameters: a tensor or an iterable of tensors whose ``.grad`` is clipped in place; those without a gradient are passed over.
            Devices and dtypes may be mixed, and DTensors with plain tensors; fp16 and bf16 accumulate in fp32.
        max_norm: the largest norm to leave, > 0. ``float("inf")`` only measures. 0 is an error: some trainers take it for "off", and the
            formula for "erase every gradient".
        norm_type: p ≥ 1 of the p-norm; ``float("inf")`` for the largest entry. Default 2.
        error_if_nonfinite: raise NonFiniteError when the norm is not finite (one synchronisation), before anything is changed.
        foreach: accepted for compatibility; the fast path is always taken.

    Returns:
        The norm before clipping, a 0-dim tensor of the first gradient's dtype (float32 for fp16 and bf16); of a norm that is beyond that
        dtype, infinity, but the gradients are clipped rightly.

    Differs from torch's: a finite gradient whose squares overflow is measured and clipped rightly; where the norm is not finite the
    gradients are left as they are rather than all turned into NaN; the norm after clipping is max_norm, not max_norm·‖g‖/(‖g‖ + 1e-6).

    Raises:
        NormError: a threshold that is negative, zero or NaN, or norm_type below 1; nothing was changed.
    """
    if not float(max_norm) > 0:
        raise NormError(
            f"max_norm is {max_norm}, and must be > 0: a negative threshold would flip the gradients, zero would erase them. "
            "Give float('inf') to measure without clipping."
        )
    if not float(norm_type) >= 1:
        raise NormError(f"norm_type is {norm_type}, and must be >= 1, or float('inf'): below 1 it is no norm.")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for p in listed:
        if p.grad is not None and is_sharded(p.grad) and is_sharded(p):
            p.grad = collectives.placed_as(p.grad, p)
    own_grads(listed)
    grads = [p.grad for p in listed if p.grad is not None]
    for g in grads:
        if g.layout != torch.strided:
            raise NormError(f"a gradient is sparse ({g.layout}): clip_grad_norm_ needs dense ones, for instance Embedding(sparse=False).")
    if not grads:
        return torch.tensor(0.0)
    total = over_all(grads, lambda rows: _norm(rows, float(norm_type)))
    beyond = any(g.dtype in DOUBLE for g in grads) and not bool(total.isfinite())
    if beyond:    # the norm may be more than float64 holds, of finite gradients
        total = over_all([g * SMALLER for g in grads], lambda rows: _norm(rows, float(norm_type)))
    grads = [here(g) for g in grads]
    if error_if_nonfinite and not bool(total.isfinite()):
        raise NonFiniteError(f"the gradients' norm of order {norm_type} is {float(total)}: they are not finite, and were not changed.")
    if max_norm != math.inf:
        if beyond and bool(total.isfinite()):
            _scale(grads, torch.full_like(total, SMALLER).reshape(1))
            _scale(grads, radial_factor(total.reshape(1), float(max_norm)))
        else:
            _scale(grads, clip_factor(total.reshape(1), float(max_norm)))
    return (total / SMALLER if beyond else total).to(compute_dtype(grads[0].dtype.to_real()))


def _norm(rows: Tensor, order: float) -> Tensor:
    """``(b, n) -> (b,)``, the p-norm; other orders than 1, 2 and ∞ are scaled by the largest entry, so that no power leaves the range."""
    known: dict[float, Norm] = {1.0: L1(), 2.0: L2(), math.inf: LInf()}
    if order in known:
        return known[order].measure(rows)
    largest = max_abs(rows)
    safe = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    exact = wide(rows.device)    # the norm of numbers that fp32 can hold may be beyond it
    value = torch.linalg.vector_norm(up(rows) / safe[:, None], order, dim=1).to(exact) * safe.to(exact)
    return torch.where(largest.isfinite(), value, largest.to(exact))


def _scale(grads: list[Tensor], factor: Tensor) -> None:
    if factor.device.type == "cpu" and float(factor) == 1:
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in grads:
        real = torch.view_as_real(g) if g.is_complex() else g
        alike.setdefault((real.device, real.dtype), []).append(real)
    for (device, dtype), group in alike.items():
        for step in two_steps(factor[0], compute_dtype(dtype)):
            if step is not None:
                torch._foreach_mul_(group, step.to(device))
