"""What advice reads off a forward pass is what the forward pass does, and what it says of a model does not contradict what it advises."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

import normwise as nw
from normwise.advice import GOALS, Advice, advisor
from normwise.advice.facts import Facts
from normwise.advice.probe import Probe
from test_advise_claims import claims

PRODUCTS_SAID = "products of activations have no bound of their own"


def whats(advice: Advice) -> list[str]:
    return [line.what for line in advice.lines]


class Base(nn.Module):
    def __init__(self, width: int = 3, times: int = 2) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, width * times), nn.Linear(6, 6), nn.Linear(6, 3)

    def mix(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


# --------------------------------------------------------------------------------------------------- products of activations


def times(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def by_hand(x: Tensor) -> Tensor:
    share = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x * share


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.flip(-1) * sin


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def scanned(a: Tensor, x: Tensor) -> Tensor:
    state, seen = torch.zeros(6), []
    for k in range(len(x)):
        state = torch.exp(a[k]) * state + x[k]
        seen.append(state)
    return torch.stack(seen)


def itself(x: Tensor, depth: int) -> Tensor:
    return x if depth == 0 else itself(x, depth - 1)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:    # type: ignore[override]
        return x * y


@torch.no_grad()
def decorated(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@torch.jit.script
def scripted(x: Tensor, y: Tensor) -> Tensor:
    return x * y


class Chained(Base):
    """Nothing that it has beside ``forward`` counts: an ``__init__`` that multiplies its arguments, a loss, a method nobody calls."""

    def __init__(self, width: int = 3, times: int = 2) -> None:
        super().__init__(width * times, 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) * y).sum()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.one(x)))
        return out


class Numbers(Base):
    def forward(self, x: Tensor, alpha: float = 0.5, times: int = 2) -> Tensor:
        return scaled(self.one(x) * alpha * times, 3.0) * len(x) * torch.ones_like(x)


class Bent(Base):
    def forward(self, x: Tensor) -> Tensor:
        return itself(by_hand(self.one(x)), 3)


class Turned(Base):
    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = places
        return turned(self.one(x), cos, sin)


class Masked(Base):
    def mask(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.mask(x)


class Dropped(Base):
    def forward(self, x: Tensor) -> Tensor:
        kept = x.new_empty(x.shape[0], 1).bernoulli_(0.9)
        return self.one(x) * kept


class Judged(Base):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = times(self.one(x), y).sum()
        return loss, loss


class InMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.one(x), self.other(x))


class InMethodByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(y=self.one(x), x=self.other(x))


class InFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return times(self.one(x), self.other(x))


class InBase(InMethod):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class InAutograd(Base):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Fused.apply(self.one(x), self.other(x))
        return out


class Decorated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return decorated(self.one(x), self.other(x))


class Scripted(Base):
    def forward(self, x: Tensor) -> Tensor:
        return scripted(self.one(x), self.other(x))


class Closed(Base):
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.other(x))

        def gated(y: Tensor) -> Tensor:
            return y * gate

        return gated(self.one(x))


class HandedOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(self.mix, self.one(x), self.other(x))
        return out


class Renamed(Base):
    def forward(self, x: Tensor) -> Tensor:
        act = times if self.training else functools.partial(times)
        return act(self.one(x), self.other(x))


class Starred(Base):
    def forward(self, *given: Tensor) -> Tensor:
        both = [self.one(given[0]), self.other(given[1])]
        return times(*both)


class Modulated(Base):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.other(c).chunk(2, -1)
        return modulated(self.one(x), shift, scale)


class Scanned(Base):
    def forward(self, x: Tensor) -> Tensor:
        return scanned(-self.one(x), self.other(x))


class OneSide(Base):
    def forward(self, x: Tensor, gated: bool = True) -> Tensor:
        if gated:
            gate = torch.sigmoid(self.one(x))
        else:
            gate = torch.ones(6)
        return self.other(x) * gate


class Slices(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x[:, :3] * torch.sigmoid(x[:, 3:])


class Squeezed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.one(x.mean(0, keepdim=True)))


class Dynamic(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.one(x))


class Listed(Base):
    def forward(self, x: Tensor) -> Tensor:
        gates = []
        gates.append(self.one(x))
        return self.other(x) * gates[0]


class Written(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(6, 6)
        out[:, :3] = self.one(x)
        out[:, 3:] *= 2
        return self.other(x) * out


class Walrus(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (a := self.one(x)) * (self.other(x) + a)


class Attends(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, self.one(x), self.other(x))


class Asks(nn.Module):
    """Its child's forward pass multiplies nothing; the method that is called does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.inner = nn.Linear(6, 6), Chained()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.mix(self.one(x), x)


