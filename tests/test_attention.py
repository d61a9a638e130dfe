"""Which weights are an attention's queries, keys, values and output; steps of their own for them; selectors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import normwise as nw
from attention_cases import F64, WIDTH, Model, Parts, Separate, grads
from normwise.errors import PolicyError
from normwise.optim import AdamW, Muon, NormOptimizer, Ridge
from normwise.parameters.inventory import Inventory, select, selector_from_data, selector_to_data


def found(model: nn.Module) -> dict[str, str]:
    return {e.name.removesuffix(".weight"): e.attention for e in Inventory(model) if e.attention}


SCHEMES = {
    "Llama": ("q_proj", "k_proj", "v_proj", "o_proj"), "T5": ("q", "k", "v", "o"), "wav2vec": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "LLaMA, Meta's": ("wq", "wk", "wv", "wo"), "DistilBERT": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "ESPnet": ("linear_q", "linear_k", "linear_v", "linear_out"), "ours": ("q", "k", "v", "out"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_are_told_by_the_names_of_all_three(scheme: str) -> None:
    layers = SCHEMES[scheme]
    model = Parts("up", "down", attention=Parts(*layers))
    assert found(model) == {f"attention.{name}": part for name, part in zip(layers, ("q", "k", "v", "out"), strict=True)}
    assert found(Parts("up", attention=Parts(*layers[:2], layers[3]))) == {}    # no values: whatever it is, it is no attention


def test_layers_with_all_three_in_one() -> None:
    fused = nn.Linear(WIDTH, 3 * WIDTH)
    assert found(Parts(c_attn=fused, c_proj=nn.Linear(WIDTH, WIDTH))) == {"c_attn": "qkv", "c_proj": "out"}    # GPT-2
    assert found(Parts(query_key_value=fused, dense=nn.Linear(WIDTH, WIDTH))) == {"query_key_value": "qkv", "dense": "out"}    # NeoX
    assert found(Parts("c_fc", "c_proj")) == {}    # GPT-2's MLP


def test_an_output_inside_a_container_or_beside_the_other_three() -> None:
    diffusers = Parts("to_q", "to_k", "to_v", to_out=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)))
    assert found(diffusers) == {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
    output = Parts("dense", LayerNorm=nn.LayerNorm(WIDTH))
    bert = Parts(self=Parts("query", "key", "value"), output=output)
    layer = Parts(attention=bert, output=Parts("dense"))    # the second output is the MLP's
    assert found(layer) == {f"attention.self.{n}": p for n, p in (("query", "q"), ("key", "k"), ("value", "v"))} | {
        "attention.output.dense": "out"
    }


def test_torchs_own_attention() -> None:
    fused, separate = nn.MultiheadAttention(WIDTH, 2), nn.MultiheadAttention(WIDTH, 2, kdim=3, vdim=5)
    assert found(fused) == {"in_proj_weight": "qkv", "out_proj": "out"}
    assert found(separate) == {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v", "out_proj": "out"}


def test_selectors_by_part() -> None:
    model = Parts("up", attention=Parts("q", "k", "v", "out"))
    entries = list(Inventory(model))

    def names(selector: Any) -> list[str]:
        return [e.name for e in select(entries, selector)]

    assert names("attention:qk") == ["attention.q.weight", "attention.k.weight"]
    assert names(["attention:out", "up.bias"]) == ["up.bias", "attention.out.weight"]
    assert names("attention:all") == [f"attention.{n}.weight" for n in ("q", "k", "v", "out")]
    assert selector_from_data(selector_to_data("attention:ov")) == "attention:ov"
    policy = nw.Policy([nw.max_norm(0.1, "attention:qk")])
    assert nw.Policy.from_yaml(policy.to_yaml()) == policy
    nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with pytest.raises(PolicyError, match=r"'attention:qv' is no part of an attention\. Did you mean 'qkv'\?"):
        names("attention:qv")
    with pytest.raises(PolicyError, match="params='attention:qkv' matches no parameter"):
        names("attention:qkv")


# ------------------------------------------------------------------------------------------------------------- a radius a block


def ridge(g: Tensor, damping: float) -> Tensor:
    """The formula by the singular values, at Frobenius norm 1."""
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    t = s / s.square().mean().sqrt()
    mapped = (u * (t / (t * t + damping))) @ vh
    return mapped / mapped.norm()


def test_every_block_of_a_tensor_by_its_own_radius() -> None:
    model = nn.MultiheadAttention(WIDTH, 2, dtype=F64)
    row = {"lr": 0.1, "act": "ridge", "damping": 0.2, "scale": "normuon", "radius": (3.0, 1.0, 0.5)}
    roles = dict.fromkeys(("hidden", "bias"), "plain")
    optimizer = NormOptimizer(model, {"plain": {}, "row": row}, roles, "plain", {"in_proj_weight": "row"})
    before = model.in_proj_weight.detach().clone().chunk(3)
    grads(model)
    optimizer.step()
    for w, g, after, radius in zip(before, model.in_proj_weight.grad.chunk(3), model.in_proj_weight.chunk(3), (3, 1, 0.5), strict=True):
        want = w - 0.1 * radius * 0.2 * math.sqrt(WIDTH * WIDTH) * ridge(g, 0.2)
        torch.testing.assert_close(after.detach(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["absolute", "init", "relative"])
def test_a_tuple_of_equal_radii_is_that_radius(scale: str) -> None:
    after = []
    for radius in (0.7, (0.7, 0.7, 0.7)):
        torch.manual_seed(1)
        model = nn.MultiheadAttention(WIDTH, 2, bias=False, dtype=F64)
        row = {"lr": 0.1, "act": "none", "scale": scale, "radius": radius}
        optimizer = NormOptimizer(model, {"row": row, "out": {"lr": 0.0}}, {"hidden": "row"}, "row", {"out_proj.weight": "out"})
        for seed in range(3):
            grads(model, seed)
            optimizer.step()
        after.append(model.in_proj_weight.detach())
    torch.testing.assert_close(*after, rtol=1e-13, atol=1e-13)


def test_radii_that_fit_no_blocks_are_refused_before_anything_is_built() -> None:
    model = nn.MultiheadAttention(WIDTH, 2, bias=False)
    with pytest.raises(PolicyError, match=r"radius has 2 numbers, one a block, but 'in_proj_weight' has 3 per='matrix'"):
        NormOptimizer(model, {"row": {"scale": "init", "radius": (1.0, 2.0)}}, {"hidden": "row"}, "row")
    for wrong in ((1.0, -1.0), (), (1.0, "2")):
        with pytest.raises(ValueError, match="radius="):
            NormOptimizer(model, {"row": {"radius": wrong}}, {"hidden": "row"}, "row")
    optimizer = NormOptimizer(nn.Linear(2, 2, bias=False), {"row": {"scale": "init"}}, {"head": "row"}, "row")
    optimizer.param_groups[0]["radius"] = (1.0, 2.0)    # changed later: refused by the step, which changes nothing
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad, before = torch.ones(2, 2), weight.detach().clone()
    with pytest.raises(PolicyError, match="radius has 2 numbers"):
        optimizer.step()
    assert torch.equal(weight, before)


# ----------------------------------------------------------------------------------------------------------------- the preset


def test_q_k_and_v_in_one_tensor_step_as_three_do() -> None:
    torch.manual_seed(2)
    fused = nn.MultiheadAttention(WIDTH, 2, bias=False, dtype=F64)
    models = [Model(fused), Model(Separate(fused))]
    overrides: list[dict[Any, Any]] = [
        {"attention:qkv": (3.0, 3.0, 0.5), "attention:out": 0.5}, {"attention:qk": 3.0, "attention:ov": 0.5},
    ]    # fmt: skip
    optimizers = [Ridge(m, 0.05, override=o) for m, o in zip(models, overrides, strict=True)]
    for seed in range(4):
        made = torch.Generator().manual_seed(seed)
        qkv, out = torch.randn(3 * WIDTH, WIDTH, generator=made, dtype=F64), torch.randn(WIDTH, WIDTH, generator=made, dtype=F64)
        fused.in_proj_weight.grad, fused.out_proj.weight.grad = qkv, out
        apart: Any = models[1].attention
        apart.q.weight.grad, apart.k.weight.grad, apart.v.weight.grad = qkv.chunk(3)
        apart.out.weight.grad = out
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.in_proj_weight.detach(), apart.weights(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.out_proj.weight, apart.out.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preset", [Ridge, Muon, AdamW])
def test_what_is_multiplied_steps_that_much_further_and_decays_the_same(preset: Any) -> None:
    torch.manual_seed(3)
    model = Model(Separate(nn.MultiheadAttention(WIDTH, 2, dtype=F64)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved: dict[str, list[Tensor]] = {}
    override = {"attention:qk": 3.0, "attention:ov": 0.5, "head.weight": 2.0, "attention:k": 2.0}    # keys: 3 times 2
    for decay in (0.0, 0.3):
        for given in (None, override):
            model.load_state_dict(before)
            optimizer = preset(model, 0.05, weight_decay=decay, override=given)
            grads(model)
            optimizer.step()
            for name, p in model.named_parameters():
                lr = next(g["lr"] for g in optimizer.param_groups if name in g["param_names"])
                decayed = 1 - lr * next(g["weight_decay"] for g in optimizer.param_groups if name in g["param_names"])
                moved.setdefault(name, []).append(p.detach() - decayed * before[name])
    times = {"attention.q": 3.0, "attention.k": 6.0, "attention.v": 0.5, "attention.out": 0.5, "head": 2.0}
    for name, (plain, scaled, plain_decayed, scaled_decayed) in moved.items():
        factor = times.get(name.removesuffix(".weight"), 1.0) if name.endswith("weight") else 1.0
        assert plain.norm() > 0
        torch.testing.assert_close(scaled, factor * plain, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(plain_decayed, plain, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scaled_decayed, factor * plain, rtol=1e-9, atol=1e-12)


def test_the_routing_shows_what_is_multiplied() -> None:
    model = Model(Separate(nn.MultiheadAttention(WIDTH, 2, dtype=F64)))
    routing = Ridge(model, override={"attention:qk": 3.0, "role:head": 2.0, "*.q.weight": "ridge"}).routing
    assert routing is not None and "normuon x 3.0" in str(routing)
    rows = {n: routing.of[n] for n in ("attention.q.weight", "attention.k.weight", "attention.v.weight", "head.weight")}
    assert list(rows.values()) == ["ridge", "ridge x 3.0", "ridge", "adamw x 2.0"]


def test_factors_that_mean_nothing_are_refused() -> None:
    model = Model(nn.MultiheadAttention(WIDTH, 2, dtype=F64))
    for wrong in (-1.0, True, None, (3.0, "1", 1.0), ()):
        with pytest.raises(ValueError, match=r"override of 'attention:qkv' has radius=.*a finite number >= 0"):
            Ridge(model, override={"attention:qkv": wrong})
    with pytest.raises(PolicyError, match=r"radius has 3 numbers, one a block, but 'up.weight' has 1"):
        Ridge(model, override={"up.weight": (3.0, 3.0, 0.5)})
    with pytest.raises(PolicyError, match=r"'role:hidden' by 2 numbers, whose row 'ridge x \(3.0, 3.0, 0.5\)' has 3"):
        Ridge(model, override={"attention:qkv": (3.0, 3.0, 0.5), "role:hidden": (2.0, 1.0)})
    with pytest.raises(PolicyError, match="params='attention:qk' matches no parameter"):
        Ridge(model, override={"attention:qk": 3.0})


def test_factors_multiply_each_other_block_by_block() -> None:
    """A number and one for each block, in either order, and one for each block twice."""
    torch.manual_seed(6)
    model = Model(nn.MultiheadAttention(WIDTH, 2, dtype=F64))
    start = copy.deepcopy(model.state_dict())
    ends = []
    for override in (
        {"attention:qkv": (6.0, 6.0, 1.0)}, {"attention:qkv": (3.0, 3.0, 0.5), "*in_proj_weight": 2.0},
        {"*in_proj_weight": 2.0, "attention:qkv": (3.0, 3.0, 0.5)}, {"attention:qkv": (3.0, 2.0, 0.5), "*in_proj_weight": (2, 3, 2)},
    ):  # fmt: skip
        model.load_state_dict(start)
        optimizer = Ridge(model, 0.05, weight_decay=0.0, override=override)
        grads(model)
        optimizer.step()
        ends.append(model.attention.in_proj_weight.detach().clone())
    assert all(torch.equal(end, ends[0]) for end in ends[1:])
    assert not torch.equal(ends[0], start["attention.in_proj_weight"])


def test_looking_for_an_attention_changes_no_layer() -> None:
    """A parametrized weight is computed when it is read, and spectral normalisation then moves its vectors."""
    model = Parts(attention=Parts("q", "k", "v", "out"))
    for layer in (model.attention.q, model.attention.out):
        nn.utils.parametrizations.spectral_norm(layer)
    before = copy.deepcopy(model.state_dict())
    entries = {e.name: e.attention for e in Inventory(model)}
    assert entries["attention.q.parametrizations.weight.original"] == "q"
    assert entries["attention.out.parametrizations.weight.original"] == "out" and entries["attention.k.weight"] == "k"
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_wrappers_hide_nothing() -> None:
    model = Parts(attention=Parts("q", "k", "v", "out"))
    model.attention = torch.compile(model.attention)
    model.attention._orig_mod.out = checkpoint_wrapper(model.attention._orig_mod.out)
    assert found(nn.DataParallel(model)) == {f"attention.{n}": n for n in ("q", "k", "v", "out")}


def test_a_run_with_a_radius_a_block_goes_on_where_it_was() -> None:
    torch.manual_seed(4)
    model = Model(nn.MultiheadAttention(WIDTH, 2, dtype=F64))
    optimizer = Ridge(model, override={"attention:qkv": (3.0, 3.0, 0.5), "role:head": 2.0})
    grads(model, 0)
    optimizer.step()
    weights, state = {n: p.detach().clone() for n, p in model.named_parameters()}, copy.deepcopy(optimizer.state_dict())
    grads(model, 1)
    optimizer.step()
    want = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(weights)
    again = Ridge(model, override={"attention:qkv": (3.0, 3.0, 0.5), "role:head": 2.0})
    again.load_state_dict(state)
    grads(model, 1)
    again.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), want, strict=True))
