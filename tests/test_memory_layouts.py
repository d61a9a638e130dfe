"""Weights, gradients and states that lie in memory in other ways: every rule and preset equals its contiguous copy and writes nothing else.

Each test has a twin whose tensors are all contiguous. The odd one lies in a larger buffer full of guards, whose bits must stay.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.optim import PRESETS, AdamW, Muon, NormOptimizer

F64 = torch.float64
GUARD = 12345.678
STEPS = 3
Lay = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A tensor -> the same numbers lying otherwise, and the whole buffer that they lie in."""


def _within(t: Tensor, pad: tuple[int, ...], step: int = 1, turned: bool = False) -> tuple[Tensor, Tensor]:
    """``t`` in the middle of a larger buffer, every ``step``-th entry of its last axis; ``turned``: axes in reversed order in memory."""
    turned = turned and t.ndim > 1
    source = t.permute(*reversed(range(t.ndim))) if turned else t
    shape = [n + 2 * p for n, p in zip(source.shape, (*pad, *[0] * t.ndim), strict=False)]
    if shape:
        shape[-1] = shape[-1] * step + 2
    whole = torch.full([n + 1 for n in shape] or [3], GUARD, dtype=t.dtype)
    view = whole
    for axis, n in enumerate(source.shape):
        begin = (pad[axis] if axis < len(pad) else 0) + (1 if axis == t.ndim - 1 else 0)
        stride = step if axis == t.ndim - 1 else 1
        view = view.narrow(axis, begin, n * stride)
        if stride > 1:
            view = view[..., ::stride]
    if not shape:
        view = whole[1]
    view.copy_(source)
    return view.permute(*reversed(range(t.ndim))) if turned else view, whole


def _channels_last(t: Tensor) -> tuple[Tensor, Tensor]:
    moved = t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.clone()
    return moved, moved.flatten()[:0]


