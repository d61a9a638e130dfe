"""What a norm is here: four primitives on a batch of blocks, from which the rest follows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from normwise.errors import NormError
from normwise.norms.reduce import compute_dtype, may_branch, up, wide

Radius = float | Tensor
"""A number, or one number a block: a tensor of shape ``(b,)``."""


def column(radius: Radius, x: Tensor) -> Radius:
    """A radius that broadcasts against the blocks ``x``; a number stays a number."""
    if not isinstance(radius, Tensor) or radius.ndim == 0:
        return radius
    check_radius("a norm", radius, x)
    return radius.to(compute_dtype(x.dtype)).reshape(-1, *[1] * (x.ndim - 1))


def radial_factor(value: Tensor, target: Radius) -> Tensor:
    """``target / value``, and 1 where that means nothing: a zero block stays zero, a block that is not finite is left alone.

    The one place of both rules. Shapes ``(b,) -> (b,)``.
    """
    exact = value.to(wide(value.device))
    # As tensors: of a number torch takes the reciprocal of the norm first, which overflows for subnormal ones.
    factor = (target if isinstance(target, Tensor) else torch.full((), target, dtype=exact.dtype, device=exact.device)) / exact
    if value.dtype == torch.float64:    # 1 over a subnormal norm: as far as it goes, see ``beyond``
        factor = torch.where((value > 0) & factor.isinf(), torch.finfo(factor.dtype).max, factor)
    if may_branch(factor) and factor.numel():
        low, high = torch.aminmax(factor)
        if float(low) > 0 and float(high) < math.inf:    # then every value was positive and finite
            return factor
    return torch.where((value > 0) & factor.isfinite() & value.isfinite(), factor, 1.0)


def clip_factor(value: Tensor, radius: Radius) -> Tensor:
    """``min(1, radius / value)`` with the rules of :func:`radial_factor`; a block inside is multiplied by exactly 1."""
    return radial_factor(value, radius).clamp(max=1.0)


def scale_blocks(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` times one factor a block, computed in the compute dtype and rounded once."""
    return times(x, factor.reshape(-1, *[1] * (x.ndim - 1)))


def times(x: Tensor, factor: Tensor) -> Tensor:
    """``x · factor``, broadcast, computed in the compute dtype and rounded once.

    A factor beyond that dtype (1 over a subnormal norm, or over one that only float64 can hold) is applied in two steps, see
    :func:`two_steps`.
    """
    power, rest = two_steps(factor, compute_dtype(x.dtype))
    work = up(x) if power is None else up(x) * power
    return (work * rest).to(x.dtype)


