"""Norms on batches of blocks: value, dual, projection, prox and LMO. They know nothing of parameters, optimizers or devices.

>>> import torch
>>> L2().clip_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
tensor([[0.6000, 0.8000],
        [0.3000, 0.4000]])
"""

from __future__ import annotations

from normwise.errors import NormError, nearest
from normwise.norms.base import NORMS, Norm, Radius, Set
from normwise.norms.forms import FORMS, Form, Scaled
from normwise.norms.sets import Box, NonNegative, Orthogonal
from normwise.norms.spectral import Nuclear, Spectral
from normwise.norms.units import MaxOfUnits, SumOfUnits
from normwise.norms.vector import L1, L2, LInf

SETS: dict[str, type[Set]] = {"box": Box, "non_negative": NonNegative, "orthogonal": Orthogonal}
"""Every set by its name in a rule; ``box`` takes its two ends."""


def get_norm(norm: str | Norm | Set) -> Norm | Set:
    """The norm, form or set of that name; an object is returned as it is. An unknown name is an error with the nearest known one."""
    if isinstance(norm, Norm | Set):
        return norm
    if not isinstance(norm, str):
        raise NormError(f"{norm!r} is no norm: give a name, such as 'l2', or an object of normwise.norms")
    if norm in NORMS:
        return NORMS[norm]
    if norm in FORMS:
        return Scaled(FORMS[norm].base, norm)
    if norm in SETS and norm != "box":
        return SETS[norm]()
    raise NormError(f"unknown norm {norm!r}.{nearest(str(norm), [*NORMS, *FORMS, *SETS])}")


__all__ = [
    "FORMS", "L1", "L2", "NORMS", "SETS", "Box", "Form", "LInf", "MaxOfUnits", "NonNegative", "Norm", "Nuclear", "Orthogonal",
    "Radius", "Scaled", "Set", "Spectral", "SumOfUnits", "get_norm",
]  # fmt: skip