def _turned(t: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(reversed(range(t.ndim)))
    moved = t.permute(axes).contiguous().permute(axes)
    return moved, moved.flatten()[:0]


LAYS: dict[str, Lay] = {
    "columns of a larger tensor": lambda t: _within(t, (0,)),
    "rows and columns of a larger tensor": lambda t: _within(t, (1, 2)),
    "every second column": lambda t: _within(t, (1,), step=2),
    "transposed": _turned,
    "transposed slice": lambda t: _within(t, (1, 1), turned=True),
    "channels_last": _channels_last,
}


def some(given: dict[str, Any], *by_default: str) -> list[Any]:
    """All of them in the long run, the named ones by default."""
    return [pytest.param(v, id=k, marks=() if k in by_default else pytest.mark.long) for k, v in given.items()]


def _otherwise(t: Tensor) -> tuple[Tensor, Tensor]:
    """Each parameter in another way than the one before: ``laid`` sees to it."""
    raise NotImplementedError


every_lay = pytest.mark.parametrize("lay", some({"each otherwise": _otherwise, **LAYS}, "each otherwise"))
every_preset = pytest.mark.parametrize("preset", list(PRESETS.values()), ids=list(PRESETS))


class Net(nn.Module):
    """Matrices, stacked matrices, kernels, vectors; a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.conv = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 6, (1, 2), groups=2, bias=False)
        self.one = nn.Conv2d(4, 5, 1, bias=False)
        self.attn = nn.MultiheadAttention(8, 2)
        self.gates = nn.LSTM(4, 3)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(9, 4)
        self.same = nn.Linear(9, 4)
        self.square = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(4, 7)
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Linear(3, 0)


def net(dtype: torch.dtype = F64) -> Net:
    torch.manual_seed(0)
    made = Net().to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=F64) * 0.5 + 0.1)
    return made


def laid(model: nn.Module, lay: Lay) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model with its parameters laid otherwise, and each parameter with its buffer."""
    buffers = []
    ways = list(LAYS.values())
    for k, p in enumerate(model.parameters()):
        p.data, whole = (ways[k % len(ways)] if lay is _otherwise else lay)(p.detach().contiguous())
        buffers.append((p, whole))
    return model, buffers


def untouched(buffers: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether everything in the buffers but the parameters is as it was."""
    for p, whole in buffers:
        rest = whole.clone()
        if whole.numel():
            inside = torch.zeros(whole.shape, dtype=torch.bool)
            offset = p.storage_offset() - whole.storage_offset()
            inside.as_strided(p.shape, p.stride(), offset).fill_(True)
            rest[inside] = GUARD
        if not torch.equal(rest, torch.full_like(whole, GUARD)):
            return False
    return True


def gradient(p: Tensor, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(p.shape, generator=made, dtype=F64).to(p.dtype)


def _row(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.ndim else t


def _column(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape) if t.ndim else t


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "as the weight": lambda g: g,
    "transposed": lambda g: _turned(g)[0],
    "channels_last": lambda g: _channels_last(g)[0],
    "slice": lambda g: _within(g, (1, 2))[0],
    "expanded rows": _row,
    "expanded columns": _column,
    "expanded scalar": lambda g: g.flatten()[:1].sum().expand(g.shape),
    "negated lazily": lambda g: torch._neg_view(-g),
}
every_grad = pytest.mark.parametrize("other", some(GRADS, "expanded rows", "negated lazily"))


def give(model: nn.Module, twin: nn.Module, seed: int, other: Callable[[Tensor], Tensor] = lambda g: g) -> None:
    """Equal gradients: the twin's contiguous, the model's as ``other`` makes them, or in the parameter's own strides."""
    for k, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        g = other(gradient(q, 100 * seed + k))
        q.grad = g.resolve_neg().contiguous().clone()
        p.grad = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(g) if other is GRADS["as the weight"] else g


def close(model: nn.Module, twin: nn.Module, rtol: float = 1e-9) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol / 10, msg=lambda m, name=name: f"{name}: {m}")
        assert q.is_contiguous()


# ---------------------------------------------------------------------------------------------------------------- presets


def build(preset: Callable[..., NormOptimizer], model: nn.Module) -> NormOptimizer:
    return preset(model, lr=0.05)


@every_preset
@every_lay
def test_a_preset_steps_as_on_contiguous_copies_and_writes_nothing_else(preset: Callable[..., NormOptimizer], lay: Lay) -> None:
    (model, buffers), twin = laid(net(), lay), net()
    strides = [p.stride() for p in model.parameters()]
    a, b = build(preset, model), build(preset, twin)
    for seed in range(STEPS):
        give(model, twin, seed, GRADS["as the weight"])
        a.step()
        b.step()
        close(model, twin)
    assert untouched(buffers)
    assert [p.stride() for p in model.parameters()] == strides


@every_preset
@every_grad
def test_a_preset_reads_gradients_however_they_lie(preset: Callable[..., NormOptimizer], other: Callable[[Tensor], Tensor]) -> None:
    """Now like this and now like that, as the strides of a gradient may change from step to step."""
    model, twin = net(), net()
    a, b = build(preset, model), build(preset, twin)
    for seed, way in enumerate([other, GRADS["as the weight"], other, GRADS["transposed"]]):
        give(model, twin, seed, way)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        a.step()
        b.step()
        close(model, twin)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@every_preset
def test_channels_last_comes_in_mid_training_with_the_state_kept(preset: Callable[..., NormOptimizer]) -> None:
    model, twin = net(), net()
    a, b = build(preset, model), build(preset, twin)
    for seed in range(5):
        if seed == 2:
            model.to(memory_format=torch.channels_last)
        if seed == 4:
            model.to(memory_format=torch.contiguous_format)
        give(model, twin, seed, GRADS["as the weight"])
        a.step()
        b.step()
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last) == (2 <= seed < 4)
        close(model, twin)


