"""The jobs of the sharded tests: each runs on every rank of a group and returns what is wrong, as a list of strings."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import normwise as nw
from normwise.engine.sharded.collectives import TRAFFIC
from normwise.engine.sharded.pack import Split
from normwise.engine.sharded.placement import Place
from sharded_cases import Case, Net, _part_of, _place, cases, gradients, hold, net, placements, train

PLACES = functools.cache(placements)


def equal(case: str, place: str, dtype: str = "float32") -> list[str]:
    """A rule on one placement against the rule on one process."""
    found = {c.name: c for c in cases()}
    return hold(found[case], PLACES(dist.get_world_size())[place], getattr(torch, dtype)).faults


def regions() -> list[str]:
    """The indices that are computed against torch's own account of where a part lies, and against the numbers that lie there."""
    faults = []
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,)) if world < 4 else init_device_mesh("cpu", (2, 2))
    choices = [Shard(0), Shard(1), Replicate()]
    for shape in [(7, 5), (12, 8), (2, 6), (1, 1), (4, 0), (6, 4, 3)]:
        numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
        for first in choices:
            for second in choices if mesh.ndim == 2 else [None]:
                split = distribute_tensor(numbers, mesh, [first] if second is None else [first, second], src_data_rank=None)
                place = Place.of(split)
                local = numbers
                for d, i in enumerate(place.indices(place.here)):
                    local = local.index_select(d, i)
                size, _ = compute_local_shape_and_global_offset(split.shape, mesh, split.placements)
                if tuple(size) != tuple(local.shape) or not torch.equal(local, split.to_local()):
                    faults.append(f"{shape} {split.placements}")
    return faults


def clip(order: float) -> list[str]:
    """nw.clip_grad_norm_ on DTensors and plain tensors together."""
    faults = []
    for name, place in PLACES(dist.get_world_size()).items():
        plain, split = net(), place(net())
        for g, p, q in zip(gradients(plain, 7).values(), plain.parameters(), split.parameters(), strict=True):
            p.grad = g.clone()
            q.grad = distribute_tensor(g, q.device_mesh, q.placements, src_data_rank=None) if isinstance(q, DTensor) else g.clone()
        sent = TRAFFIC.now()
        total = nw.clip_grad_norm_(split.parameters(), 1.0, order)
        if TRAFFIC.since(sent).collectives > 2:
            faults.append(f"{name}: {TRAFFIC.since(sent).collectives} collectives")
        if not torch.allclose(total, nw.clip_grad_norm_(plain.parameters(), 1.0, order), rtol=1e-6):
            faults.append(f"{name}: {float(total)}")
        for p, q in zip(plain.parameters(), split.parameters(), strict=True):
            if not torch.allclose(p.grad, q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad, rtol=1e-6, atol=1e-9):
                faults.append(f"{name}: a gradient differs")
    return faults


def foreign_gradients() -> list[str]:
    """Gradients that are whole where the parameter is split (row-wise embedding), or not yet summed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split, plain = _place(net(), mesh, lambda n, p: [Shard(0)]), net()
    policy = [nw.clip_grad_norm(1.0), nw.max_norm(1.0, "*.weight", per="tensor")]
    for model in (split, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        nw.attach(model, optimizer, policy)
        for (name, g), p in zip(gradients(plain, 0).items(), model.parameters(), strict=True):
            p.grad = g.clone()
            if model is split and name.startswith("emb"):
                p.grad = DTensor.from_local(g.clone(), mesh, [Replicate()])
            elif model is split:
                p.grad = DTensor.from_local(g / dist.get_world_size(), mesh, [Partial()])
        optimizer.step()
    pairs = zip(split.named_parameters(), plain.parameters(), strict=True)
    return [n for (n, p), q in pairs if not torch.allclose(p.full_tensor(), q, rtol=1e-6, atol=1e-7)]


def one_bad_rank() -> list[str]:
    """A gradient that is not finite on one rank: all skip, or all raise."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    faults = []
    for mode in ("skip", "raise"):
        model = _place(net(), mesh, lambda n, p: [Shard(0)])
        before = model.even.weight.full_tensor().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        nw.attach(model, optimizer, nw.clip_grad_norm(1.0), on_nonfinite=mode)
        for p, g in zip(model.parameters(), gradients(net(), 0).values(), strict=True):
            if p.shape == (12, 8):
                g[0, 0] = torch.nan    # which lies on the first rank
            p.grad = distribute_tensor(g, mesh, p.placements, src_data_rank=None)
        if mode == "raise":
            with pytest.raises(nw.NonFiniteError):
                optimizer.step()
        else:
            optimizer.step()
        if not torch.equal(before, model.even.weight.full_tensor()):
            faults.append(f"{mode}: the weights changed")
    return faults


