"""The polar factor msign(X) = U Vᵀ of X = U Σ Vᵀ, on batches of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from normwise.errors import NormError, nearest
from normwise.norms.linalg import paths
from normwise.norms.linalg.checks import as_batch, by_peak, like_input, positive
from normwise.norms.linalg.coefficients import CLASSICAL, SAFETY, Step, polar_express, steps_to_reach, worst_error
from normwise.norms.reduce import compute_dtype
from normwise.norms.spectral import Spectral

SCALE_MARGIN = 1.01  # what bf16 rounding of the Gram matrix may take off the Schatten-8 norm, and more


@dataclass(frozen=True)
class Method:
    """One row of the table: an iteration is its coefficients, its scale and its precision."""

    steps: int               # how many by default; 0: as many as the precision needs
    lower: float             # the error bound holds for singular values >= lower x the scale
    scale: str               # what the singular values are divided by: "frobenius" or "schatten8"
    bf16_error: float        # what rounding may add to the error bound where the iteration runs in bf16 (measured)
    quick: bool              # iterate in bf16 where that is quick (float64 stays float64); else in fp32 or float64
    steps_per_gram: int      # at most so many steps on one Gram matrix without loss of accuracy
    source: str
    cubic_last: bool = False # the last step is a cubic: one product less

    def precision(self, given: torch.dtype, quick: bool = True) -> torch.dtype:
        """The dtype to iterate in for input of the dtype ``given``; ``quick``: where products in bf16 are quick at all."""
        return given if given == torch.float64 else torch.bfloat16 if self.quick and quick else torch.float32

    def coefficients(self, steps: int | None, dtype: torch.dtype) -> tuple[Step, ...]:
        """The steps (a, b, c), first to last; None for the method's own number of them."""
        count = steps if steps is not None else self.steps or steps_to_reach(4 * torch.finfo(dtype).eps, self.lower, SAFETY[dtype])
        if count < 1:
            raise NormError(f"polar needs at least one step, got steps={steps}; give a positive number, or None")
        return (CLASSICAL,) * count if self.scale == "frobenius" else polar_express(count, self.lower, SAFETY[dtype], self.cubic_last)


METHODS = {
    "quintic": Method(5, 3e-3, "frobenius", 0.03, True, 1, "Jordan et al. 2024, the Muon post"),
    "polar_express": Method(5, 1e-3, "schatten8", 0.08, True, 1, "Amsel et al. 2025, arXiv 2505.16932"),
    "fast": Method(4, 6e-3, "schatten8", 0.03, True, 2, "Amsel et al. 2025, composed for 11 products", cubic_last=True),
    "accurate": Method(0, 1e-5, "schatten8", 0.0, False, 1, "Amsel et al. 2025, iterated to rounding"),
}


def polar(
    x: Tensor, method: str | Sequence[Step] = "fast", steps: int | None = None, dtype: torch.dtype | None = None, floor: float = 0.0
) -> Tensor:
    """The polar factor: argmax over ‖Y‖₂ <= 1 of ⟨X, Y⟩, which is U Vᵀ for X = U Σ Vᵀ.

    A zero matrix stays zero; tiny ones (1e-30) are like any other; a matrix that is not finite becomes NaN, alone. The scale s of most
    methods is 1.01 ‖X‖ in the Schatten-8 norm: σ₁ <= s <= 1.01 r^(1/8) σ₁ for rank r, and costs nothing since the first step forms (X Xᵀ)².
    Below its domain a value is still moved towards one, by the product of the steps' slopes. Rounding to bf16 gives a rank-deficient matrix
    small singular values, which grow like all others; ``"accurate"`` and ``"exact"`` keep the rank.

    A CPU without AVX-512 takes far longer for a product in bf16 than for one in fp32: there all methods iterate in fp32.

    Args:
        x: real matrices (..., m, n), each its own.
        method: with the share of its scale above which the bound on ``|σ - 1|`` holds (exact arithmetic; bf16 may add 0.03):
            ``"quintic"``        5 steps, fixed coefficients: 0.33 from 3e-3 ‖X‖_F; the values never settle on one
            ``"fast"``           4 steps, the last a cubic, bf16: 0.18 from 6e-3 s; the cheapest that is nowhere worse than the quintic
            ``"polar_express"``  any number of steps, bf16: from 1e-3 s, 0.14 at 5 steps, 3e-3 at 6; bf16 may add 0.08
            ``"accurate"``       as many steps as rounding asks for, fp32 or float64: 1e-5 from 1e-5 s (fp32)
            ``"exact"``          SVD in fp32 or float64; singular values below max(m, n) eps σ₁ count as zero
            Or the steps (a, b, c) of an iteration of your own, which runs as the quintic does. Default ``"fast"``.
        steps: how many, where the method takes a number.
        dtype: the iteration's, instead of the method's.
        floor: the least Frobenius norm that the quintic, or an iteration of your own, divides by; torch.optim.Muon's ``eps``.

    Returns:
        A new tensor of x's shape and dtype.

    Raises:
        NormError: x is not a stack of real floating-point matrices, an unknown method, a step count below one, or steps of your own that
            are not three finite numbers each.
    """
    batch = as_batch(x)
    if method == "exact":
        finite = batch.isfinite().flatten(1).all(1)[:, None, None]
        return like_input(torch.where(finite, -Spectral().lmo(batch), torch.nan), x) if x.numel() else x.detach().clone()
    row = _row(method) if isinstance(method, str) else _row_of_steps(method)
    work = dtype or row.precision(x.dtype, paths.bf16_pays(x.device))
    coefficients = row.coefficients(steps, work) if isinstance(method, str) else method
    group = min(row.steps_per_gram, paths.steps_per_gram(batch.shape))
    iterate = partial(_iterate, coefficients=coefficients, scale=row.scale, dtype=work, group=group, floor=floor)
    with torch.no_grad():
        return like_input(paths.run(iterate, batch), x)


