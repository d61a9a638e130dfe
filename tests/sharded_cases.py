"""What the ranks of the sharded tests run: rules and placements, each held against the same rule on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import normwise as nw
from normwise.engine.sharded.collectives import TRAFFIC

STEPS = 10
BUCKETS = 8
"""Weights of different shapes in ``Net``."""
LARGEST = 33 * 16
"""The entries of the largest parameter: what any rank may be sent at most."""
BLOCKS = 256
"""More than the norms of any rule here: what a separable rule may be sent, in float64; less than half of the model."""
EVERY = "*.weight"


@dataclass
class Case:
    """A rule, how near sharded and unsharded must be, and what it may send in a step after the first."""

    name: str
    policy: Callable[[], Any]
    rtol: float = 1e-6
    collectives: int = 2 * BUCKETS
    """At most, in a step: two a bucket where whole blocks are needed."""
    whole: bool = True
    """Whether whole blocks are needed."""
    report: Callable[[nn.Module, Any, int], None] | None = None


def small(name: str, policy: Callable[[], Any], collectives: int, report: Any = None) -> Case:
    """A rule that needs no whole block."""
    return Case(name, policy, collectives=collectives, whole=False, report=report)


class Net(nn.Module):
    """Rows that divide evenly, that do not, fewer rows than ranks; stacked matrices; a convolution; vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(8, 12)
        self.odd = nn.Linear(5, 7, bias=False)
        self.odd2 = nn.Linear(5, 7, bias=False)
        self.few = nn.Linear(6, 2)
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.emb = nn.Embedding(33, 16)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    made = Net().to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(step + 1)
    size = 4.0 if step == 7 else 1.0
    return {n: torch.randn(p.shape, generator=made, dtype=torch.float64).mul_(size).to(p.dtype) for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ placements


def _place(model: nn.Module, mesh: DeviceMesh, choose: Callable[[str, Tensor], list[Any] | None]) -> nn.Module:
    for name, p in list(model.named_parameters()):
        placements = choose(name, p)
        if placements is not None:
            owner = model.get_submodule(name.rpartition(".")[0])
            split = distribute_tensor(p.detach(), mesh, placements)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(split))
    return model


def _column(p: Tensor) -> Any:
    return Shard(1) if p.ndim > 1 else Shard(0)


def _mixed(name: str, p: Tensor) -> list[Any] | None:
    return {"even": [Shard(0)], "odd": [Shard(1)] if p.ndim > 1 else None, "conv": [Replicate()], "emb": [Shard(0)]}.get(name.split(".")[0])


def _fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model


def _fsdp_tp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    rows = {"even.weight": [Shard(0)], "even.bias": [Shard(0)], "emb.weight": [Shard(1)], "conv.weight": [Shard(0)]}
    held = _place(model, mesh["tp"], lambda name, p: rows.get(name, [Replicate()]))
    fully_shard(held, mesh=mesh["dp"])
    return held


def _part_of(model: nn.Module, grid: bool = False) -> nn.Module:
    """On the first two ranks only, as one pipeline stage; the others hold nothing. grid: the mesh has two dimensions, and no names."""
    ranks, split = ([[0], [1]], [Shard(0), Shard(1)]) if grid else ([0, 1], [Shard(0)])
    return _place(model, DeviceMesh("cpu", ranks), lambda name, p: split[: p.ndim] if name in ("even.weight", "odd.weight") else None)


