"""Whole training runs on many processes, forward and backward included, each held against the same run on one process."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.checkpoints import flat, nested
from normwise.integrations.distributed_checkpoint import load

STEPS, PLACES, TOKENS, WIDTH = 6, 5, 20, 8
BATCH = 24    # of two, three and four processes a multiple, and of their halves
BLOCKS = "blocks.*.weight"


class Reader(nn.Module):
    """Tokens to logits: an embedding, two blocks of two matrices beside a residual, a head."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """x + down(gelu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


def reader(dtype: torch.dtype = torch.float64, checkpointed: bool = False, seed: int = 3) -> Reader:
    torch.manual_seed(seed)
    return Reader(checkpointed).to(dtype)


def batches(steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(0, TOKENS, (BATCH, PLACES + 1), generator=made)
        yield tokens[:, :-1], tokens[:, 1:]


# ------------------------------------------------------------------------------------------------------------ placements


def _ddp(model: nn.Module, mesh: Any) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: Any, mesh: DeviceMesh | None, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _tensor_parallel(model: Any, mesh: DeviceMesh | None) -> nn.Module:
    plan: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    for i in range(len(model.blocks)):
        plan |= {f"blocks.{i}.up": ColwiseParallel(), f"blocks.{i}.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def _both(model: Any, mesh: DeviceMesh) -> nn.Module:
    return _fsdp(_tensor_parallel(model, mesh["tp"]), mesh["dp"])


@dataclass(frozen=True)
class Way:
    """How a model is put on processes, over how many of them its batch is split, and which part of it is this rank's."""

    place: Callable[[nn.Module, Any], nn.Module]
    mesh: Any
    parts: int
    mine: int

    def share(self, t: Tensor) -> Tensor:
        return t.chunk(self.parts)[self.mine]


def way(name: str) -> Way:
    world, rank = dist.get_world_size(), dist.get_rank()
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    if name in ("hsdp", "fsdp_tp"):
        names = ("copies", "dp") if name == "hsdp" else ("dp", "tp")
        grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
        return Way(_fsdp, grid, world, rank) if name == "hsdp" else Way(_both, grid, 2, grid.get_local_rank("dp"))
    if name == "tensor_parallel":
        return Way(_tensor_parallel, line, 1, 0)
    return Way(_ddp if name == "ddp" else _fsdp, line, world, rank)


# ----------------------------------------------------------------------------------------------------------------- runs


def _rules(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=False)
    tensor = nw.max_norm(2.0, "head.weight", per="tensor")
    rules = [nw.agc(0.005, "embedding.weight"), nw.clip_grad_norm(0.1), tensor, nw.spectral_cap(0.6, BLOCKS)]
    return optimizer, nw.attach(model, optimizer, rules)


def _adam(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0, foreach=False)
    return optimizer, nw.attach(model, optimizer, [nw.autoclip(30.0), nw.hyperball(params=BLOCKS), nw.l1_prox(0.01, "head.weight")])


def _muonh(model: nn.Module) -> Any:
    return nw.optim.MuonH(model, lr=0.02, polar="exact", policy=[nw.clip_grad_norm(0.5)]), None


def _auto(model: nn.Module) -> Any:
    return nw.optim.auto(model), None


MAKE = {"rules": _rules, "Adam": _adam, "MuonH": _muonh, "auto": _auto}


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        n.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def trained(place: str, how: str, pieces: int = 1, checkpointed: bool = False, backend: str = "") -> list[str]:
    """A run in float64 on processes against that on one. pieces: of gradient accumulation. backend: of torch.compile."""
    here = way(place)
    plain, split = reader(checkpointed=checkpointed), here.place(reader(checkpointed=checkpointed), here.mesh)
    made = {model: MAKE[how](model) for model in (plain, split)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = {plain: plain, split: torch.compile(split, backend=backend) if backend else split}
    faults, graphs, acted = [], [], Counter[str]()
    for x, y in batches():
        for model, (optimizer, control) in made.items():
            optimizer.zero_grad()
            mine = [here.share(t) if model is split else t for t in (x, y)]
            for a, b in zip(*(t.chunk(pieces) for t in mine), strict=True):
                (_loss(run[model], a, b) / pieces).backward()
            optimizer.step()
            if control is not None:
                faults += [] if control.verify() else [str(control.verify())]
                acted.update(control.violations())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    faults += [f"the rule '{rule}' had nothing to do" for rule, blocks in acted.items() if not blocks]
    if graphs[1] != graphs[-1] or bool(graphs[-1]) != bool(backend):
        faults.append(f"graphs after each step: {graphs}")
    return faults + _differences(_weights(plain), _weights(split), 1e-9)


def scaled(place: str) -> list[str]:
    """GradScaler, which takes gradients that are all plain or all DTensors, an infinite one at two steps: on every rank the step happens,
    or on none, and what rules remember with it."""
    here = way(place)
    plain, split = reader(torch.float32), here.place(reader(torch.float32), here.mesh)
    made = [(model, *_adam(model), torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)) for model in (plain, split)]
    faults = []
    for step, (x, y) in enumerate(batches(8)):
        before = [_weights(model) for model, *_ in made]
        for model, optimizer, _, scaler in made:
            optimizer.zero_grad()
            mine = [here.share(t) if model is split else t for t in (x, y)]
            scaler.scale(_loss(model, *mine)).backward()
            if step in (2, 5):
                _spoil(model.get_parameter(f"{'module.' if place == 'ddp' and model is split else ''}head.weight").grad)
            scaler.step(optimizer)
            scaler.update()
        after = [_weights(model) for model, *_ in made]
        stood = [all(torch.equal(w, new[n]) for n, w in old.items()) for old, new in zip(before, after, strict=True)]
        if stood != [step in (2, 5)] * 2:
            faults.append(f"step {step}: plain and split weights {stood} as before")
    scales = [scaler.get_scale() for *_, scaler in made]
    if scales[0] != scales[1]:
        faults.append(f"scales {scales}")
    found = [{n: f for rule in control.state_dict()["rules"] for n, f in rule["found"].items()} for _, _, control, _ in made]
    pairs = [(f"{name} {what}", t, found[1][name][what]) for name, own in found[0].items() for what, t in own.items()]
    faults += [f"{name}: {a} and {b}" for name, a, b in pairs if not torch.allclose(a, b, rtol=1e-4)]
    return faults + _differences(_weights(plain), _weights(split), 1e-4)


def _spoil(grad: Any) -> None:
    """One entry that is not finite, in one part alone, and in its copies."""
    mine = grad.to_local() if isinstance(grad, DTensor) else grad
    where = zip(grad.device_mesh.get_coordinate(), grad.placements, strict=True) if isinstance(grad, DTensor) else ()
    if mine.numel() and all(c == 0 for c, p in where if hasattr(p, "dim")):
        mine.view(-1)[0] = torch.inf


def mixed(dtype: str) -> list[str]:
    """FSDP's own mixed precision: fp32 weights that are split, bf16 or fp16 in the passes. The bounds are those of the fp32 weights."""
    here = way("fsdp")
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    model = _fsdp(reader(torch.float32), here.mesh, mp_policy=policy)
    optimizer, control = _rules(model)
    losses, faults = [], []
    for x, y in itertools.islice(itertools.cycle(batches(2)), 20):
        optimizer.zero_grad()
        loss = _loss(model, here.share(x), here.share(y))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not control.verify() or not sum(control.violations().values()):
            faults.append(f"step {len(losses)}: {control.verify()}, {control.violations()}")
    return faults + ([] if losses[-2] < 0.95 * losses[0] else [f"nothing learned: {losses}"])


def first_half(folder: str, how: str) -> list[str]:
    """Trains for half of the steps and saves with torch.distributed.checkpoint."""
    run = Saved(how)
    run.train(0, STEPS // 2)
    tensors, metadata = run.state()
    dcp.save(tensors, checkpoint_id=Path(folder, how))
    if dist.get_rank() == 0:    # the same on every rank
        Path(folder, f"{how}.json").write_text(json.dumps(metadata))
    return []


def second_half(folder: str, how: str) -> list[str]:
    """Goes on from there on any number of processes, to where one process comes that was never interrupted. All comes from the checkpoint:
    the model that is filled has other initial weights, whose norms some rules remember."""
    run = Saved(how, seed=4)
    run.train(STEPS - 1, STEPS)    # after a step there are states to be filled
    tensors, _ = run.state()
    load(tensors, Path(folder, how))
    run.take(nested(tensors, json.loads(Path(folder, f"{how}.json").read_text())))
    run.train(STEPS // 2, STEPS)
    plain = Saved(how, split=False)
    plain.train(0, STEPS)
    return _differences(_weights(plain.model), _weights(run.model), 1e-9)


class Saved:
    """A model under ``fully_shard``, or a plain one, its optimizer and its control; what a checkpoint has of them."""

    def __init__(self, how: str, split: bool = True, seed: int = 3) -> None:
        self.way = way("fsdp")
        self.model: nn.Module = self.way.place(reader(seed=seed), self.way.mesh) if split else reader(seed=seed)
        self.optimizer, self.control = MAKE[how](self.model)
        self.split = split

    def train(self, start: int, stop: int) -> None:
        for x, y in itertools.islice(batches(), start, stop):
            self.optimizer.zero_grad()
            _loss(self.model, *(self.way.share(t) if self.split else t for t in (x, y))).backward()
            self.optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        parts = {"model": self.model, "optimizer": self.optimizer, **({} if self.control is None else {"control": self.control})}
        return flat({name: part.state_dict() for name, part in parts.items()})

    def take(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.control is not None:
            self.control.load_state_dict(state["control"])


def _differences(plain: dict[str, Tensor], split: dict[str, Tensor], limit: float) -> list[str]:
    faults = [] if plain.keys() == split.keys() else [f"names {sorted(split)}"]
    for name, w in plain.items():
        off = float((split[name] - w).abs().max() / w.abs().max())
        if not off <= limit:
            faults.append(f"{name} is off by {off:.2g}")
    return faults


# ------------------------------------------------------------------------------------------------- torch's own checkpoints


def _remembering() -> list[Any]:
    """With a state that is split as the weights are (a center, a carry), and with ones that every rank has whole."""
    return [
        nw.zclip(z=0.5, warmup=2), nw.max_norm(0.5, params="head.weight", center="init"), nw.unit_norm("init", params="blocks.0.*.weight"),
        nw.cpr(0.9, mu=0.1, params="embedding.weight", exclude=None),
        nw.weight_decay(0.1, params="blocks.1.*.weight", rounding="compensated"),
        nw.weight_decay(nw.schedules.linear(0.1, 1.0, STEPS), params="head.weight", rounding="stochastic"),
    ]  # fmt: skip


def by_torch(folder: str, how: str, full: bool, flattened: bool, dtype: str) -> list[str]:
    """Cut in the middle, saved by ``get_state_dict`` and torch's writer, set in other objects by ``set_state_dict``: no bit differs."""
    here = way("fsdp")
    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flattened)

    def built(seed: int) -> tuple[nn.Module, Any, nw.Control]:
        model = here.place(reader(getattr(torch, dtype), seed=seed), here.mesh)
        if how == "preset":
            optimizer = nw.optim.MuonH(model, lr=0.02, polar="exact", policy=_remembering())
            return model, optimizer, optimizer.control
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=False)
        return model, optimizer, nw.attach(model, optimizer, _remembering())

    def train(model: nn.Module, optimizer: Any, start: int, stop: int) -> None:
        for x, y in itertools.islice(batches(), start, stop):
            optimizer.zero_grad()
            _loss(model, here.share(x), here.share(y)).backward()
            optimizer.step()
        optimizer.zero_grad()

    model, optimizer, control = built(3)
    before = _weights(model)
    get_optimizer_state_dict(model, optimizer, options=options)    # takes torch's step that makes state
    faults = _other_bits(before, _weights(model)) + ([] if control.steps == 0 else ["torch's own step was counted"])
    train(model, optimizer, 0, STEPS // 2)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    path = Path(folder, f"{how}-{full}-{flattened}-{dtype}")
    if full:
        torch.save(parts, buffer := io.BytesIO())
        parts = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    else:
        dcp.save(parts, checkpoint_id=path)
    train(model, optimizer, STEPS // 2, STEPS)
    resumed, again, other = built(4)
    if not full:
        parts = dict(zip(("model", "optimizer"), get_state_dict(resumed, again, options=options), strict=True))
        dcp.load(parts, checkpoint_id=path)
    set_state_dict(resumed, again, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"], options=options)
    faults += [] if other.steps == STEPS // 2 else [f"{other.steps} steps"]
    train(resumed, again, STEPS // 2, STEPS)
    return faults + _other_bits(_weights(model), _weights(resumed))


def saved_by_torch(folder: str, split: bool, dtype: str) -> list[str]:
    """Trains for half of the steps, split or whole, and saves with ``get_state_dict``, nested; rank 0 keeps beside it what is in there."""
    run = _Across(split, dtype)
    run.train(0, STEPS // 2)
    dcp.save(run.parts(), checkpoint_id=Path(folder, dtype))
    kept = {"weights": _weights(run.model), "rules": run.known()}
    if dist.get_rank() == 0:
        torch.save(kept, Path(folder, f"{dtype}.pt"))
    return []


def loaded_by_torch(folder: str, split: bool, dtype: str) -> list[str]:
    """The same bits in a run whose weights lie elsewhere; in float64 it ends as one process does that was never interrupted."""
    run = _Across(split, dtype, seed=4)
    parts = run.parts()
    dcp.load(parts, checkpoint_id=Path(folder, dtype))
    set_state_dict(run.model, run.optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    kept = torch.load(Path(folder, f"{dtype}.pt"), weights_only=True)
    faults = _other_bits(kept["weights"], _weights(run.model)) + _other_bits(kept["rules"], run.known())
    faults += [] if kept["rules"].keys() == run.known().keys() else [f"rules know {sorted(run.known())}"]
    run.train(STEPS // 2, STEPS)
    plain = _Across(False, dtype)
    plain.train(0, STEPS)
    return faults + (_differences(_weights(plain.model), _weights(run.model), 1e-9) if dtype == "float64" else [])


class _Across(Saved):
    """Rules that keep copies of weights, on a model of any dtype."""

    def __init__(self, split: bool, dtype: str, seed: int = 3) -> None:
        self.way, self.split = way("fsdp"), split
        model = reader(getattr(torch, dtype), seed=seed)
        self.model = self.way.place(model, self.way.mesh) if split else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02, foreach=False)
        near = [nw.decay_to_init(0.1, params="blocks.0.*"), nw.l2_penalty(0.1, params="*norm*", center="init", exclude=None)]
        rules = [*_remembering(), *near]
        self.control = nw.attach(self.model, self.optimizer, [r for r in rules if r.rounding != "stochastic"])

    def parts(self) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))

    def known(self) -> dict[str, Tensor]:
        """All that the rules keep, by rule, kind and parameter."""
        tensors, _ = flat({"rules": self.control.state_dict()["rules"]})
        exact = {name: t.double() for name, t in tensors.items()}    # gloo gathers no int16
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in exact.items()}


def _other_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [f"{name} differs" for name, w in one.items() if not torch.equal(w, other[name]) or not bool(w.isfinite().all())]
