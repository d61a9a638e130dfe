"""Rules mean the same on one process and on many: every rule on every placement, over gloo with 2, 3 and 4 processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise as nw
from sharded_cases import cases
from sharded_group import run

ALL = [c.name for c in cases()]
SOME = ["max_norm tensor", "clip, then bound", "zclip tensor", "group_lasso", "l1_ball unit", "spectral_cap", "spectral clip"]
LINE = ["rows", "columns", "replicated", "mixed", "fully_shard"]
GRID = ["hsdp", "grid", "fsdp_tp", "fully_shard_hsdp"]
WAYS = {2: LINE, 3: LINE, 4: LINE + GRID}


def _pairs(world: int, long: bool) -> list[tuple[str, str, str]]:
    """(rule, placement, dtype): a part of them by default, everything in the long run."""
    short = {
        2: [(c, "mixed", "float32") for c in ALL] + [(c, p, "float32") for c in SOME for p in ("rows", "columns")],
        3: [(c, p, "float32") for c in SOME for p in ("rows", "fully_shard")],
        4: [(c, p, "float32") for c in SOME[:3] + SOME[-1:] for p in ("hsdp", "grid", "fsdp_tp")],
    }[world]
    if not long:
        return short
    every = [(c, p, dtype) for c in ALL for p in WAYS[world] for dtype in ("float32", "float64")]
    return [pair for pair in every if pair not in short]


def _equalities(world: int, long: bool, tmp_path, coverage) -> None:
    pairs = _pairs(world, long)
    found = run(world, [(" | ".join(p), "sharded_jobs:equal", list(p)) for p in pairs], tmp_path)
    wrong = {name: faults for name, ranks in found.items() for faults in ranks if faults}
    assert not wrong, "\n".join(f"{name}: {faults}" for name, faults in wrong.items())
    for rule, place, dtype in pairs:
        coverage("sharded equals whole", rule, place, world=world, dtype=dtype)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ten_steps_on_split_parameters_are_those_on_whole_ones(world, tmp_path, coverage):
    _equalities(world, False, tmp_path, coverage)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rule_on_every_placement(world, tmp_path, coverage):
    _equalities(world, True, tmp_path, coverage)


JOBS = [
    ("regions", []), ("clip", [2.0]), ("clip", [1.0]), ("clip", [float("inf")]), ("clip", [3.0]), ("foreign_gradients", []),
    ("one_bad_rank", []), ("reports", []), ("balance", []), ("resumed", []),
]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gradients_reports_states_and_owners(world, tmp_path):
    jobs = [*JOBS, *([("nothing_here", [])] if world == 3 else [])]
    found = run(world, [(f"{job} {arguments}", f"sharded_jobs:{job}", arguments) for job, arguments in jobs], tmp_path)
    assert {name: ranks for name, ranks in found.items() if any(ranks)} == {}


def test_a_flat_shard_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight._fsdp_flattened = True
    with pytest.raises(nw.PolicyError, match="flat shard"):
        nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), nw.max_norm(1.0))
