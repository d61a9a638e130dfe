"""Heads: asked of the model, read from the forward pass, then by usual names; normalisation layers by what they do; placeholders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import normwise as nw
from normwise.errors import PolicyError
from normwise.optim import Muon, auto
from normwise.parameters.inventory import Inventory, find_roles
from normwise.parameters.roles import is_normalisation, normalises


def heads(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name, role in find_roles(model).items() if role == "head"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Backbone(nn.Module):
    """No head: the last projection of the last block is hidden, with one block as with two."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Embedding(7, 4), nn.ModuleList(Block() for _ in range(blocks)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DefinedFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 7)
        self.body = Backbone()
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return F.log_softmax(self.out(F.dropout(self.extra(hidden))), -1)


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.policy = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), nn.Softmax(-1))
        self.worth = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.policy(h), self.worth(h)


class WithoutForward(nn.Module):
    """As in CleanRL: two methods and no forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.mean = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.log_std = nn.Parameter(torch.zeros(1, 2))

    def get_value(self, x: Tensor) -> Tensor:
        return self.values(x)

    def get_action(self, x: Tensor) -> tuple[Any, Tensor]:
        mean = self.mean(x)
        return torch.distributions.Normal(mean, self.log_std.exp()).sample(), self.values(x)


class Helpers(nn.Module):
    """As torchvision's and timm's: the forward pass calls methods."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.top, self.drop = nn.Linear(4, 4), nn.Linear(4, 2), nn.Dropout()

    def features(self, x: Tensor) -> Tensor:
        return self.stem(x).relu()

    def forward_head(self, x: Tensor, plain: bool = False) -> Tensor:
        x = self.drop(x)
        return x if plain else self.top(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.features(x))


class Layers(nn.Module):
    """DETR's box predictor: a list that runs one after the other, of which the last gives the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < 2 else layer(x)
        return x


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.boxes = Backbone(), nn.Linear(4, 3), Layers()
        self.several = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
        self.named = nn.ModuleDict({"age": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))})

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.body(x)
        outputs = {"classes": self.classes(h), "boxes": self.boxes(h)}
        return {**outputs, "several": [head(h) for head in self.several], "named": {k: head(h) for k, head in self.named.items()}}


class Squeeze(nn.Module):
    """SqueezeNet's head is a convolution of kernel 1."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Dropout(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.last(self.features(x)), 1)


class Encoder(nn.Module):
    """A Linear that another one takes further is none, though its result is returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.decode = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.mean(x)
        return self.decode(z), z


class Wrapped(nn.Module):
    """As a Lightning module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


CASES = [
    (lambda: Backbone(), []), (lambda: Backbone(1), []), (lambda: Wrapped(Backbone()), []), (lambda: DefinedFirst(), ["out"]),
    (lambda: ActorCritic(), ["policy.2", "worth"]), (lambda: WithoutForward(), ["values.1", "mean.1"]), (lambda: Helpers(), ["top"]),
    (lambda: Detector(), ["classes", "boxes.layers.2", "several.0", "several.1", "named.age.1"]), (lambda: Squeeze(), ["last.1"]),
    (lambda: Encoder(), ["decode"]), (lambda: Wrapped(DefinedFirst()), ["net.out"]), (lambda: nn.DataParallel(DefinedFirst()), ["out"]),
    (lambda: torch.compile(DefinedFirst()), ["out"]), (lambda: nn.Sequential(Backbone(), nn.Dropout(), nn.Linear(4, 2)), ["2"]),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), []),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_heads_are_what_gives_the_outputs(make: Any, expected: list[str]) -> None:
    assert heads(make()) == expected


