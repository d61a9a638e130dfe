"""The kernels in C against float64 and torch's own calls, and what becomes of them where they cannot be built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.norms import native

with_kernels = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
AXES = [(1, 7, 3), (1, 5, 1000), (1, 3, 513), (40, 3000, 1), (7, 33, 1), (5, 6, 7), (1, 1, 200_000), (300, 129, 1), (70, 4100, 1)]
SCALES = (1e-44, 1e-42, 1e-25, 1.0, 1e18, 1e36)
EPS = 2.0**-23


def made(axes: tuple[int, int, int], scale: float) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(axes) * scale for _ in range(3)]


def workspace_for(tensors: list[torch.Tensor], axes: tuple[int, int, int] = (1, 1, 1)) -> native.Workspace:
    workspace = native.Workspace(tensors, axes)
    assert native.fit(tensors) and workspace.place(tensors)
    return workspace


def exact(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.double().square().sum((0, 2)).sqrt() for t in tensors])


@with_kernels
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_norms_are_those_of_float64(axes: tuple[int, int, int]) -> None:
    for scale in SCALES:
        tensors = made(axes, scale)
        tensors[0][:, 0] = 0    # a zero block
        tensors[1][:, 1 % axes[1]] *= 1e-30 if scale >= 1 else 1.0    # and one that is far smaller than its neighbours
        got, want = native.norms(tensors, axes), exact(tensors)
        assert got is not None and ((got - want).abs() <= EPS * want).all(), scale
        total = native.sum_of_squares(workspace_for(tensors))
        assert math.isclose(math.sqrt(total), float(want.norm()), rel_tol=EPS)


@with_kernels
@pytest.mark.parametrize("sphere", [False, True])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_blocks_are_scaled_as_in_float64(axes: tuple[int, int, int], sphere: bool) -> None:
    for scale in SCALES:
        tensors = made(axes, scale)
        before, norms = [t.double() for t in tensors], exact(tensors)
        radius = float(norms.median())
        found = native.bound_(tensors, workspace_for(tensors, axes).aim(radius, sphere))
        assert found[2]
        want = radius / norms if sphere else (radius / norms).clamp(max=1)
        factors = found[1] if len(found[1]) else torch.ones_like(norms)
        assert torch.allclose(factors, want.nan_to_num(1, 1), rtol=EPS, atol=0)
        for after, x, f in zip(tensors, before, factors.split(axes[1]), strict=True):
            wanted = x * f[:, None]
            assert ((after.double() - wanted).abs() <= 1.01 * EPS * wanted.abs() + 2.0**-149).all(), (scale, axes)


@with_kernels
def test_what_is_not_finite_stays_and_is_told() -> None:
    x = torch.ones(4, 8) * 5
    x[1, 3], x[2, 0] = math.nan, math.inf
    kept = x.clone()
    found = native.bound_([x], workspace_for([x], (1, 4, 8)).aim(1.0))
    assert not found[2]
    assert torch.equal(x[1:3].nan_to_num(9), kept[1:3].nan_to_num(9))
    assert torch.allclose(x[[0, 3]].norm(dim=1), torch.ones(2))


@with_kernels
def test_a_radius_for_each_block() -> None:
    tensors = made((1, 6, 50), 1.0)
    radii = torch.linspace(0.5, 9, 18, dtype=torch.float64)
    want = torch.minimum(exact(tensors), radii)
    native.bound_(tensors, workspace_for(tensors, (1, 6, 50)).aim(radii))
    assert torch.allclose(exact(tensors), want, rtol=2 * EPS)


@with_kernels
def test_entries_are_clamped_as_torch_does() -> None:
    tensors = [torch.randn(5000), torch.randn(70_000), torch.zeros(3)]
    tensors[0][7], tensors[0][8], tensors[0][9] = math.nan, math.inf, -math.inf
    want, versions = [t.clamp(-0.5, 0.75) for t in tensors], [t._version for t in tensors]
    workspace = workspace_for(tensors)
    assert native.clamp_(tensors, workspace, -0.5, 0.75) and workspace.factors.tolist() == [0, 0, 1]
    assert all(torch.equal(t.nan_to_num(9), w.nan_to_num(9)) for t, w in zip(tensors, want, strict=True))
    assert [t._version - v for t, v in zip(tensors, versions, strict=True)] == [1, 1, 0]
    assert not native.clamp_(tensors, workspace, -0.5, 0.75) and workspace.factors.tolist() == [1, 1, 1]


@with_kernels
def test_any_number_of_threads_gives_the_same_bits() -> None:
    given, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for axes in ((1, 1000, 1000), (1000, 1000, 1), (1, 1, 1_000_000)):
                tensors = made(axes, 1.0)
                native.bound_(tensors, workspace_for(tensors, axes).aim(30.0, sphere=True))
                native.multiply_(tensors, workspace_for(tensors), 0.3)
                results.append([*tensors, torch.tensor(native.sum_of_squares(workspace_for(tensors)))])
    finally:
        torch.set_num_threads(given)
    for once, again in zip(results[:3] * 2, results[3:], strict=True):
        assert all(map(torch.equal, once, again))


@with_kernels
def test_autograd_hears_of_what_is_written() -> None:
    w = nn.Parameter(torch.full((4, 8), 5.0))
    loss = (w * w).sum()
    with torch.no_grad():
        native.bound_([w], workspace_for([w], (1, 4, 8)).aim(1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ODD = {
    "transposed": torch.ones(4, 8).t(), "float64": torch.ones(4, 8, dtype=torch.float64), "bfloat16": torch.ones(4, 8).bfloat16(),
    "meta": torch.ones(4, 8, device="meta"), "strided": torch.ones(4, 16)[:, ::2], "sparse": torch.ones(4, 8).to_sparse(),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_does_not_fit_is_left_to_torch(odd: torch.Tensor) -> None:
    assert native.fit([torch.ones(2), nn.Parameter(torch.ones(2))]) and native.fit([])
    assert not native.fit([torch.ones(2), odd])


@with_kernels
def test_weights_whose_memory_was_given_back_are_left_alone() -> None:
    weights = [torch.ones(4, 8), torch.ones(4, 8)]
    workspace = workspace_for(weights, (1, 4, 8))
    assert workspace.place_again(weights)
    weights[1].untyped_storage().resize_(0)
    assert not workspace.place_again(weights) and native.norms(weights, (1, 4, 8)) is None


@with_kernels
def test_weights_that_lie_otherwise_at_the_same_place_are_seen() -> None:
    weight = torch.ones(8, 8)
    workspace = workspace_for([weight], (1, 8, 8))
    weight.t_()
    assert not workspace.place_again([weight])


@with_kernels
def test_they_are_built_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "normwise"))
    assert native.library.__wrapped__() is not None
    (built,) = (tmp_path / "normwise" / "kernels").iterdir()
    stamp = built.stat().st_mtime_ns
    assert native.library.__wrapped__() is not None and built.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("compiler", ["none", "broken", "switched off"])
def test_where_they_cannot_be_built_there_are_none(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "cache"))
    if compiler == "broken":
        (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv(*(("NORMWISE_KERNELS", "0") if compiler == "switched off" else ("PATH", str(tmp_path))))
    assert native.library.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))


@with_kernels
def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_CACHE", str(tmp_path / "normwise"))
    folder = native._own_folder()
    assert folder == tmp_path / "normwise" / "kernels"
    folder.chmod(0o777)
    fallback = tmp_path / "fallback"
    fallback.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(fallback))
    assert native.library.__wrapped__() is not None
    assert not list(folder.iterdir()) and not list(fallback.iterdir())    # built elsewhere, and nothing of it is left


def test_rules_end_on_the_same_weights_with_kernels_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap, a sphere, a clip and a clamp."""
    ends = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "library", lambda: None)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        rules = [nw.clip_grad_norm(0.5), nw.max_norm(0.8, params="0.weight"), nw.unit_norm(params="2.weight"), nw.clip_weight_value(0.1)]
        control = nw.attach(model, optimizer, rules)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().sum().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert sum(control.violations().values()) > 0
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-7)


