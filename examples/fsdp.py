"""Trains the small GPT of gpt.py with its weights split over processes (FSDP2): MuonH, a global gradient clip, a bound on the embedding.
Saves half-way with torch.distributed.checkpoint, and goes on from there on any number of processes that divides the batch of 16.

    torchrun --nproc-per-node 2 examples/fsdp.py --save half          # trains, saves at half of the steps, verifies
    torchrun --nproc-per-node 1 examples/fsdp.py --resume half        # goes on from there: the same loss, to rounding
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import BATCH, CONTEXT, GPT, Text, read
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import normwise as nw
from normwise.checkpoints import flat, nested
from normwise.engine.sharded.collectives import TRAFFIC
from normwise.integrations.distributed_checkpoint import load
from normwise.optim import MuonH


class Training:
    """The model in parts, and an optimizer whose rules run inside its step."""

    def __init__(self, text: Text, lr: float) -> None:
        torch.manual_seed(0)    # every process makes the same weights, and keeps its part of them
        self.text, self.step = text, 0
        self.model = GPT(len(text.vocabulary))
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)
        policy = [nw.clip_grad_norm(1.0), nw.max_norm(1.0, "role:embedding", per="unit")]
        self.optimizer = MuonH(self.model, lr=lr, policy=policy)

    def loss(self, data: Tensor, seed: int) -> Tensor:
        """Of this process's part of a batch that is a function of ``seed`` alone."""
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=torch.Generator().manual_seed(seed))
        mine = starts[dist.get_rank() :: dist.get_world_size()]
        rows = data[mine[:, None] + torch.arange(CONTEXT + 1)]
        return functional.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def until(self, stop: int) -> None:
        while self.step < stop:
            self.optimizer.zero_grad()
            self.loss(self.text.train, seed=1 + self.step).backward()
            self.optimizer.step()
            self.step += 1

    @torch.no_grad()
    def held_out_loss(self) -> float:
        total = self.loss(self.text.held_out, seed=0)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        parts: dict[str, nn.Module | MuonH] = {"model": self.model, "optimizer": self.optimizer}
        return flat({"step": self.step, **{name: part.state_dict() for name, part in parts.items()}})

    def save(self, folder: Path) -> None:
        """Tensors by torch, each process its parts; the rest as JSON, which nothing can be hidden in."""
        tensors, metadata = self.state()
        dcp.save(tensors, checkpoint_id=folder)
        if dist.get_rank() == 0:
            (folder / "state.json").write_text(json.dumps(metadata))
        dist.barrier()

    def load(self, folder: Path) -> None:
        self.until(1)    # after a step the optimizer has the state that is to be filled
        tensors, _ = self.state()
        load(tensors, folder)
        state = nested(tensors, json.loads((folder / "state.json").read_text()))
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def run(options: argparse.Namespace) -> int:
    training = Training(Text(read(options.text)), options.lr)
    say(f"{dist.get_world_size()} processes, held-out loss {training.held_out_loss():.4f}")
    if options.resume:
        training.load(options.resume)
    else:
        training.until(options.steps // 2)
    if options.save:
        training.save(options.save)
    sent = TRAFFIC.now()
    training.until(options.steps)
    steps = options.steps - options.steps // 2
    say(f"step {training.step}: held-out loss {training.held_out_loss():.4f}")
    traffic, rules = TRAFFIC.since(sent), training.optimizer.control
    say(f"a step: {traffic.collectives / steps:g} collectives of normwise, {traffic.bytes // steps} bytes from this process")
    found = rules.verify()
    say(found)
    return 0 if found else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; default: the text of Python's help topics")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.02, help="of the hidden matrices: the angle that they turn by in a step")
    parser.add_argument("--save", type=Path, help="the folder of the checkpoint at half of the steps")
    parser.add_argument("--resume", type=Path, help="go on from this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    code = run(options)
    dist.barrier()    # nobody leaves while others still wait for an answer
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)    # not sys.exit: gloo's threads may hold a tensor still, and abort in an interpreter that ends (pytorch/pytorch#179291)