def reports() -> list[str]:
    """control.norms(), its largest units and control.zeros() on split parameters, replicated ones counted once."""
    faults = []
    for name, place in PLACES(dist.get_world_size()).items():
        case = Case("norms", lambda: [nw.clip_grad_norm(1.0)])
        _, whole, _ = train(net(), case, 2)
        _, split, _ = train(place(net()), case, 2)
        mine, theirs = split.norms(), whole.norms()
        if split.communication().collectives > 2 or whole.communication().collectives:
            faults.append(f"{name}: {split.communication()} in two steps")
        for kind, total in theirs.total.items():
            if abs(mine.total[kind] - total) > 1e-6 * total:
                faults.append(f"{name} {kind}: {mine.total[kind]} instead of {total}")
        ours, others = split.norms(largest=True).largest, whole.norms(largest=True).largest
        faults += [f"{name}: largest unit of {w} {ours.get(w)} instead of {unit}" for w, unit in others.items()
                   if w not in ours or ours[w][1] != unit[1] or abs(ours[w][0] - unit[0]) > 1e-6 * unit[0]]
        if split.zeros() != whole.zeros():
            faults.append(f"{name}: zeros {split.zeros()} instead of {whole.zeros()}")
    return faults


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def replicas() -> list[str]:
    """QK-clip of DDP's replicas, each of which reports what its own batch gave: they scale alike, by the largest of all."""
    faults, rank = [], dist.get_rank()
    torch.manual_seed(0)
    wrapped = nn.parallel.DistributedDataParallel(_Attending())
    first = wrapped.module.attention.in_proj_weight.detach().clone()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    control = nw.attach(wrapped, optimizer, nw.qk_clip(1.0))
    wrapped(torch.ones(2, 3, 8)).square().mean().backward()
    control.report_max_logits(wrapped.module.attention, torch.tensor([0.5 + rank, 4.0 if rank == 1 else 0.1]))
    optimizer.step()
    expected = first.clone()
    largest = [0.5 + dist.get_world_size() - 1, 4.0]
    for part in (0, 8):
        for head, logit in enumerate(largest):
            expected[part + 4 * head : part + 4 * head + 4] *= min(1.0, 1.0 / logit) ** 0.5
    if not torch.allclose(wrapped.module.attention.in_proj_weight.detach(), expected, rtol=1e-6):
        faults.append("the heads are not scaled by the largest logits of all replicas")
    alone = _Attending()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.0)
    control = nw.attach(alone, optimizer, nw.qk_clip(1.0))
    alone(torch.ones(2, 3, 8)).square().mean().backward()
    control.report_max_logits("attention", torch.tensor([2.0, 2.0]))
    with pytest.warns(UserWarning, match="other processes may report something else"):
        optimizer.step()
    return faults


def nothing_here() -> list[str]:
    """Parameters that lie on the first two ranks alone."""
    faults = []
    wanted = ("max_norm tensor", "hyperball", "spectral_cap", "l1_penalty")
    for case, grid in ((c, grid) for c in cases() if c.name in wanted for grid in (False, True)):
        case.policy = _narrowed(case.policy())
        whole, _, _ = train(net(), case)
        model = _part_of(net(), grid)
        _, control, _ = train_on_part(model, case)
        for n in ("even.weight", "odd.weight"):
            p = model.get_parameter(n)
            if dist.get_rank() < 2 and not torch.allclose(p.full_tensor(), whole[n], rtol=1e-5, atol=1e-6):
                faults.append(f"{case.name}: {n}")
        if not control.verify() and (case.name != "l1_penalty" or control.verify().breaches):    # which bounds nothing
            faults.append(f"{case.name}: {control.verify()}")
    return faults