def error_bound(method: str, steps: int | None = None, lower: float | None = None) -> float:
    """max ``|σ - 1|`` of the result over input singular values in [``lower``, 1] x scale, in exact arithmetic: 0 for ``"exact"``."""
    if method == "exact":
        return 0.0
    row = _row(method)
    return worst_error(row.coefficients(steps, row.precision(torch.float32)), row.lower if lower is None else lower)


def _row(method: str) -> Method:
    if method not in METHODS:
        raise NormError(f"unknown polar method {method!r}.{nearest(method, [*METHODS, 'exact'])}")
    return METHODS[method]


def _row_of_steps(steps: Sequence[Step]) -> Method:
    """The quintic's, for an iteration of the user's own."""
    try:
        told = [[float(number) for number in step] for step in steps]
    except (TypeError, ValueError):
        told = []
    if not told or not all(len(step) == 3 and all(map(math.isfinite, step)) for step in told):
        raise NormError(
            f"polar was given the method {steps!r}: give a name ({', '.join([*METHODS, 'exact'])}), or one step or more, three finite "
            "numbers each, as ((3.4445, -4.775, 2.0315),) * 5"
        )
    return METHODS["quintic"]


def _iterate(x: Tensor, coefficients: Sequence[Step], scale: str, dtype: torch.dtype, group: int, floor: float) -> Tensor:
    """Scale, then ``group`` steps at a time: their product Q(G) is formed on the Gram matrix and applied once."""
    y, highest = by_peak(x)
    if scale == "frobenius":
        length = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
        y = y / (length.clamp(min=floor / highest) if floor else positive(length))
    y = y.to(dtype)
    for start in range(0, len(coefficients), group):
        y = _advance(y, coefficients[start:start + group], rescale=scale == "schatten8" and start == 0)
    return y


def _advance(y: Tensor, steps: Sequence[Step], rescale: bool) -> Tensor:
    """``steps`` on one Gram matrix G = y yᵀ: after the product Q of some steps it is Q G Q, for all of them commute."""
    g = paths.gram(y)
    if len(steps) == 1 and not rescale:
        return _apply(steps[0][0], _quadratic(g, steps[0]), y)
    if rescale:
        q = _rescaled_step(g, steps[0])
    else:
        q = _quadratic(g, steps[0])
        q.diagonal(dim1=-2, dim2=-1).add_(steps[0][0])
    for step in steps[1:]:
        q = _apply(step[0], _quadratic(q @ g @ q, step), q)
    return y @ q if y.shape[-2] > y.shape[-1] else q @ y


def _quadratic(g: Tensor, step: Step) -> Tensor:
    """b G + c G²; a cubic step has c = 0 and needs no product."""
    _, b, c = step
    if c == 0:
        return g.mul(b)
    return paths.square(g, g, b, c)


def _rescaled_step(g: Tensor, step: Step) -> Tensor:
    """The step for X / s, to be applied to X; s from G², whose Frobenius norm is the fourth power of the Schatten-8 norm of X.

    Summed before it is rounded: the first step's terms are large and cancel, and all later ones amplify what it loses.
    """
    a, b, c = step
    wide = compute_dtype(g.dtype)
    square = paths.square(g).to(wide)
    s = SCALE_MARGIN * positive(torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True)).pow(0.25)
    p = square.mul_(c / s**5).add_(g.to(wide).mul_(b / s**3) if wide != g.dtype else g * (b / s**3))
    p.diagonal(dim1=-2, dim2=-1).add_(a / s.squeeze(-1))
    return p.to(g.dtype)


def _apply(a: float, r: Tensor, x: Tensor) -> Tensor:
    """a X + R X, or a X + X R for a tall X; R is symmetric."""
    left, right = (x, r) if x.shape[-2] > x.shape[-1] else (r, x)
    return torch.baddbmm(x, left, right, beta=a) if x.ndim == 3 else torch.addmm(x, left, right, beta=a)
