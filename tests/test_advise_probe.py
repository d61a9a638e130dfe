"""A probe measures what it says, against figures from elsewhere, and leaves everything bit for bit as it was."""

from __future__ import annotations

import contextlib
import io
import math
import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from advise_cases import Attention, batches, loss, made, states
from normwise.advice import kept
from normwise.advice import probe as probing
from normwise.advice.logits import watched
from normwise.advice.probe import probe
from normwise.errors import DataError
from normwise.parameters.attention_logits import Attention as Found
from normwise.parameters.attention_logits import find_attentions
from normwise.parameters.inventory import Inventory


def everything(model: nn.Module, loader: Any) -> list[Any]:
    """Bits of weights, buffers, gradients and generators, and what hangs on the modules."""
    bits = [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in states(model)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, sorted(m._buffers)) for m in model.modules()]
    on_tensors = [len(p._backward_hooks or ()) for p in model.parameters()]
    numbers = np.random.get_state()
    generators = [random.getstate(), numbers[1].tobytes(), numbers[2:], torch.get_rng_state().numpy().tobytes()]
    return [bits, hooks, on_tensors, generators, loader.generator.get_state().numpy().tobytes()]


class Raises(Exception):
    pass


def noisy(fail_at: int, error: type[BaseException] = Raises) -> Any:
    """A loss that uses every generator, and raises in the middle."""
    calls: list[int] = []

    def of(model: nn.Module, batch: Any) -> Tensor:
        calls.append(0)
        value = loss(model, batch) * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * float(torch.rand(())))
        if len(calls) > fail_at:
            raise error("in the middle")
        return value

    return of


@pytest.mark.parametrize("case", ["residual", "decoder", "lora"])
@pytest.mark.parametrize("how", ["in place", "from files", "a copy", "raises", "interrupted"])
def test_everything_comes_back_bit_for_bit(case: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(case)
    loader = torch.utils.data.DataLoader(batches(case, 30), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(5))
    loss(model, batches(case, 1)[0]).backward()    # gradients that are there, and buffers that have moved
    if how == "from files":
        monkeypatch.setattr(kept, "IN_MEMORY", 0)
    before = everything(model, loader)
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            probe(model, loader, noisy(17, KeyboardInterrupt))
    elif how == "raises":
        with pytest.raises(DataError, match="Raises: in the middle"):
            probe(model, loader, noisy(20))
    else:
        found = probe(model, loader, noisy(1000), copy=how == "a copy")
        assert found.losses[0] != found.losses[-1]
    assert everything(model, loader) == before


def test_it_would_see_a_change() -> None:
    model = made("residual")
    loader = torch.utils.data.DataLoader(batches("residual"), batch_size=None, generator=torch.Generator())
    before = everything(model, loader)
    with torch.no_grad():
        model.bn1.running_mean[0] += 1e-6
    assert everything(model, loader) != before


def test_a_buffer_that_the_forward_pass_makes_is_gone_afterwards() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.register_buffer("cache", x.detach())
            self.seen = self.seen + 1    # in another tensor
            out: Tensor = self.layer(x)
            return out

    model = Caches()
    buffer = model.seen
    probe(model, batches("mlp"), loss)
    assert dict(model._buffers) == {"seen": buffer} and float(buffer) == 0


def test_an_optimizer_within_the_backward_pass_does_not_step() -> None:
    """Its state could not be put back."""
    model = made("mlp")
    steps: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: steps.append(0))
    probe(model, batches("mlp"), loss)
    assert steps == []
    loss(model, batches("mlp", 1)[0]).backward()
    assert len(steps) == 6


