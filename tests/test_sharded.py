"""Rules and optimizers mean the same on one process and on many: every one on every placement, over gloo with 2, 3 and 4 processes.

By default a part of the combinations, in one group a number of processes; all of them in the long run.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw
from sharded_cases import cases
from sharded_group import Job, run

COUNTS = "counted"
WHERE = dict.fromkeys(("trained", "scaled", "mixed"), "sharded_training")
RULES = [c.name for c in cases()]
SOME = ["max_norm tensor", "clip, then bound", "group_lasso", "l1_ball unit", "spectral_cap"]
PRESETS = list(nw.optim.PRESETS)
LINE = ["rows", "columns", "replicated", "mixed", "fully_shard"]
GRID = ["hsdp", "grid", "fsdp_tp", "fully_shard_hsdp"]
WAYS = {2: LINE, 3: LINE, 4: LINE + GRID}
FAST, EXACT = ("float32", "fast", False), ("float64", "exact", True)
"""Of a preset: the dtype, how polar factors are computed, and whether a policy runs inside of it."""

RULES_BY_DEFAULT = {
    2: [(r, "mixed") for r in RULES] + [(r, "columns") for r in SOME[-2:]],
    3: [(r, "rows") for r in SOME[:2]] + [("spectral_cap", "fully_shard")],
    4: [("spectral_cap", "grid")],
}
PRESETS_BY_DEFAULT = {
    2: [(p, "mixed", *FAST) for p in PRESETS] + [(p, "columns", *EXACT) for p in ("LAMB", "MuonH")],
    3: [("NorMuon", "rows", *FAST)],
    4: [("MuonH", "fsdp_tp", *FAST)],
}
OTHERS: list[tuple[str, list[Any]]] = [
    ("regions", []), ("clip", [2.0]), ("clip", [1.0]), ("clip", [float("inf")]), ("clip", [3.0]), ("foreign_gradients", []),
    ("one_bad_rank", []), ("different_rules", []), ("reports", []), ("balance", []), ("resumed", []), ("radii", []), ("strided", []),
    ("roundings", []), ("replicas", []),
]  # fmt: skip
ON_A_LINE = ("ddp", "fsdp", "tensor_parallel")
TRAINED = {2: ON_A_LINE, 3: ON_A_LINE, 4: (*ON_A_LINE, "hsdp", "fsdp_tp")}
"""Ways to split a model that is trained, forward and backward included, see ``sharded_training``."""
HOW = ("rules", "Adam", "MuonH", "auto")
PIECES, CHECKPOINTED, COMPILED = ["fsdp", "rules", 2], ["fsdp", "rules", 1, True], ["fsdp", "rules", 1, False, "aot_eager"]
RUNS_BY_DEFAULT: dict[int, list[tuple[str, list[Any]]]] = {
    2: [
        *(("trained", [way, "rules"]) for way in TRAINED[2]),
        *(("trained", given) for given in (["fsdp", "auto"], CHECKPOINTED)),
        ("scaled", ["fsdp"]), ("mixed", ["bfloat16"]),
    ],
    3: [("trained", ["tensor_parallel", "MuonH"])],
    4: [("trained", ["fsdp_tp", "rules"])],
}  # fmt: skip


def _default(world: int) -> list[Job]:
    few = [job for job in OTHERS if job[0] in ("regions", "strided") or job == ("clip", [2.0])]
    others = {
        2: [job for job in OTHERS if job[0] != "roundings"], 3: [*few, ("nothing_here", [])],
        4: [*few[:2], ("different_rules", []), ("nothing_here", [])],
    }[world]  # fmt: skip
    rules = [("equal", [*pair, "float32"]) for pair in RULES_BY_DEFAULT[world]]
    return _jobs([*rules, *(("preset", list(p)) for p in PRESETS_BY_DEFAULT[world]), *RUNS_BY_DEFAULT[world], *others])


def _every(world: int) -> list[Job]:
    rules = [("equal", [r, w, dtype]) for r in RULES for w in WAYS[world] for dtype in ("float32", "float64")]
    presets = [("preset", [p, w, *kind]) for p in PRESETS for w in WAYS[world] for kind in (FAST, EXACT)]
    runs = [("trained", [way, how]) for way in TRAINED[world] for how in HOW]
    runs += [("trained", given) for given in (PIECES, CHECKPOINTED, COMPILED, ["tensor_parallel", *COMPILED[1:]])]
    scaled = [("scaled", [way]) for way in ("ddp", "fsdp", *TRAINED[world][3:])]
    narrow = [(job, [dtype]) for job in ("mixed", "narrow") for dtype in ("bfloat16", "float16")]
    counted: list[tuple[str, list[Any]]] = [(COUNTS, [])] if world == 4 else []
    return _jobs([*rules, *presets, *runs, *scaled, *narrow, *OTHERS, *counted])


def _jobs(wanted: list[tuple[str, list[Any]]]) -> list[Job]:
    return [(" | ".join(map(str, [job, *given])), f"{WHERE.get(job, 'sharded_jobs')}:{job}", given) for job, given in wanted]


def _hold(world: int, jobs: list[Job], tmp_path, coverage) -> None:
    found = run(world, jobs, tmp_path)
    if COUNTS in found:
        _hold_page(found.pop(COUNTS))
    wrong = [f"{name}: {faults}" for name, ranks in found.items() for faults in ranks if faults]
    assert not wrong, "\n".join(wrong)
    for _, where, given in jobs:
        if where.endswith(("equal", "preset")):
            coverage("split parameters equal whole ones", given[0], given[1], world=world, dtype=given[2])
        elif where.endswith("trained"):
            coverage("a run on many processes equals that on one", given[1], given[0], world=world, dtype="float64")


def _hold_page(ranks: list[list[list[str]]]) -> None:
    """The table of docs/distributed.md has what the library counted: the collectives, and the bytes of the rank that sent most."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    shown = [line.strip("| ").split(" | ") for line in page.split("<!-- counted -->")[1].split("<!-- /counted -->")[0].splitlines()]
    most = [[max(cells, key=_bytes) for cells in zip(*(row[1:] for row in rows), strict=True)] for rows in zip(*ranks, strict=True)]
    counted = [[row[0], *cells] for row, cells in zip(ranks[0], most, strict=True)]
    assert [row for row in shown if len(row) > 1][1:] == counted, "\n".join("| " + " | ".join(row) + " |" for row in counted)


