"""What advice claims of models that others write is true of them: chains, branches, what a normalisation divides out, what shrinks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import normwise as nw
from normwise import cli
from normwise.advice import Advice
from normwise.advice.facts import Facts
from normwise.prune import shrink, targets


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x))
        out: Tensor = self.head(x)
        return out


class Scaled(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.layers[0](x)
        out: Tensor = self.head(x)
        return out


class Gated(Residual):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers[0](x) * torch.sigmoid(self.layers[1](x)))
        return out


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.one(x), self.other(x)], 1))
        return out


class Steep(Residual):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.leaky_relu(self.layers[0](x), 3.0))
        return out


class Divides(Residual):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.layer_norm(self.layers[0](x), (6,)))
        return out


class Louder(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = x * 10
        out: Tensor = self.head(x)
        return out


class Chain(Residual):
    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        x = x.flatten(1)
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k < 3:
                x = torch.tanh(x)
        out: Tensor = self.head(F.dropout(F.relu(x), 0.5, self.training))
        return out


NO_CHAINS = (Residual, Scaled, Gated, Joined, Steep, Divides, Louder)


def claims(advice: Advice) -> bool:
    return any("1-Lipschitz" in line.why and line.rules for line in advice.lines)


@pytest.mark.parametrize("kind", NO_CHAINS)
def test_no_chain_is_claimed_where_there_is_none(kind: type[nn.Module]) -> None:
    """And where there is none, one can be found that the caps alone do not hold."""
    advice = nw.advise(kind(), "lipschitz")
    assert not claims(advice) and advice.calls[0].name == "spectral_cap"
    said = any(line.what == "residual branches add up" for line in advice.lines)
    assert said is (kind in (Residual, Scaled))


def test_residual_branches_can_amplify_by_two_each() -> None:
    """What the claim would have said of this network is wrong by 16."""
    model = Residual()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.copy_(torch.eye(6))
            layer.bias.fill_(1.0)
        model.head.weight.copy_(torch.eye(6)[:3])
    jacobian = torch.autograd.functional.jacobian(model, torch.ones(6))
    assert float(torch.linalg.matrix_norm(jacobian, 2)) == pytest.approx(16.0)


class AllButLinear(nn.Sequential):
    """A Sequential with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(x)
        return out


LAYERS = nn.Linear(6, 6), nn.Linear(6, 3)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, given, made: made * 10)
    return model


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model.forward = lambda x: 10 * nn.Sequential.forward(model, x)    # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "chained"),
    [
        (Chain(), True), (nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)), True),
        (nn.Sequential(LAYERS[0], nn.GELU(), LAYERS[1]), False), (nn.Sequential(LAYERS[0], nn.LeakyReLU(2.0), LAYERS[1]), False),
        (nn.Sequential(LAYERS[0], nn.LeakyReLU(), LAYERS[1]), True), (AllButLinear(*LAYERS), False),
        (nn.Sequential(LAYERS[0], nn.LayerNorm(6), LAYERS[1]), False),
        (nn.Sequential(LAYERS[0], nn.ReLU(), parametrizations.spectral_norm(nn.Linear(6, 3))), False),
        (frozen(), False), (hooked(), False), (replaced(), False),
    ],
)  # fmt: skip
def test_a_chain_is_claimed_where_it_is_plain_to_see(model: nn.Module, chained: bool) -> None:
    assert claims(nw.advise(model, "lipschitz")) is chained


def test_frozen_matrices_are_told_where_a_product_is() -> None:
    [told] = [one for one in nw.advise(frozen(), "lipschitz").lines if one.what == "what is frozen is not capped"]
    assert told.tensors == 1 and "0.weight" in told.on


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_without_parameters_are_told() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LSTM(6, 6), nn.Embedding(3, 6)), {nn.Linear, nn.LSTM}
    )
    model = nn.Sequential(quantised, nn.Linear(6, 3))
    assert Facts.of(model).packed == ["0.0", "0.2"]
    [told] = [one for one in nw.advise(model, "lipschitz").lines if one.what == "what is frozen is not capped"]
    assert told.on == "0.0, 0.2" and told.tensors == 0
    assert Facts.of(frozen()).packed == []


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.RNN) -> None:
        super().__init__()
        self.layer = kind(6, 6, batch_first=True, **({"nonlinearity": "relu"} if kind is nn.RNN else {}))    # type: ignore[call-arg]
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x)[0][:, -1])
        return out


