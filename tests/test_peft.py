"""Rules on LoRA's product s·B·A, against the dense product, with the real peft."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.errors import PolicyError
from normwise.parameters.inventory import Inventory, select

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """A layer of each kind that LoRA takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(30, 12), nn.Conv2d(3, 8, 3)
        self.fc, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.embed(x)[:, None].expand(-1, 3, -1, -1)).mean(1)
        return self.head(torch.tanh(self.fc(nn.functional.pad(hidden, (1, 1)).mean(1))))


def lora(dtype: torch.dtype = torch.float32, modules: Any = ("embed", "conv", "fc"), trained: bool = True, **options: Any) -> Any:
    """With factors that are no special case, unless they are as PEFT starts them."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(modules), **options})
    model = peft.get_peft_model(Net(), config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters() if trained else ():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(torch.randn_like(p) * 0.5)
    return model


def held(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}


def units(layer: Any, adapter: str = "default") -> Tensor:
    """What PEFT itself adds to the base, in float64 and as (units, everything else)."""
    exact = copy.deepcopy(layer).double()
    return exact.get_delta_weight(adapter).detach().flatten(1)


def spectral(m: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(m, 2)


def act(model: Any, rule: Any, optimizer: Any = None) -> nw.Control:
    """The rule alone: the step moves nothing."""
    optimizer = optimizer or torch.optim.SGD(held(model), lr=0.0)
    control = nw.attach(model, optimizer, rule)
    for p in held(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return control


# ------------------------------------------------------------------------------------------- against the dense product

RULES: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "max_norm": (lambda: nw.max_norm(0.9, "peft:product"), lambda w: w * (0.9 / w.norm(dim=1, keepdim=True)).clamp(max=1)),
    "frobenius": (lambda: nw.clip_weight_norm(2.0, "peft:product"), lambda w: w * min(1, 2.0 / float(w.norm()))),
    "sphere": (lambda: nw.unit_norm(0.7, "peft:product"), lambda w: w * 0.7 / w.norm(dim=1, keepdim=True)),
    "cap": (lambda: nw.spectral_cap(1.1, "peft:product"), lambda w: _spectrum(w, lambda s: s.clamp(max=1.1))),
    "scaled": (lambda: nw.spectral_normalize(0.6, "peft:product"), lambda w: w * 0.6 / spectral(w)),
    "nuclear": (
        lambda: nw.Rule(params="peft:product", action="project", norm="nuclear", per="matrix", radius=2.5),
        lambda w: _spectrum(w, lambda s: _simplex(s, 2.5)),
    ),
    "longest unit": (
        lambda: nw.Rule(params="peft:product", action="clip_norm", norm="max_of_units", radius=0.8),
        lambda w: w * min(1, 0.8 / float(w.norm(dim=1).max())),
    ),
}  # fmt: skip


def _spectrum(w: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u * change(s)) @ vh


def _simplex(s: Tensor, radius: float) -> Tensor:
    """The projection onto the l1 ball by bisection, independent of the library's sorting."""
    low, high = 0.0, float(s.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((s - middle).clamp(min=0).sum()) > radius else (low, middle)
    return (s - high).clamp(min=0) if float(s.sum()) > radius else s


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_equals_the_dense_computation(name: str, dtype: torch.dtype, rslora: bool) -> None:
    model = lora(dtype, use_rslora=rslora)
    rule, dense = RULES[name]
    before = {n: units(layer) for n, layer in layers(model).items()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    control = act(model, rule())
    assert set(before) == {"embed", "conv", "fc"}
    for n, layer in layers(model).items():
        wanted, got = dense(before[n]), units(layer)
        assert (wanted - before[n]).norm() > 0.1 * before[n].norm(), "nothing would have to act, so nothing is proved"
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    assert {n.split("lora_")[1].split(".")[0] for n in changed} == {"B", "embedding_A"}
    assert control.verify()


def test_a_product_in_the_weakest_direction_of_a_is_met() -> None:
    """A has condition 1e6; its Gram matrix, of condition 1e12, would lose four of the digits that this asks for."""
    model = lora(torch.float64, ["fc"])
    layer = layers(model)["fc"]
    with torch.no_grad():
        u, _, vh = torch.linalg.svd(layer.lora_A["default"].weight, full_matrices=False)
        layer.lora_A["default"].weight.copy_(u @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6], dtype=torch.float64)) @ vh)
        layer.lora_B["default"].weight.copy_(torch.randn(16, 1, dtype=torch.float64) @ u[:, 3:].mT)
    before = units(layer)
    act(model, nw.spectral_cap(float(spectral(before)) / 3, "peft:product"))
    assert (units(layer) - before / 3).norm() <= 1e-8 * before.norm()


