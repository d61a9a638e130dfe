"""What `shrink` and `cut` refuse or keep, and what they say: paths that autograd does not show, outputs of any form, wrong inputs."""

from __future__ import annotations

import copy
import re
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.errors import StudyError
from normwise.prune import Report, cut, shrink, targets
from normwise.prune.outputs import difference, same

EXAMPLE = torch.zeros(2, 3)
Forward = Callable[[Any, Tensor], Any]


class Through(nn.Module):
    """Layers ``a`` (3 to 6 units) and ``o`` (6 to 2) and whatever else is given, joined by ``how``."""

    def __init__(self, how: Forward, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.a, self.o, self.how = nn.Linear(3, 6), nn.Linear(6, 2), how
        for name, part in parts.items():
            self.register_buffer(name, part) if isinstance(part, Tensor) else self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def plain(s: Through, x: Tensor) -> Tensor:
    return s.o(s.a(x).relu())


def model(how: Forward = plain, **parts: nn.Module | Tensor) -> Through:
    """With unit 0 of ``a`` zero; its bias is 0.7, so relu(bias) is what must move."""
    generator = torch.Generator().manual_seed(0)
    made = Through(how, **parts).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.3, 0.5, generator=generator)
        made.a.weight[0], made.a.bias[0] = 0, 0.7
    return made


def by_hand(full: Through) -> Through:
    """The same without unit 0 of ``a``, its constant in the bias of ``o``."""
    small = copy.deepcopy(full)
    small.a, small.o = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
    with torch.no_grad():
        for mine, its in ((small.a.weight, full.a.weight[1:]), (small.a.bias, full.a.bias[1:]), (small.o.weight, full.o.weight[:, 1:])):
            mine.copy_(its)
        small.o.bias.copy_(full.o.bias + full.o.weight[:, 0] * 0.7)
    return small