def _bytes(cell: str) -> int:
    return int(cell.split(": ")[-1])


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_split_parameters_go_the_way_of_whole_ones(world, tmp_path, coverage):
    _hold(world, _default(world), tmp_path, coverage)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rule_and_optimizer_on_every_placement(world, tmp_path, coverage):
    _hold(world, _every(world), tmp_path, coverage)


@pytest.mark.parametrize("first, later", [(2, [1]), pytest.param(4, [2, 1], marks=pytest.mark.long)])
def test_saved_by_many_processes_and_resumed_by_fewer(first, later, tmp_path):
    """In float64, to the weights of a run that was never interrupted."""
    for world in (first, *later):
        folder, job = tmp_path / str(world), "first_half" if world == first else "second_half"
        folder.mkdir()
        found = run(world, [(how, f"sharded_training:{job}", [str(tmp_path), how]) for how in ("rules", "Adam", "MuonH")], folder)
        assert all(faults == [] for ranks in found.values() for faults in ranks), found


@pytest.mark.parametrize("world, some", [(2, True), *(pytest.param(world, False, marks=pytest.mark.long) for world in (2, 3))])
def test_torchs_distributed_checkpoint_carries_the_rules_of_split_weights(world, some, tmp_path):
    """FSDP2; full and split states, nested and flattened ones; a full flattened one torch 2.13 cannot load, with rules or without."""
    forms = [(False, False), (False, True), (True, False)]
    kinds = [(how, *form) for how in ("attached", "preset") for form in forms]
    kinds = [("attached", True, False), ("attached", False, True), ("preset", False, False)] if some else kinds
    given = [[str(tmp_path), *kind, "bfloat16" if kind[2] else "float32"] for kind in kinds]
    found = run(world, [(str(each[1:]), "sharded_training:by_torch", each) for each in given], tmp_path)
    assert all(faults == [] for ranks in found.values() for faults in ranks), found


@pytest.mark.parametrize("first, later", [((2, True), (1, False)), ((1, False), (2, True)), ((2, True), (2, False))], ids=str)
def test_centers_and_carries_saved_by_split_weights_are_loaded_by_whole_ones_and_back(first, later, tmp_path):
    """(processes, split?). Which entries a checkpoint has does not depend on where the weights lie."""
    for (world, split), job in ((first, "saved_by_torch"), (later, "loaded_by_torch")):
        (folder := tmp_path / job).mkdir()
        jobs = [(dtype, f"sharded_training:{job}", [str(tmp_path), split, dtype]) for dtype in ("float64", "bfloat16")]
        found = run(world, jobs, folder)
        assert all(faults == [] for ranks in found.values() for faults in ranks), found


def test_a_flat_shard_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight._fsdp_flattened = True
    with pytest.raises(nw.PolicyError, match="flat shard"):
        nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), nw.max_norm(1.0))


@pytest.mark.parametrize("deaths", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_group_that_a_signal_ended_is_started_once_more_and_only_once(deaths, tmp_path):
    """An abort of gloo's on a busy machine fails no equality; one that comes again does."""
    job: list[Job] = [("dies", "test_sharded:_dies", [str(tmp_path / "died"), deaths])]
    if deaths == 1:
        with pytest.warns(RuntimeWarning, match="SIGABRT.*once more"):
            assert run(1, job, tmp_path) == {"dies": [1]}
    else:
        with pytest.warns(RuntimeWarning), pytest.raises(torch.multiprocessing.ProcessExitedException):
            run(1, job, tmp_path)


def _dies(marks: str, deaths: int) -> int:
    died = len(Path(marks).read_text()) if Path(marks).exists() else 0
    if died < deaths:
        Path(marks).write_text("x" * (died + 1))
        os.kill(os.getpid(), signal.SIGABRT)
    return died
