"""A race without training: results from a made-up formula, in the place of ``call`` and of the measured step times."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from normwise.experiments.catalog.contenders import FIRST
from normwise.experiments.race.run import RaceRun

PACE = {"adamw": 1.0, "sgd": 3.0, "adamw_max_norm": 1.15, "muon": 0.5, "normuon": 0.47, "muonh": 0.55, "adamh": 0.95, "scion": 0.62,
        "ridge": 0.4, "ridge_small": 0.38, "ridge_roles": 0.36, "auto": 0.43}
STEP_MS = {"adamw": 60.0, "sgd": 55.0, "adamw_max_norm": 66.0, "muon": 72.0, "normuon": 75.0, "muonh": 71.0, "adamh": 64.0, "scion": 70.0,
           "ridge": 64.0, "ridge_small": 34.0, "ridge_roles": 64.0, "auto": 64.0}


def noise(*parts: Any) -> float:
    """In [-1, 1), decided by the parts."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**31 - 1


def made_up(run: RaceRun, accuracy: bool = False) -> dict[str, Any]:
    """Loss falls with the samples seen, faster by PACE, rises with the distance of the rate from its centre, and differs by seed."""
    numbers = dict(run.numbers)
    centre = FIRST[run.contender].own[0].values[0]
    off = 0 if run.contender == "auto" else abs(math.log2(numbers["lr"] / float(centre)) - 1)
    luck = 0.012 * noise(run.seed, run.contender, run.samples)
    loss = 1.2 + 0.7 * (8000 * PACE[run.contender] / run.samples) ** 0.5 + 0.02 * off**2 + luck
    diverged = off > 4
    value = None if diverged else (max(0.0, 1.25 - loss / 4) if accuracy else loss)
    result = {"result": value, "loss": None if diverged else loss, "accuracy": 0.5, "steps": run.samples // 16, "seconds": 1.0,
              "diverged": diverged, "spikes": int(noise(run.seed, run.samples) > 0.7)}  # fmt: skip
    if run.full:
        worse = {"loss": None if diverged else loss + 0.05, "accuracy": (value or 0.0) * 0.99 if accuracy else 0.5}
        better = {"loss": None if diverged else loss - 0.1, "accuracy": 0.6}
        result |= {"test": worse, "train": better, "sparsity": 0.0, "breaches": []}
    return result


def made_up_times(runs: list[RaceRun], task: Any = None, rounds: int = 0) -> list[float]:
    return [STEP_MS[run.contender] for run in runs]