@with_kernels
@pytest.mark.parametrize("shape", [(64, 64), (16, 72), (300, 10), (1, 5), (7, 1), (33, 33)], ids=str)
def test_a_matrix_is_proven_to_be_below_a_radius_where_it_is(shape: tuple[int, int]) -> None:
    """The proof turns where the largest singular value of float64 is, to a billionth."""
    torch.manual_seed(0)
    for scale in (1e-20, 1.0, 1e15):
        base = torch.randn(shape)
        tensors = [base * scale * k for k in (1, 2, 3)]
        sigma = torch.stack([torch.linalg.matrix_norm(t.double(), 2) for t in tensors])
        for i in range(3):
            assert native.exceeding(workspace_for(tensors), shape, float(sigma[i]) * (1 + 1e-9)) == list(range(i + 1, 3))
            assert native.exceeding(workspace_for(tensors), shape, float(sigma[i]) * (1 - 1e-9)) == list(range(i, 3))
    tensors[1][0, 0] = math.nan
    assert native.exceeding(workspace_for(tensors), shape, 1e30) == [1]


@with_kernels
@pytest.mark.parametrize("layer", [
    nn.Linear(20, 64), nn.Conv2d(3, 16, 5), nn.ConvTranspose2d(3, 16, 5), nn.Conv2d(4, 8, 3, groups=2), nn.Linear(64, 20).to(torch.float64),
    nn.Conv2d(3, 16, 5).to(memory_format=torch.channels_last), nn.Linear(300, 70),
], ids=lambda m: type(m).__name__)  # fmt: skip
def test_a_spectral_cap_ends_where_it_does_without_kernels(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, ends = [p.detach().clone() for p in layer.parameters()], []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "library", lambda: None)
        with torch.no_grad():
            for p, k in zip(layer.parameters(), kept, strict=True):
                p.copy_(k)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        control = nw.attach(layer, optimizer, nw.spectral_cap(0.5))
        for _ in range(2):
            for p in layer.parameters():
                p.grad = -p.detach().clone()
            optimizer.step()
        assert control.verify()
        ends.append((torch.cat([p.detach().flatten() for p in layer.parameters()]), control.violations()))
        control.remove()
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-7) and ends[0][1] == ends[1][1]