class Mixture(Residual):
    def forward(self, x: Tensor) -> Tensor:
        shares = self.layers[3](x).softmax(-1)
        out: Tensor = self.head(sum(shares[:, i : i + 1] * layer(x) for i, layer in enumerate(self.layers[:3])))
        return out


class Swish(Residual):
    def forward(self, x: Tensor) -> Tensor:
        """Gates in one tensor."""
        up, gate = self.layers[0](x).chunk(2, -1)
        up *= F.silu(gate)
        out: Tensor = self.layers[1](torch.cat([up, up], -1))
        return out


class Halved(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.layers[0](x))


class Multiplied(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.layers[0](x), self.layers[1](x))


class Unmultiplied(Residual):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A sigmoid-weighted unit by hand, a mask, shapes and constants: no products of activations."""
        x = self.layers[0](x) * 2
        x = 0.5 * x * torch.sigmoid(x)
        x = x * mask if mask is not None else x * self.layers[1].bias
        out: Tensor = self.head(x) * (x.shape[0] * x.shape[1])
        return out


def bilinear() -> nn.Module:
    return nn.Bilinear(6, 6, 3)


PRODUCTS = (Gated, Mixture, Swish, Halved, Multiplied, bilinear, lambda: Recurrent(nn.LSTM), lambda: Recurrent(nn.GRU))
NO_PRODUCTS = (Residual, Scaled, Joined, Louder, Chain, Unmultiplied, Recurrent)


@pytest.mark.parametrize("kind", [*PRODUCTS, *NO_PRODUCTS])
def test_products_of_activations_and_recurrences_are_told(kind: Any) -> None:
    """And no figure for the network: none would hold."""
    lines = nw.advise(kind(), "lipschitz").lines
    whats = [line.what for line in lines]
    assert ("products of activations have no bound of their own" in whats) is (kind in PRODUCTS)
    recurs = any(isinstance(module, nn.RNNBase) for module in kind().modules())
    assert ("a recurrence multiplies by its matrix at each step" in whats) is recurs
    [cap] = [line for line in lines if line.rules]
    assert ("No bound on the network follows" in cap.why) is (kind is not Chain) and "2.02^" not in str(lines)


def test_a_recurrence_under_the_caps_amplifies_far_beyond_their_product() -> None:
    """What a product over the layers would have said of this network is wrong by hundreds."""
    torch.manual_seed(0)
    model = Recurrent()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(10 * torch.eye(*p.shape) if p.ndim == 2 else torch.ones_like(p))
    advice = nw.advise(model, "lipschitz")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    nw.attach(model, optimizer, advice.policy)
    model(torch.zeros(1, 2, 6)).sum().backward()
    optimizer.step()
    sizes = [float(torch.linalg.matrix_norm(p.detach(), 2)) for p in model.parameters() if p.ndim == 2]
    assert max(sizes) <= 2.021
    slope = torch.autograd.functional.jacobian(lambda x: model(x[None])[0].sum(), torch.ones(12, 6))
    assert float(slope.norm()) > 500 * math.prod(sizes)


# ----------------------------------------------------------------------------------------------------- complex parameters


def complex_chain(*complex_ones: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 6, dtype=torch.complex64 if k in complex_ones else None) for k in range(3)))


@pytest.mark.parametrize("goal", ["stability", "lipschitz", "finetuning", "plasticity"])
@pytest.mark.parametrize("complex_ones", [(1,), (0, 1, 2)])
def test_complex_weights_are_left_out_and_told(goal: str, complex_ones: tuple[int, ...]) -> None:
    """They are counted in no rule, and nothing is claimed of a network that has them."""
    model = complex_chain(*complex_ones)
    advice = nw.advise(model, goal)
    weights = Facts.of(model).inventory.weights
    acting = {e.name for rule in advice.policy for e in rule.targets(weights)}
    assert not {f"{k}.weight" for k in complex_ones} & acting and bool(acting) is (len(complex_ones) < 3)
    counted = {line.tensors for line in advice.lines if line.rules and line.rules[0].name != "zclip"}
    assert all(n <= 3 - len(complex_ones) for n in counted)
    [told] = [line for line in advice.lines if line.what == "rules on complex parameters"]
    assert told.verdict == "leave" and not claims(advice)
    assert not any("multiply the logits" in line.what for line in advice.lines)
    assert bool(advice.policy.rules) is (len(complex_ones) < 3)
    assert not any(line.source == "tried on your model" for line in advice.lines)


def test_what_is_said_of_a_rule_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caps of a chain are refused, nobody is told how to train a 1-Lipschitz network."""
    from normwise.advice import advisor

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert any("multiply the logits" in line.what for line in nw.advise(model, "lipschitz").lines)
    monkeypatch.setattr(advisor, "_refused", lambda facts, calls: "no such rule here" if calls else "")
    lines = nw.advise(model, "lipschitz").lines
    assert [line.what for line in lines if line.verdict != "do"] == ["nw.spectral_cap(1.0, params=['role:hidden', 'role:head'])"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.pos_embed = nn.Embedding(6, 6)


class Kept(Block):
    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out: Tensor = self.other(F.relu(self.one(x)))
        out += identity
        return out


class Shortcut(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.other(F.relu(self.one(x))) + self.layers[0](x))


class Called(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.one(x))


class Method(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x)
        return out.add(x)


class Half(Block):
    def forward(self, x: Tensor) -> Tensor:
        skip, h = x, self.other(F.relu(self.one(x)))
        out: Tensor = h + 0.5 * skip
        return out


class Swapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.other(F.relu(self.one(x))), x
        return x + skip


class Handed(Block):
    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.one(hidden) + residual
        return out


class Helped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return dropout_add(self.one(x), x, 0.1, self.training)


def dropout_add(out: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    return residual + F.dropout(out, p, training)


class Plain(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.one(x)
        if mask is not None:
            y = y + mask
        y = y + self.one.bias
        y = (y - y.mean()) / (y.std() + 1e-5)
        out: Tensor = self.other(y)
        return out


class Placed(Block):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        out: Tensor = self.other(self.one(x) + self.pos_embed(places))
        return out


class Judged(Block):
    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.one(x).mean() + self.other(x).mean()
        return loss


class Cell(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        i, f, g = self.one(x).chunk(3, -1)
        out: Tensor = f * c + i * g
        return out


class Listed(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen: tuple[Tensor, ...] = (x,)
        for layer in self.layers:
            x = layer(x)
            seen = seen + (x,)    # noqa: RUF005
        return seen


@pytest.mark.parametrize(
    ("kind", "adds"),
    [
        *((kind, True) for kind in (Kept, Shortcut, Called, Method, Half, Swapped, Handed, Helped)),
        *((kind, False) for kind in (Plain, Placed, Judged, Cell, Listed)),
    ],
)
def test_a_sum_of_two_ways_from_one_input_is_a_branch(kind: type[nn.Module], adds: bool) -> None:
    assert Facts.of(kind()).branches == adds


def test_torch_s_own_blocks_have_branches() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert Facts.of(nn.TransformerEncoder(block, 3, enable_nested_tensor=False)).branches == 3


# ------------------------------------------------------------------------------------------------------------ adapters


def beside(dora: bool = False) -> nn.Module:
    """LoRA on one layer, with another one and the head trained whole."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    options = {"use_dora": True} if dora else {"modules_to_save": ["2", "4"]}
    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], **options))
    return adapted


def test_what_trains_whole_beside_lora_gets_the_ordinary_rules() -> None:
    """And is held: without a rule of its own it could grow at will while the product is capped."""
    model = beside()
    advice = nw.advise(model, "lipschitz")
    assert [call.name for call in advice.calls] == ["spectral_cap", "spectral_cap"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    control = nw.attach(model, optimizer, advice.policy)
    whole = {name: p for name, p in model.named_parameters() if "modules_to_save" in name and p.ndim == 2}
    assert len(whole) == 2
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        sum(-50 * p.square().sum() for p in model.parameters() if p.requires_grad).backward()    # type: ignore[union-attr]
        optimizer.step()
    assert control.verify().ok
    assert all(float(torch.linalg.matrix_norm(p.detach(), 2)) <= 2.021 for p in whole.values())
    for goal in ("stability", "finetuning", "plasticity"):
        acting = {e.name for rule in nw.advise(model, goal).policy for e in rule.targets(Facts.of(model).inventory.weights)}
        assert not any("lora_" in name for name in acting if goal != "stability") and sum("modules_to_save" in n for n in acting) >= 1
    assert "are among what trains" in str(nw.advise(model, "speed")).replace("\n            ", " ")


def test_dora_is_told_what_a_product_bound_leaves_free() -> None:
    assert any("peft:magnitude" in one.what for one in nw.advise(beside(dora=True), "lipschitz").lines)
    assert not any("peft:magnitude" in one.what for one in nw.advise(beside(), "lipschitz").lines)


# ----------------------------------------------------------------------------------------------------- computed weights


def test_only_the_computed_weights_that_refuse_a_rule_are_left_out() -> None:
    """Not those that are frozen, that the rule does not select, or that take it."""
    orthogonal = parametrizations.orthogonal
    model = nn.Sequential(
        orthogonal(nn.Linear(6, 12)), nn.Tanh(), orthogonal(nn.Linear(12, 12)), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(),
        orthogonal(nn.Linear(12, 3)),
    )  # fmt: skip
    for k in (0, 2):
        model[k].requires_grad_(False)
    [decay] = [one for one in nw.advise(model, "stability").lines if one.rules and one.rules[0].name == "weight_decay"]
    assert (decay.tensors, decay.numbers) == (1, 144) and decay.rules[0].arguments["exclude"] == ["6.weight"]
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 12)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(12, 12)), nn.ReLU(),
        nn.Linear(12, 3),
    )  # fmt: skip
    [cap] = [one for one in nw.advise(model, "lipschitz").lines if one.verdict == "do" and one.rules]
    assert cap.rules[0].arguments["exclude"] == ["2.weight"] and cap.tensors == 2


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.3)])
def test_a_computed_head_is_not_held_either(computed: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), computed(nn.Linear(12, 3)))
    advice = nw.advise(model, "finetuning")
    [rule] = advice.policy
    assert [e.name for e in rule.targets(Facts.of(model).inventory.weights)] == ["0.weight"]
    assert [one.tensors for one in advice.lines if one.rules] == [1]


def test_a_chain_under_the_advice_is_1_lipschitz() -> None:
    """By jacobians in float64, after steps that push against the caps."""
    torch.manual_seed(0)
    model = Chain().double().eval()
    advice = nw.advise(model, "lipschitz")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nw.attach(model, optimizer, advice.policy)
    for _ in range(3):
        optimizer.zero_grad()
        (-model(torch.randn(32, 6).double()).square().mean()).backward()
        optimizer.step()
    slopes = [torch.autograd.functional.jacobian(lambda x: model(x[None])[0], torch.randn(6).double()) for _ in range(20)]
    assert 0 < max(float(torch.linalg.matrix_norm(slope, 2)) for slope in slopes) <= 1 + 1e-9


# ------------------------------------------------------------------------------------------------------------ scale-free


class First(nn.Module):
    """A block whose normalisations come first."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class Bent(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.bn1, self.head = nn.Linear(6, 6, bias=bias), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bn1(torch.tanh(self.fc1(x))))
        return out


class Straight(Bent):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        out: Tensor = self.head(self.bn1(x))
        return out


class Past(nn.Module):
    """The first layer feeds the stream and the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up, self.down = nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 9), nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


def sharing(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), act, nn.BatchNorm1d(6), nn.Linear(6, 6), act, nn.BatchNorm1d(6), nn.Linear(6, 3))


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[1].eval()
    return model


FREE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "norms first": (First, (2, 4, 5, 5)), "tanh between": (Bent, (6, 6)), "relu between": (Straight, (6, 6)),
    "relu, no bias": (lambda: Straight(False), (6, 6)), "past the norm": (Past, (6, 6)),
    "one GELU twice": (lambda: sharing(nn.GELU()), (6, 6)), "one ReLU twice": (lambda: sharing(nn.ReLU()), (6, 6)),
    "a frozen norm": (partly_frozen, (6, 6)),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6), nn.Linear(6, 3)), (6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_scale_free_is_what_can_be_doubled(name: str) -> None:
    """Guessed from the code, and tried: doubling a weight leaves the output as it was, or it is not scale-free."""
    build, shape = FREE[name]
    torch.manual_seed(0)
    model = build().double()
    facts, x = Facts.of(model), (100 if "no bias" in name else 3) * torch.randn(*shape).double()
    found, truly = set(facts.guessed), set()
    for e in facts.weights(("hidden", "conv", "head")):
        before, own = model(x).detach(), e.param.detach().clone()
        raw = e.computed.original0 if e.computed is not None and hasattr(e.computed, "original0") else e.param
        with torch.no_grad():
            raw.mul_(2)
            after = model(x)
            raw.div_(2)
        assert torch.equal(e.param, own) or e.computed is not None
        if torch.allclose(before, after, atol=1e-4, rtol=1e-3):
            truly.add(e.name)
    assert found == truly, (found, truly)


# -------------------------------------------------------------------------------------------------- rules that are refused


@pytest.mark.parametrize("goal", ["stability", "lipschitz", "finetuning", "plasticity"])
def test_a_weight_that_refuses_a_rule_does_not_take_it_from_the_others(goal: str) -> None:
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    advice = nw.advise(model, goal)
    left = [line for line in advice.lines if line.source == "tried on your model"]
    assert [line.on.partition(":")[0] for line in left] == ["2.weight"]
    optimizer = advice.optimizer.build(model)
    control = nw.attach(model, optimizer, advice.policy)
    acted = {name for rule in control.receipt().rules for name in str(rule).split() if name.endswith(".weight")}
    assert advice.policy.rules and "2.weight" not in acted
    assert all("2.weight" in str(call.arguments.get("exclude")) for call in advice.calls if call.name != "zclip")


class ByHand(nn.Module):
    """LoRA as people write it themselves."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(size, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.lora_B(self.lora_A(x))
        return out


@pytest.mark.parametrize("kind", [beside, lambda: beside(dora=True), lambda: nn.Sequential(ByHand(6, 8), nn.ReLU(), ByHand(8, 3))])
def test_an_adapter_is_no_residual_branch(kind: Any) -> None:
    """W·x + s·B·A·x is one matrix. A branch around it is one all the same."""
    plain = Facts.of(kind())
    assert (plain.branches, plain.multiplied) == (0, 0)
    outer = Residual()
    outer.layers[0] = ByHand(6, 6)
    assert Facts.of(outer).branches == 1


@pytest.mark.parametrize("goal", ["lipschitz", "finetuning"])
def test_lora_by_hand_is_told_that_it_has_no_product(goal: str) -> None:
    advice = nw.advise(nn.Sequential(ByHand(6, 8), nn.ReLU(), ByHand(8, 3)), goal)
    assert not advice.calls and not [line for line in advice.lines if line.source == "tried on your model"]
    assert [line.tensors for line in advice.lines if "not PEFT's" in line.why] == [4]


def test_the_lasso_leaves_out_what_shrink_leaves_whole() -> None:
    grouped, one, other = nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1)
    model = nn.Sequential(grouped, nn.ReLU(), one, nn.ReLU(), other, nn.Flatten(), nn.Linear(54, 3))
    advice = nw.advise(model, "sparsity")
    lassoed = {name for call in advice.calls for name in call.arguments["params"]}
    assert lassoed == {"2.weight", "4.weight"}
    with torch.no_grad():
        for k in (0, 2):
            model[k].weight[:2] = 0
            model[k].bias[:2] = 0
    smaller, _ = shrink(model, torch.randn(2, 2, 5, 5))
    assert (smaller[0].out_channels, smaller[2].out_channels) == (4, 4)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        out: Tensor = self.head(x)
        return out


class Augmented(Stem):
    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.relu(self.up(x)))
        h += self.stem(x)
        out: Tensor = self.head(h)
        return out


class GatedUnits(Stem):
    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x) * torch.sigmoid(self.down(F.relu(self.up(x))))
        out: Tensor = self.head(h)
        return out


class ScaledUnits(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(F.relu(self.up(self.stem(x))) * self.gamma))
        return out


class Straightly(Stem):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """Constants and numbers of the module's own mix nothing."""
        x = 0.5 * F.relu(self.stem(x) + 1)
        out: Tensor = self.head(self.down(F.relu(self.up(x)) * self.factor))
        return out


class Experts(nn.Module):
    """A router, and experts whose outputs are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Sequential(nn.Linear(6, 2), nn.Softmax(-1)), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x)
        out: Tensor = self.head(sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))
        return out


class Shortcuts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Stem()
        self.body.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def routed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 6), Shortcuts(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


UNITS: dict[Any, set[str]] = {
    Stem: {"up"}, Augmented: {"up"}, GatedUnits: {"up"}, Straightly: {"stem", "up", "down"},
    ScaledUnits: {"stem", "down"}, Experts: {"experts.0.0", "experts.1.0"},
    Joined: set(), routed: {"3.body.up", "4"},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNITS)
def test_the_lasso_is_for_units_that_a_smaller_network_can_do_without(kind: Any) -> None:
    """Against what `prune.targets` finds by autograd, where shortcuts count, since their layers lose units together."""
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = kind()
    advice = nw.advise(model, "sparsity")
    chosen = {name for call in advice.calls for name in call.arguments["params"]}
    assert chosen == {f"{name}.weight" for name in UNITS[kind]}
    assert chosen <= set(targets(model, torch.randn(3, 6)))
    left = [line for line in advice.lines if line.what == "group lasso on units that others are mixed with"]
    assert bool(left) is (kind is not Straightly)
    assert bool(chosen) is any("train the smaller shape" in line.what for line in advice.lines)


@pytest.mark.parametrize("goal", ["speed", "stability", "finetuning"])
def test_sparse_gradients_are_switched_off_first(goal: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(11, 8, sparse=True), nn.Linear(8, 3))
    advice = nw.advise(model, goal)
    assert advice.lines[0].what == "model.get_submodule('0').sparse = False" and advice.lines[0].verdict == "do"
    space: dict[str, Any] = {"model": model}
    exec(advice.python(), space)
    model(torch.randint(11, (4, 6))).square().mean().backward()
    before = model[0].weight.clone()
    space["optimizer"].step()
    assert not torch.equal(model[0].weight, before)
    assert not nw.advise(nn.Sequential(nn.EmbeddingBag(11, 8), nn.Linear(8, 3)), goal).settings


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        out: Tensor = scores.softmax(-1) @ self.value(x)
        return out


def test_logits_that_have_grown_are_told_where_nobody_states_the_heads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), OneHead(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].query.weight.mul_(30)
        model[1].key.weight.mul_(30)
    given = [torch.randint(11, (4, 6)) for _ in range(9)]
    advice = nw.advise(model, "stability", batches=given, loss=lambda m, b: m(b).square().mean(), steps=8)
    [line] = [line for line in advice.lines if "largest logit is" in line.what]
    assert (line.verdict, line.on, line.basis) == ("know", "1", "probe") and float(line.what.split()[-1]) > 100
    assert not [line for line in advice.lines if line.source == "tried on your model"]


def test_a_spike_takes_the_advice_against_clipping_back() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    calm = [torch.randn(4, 1, 6, 6) for _ in range(12)]
    loud = [30 * batch if k == 5 else batch for k, batch in enumerate(calm)]
    whats = {}
    for name, given in (("calm", calm), ("loud", loud)):
        advice = nw.advise(model, batches=given, loss=lambda m, b: m(b).abs().mean(), steps=12)
        whats[name] = [line.verdict for line in advice.lines if line.what in ("gradient clipping and bounds on weights", "nw.zclip(2.5)")]
    assert whats == {"calm": ["leave"], "loud": ["do"]}


def test_weights_that_are_not_finite_are_told() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight.data[0, 0] = torch.nan
    for goal in ("speed", "plasticity"):
        said = [line.on for line in nw.advise(model, goal).lines if line.what == "weights that are not finite"]
        assert [on.partition(":")[0] for on in said] == ["2.weight"]


# ------------------------------------------------------------------------------------------------------------- the command


def test_the_command_asks_nothing_of_a_model_for_a_goal_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef model():\n    print('built')\n    return nn.Linear(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["advise", "mine:model", "--goal", "sped"]) == 2
    told = capsys.readouterr()
    assert "built" not in told.out and "speed" in told.err
    for two in (("--yaml", "--python"), ("--python", "--json"), ("--yaml", "--json")):
        assert cli.main(["advise", "mine:model", two[0], "same.txt", two[1], "./same.txt"]) == 2
        told = capsys.readouterr()
        assert "one place" in told.err and "built" not in told.out and not (tmp_path / "same.txt").exists()


def test_weights_in_float8_get_advice() -> None:
    """They have no norm of their own."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model[0].to(torch.float8_e4m3fn)
    assert nw.advise(model, "stability").lines
    model[0].bias.data = torch.full((6,), torch.nan).to(torch.float8_e4m3fn)
    assert any(one.what == "weights that are not finite" for one in nw.advise(model, "stability").lines)