def inputs(count: int = 40) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def seeded(module: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(5)
    return module(x)


def unlike(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# ------------------------------------------------------------------------------------ what autograd does not show


def position(s: Through, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.o(h.relu()) * (1 + h.argmax(-1, keepdim=True))


def detached(s: Through, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.o(h.relu()) * (1 + h.mean(-1, keepdim=True).detach())


def without_gradient(s: Through, x: Tensor) -> Tensor:
    h = s.a(x)
    with torch.no_grad():
        scale = h.square().mean(-1, keepdim=True)
    return s.o(h.relu()) * scale


def counted(s: Through, x: Tensor) -> Tensor:
    h = s.a(x).relu()
    return s.o(h) / h.shape[-1]


def tiny(s: Through, x: Tensor) -> Tensor:
    return 1e-9 * position(s, x)


def beside_a_large_one(s: Through, x: Tensor) -> tuple[Tensor, Tensor]:
    h = s.a(x)
    return 1e9 * s.o(h.relu()), 1e-3 * h.argmax(-1)


def beside_infinities(s: Through, x: Tensor) -> tuple[Tensor, Tensor]:
    h = s.a(x)
    return s.o(h.relu()), torch.cat([torch.full((len(x), 1), -torch.inf), h.argmax(-1, keepdim=True)], 1)


@pytest.mark.parametrize("how", [position, detached, without_gradient, counted, tiny, beside_a_large_one, beside_infinities])
def test_a_path_that_autograd_does_not_show_is_refused(how: Forward):
    full = model(how)
    before = copy.deepcopy(full.state_dict())
    given, less = (seeded(module, inputs()) for module in (full, by_hand(full)))
    last, less_last = (out[-1] if isinstance(out, tuple) else out for out in (given, less))
    last, less_last = last[last.isfinite()], less_last[less_last.isfinite()]
    assert unlike(last, less_last) > 1e-2 * last.abs().max(), "the outputs differ indeed"
    with pytest.raises(StudyError, match=r"without unit 0 of a the model gives other outputs: they differ by .* autograd does not show"):
        shrink(full, EXAMPLE)
    assert all(torch.equal(before[name], tensor) for name, tensor in full.state_dict().items())


def logarithm(s: Through, x: Tensor) -> Tensor:
    return (plain(s, x) - 2).log()    # nan below zero


def masked(s: Through, x: Tensor) -> Tensor:
    return plain(s, x).masked_fill(x[:, :2] > 0, -torch.inf)


def noisy(s: Through, x: Tensor) -> Tensor:
    return plain(s, x) + torch.randn(len(x), 2)


def only_rounding(s: Through, x: Tensor) -> Tensor:
    return plain(s, x).softmax(-1).sum(-1) - 1


def huge(s: Through, x: Tensor) -> Tensor:
    return 1e12 * plain(s, x)


def deep(s: Through, x: Tensor) -> Tensor:
    """Rounding grows a thousandfold on its way."""
    y = plain(s, x)
    for _ in range(10):
        y = (2 * y).sin()
    return y


def called_by_keyword(s: Through, x: Tensor) -> Tensor:
    return s.o(input=s.a(input=x).relu())


@pytest.mark.parametrize("how", [plain, logarithm, masked, noisy, only_rounding, huge, deep, called_by_keyword])
def test_rounding_and_outputs_that_are_not_numbers_or_random_are_no_reason_to_refuse(how: Forward):
    full = model(how)
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {"a": (0,)} and small.a.weight.shape == (5, 3)
    given, less, hand = (seeded(module, inputs()) for module in (full, small, by_hand(full)))
    size = given[given.isfinite()].abs().max()
    for other in (less, hand):
        assert torch.allclose(given, other, rtol=0, atol=1e-9 * float(size) + 1e-14, equal_nan=True)
    assert report.difference <= 1e-9 * float(size) + 1e-14


def test_a_model_that_gives_other_outputs_each_time_is_refused():
    def state(s: Through, x: Tensor) -> Tensor:
        s.calls += 1
        return plain(s, x) * s.calls

    for full in (model(lambda s, x: s.o(F.dropout(s.a(x).relu()))), model(state, calls=torch.zeros(()))):
        with torch.no_grad():
            full.a.bias[0] = -1    # so that its constant is zero and it would go
        with pytest.raises(StudyError, match=r"other outputs each time it is called.*training=self\.training"):
            shrink(full, EXAMPLE)


def test_a_constant_is_as_exact_as_the_bias_that_takes_it_in():
    full = model().bfloat16()
    small, report = shrink(full, EXAMPLE)
    wide, exact = shrink(copy.deepcopy(full).double(), EXAMPLE)
    assert exact.exact and exact.difference < 1e-14
    assert torch.equal(small.o.bias, wide.o.bias.bfloat16()), "the same bias, rounded"
    rounding = unlike(small.o.bias.double(), wide.o.bias)
    assert not report.exact and report.difference == pytest.approx(rounding, rel=1e-6)


def test_a_constant_too_large_for_its_dtype_is_not_exact():
    full = model()
    with torch.no_grad():
        full.a.bias[0], full.o.weight[:, 0] = 6e4, 2.0
    assert shrink(full.half(), EXAMPLE)[1].difference == float("inf")


# --------------------------------------------------------------------------------------------------- outputs of any form


@dataclass
class Answer:
    logits: Tensor
    rest: Any


Pair = namedtuple("Pair", "logits rest")

FORMS: dict[str, tuple[Callable[[Tensor, Any], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda y, rest: (y, rest), lambda out: out[0]),
    "nested": (lambda y, rest: [None, [y], {"rest": (rest,)}], lambda out: out[1][0]),
    "dict": (lambda y, rest: {"loss": None, "logits": y, "steps": 3, "rest": rest}, lambda out: out["logits"]),
    "dataclass": (Answer, lambda out: out.logits),
    "named tuple": (Pair, lambda out: out.logits),
}


def model_output(y: Tensor, rest: Any) -> Any:
    generic = pytest.importorskip("transformers").utils

    @dataclass
    class Output(generic.ModelOutput):
        logits: Tensor | None = None
        loss: Tensor | None = None
        rest: Any = None

    return Output(logits=y, rest=rest)


FORMS["Hugging Face"] = (model_output, lambda out: out.logits)


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_in_the_outputs_is_compared(form: str):
    wrap, logits = FORMS[form]

    def with_hidden(look: Callable[[Tensor], Tensor]) -> Through:
        def how(s: Through, x: Tensor) -> Any:
            h = s.a(x)
            return wrap(s.o(h.relu()), look(h))

        return model(how)

    full = with_hidden(lambda h: h.sum().detach() * 0)
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {"a": (0,)} and report.exact
    assert unlike(logits(full(inputs())), logits(small(inputs()))) < 1e-12
    with pytest.raises(StudyError, match="other outputs"):
        shrink(with_hidden(lambda h: h.argmax(-1)), EXAMPLE)
    with pytest.raises(StudyError, match="other outputs: they differ by inf"):
        shrink(with_hidden(Tensor.detach), EXAMPLE)


def test_as_many_tensors_are_asked_for_as_the_full_model_gives():
    def one_by_one(s: Through, x: Tensor) -> Any:
        h = s.a(x)
        return s.o(h.relu()), *reversed(h.detach().unbind(-1))    # so that the missing one is the last

    with pytest.raises(StudyError, match="other outputs: they differ by inf"):
        shrink(model(one_by_one), EXAMPLE)
    one, two = [EXAMPLE], [EXAMPLE, EXAMPLE]
    assert same(two, two) and not same(one, two) and not same(two, one)
    assert difference(two, two) == 0 and difference(one, two) == difference(two, one) == float("inf")


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_given_out_beside_the_last_layer_stays(first: int):
    full = model(lambda s, x: (lambda h: (s.o(h), h)[:: -1 if first else 1])(s.a(x).relu()))
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {} and "1 zero unit stays: it is the model's output" in report.kept["a"]
    assert all(torch.equal(a, b) for a, b in zip(full(inputs()), small(inputs()), strict=True))


def test_a_number_as_the_output():
    full = model(lambda s, x: (plain(s, x) + x[:, :2]).mean())
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {"a": (0,)} and unlike(full(inputs()), small(inputs())) < 1e-14
    with torch.no_grad():
        full.a.weight.zero_()
    small, report = shrink(full, EXAMPLE)
    assert report.units == {"a": (6, 1)} and unlike(full(inputs()), small(inputs())) < 1e-14
    silent = model(lambda s, x: plain(s, x).mean())
    with torch.no_grad():
        silent.a.weight.zero_()
    with pytest.raises(StudyError, match="no longer depends on the input"):
        shrink(silent, EXAMPLE)


def test_outputs_with_which_nothing_can_be_compared_are_refused():
    for how, said in (
        (lambda s, x: None, "no tensor in it"),
        (lambda s, x: torch.distributions.Normal(plain(s, x), 1.0), "no tensor in it"),
        (lambda s, x: plain(s, x) / 0 * 0, "no finite number in it"),
        (lambda s, x: plain(s, x).detach(), "no output of the model has a gradient"),
        (torch.no_grad()(plain), "no output of the model has a gradient"),
    ):
        with pytest.raises(StudyError, match=said):
            shrink(model(how), EXAMPLE)


def test_a_cache_does_not_keep_torch_pruning_from_its_end():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    full = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    small, report = shrink(full, torch.arange(10).view(2, 5))
    assert report.exact and full.config.use_cache and small.config.use_cache


# ------------------------------------------------------------------------------------------ what forward cannot do without


def test_units_whose_size_is_fixed_elsewhere_stay_and_the_others_go():
    """Behind ``a`` and ``c`` stand buffers, ``b`` is free; all three have a zero unit."""
    full = model(
        lambda s, x: s.o((s.c(s.b((s.a(x) * s.g).relu()).relu()) + s.k).relu()),
        b=nn.Linear(6, 4), c=nn.Linear(4, 6), g=torch.linspace(1, 2, 6), k=torch.linspace(1, 2, 6),
    )  # fmt: skip
    with torch.no_grad():
        full.b.weight[3], full.c.weight[2] = 0, 0
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {"b": (3,)} and set(report.kept) == {"a", "c"}
    assert all(why.startswith("1 zero unit stays: forward fails once it is gone; a buffer") for why in report.kept.values())
    assert unlike(full(inputs()), small(inputs())) < 1e-12


@pytest.mark.parametrize(
    "how",
    [lambda s, x: s.o((s.a(x) * torch.cat([x, x], -1)).relu()), lambda s, x: s.o(s.a(x).relu().view(-1, 2, 3).flatten(1))],
    ids=["input", "number"],
)
def test_units_that_meet_the_input_or_a_number_stay(how: Forward):
    full = model(how)
    with torch.no_grad():
        full.a.bias[0] = 0
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {} and "forward fails once it is gone" in report.kept["a"]
    assert torch.equal(full(inputs()), small(inputs()))
    said = r"without units 1, 2 of a the model's forward fails \(RuntimeError: .*leave these units in"
    with pytest.raises(StudyError, match=said) as caught:
        cut(full, EXAMPLE, {"a": [2, 1]})
    assert isinstance(caught.value.__cause__, RuntimeError)


class TwoSided(nn.Module):
    """Two layers of different widths, read together; the wider one first or second."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.a, self.b, self.both, self.o = nn.Linear(3, left), nn.Linear(3, right), nn.Bilinear(left, right, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.both(self.a(x).relu(), self.b(x).relu()))


@pytest.mark.parametrize(
    "full",
    [
        model(lambda s, x: s.r(s.a(x)[None])[0], r=nn.LSTM(6, 4)),
        model(lambda s, x: s.o(s.r(s.a(x)[None])[0]), r=nn.LSTM(6, 6)),
        model(lambda s, x: s.r(s.a(x)[None])[0], r=nn.GRU(6, 4)),
        model(lambda s, x: s.r(s.a(x)[None])[0], r=nn.RNN(6, 4)),
        model(lambda s, x: s.o(s.r(s.a(x), x)), r=nn.Bilinear(6, 3, 6)),
        TwoSided(6, 5),
        TwoSided(5, 6),
    ],
    ids=["LSTM", "LSTM, then linear", "GRU", "RNN", "Bilinear", "wide and narrow", "narrow and wide"],
)
def test_readers_of_other_kinds_hold_their_units(full: nn.Module):
    full = full.double()
    with torch.no_grad():
        full.a.weight[0] = 0
    small, report = shrink(full, EXAMPLE)
    assert report.removed == {} and report.kept["a"].startswith("1 zero unit stays: it ")
    assert torch.equal(full(inputs()), small(inputs()))


class Flattened(nn.Module):
    """A flattened image of 4 channels, 2×2, plus 16 features: one channel meets four of them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.l, self.o = nn.Conv2d(1, 4, 3), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (1, 4, 4))
        return self.o((self.c(x).flatten(1) + self.l(x.flatten(1))).relu())


VIEWS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, list[int]]]] = {
    "image and features": (Flattened, 16, {"c": [1], "l": [4, 5, 6, 7]}),
    "units as places": (lambda: model(lambda s, x: s.r(s.a(x).view(-1, 2, 3)), r=nn.Linear(3, 2)), 3, {"a": [0]}),
    "tokens": (lambda: model(lambda s, x: s.r(s.a(x.view(-1, 4, 3)).relu().flatten(1)), r=nn.Linear(24, 2)), 12, {"a": [0]}),
}


@pytest.mark.parametrize("case", VIEWS)
def test_units_that_a_view_mixes_with_other_axes_stay(case: str):
    made, size, zeros = VIEWS[case]
    full = made().double()
    zero(full, zeros)
    small, report = shrink(full, torch.zeros(2, size))
    assert report.removed == {} and report.kept.keys() == zeros.keys() and report.whole == {}
    assert all(re.match(r"\d zero units? stays?: between it and \w a view mixes units with", why) for why in report.kept.values())
    x = torch.randn(8, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(full(x), small(x))


def test_where_torch_pruning_fails_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch):
    torch_pruning = pytest.importorskip("torch_pruning")
    broken = TypeError("cannot add None\nat length")

    def fail(*given: Any, **named: Any) -> None:
        raise broken

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fail)
    with pytest.raises(StudyError, match=r"fails on this model \(TypeError: cannot add None\): give it the part") as caught:
        shrink(model(), EXAMPLE)
    assert caught.value.__cause__ is broken