@with_kernels
def test_one_pass_tells_how_far_weights_have_moved() -> None:
    for scale in SCALES:
        tensors = made((1, 37, 41), scale)
        copies = [t + torch.randn_like(t) * scale * step for t, step in zip(tensors, (0, 1e-4, 1.0), strict=True)]
        lengths = [float(t.double().square().sum()) for t in tensors]
        changes = [float((t.double() - c.double()).square().sum()) for t, c in zip(tensors, copies, strict=True)]
        now, was = workspace_for(tensors), workspace_for(copies)
        native.squared_updates_(now, was)
        assert list(now.each) == pytest.approx(lengths, rel=2 * EPS) and list(was.each) == pytest.approx(changes, rel=1e-6), scale
        assert all(map(torch.equal, tensors, copies))


@with_kernels
@pytest.mark.parametrize("between", [None, "weights", "a gradient rule"])
def test_a_log_is_the_same_with_kernels_and_without(between: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "library", lambda: None)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        rules = [nw.max_norm(0.5), *([nw.clip_grad_norm(0.1)] if between == "a gradient rule" else [])]
        control = nw.attach(model, optimizer, rules, log=5)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 20)).square().sum().backward()
            optimizer.step()
            found.append(control.norms(history=True).flat())
            if between == "weights":
                with torch.no_grad():
                    model[0].weight.mul_(1.5)
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
