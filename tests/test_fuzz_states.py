"""Checkpoints of a control that are damaged or another's: one PolicyError, and nothing has changed."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw
from planted import Payload

RULES = [
    nw.max_norm("init"), nw.l2_penalty(0.1, center="init"), nw.autoclip(window=5), nw.zclip(warmup=2), nw.cpr(1e-3),
    nw.Rule(action="clip_norm", per="global", radius="2*init"), nw.spectral_cap(1.0, tolerance=0.01),
]  # fmt: skip


def made() -> tuple[nn.Module, SGD, nw.Control]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, nw.attach(model, optimizer, RULES)


def step(model: nn.Module, optimizer: SGD) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(2, 6)).square().sum().backward()
    optimizer.step()


def places(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value within."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [way for key, value in items for way in [(*path, key), *places(value, (*path, key))]]


def odd(rnd: random.Random, value: Any) -> Any:
    """Something that cannot stand in the place of ``value``."""
    if isinstance(value, Tensor):
        wrong = [None, "x", 3, [], value.tolist() if value.numel() else [1], torch.ones(7, 9, 2), value[None].expand(2, *value.shape)]
        return rnd.choice(wrong)
    if isinstance(value, int):
        return rnd.choice([None, "3", -1, 1.5, float("nan"), [], True, torch.tensor(1)])
    if isinstance(value, str):
        return rnd.choice([None, "", value + "x", 3])
    return rnd.choice([None, 3, "x", (), [None], [3], {"a": 1}, {3: {}}])


def changed(state: Any, path: tuple[Any, ...], make: Callable[[Any], Any]) -> Any:
    at = state
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = make(at[path[-1]])
    return state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return len(one) == len(other) and all(map(same, one, other)) if isinstance(one, list) else bool(one == other)


@pytest.mark.parametrize("seed", range(60))
def test_a_state_with_one_wrong_value_is_refused_with_nothing_changed(seed: int, coverage: Callable[..., None]) -> None:
    rnd = random.Random(seed)
    model, optimizer, control = made()
    for _ in range(3):
        step(model, optimizer)
    state = control.state_dict()
    path = rnd.choice(places(state))
    broken = changed(copy.deepcopy(state), path, lambda value: odd(rnd, value))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nw.PolicyError) as caught:
        control.load_state_dict(broken)
    assert "state" in str(caught.value), path
    assert same(control.state_dict(), state), path
    assert all(map(torch.equal, model.parameters(), before))
    coverage("fuzzed input: outcomes", "states of a control", "refused")


@pytest.mark.parametrize("spoil", [
    lambda t: t.fill_(float("nan")), lambda t: t.fill_(float("inf")), lambda t: t.neg_(), lambda t: t.to(torch.complex64),
    lambda t: t.long(),
], ids=["nan", "inf", "negative", "complex", "whole"])  # fmt: skip
def test_a_radius_that_would_spoil_the_weights_is_refused(spoil: Callable[[Tensor], Tensor]) -> None:
    model, optimizer, control = made()
    step(model, optimizer)
    state = control.state_dict()
    broken = changed(copy.deepcopy(state), ("rules", 0, "radius", "0.weight"), spoil)
    with pytest.raises(nw.PolicyError, match=r"no fitting radius for '0\.weight'"):
        control.load_state_dict(broken)
    assert same(control.state_dict(), state)


@pytest.mark.parametrize("state", [None, 3, "x", [], {}, {"version": 1}, {"version": 1, "steps": [0], "rules": [None] * 7}, torch.ones(3)])
def test_what_is_no_state(state: Any) -> None:
    _, _, control = made()
    with pytest.raises(nw.PolicyError, match="state"):
        control.load_state_dict(state)


def test_a_sound_state_still_goes_in() -> None:
    model, optimizer, control = made()
    step(model, optimizer)
    state = control.state_dict()
    step(model, optimizer)
    control.load_state_dict(state)
    assert same(control.state_dict(), state)


# ------------------------------------------------------------------------------------------------------- safe loading


def test_a_payload_in_a_torch_file_does_not_run(tmp_path: Path) -> None:
    """The way of ``examples/gpt.py``, and that what a control saves can be loaded so."""
    _, _, control = made()
    buffer, mark = io.BytesIO(), tmp_path / "ran"
    torch.save({"control": control.state_dict(), "more": Payload(mark)}, buffer)
    buffer.seek(0)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(buffer, weights_only=True)
    assert not mark.exists()
    torch.save(control.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    control.load_state_dict(torch.load(buffer, weights_only=True))
