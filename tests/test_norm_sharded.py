"""What norms promise of blocks that are not finite holds where a parameter is split over processes, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import normwise as nw
from sharded_group import run


def left_as_it_is(dim: int, bad: float) -> list[str]:
    """On each rank: a group lasso over units, one of which has a broken entry; the rule on one process, without it, is the reference."""
    torch.manual_seed(0)
    whole = torch.randn(4, 6)
    broken = whole.clone()
    broken[1, 2] = bad
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for start, split in ((whole, False), (broken, True)):
        net = nn.Linear(6, 4, bias=False)
        w = distribute_tensor(start, mesh, [Shard(dim)], src_data_rank=None) if split else start.clone()
        net.weight = nn.Parameter(w)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        nw.attach(net, optimizer, [nw.Rule(action="prox", norm="l2", per="unit", strength=2.0)])
        net.weight.grad = torch.zeros_like(net.weight)
        optimizer.step()
        found.append(net.weight.full_tensor() if isinstance(net.weight, DTensor) else net.weight.detach())
    plain, mine = found
    faults = [] if torch.equal(mine[1].nan_to_num(77), broken[1].nan_to_num(77)) else [f"the broken unit became {mine[1].tolist()}"]
    others = [0, 2, 3]
    return faults + ([] if torch.allclose(mine[others], plain[others], rtol=1e-6) else ["another unit differs"])


@pytest.mark.parametrize("dim", [0, 1])
def test_a_prox_leaves_a_split_block_that_is_not_finite(dim: int, tmp_path: Path) -> None:
    jobs = [(str(bad), "test_norm_sharded:left_as_it_is", [dim, bad]) for bad in (float("nan"), float("inf"))]
    for name, faults in run(2, jobs, tmp_path).items():
        assert not any(faults), f"{name}: {faults}"