def placements(world: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "rows": lambda m: _place(m, line, lambda n, p: [Shard(0)]),
        "columns": lambda m: _place(m, line, lambda n, p: [_column(p)]),
        "replicated": lambda m: _place(m, line, lambda n, p: [Replicate()]),
        "mixed": lambda m: _place(m, line, _mixed),
        "fully_shard": lambda m: _fsdp(m, line),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found |= {
            "hsdp": lambda m: _place(m, grid, lambda n, p: [Replicate(), Shard(0)]),
            "grid": lambda m: _place(m, grid, lambda n, p: [Shard(0), _column(p) if p.ndim > 1 else Replicate()]),
            "fsdp_tp": lambda m: _fsdp_tp(m, grid),
            "fully_shard_hsdp": lambda m: _fsdp(m, grid),
        }
    return found


# ----------------------------------------------------------------------------------------------------------------- rules

def _heads(model: nn.Module, control: Any, step: int) -> None:
    rank = dist.get_rank() if isinstance(model.attn.in_proj_weight, DTensor) else 0    # type: ignore[union-attr]
    control.report_max_logits("attn", torch.tensor([50.0 + step, 150.0]) / (1 + rank))


def cases() -> list[Case]:
    near = {"rtol": 1e-4}
    return [
        small("max_norm", lambda: [nw.max_norm(1.0, EVERY)], 1),
        small("max_norm tensor", lambda: [nw.max_norm(1.0, EVERY, per="tensor")], 1),
        small("max_norm input", lambda: [nw.max_norm(1.0, ["even.weight", "emb*"], per="input")], 1),
        small("max_norm l1", lambda: [nw.Rule(params=EVERY, action="clip_norm", norm="l1", per="tensor", radius=3.0)], 1),
        small("max_norm rms", lambda: [nw.Rule(params=EVERY, action="project", norm="rms", per="tensor", radius=0.1)], 1),
        small("max_norm linf", lambda: [nw.Rule(params=EVERY, action="clip_norm", norm="linf", per="tensor", radius=0.3)], 1),
        small("min_max", lambda: [nw.min_max_norm(0.5, 1.0, params=EVERY)], 1),
        small("unit_norm", lambda: [nw.unit_norm(params=EVERY)], 1),
        small("clip_grad_norm", lambda: [nw.clip_grad_norm(1.0)], 1),
        small("clip_grad_value", lambda: [nw.clip_grad_value(0.5)], 0),
        small("clip, then bound", lambda: [nw.clip_grad_norm(1.0), nw.max_norm(1.0, EVERY, per="tensor")], 2),
        small("autoclip", lambda: [nw.autoclip(30.0)], 1),
        small("zclip", lambda: [nw.zclip(1.0, warmup=3)], 1),
        small("zclip tensor", lambda: [nw.zclip(1.0, warmup=3, per="tensor")], 1),
        small("init radius", lambda: [nw.max_norm("init", EVERY, per="tensor")], 1),
        small("center", lambda: [nw.Rule(params=EVERY, action="clip_norm", per="tensor", radius=0.2, center="init")], 1),
        small("relative update", lambda: [nw.relative_update(params=EVERY)], 2),
        small("hyperball", lambda: [nw.hyperball(params=EVERY)], 2),
        small("brake", lambda: [nw.radial_brake(params=EVERY)], 2),
        small("cpr", lambda: [nw.cpr("init", EVERY, per="tensor", mu=0.1)], 1),
        small("agc", lambda: [nw.agc(0.05, EVERY)], 2),
        small("weight_decay", lambda: [nw.weight_decay(0.1, EVERY)], 0),
        small("l2_penalty", lambda: [nw.l2_penalty(0.1, EVERY)], 0),
        small("l1_penalty", lambda: [nw.l1_penalty(0.1, EVERY)], 1),
        small("group penalty", lambda: [nw.Rule(params=EVERY, action="penalty", norm="l2", per="unit", strength=0.1)], 1),
        small("l1_prox", lambda: [nw.l1_prox(0.1, EVERY)], 0),
        small("group_lasso", lambda: [nw.group_lasso(0.5, EVERY)], 1),
        small("non_negative", lambda: [nw.non_negative(EVERY)], 0),
        small("box", lambda: [nw.Rule(params=EVERY, action="project", norm="linf", per="tensor", radius=0.3)], 0),
        small("sign", lambda: [nw.Rule(params=EVERY, action="lmo", norm="linf", per="tensor")], 0),
        small("qk_clip", lambda: [nw.qk_clip(100.0)], 2, _heads),
        Case("l1_ball", lambda: [nw.Rule(params=EVERY, action="project", norm="l1", per="tensor", radius=3.0)]),
        Case("l1_ball unit", lambda: [nw.Rule(params=EVERY, action="project", norm="l1", per="unit", radius=0.7)]),
        Case("prox linf", lambda: [nw.Rule(params=EVERY, action="prox", norm="linf", per="unit", strength=0.5)]),
        Case("penalty linf", lambda: [nw.Rule(params=EVERY, action="penalty", norm="linf", per="tensor", strength=0.5)]),
        Case(
            "max of units",
            lambda: [nw.Rule(params=["even.weight", "emb.weight"], action="clip_norm", norm="max_of_units", radius=0.5)],
            **near,
        ),
        Case("spectral_cap", lambda: [nw.spectral_cap(0.8)], **near),
        Case("spectral_cap tolerance", lambda: [nw.spectral_cap(0.8, tolerance=0.05)], rtol=1.0),
        Case("spectral clip", lambda: [nw.Rule(action="clip_norm", norm="spectral", per="matrix", radius=0.8)], **near),
        Case("spectral_normalize", lambda: [nw.spectral_normalize()], **near),
        Case("spectral init", lambda: [nw.Rule(action="project", norm="spectral", per="matrix", radius="init")], **near),
        Case("nuclear prox", lambda: [nw.nuclear_prox(0.5)], **near),
        Case("lmo spectral", lambda: [nw.Rule(action="lmo", norm="spectral", per="matrix", on="grad")], **near),
        Case("lmo update", lambda: [nw.Rule(action="lmo", norm="spectral", per="matrix", on="update")], **near),
        Case("orthogonal", lambda: [nw.orthogonal()], **near),
        Case("orthogonal penalty", lambda: [nw.orthogonal_penalty(0.1)], **near),
    ]


# ------------------------------------------------------------------------------------------------------------------- runs


MEASURED_WIDE = ("spectral clip", "spectral_normalize", "max of units")
"""Weights under matrix norms that only scale are measured in float64."""


@dataclass
class Outcome:
    """What one rank found about one case."""

    case: str
    worst: float = 0.0
    name: str = ""
    collectives: int = 0
    largest: int = 0
    faults: list[str] = field(default_factory=list)


def train(model: nn.Module, case: Case, steps: int = STEPS) -> tuple[dict[str, Tensor], Any, int]:
    """Ten steps on given gradients: the weights, the control, and the collectives of the last step."""
    whole = net(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    control = nw.attach(model, optimizer, case.policy())
    sent = TRAFFIC.now()
    for step in range(steps):
        for (_, p), g in zip(model.named_parameters(), gradients(whole, step).values(), strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g.clone()
        if case.report:
            case.report(model, control, step)
        sent = TRAFFIC.now()
        optimizer.step()
    with torch.no_grad():
        weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}
    return weights, control, TRAFFIC.since(sent).collectives


def hold(case: Case, place: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float32) -> Outcome:
    """The case on split parameters against the case on whole ones."""
    plain, control, _ = train(net(dtype), case)
    TRAFFIC.largest = 0
    split, other, collectives = train(place(net(dtype)), case)
    out = Outcome(case.name, collectives=collectives, largest=TRAFFIC.largest)
    for name, mine in split.items():
        off = float((mine - plain[name]).abs().max() / plain[name].abs().max())
        if not off <= out.worst:
            out.worst, out.name = off, name
    limit = case.rtol if dtype == torch.float32 else min(1e-10, case.rtol)
    if collectives > case.collectives:
        out.faults.append(f"{collectives} collectives in a step")
    rows = dtype == torch.float64 or "linf" in case.name    # maxima, and squares of float64, travel as one row a rank
    wide = 8 if case.name in MEASURED_WIDE else dtype.itemsize
    allowed = LARGEST * wide if case.whole else 8 * BLOCKS * (dist.get_world_size() if rows else 1)
    if out.largest > allowed:
        out.faults.append(f"{out.largest} bytes came to one rank at once, more than {allowed}")
    if case.rtol < 1 and not out.worst <= limit:
        out.faults.append(f"{out.name} is off by {out.worst:.2g}")
    first, second = control.verify(), other.verify()
    if second.breaches or second.never_ran or second.ok != first.ok or first.blocks != second.blocks:
        out.faults.append(f"verify: {second} (whole: {first})")
    if case.rtol < 1 and sum(control.violations().values()) != sum(other.violations().values()):
        out.faults.append(f"violations {other.violations()}, whole {control.violations()}")
    if abs(control.penalty() - other.penalty()) > 1e-4 * (1 + abs(control.penalty())):
        out.faults.append(f"penalty {other.penalty()}, whole {control.penalty()}")
    for a, b in () if case.rtol == 1 else zip(_numbers(control.state_dict()), _numbers(other.state_dict()), strict=True):
        if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
            out.faults.append("the states differ")
    return out


def _numbers(state: Any) -> Iterator[Tensor]:
    for rule in state["rules"]:
        for what in ("radius", "center"):
            yield from (t.full_tensor() if isinstance(t, DTensor) else t for _, t in sorted(rule[what].items()))
        yield from (t for _, found in sorted(rule["found"].items()) for t in found.values())

