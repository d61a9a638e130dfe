"""Processes that start at once: forks of a process that has imported torch and normwise, which takes four seconds."""

from __future__ import annotations

import multiprocessing

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([
    "normwise", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
])  # fmt: skip