@pytest.mark.parametrize("name", ["max_norm", "frobenius", "cap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bounds_hold_in_training_as_peft_computes_the_product(name: str, dtype: torch.dtype) -> None:
    limit, measure = {
        "max_norm": (0.05, lambda w: w.norm(dim=1).max()), "frobenius": (0.2, lambda w: w.norm()), "cap": (0.1, spectral),
    }[name]  # fmt: skip
    rule = {"max_norm": nw.max_norm, "frobenius": nw.clip_weight_norm, "cap": nw.spectral_cap}[name]
    model = lora(dtype, ["fc"], trained=False)
    optimizer = torch.optim.AdamW(held(model), lr=0.02, eps=1e-4)
    control = nw.attach(model, optimizer, rule(limit, "peft:product"))
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randint(0, 30, (8, 10), generator=generator)
        nn.functional.cross_entropy(model(x).float(), x[:, 0] % 5).backward()
        optimizer.step()
        seen.append(float(measure(units(layers(model)["fc"]))))
        assert control.verify()
    assert max(seen) <= limit and seen[-1] > 0.9 * limit


EQUAL_SHAPES: dict[str, tuple[Callable[..., Any], float, Callable[[Tensor], Tensor]]] = {
    "max_norm": (nw.max_norm, 0.3, lambda w: w.norm(dim=1).max()),
    "frobenius": (nw.clip_weight_norm, 0.9, lambda w: w.norm()),
    "cap": (nw.spectral_cap, 0.3, spectral),
    "sphere": (nw.unit_norm, 0.3, lambda w: w.norm(dim=1).max()),
}


@pytest.mark.parametrize("options", [{}, {"alpha_pattern": {"2": 5}}, {"use_rslora": True, "alpha_pattern": {"0": 2.3, "2": 5}}], ids=str)
@pytest.mark.parametrize("condition", [1, 1e5])
@pytest.mark.parametrize("name", EQUAL_SHAPES)
def test_float64_bounds_hold_on_layers_of_equal_shape_whatever_their_scales(name: str, condition: float, options: Any) -> None:
    """The layers are one batch. A's rows are of unequal length, and steps are long, so that the product's digits cancel."""
    rule, limit, measure = EQUAL_SHAPES[name]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], init_lora_weights=False, **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), config).double()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_A["default"].weight[1] /= condition
    optimizer = torch.optim.SGD(held(model), lr=1.0, momentum=0.9)
    control = nw.attach(model, optimizer, rule(limit, "peft:product"))
    for _ in range(15):
        optimizer.zero_grad()
        model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        assert control.verify(), str(control.verify())
        largest = [float(measure(units(layer))) for layer in layers(model).values()]
        near = 1e-12 * condition * limit
        assert all(0.9 * limit < value <= limit + (near if name == "sphere" else 0.0) for value in largest)


# ------------------------------------------------------------------------------------------- penalties, prox and decay


def _price(norm: str) -> nw.Rule:
    return nw.Rule(params="peft:product", action="penalty", norm=norm, strength=0.7)