# -------------------------------------------------------------------------------------------------- the report says what is


ZERO = re.compile(r"(\d+) zero units? stays?: .")


def depthwise() -> nn.Module:
    made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3))
    zero(made, {"0": [0, 2]})
    return made


class Gated(nn.Module):
    """``d(silu(g(x)) · u(x))``, or the sum of the two."""

    def __init__(self, product: bool, zeros: dict[str, list[int]]) -> None:
        super().__init__()
        self.g, self.u, self.d, self.product = nn.Linear(3, 12), nn.Linear(3, 12), nn.Linear(12, 4), product
        zero(self, zeros)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.silu(self.g(x)) * self.u(x) if self.product else (self.g(x) + self.u(x)).relu())


def zero(module: nn.Module, zeros: dict[str, list[int]]) -> None:
    with torch.no_grad():
        for name, units in zeros.items():
            module.get_parameter(f"{name}.weight")[units] = 0


def frozen(s: Through, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = s.a(x).relu()
    return s.o(h)


TOLD = {
    "gate": (lambda: Gated(True, {"g": [0, 1, 2]}), {"g": "3 zero units stay: u writes the same channel, and is not zero there"}),
    "one of two writers": (
        lambda: Gated(False, {"g": [0, 1, 2], "u": [2, 3]}),
        {"g": "2 zero units stay: u writes the same", "u": "1 zero unit stays: g writes the same"},
    ),
    "depthwise": (depthwise, {"0": "2 zero units stay: 1 is a grouped convolution"}),
    "without gradient": (lambda: model(frozen), {"a": "1 zero unit stays: autograd does not show who reads the layer"}),
    "buffer": (lambda: model(lambda s, x: s.o(s.a(x) * s.g), g=torch.ones(6)), {"a": "1 zero unit stays: forward fails"}),
    "whole": (lambda: Gated(True, {}), {}),
}


@pytest.mark.parametrize("case", TOLD)
def test_the_report_counts_the_zero_units_that_stay(case: str):
    """Against the smaller model's own weights: each layer with zero rows is told with their number, and no other is called zero."""
    made, kept = TOLD[case]
    full = made()
    small, report = shrink(full, torch.zeros(1, 1, 8, 8) if case == "depthwise" else EXAMPLE)
    zeros = {name: int((~m.weight.flatten(1).any(1)).sum()) for name, m in small.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    told = {name: sum(map(int, ZERO.findall(why))) for name, why in report.kept.items()}
    assert told == {name: n for name, n in zeros.items() if n}
    assert report.kept.keys() == kept.keys() and all(report.kept[name].startswith(why) for name, why in kept.items())
    assert not set(report.whole) & {name for name, n in zeros.items() if n} and all(least > 0 for _, least in report.whole.values())
    for name, why in report.kept.items():
        assert f"{name}: {why}" in str(report) and f"{name}: {len(small.get_parameter(f'{name}.weight'))} units, none" not in str(report)


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.k, self.o = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(x)
        return self.o(self.n(h).relu() + self.k(h).relu())


def test_a_gain_of_zero_is_no_zero_unit_while_another_norm_reads_the_channel():
    full = TwoNorms()
    zero(full, {"n": [0]})
    with torch.no_grad():
        full.k.weight[0] = 1e-3
    _, report = shrink(full, torch.zeros(1, 1, 8, 8))
    assert report.whole == {"c": (4, pytest.approx(1e-3))} and report.kept == {}
    zero(full, {"k": [0]})
    assert shrink(full, torch.zeros(1, 1, 8, 8))[1].removed == {"c": (0,)}


def test_a_whole_layer_that_nobody_reads_keeps_one_unit_and_says_what_it_is():
    full = model(lambda s, x: s.o(s.a(x).relu()) + x[:, :2])
    with torch.no_grad():
        full.o.weight.zero_()
        full.a.weight[0] = 1
    small, report = shrink(full, EXAMPLE)
    assert report.units == {"a": (6, 1)} and report.kept["a"] == "1 unread unit stays: a layer needs one"
    assert torch.equal(full(inputs()), small(inputs()))


# ------------------------------------------------------------------------------------------------------- what is given


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


BAD: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "shape": (model, torch.zeros(2, 5)),
    "integers": (model, torch.zeros(2, 3, dtype=torch.long)),
    "complex": (model, torch.zeros(2, 3, dtype=torch.complex64)),
    "channels": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.zeros(1, 1, 8, 8)),
    "two inputs": (Two, EXAMPLE),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [shrink, targets, lambda m, x: cut(m, x, {"a": [0]})], ids=["shrink", "targets", "cut"])