def test_frozen_weights_are_kept_where_there_is_room_and_the_limit_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of LoRA that fits into memory is kept; one that does not needs none. Beyond the limit nothing is kept in memory."""
    model = made("lora")
    sizes = {p.requires_grad: sum(q.numel() * q.element_size() for q in model.parameters() if q.requires_grad is p.requires_grad)
             for p in model.parameters()}  # fmt: skip
    assert probe(model, batches("lora", 8), loss, steps=8).kept_bytes == sizes[True] + sizes[False]
    monkeypatch.setattr(kept, "IN_MEMORY", sizes[True] + 1)
    assert probe(model, batches("lora", 8), loss, steps=8).kept_bytes == sizes[True]
    asked: list[int] = []
    real = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *given, **more: (asked.append(more["size"]), real(*given, **more))[1])
    monkeypatch.setattr(kept, "IN_MEMORY", sizes[True] // 2)
    probe(model, batches("lora", 8), loss, steps=8)
    assert sizes[True] // 2 <= 4 * sum(asked) < sizes[True]


class Follows(nn.Module):
    """A frozen teacher that follows the student in each forward pass, as in MoCo."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.by_data = by_data
        self.student, self.teacher = nn.Linear(6, 5), nn.Linear(6, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                if self.by_data:
                    p.data = 0.9 * p.data + 0.1 * q.data
                else:
                    p.lerp_(q, 0.1)
        out: Tensor = self.student(x) - self.teacher(x)
        return out


@pytest.mark.parametrize("by_data", [True, False])
def test_frozen_weights_that_the_model_writes_to_come_back(by_data: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Follows(by_data)
    before, at = [p.clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    probe(model, batches("mlp"), loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == at
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    with pytest.raises(DataError, match=r"writes to 2 frozen weights .*teacher.weight.*copy=True"):
        probe(model, batches("mlp"), loss)
    before = [p.clone() for p in model.parameters()]
    probe(model, batches("mlp"), loss, copy=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Buffers(nn.Module):
    """Buffers that nobody can write to, that were made in inference mode, that are sparse, that are resized, that hold a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.register_buffer("mask", torch.ones(1, 1).expand(16, 6))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("unknown", torch.tensor([math.nan, -0.0]))
        self.register_buffer("graph", torch.eye(4).to_sparse())
        with torch.inference_mode():
            made_there = torch.ones(2)
        self.register_buffer("old", made_there)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.resize_(len(self.seen) + 1).fill_(2.0)
        self.unknown.fill_(1.0)
        out: Tensor = self.layer(self.norm(x * self.mask[:1]))
        return out


@pytest.mark.parametrize("limit", [512 << 20, 0])
def test_buffers_of_every_kind_come_back(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IN_MEMORY", limit)
    model = Buffers()
    model.layer.weight.grad = torch.ones(5, 6)
    model.layer.bias.register_post_accumulate_grad_hook(lambda _: None)
    buffers = dict(model._buffers)
    state = torch.get_rng_state()
    probe(model, batches("mlp"), lambda m, b: loss(m, b) * torch.rand(()))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model.layer.weight.grad, torch.ones(5, 6))
    assert model._buffers.keys() == buffers.keys() and all(model._buffers[name] is one for name, one in buffers.items())
    assert model.norm.num_batches_tracked == 0 and model.seen.tolist() == [0.0, 0.0, 0.0]
    assert model.unknown.isnan().tolist() == [True, False] and math.copysign(1, float(model.unknown[1])) == -1
    assert model.mask.stride() == (0, 0) and len(model.layer.bias._post_accumulate_grad_hooks or ()) == 1


def test_whatever_cannot_be_put_back_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("residual")
    loss(model, batches("residual", 1)[0]).backward()
    before = [p.clone() for p in model.parameters()], [p.grad for p in model.parameters()], torch.get_rng_state()
    real, calls = kept._put, []

    def fails_once(*given: Any) -> None:
        calls.append(given[0])
        if len(calls) == 2:
            raise OSError("the disk is gone")
        real(*given)

    monkeypatch.setattr(kept, "_put", fails_once)
    with pytest.raises(OSError, match="the disk is gone"):
        probe(model, batches("residual"), loss)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True)]
    assert same.count(False) <= 1 and len(calls) > 2
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_copy_that_does_not_train_is_one_sentence() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(DataError, match="a copy of this model does not train, as of scripted ones: probe it with copy=False"):
        probe(scripted, batches("mlp"), loss, copy=True)


def test_a_scripted_model_and_what_a_loss_freezes_come_back() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    probe(scripted, batches("mlp"), loss)
    assert all(torch.equal(value, before[name]) for name, value in scripted.state_dict().items())
    model = made("mlp")

    def freezes(one: nn.Module, batch: Any) -> Tensor:
        next(one.parameters()).requires_grad_(False)
        return loss(one, batch)

    probe(model, batches("mlp"), freezes)
    assert all(p.requires_grad for p in model.parameters())


class Draws(torch.utils.data.Dataset[Any]):
    """A dataset with generators of its own."""

    def __init__(self) -> None:
        self.items = batches("mlp", 30)
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)
        self.numpy, self.legacy = np.random.default_rng(3), np.random.RandomState(4)

    def __len__(self) -> int:
        return 30

    def __getitem__(self, k: int) -> Any:
        noise = float(torch.rand((), generator=self.torch)) + self.python.random() + self.numpy.random() + self.legacy.rand()
        return [x * (1 + noise) if x.is_floating_point() else x for x in self.items[k]]

    def states(self) -> list[str]:
        legacy = self.legacy.get_state()
        return [str(one) for one in (self.torch.get_state().tolist(), self.python.getstate(), self.numpy.bit_generator.state, legacy)]


def test_generators_of_samplers_and_datasets_come_back() -> None:
    data, order = Draws(), torch.Generator().manual_seed(5)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data, generator=order), 1, False)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=lambda items: items[0])
    before = data.states(), order.get_state()
    probe(made("mlp"), loader, loss)
    assert data.states() == before[0] and torch.equal(order.get_state(), before[1])


@pytest.mark.parametrize("wrap", [
    lambda data: torch.utils.data.Subset(data, range(30)), lambda data: torch.utils.data.ConcatDataset([data]),
    lambda data: torch.utils.data.ConcatDataset([torch.utils.data.Subset(torch.utils.data.Subset(data, range(30)), range(30))]),
])  # fmt: skip
def test_generators_of_wrapped_datasets_come_back(wrap: Any) -> None:
    data = Draws()
    before = data.states()
    probe(made("mlp"), torch.utils.data.DataLoader(wrap(data), batch_size=None), loss)
    assert data.states() == before


class Noisy(nn.Sequential):
    """A model that draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.of_torch = torch.Generator().manual_seed(1)
        self.others: list[Any] = [random.Random(2), np.random.default_rng(3)]
        self.named = {"legacy": np.random.RandomState(4)}

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.others[0].random() * self.others[1].random() * self.named["legacy"].rand()
        return super().forward(x + drawn * torch.randn(x.shape, generator=self.of_torch))

    def draws(self) -> list[float]:
        return self(torch.zeros(2, 6)).flatten().tolist()


@pytest.mark.parametrize("copy", [False, True])
def test_generators_of_the_model_come_back(copy: bool) -> None:
    torch.manual_seed(0)
    model, same = Noisy(), Noisy()
    same.load_state_dict(model.state_dict())
    probe(model, [torch.randn(4, 6) for _ in range(25)], lambda m, x: m(x).square().mean(), copy=copy)
    assert model.draws() == same.draws()


# ------------------------------------------------------------------------------------------------------ what it measures


class Slope(nn.Module):
    """A weight whose gradient is the mean of the rows of a batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows @ self.weight).mean()


def test_noise_is_the_ratio_that_the_data_were_drawn_with() -> None:
    """Rows of mean μ and covariance Σ: tr Σ / (batch · ‖μ‖²), whatever the weights are."""
    size, batch, ratio = 400, 16, 1.7
    mean = torch.full((size,), 0.05)
    sigma = math.sqrt(ratio * batch * float(mean.square().sum()) / size)
    rows = torch.randn(90, batch, size, generator=torch.Generator().manual_seed(0)) * sigma + mean
    found = probe(Slope(size), list(rows), lambda model, batch: model(batch), steps=90)
    assert found.noise == pytest.approx(ratio, rel=0.15)


def test_a_spike_is_found_where_it_was_put_and_zclip_follows() -> None:
    data = batches("mlp")
    data[13] = (data[13][0] * 60, data[13][1])
    advice = nw.advise(made("mlp"), "speed", batches=data, loss=loss)
    assert advice.probe is not None and advice.probe.spikes == (13,)
    assert [call.name for call in advice.calls] == ["zclip"] and len(advice.policy) == 1
    calm = nw.advise(made("mlp"), "speed", batches=batches("mlp"), loss=loss)
    assert calm.probe is not None and calm.probe.spikes == () and len(calm.policy) == 0


def test_gradients_that_are_not_finite_are_named() -> None:
    def sometimes(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        return value + (model[2].weight.sum() * math.inf * 0 if batch is data[9] else 0)

    data = batches("mlp")
    advice = nw.advise(made("mlp"), "speed", batches=data, loss=sometimes)
    assert advice.probe is not None and dict(advice.probe.nonfinite) == {"2.weight": 1}
    assert advice.on_nonfinite == "skip" and "on_nonfinite='skip'" in advice.python()
    assert any("2.weight" in line.why for line in advice.lines)


def test_a_parameter_that_nothing_trains_is_named() -> None:
    model = made("mlp")
    model.unused = nn.Linear(3, 3)
    found = probe(nn.ModuleDict({"net": model, "left": nn.Linear(2, 2)}), batches("mlp"), lambda m, b: loss(m["net"][:5], b))
    assert found.idle == ("net.unused.weight", "net.unused.bias", "left.weight", "left.bias")


class Normalised(nn.Module):
    """Scale-free through a BatchNorm (each row), through a LayerNorm (all rows together), and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.batch = nn.Linear(6, 24), nn.BatchNorm1d(24)
        self.whole, self.layer = nn.Linear(24, 24, bias=False), nn.LayerNorm(24)
        self.free, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch(self.rows(x)))
        y = 3 * self.whole(x)    # no source that says so
        logits: Tensor = self.head(F.relu(self.free(self.layer(y))))
        return logits


def test_scale_free_weights_are_told_by_their_gradients() -> None:
    """Against what doubling a weight does to the loss."""
    model, batch, doubled = Normalised(), batches("mlp", 1)[0], {}
    for name in ("rows", "whole", "free", "head"):
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            before = loss(model, batch)
            weight.mul_(2)
            doubled[f"{name}.weight"] = bool(abs(loss(model, batch) - before) < 1e-3)
            weight.div_(2)
    found = probe(model, batches("mlp"), loss)
    assert found.scale_free == doubled == {"rows.weight": True, "whole.weight": True, "free.weight": False, "head.weight": False}
    lines = nw.advise(model, batches=batches("mlp"), loss=loss).lines
    [line] = [line for line in lines if "scale-free" in line.what]
    assert line.basis == "probe" and line.tensors == 2


@pytest.mark.parametrize("steps", [8, 9])    # the last batch of 8 is taken in halves
def test_ratios_are_those_of_the_last_batch_without_scale_free_weights(steps: int) -> None:
    """Against torch.autograd, after the same steps written out."""
    model, data = Normalised(), batches("mlp", steps)
    found = probe(model, data, loss, steps=steps)
    for k, (x, y) in enumerate(data):
        value = (loss(model, (x[:4], y[:4])) + loss(model, (x[4:], y[4:]))) / 2 if k % 3 == 1 else loss(model, (x, y))
        grads = dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True))
        expected = {role: float(grads[name].norm() / model.get_parameter(name).detach().norm())
                    for role, name in (("hidden", "free.weight"), ("head", "head.weight"))}    # fmt: skip
        with torch.no_grad():
            for name, p in model.named_parameters():
                if grads[name].norm() > 0:
                    p.sub_(grads[name] * 0.01 * max(float(p.norm()), 1e-3 * p.numel() ** 0.5) / grads[name].norm())
    assert {role: ratio[1] for role, ratio in found.ratios.items()} == pytest.approx(expected, rel=1e-3)
    assert all(low == middle == high for low, middle, high in found.ratios.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_as_it_comes_is_probed_as_it_is_trained(frozen: bool) -> None:
    """In eval() a BatchNorm would divide nothing out; a layer that was put there on purpose stays there."""
    model = Normalised().eval()
    if frozen:
        model.train()
        model.batch.eval()
    modes = [m.training for m in model.modules()]
    found = probe(model, batches("mlp"), loss)
    assert found.scale_free["rows.weight"] is not frozen
    assert [m.training for m in model.modules()] == modes


class Biased(nn.Module):
    """A layer with a bias before a LayerNorm: at zero the bias hides that the weight's length matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.norm(self.layer(x))))
        return out


class Divided(Biased):
    """A normalisation that no code names, and a share of the outputs that goes by it with next to no effect."""

    by: float

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.layer.weight.T
        own = h[:, :2].square() if self.by else 0 * h[:, :2]
        h = torch.cat([h[:, 2:] / h[:, 2:].norm(dim=1, keepdim=True), self.by * own], 1)
        out: Tensor = self.head(F.dropout(h, 0.2, self.training))
        return out


@pytest.mark.parametrize(("kind", "by", "free"), [(Biased, 0.0, None), (Divided, 0.0, True), (Divided, 1e-4, False)])
def test_scale_free_is_what_stays_so(kind: type[Biased], by: float, free: bool | None) -> None:
    """What is judged free must bear any length: the loss is the same at a thousand times of it."""
    torch.manual_seed(0)
    model = kind()
    model.by = by    # type: ignore[attr-defined]
    data = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(8)]
    seen = probe(model, data, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), steps=8)
    assert seen.scale_free.get("layer.weight") is free
    if kind is Divided:
        model.eval()
        losses = []
        for factor in (1, 1000):
            model.layer.weight.data.mul_(factor)
            losses.append(float(F.cross_entropy(model(data[0][0]), data[0][1])))
        assert (abs(losses[1] - losses[0]) < 1e-4) is free


def test_a_wrong_guess_is_corrected() -> None:
    class Second(nn.Module):
        """The loss sees the layer's weight in a second way, which no order of layers tells."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(6, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            logits: Tensor = self.head(self.norm(y)) * self.layer.weight.square().mean()
            return logits

    lines = nw.advise(Second(), batches=batches("mlp"), loss=loss).lines
    assert [line.on for line in lines if line.what == "not scale-free after all"] == ["layer.weight"]
    guessed = nw.advise(Second(), "lipschitz")
    probed = nw.advise(Second(), "lipschitz", batches=batches("mlp"), loss=loss)
    capped = [one.calls[0].arguments["params"] for one in (guessed, probed)]
    assert capped == [["role:head"], ["role:hidden", "role:head"]], "the rule follows what was measured"


def test_a_batch_without_a_gradient_is_passed_over() -> None:
    """A hinge that is satisfied: the weights stay, and the other batches count."""
    calls: list[int] = []

    def hinge(model: nn.Module, batch: Any) -> Tensor:
        calls.append(0)
        return loss(model, batch) * (0.0 if len(calls) % 4 == 0 else 1.0)

    found = probe(made("mlp"), batches("mlp"), hinge)
    assert found.batches == 25 and 0.0 in found.norms
    assert all(value == 0 for value in probe(made("mlp"), batches("mlp"), lambda m, b: 0.0 * loss(m, b)).norms)


class Odd(dict[str, Any]):
    """A mapping that cannot be made from another one."""

    def __init__(self, *, x: Any) -> None:
        super().__init__(x=x)


def test_a_batch_that_cannot_be_cut_is_taken_whole() -> None:
    found = probe(made("mlp"), [Odd(x=batch) for batch in batches("mlp")], lambda m, b: loss(m, b["x"]))
    assert found.noise is None and found.batches == 25


def broken() -> Iterator[Any]:
    yield from batches("mlp", 3)
    raise FileNotFoundError("picture 17")


def twice(model: nn.Module, batch: Any, again: bool = False) -> Tensor:
    value = loss(model, batch)
    value.backward(retain_graph=again)
    return value


def long_words(model: nn.Module, batch: Any) -> Tensor:
    raise ValueError("many words " * 40)


class Stuck(torch.autograd.Function):
    """A backward pass that fails with many words."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError("many words\n" * 40)


@pytest.mark.parametrize(
    ("given", "of", "says"),
    [
        (broken(), loss, "batch 4 raised FileNotFoundError: picture 17"),
        (list, loss, "the class list"),
        (batches("mlp"), lambda m, b: loss(m, b) * (1 + 1j), "complex"),
        (batches("mlp"), twice, "calls backward.* itself.*leave its backward pass to the probe"),
        (batches("mlp"), lambda m, b: twice(m, b, True), "calls backward.* itself.*leave its backward pass to the probe"),
        (batches("mlp"), long_words, r"ValueError: many words( many words| many)+ …$"),
        (batches("mlp"), lambda m, b: Stuck.apply(loss(m, b)), r"many words( many words| many)+ … Return the loss"),
    ],
)
def test_what_a_probe_cannot_use_is_one_sentence(given: Any, of: Any, says: str) -> None:
    model = made("mlp")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DataError, match=says):
        nw.advise(model, batches=given, loss=of)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_inference_mode_is_named() -> None:
    with torch.inference_mode():
        born_there = made("mlp")
        with pytest.raises(DataError, match=r"under torch.inference_mode\(\) nothing has gradients"):
            probe(made("mlp"), batches("mlp"), loss)
    with pytest.raises(DataError, match=r"under torch.inference_mode\(\) nothing has gradients"):
        probe(born_there, batches("mlp"), loss)


class Replaces(nn.Module):
    """A forward pass that registers, replaces and takes away members."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gone, self.calls = nn.Linear(6, 5), nn.Linear(2, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            self.layer.weight = nn.Parameter(self.layer.weight.detach() * 2)
            self.extra, self.more = nn.Parameter(torch.zeros(5)), nn.Linear(5, 5)
            self.register_buffer("seen", torch.zeros(1))
            del self.gone
        out: Tensor = self.layer(x)
        return self.more(out) + self.extra if self.calls >= 3 else out


def test_members_that_the_forward_pass_changes_come_back() -> None:
    model = Replaces()
    before, weight = dict(model.named_parameters()), model.layer.weight.detach().clone()
    probe(model, batches("mlp"), loss)
    assert list(dict(model.named_parameters())) == list(before) and list(model._modules) == ["layer", "gone"] and not model._buffers
    assert all(p is before[name] for name, p in model.named_parameters()) and torch.equal(model.layer.weight, weight)


def test_buffers_without_a_shape_are_refused() -> None:
    with pytest.raises(nw.errors.LayoutError, match=r"buffer '1.running_mean' has no shape yet"):
        probe(nn.Sequential(nn.Linear(6, 5), nn.LazyBatchNorm1d(affine=False)), batches("mlp"), loss)


@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_those_of_the_formula(fused: bool) -> None:
    torch.manual_seed(0)
    attention, x = Attention(fused), torch.randn(3, 7, 16)
    q, k = (layer(x).unflatten(2, (4, 4)).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(4)
    expected = logits.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf).amax((0, 2, 3))
    holder = nn.ModuleDict({"inner": attention})
    with watched(find_attentions(holder, Inventory(holder))) as watch:
        attention(x)
    torch.testing.assert_close(watch.largest["inner"], expected.detach())


def test_logits_are_seen_where_softmax_gets_them_by_name() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(input=x, dim=-1)

    module, x = Named(), torch.randn(2, 4, 3, 3)
    with watched([Found("", module, (), (), (), 4, 4, "")]) as watch:
        module(x)
    torch.testing.assert_close(watch.largest[""], x.amax((0, 2, 3)))


def test_torchs_own_attention_is_seen() -> None:
    model = made("multihead")
    ids = batches("multihead", 1)[0][0]
    with watched(find_attentions(model, Inventory(model))) as watch:
        model(ids)
    x = model.tokens(ids)
    q, k, _ = F.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias).chunk(3, -1)
    q, k = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in (q, k))
    assert float(watch.largest["attention"].max()) == pytest.approx(float((q @ k.mT / 2).detach().max()), rel=1e-5)


@pytest.mark.parametrize("case", ["decoder", "multihead"])
def test_large_logits_bring_qk_clip_that_acts(case: str) -> None:
    model = made(case)
    with torch.no_grad():
        for e in Inventory(model):
            if e.attention in ("q", "k"):
                e.param.mul_(40)
            elif e.attention == "qkv":
                e.param[:32].mul_(40)
    advice = nw.advise(model, "speed", batches=batches(case), loss=loss)
    assert [call.name for call in advice.calls][-1] == "qk_clip"    # saturated softmaxes may spike as well
    optimizer = advice.optimizer.build(model)
    control = nw.attach(model, optimizer, advice.policy)
    loss(model, batches(case, 1)[0]).backward()
    control.report_max_logits("attention", torch.full((4,), 400.0))
    optimizer.step()
    assert sum(rule.changed or 0 for rule in control.receipt().rules) > 0


def grown(model: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in names):
                p.mul_(300)
    return model


@pytest.mark.parametrize("how", ["grouped queries in one tensor", "queries under LoRA"])
def test_large_logits_that_no_rule_can_hold_are_told(how: str) -> None:
    """And never put down as something to leave alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    if how == "queries under LoRA":
        peft = pytest.importorskip("peft")
        base = grown(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), "q_proj", "k_proj")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    else:
        model = grown(transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)), "qkv_proj")
    data = [torch.randint(3, 32, (2, 8)) for _ in range(8)]
    advice = nw.advise(model, "stability", batches=data, loss=lambda m, ids: m(input_ids=ids, labels=ids).loss, steps=8)
    [told] = [one for one in advice.lines if "largest logit" in one.what]
    assert told.verdict == "know" and "self_attn" in told.on and "q_proj" not in told.on
    assert not any("qk_clip" in one.what for one in advice.lines)
    [found] = find_attentions(model, Inventory(model))
    assert found.fused or (found.query and found.key)


def test_growth_is_that_of_a_loss_that_wants_length() -> None:
    """Steps of 1% against a gradient of −w: 1.01²⁵."""
    found = probe(nn.Sequential(nn.Linear(4, 4, bias=False)), [0] * 25, lambda model, _: -model[0].weight.square().sum())
    assert found.growth["head"] == pytest.approx(1.01**25 - 1, rel=1e-4) and found.walked == pytest.approx(0.25)
    assert found.noise is None


# ---------------------------------------------------------------------------------------------------------------- errors


def endless() -> Iterator[Any]:
    while True:
        yield from batches("mlp", 1)


def nothing_trained(model: nn.Module, batch: Any) -> Tensor:
    return torch.ones((), requires_grad=True)


@pytest.mark.parametrize(("data", "of", "steps", "says"), [
    (batches("mlp", 12), loss, 30, "ended after 12, and the probe asks for 30"),
    (7, loss, 30, "the batches are an int"),
    (endless(), 3, 30, "the loss is an int"),
    (endless(), loss, 3, "steps=3"),
    (endless(), lambda m, b: loss(m, b) * math.nan, 30, "of the first batch is nan"),
    (endless(), lambda m, b: m(b[0]), 30, "of shape (8, 5)"),
    (endless(), lambda m, b: 3.0, 30, "is a float"),
    (endless(), lambda m, b: loss(m, b).detach(), 30, "depends on no trainable parameter"),
    (endless(), nothing_trained, 30, "depends on no trainable parameter"),
    (endless(), lambda m, b: 1 / 0, 30, "ZeroDivisionError"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_changes_nothing(data: Any, of: Any, steps: int, says: str) -> None:
    model = made("mlp")
    before = [t.clone() for t in states(model)]
    with pytest.raises(DataError, match=re.escape(says)) as error:
        nw.advise(model, batches=data, loss=of, steps=steps)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, states(model), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_here_are_refused() -> None:
    with torch.device("meta"):
        model = made("mlp")
    with pytest.raises(DataError, match="before you shard the model, and not on the meta device"):
        probe(model, batches("mlp"), loss)


def test_a_batch_that_cannot_be_halved_is_taken_whole() -> None:
    class Odd:
        def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
            self.pair = pair

    found = probe(made("mlp"), [Odd(pair) for pair in batches("mlp")], lambda m, b: loss(m, b.pair))
    assert found.noise is None and len(found.norms) == 25
    named = probe(made("mlp"), [{"x": x, "y": y, "extra": "text"} for x, y in batches("mlp")], lambda m, b: loss(m, (b["x"], b["y"])))
    assert named.noise is not None


def test_halves_are_the_batch() -> None:
    batch = {"x": torch.arange(6).view(6, 1), "more": (torch.arange(6), torch.ones(3), "name")}
    halves = probing._halves(batch)
    assert halves is not None
    assert torch.equal(torch.cat([half["x"] for half in halves]), batch["x"])
    assert torch.equal(halves[1]["more"][0], torch.arange(3, 6)) and torch.equal(halves[0]["more"][1], torch.ones(3))
    assert probing._halves({"x": torch.ones(1, 3)}) is None and probing._halves("text") is None


def test_the_benchmark_has_the_columns_of_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    from normwise.experiments.bench import probe as bench

    def run(command: list[str], **how: Any) -> SimpleNamespace:    # in this process: another one takes seconds to import torch
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(command[2], {})
        return SimpleNamespace(stdout=out.getvalue())

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "BATCHES", 8)
    timed, remembered = bench._time("gpt", "tiny", 1), bench._memory(2, 64)
    for bar in bench.BARS:
        assert any(bar.value in row and bar.bar in row for row in (timed, remembered))
    assert 0 < timed["share"] < 1 and remembered["over_mb"] >= 0


# --------------------------------------------------------------------------------------------------- losses of every kind


class Hidden(nn.Module):
    """A normalisation that the code does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 32, bias=False), nn.Linear(32, 5)

    def normed(self, h: Tensor) -> Tensor:
        return h / h.square().mean(-1, keepdim=True).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.normed(self.layer(x))))
        return out


