"""What ``test_cuda_kernels.py`` runs in Triton's interpreter, on CPU tensors: the kernels against float64 and torch's calls.

The interpreter cuts bf16 off where a device rounds, and its products do not know bf16: hence a whole eps, and products in fp16.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.norms import cuda_kernels, native
from normwise.norms.linalg import paths, polar

EPS = 2.0**-23
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
AXES = [(1, 7, 3), (1, 3, 301), (40, 33, 1), (5, 6, 7), (1, 1, 1300), (1, 2, 700), None]
"""Rows, columns, what lies between; blocks and a whole that several programs share."""
long = pytest.mark.long
KINDS = [(FP32, 1e-44), (FP32, 1.0), (FP32, 1e18), (FP32, 1e36), (BF16, 1.0), (FP16, 1.0)]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the device; small numbers, so that little data takes every way."""
    for name, value in {"DEVICES": ("cpu",), "TILE": 256, "LONG": 512, "SHORTEST": 256, "GRAM_FROM": 1, "GRAM_TILE": (16, 16)}.items():
        monkeypatch.setattr(cuda_kernels, name, value)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called, in their order."""
    calls: list[str] = []
    for name in ("bound_", "gram"):
        call = getattr(cuda_kernels, name)

        def counted(*args: Any, call: Any = call, name: str = name, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            calls.extend([name] if found is not None else [])
            return found

        monkeypatch.setattr(cuda_kernels, name, counted)
    return calls


def placed(tensors: list[Tensor], axes: Any, radius: float | Tensor) -> cuda_kernels.Workspace:
    workspace = cuda_kernels.Workspace(tensors, axes).aim(radius)
    assert workspace.place(tensors)
    return workspace


def exact(tensors: list[Tensor], axes: Any) -> Tensor:
    if axes is None:
        return torch.cat([t.double().flatten() for t in tensors]).norm()[None]
    return torch.cat([t.double().square().sum((0, 2)).sqrt() for t in tensors])


def made(axes: Any, dtype: torch.dtype, scale: float) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [(torch.randn(axes or (k + 1, 500 + k)) * scale).to(dtype) for k in range(2)]
    tensors[0][:, 0] = 0    # a zero block
    return tensors


FEW = [(axes, i % 2 == 1, [KINDS[i % 6]]) for i, axes in enumerate(AXES)]
EVERY = [pytest.param(axes, sphere, KINDS, marks=long) for axes in AXES for sphere in (False, True)]


@pytest.mark.parametrize(("axes", "sphere", "kinds"), [*FEW, *EVERY])
def test_blocks_are_measured_and_scaled_as_in_float64(axes: Any, sphere: bool, kinds: Any) -> None:
    for dtype, scale in kinds:
        tensors = made(axes, dtype, scale)
        before, norms, smallest = [t.double() for t in tensors], exact(tensors, axes), torch.finfo(dtype).smallest_normal
        radius = 0.7 * float(norms.max())
        got, factors = cuda_kernels.bound_(tensors, placed(tensors, axes, radius), sphere)
        want = (radius / norms if sphere else (radius / norms).clamp(max=1)).where(norms > 0, 1.0)
        assert ((got - norms).abs() <= EPS * norms).all(), (dtype, scale)
        assert torch.allclose(factors, want, rtol=EPS, atol=0), (dtype, scale)
        for after, x, f in zip(tensors, before, want.split(axes[1]) if axes else [want] * 2, strict=True):
            wanted, eps = x * (f[:, None] if axes else f), torch.finfo(dtype).eps
            assert ((after.double() - wanted).abs() <= 1.01 * eps * wanted.abs() + smallest * eps).all(), (dtype, scale)


@pytest.mark.parametrize("axes", [(1, 4, 8), (8, 4, 1), (1, 4, 600)], ids=str)
def test_what_is_not_finite_stays(axes: Any) -> None:
    x = torch.ones(axes) * 5
    units = x.transpose(0, 1)
    units[1].view(-1)[3], units[2].view(-1)[0] = math.nan, -math.inf
    kept = x.clone()
    _, factors = cuda_kernels.bound_([x], placed([x], axes, 1.0))
    assert factors[[1, 2]].tolist() == [1, 1] and (factors[[0, 3]] < 1).all()
    assert torch.equal(units[1:3].nan_to_num(9), kept.transpose(0, 1)[1:3].nan_to_num(9))


def test_all_together_empty_ones_included() -> None:
    tensors = [torch.full((300,), 3.0), torch.empty(0), torch.tensor(4.0), torch.zeros(2, 0)]
    workspace = placed(tensors, None, 1.0)
    norm, factor = cuda_kernels.bound_(tensors, workspace)
    assert math.isclose(float(norm), math.sqrt(2716)) and math.isclose(float(norm * factor), 1.0)
    tensors[0][7] = math.nan
    kept = [t.clone() for t in tensors]
    cuda_kernels.bound_(tensors, workspace)
    assert all(torch.equal(t.nan_to_num(9), k.nan_to_num(9)) for t, k in zip(tensors, kept, strict=True))


def test_a_radius_for_each_block_and_what_autograd_hears() -> None:
    tensors, radii = made((1, 6, 50), FP32, 1.0), torch.linspace(0.5, 9, 12, dtype=torch.float64)
    want, versions = torch.minimum(exact(tensors, (1, 6, 50)), radii), [t._version for t in tensors]
    cuda_kernels.bound_(tensors, placed(tensors, (1, 6, 50), radii))
    assert torch.allclose(exact(tensors, (1, 6, 50)), want, rtol=2 * EPS)
    assert all(t._version > v for t, v in zip(tensors, versions, strict=True))


ODD = {
    "transposed": torch.ones(4, 8).t(), "float64": torch.ones(4, 8).double(), "another dtype": torch.ones(4, 8).bfloat16(),
    "meta": torch.ones(4, 8, device="meta"), "strided": torch.ones(4, 16)[:, ::2], "sparse": torch.ones(4, 8).to_sparse(), "none": None,
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_does_not_fit_is_left_to_torch(odd: Any) -> None:
    assert cuda_kernels.fit([torch.ones(2), nn.Parameter(torch.ones(2))])
    assert not cuda_kernels.fit([torch.ones(2), odd])
    assert not placed([torch.ones(4, 8)], (1, 4, 8), 1.0).place([odd])


def test_a_graph_keeps_what_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [torch.ones(4, 8)], [torch.ones(4, 8)]
    workspace = placed(first, (1, 4, 8), 1.0)
    addresses = workspace.at
    with monkeypatch.context() as capture:
        capture.setattr(cuda_kernels, "captures", lambda device: True)
        assert workspace.place(first) and not workspace.place(second)
        assert not cuda_kernels.ready(torch.device("cpu"))
    assert workspace.place(second) and workspace.at is not addresses    # the graph's are not written over
    second[0].untyped_storage().resize_(0)
    assert not workspace.place(second)    # its memory was given back


@pytest.mark.parametrize("shape", [(20, 40), pytest.param((2, 17, 5), marks=long), (2, 16, 16)], ids=str)
def test_half_of_a_gram_matrix_is_enough(shape: tuple[int, ...], launched: list[str]) -> None:
    torch.manual_seed(0)
    x, base = torch.randn(shape).half(), torch.randn(*shape[:-1], shape[-2]).half()
    base = base + base.mT
    for seen in (x, x.mT.contiguous().mT):
        want = x.double() @ x.double().mT
        got, added = cuda_kernels.gram(seen), cuda_kernels.gram(seen, base, 2.0, -0.5)
        assert got is not None and added is not None and torch.equal(got, got.mT)
        assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.max()))
        assert torch.allclose(added.double(), 2 * base.double() - 0.5 * want, rtol=1e-3, atol=1e-3 * float(want.max()))
    assert launched.count("gram") == 4


def test_the_polar_factor_by_half_products(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 20)
    for at_once in (1, 2):    # matrix by matrix, and as a batch, which is how a device takes them
        monkeypatch.setattr(paths, "at_once", lambda shape, device, count=at_once: count)
        launched.clear()
        monkeypatch.setattr(cuda_kernels, "DEVICES", ("cpu",))
        got = polar(x, "polar_express", 2, FP16)
        assert len(launched) == 2 * 2 * (2 // at_once)
        monkeypatch.setattr(cuda_kernels, "DEVICES", ())
        assert torch.allclose(got, polar(x, "polar_express", 2, FP16), atol=0.01)


class Net(nn.Module):
    """Rows, columns and what lies between them, two weights of one shape, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 3, 3, bias=False), nn.ConvTranspose2d(3, 2, 2)
        self.first, self.second, self.third = nn.Linear(32, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(self.up(self.conv(x)).flatten(1))))