def saved_and_loaded(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@every_preset
@pytest.mark.parametrize(
    ("first", "then"),
    [pytest.param(None, "channels_last", marks=pytest.mark.long), pytest.param("channels_last", None, marks=pytest.mark.long),
     ("rows and columns of a larger tensor", "transposed")],
)
def test_a_checkpoint_goes_on_in_another_memory_format(preset: Callable[..., NormOptimizer], first: str | None, then: str | None) -> None:
    twin = net()
    model = laid(net(), LAYS[first])[0] if first else net()
    a, b = build(preset, model), build(preset, twin)
    for seed in range(2):
        give(model, twin, seed, GRADS["as the weight"])
        a.step()
        b.step()
    checkpoint = saved_and_loaded({"model": model.state_dict(), "optimizer": a.state_dict()})
    resumed = laid(net(), LAYS[then])[0] if then else net()
    resumed.load_state_dict(checkpoint["model"])
    a = build(preset, resumed)
    a.load_state_dict(checkpoint["optimizer"])
    for seed in range(2, 4):
        give(resumed, twin, seed, GRADS["as the weight"])
        a.step()
        b.step()
        close(resumed, twin)


@every_lay
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_kernel_is_still_the_one_that_runs(lay: Lay, dtype: torch.dtype) -> None:
    """Bit for bit torch's fused AdamW on contiguous tensors, whatever lies beside."""
    (model, buffers), twin = laid(net(dtype), lay), net(dtype)
    ours, theirs = AdamW(model, 0.01), torch.optim.AdamW(twin.parameters(), 0.01, fused=True)
    for seed in range(STEPS):
        give(model, twin, seed, GRADS["transposed" if seed == 1 else "as the weight"])
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert untouched(buffers)


def test_the_issues_own_example() -> None:
    flat = torch.ones(4, 3)
    w = nn.Parameter(flat[:, :2])
    w.grad = torch.arange(8.0).view(4, 2)
    optimizer = AdamW([w], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(flat[:, 2], torch.ones(4))
    torch.testing.assert_close(flat[:, :2], 1 - 0.1 * torch.tensor([[0.0, 1], [1, 1], [1, 1], [1, 1]]))


@pytest.mark.parametrize("preset", [AdamW, Muon, PRESETS["Lion"]])
def test_gradients_in_another_dtype_than_the_weights(preset: Callable[..., NormOptimizer]) -> None:
    """torch lets a bf16 weight have an fp32 gradient: it is rounded to the weight's dtype."""
    model, twin = net(torch.bfloat16), net(torch.bfloat16)
    a, b = build(preset, model), build(preset, twin)
    for seed in range(STEPS):
        for k, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + k))
            p.grad_dtype = torch.float32    # type: ignore[attr-defined]
            p.grad, q.grad = g, g.bfloat16()
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@every_preset
def test_a_parameter_of_overlapping_entries_is_refused_by_name(preset: Callable[..., NormOptimizer]) -> None:
    for t in (torch.ones(1, 3).expand(4, 3), torch.ones(9).as_strided((4, 3), (1, 2))):
        model = nn.Module()
        model.inner = nn.Linear(3, 4, bias=False)
        model.inner.weight.data = t
        with pytest.raises(nw.PolicyError, match=r"inner\.weight.*overlap.*contiguous"):
            preset(model)
        with pytest.raises(nw.PolicyError, match="overlap"):
            preset([nn.Parameter(t)])
        with pytest.raises(nw.PolicyError, match=r"inner\.weight.*overlap"):
            nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), [nw.max_norm(1.0)])
    fine = nn.Parameter(torch.ones(20).as_strided((3, 4), (5, 1)))
    assert preset([fine], override=None).param_groups[0]["params"][0] is fine


# ------------------------------------------------------------------------------------------------------------------ rules