class Reaching(nn.Module):
    """It calls a layer of its child."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.out(self.net.body(x))


class DistributedDataParallel(nn.Module):
    """Of torch's what can be had without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Sharded(nn.Module):
    """As FSDP1 holds what it shards."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


WRAPPERS = [nn.DataParallel, torch.compile, checkpoint_wrapper, DistributedDataParallel, Sharded]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_heads_are_found_within_wrappers_at_every_level(wrap: Any) -> None:
    def layers(between: Any = lambda module: module) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), between(nn.Linear(8, 3)))

    twice = (one for one in WRAPPERS if not (one is wrap is torch.compile))    # what is compiled twice is no module
    for again in (lambda module: module, *twice):
        assert heads(nn.Sequential(again(wrap(layers())))) == ["0.4"]
        assert heads(again(nn.Sequential(wrap(layers(wrap))))) == ["0.4"]
    assert heads(Wrapped(wrap(DefinedFirst()))) == heads(Reaching(wrap(DefinedFirst()))) == ["net.out"]
    several = Detector()
    several.boxes, several.classes = wrap(several.boxes), wrap(several.classes)
    several.several = nn.ModuleList(wrap(one) for one in several.several)
    assert heads(several) == heads(Detector())
    unread = nn.Module()
    unread.body, unread.head = wrap(nn.Linear(4, 4)), wrap(nn.Linear(4, 3))
    assert heads(unread) == ["head"]


def test_the_forward_pass_is_read_and_never_run() -> None:
    class Trap(Helpers):
        def forward(self, x: Tensor) -> Tensor:
            raise_if_run()
            return self.top(self.stem(x))

    def raise_if_run() -> None:
        raise AssertionError("the model was run")

    assert heads(Trap()) == ["top"]


class Pretrained(nn.Module):
    """What transformers' models have in common."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self)


class BareModel(Pretrained):
    """BERT's pooler gives an output of the bare model, and is no head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler = Backbone(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return x, self.pooler(x[:, 0]).tanh()


class ForClassification(Pretrained):
    def __init__(self) -> None:
        super().__init__()
        self.model = BareModel()
        self.dense, self.out_proj, self.second = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        outputs = self.model(x)
        logits = self.out_proj(self.dense(outputs[1]).tanh())
        return SimpleNamespace(logits=logits, others=self.second(outputs[0]), hidden=outputs[0])


def test_a_bare_pretrained_model_has_no_head_and_one_for_a_task_has_its_own() -> None:
    assert heads(BareModel()) == []
    assert heads(ForClassification()) == ["out_proj", "second"]
    assert heads(nn.Sequential(BareModel())) == []


def test_a_trained_copy_of_a_head_is_one() -> None:
    """As PEFT's ``modules_to_save`` keeps it: the original is frozen, the copy gives the outputs."""

    class Saved(nn.Module):
        def __init__(self, original: nn.Module, copy: nn.Module) -> None:
            super().__init__()
            self.original_module, self.modules_to_save = original, nn.ModuleDict({"default": copy})

        def forward(self, x: Tensor) -> Tensor:
            return self.modules_to_save["default"](x)

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.dense(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.top = Backbone(), Saved(Top(), Top())

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.body(x))

    assert heads(Model()) == ["top.original_module.out", "top.modules_to_save.default.out"]


# --------------------------------------------------------------------------------------------------------- normalisation


class MyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Scaler(MyRMSNorm):
    """Another name for the same."""


class Norm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (4,), self.weight, self.bias).permute(0, 3, 1, 2)


class LogitScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale.exp()


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Indirect(MyRMSNorm):
    """As Gemma's: the root is taken in another method."""

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * self.weight


YES = [nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4),
       nn.LayerNorm(4, elementwise_affine=False), MyRMSNorm(), Scaler(), Norm2d(), Indirect()]  # fmt: skip
NO = [nn.PReLU(4), LogitScale(), LayerScale(), nn.Linear(4, 4), nn.Embedding(3, 4), Block(), nn.Sequential(nn.LayerNorm(4)), nn.Dropout()]


@pytest.mark.parametrize("module", YES)
def test_normalisation_layers(module: nn.Module) -> None:
    assert is_normalisation(module) and normalises(nn.Sequential(nn.Linear(4, 4), module))


@pytest.mark.parametrize("module", NO)
def test_a_gain_alone_normalises_nothing(module: nn.Module) -> None:
    assert not is_normalisation(module)


def test_auto_takes_no_gain_for_a_normalisation_layer() -> None:
    def rest(*more: nn.Module) -> float:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), *more, nn.Flatten(), nn.Linear(4, 2))
        return next(g["lr"] for g in auto(model).param_groups if g["name"].startswith("adamw"))

    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))    # its magnitude has the role of a gain
    assert rest() == rest(nn.PReLU(4)) == rest(LogitScale()) == rest(weighted) == 0.016
    assert rest(nn.BatchNorm2d(4)) == rest(Norm2d()) == 0.008