def test_an_example_that_the_model_does_not_take_is_refused_with_the_models_own_error(case: str, call: Callable[..., Any]):
    made, example = BAD[case]
    full = made().double()
    with pytest.raises(Exception) as own:
        full(example.double() if example.is_floating_point() else example)
    said = rf"does not take example_input, of shape {re.escape(str(tuple(example.shape)))} and .*{own.typename}: .*give one batch"
    with pytest.raises(StudyError, match=said) as caught:
        call(full, example)
    assert type(caught.value.__cause__) is own.type and str(caught.value.__cause__) == str(own.value)


def test_a_model_of_one_batch_size_is_refused():
    with pytest.raises(StudyError, match=r"does not take noise in the place of example_input, of shape \(16, 3\).*takes any n"):
        shrink(model(lambda s, x: plain(s, x.view(2, 3))), EXAMPLE)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_example_is_refused(shape: tuple[int, ...]):
    with pytest.raises(StudyError, match=r"a tensor of shape .* and not empty"):
        shrink(model(), torch.zeros(shape))


@pytest.mark.parametrize("tolerance", ["a", None, True, 1j, [0.0]])
def test_a_tolerance_is_a_number(tolerance: Any):
    with pytest.raises(StudyError, match="largest L2 norm that counts as zero"):
        shrink(model(), EXAMPLE, tolerance)


