"""Draws on the side: seeded within, and afterwards as if nothing had been drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

from normwise.generators import same_draws


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seeded() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def test_what_is_drawn_afterwards_is_what_it_would_have_been() -> None:
    seeded()
    expected = draws()
    for seed in (None, 0, 7):
        seeded()
        with same_draws(seed):
            draws()
        assert draws() == expected


def test_within_a_seed_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    found = []
    for _ in range(2):
        draws()
        with same_draws(5):
            found.append(draws())
    with same_draws(6):
        other = draws()
    assert found[0] == found[1] and all(a != b for a, b in zip(found[0], other, strict=True))