FOUND = (
    InMethod, InMethodByName, InFunction, InBase, InAutograd, Decorated, Scripted, Closed, HandedOn, Renamed, Starred, Modulated, Scanned,
    OneSide, Slices, Squeezed, Dynamic, Listed, Written, Walrus, Attends, Asks,
)  # fmt: skip
NONE = (Chained, Numbers, Bent, Turned, Masked, Dropped, Judged)


@pytest.mark.parametrize("kind", FOUND)
def test_a_product_is_found_wherever_the_forward_pass_reaches_it(kind: type[nn.Module]) -> None:
    assert Facts.of(kind()).multiplied == 1
    assert PRODUCTS_SAID in whats(nw.advise(kind(), "lipschitz"))


@pytest.mark.parametrize("kind", NONE)
def test_what_the_forward_pass_does_not_reach_is_no_product(kind: type[nn.Module]) -> None:
    assert Facts.of(kind()).multiplied == 0
    assert PRODUCTS_SAID not in whats(nw.advise(kind(), "lipschitz"))


def test_products_in_the_functions_of_a_mamba_are_told() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
    assert PRODUCTS_SAID in whats(nw.advise(transformers.MambaForCausalLM(config), "lipschitz"))


# ------------------------------------------------------------------------------------------------------------------- chains

HELD = (
    "F.dropout(x, 0.5, self.training)", "F.dropout(x, p=0.5, training=self.training)", "F.dropout(x, training=False)",
    "F.alpha_dropout(x, 0.5, training=self.training)", "F.alpha_dropout(x, 0.5)", "F.feature_alpha_dropout(x, training=False)",
    "F.dropout3d(x, 0.5, self.training)", "torch.dropout(x, 0.5, self.training)",
    "torch.dropout(x, p=0.5, train=False)", "F.relu(x)", "F.relu(x, inplace=True)", "x.relu()", "torch.tanh(x)", "x.sigmoid()", "x.abs()",
    "F.leaky_relu(x)", "F.leaky_relu(x, 0.2)", "F.leaky_relu(x, negative_slope=1.0)", "F.elu(x)", "F.elu(x, 0.5)", "F.softplus(x)",
    "F.softplus(x, 5.0)", "F.softplus(x, beta=0.5, threshold=30.0)", "F.hardtanh(x)", "F.logsigmoid(x)", "F.softsign(x)",
    "x.to(torch.float32)", "x.float()", "x.view(-1, 6)", "x.reshape(x.shape[0], -1)",
)  # fmt: skip
REFUSED = (
    "F.dropout(x)", "F.dropout(x, 0.9)", "F.dropout(x, 0.9, True)", "F.dropout(x, training=True)", "F.dropout1d(x)", "F.dropout2d(x)",
    "F.dropout3d(x)", "F.alpha_dropout(x, 0.5, True)", "F.alpha_dropout(x, training=True)", "F.feature_alpha_dropout(x, 0.5, True)",
    "torch.dropout(x, 0.5, True)", "torch.alpha_dropout(x, 0.5, True)", "F.dropout(x, training=not self.training)",
    "F.leaky_relu(x, 2.0)", "F.leaky_relu(x, negative_slope=2.0)", "F.elu(x, 2.0)", "F.elu(x, alpha=2.0)", "F.celu(x, -10.0)",
    "F.softplus(x, 1.0, 1.0)", "F.softplus(x, 1.0, -1.0)", "F.softplus(x, threshold=0.5)", "F.gelu(x)", "F.silu(x)", "F.mish(x)",
    "F.selu(x)", "F.hardswish(x)", "F.normalize(x)", "F.softmax(x / 0.01, -1)", "torch.sigmoid(10 * x)", "x * 2", "x.mul(2)",
    "x.to(torch.int8).float()", "x.type(torch.int64).float()", "x.to(dtype=torch.int8).float()", "x.view(torch.int32).view(torch.float32)",
    "self.louder[0](x)", "LOUD[0](x)", "G.relu(x)", "F.pad(x, (6, 0))", "F.interpolate(x[:, None], 12)", "torch.exp(x)", "x.square()",
    "x.expand(9, -1, -1)", "torch.cat([x, x])",
)  # fmt: skip
STATEMENTS = (
    "for f in self.louder:\n            x = f(x)", "for f in (torch.exp,):\n            x = f(x)", "for f in LOUD:\n            x = f(x)",
    "if x.sum() > 0:\n            x = F.relu(x)", "if (x := x * 10).ndim:\n            x = F.relu(x)",
    "for _ in range(int(x.abs().sum())):\n            x = torch.tanh(x)",
)  # fmt: skip
SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
from types import SimpleNamespace
G = SimpleNamespace(relu=lambda x: 10 * torch.relu(x))
LOUD = [lambda x: 10 * x]