def test_integers_must_differ_since_noise_does_not_take_their_place():
    """Unit 0 under a padding mask: on a batch without padding, or with nothing else, it looks constant."""
    full = model(lambda s, x: s.o(s.a(s.e(x)).relu() * (x > 0)[..., None]), e=nn.Embedding(5, 3))
    for alike in (torch.zeros(2, 4, dtype=torch.long), torch.tensor([[0, 1, 2]])):
        with pytest.raises(StudyError, match=r"torch\.int64.*are alike.*two inputs or more that differ"):
            shrink(full, alike)
    small, report = shrink(full, torch.tensor([[0, 1], [2, 0]]))
    assert report.removed == {} and report.kept["a"] == "1 zero unit stays: the value still varies where it is read"
    assert torch.equal(full(torch.arange(5)[None]), small(torch.arange(5)[None]))


# ----------------------------------------------------------------------------------------------------------------- cut


@pytest.mark.parametrize("units", [[4, 1], (1, 4), range(1, 5, 3), {1, 4}, torch.tensor([1, 4]), np.array([4, 1])], ids=repr)
def test_cut_takes_the_rows_and_columns_that_it_is_told(units: Any):
    full, rest = model(), [0, 2, 3, 5]
    small = cut(full, EXAMPLE, {"a": units})
    for part, its in ((small.a.weight, full.a.weight[rest]), (small.a.bias, full.a.bias[rest]), (small.o.weight, full.o.weight[:, rest])):
        assert torch.equal(part, its)
    assert torch.equal(small.o.bias, full.o.bias)


