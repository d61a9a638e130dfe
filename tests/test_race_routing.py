"""What `auto` does with the models of the four races, as it was when they were run: role, axes, part of an attention, and the row."""

from __future__ import annotations

from typing import Any

import pytest

from normwise.experiments.tasks.load import load_task
from normwise.optim import auto
from normwise.parameters.inventory import Inventory

COLUMNS = ("lr", "radius", "weight_decay", "damping", "momentum", "act", "direction")
ROWS: list[tuple[Any, ...]] = [
    (0.02, 1.0, 0.3, 0.03, 0.8, "ridge", "ema_nesterov"),
    (0.016, 1.0, 0.0, 0.03, 0.9, "none", "adam"),
    (0.016, 1.0, 1.0, 0.03, 0.9, "none", "adam"),
    (0.04, 1.0, 0.3, 0.1, 0.8, "ridge", "ema_nesterov"),
    (0.008, 1.0, 0.0, 0.03, 0.9, "none", "adam"),
    (0.008, 1.0, 1.0, 0.03, 0.9, "none", "adam"),
    (0.016, 1.0, 0.1, 0.03, 0.9, "none", "adam"),
    (0.04, 1.0, 0.1, 1.0, 0.85, "ridge", "ema_nesterov"),
    (0.016, 3.0, 0.1, 0.03, 0.9, "none", "adam"),
    (0.008, 1.0, 0.1, 0.03, 0.9, "none", "adam"),
    (0.028, 3.0, 0.3, 0.03, 0.8, "ridge", "ema_nesterov"),
    (0.028, 0.5, 0.3, 0.03, 0.8, "ridge", "ema_nesterov"),
    (0.028, 1.0, 0.3, 0.03, 0.8, "ridge", "ema_nesterov"),
]
RACES: dict[str, dict[str, tuple[str, str, str, int]]] = {
    "cnn": {
        "conv1.weight": ("conv", "o4 i1 k3 k3", "", 0),
        "conv1.bias": ("bias", "o4", "", 1),
        "conv2.weight": ("conv", "o8 i4 k2 k2", "", 0),
        "conv2.bias": ("bias", "o8", "", 1),
        "head.weight": ("head", "o10 i8", "", 2),
        "head.bias": ("bias", "o10", "", 1),
    },
    "resnet": {
        "stem.weight": ("conv", "o8 i1 k3 k3", "", 3),
        "blocks.0.conv1.weight": ("conv", "o8 i8 k3 k3", "", 3),
        "blocks.0.norm1.weight": ("gain", "o8", "", 4),
        "blocks.0.norm1.bias": ("bias", "o8", "", 4),
        "blocks.0.conv2.weight": ("conv", "o8 i8 k3 k3", "", 3),
        "blocks.0.norm2.weight": ("gain", "o8", "", 4),
        "blocks.0.norm2.bias": ("bias", "o8", "", 4),
        "blocks.1.conv1.weight": ("conv", "o16 i8 k3 k3", "", 3),
        "blocks.1.norm1.weight": ("gain", "o16", "", 4),
        "blocks.1.norm1.bias": ("bias", "o16", "", 4),
        "blocks.1.conv2.weight": ("conv", "o16 i16 k3 k3", "", 3),
        "blocks.1.norm2.weight": ("gain", "o16", "", 4),
        "blocks.1.norm2.bias": ("bias", "o16", "", 4),
        "blocks.1.shortcut.weight": ("conv", "o16 i8 k1 k1", "", 3),
        "head.weight": ("head", "o10 i16", "", 5),
        "head.bias": ("bias", "o10", "", 4),
    },
    "lstm": {
        "tokens.weight": ("embedding", "o103 i16", "", 6),
        "lstm.weight_ih_l0": ("recurrent", "s4 o32 i16", "", 7),
        "lstm.weight_hh_l0": ("recurrent", "s4 o32 i32", "", 7),
        "lstm.bias_ih_l0": ("bias", "s4 o32", "", 1),
        "lstm.bias_hh_l0": ("bias", "s4 o32", "", 1),
        "lstm.weight_ih_l1": ("recurrent", "s4 o32 i32", "", 7),
        "lstm.weight_hh_l1": ("recurrent", "s4 o32 i32", "", 7),
        "lstm.bias_ih_l1": ("bias", "s4 o32", "", 1),
        "lstm.bias_hh_l1": ("bias", "s4 o32", "", 1),
        "head.weight": ("head", "o103 i32", "", 8),
        "head.bias": ("bias", "o103", "", 1),
    },
    "gpt": {
        "tokens.weight": ("embedding", "o103 i32", "", 9),
        "places.weight": ("embedding", "o32 i32", "", 9),
        "blocks.0.norm1.weight": ("gain", "o32", "", 4),
        "blocks.0.norm1.bias": ("bias", "o32", "", 4),
        "blocks.0.norm2.weight": ("gain", "o32", "", 4),
        "blocks.0.norm2.bias": ("bias", "o32", "", 4),
        "blocks.0.attention.q.weight": ("hidden", "o32 i32", "q", 10),
        "blocks.0.attention.k.weight": ("hidden", "o32 i32", "k", 10),
        "blocks.0.attention.v.weight": ("hidden", "o32 i32", "v", 11),
        "blocks.0.attention.out.weight": ("hidden", "o32 i32", "out", 11),
        "blocks.0.up.weight": ("hidden", "o128 i32", "", 12),
        "blocks.0.down.weight": ("hidden", "o32 i128", "", 12),
        "blocks.1.norm1.weight": ("gain", "o32", "", 4),
        "blocks.1.norm1.bias": ("bias", "o32", "", 4),
        "blocks.1.norm2.weight": ("gain", "o32", "", 4),
        "blocks.1.norm2.bias": ("bias", "o32", "", 4),
        "blocks.1.attention.q.weight": ("hidden", "o32 i32", "q", 10),
        "blocks.1.attention.k.weight": ("hidden", "o32 i32", "k", 10),
        "blocks.1.attention.v.weight": ("hidden", "o32 i32", "v", 11),
        "blocks.1.attention.out.weight": ("hidden", "o32 i32", "out", 11),
        "blocks.1.up.weight": ("hidden", "o128 i32", "", 12),
        "blocks.1.down.weight": ("hidden", "o32 i128", "", 12),
        "norm.weight": ("gain", "o32", "", 4),
        "norm.bias": ("bias", "o32", "", 4),
        "head.weight": ("head", "o103 i32", "", 9),
    },
}
"""Name -> role, axes, part of an attention, and which of ``ROWS``: recorded before roles were told from more than types."""


@pytest.mark.parametrize("task", RACES)
def test_the_races_are_routed_as_they_were(task: str) -> None:
    model = load_task(task, size="tiny").build()
    rows = {name: tuple(g[c] for c in COLUMNS) for g in auto(model).param_groups for name in g["param_names"]}
    seen = {e.name: (e.role, str(e.layout), e.attention, ROWS.index(rows[e.name])) for e in Inventory(model)}
    if hasattr(model, "tokens"):    # Python's own text, whose characters differ from version to version, has 103 of them in 3.11
        seen = {n: (r, axes.replace(f"o{len(model.tokens.weight)}", "o103"), a, k) for n, (r, axes, a, k) in seen.items()}
    assert seen == RACES[task]
