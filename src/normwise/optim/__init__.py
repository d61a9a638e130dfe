"""One norm-based optimizer, and its presets.

>>> optimizer = normwise.optim.Muon(model, lr=0.02)
>>> print(optimizer.routing)     # which parameter takes which step
"""

from normwise.optim.columns import CHOICES, DEFAULTS
from normwise.optim.optimizer import NormOptimizer
from normwise.optim.presets import (
    LAMB,
    LARS,
    PRESETS,
    SGD,
    AdamH,
    AdamW,
    Lion,
    Muon,
    MuonH,
    NormalizedSGD,
    NorMuon,
    Ridge,
    Scion,
    Signum,
    auto,
    role_factors,
)
from normwise.optim.schedule import schedule

__all__ = [
    "CHOICES", "DEFAULTS", "LAMB", "LARS", "PRESETS", "SGD", "AdamH", "AdamW", "Lion", "Muon", "MuonH", "NorMuon", "NormOptimizer",
    "NormalizedSGD", "Ridge", "Scion", "Signum", "auto",
    "role_factors", "schedule",
]  # fmt: skip
