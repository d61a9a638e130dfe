"""Axes that a module's type does not tell: several matrices in one layer, stacked experts, adapters; registered, or read in the source."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.errors import LayoutError, PolicyError
from normwise.optim import Muon, auto
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.layout_registry import pieces
from normwise.parameters.layouts import Layout, block_view

HEADS, D, WIDTH = 4, 3, 12


def matrices(entry: Entry) -> list[Tensor]:
    """The matrices that a matrix method acts on, outputs by inputs."""
    return list(block_view(entry.layout, "matrix", True, name=entry.name).blocks(entry.param.detach()))


def named(model: nn.Module) -> dict[str, Entry]:
    return {e.name: e for e in Inventory(model)}


# ---------------------------------------------------------------------------------------------------- q, k, v in one layer


class GPTNeoXAttention(nn.Module):
    """Called as in transformers, which is not needed for the registry: (head, part, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class NanoAttention(nn.Module):
    """As in nanoGPT: nobody has registered it, its forward pass says what lies where."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd = HEADS, WIDTH
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HeadFirst(VisionAttention):
    """Each head's q, k and v beside each other, told by the order of the sizes."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.num_heads, 3, -1)
        q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Four query heads over two key heads, all in one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q_dim, self.kv_dim = HEADS * D, 2 * D
        self.qkv, self.out = nn.Linear(WIDTH, self.q_dim + 2 * self.kv_dim), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([self.q_dim, self.kv_dim, self.kv_dim], dim=-1)
        return self.out(q * torch.cat([k, v], -1))


class Disguised(VisionAttention):
    """A name that is given away again: q, k and v are cut within each head, and chunk alone would say something else."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        qkv = qkv.view(*x.shape[:2], self.num_heads, 3 * D)
        q, k, v = qkv.chunk(3, dim=-1)
        return self.proj((q + k + v).flatten(2))


class Twice(VisionAttention):
    """Taken apart in two ways: nothing is claimed."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.qkv(x).view(*x.shape[:2], self.num_heads, 3, -1).unbind(3)
        return self.proj((q + k + v).reshape(x.shape))


STACKED = torch.arange(3 * WIDTH).view(3, WIDTH)
WITHIN = torch.arange(3 * WIDTH).view(HEADS, 3, D).transpose(0, 1).reshape(3, WIDTH)


@pytest.mark.parametrize(
    ("make", "layer", "rows", "parts"),
    [
        (GPTNeoXAttention, "query_key_value", WITHIN, "qkv"),
        (NanoAttention, "c_attn", STACKED, "qkv"),
        (VisionAttention, "qkv", STACKED, "qkv"),
        (HeadFirst, "qkv", WITHIN, "qkv"),
        (Grouped, "qkv", torch.arange(24).view(4, 6), "qqkv"),
    ],
)
def test_q_k_and_v_of_one_layer_are_matrices_of_their_own(make: Any, layer: str, rows: Tensor, parts: str) -> None:
    model = nn.Sequential(make())
    entry = named(model)[f"0.{layer}.weight"]
    assert "".join(entry.layout.parts) == parts and entry.attention == "qkv"
    for matrix, own in zip(matrices(entry), rows, strict=True):
        assert torch.equal(matrix, entry.param.detach()[own])
    factors = {"q": 3.0, "k": 3.0, "v": 0.5}
    radius = {name: g["radius"] for g in auto(model).param_groups for name in g["param_names"]}
    assert radius[entry.name] == tuple(factors[part] for part in parts)


@pytest.mark.parametrize("make", [Disguised, Twice])
def test_what_the_forward_pass_does_not_say_clearly_is_not_claimed(make: Any) -> None:
    entry = named(make())["qkv.weight"]
    assert entry.layout == Layout("oi", (3 * WIDTH, WIDTH)) and not entry.layout.parts


def test_muon_steps_each_as_if_it_were_alone() -> None:
    """The fused layer's step against that of q, k and v in layers of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(GPTNeoXAttention())
    weight = model[0].query_key_value.weight
    alone = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
    gradient = torch.randn_like(weight)
    for layer, rows in zip(alone, WITHIN, strict=True):
        layer.weight.data.copy_(weight.detach()[rows])
        layer.weight.grad = gradient[rows].clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight.grad = gradient
    Muon(model).step()
    Muon(alone, override={"role:all": "muon"}).step()
    for layer, rows in zip(alone, WITHIN, strict=True):
        torch.testing.assert_close(weight.detach()[rows], layer.weight.detach())


def test_pieces() -> None:
    assert pieces(4, 2) == ("q", "q", "k", "v") and pieces(3, 1) == ("q", "q", "q", "k", "v") and pieces(4, 3) == ()


def test_a_registered_parent_decides_and_an_adapter_does_not_hide_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(4, 6)

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    nw.register_layout(Odd, lambda m, name, t: Layout("so" + "i" * (t.ndim - 1), (2, 3, *t.shape[1:]), parts=("a", "b")), child="wide")
    found = named(nn.Sequential(Odd()))
    assert found["0.wide.weight"].layout == Layout("soi", (2, 3, 4)) and found["0.wide.bias"].layout == Layout("so", (2, 3))
    adapted = Odd()
    adapted.wide = Adapter(adapted.wide)    # type: ignore[assignment]
    model = nn.Sequential(adapted, nn.Linear(6, 2))
    entries = named(model)
    assert entries["0.wide.base_layer.weight"].layout == Layout("soi", (2, 3, 4))
    assert (entries["0.wide.lora_A.default.weight"].adapter, entries["0.wide.lora_B.default.weight"].adapter) == ("A", "B")
    of = Muon(model).routing.of    # type: ignore[union-attr]
    assert (of["0.wide.lora_A.default.weight"], of["0.wide.lora_B.default.weight"]) == ("adamw", "muon")
    with pytest.raises(PolicyError, match=r"lora_B\.default\.weight.*zero"):
        nn.init.zeros_(adapted.wide.lora_B["default"].weight)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        nw.optim.MuonH(model).step()


# --------------------------------------------------------------------------------------------------------- stacked experts


class LinearExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 3))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor, e: int) -> Tensor:
        gate, up = (F.linear(x, self.gate_up_proj[e]) + self.gate_up_proj_bias[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])


class BatchedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(2, 4, 3)), nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.w1.to(x.dtype)).relu(), self.w2)


class AliasedExperts(BatchedExperts):
    def forward(self, x: Tensor, e: int = 0) -> Tensor:
        first = self.w1[e]
        return (x @ first).relu() @ self.w2[e]


class EinsumExperts(BatchedExperts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eno,eio->eni", torch.einsum("eni,eio->eno", x, self.w1), self.w2.mT)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float()).softmax(-1)


class Tokens(nn.Module):
    """Positions and a table of scores: looked up or compared with, no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.prototypes = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(3, 4))
        self.unknown, self.cls_token = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos_embed + strange(self.unknown)