RULES = {
    "bounds and clip": [nw.max_norm(0.5, params="*.weight"), nw.clip_grad_norm(0.5)],
    "spheres": [nw.unit_norm(params=["conv.weight", "up.weight"]), nw.max_norm("init", params=["first.weight", "second.weight"])],
    "inputs and tensors": [nw.Rule(action="clip_norm", norm="l2", per="input", radius=0.4, params=["first.weight", "third.weight"]),
                           nw.Rule(action="clip_norm", on="grad", norm="l2", per="tensor", radius=0.1)],
    "all weights": [nw.Rule(action="normalize", norm="l2", per="global", radius=1.0)],
}  # fmt: skip


def trained(rules: Any, dtype: torch.dtype, skips: bool) -> tuple[Tensor, dict[str, int]]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    control = nw.attach(model, optimizer, rules)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 5, 5, dtype=dtype)).float().square().sum().backward()
        if skips and step == 1:    # a step that the kernels leave to torch's calls
            model.third.weight.grad = None
        optimizer.step()
    assert control.verify()
    return torch.cat([p.detach().flatten().double() for p in model.parameters()]), control.violations()


RUNS = [(name, FP32) if name == "bounds and clip" else pytest.param(name, FP32, marks=long) for name in RULES]


@pytest.mark.parametrize(("name", "dtype"), [*RUNS, pytest.param("bounds and clip", FP16, marks=long)])
def test_training_ends_where_it_does_by_torchs_calls(
    name: str, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got, violations = trained(RULES[name], dtype, True)
    assert launched.count("bound_") >= 2 and sum(violations.values()) > 0
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(cuda_kernels, "DEVICES", ())
    launched.clear()
    want, wanted = trained(RULES[name], dtype, True)
    assert not launched and violations == wanted
    assert torch.allclose(got, want, rtol=0, atol=1e-6 if dtype == FP32 else 1e-3)


@pytest.mark.parametrize("fault", ["switched off", "no triton", "does not build"])
def test_where_the_kernels_cannot_run_torch_does_it_all(fault: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise ImportError("no module named triton")

    monkeypatch.setattr(cuda_kernels, "_tried", cuda_kernels._tried.__wrapped__)
    monkeypatch.setattr(cuda_kernels, "library", cuda_kernels.library.__wrapped__)
    if fault == "switched off":
        monkeypatch.setenv("NORMWISE_KERNELS", "0")
    else:
        monkeypatch.setattr(cuda_kernels, "import_module" if fault == "no triton" else "bound_", fails)
    assert not cuda_kernels.ready(torch.device("cpu")) and cuda_kernels.gram(torch.ones(4, 4).half()) is None
    trained(RULES["bounds and clip"], FP32, False)
    assert not launched
