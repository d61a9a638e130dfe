"""Runs functions in a group of processes over gloo, many in one group, since starting it costs seconds."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forks import forks

Job = tuple[str, str, list[Any]]
"""A name, ``module:function``, its arguments."""


def run(world: int, jobs: list[Job], folder: Path) -> dict[str, list[Any]]:
    """What each job returned, on each rank: a list of faults, or numbers. A job that raises ends the group.

    A group that a *signal* ended is started once more, with a warning that says so: gloo's own threads abort a process now and then
    on a busy machine (pytorch/pytorch#179291), and a fault of ours in a kernel comes again.
    """
    for attempt in ("first", "second"):
        meeting = folder / attempt
        meeting.mkdir()
        try:
            mp.start_processes(_rank, args=(world, jobs, str(meeting)), nprocs=world, start_method=forks.get_start_method())
            break
        except mp.ProcessExitedException as error:
            if attempt == "second" or error.signal_name is None:
                raise
            warnings.warn(f"{error}; the group is started once more", RuntimeWarning, stacklevel=2)
    ranks = [json.loads((meeting / f"{rank}.json").read_text()) for rank in range(world)]
    return {name: [r[name] for r in ranks] for name, _, _ in jobs}


def _rank(rank: int, world: int, jobs: list[Job], folder: str) -> None:
    faulthandler.enable()    # a process that a signal ends says where each of its threads was
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {}
    for name, where, arguments in jobs:
        module, function = where.split(":")
        try:
            found[name] = getattr(importlib.import_module(module), function)(*arguments)
        except Exception as error:
            raise RuntimeError(f"{name} on rank {rank}: {traceback.format_exc()}") from error
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    _wait_for_all(Path(folder), rank, world)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)    # gloo's threads let go of their last tensors when they get to it; in an interpreter that is ending, that aborts


def _wait_for_all(folder: Path, rank: int, world: int) -> None:
    """Until everybody has left the barrier: one that closes its connections while another still waits there makes gloo abort, at times."""
    (folder / f"{rank}.left").touch()
    for _ in range(600):
        if all((folder / f"{other}.left").exists() for other in range(world)):
            return
        time.sleep(0.05)
