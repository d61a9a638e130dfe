"""``normwise.optim.schedule`` against its formulas, and through what torch does with schedulers."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.optim.schedule import SHAPES

FORMULAS: dict[str, Callable[[float, int, int, int], float]] = {
    "linear": lambda s, n, w, _: 1 - (s - w) / (n - w),
    "sqrt": lambda s, n, w, _: 1 - math.sqrt((s - w) / (n - w)),
    "concave": lambda s, n, w, _: 1 - ((s - w) / (n - w)) ** 2,
    "hold": lambda s, n, w, _: 1.0 if s < n // 2 else 1 - (s - n // 2) / (n - n // 2),
    "cooldown": lambda s, n, w, _: 1.0 if s < 0.8 * n else 1 - math.sqrt((s - 0.8 * n) / (0.2 * n)),
    "flat": lambda s, n, w, _: 1.0,
}


def made(steps: int, **options: object) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = nw.optim.auto(model)
    return optimizer, nw.optim.schedule(optimizer, steps, **options)    # type: ignore[arg-type]


@pytest.mark.parametrize("shape", FORMULAS)
@pytest.mark.parametrize("warm_up", [0.0, 0.05, 0.3])
def test_every_group_follows_the_formula(shape: str, warm_up: float) -> None:
    optimizer, rates = made(100, shape=shape, warm_up=warm_up)
    peaks, warm = [group["initial_lr"] for group in optimizer.param_groups], round(warm_up * 100)
    assert len(set(peaks)) > 1, "matrices and the rest have rates of their own"
    for step in range(100):
        share = (step + 1) / warm if step < warm else FORMULAS[shape](step, 100, warm, 0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak * share for peak in peaks], abs=1e-12)
        optimizer.step()
        rates.step()
    assert optimizer.param_groups[0]["lr"] == (peaks[0] if shape == "flat" else pytest.approx(0.0, abs=1e-12))
    assert set(FORMULAS) == set(SHAPES)


def test_a_resumed_run_has_the_rates_of_the_uninterrupted_one(tmp_path: Path) -> None:
    optimizer, rates = made(40)
    seen = []
    for step in range(40):
        if step == 17:
            torch.save({"optimizer": optimizer.state_dict(), "schedule": rates.state_dict()}, tmp_path / "checkpoint.pt")
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again, other = made(7)    # the checkpoint knows how long the run is
    again.load_state_dict(kept["optimizer"])
    other.load_state_dict(kept["schedule"])
    for step in range(17, 40):
        assert again.param_groups[0]["lr"] == seen[step]
        again.step()
        other.step()


def test_a_schedule_is_copied_and_pickled_with_its_optimizer() -> None:
    pair = made(10)
    for optimizer, rates in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        optimizer.step()
        rates.step()
        assert rates.optimizer is optimizer and optimizer.param_groups[0]["lr"] == pytest.approx(0.028 * 9 / 9)


def test_a_step_beyond_the_end_says_so_once() -> None:
    optimizer, rates = made(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
            rates.step()
    with pytest.warns(UserWarning, match="the schedule ended after 3 steps: the rate is 0") as told:
        for _ in range(3):
            optimizer.step()
            rates.step()
    assert len(told) == 1 and optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": 0}, "steps is 0"), ({"steps": 10.0}, "steps is 10.0"), ({"steps": True}, "steps is True"),
     ({"steps": 9, "shape": "liner"}, "linear"), ({"steps": 9, "warm_up": 1.0}, "warm_up is 1.0"), ({"steps": 9, "warm_up": -0.1}, "-0.1"),
     ({"steps": 9, "warm_up": "short"}, "warm_up is 'short'"), ({"steps": 9, "warm_up": math.nan}, "warm_up is nan")],
)  # fmt: skip
def test_what_is_no_schedule_is_one_error(options: dict[str, object], said: str) -> None:
    with pytest.raises(nw.PolicyError, match=said):
        made(**options)    # type: ignore[arg-type]


@pytest.mark.parametrize("given", [nn.Linear, nn.Linear(2, 2), None, "adamw"], ids=repr)
def test_what_is_no_optimizer_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match="needs a torch optimizer"):
        nw.optim.schedule(given, 5)    # type: ignore[arg-type]