@pytest.mark.parametrize(
    "units",
    [[6], [-1], [1.0], [1, 1], [0, 1, 2, 3, 4, 5], 3, None, "12", [True], ["a"], [None], torch.tensor(1), torch.tensor([True, False]),
     torch.tensor([1.0])],
    ids=repr,
)  # fmt: skip
def test_cut_refuses_what_are_no_units_of_the_layer(units: Any):
    full = model()
    before = copy.deepcopy(full.state_dict())
    with pytest.raises(StudyError, match=r"the units of a are given as .*from 0 to 5, none of them twice, and not all") as caught:
        cut(full, EXAMPLE, {"a": units})
    assert repr(units) in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in full.state_dict().items())


def test_cut_refuses_what_names_no_layers():
    for units, said in ((["a"], "units is a list"), ({1: [0]}, "units of 1 cannot"), ({"o": [0]}, "layers with units to remove: a")):
        with pytest.raises(StudyError, match=said):
            cut(model(), EXAMPLE, units)  # type: ignore[arg-type]


def test_cut_takes_the_same_units_from_joined_layers():
    full = Gated(False, {})
    shapes = [p.shape for p in cut(full, EXAMPLE, {"g": [0, 5]}).parameters()]
    assert shapes == [p.shape for p in cut(full, EXAMPLE, {"u": [5, 0], "g": (0, 5)}).parameters()] and shapes[0] == (10, 3)
    with pytest.raises(StudyError, match=r"g and u are joined and lose the same units, but \[0, 1\] and \[2\] are given"):
        cut(full, EXAMPLE, {"g": [0, 1], "u": [2]})
    assert [p.shape for p in cut(full, EXAMPLE, {"g": [], "u": []}).parameters()] == [p.shape for p in full.parameters()]


def test_a_report_is_exact_below_a_millionth_and_not_without_a_number():
    for apart, exact in ((float("nan"), False), (float("inf"), False), (1e-6, False), (0.9e-6, True)):
        assert Report({}, {}, {}, (1, 1), apart).exact == exact