class Made(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.louder = [lambda x: 10 * x]

    def forward(self, x):
        x = self.one(x)
        {body}
        return self.head(x)
"""


def made(body: str, folder: Any, **changed: str) -> nn.Module:
    """A model whose forward pass has this between its layers, from a file, so that it can be read."""
    text = SOURCE.format(body=body)
    for old, new in changed.items():
        text = text.replace(old, new)
    path = folder / "made.py"
    path.write_text(text)
    space: dict[str, Any] = {"__name__": "made"}
    exec(compile(text, str(path), "exec"), space)
    model: nn.Module = space["Made"]()
    return model


@pytest.mark.parametrize("expression", HELD)
def test_what_stands_between_the_layers_of_a_chain_amplifies_nothing(expression: str, tmp_path: Any) -> None:
    """In the whole, by differences of pairs near and far, with layers that hand on."""
    model = made(f"x = {expression}", tmp_path).double().eval()
    assert claims(nw.advise(model, "lipschitz"))
    if "float" in expression:
        return    # which rounds
    model.one, model.head = nn.Identity(), nn.Identity()
    x = 30 * torch.randn(500, 6).double()
    for size in (1e-4, 1.0, 30.0):
        y = x + size * torch.randn(500, 6).double()
        assert float(((model(x) - model(y)).norm() / (x - y).norm()).max()) <= 1 + 1e-6


@pytest.mark.parametrize("body", [*(f"x = {expression}" for expression in REFUSED), *STATEMENTS])
def test_what_may_amplify_between_layers_makes_no_chain(body: str, tmp_path: Any) -> None:
    assert not claims(nw.advise(made(body, tmp_path), "lipschitz"))


def test_functions_of_another_name_are_told_apart(tmp_path: Any) -> None:
    """``F`` is torch's only where it is."""
    assert claims(nw.advise(made("x = F.relu(x)", tmp_path), "lipschitz"))
    other = made("x = F.relu(x)", tmp_path, **{"functional as F": "functional"})
    other.forward.__globals__["F"] = other.forward.__globals__["G"]
    assert not claims(nw.advise(other, "lipschitz"))


class Loud(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 10 * input


class Quiet(nn.ReLU):
    """A name alone."""


@pytest.mark.parametrize(
    ("between", "chained"),
    [(Loud(), False), (Quiet(), True), (nn.Softplus(), True), (nn.Softplus(0.5, 40), True), (nn.Softplus(1, 1), False),
     (nn.ELU(2.0), False), (nn.Hardswish(), False), (nn.CELU(), False), (nn.SELU(), False)],
)  # fmt: skip
def test_modules_between_layers_are_those_that_amplify_nothing(between: nn.Module, chained: bool) -> None:
    assert claims(nw.advise(nn.Sequential(nn.Linear(6, 6), between, nn.Linear(6, 3)), "lipschitz")) is chained


# ------------------------------------------------------------------------------------------- measurements and what is advised


def seen(facts: Facts) -> Probe:
    """Everything that a probe can measure, at once, of the model's own parts."""
    roles = sorted({e.role for e in facts.trainable} - {"bias", "gain"})
    return Probe(
        25, 1.0, False, 0, (1.0,) * 25, (1.0,) * 25, (3,), 20.0, {facts.trainable[0].name: 2}, (facts.trainable[-1].name,), {},
        dict.fromkeys(roles, 0.3), 0.25, dict.fromkeys(roles, (1e-3, 0.1, 10.0)),
        {a.path: (50.0, 300.0, 2) for a in facts.attentions},
    )  # fmt: skip


def attending() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("build", [plain, convolutions, attending])
@pytest.mark.parametrize("goal", GOALS)
def test_no_measurement_contradicts_what_is_advised(goal: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(advisor, "probe", lambda *given: seen(Facts.of(model)))
    advice = nw.advise(model, goal, batches=[], loss=lambda m, b: m(b))
    known = [f"{line.what}: {line.why}" for line in advice.lines if line.verdict == "know"]
    left = " ".join(line.what for line in advice.lines if line.verdict == "leave")
    sgd = advice.optimizer.name == "SGD"
    assert any("‖gradient‖ / ‖weight‖ lies between" in text for text in known)
    assert any("plain SGD has no rate" in text for text in known) is not sgd
    assert any("Keep SGD" in text and "Lower the rate" in text for text in known) is sgd
    # What is left alone is not asked for, and what is advised is not advised again.
    assert not ("clipping" in left and any(call.name == "zclip" for call in advice.calls))
    grown = [text for text in known if "makes weights longer" in text]
    assert grown and not any("nw.max_norm ends it" in text for text in grown)
    for text in grown:
        acting = [call.name for call in advice.calls if f"nw.{call.name}" in text]
        assert bool(acting) is ("there is nothing to add" in text) is ("a decay ends it" not in text)
    if goal == "stability":
        assert all("nw.weight_decay" in text for text in grown)
    # A decay that the optimizer does not have is not to be kept.
    assert not any("Keep a decay" in text for text in known)


# ------------------------------------------------------------------------------------------------ weights that are computed


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.table.prod(0)


def added(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", LowRank())
    layer.parametrizations.weight.original.requires_grad_(False)    # type: ignore[union-attr, operator]
    return layer


MADE = {
    "weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm, "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5), "low rank": added, "the old weight_norm": weight_norm,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("goal", ["speed", "generalisation", "quantisation"])
def test_the_reason_for_adamw_names_weights_that_are_computed(name: str, goal: str) -> None:
    model = nn.Sequential(MADE[name](nn.Linear(6, 6)), nn.ReLU(), MADE[name](nn.Linear(6, 6)))    # type: ignore[operator]
    why = nw.advise(model, goal).lines[0].why
    assert why.startswith("None of the weights is a matrix that a matrix step would take: 100% are tensors that the layers' weights are")
    assert not any(word in why for word in ("tables", "heads", "axes"))


def test_each_reason_has_its_own_share() -> None:
    """Counted by hand: 300 of a table, 36 of a matrix, 36 + 6 of a weight that is computed, 18 of a head."""
    model = nn.Sequential(
        nn.Embedding(50, 6), nn.Linear(6, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3)
    )
    whole = 300 + 36 + 42 + 18
    parts = ((300, "embeddings"), (42, "tensors that the layers' weights are computed from"), (18, "heads"))
    others = ", ".join(f"{n / whole:.0%} are {what}" for n, what in parts)
    expected = f"Only {36 / whole:.0%} of the weights are matrices that a matrix step would take: {others}."
    assert expected in nw.advise(model, "speed").lines[0].why


# --------------------------------------------------------------------------------------------------- where the product is capped


def test_what_a_cap_on_the_product_alone_leaves_free_is_told() -> None:
    """Attention, branches, gates and normalisations are as they were under it."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    advice = nw.advise(adapted, "lipschitz")
    assert [call.arguments["params"] for call in advice.calls] == ["peft:product"]
    said = whats(advice)
    for part in ("dot-product attention has none", "residual branches", "products of activations", "normalisations have no bound"):
        assert any(part in what for what in said), part