def popping(model: nn.Module, batch: Any) -> Tensor:
    labels = batch["target"].pop("labels") if "target" in batch else batch.pop("labels")
    return F.cross_entropy(model(batch["x"]), labels)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    x = batch["x"].clone().requires_grad_()
    out = model(x)
    [slope] = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, batch["labels"]) + 0.0 * slope.square().sum()


def needs_gradients(model: nn.Module, batch: Any) -> Tensor:
    assert torch.is_grad_enabled()
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def named(nested: bool = False) -> list[dict[str, Any]]:
    given = batches("mlp", 9)
    return [{"x": x, "target": {"labels": y}} if nested else {"x": x, "labels": y} for x, y in given]


@pytest.mark.parametrize(("of", "nested"), [(popping, False), (popping, True), (penalised, False), (needs_gradients, False)])
def test_scale_free_weights_are_measured_under_losses_of_every_kind(of: Any, nested: bool) -> None:
    """Under those that take from their batch, or ask for gradients, too; and what the user gave is as it was."""
    torch.manual_seed(0)
    given = named(nested)
    advice = nw.advise(Hidden(), "lipschitz", batches=given, loss=of, steps=9)
    assert advice.probe is not None and dict(advice.probe.scale_free) == {"layer.weight": True, "head.weight": False}
    assert advice.calls[0].arguments["params"] == ["role:head"]
    assert [list(one) for one in given] == [["x", "target" if nested else "labels"]] * 9
    assert not nested or all("labels" in one["target"] for one in given)


@pytest.mark.parametrize("answer", ["raises", "nan"])
def test_no_answer_is_no_measurement(answer: str) -> None:
    """A loss that refuses longer weights says neither that they are scale-free nor that they are not."""
    torch.manual_seed(0)

    def of(model: nn.Module, batch: Any) -> Tensor:
        value = F.cross_entropy(model(batch["x"]), batch["labels"])
        if float(model.layer.weight.detach().norm()) > 30:
            assert answer != "raises"
            return value * math.nan
        return value

    found = probe(Hidden(), named(), of, steps=9)
    assert dict(found.scale_free) == {"head.weight": False}


def test_containers_of_a_batch_are_copied_and_tensors_are_not() -> None:
    pair = SimpleNamespace(x=1)
    for given in ([torch.ones(2), {"a": [1]}], (torch.ones(2), [3]), {"x": (torch.ones(1), [2]), "y": pair}, Pair([1], 2)):
        made_of = probing._own(given)
        assert type(made_of) is type(given) and str(made_of) == str(given) and made_of is not given
    plain, listed = (torch.ones(2), 3), [torch.ones(2)]
    assert probing._own(pair) is pair and probing._own(plain) is plain and probing._own(listed)[0] is listed[0]


class Pair(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any