RULES: dict[str, Callable[[], Any]] = {
    "l2_penalty": lambda: nw.l2_penalty(0.1, params="*.weight"),
    "l1_penalty": lambda: nw.l1_penalty(0.1, params="*.weight"),
    "elastic_net": lambda: nw.elastic_net(0.1, 0.1),
    "weight_decay": lambda: nw.weight_decay(0.1),
    "decay_to_init": lambda: nw.decay_to_init(0.1),
    "l1_prox": lambda: nw.l1_prox(0.5),
    "group_lasso": lambda: nw.group_lasso(0.5),
    "group_lasso input": lambda: nw.group_lasso(0.5, per="input"),
    "nuclear_prox": lambda: nw.nuclear_prox(0.5),
    "max_norm": lambda: nw.max_norm(0.7),
    "max_norm input": lambda: nw.max_norm(0.7, per="input"),
    "max_norm init": lambda: nw.max_norm(0.9 * nw.init()) if hasattr(nw, "init") else nw.max_norm("init"),
    "unit_norm": lambda: nw.unit_norm(0.7),
    "min_max_norm": lambda: nw.min_max_norm(0.5, 0.8),
    "clip_weight_norm": lambda: nw.clip_weight_norm(3.0),
    "clip_weight_value": lambda: nw.clip_weight_value(0.3),
    "non_negative": lambda: nw.non_negative(),
    "l1_ball": lambda: nw.l1_ball(0.8),
    "spectral_cap": lambda: nw.spectral_cap(0.8),
    "spectral_cap tracked": lambda: nw.spectral_cap(0.8, tolerance=0.01, exclude=["empty.*"]),
    "spectral_normalize": lambda: nw.spectral_normalize(0.8),
    "clip_grad_norm": lambda: nw.clip_grad_norm(0.5),
    "clip_grad_norm per unit": lambda: nw.Rule(params="*.weight", on="grad", action="clip_norm", norm="l2", per="unit", radius=0.1),
    "project grad": lambda: nw.Rule(params="*.weight", on="grad", action="project", norm="l1", per="tensor", radius=0.1),
    "lmo grad": lambda: nw.Rule(params="role:matrix", on="grad", action="lmo", norm="spectral"),
    "lmo update": lambda: nw.Rule(params="role:matrix", on="update", action="lmo", norm="linf", per="tensor"),
    "clip update": lambda: nw.Rule(params="*.weight", on="update", action="clip_norm", norm="l2", per="unit", radius=1e-2),
    "from center": lambda: nw.Rule(params="role:matrix", action="clip_norm", norm="l2", per="unit", radius=1e-2, center="init"),
    "clip_grad_value": lambda: nw.clip_grad_value(0.1),
    "normalize_grad": lambda: nw.normalize_grad(),
    "agc": lambda: nw.agc(0.01),
    "hyperball": lambda: nw.hyperball(),
    "relative_update": lambda: nw.relative_update(),
    "radial_brake": lambda: nw.radial_brake(0.5),
    "cpr": lambda: nw.cpr(0.01),
    "autoclip": lambda: nw.autoclip(),
    "zclip": lambda: nw.zclip(),
    "orthogonal": lambda: nw.orthogonal(),
    "orthogonal_penalty": lambda: nw.orthogonal_penalty(0.1),
    "element": lambda: nw.Rule(params="role:matrix", action="clip_norm", norm="l2", per="element", radius=0.3),
    "head": lambda: nw.Rule(params="attn.in_proj_weight", action="clip_norm", norm="l2", per="head", radius=0.3),
    "global prox": lambda: nw.Rule(params="role:matrix", action="prox", norm="l2", per="global", strength=1.0),
    "global project": lambda: nw.Rule(params="role:matrix", action="project", norm="l1", per="global", radius=5.0),
}
every_rule = pytest.mark.parametrize("rule", list(RULES.values()), ids=list(RULES))


@every_rule
@every_lay
def test_a_rule_acts_as_on_contiguous_copies_and_writes_nothing_else(rule: Callable[[], Any], lay: Lay) -> None:
    (model, buffers), twin = laid(net(), lay), net()
    both = (model, twin)
    controls = [nw.attach(m, torch.optim.SGD(m.parameters(), 0.1, momentum=0.5), rule(), log=True) for m in both]
    for seed in range(STEPS):
        give(model, twin, seed, list(GRADS.values())[seed + 1])
        for c in controls:
            c.optimizers[0].step()
        close(model, twin, 1e-8)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)
    assert untouched(buffers)
    assert controls[0].violations() == controls[1].violations()
    ours, theirs = (c.norms().total for c in controls)
    assert ours == pytest.approx(theirs, rel=1e-8)
    checks = [c.verify() for c in controls]
    assert bool(checks[0]) == bool(checks[1]) and checks[0].blocks == checks[1].blocks


GRADIENT_RULES = [
    "l2_penalty", "clip_grad_norm", "clip_grad_norm per unit", "project grad", "lmo grad", "clip_grad_value", "normalize_grad", "agc",
    "autoclip", "zclip", "orthogonal_penalty",
]  # fmt: skip


@pytest.mark.parametrize("rule", GRADIENT_RULES)
@every_grad
def test_gradients_that_cannot_be_written_in_place_are_ruled_as_their_copies(rule: str, other: Callable[[Tensor], Tensor]) -> None:
    model, twin = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for m, o in zip((model, twin), optimizers, strict=True):
        nw.attach(m, o, RULES[rule](), on_nonfinite="zero")
    give(model, twin, 0, other)
    for o in optimizers:
        o.step()
    close(model, twin)


@every_grad
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm_clips_gradients_however_they_lie(other: Callable[[Tensor], Tensor], order: float) -> None:
    model, twin = net(), net()
    give(model, twin, 0, other)
    ours = nw.clip_grad_norm_(model.parameters(), 0.1, order)
    theirs = torch.nn.utils.clip_grad_norm_([q for q in twin.parameters() if q.numel()], 0.1, order)
    torch.testing.assert_close(ours, theirs)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8)    # torch divides by ‖g‖ + 1e-6