def strange(t: Tensor) -> Tensor:
    return t


@pytest.mark.parametrize(
    ("make", "name", "axes"),
    [
        (LinearExperts, "gate_up_proj", "esoi"), (LinearExperts, "down_proj", "eoi"), (BatchedExperts, "w1", "eio"),
        (BatchedExperts, "w2", "eio"), (AliasedExperts, "w1", "eio"), (AliasedExperts, "w2", "eio"), (EinsumExperts, "w1", "eio"),
        (EinsumExperts, "w2", "eio"),
        (Router, "weight", "oi"),
    ],
)  # fmt: skip
def test_experts_and_routers_are_matrices_by_their_forward_pass(make: Any, name: str, axes: str) -> None:
    entry = named(make())[name]
    assert (entry.role, entry.layout.axes, entry.layout.certain) == ("hidden", axes, True)
    model = nn.Sequential(make(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert Muon(model).routing.of[f"0.{name}"] == "muon"    # type: ignore[union-attr]


def test_each_expert_is_the_matrix_that_is_applied() -> None:
    torch.manual_seed(0)
    experts, x = LinearExperts(), torch.randn(5, 4)
    entries = named(experts)
    gate, up = matrices(entries["gate_up_proj"])[2:]    # of expert 1
    bias = experts.gate_up_proj_bias[1].detach()
    hidden = F.silu(x @ gate.T + bias[:3]) * (x @ up.T + bias[3:])
    torch.testing.assert_close(experts(x, 1), hidden @ matrices(entries["down_proj"])[1].T)
    assert entries["gate_up_proj_bias"].role == "bias"
    batched = BatchedExperts()
    first, second = (matrices(e) for e in Inventory(batched))
    inputs = torch.randn(2, 5, 4)
    torch.testing.assert_close(batched(inputs)[1], (inputs[1] @ first[1].T).relu() @ second[1].T)


def test_what_nobody_knows_is_told_and_what_is_looked_up_is_not() -> None:
    model = nn.Sequential(Tokens(), nn.Linear(4, 4), nn.Linear(4, 2))
    inventory = Inventory(model)
    assert {e.name for e in inventory if e.role == "other"} == {"0.pos_embed", "0.prototypes", "0.unknown", "0.cls_token"}
    assert [e.name for e in inventory.unsure] == ["0.unknown"]
    with pytest.warns(UserWarning, match=r"0\.unknown \(5x4 of Tokens\): nothing states the axes"):
        Muon(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon(model, override={"0.unknown": "adamw"})
        Muon(model, layouts={"0.unknown": nw.Layout("oi", (5, 4))})
        nw.optim.AdamW(model)    # no matrix method, nothing to tell


def test_a_stated_role_comes_with_the_axes() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, 4))

    with pytest.raises(LayoutError, match=r'register_layout\(Mixture, lambda m, n, t: nw.Layout\("eoi", tuple\(t.shape\)\)'):
        nw.Policy([nw.max_norm(1.0, "w")]).explain(Mixture())
    nw.register_layout(Mixture, lambda m, n, t: nw.Layout("eoi", tuple(t.shape)) if t.ndim == 3 else None, role="hidden")
    entry = named(Mixture())["w"]
    assert (entry.role, entry.layout.axes) == ("hidden", "eoi")
    assert "e2 o3 i4" in str(nw.Policy([nw.max_norm(1.0)]).explain(Mixture()))


def test_a_class_may_be_registered_by_its_name() -> None:
    class SomebodysExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, 4))

    nw.register_layout("SomebodysExperts", lambda m, n, t: nw.Layout("eio", tuple(t.shape)), role="hidden")
    assert named(SomebodysExperts())["w"].layout == Layout("eio", (2, 3, 4))


