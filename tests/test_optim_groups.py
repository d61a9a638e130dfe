"""What is written into the groups of an optimizer in training: refused by name, with nothing changed, or followed as in torch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.optim import LARS, PRESETS, SGD, AdamH, AdamW, Muon, MuonH, NormOptimizer

F64 = torch.float64
Build = Callable[..., NormOptimizer]
every_preset = pytest.mark.parametrize("preset", list(PRESETS.values()), ids=list(PRESETS))


def model(dtype: torch.dtype = torch.float32, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6) if norm else nn.Identity(), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)


def backward(net: nn.Module, seed: int) -> None:
    net.zero_grad()
    p = next(net.parameters())
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed), dtype=F64).to(p.dtype)
    net(x).square().mean().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        backward(net, seed)
        optimizer.step()


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copies of the weights and of every number of state."""
    weights = [p.detach().clone() for p in net.parameters()]
    states = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in net.parameters() if p in optimizer.state]
    return [weights, states]


def same(a: list[Any], b: list[Any]) -> bool:
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


# ---------------------------------------------------------------------------------------------------------- refused


WRONG: list[tuple[str, Any, str]] = [
    ("act", "normalise", "act='normalise'. Did you mean 'normalize'"), ("scale", "orginal", "'original'"),
    ("decay", "weigth", "Did you mean 'weight'"), ("hold", "spere", "Did you mean 'sphere'"), ("direction", "adamm", "'adam'"),
    ("rounding", "stochasic", "Did you mean 'stochastic'"), ("polar", "fastt", "Did you mean 'fast'"), ("per", "matrx", "'matrix'"),
    ("norm", "spektral", "'spectral'"), ("norm", ["l2"], "is no norm"), ("norm", "non_negative", "which is a set"),
    ("per", "global", "one norm of all together"),
    ("per", ["unit"], "per="), ("weight_decay", -0.1, "weight_decay=-0.1"), ("weight_decay", "0.1", "weight_decay='0.1'"),
    ("weight_decay", float("nan"), "weight_decay=nan"), ("weight_decay", None, "weight_decay=None"), ("lr", -0.1, "lr=-0.1"),
    ("lr", float("inf"), "lr=inf"), ("lr", torch.tensor(-0.1), "lr=tensor"), ("radius", -1.0, "radius=-1.0"), ("eps", -1e-8, "eps="),
    ("limit", -1.0, "limit="), ("trust", -1.0, "trust="), ("maximize", "no", "maximize='no', and needs True or False"),
    ("momentum", 1.5, "momentum=1.5"), ("momentum", "0.9", "momentum='0.9'"), ("betas", 0.9, "betas=0.9, and needs two numbers"),
    ("betas", (0.9, 1.0), "betas=1.0"), ("betas", np.array([0.9]), "two numbers"), ("row_beta", 1.0, "row_beta=1.0"),
    ("velocity", "0.9", "velocity='0.9'"), ("seed", 1.5, "seed=1.5"), ("momentun", 0.9, "'momentun'. Did you mean 'momentum'"),
    ("amsgrad", True, "amsgrad=True, which is no option"),
]  # fmt: skip