def different_rules() -> list[str]:
    """Ranks whose radii, rules or words differ: refused on all of them, before anything is sent for a norm, and the difference is named."""
    faults, rank = [], dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policies = {
        "radius": lambda: nw.max_norm(1.0 + rank), "kind": lambda: nw.max_norm(1.0) if rank else nw.spectral_cap(1.0),
        "number": lambda: [nw.max_norm(1.0)] * (1 + rank), "initial": lambda: nw.unit_norm(f"{1 + rank}*init"),
    }    # fmt: skip
    for what, policy in policies.items():
        model = _place(net(), mesh, lambda n, p: [Shard(0)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        before = model.even.weight.full_tensor().clone()
        with pytest.raises(nw.PolicyError, match=r"ranks of this sharded model have different rules: rank 0 has .* rank 1 has"):
            nw.attach(model, optimizer, policy())
        if optimizer._optimizer_step_pre_hooks or not torch.equal(before, model.even.weight.full_tensor()):
            faults.append(f"{what}: something was changed")
    model = _place(net(), mesh, lambda n, p: [Shard(0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with pytest.raises(nw.PolicyError, match="on_nonfinite"):
        nw.attach(model, optimizer, nw.max_norm(1.0), on_nonfinite="raise" if rank else "skip")
    nw.attach(model, optimizer, [nw.max_norm(lambda step: 1.0)])    # the same function, at another address on each rank
    return faults


def _narrowed(policy: Any) -> Any:
    from dataclasses import replace

    rules = nw.Policy(policy)
    return lambda: [replace(r, params=["even.weight", "odd.weight"]) for r in rules]


def train_on_part(model: Net, case: Case) -> Any:
    """Ten steps; ranks outside of the mesh have empty parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    control = nw.attach(model, optimizer, case.policy())
    for step in range(10):
        for (_, p), g in zip(model.named_parameters(), gradients(net(), step).values(), strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g.clone()
        optimizer.step()
    return None, control, 0


def balance() -> list[str]:
    """Sixteen matrices of one shape, split by columns: each rank owns its share, and is sent no more than that."""
    world, count = dist.get_world_size(), 16
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(*(nn.Linear(8, 6, bias=False) for _ in range(count)))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    control = nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), nw.spectral_cap(0.5, "*"))
    owned = [len(p.owners.owned) for b in control.engine.rules for p in b.packs]
    return [] if len(owned) == 1 and owned[0] in (count // world, -(-count // world)) else [f"owned: {owned} of {count}"]


def resumed() -> list[str]:
    """The state of one control goes into another, and the trajectory continues."""
    faults = []
    world = dist.get_world_size()
    for name in ("rows", "columns"):
        place = PLACES(world)[name]
        case = Case("state", lambda: [nw.zclip(1.0, warmup=3), nw.max_norm("init", "*.weight", per="tensor")])
        straight, _, _ = train(place(net()), case, 6)
        first = place(net())
        weights, control, _ = train(first, case, 3)
        second = place(net())
        optimizer = torch.optim.SGD(second.parameters(), lr=0.1, foreach=False)
        other = nw.attach(second, optimizer, case.policy())
        other.load_state_dict(control.state_dict())
        with torch.no_grad():
            for n, p in second.named_parameters():
                p.copy_(distribute_tensor(weights[n], p.device_mesh, p.placements, src_data_rank=None))
        for step in range(3, 6):
            _give(second, step)
            optimizer.step()
        faults += [f"{name}: {n}" for n, p in second.named_parameters() if not torch.equal(p.full_tensor(), straight[n])]
    return faults


def preset(name: str, place: str, dtype: str, polar: str, policy: bool = False) -> list[str]:
    """Ten steps of an optimizer of normwise.optim on split parameters against those on whole ones."""
    make = nw.optim.PRESETS[name]
    spectral = name in ("Muon", "NorMuon", "Scion", "MuonH", "Ridge")
    options = {"polar": polar} if spectral and name != "Ridge" else {}    # which inverts, and iterates nothing
    ways = PLACES(dist.get_world_size())
    if policy:    # rules within the step
        options["policy"] = [nw.Rule(params="*.weight", action="clip_norm", on="update", radius=0.1), nw.max_norm(1.0, "even.weight")]
    whole, split = net(getattr(torch, dtype)), ways[place](net(getattr(torch, dtype)))
    for model in (whole, split):
        optimizer = make(model, lr=0.02, **options)
        for step in range(10):
            _give(model, step, getattr(torch, dtype))
            sent = TRAFFIC.now()
            optimizer.step()
    faults = [] if policy else _too_many(TRAFFIC.since(sent).collectives, optimizer)
    limit = (1e-4 if spectral else 1e-6) if dtype == "float32" else 1e-10
    for (n, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
        off = float(((p.full_tensor() if isinstance(p, DTensor) else p) - q).detach().abs().max() / q.detach().abs().max())
        if not off <= limit:
            faults.append(f"{n} is off by {off:.2g}")
    return faults


def radii() -> list[str]:
    """A radius for each unit of a split matrix, against the same on a whole one."""
    faults, each = [], tuple(0.1 * k for k in range(12))
    for place, put in PLACES(dist.get_world_size()).items():
        whole, split = net(torch.float64), put(net(torch.float64))
        for model in (whole, split):
            optimizer = nw.optim.NormalizedSGD(model, 0.1, per="unit", override={"even.weight": each})
            for step in range(3):
                _give(model, step, torch.float64)
                optimizer.step()
        for (n, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
            if not torch.allclose(p.full_tensor() if isinstance(p, DTensor) else p, q, rtol=1e-12, atol=1e-12):
                faults.append(f"{place}: {n}")
    return faults


def _too_many(collectives: int, optimizer: nw.optim.NormOptimizer) -> list[str]:
    """Two a bucket of whole blocks; and of all norms of all rows together one small one before the step and one after. NorMuon's second
    norm is of what its first has divided."""
    parts = [(optimizer.param_groups[key[0]], part) for key, plan in optimizer._plans.items() for part in plan.parts]
    split = [(group, part) for group, part in parts if isinstance(part.pack, Split)]
    buckets = sum(_acts_on_whole(group) for group, _ in split)
    meshes = len({p.device_mesh for _, part in split for p in part.pack.params})
    most = 2 * buckets + 2 * meshes
    return [f"{collectives} collectives in a step, at most {most} for {buckets} buckets, {meshes} meshes"] if collectives > most else []


def _acts_on_whole(group: dict[str, Any]) -> bool:
    return group["act"] == "ridge" or (group["act"] == "lmo" and group["norm"] in ("spectral", "rms_rms"))


def roundings() -> list[str]:
    """bf16 parts: a carry is the same on parts as on wholes, bit for bit; chance is right on average, other on other parts, the same on
    copies; and both go on from a saved state."""
    faults = []
    for name, place in PLACES(dist.get_world_size()).items():
        ends = []
        for model in (net(torch.bfloat16), place(net(torch.bfloat16))):
            optimizer = nw.optim.AdamW(model, lr=1e-5, rounding="compensated")
            foreign = torch.optim.SGD(model.parameters(), lr=0.1)
            control = nw.attach(model, foreign, nw.weight_decay(0.01, rounding="compensated"))
            for step in range(10):
                _give(model, step, torch.bfloat16)
                optimizer.step()
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                foreign.step()
                if step == 5:    # torch's own round trips
                    optimizer.load_state_dict(optimizer.state_dict())
                    control.load_state_dict(control.state_dict())
            ends.append([p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()])
        faults += [f"compensated, {name}: parameter {i}" for i, (a, b) in enumerate(zip(*ends, strict=True)) if not torch.equal(a, b)]
    return faults + _chances()


NARROW = (
    "max_norm", "max_norm tensor", "max_norm input", "max_norm l1", "max_norm rms", "max_norm linf", "min_max", "unit_norm", "center",
    "cpr", "box", "l1_ball", "l1_ball unit", "spectral_cap", "spectral clip", "spectral_normalize",
)  # fmt: skip


def narrow(dtype: str, *only: str) -> list[str]:
    """bf16 and fp16 parts: what a rule promises holds after rounding, after every step, measured in float64 on whole blocks."""
    faults = []
    ways = PLACES(dist.get_world_size())
    for name, place in ((n, ways[n]) for n in only or ways):
        for case in (c for c in cases() if c.name in NARROW):
            bounds = any(rule.phase == "weight" for rule in nw.Policy(case.policy()))    # of CPR nothing is measured
            of = f"{dtype}, {name}, {case.name}"

            def held(model: nn.Module, control: nw.Control, step: int, of: str = of, bounds: bool = bounds) -> None:
                found = control.verify() if step else None
                if found is not None and (not found if bounds else found.breaches):
                    faults.append(f"{of}, after step {step}: {found}")

            case.report = held
            _, control, _ = train(place(net(getattr(torch, dtype))), case, 4)
            if control.verify().ok != bounds or control.verify().breaches or not sum(control.violations().values()):
                faults.append(f"{dtype}, {name}, {case.name}: {control.verify()}, {control.violations()}")
    return faults


def _chances() -> list[str]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,)) if world < 4 else init_device_mesh("cpu", (2, 2))
    faults = []
    for kind in ([Shard(0)], [Replicate()]) if world < 4 else ([Replicate(), Shard(0)],):
        w = nn.Parameter(distribute_tensor(torch.ones(4096 * world, dtype=torch.bfloat16), mesh, kind, src_data_rank=None))
        optimizer = torch.optim.SGD([w], lr=1.0)
        nw.attach(nn.ParameterDict({"w": w}), optimizer, nw.weight_decay(1e-4, "*", rounding="stochastic"))
        for _ in range(50):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        mean = float(w.detach().full_tensor().double().mean())
        if not abs(mean - (1 - 1e-4) ** 50) < 2e-4:
            faults.append(f"stochastic, {kind}: {mean:.5f} on average, and {(1 - 1e-4) ** 50:.5f} is right")
        mine = w.to_local().detach().float()
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine)
        number = torch.tensor([float(Place.of(w).number)])
        numbers = [torch.zeros(1) for _ in range(world)]
        dist.all_gather(numbers, number)
        for i in range(world):
            if torch.equal(parts[i], mine) != torch.equal(numbers[i], number):
                faults.append(f"stochastic, {kind}: rank {i} has {'the same' if torch.equal(parts[i], mine) else 'other'} numbers")
    return faults


def _give(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> None:
    """The gradients of a step, placed as the parameters are."""
    for p, g in zip(model.parameters(), gradients(net(dtype), step).values(), strict=True):
        p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g.clone()


COUNTED = (
    "clip_grad_value", "clip_grad_norm", "max_norm", "max_norm tensor", "clip, then bound", "hyperball", "spectral clip", "spectral_cap",
)  # fmt: skip


def counted() -> list[list[str]]:
    """Rows of the table in docs/distributed.md: a rule, and for each placement the collectives and the bytes of this rank's last step."""
    found = {c.name: c for c in cases()}
    ways = ("rows", "columns", "replicated", "hsdp", "grid", "fsdp_tp")
    return [[name, *(_step_cost(found[name], PLACES(dist.get_world_size())[way]) for way in ways)] for name in COUNTED]


def _step_cost(case: Case, place: Any) -> str:
    model = place(net())
    _, control, _ = train(model, case, 2)
    first = control.communication()
    _give(model, 2)
    optimizer = control.optimizers[0]
    optimizer.step()
    sent = control.communication().since(first)
    return f"{sent.collectives}: {sent.bytes}" if sent.collectives else "0"


def strided() -> list[str]:
    """Parts that lie in memory with gaps and transposed take the steps of contiguous ones, and nothing beside them is written."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rules = [nw.max_norm(0.3), nw.spectral_cap(0.5), nw.weight_decay(0.1), nw.clip_grad_norm(0.5), nw.group_lasso(0.1)]
    faults = []
    for name in (*nw.optim.PRESETS, "rules"):
        for placement in (Shard(0), Shard(1), Replicate()):
            buffers: list[Any] = []
            found = []
            for gaps in (False, True):
                weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                p = nn.Parameter(_gapped(distribute_tensor(weight, mesh, [placement], src_data_rank=None), gaps, buffers))
                model = nn.Linear(8, 12, bias=False)
                model.weight = p
                optimizer = torch.optim.SGD([p], 0.1) if name == "rules" else nw.optim.PRESETS[name](model, lr=0.05)
                if name == "rules":
                    nw.attach(model, optimizer, rules)
                for seed in range(2):
                    g = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
                    p.grad = _gapped(distribute_tensor(g, mesh, [placement], src_data_rank=None), gaps and seed == 0, [])
                    optimizer.step()
                found.append(p.detach().to_local())    # type: ignore[attr-defined]
            if not torch.allclose(*found, rtol=1e-9, atol=1e-11):
                faults.append(f"{name} on {placement}: {float((found[0] - found[1]).abs().max())}")
            local, whole = found[1], buffers[0]
            kept = whole.clone()
            kept[1 : 1 + local.shape[1], 2 : 2 + local.shape[0]] = 7.0
            if not bool((kept == 7.0).all()):
                faults.append(f"{name} on {placement} wrote beside its part")
    return faults


def _gapped(t: Any, gaps: bool, buffers: list[Any]) -> Any:
    """The DTensor with its local part transposed in the middle of a larger buffer."""
    if not gaps:
        return t
    local = t.to_local()
    whole = torch.full((local.shape[1] + 2, local.shape[0] + 3), 7.0, dtype=local.dtype)
    view = whole[1 : 1 + local.shape[1], 2 : 2 + local.shape[0]].T
    view.copy_(local)
    buffers.append(whole)
    return DTensor.from_local(view, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())
