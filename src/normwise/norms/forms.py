"""Dimension-free forms: the same norms with a stated scale, so that one radius means the same at every width."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.norms.base import Norm, Radius
from normwise.norms.reduce import wide
from normwise.norms.spectral import Spectral
from normwise.norms.units import MaxOfUnits
from normwise.norms.vector import L2, LInf


@dataclass(frozen=True)
class Form:
    """One row of the table: ``base`` times ``scale(block_shape)``, of a matrix ``(d_out, d_in)``; ``about`` has its formula and source."""

    base: Norm
    scale: Callable[[torch.Size], float]
    about: str


FORMS: dict[str, Form] = {
    "rms": Form(L2(), lambda s: 1 / math.sqrt(max(math.prod(s), 1)), "root mean square of the entries: ‖x‖₂ / √n"),
    "rms_rms": Form(
        Spectral(), lambda s: math.sqrt(max(s[1], 1) / max(s[0], 1)), "RMS→RMS operator norm: σ₁·√(d_in/d_out) (Large et al., 2024)"
    ),
    "one_rms": Form(
        MaxOfUnits("inputs"), lambda s: 1 / math.sqrt(max(s[0], 1)), "1→RMS: the largest input's L2 norm / √d_out (Bernstein, 2025)"
    ),
    "rms_inf": Form(
        MaxOfUnits("units"), lambda s: math.sqrt(max(s[1], 1)), "RMS→∞: the largest unit's L2 norm · √d_in (Pethick et al., 2025)"
    ),
    "sign": Form(
        LInf(), lambda s: float(max(s[-1], 1)), "d_in · max|x|, whose LMO is sign / d_in: Scion's head (Pethick et al., 2025)"
    ),
}


@dataclass(frozen=True)
class Scaled(Norm):
    """A dimension-free form: ``base`` times the scale that ``form`` has for the shape of a block.

    Args:
        base: the norm that is scaled.
        form: a name in `FORMS`.
        inverse: divides by the scale instead, as the dual norm does.
    """

    base: Norm
    form: str
    inverse: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"dual of {self.form}" if self.inverse else self.form

    @property
    def matrix(self) -> bool:  # type: ignore[override]
        return self.base.matrix or self.form != "rms"

    @property
    def oriented(self) -> bool:  # type: ignore[override]
        return self.form != "rms"

    @property
    def radial(self) -> bool:  # type: ignore[override]
        return self.base.radial

    @property
    def polar(self) -> bool:  # type: ignore[override]
        return self.base.polar

    @property
    def dual_norm(self) -> Norm:
        return Scaled(self.base.dual_norm, self.form, not self.inverse)

    def factor(self, x: Tensor) -> float:
        """The scale of blocks of this shape."""
        scale = FORMS[self.form].scale(x.shape[1:])
        return 1 / scale if self.inverse else scale

    def unscaled(self, shape: tuple[int, ...]) -> tuple[Norm, float]:
        return self.base, self.factor(torch.empty(0, *shape, device="meta"))

    def decomposition_error(self, shape: tuple[int, ...]) -> tuple[float, float]:
        return self.base.decomposition_error(shape)

    def check(self, x: Tensor, radius: Radius = 1.0) -> None:
        super().check(x, radius)
        self.base.check(x)

    def measure(self, x: Tensor) -> Tensor:
        value = self.base.measure(x)
        scaled = value.to(wide(value.device)) * self.factor(x)    # which may be beyond fp32
        # A float64 norm of 5e-324 has no half; as zero it would be taken for that of a zero block.
        return torch.where(value > 0, scaled.clamp(min=5e-324), scaled) if x.dtype == torch.float64 else scaled

    def project(self, x: Tensor, radius: Radius) -> Tensor:
        self.check(x, radius)
        return self.base.project(x, radius / self.factor(x))

    def lmo(self, x: Tensor, radius: Radius = 1.0) -> Tensor:
        self.check(x, radius)
        return self.base.lmo(x, radius / self.factor(x))