# ------------------------------------------------------------------------------------------- placeholders, complex, names


def test_placeholders_of_a_sharding_engine_are_refused() -> None:
    emptied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    emptied[0].weight = nn.Parameter(torch.empty(0))
    marked = nn.Sequential(MyRMSNorm(), nn.Linear(4, 2))
    marked[0].weight = nn.Parameter(torch.empty(0))
    marked[0].weight.ds_shape = torch.Size([4])    # type: ignore[attr-defined]
    for model, name in ((emptied, r"0\.weight"), (marked, r"0\.weight")):
        for use in (Muon, auto, lambda m: nw.attach(m, torch.optim.SGD(m.parameters(), lr=0.1), nw.max_norm(1.0)), Inventory):
            with pytest.raises(PolicyError, match=rf"{name}: the weights are not here.*FSDP2"):
                use(model)
    full = nn.Linear(4, 2)
    full.weight.ds_shape = torch.Size([2, 4])    # type: ignore[attr-defined]
    assert len(Inventory(full)) == 2, "gathered: the weights are here"


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x.to(self.filter.dtype) @ self.filter).real)


def test_complex_parameters_are_refused_by_name_or_left_to_another_optimizer() -> None:
    torch.manual_seed(0)
    model = Complex()
    for preset in (Muon, auto, nw.optim.AdamW, nw.optim.Lion):
        with pytest.raises(PolicyError, match=r"filter: complex numbers.*override=\{'filter': 'skip'\}"):
            preset(model)
    both = [Muon(model, override={"filter": "skip"}), torch.optim.AdamW([model.filter])]
    assert {name for g in both[0].param_groups for name in g["param_names"]} == {"out.weight", "out.bias"}    # type: ignore[index]
    before = model.filter.detach().clone()
    model(torch.randn(3, 4)).square().sum().backward()
    for optimizer in both:
        optimizer.step()
    assert not torch.equal(before, model.filter.detach())


@pytest.mark.parametrize("key", ["a[0]", "b*", "c?", "role:bias", "re:x", "[ab]"])
def test_a_selector_that_is_a_name_means_this_parameter(key: str) -> None:
    model = nn.ParameterDict({key: nn.Parameter(torch.ones(2)), "a0": nn.Parameter(torch.ones(2)), "bb": nn.Parameter(torch.ones(2)),
                              "cc": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.ones(2))})  # fmt: skip
    for rule in (nw.max_norm(1.0, key), nw.max_norm(1.0, key, optional=True), nw.max_norm(1.0, "*", exclude=["a", "a0", "bb", "cc"])):
        assert [e.name for e in rule.targets(Inventory(model))] == [key]
    assert [e.name for e in nw.max_norm(1.0, "*", exclude=key).targets(Inventory(model))] == [n for n in model if n != key]


def test_the_class_that_fully_shard_puts_over_a_users_own_changes_no_role() -> None:
    """Without a source of its own it would be taken for one of torch's, and the head for a hidden matrix, on sharded models alone."""
    plain, split = Named(), Named()
    over = type("FSDPModule", (), {"__module__": "torch.distributed.fsdp"})
    split.__class__ = type("FSDPNamed", (over, Named), {"__module__": "torch.distributed.fsdp"})
    assert find_roles(split) == find_roles(plain) and "head" in find_roles(plain).values()


class Named(nn.Module):
    """Its head is told by the forward pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.result, self.inner = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.result(self.inner(x).relu())
        return out


class CalledSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out, self.mid = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 10), nn.Linear(8, 8)

    def mixed(self, x: Tensor) -> Tensor:
        return self.mid(x) @ self.mix

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x))


class CalledOtherwise(CalledSelf):
    def mixed(m, x: Tensor) -> Tensor:
        return m.mid(x) @ m.mix

    def forward(this, x: Tensor) -> Tensor:
        return this.out(this.mixed(x))


def test_a_forward_pass_may_call_its_module_what_it_likes() -> None:
    assert find_roles(CalledOtherwise()) == find_roles(CalledSelf())
    assert find_roles(CalledSelf())["out.weight"] == "head" and find_roles(CalledSelf())["mix"] == "hidden"
