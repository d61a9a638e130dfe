"""Rules on LoRA's product s·B·A, against the dense product, with the real peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """A layer of each kind that LoRA takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(30, 12), nn.Conv2d(3, 8, 3)
        self.fc, self.out = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.embed(x)[:, None].expand(-1, 3, -1, -1)).mean(1)
        return self.out(torch.tanh(self.fc(nn.functional.pad(hidden, (1, 1)).mean(1))))


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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
    assert max(seen) <= limit and seen[-1] > 0.9 * limit
    assert control.verify()