@every_preset
@pytest.mark.parametrize(("key", "value", "says"), WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
def test_what_is_written_amiss_is_refused_and_nothing_changes(preset: Build, key: str, value: Any, says: str) -> None:
    """In the first step and in a later one; put right, the run goes on as one that never had it."""
    net, clean = model(), model()
    optimizer, untouched = preset(net), preset(clean)
    for start in (0, 2):
        group = optimizer.param_groups[-1]
        before, kept = snapshot(net, optimizer), dict(group)
        group[key] = value
        backward(net, 9)
        with pytest.raises(ValueError, match=says.replace("?", r"\?")) as error:
            optimizer.step()
        assert "group" in str(error.value), "the message says which group"
        assert same(snapshot(net, optimizer), before)
        group.clear()
        group.update(kept)
        train(net, optimizer, range(start, start + 2))
        train(clean, untouched, range(start, start + 2))
        assert same(snapshot(net, optimizer), snapshot(clean, untouched))


def test_a_ridge_without_damping_is_refused_in_training() -> None:
    net = model()
    optimizer = nw.optim.Ridge(net)
    train(net, optimizer, range(1))
    before = snapshot(net, optimizer)
    next(g for g in optimizer.param_groups if g["act"] == "ridge")["damping"] = 0
    with pytest.raises(ValueError, match="damping=0, and needs a damping > 0"):
        train(net, optimizer, range(1, 2))
    assert same(snapshot(net, optimizer), before)


@every_preset
def test_what_schedulers_and_users_write_beside_the_options_stays(preset: Build) -> None:
    net = model()
    optimizer = preset(net)
    train(net, optimizer, range(1))
    keys = ["initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "step_size_up", "lr_scale", "layer_decay", "tag"]
    for group in optimizer.param_groups:
        group |= dict.fromkeys(keys, 0.5)
        group["maximize"] = np.True_
    train(net, optimizer, range(1, 2))
    assert optimizer.param_groups[0]["maximize"] is True and all(optimizer.param_groups[0][k] == 0.5 for k in keys)


def test_a_refused_first_step_leaves_no_state() -> None:
    """The second group is what is refused, once the first one has its buffers."""
    good, zero = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.zeros(3, 3))
    optimizer = MuonH([{"params": [good]}, {"params": [zero]}])
    for p in (good, zero):
        p.grad = torch.ones(3, 3)
    with pytest.raises(nw.PolicyError, match="zero"):
        optimizer.step()
    assert not optimizer.state and torch.equal(good, torch.ones(3, 3))


def test_a_group_that_torchs_list_was_given_is_told_how_to_come_in() -> None:
    optimizer = AdamW(model())
    optimizer.param_groups.append({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(nw.PolicyError, match=r"optimizer.add_param_group"):
        optimizer.step()


@every_preset
def test_one_norm_of_all_together_is_no_block_of_a_step(preset: Build) -> None:
    with pytest.raises(nw.PolicyError, match="per='global', and a step takes each tensor by itself"):
        preset([{"params": [nn.Parameter(torch.ones(3, 3))], "per": "global"}])
    with pytest.raises(nw.PolicyError, match="Allowed") as error:
        preset([{"params": [nn.Parameter(torch.ones(3, 3))], "per": "everything"}])
    assert "global" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- LARS


def lars_by_hand(w: Tensor, grads: list[Tensor], lr: list[float], mu: float, trust: float) -> Tensor:
    """You, Gitman & Ginsburg's formula, in which a falling rate does not rescale the velocity."""
    v = torch.zeros_like(w)
    for g, eta in zip(grads, lr, strict=True):
        v = mu * v + eta * trust * w.norm() / g.norm() * g
        w = w - v
    return w


@pytest.mark.parametrize("how", ["group", "written", "built"])
def test_a_momentum_of_lars_is_always_that_of_the_scaled_step(how: str) -> None:
    """Whether it comes with a group, later, or at once: with a changing rate the heavy ball is another method."""
    gen = torch.Generator().manual_seed(3)
    start, *grads = (torch.randn(4, 3, generator=gen, dtype=F64) for _ in range(5))
    p, rates = nn.Parameter(start.clone()), [0.8, 0.4, 0.2, 0.1]
    if how == "group":
        optimizer = LARS([{"params": [p], "momentum": 0.9}], momentum=0.0, trust=0.1)
    else:
        optimizer = LARS([p], momentum=0.0 if how == "written" else 0.9, trust=0.1)
    if how == "written":
        optimizer.param_groups[0]["momentum"] = 0.9
    for g, lr in zip(grads, rates, strict=True):
        p.grad, optimizer.param_groups[0]["lr"] = g.clone(), lr
        optimizer.step()
    torch.testing.assert_close(p.detach(), lars_by_hand(start, grads, rates, 0.9, 0.1), rtol=1e-12, atol=1e-12)


def test_lars_without_a_momentum_keeps_no_buffer_and_takes_nesterov_for_what_it_is() -> None:
    net = model()
    optimizer = LARS(net, momentum=0.0)
    train(net, optimizer, range(2))
    assert not any(state for state in optimizer.state.values()) and "momentum" not in optimizer.defaults
    optimizer.param_groups[0] |= {"momentum": 0.9, "nesterov": True}
    with pytest.raises(nw.PolicyError, match="no momentum to look ahead"):
        train(net, optimizer, range(2, 3))


# ---------------------------------------------------------------------------------------------------------- a tensor as the rate


@every_preset
def test_a_plateau_lowers_each_groups_rate_once(preset: Build) -> None:
    """Rates given as one tensor are those given as one number, under a scheduler that writes into them."""
    for make in (lambda: [{"params": [nn.Parameter(torch.ones(2, 2))]} for _ in range(3)], model):
        lr, rates = torch.tensor(0.25), []
        for optimizer in (preset(make(), lr=0.25), preset(make(), lr=lr)):
            plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            for _ in range(3):
                plan.step(1.0)
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
        assert rates[0] == rates[1] and rates[0][0] == 0.0625
        assert optimizer.param_groups[0]["lr"] is lr, "torch keeps the tensor that it was given, too"


def test_tensors_that_groups_were_given_stay_theirs() -> None:
    lr = torch.tensor(0.5)
    optimizer = AdamW([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for _ in range(2)])
    assert all(g["lr"] is lr for g in optimizer.param_groups)


# ---------------------------------------------------------------------------------------------------------- copies


@every_preset
def test_copies_keep_their_routing_and_hold_no_model(preset: Build) -> None:
    net = model()
    net.big = nn.Linear(300, 300)    # 360 kB, which a copy must not carry along
    optimizer = preset(net, override={"big.*": "skip"})
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert str(twin.routing) == str(optimizer.routing) and dict(twin.routing.of) == dict(optimizer.routing.of)
        assert str(twin.receipt()) == str(optimizer.receipt())
    assert len(pickle.dumps(optimizer)) < 100_000


@pytest.mark.parametrize("preset", [AdamH, MuonH])
def test_copies_refuse_a_vector_on_a_sphere_as_the_original_does(preset: Build) -> None:
    optimizer = preset(model())
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(nw.LayoutError, match="without its module"):
            one.add_param_group({"params": [("late.bias", nn.Parameter(torch.ones(3)))]})


def test_a_pickle_from_before_routing_was_kept_is_read() -> None:
    optimizer = AdamW(model())
    state = {k: v for k, v in optimizer.__getstate__().items() if k in ("defaults", "state", "param_groups")}
    old = AdamW.__new__(AdamW)
    old.__setstate__(state)
    assert old.routing is None and old.param_groups[0]["direction"] == "adam"


# ---------------------------------------------------------------------------------------------------------- another dtype


@every_preset
@pytest.mark.parametrize(("first", "then"), [(torch.float32, F64), (F64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_model_may_change_its_dtype_in_training(preset: Build, first: torch.dtype, then: torch.dtype) -> None:
    """It steps on as one that loads the same numbers in the new dtype."""
    net = model(first)
    optimizer = preset(net)
    train(net, optimizer, range(2))
    twin = model(then)
    twin.load_state_dict(net.state_dict())
    resumed = preset(twin)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    net.to(then)
    resumed.load_state_dict(torch.load(file))
    for p in resumed.state:    # kept in its own dtype by a checkpoint, which does not know that the model has another
        for name in {"radius", "row_squares"} & set(resumed.state[p]):
            resumed.state[p][name] = resumed.state[p][name].to(F64 if then == F64 else torch.float32)
    train(net, optimizer, range(2, 5))
    train(twin, resumed, range(2, 5))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.dtype == then and torch.equal(p, q)
    for p in net.parameters():
        assert {v.dtype for k, v in optimizer.state[p].items() if k not in ("step", "radius", "row_squares")} <= {then}


# ---------------------------------------------------------------------------------------------------------- parameters in place


@pytest.mark.parametrize("ours", [AdamW, SGD])
@pytest.mark.parametrize("change", ["replaced", "reshaped", "added", "removed"])
@pytest.mark.parametrize("named", [False, True])
def test_a_list_of_parameters_may_be_written_to_as_in_torch(ours: Build, change: str, named: bool) -> None:
    """Where no axes are needed; torch's optimizer under the same changes is the reference."""
    made = []
    for kind in (ours, {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}[ours]):
        gen = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=gen, dtype=F64)) for s in ((3, 2), (4,), (2, 5))]
        optimizer = kind([(f"p{i}", p) for i, p in enumerate(params)] if named else params, lr=0.01)
        held = optimizer.param_groups[0]["params"]
        new = nn.Parameter(torch.randn((3, 2) if change == "replaced" else (2, 2, 2), generator=gen, dtype=F64))
        for step in range(4):
            if step == 2 and change in ("replaced", "reshaped"):
                held[0] = new
            elif step == 2 and change == "added":
                held.append(new)
            elif step == 2:
                del held[1]
            for p in (*params, new):
                p.grad = torch.randn(p.shape, generator=gen, dtype=F64)
            optimizer.step()
        made.append([*params, new])
        if ours is kind and change == "added":    # torch saves no state of a tensor that is in no group
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            torch.load(file, weights_only=True)
    for p, q in zip(*made, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_where_axes_are_needed_a_changed_list_is_told_what_to_do_and_may_state_them() -> None:
    first, second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4, 2))
    first.grad, second.grad = torch.ones(3, 2), torch.eye(4, 2)
    optimizer = Muon([first])
    optimizer.step()
    before = first.detach().clone()
    optimizer.param_groups[0]["params"].append(second)
    with pytest.raises(nw.LayoutError, match=r"add_param_group, or write group\['layouts'\]"):
        optimizer.step()
    assert torch.equal(first, before) and second not in optimizer.state
    optimizer.param_groups[0]["layouts"] = [nw.Layout("oi", (3, 2)), nw.Layout("oi", (4, 2))]
    optimizer.step()
    assert not torch.equal(second, torch.ones(4, 2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("build", [AdamW, Muon])
def test_a_parameter_written_in_twice_is_refused(build: Build) -> None:
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    params[0].grad = torch.ones(3, 3)
    optimizer = build(params)
    optimizer.param_groups[0]["params"][1] = params[0]
    with pytest.raises(ValueError, match="more than once"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3, 3))


# ---------------------------------------------------------------------------------------------------------- under two names


class Exposed(nn.Module):
    """Holds weights of its layers under names of its own as well, before or after them; ``names`` -> (layer, its attribute)."""

    def __init__(self, names: dict[str, tuple[str, str]]) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.one = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 1)
        for name, (layer, attribute) in names.items():
            setattr(self, name, getattr(getattr(self, layer), attribute))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(self.b(self.norm(self.a(x))))
        return out


def test_a_weight_has_the_role_that_its_layer_gives_it_under_whatever_names() -> None:
    """The model without the other names is the reference; a name in the parent itself comes first."""
    names = {
        "weight": ("a", "weight"), "w_in": ("b", "weight"), "scale": ("norm", "weight"), "gamma": ("one", "weight"), "shift": ("b", "bias"),
    }  # fmt: skip
    plain, exposed = Exposed({}), Exposed(names)
    wanted = {id(p): (name, Muon(plain).routing.of[name]) for name, p in plain.named_parameters()}    # type: ignore[union-attr]
    assert len(set(dict(wanted.values()).values())) == 3
    routing = Muon(exposed).routing
    assert routing is not None and set(names) <= set(routing.of), "these are the first names"
    for name, of_plain in dict(wanted.values()).items():
        first = next(n for n, p in exposed.named_parameters() if p is exposed.get_parameter(name))
        assert routing.of[first] == of_plain, name
    assert {e.name: e.role for e in routing.entries}["shift"] == "bias"


# ---------------------------------------------------------------------------------------------------------- arguments and checkpoints


@pytest.mark.parametrize("argument", ["override", "layouts"])
@pytest.mark.parametrize("given", [[("0.weight", "adamw")], "adamw", 3.0])
def test_what_is_no_table_is_refused_by_its_name(argument: str, given: Any) -> None:
    with pytest.raises(nw.PolicyError, match=f"{argument} is a {type(given).__name__}, and must be a dict"):
        Muon(model(), **{argument: given})


def test_a_tensor_where_a_name_belongs_is_told_by_its_shape() -> None:
    net = model()
    for override in ({net[0].weight: "adamw"}, {"0.weight": torch.ones(400)}):
        with pytest.raises(ValueError, match="a tensor of shape") as error:
            Muon(net, override=override)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("preset", [AdamW, nw.optim.LAMB, Muon, nw.optim.NorMuon, AdamH, MuonH, nw.optim.Ridge])
def test_a_checkpoint_with_a_gap_is_refused_and_nothing_is_loaded(preset: Build) -> None:
    """Each buffer of the direction in turn, as long as another part of the parameter's state is there."""
    net = model()
    optimizer = preset(net, rounding="compensated")
    train(net, optimizer, range(2))
    refused = 0
    for key in ("exp_avg", "exp_avg_sq", "step", "momentum_buffer"):
        state = copy.deepcopy(optimizer.state_dict())
        rest = [s for s in state["state"].values() if s.pop(key, None) is not None and s]
        fresh = preset(model())
        if not rest:
            fresh.load_state_dict(state)    # nothing else is kept: as a parameter that has not stepped yet
            continue
        refused += 1
        with pytest.raises(nw.PolicyError, match=f"and no {key}: a part of the checkpoint is lost"):
            fresh.load_state_dict(state)
        assert not fresh.state
    assert refused >= 3, "all of Adam's, and a momentum beside a radius or the squares of units"


def test_a_direction_that_was_changed_before_saving_is_no_gap() -> None:
    net = model()
    optimizer = AdamW(net)
    train(net, optimizer, range(2))
    optimizer.param_groups[0]["direction"] = "lion"
    fresh = AdamW(model())
    with pytest.warns(UserWarning, match="direction='lion'"):
        fresh.load_state_dict(optimizer.state_dict())
    train(net, fresh, range(2, 3))