def two_steps(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """A factor in ``dtype``; where that would make it infinite, zero or subnormal, a power of two to multiply by first, and the rest.

    Where looking costs a synchronisation it is capped at the dtype's largest number instead: short of the target, but never infinite.
    """
    info, narrow = torch.finfo(dtype), factor.to(dtype)
    if not may_branch(factor):
        return None, narrow.clamp(max=info.max)
    low, high = torch.aminmax(narrow) if narrow.numel() else (narrow.new_ones(()), narrow.new_ones(()))
    if info.smallest_normal <= float(low) and float(high) <= info.max:
        return None, narrow
    power = torch.ldexp(torch.ones_like(factor), torch.frexp(factor).exponent // 2)
    power = torch.where((factor != 0) & (narrow.isinf() | (narrow.abs() < info.smallest_normal)), power, 1.0)
    return power.to(dtype), (factor / power).to(dtype)


LIFTS = {torch.float64: (1e-280, 600), torch.float32: (1e-30, 64), torch.bfloat16: (1e-30, 64)}


def lifted(x: Tensor, decomposed: bool = False) -> Tensor:
    """Blocks of which only the direction matters, a power of two larger where they are so small that their lengths lose digits.

    Lengths of fp32 and bf16 blocks lose none in float64, but their singular vectors do: ``decomposed``.
    """
    if not (x.dtype == torch.float64 or (decomposed and x.dtype in LIFTS)) or not may_branch(x) or not x.numel():
        return x
    least, power = LIFTS[x.dtype]
    largest = x.abs().flatten(1).amax(1)
    tiny = (largest > 0) & (largest < least)
    return scale_blocks(x, torch.ldexp(torch.ones_like(largest, dtype=torch.float64), tiny * power)) if bool(tiny.any()) else x


def unless_broken(x: Tensor, moved: Tensor) -> Tensor:
    """``moved``, but blocks of ``x`` that hold a NaN or an infinity as they are: what is computed from such an entry would spread over the
    block, or hide that it was there."""
    if may_branch(x):
        low, high = torch.aminmax(x.detach()) if x.numel() else (0.0, 0.0)
        if math.isfinite(low) and math.isfinite(high):
            return moved
    finite = x.isfinite().flatten(1).all(1)
    return torch.where(finite.view(-1, *[1] * (x.ndim - 1)), moved, x)


def beyond(factor: Tensor) -> bool:
    """Whether a factor was cut at float64's largest number, as for a float64 block of norm 1e-310, so that scaling must be done again."""
    return factor.dtype == torch.float64 and may_branch(factor) and bool((factor == torch.finfo(torch.float64).max).any())


def check_radius(name: str, radius: Radius, x: Tensor) -> None:
    """Refuses a radius or step below 0 or NaN, and a tensor that is not one number a block; its numbers are not read, to save a sync."""
    if not isinstance(radius, Tensor):
        if not radius >= 0:
            raise NormError(f"{name} was given the radius or step {radius}: give a number that is 0 or more")
    elif radius.ndim and radius.shape != x.shape[:1]:
        raise NormError(f"{name} was given a radius of shape {tuple(radius.shape)} for {x.shape[0]} blocks: give a number or one a block")


def check_blocks(name: str, matrix: bool, x: Tensor, radius: Radius) -> None:
    """Refuses what is not a batch of blocks of real numbers (matrices, if need be), and what is no radius or step for them."""
    if x.ndim != 3 and (matrix or x.ndim != 2):
        shapes = "(batch, m, n)" if matrix else "(batch, n) or (batch, m, n)"
        raise NormError(f"{name} is defined on blocks of shape {shapes}, given {tuple(x.shape)}")
    check_real(name, x)
    check_radius(name, radius, x)


def check_real(name: str, x: Tensor) -> None:
    """Refuses integers and complex numbers."""
    if not x.is_floating_point():
        raise NormError(f"{name} needs real floating-point blocks, given {x.dtype}: convert them, or use view_as_real")


class Norm(ABC):
    """A norm on blocks. Vectors are ``(b, n)``, matrices ``(b, m, n)`` with m outputs and n inputs; the batch is never mixed.

    A subclass gives ``measure``, ``project``, ``lmo`` and names its dual; the prox (Moreau) and the subgradient follow from the dual norm.
    fp16 and bf16 blocks are computed in fp32 and rounded once. Zero blocks stay zero. ``project``, ``prox``, ``clip_norm`` and
    ``normalize`` leave a block that holds a NaN or an infinity as it is, bit for bit; the other blocks are not touched by it.

    Its methods take blocks ``x`` and a ``radius`` or ``step``: a number >= 0, or one a block, ``(b,)``. They return new tensors of x's
    shape and dtype, ``value`` and ``dual`` ``(b,)``. They raise NormError for blocks of another shape, for integers and complex numbers,
    and for a radius below zero.
    """

    name: ClassVar[str]
    matrix: ClassVar[bool] = False
    """Whether blocks must be matrices."""
    oriented: ClassVar[bool] = False
    """Whether it tells rows from columns, so that a transposed matrix has another norm."""
    p: ClassVar[float | None] = None
    """The exponent, where it is a p-norm of all entries (1, 2 or infinity): then the norms of several parts give that of the whole."""
    radial: ClassVar[bool] = False
    """Whether the nearest point of its ball is on the way to zero, so that a projection only scales a block."""
    separable: ClassVar[bool] = False
    """Whether ``project`` and ``lmo`` do to each entry what they would do to it alone."""
    rounding: ClassVar[float] = 16.0
    """How many eps measuring and rounding an fp32 block may be off: sums of 128 numbers are taken in fp32."""
    level: ClassVar[int | None] = None
    """On one block a norm is never above any norm of a higher level (of the same level: only itself); None where nothing is known."""
    polar: ClassVar[bool] = False
    """Whether its LMO is a multiple of the polar factor, which iterations give without an SVD."""

    @property
    @abstractmethod
    def dual_norm(self) -> Norm:
        """The norm ‖y‖_* = max ⟨x, y⟩ over ‖x‖ ≤ 1."""

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """``value`` at the accumulator's own precision, which may be float64: what the engine works with."""

    @abstractmethod
    def project(self, x: Tensor, radius: Radius) -> Tensor:
        """argmin ‖y − x‖₂ over ‖y‖ ≤ radius; blocks inside come back bit for bit."""

    @abstractmethod
    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        """argmin ⟨x, y⟩ over ‖y‖ ≤ radius, so ⟨x, lmo(x)⟩ = −radius·‖x‖_*; lmo(0) = 0."""

    def unscaled(self, shape: tuple[int, ...]) -> tuple[Norm, float]:
        """The norm that it is a multiple of, and the factor for blocks of ``shape``: itself and 1, but for dimension-free forms."""
        return self, 1.0

    def squared_over_l2(self, shape: tuple[int, ...]) -> float:
        """The largest (‖x‖ / ‖x‖₂)² of a block of ``shape``: how far rounding each entry can move it. 1 where it is never above L2."""
        return 1.0

    def decomposition_error(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """In eps, what a decomposition adds to the error of measuring: in every dtype, and in fp32 beside."""
        return 0.0, 0.0

    def value(self, x: Tensor) -> Tensor:
        """‖x‖ of each block, ``(b,)``; float32 for fp16 and bf16."""
        self.check(x)
        return self.measure(x).to(compute_dtype(x.dtype))

    def dual(self, x: Tensor) -> Tensor:
        """‖x‖_* of each block, ``(b,)``."""
        return self.dual_norm.value(x)

    def clip_norm(self, x: Tensor, radius: Radius) -> Tensor:
        """x · min(1, radius / ‖x‖): into the ball along the ray."""
        self.check(x, radius)
        return scale_blocks(x, clip_factor(self.measure(x), radius))

    def normalize(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        """x · radius / ‖x‖: onto the sphere along the ray; a zero block stays zero."""
        self.check(x, radius)
        x = lifted(x)
        factor = radial_factor(self.measure(x), radius)
        scaled = scale_blocks(x, factor)
        return self.normalize(scaled, radius) if x.dtype == torch.float64 and beyond(factor) else scaled

    def prox(self, x: Tensor, step: Radius) -> Tensor:
        """argmin ½‖y − x‖₂² + step·‖y‖ = x − (projection of x onto the dual ball of radius step) (Moreau, 1965)."""
        self.check(x, step)
        work = up(x)
        moved = (work - self.dual_norm.project(work, step)).to(x.dtype)
        return moved if self.dual_norm.separable else unless_broken(x, moved)    # of single entries none harms another

    def subgradient(self, x: Tensor) -> Tensor:
        """One element of ∂‖x‖: the maximiser of ⟨x, y⟩ over the dual ball; 0 at 0."""
        return -self.dual_norm.lmo(x, 1.0)

    def check(self, x: Tensor, radius: Radius = 1.0) -> None:
        """Refuses blocks and radii that this norm is not defined on."""
        check_blocks(self.name, self.matrix, x, radius)


NORMS: dict[str, Norm] = {}
"""Every norm by its name in a rule."""


def register(*norms: Norm) -> None:
    """Makes norms known by their names: in rules, in YAML, in messages, and to the tests of the laws."""
    NORMS.update({norm.name: norm for norm in norms})


class Set(ABC):
    """A set that is no norm ball, for ``action="project"``."""

    name: ClassVar[str]
    matrix: ClassVar[bool] = False
    polar: ClassVar[bool] = False
    needs_radius: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    """Whether ``project`` acts on each entry by itself, and the set is the same for every block."""
    interval: tuple[float, float] | None = None
    """The ends between which it keeps every entry; None where there are none."""
    sphere: ClassVar[Norm | None] = None
    """The norm that it keeps at the radius; None where there is none."""

    @abstractmethod
    def project(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        """The nearest point of the set, block by block."""

    @abstractmethod
    def excess(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        """How far each block is outside, ``(b,)``: 0 inside."""