# ------------------------------------------------------------------------------------------------------- layouts by name


def test_layouts_by_name_in_policies_and_presets() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    stated = {"0.weight": nw.Layout("soi", (3, 2, 4), parts=("q", "k", "v"))}
    policy = nw.Policy([nw.spectral_cap(1.0, "0.weight", per="matrix")], layouts=stated)
    assert "3 of 2x4" in str(policy.explain(model))
    control = nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    assert control.inventory.by_name["0.weight"].layout == Layout("soi", (3, 2, 4))
    (group,) = [g for g in Muon(model, layouts=stated).param_groups if g["name"] == "muon"]
    assert group["layouts"][0] == ("soi", (3, 2, 4))
    follows = {"*.weight": lambda module, name, tensor: nw.Layout("soi", (2, tensor.shape[0] // 2, tensor.shape[1]))}
    assert {e.layout.axes for e in Inventory(model, layouts=follows) if e.param.ndim == 2} == {"soi"}
    auto(model, layouts=stated)
    with pytest.raises(PolicyError, match="layouts= speaks of names"):
        Muon(model.parameters(), layouts=stated)


def test_layouts_by_name_round_trip_through_yaml() -> None:
    pytest.importorskip("yaml")
    policy = nw.Policy(
        [nw.max_norm(1.0)], roles={"0.weight": "hidden"}, layouts={"*.qkv.weight": nw.Layout("soi", (3, 2, 4), parts=("q", "k", "v"))}
    )
    again = nw.Policy.from_yaml(policy.to_yaml())
    assert again == policy and again.layouts["*.qkv.weight"].parts == ("q", "k", "v")    # type: ignore[union-attr]
    assert nw.Policy([policy]).layouts == policy.layouts and nw.Policy(policy) == policy and hash(again) == hash(policy)
    text = "rules: []\nlayouts:\n  'a.weight': {axes: oi, shape: [2, 3]}\n"
    assert nw.Policy.from_yaml(text).layouts == {"a.weight": nw.Layout("oi", (2, 3))}
    for wrong in ("layouts: [a]", "layouts: {a: 3}", "layouts: {a: {axes: ox, shape: [1, 2]}}", "layouts: {a: {axes: oi, shape: [1, x]}}"):
        with pytest.raises(PolicyError):
            nw.Policy.from_yaml(f"rules: []\n{wrong}\n")
    with pytest.raises(PolicyError, match="a layout that is a function"):
        nw.Policy(layouts={"a": lambda m, n, t: None}).to_yaml()


@pytest.mark.parametrize("wrong", [{"0.weight": 3}, {"9.weight": nw.Layout("oi", (1, 1))}, {"0.weight": nw.Layout("oi", (9, 9))}])
def test_layouts_by_name_that_mean_nothing(wrong: Any) -> None:
    with pytest.raises((PolicyError, LayoutError)):
        nw.Policy([nw.max_norm(1.0)], layouts=wrong).explain(nn.Sequential(nn.Linear(4, 6)))


def test_parts_are_as_many_as_matrices() -> None:
    with pytest.raises(LayoutError, match="names 2 parts"):
        Layout("soi", (3, 2, 4), parts=("q", "k"))
    assert Layout("soi", (3, 2, 4), parts=("q", "k", "v")) == Layout("soi", (3, 2, 4))


def test_qk_clip_knows_heads_that_hold_their_q_k_and_v() -> None:
    """(head, part, d): the queries and keys of head 1 shrink, nothing else."""
    model = nn.Sequential(GPTNeoXAttention())
    before = model[0].query_key_value.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control = nw.attach(model, optimizer, [nw.qk_clip(1.0, "*query_key_value.weight", heads=(3, HEADS))])
    control.report_max_logits("0", torch.tensor([0.5, 4.0, 0.5, 0.5]))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    factors = torch.ones(HEADS, 3, D, 1)
    factors[1, :2] = 0.5
    torch.testing.assert_close(model[0].query_key_value.weight.detach(), before * factors.view(-1, 1))