def pulled(model: Any, rule: Any) -> dict[str, Tensor]:
    """The gradients that a penalty gives A and B."""
    control = act(model, rule)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    control.remove()
    return found


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (lambda: nw.l2_penalty(0.7, "peft:product"), lambda w: 0.35 * w.square().sum()),
        (lambda: _price("nuclear"), lambda w: 0.7 * torch.linalg.matrix_norm(w, "nuc")),
        (lambda: _price("spectral"), lambda w: 0.7 * spectral(w)),
        (lambda: _price("sum_of_units"), lambda w: 0.7 * w.norm(dim=1).sum()),
    ],
    ids=["half l2^2", "nuclear", "spectral", "sum of units"],
)  # fmt: skip
def test_a_penalty_gives_both_factors_the_gradient_of_the_dense_product(rule: Any, value: Any) -> None:
    model = lora(torch.float64)
    got = pulled(model, rule())
    for layer in layers(model).values():
        value(layer.get_delta_weight("default").flatten(1)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    # `act` set the gradients to zero and left the penalty's there, to which backward has added the same once more.
    assert len(wanted) == 6
    for name, grad in wanted.items():
        torch.testing.assert_close(grad, 2 * got[name], atol=1e-9, rtol=1e-7)


def test_a_nuclear_prox_lowers_the_rank_as_on_the_dense_product() -> None:
    model = lora(torch.float64, ["fc"])
    before = units(layers(model)["fc"])
    s = torch.linalg.svdvals(before)[:4]
    step = float((s[1] + s[2]) / 2)
    optimizer = torch.optim.SGD(held(model), lr=1e-12)    # it moves nothing, and the prox moves by lr · strength
    act(model, nw.nuclear_prox(step * 1e12, "peft:product"), optimizer)
    got = units(layers(model)["fc"])
    torch.testing.assert_close(got, _spectrum(before, lambda s: (s - step).clamp(min=0)), atol=1e-8, rtol=1e-6)
    assert torch.linalg.matrix_rank(got, atol=1e-7) == 2


def test_decay_of_the_product_is_decay_of_b() -> None:
    model = lora(torch.float64, ["fc"])
    before = units(layers(model)["fc"])
    optimizer = torch.optim.SGD(held(model), lr=0.1)
    act(model, nw.weight_decay(0.5, "peft:product"), optimizer)
    torch.testing.assert_close(units(layers(model)["fc"]), 0.95 * before)


# --------------------------------------------------------------------------------------------------------- selectors


def test_selectors_name_the_parts_of_each_adapter() -> None:
    model = lora(modules=["fc"], modules_to_save=["head"], use_dora=True)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc", "conv"]))
    weights = Inventory(model).weights
    found = {one: [e.name.removeprefix("base_model.model.") for e in select(weights, one)] for one in (
        "peft:A", "peft:B:other", "peft:product", "peft:product:default", "peft:magnitude", "peft:modules_to_save",
    )}  # fmt: skip
    assert found == {
        "peft:A": ["conv.lora_A.other.weight", "fc.lora_A.default.weight", "fc.lora_A.other.weight"],
        "peft:B:other": ["conv.lora_B.other.weight", "fc.lora_B.other.weight"],
        "peft:product": ["conv.lora_BA.other", "fc.lora_BA.default", "fc.lora_BA.other"],
        "peft:product:default": ["fc.lora_BA.default"], "peft:magnitude": ["fc.lora_magnitude_vector.default.weight"],
        "peft:modules_to_save": ["head.modules_to_save.default.weight", "head.modules_to_save.default.bias"],
    }  # fmt: skip


def test_only_what_names_products_picks_them_and_anything_excludes_them() -> None:
    model = lora()
    for everything in ("*", "role:all", "role:matrix", "re:.", nn.Module, lambda e: True):
        assert all(e.adapter != "product" for e in select(Inventory(model).weights, everything))
    picked = select(Inventory(model).weights, ["peft:product"], exclude="*.fc.*")
    assert [e.role for e in picked] == ["embedding", "conv"]
    assert [e.name for e in select(Inventory(model).weights, "*.fc.lora_BA.*")] == ["base_model.model.fc.lora_BA.default"]
    policy = nw.Policy([nw.max_norm("0.1*base", ["peft:product:default"], exclude="*.fc.*")])
    assert nw.Policy.from_yaml(policy.to_yaml()) == policy
    shown = str(policy.explain(model))
    assert "conv.lora_BA.default (by LoRA's s·B·A)" in shown and "o8 i4" in shown


# ---------------------------------------------------------------------------------------------- radii of the base


@pytest.mark.parametrize("norm", ["l2", "spectral"])
def test_a_radius_counts_in_the_same_blocks_of_the_base(norm: str) -> None:
    """GPT-2's fused q, k, v, stored transposed: three matrices, each with its own radius."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    attention = model.base_model.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        attention.lora_B["default"].weight.normal_()
        attention.base_layer.weight[:, 16:32].mul_(3)
    control = act(model, nw.Rule(params="peft:product", action="clip_norm", norm=norm, per="matrix", radius="0.1*base"))
    order = 2 if norm == "spectral" else "fro"
    starts = [torch.linalg.matrix_norm(w, order) for w in attention.base_layer.weight.double().chunk(3, 1)]
    moved = [torch.linalg.matrix_norm(w, order) for w in attention.get_delta_weight("default").double().chunk(3, 1)]
    torch.testing.assert_close(torch.stack(moved), 0.1 * torch.stack(starts), rtol=2e-5, atol=0)
    assert control.verify().blocks == 3


@pytest.mark.parametrize("kind", ["4", "8"])
def test_a_quantised_base_is_measured_as_peft_dequantises_it(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = torch.randn(32, 64)
    if kind == "4":
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(start.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(start.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    model = peft.get_peft_model(nn.Sequential(layer, nn.Linear(32, 4)), peft.LoraConfig(r=4, target_modules=["0"]))
    frozen = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(held(model), lr=0.5)
    control = nw.attach(model, optimizer, nw.max_norm("0.1*base", "peft:product"))
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(8, 64)) - 3).square().mean().backward()
        optimizer.step()
    smallest, largest = control.radii().of["clip_norm l2/unit <= 0.1*base, params=peft:product"]["base_model.model.0.lora_BA.default"]
    lengths = 0.1 * start.norm(dim=1)
    assert (smallest, largest) == pytest.approx((float(lengths.min()), float(lengths.max())), rel=0.03)
    assert control.verify() and torch.equal(layer.weight, frozen)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda: nw.max_norm(1.0, "peft:product", per="input"), "norm 'l2' per='input' needs its entries, which are never formed"),
        (lambda: nw.l1_ball(1.0, "peft:product"), "norm 'l1' per='unit' needs its entries"),
        (lambda: nw.clip_weight_norm(1.0, "peft:product", norm="rms"), "norm 'rms' per='tensor' needs its entries"),
        (lambda: nw.clip_weight_norm(1.0, "peft:product", norm="linf"), "norm 'linf' per='tensor' needs its entries"),
        (lambda: nw.clip_weight_value(-1.0, 1.0, "peft:product"), "norm 'box(-1, 1)' per='tensor' needs its entries"),
        (lambda: nw.max_norm(1.0, "peft:product", per="element"), "norm 'l2' per='element' needs its entries"),
        (lambda: nw.max_norm(1.0, "peft:product", layout=nw.Layout("oi", (16, 4))), "its axes are those of its base. State those"),
        (lambda: nw.clip_grad_norm("0.1*base"), "radius 'base' has a meaning on='weight' only"),
        (lambda: nw.orthogonal(params="peft:product"), "needs its entries"),
        (lambda: nw.max_norm(1.0, "peft:product", center="init"), "LoRA starts from zero"),
        (lambda: nw.relative_update(0.1, params="peft:product"), "is no matrix of its rank, since A turns"),
        (lambda: nw.spectral_cap(1.0, "peft:product", tolerance=0.01), "Leave tolerance out"),
        (lambda: nw.cpr(1.0, "peft:product"), "cpr has no meaning there"),
        (lambda: nw.clip_grad_norm(1.0, "peft:product"), "A product has no gradient of its own. Of adapters there are peft:A:default"),
        (lambda: nw.max_norm(1.0, ["peft:product", "peft:A"]), "it shares a tensor with"),
        (lambda: nw.max_norm("0.1*base"), "only LoRA's products have a base that a radius counts in"),
        (lambda: nw.max_norm(1.0, "peft:product:other"), "Of adapters there are peft:A:default, peft:B:default, peft:product:default"),
        (lambda: nw.max_norm(1.0, "peft:C"), "no part of an adapter. Allowed: A, B"),
        (lambda: nw.unit_norm("init", "peft:product"), "are zero when attached"),
    ],
)  # fmt: skip
def test_a_rule_that_means_nothing_is_refused_with_one_sentence(rule: Any, said: str) -> None:
    model = lora(modules=["fc"], trained=False)
    with pytest.raises(PolicyError) as refused:
        nw.attach(model, torch.optim.SGD(held(model), lr=0.1), rule())
    assert said in str(refused.value)


def _merged() -> Any:
    model = lora(modules=["fc"])
    model.merge_adapter()
    return model


def _frozen(which: str) -> Any:
    model = lora(modules=["fc"])
    layers(model)["fc"].get_submodule(which)["default"].weight.requires_grad_(False)
    return model


def _grouped() -> Any:
    return peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), peft.LoraConfig(r=4, target_modules=["0"]))


def _adalora() -> Any:
    return peft.get_peft_model(Net(), peft.AdaLoraConfig(target_modules=["fc"], total_step=10))


def _silent() -> Any:
    model = lora(modules=["fc"])
    layers(model)["fc"].scaling["default"] = 0.0
    return model


def _kasa() -> Any:
    return lora(modules=["fc"], kasa_config=pytest.importorskip("peft.tuners.lora.config").KasaConfig())


def _experts() -> Any:
    experts, model = nn.Linear(6, 4), nn.Sequential()
    experts.weight = nn.Parameter(torch.randn(2, 4, 6))
    model.add_module("experts", experts)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"]))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:.*[kK]a[sS][aA].*")
@pytest.mark.parametrize(
    ("make", "said"),
    [(_merged, "merged into the base"), (_grouped, "grouped convolution"), (_adalora, "AdaLoRA puts a diagonal"),
     (_silent, "its scale is 0"), (_kasa, "KasaLinearVariant does not add"), (_experts, "ParamWrapper does not add one product")],
)  # fmt: skip
@pytest.mark.parametrize("rule", [nw.max_norm, nw.l2_penalty, nw.weight_decay], ids=lambda rule: rule.__name__)
def test_an_adapter_that_no_rule_can_act_on_is_refused_by_name(rule: Any, make: Any, said: str) -> None:
    """For a penalty, too: the gradient of s·B·A is not that of what such a layer adds."""
    model = make()
    with pytest.raises(PolicyError, match=rf"{said}.*Exclude it \(exclude=\)") as refused:
        nw.attach(model, torch.optim.SGD(held(model), lr=0.1), rule(1.0, "peft:product"))
    assert "use a penalty" not in str(refused.value)
    assert "1: refused" in str(nw.Policy(rule(1.0, "peft:product")).explain(model))


def test_bounds_on_a_product_whose_b_is_frozen_are_refused() -> None:
    model = _frozen("lora_B")
    with pytest.raises(PolicyError, match="which is frozen"):
        nw.attach(model, torch.optim.SGD(held(model), lr=0.1), nw.max_norm(1.0, "peft:product"))


def test_factors_that_are_dtensors_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = lora(modules=["fc"]), init_device_mesh("cpu", (1,))
        for factor in (layers(model)["fc"].lora_A["default"], layers(model)["fc"].lora_B["default"]):
            factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(PolicyError, match="from DTensors, and no rank has all of it"):
            nw.attach(model, torch.optim.SGD(held(model), lr=0.1), nw.max_norm(1.0, "peft:product"))
    finally:
        torch.distributed.destroy_process_group()


def test_a_frozen_a_is_as_good_as_another() -> None:
    model = _frozen("lora_A")
    assert act(model, nw.max_norm(0.1, "peft:product")).verify()
    assert units(layers(model)["fc"]).norm(dim=1).max() <= 0.1


def test_an_adapter_merged_in_training_is_not_changed_behind_its_base() -> None:
    model = lora(modules=["fc"])
    control = act(model, nw.max_norm(0.1, "peft:product"))
    layer = layers(model)["fc"]
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(5)
    before = layer.lora_B["default"].weight.detach().clone()
    model.merge_adapter()
    with pytest.raises(PolicyError, match=r"is merged into its base.*unmerge_adapter"):
        control.optimizers[0].step()
    assert torch.equal(layer.lora_B["default"].weight, before)
    model.unmerge_adapter()
    control.optimizers[0].step()
    assert units(layer).norm(dim=1).max() <= 0.1


# --------------------------------------------------------------------------------------- several adapters, DoRA, state


def test_of_two_adapters_the_one_that_is_trained_is_bounded_and_the_next_when_it_is() -> None:
    model = lora(modules=["fc"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
    layer = layers(model)["fc"]
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.0)
    control = nw.attach(model, optimizer, nw.max_norm(0.01, "peft:product"))

    def step() -> tuple[float, float]:
        for p in held(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return float(units(layer).norm(dim=1).max()), float(units(layer, "other").norm(dim=1).max())

    first, second = step()
    assert first <= 0.01 < second
    model.set_adapter("other")
    assert max(step()) <= 0.01 and control.verify()


def test_two_rules_on_one_product_each_act_on_what_the_one_before_left() -> None:
    model = lora()
    control = act(model, [nw.max_norm(0.9, "peft:product"), nw.spectral_cap(1.1, "peft:product"), nw.clip_weight_norm(1.5, "peft:product")])
    for layer in layers(model).values():
        w = units(layer)
        assert w.norm(dim=1).max() <= 0.9 and spectral(w) <= 1.1 and w.norm() <= 1.5
    assert control.verify()


def test_a_scale_that_changes_in_training_counts_from_the_next_step_on() -> None:
    model = lora(modules=["fc"])
    control = act(model, nw.max_norm(0.2, "peft:product"))
    layers(model)["fc"].set_scale("default", 3)
    control.optimizers[0].step()
    assert 0.19 < units(layers(model)["fc"]).norm(dim=1).max() <= 0.2 and control.verify()


def test_all_products_together_are_one_block_beside_plain_weights() -> None:
    model = lora(modules=["fc", "conv"], modules_to_save=["head"])
    act(model, nw.clip_weight_norm(1.0, ["peft:product", "peft:modules_to_save"], per="global"))
    saved = model.base_model.model.head.modules_to_save["default"]
    parts = [*(units(layer) for layer in layers(model).values()), *(p.detach().double() for p in saved.parameters())]
    assert math.hypot(*(float(p.norm()) for p in parts)) == pytest.approx(1.0, rel=1e-5)


def test_doras_direction_and_magnitude_each_keep_their_bound() -> None:
    model = lora(modules=["fc"], use_dora=True)
    layer = layers(model)["fc"]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(5)
    act(model, [nw.max_norm("0.2*base", "peft:product"), nw.clip_weight_value(0.3, 0.7, "peft:magnitude")])
    share = units(layer).norm(dim=1) / layer.base_layer.weight.double().norm(dim=1)
    assert 0.199 < share.max() <= 0.2
    unit = torch.linalg.vector_norm(_used(model, layer), dim=1)
    assert float(unit.min()) >= 0.3 - 1e-6 and float(unit.max()) <= 0.7 + 1e-6


def _used(model: Any, layer: Any) -> Tensor:
    """The weight that the layer applies, read off its outputs."""
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)) - layer.base_layer.bias).mT


def test_the_optimizers_state_stays_and_radii_of_the_base_travel_in_it() -> None:
    model = lora(modules=["fc"])
    optimizer = torch.optim.AdamW(held(model), lr=0.1)
    control = nw.attach(model, optimizer, nw.max_norm("0.1*base", "peft:product"))
    free = lora(modules=["fc"])
    alone = torch.optim.AdamW(held(free), lr=0.1)
    for one, steps in ((model, optimizer), (free, alone)):
        for p in held(one):
            p.grad = torch.ones_like(p)
        steps.step()
    for p, q in zip(held(model), held(free), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], alone.state[q]["exp_avg"])
    saved = optimizer.state_dict()
    with torch.no_grad():
        layers(model)["fc"].base_layer.weight.mul_(10)
    control.remove()
    again = torch.optim.AdamW(held(model), lr=0.1)
    resumed = nw.attach(model, again, nw.max_norm("0.1*base", "peft:product"))
    fresh = resumed.radii()
    again.load_state_dict(saved)
    [radii], [others] = resumed.radii().of.values(), fresh.of.values()
    assert next(iter(others.values()))[0] == pytest.approx(10 * next(iter(radii.values()))[0], rel=1e-6)


def test_what_is_known_of_a_product_outlives_every_rebinding() -> None:
    """An adapter that is switched away and back, and a layer that is unfrozen, leave the first radii, by the products' names."""
    model = lora(modules=("fc",))
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["fc"], init_lora_weights=False))
    first = units(layers(model)["fc"]).norm(dim=1)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    optimizer = torch.optim.SGD(held(model), lr=0.0)
    model.set_adapter("default")
    control = nw.attach(model, optimizer, nw.max_norm("0.5*init", "peft:product"))

    def step() -> None:
        for p in held(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()

    for _ in range(2):
        for adapter in ("other", "default"):
            step()
            model.set_adapter(adapter)
    model.base_model.model.head.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model.base_model.model.head.weight]})
    step()
    torch.testing.assert_close(units(layers(model)["fc"]).norm(dim=1), 0.5 * first, rtol=1e-5, atol=0)
    radii = control.state_dict()["rules"][0]["radius"]
    assert set(radii) == {f"base_model.model.fc.lora_BA.{adapter}" for adapter in ("default", "other")}
    torch.testing.assert_close(radii["base_model.model.fc.lora_BA.default"].double(), first, rtol=1e-5, atol=0)
