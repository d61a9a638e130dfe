"""Makes ``compare_example.json``: synthetic results in the shape of ``normwise compare``, realistic in size and in its gaps.

    python tests/data/make_compare_example.py

Nothing in it was measured. It holds what a report must survive: seeds that missed the baseline, a strategy that no seed
brought there, one that diverged (no accuracy at all), a violation, and text that would be markup if it were not escaped.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

STRATEGIES = {
    "nothing": ("nothing", 0.0, 1.0, 0.0), "l2": ("L2 penalty", 0.004, 0.7, 0.06), "l1": ("L1 penalty", 0.003, 0.6, 0.07),
    "clip_value": ("clip by value", 0.002, 0.6, 0.04), "clip_tensor_norm": ("clip tensor norm", 0.005, 0.5, 0.09),
    "normalise": ("normalise <units>", -0.012, 0.3, 0.14), "max_norm": ("max-norm", 0.011, 0.45, 0.11),
    "spectral_cap": ("spectral cap", 0.007, 0.4, 0.31), "soft_threshold": ("soft threshold", 0.001, 0.7, 0.08),
    "weight_decay": ("decoupled decay", 0.004, 0.7, 0.03), "l2+max_norm": ("L2 & max-norm", 0.012, 0.4, 0.16),
    "l1+clip_tensor_norm": ("L1 & clip tensor norm", -0.3, 0.5, 0.15),
}
OPTIMIZERS = {"gd": (0.962, 0.5), "momentum": (0.973, 0.1), "adam": (0.975, 0.003)}
PARAMETERS = {"conv1.weight": 1.2, "conv2.weight": 3.1, "head.weight": 2.4, "conv1.bias": 0.6, "conv2.bias": 0.8, "head.bias": 0.3}
SEEDS = (0, 1, 2)


def stat(values: list[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    kept = [value for value in values if value is not None]
    mean = statistics.fmean(kept) if kept else None
    std = statistics.stdev(kept) if len(kept) > 1 else None
    return {"mean": mean, "std": std, "values": values}


def median(values: list[float | None]) -> dict[str, Any]:
    """The median in which a seed that missed counts as later than every other, and the values."""
    middle = statistics.median(math.inf if value is None else value for value in values)
    return {"median": middle if math.isfinite(middle) else None, "values": values}


def curve(rng: random.Random, seed: int, final: float, growth: float, points: int, steps: int) -> dict[str, Any]:
    """One seed's curves; the accuracy rises from chance to ``final``."""
    at = [round(steps * (i + 1) / points) for i in range(points)]
    rise = [1 - math.exp(-7 * step / steps) for step in at]
    noise = [rng.gauss(0, 0.006) * (1.3 - r) for r in rise]
    return {
        "seed": seed,
        "step": at,
        "validation_accuracy": [round(min(0.1 + (final - 0.1) * r + n, 1.0), 5) for r, n in zip(rise, noise, strict=True)],
        "train_loss": [round(2.3 * math.exp(-6 * step / steps) + 0.02, 5) for step in at],
        "norms": {
            name: [round(size * (0.3 + growth * 2.2 * step / steps) + 0.01 * seed, 4) for step in at]
            for name, size in PARAMETERS.items()
        },
    }


def cell(rng: random.Random, strategy: str, optimizer: str, points: int, steps: int) -> dict[str, Any]:
    """One cell of the study."""
    label, gain, growth, share = STRATEGIES[strategy]
    level, rate = OPTIMIZERS[optimizer]
    diverged = strategy == "l1+clip_tensor_norm" and optimizer == "adam"
    gain = gain if optimizer == "gd" else gain * 0.25
    test = [None if diverged else round((level + gain + rng.gauss(0, 0.002)) * 360) / 360 for _ in SEEDS]
    train = [None if value is None else min(value + 0.022 * growth + 0.004, 1.0) for value in test]
    reach = [
        None if value is None or strategy == "l1+clip_tensor_norm" or gain < 0 or rng.random() < 0.15
        else round(steps * (0.75 - 14 * gain) + rng.gauss(0, 30))
        for value in test
    ]
    ms = 0.7 * (1 + share) + rng.gauss(0, 0.01)
    strength = None if strategy == "nothing" else rng.choice([0.001, 0.01, 0.5, 3.0])
    names = strategy.split("+")
    return {
        "strategy": strategy, "label": label, "optimizer": optimizer, "lr": rate, "strength": strength,
        "policy_yaml": "" if strategy == "nothing" else "rules:\n" + "".join(
            f"- action: {name}\n  params: '*.weight'  # the </pre> must not close\n  strength: {strength}\n" for name in names),
        "trials": 12,
        "test_accuracy": stat(test), "train_accuracy": stat(train),
        "generalisation_gap": stat([None if a is None or b is None else a - b for a, b in zip(train, test, strict=True)]),
        "validation_accuracy": stat([None if value is None else value - 0.003 for value in test]),
        "steps_to_baseline": median(reach),
        "seconds_to_baseline": median([None if r is None else round(r * ms / 1000, 3) for r in reach]),
        "step_ms": round(ms, 4), "control_share": round(share / (1 + share), 4),
        "sparsity": stat([0.62 if strategy == "soft_threshold" else 0.0 for _ in SEEDS]),
        "norms": {name: {"l2": round(size * (0.3 + 2.2 * growth), 4),
                         "spectral": None if name.endswith("bias") else round(size * (0.2 + growth), 4),
                         "max_unit": round(size * (0.1 + 0.6 * growth), 4)} for name, size in PARAMETERS.items()},
        "violations": 2 if strategy == "spectral_cap" and optimizer == "momentum" else 0,
        "curves": [] if diverged else [curve(rng, s, level + gain, growth, points, steps) for s in SEEDS],
    }


def example(points: int = 10, steps: int = 1600) -> dict[str, Any]:
    """The whole study, the same on every call."""
    rng = random.Random(7)
    return {
        "task": "cnn",
        "data": {"name": "digits", "train": 1078, "validation": 359, "test": 360, "shape": [1, 8, 8], "classes": 10},
        "machine": {"cpu": "Example CPU at 2.1 GHz", "cores": 2, "torch": "2.13.0", "python": "3.11.7", "date": "2026-11-23"},
        "budget": "standard",
        "protocol": {"trials": 12, "seeds": list(SEEDS), "epochs": 95, "batch_size": 64, "widenings": 7, "cells_on_edge": [],
                     "search": {f"{s} with {o}": "lr 0.1 to 1" for o in OPTIMIZERS for s in STRATEGIES},
                     "notes": ["Nothing here was measured: the numbers are made up to try the report."]},
        "cells": [cell(rng, s, o, points, steps) for o in OPTIMIZERS for s in STRATEGIES],
        "baseline_defects": [],
    }


if __name__ == "__main__":
    target = Path(__file__).with_name("compare_example.json")
    target.write_text(json.dumps(example(), separators=(",", ":")) + "\n", encoding="utf-8")
