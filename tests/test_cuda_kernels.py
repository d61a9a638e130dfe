"""The kernels for CUDA devices without one: what they compute in Triton's interpreter, and that they build for real devices."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from normwise.norms import cuda_kernels

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASES = Path(__file__).with_name("cuda_kernel_cases.py")


@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_they_do_what_torch_does(marks: str) -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", marks, str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Driver:
    """Of a device that kernels are built for, and that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability    # Triton keeps what it built by this number

    def get_current_stream(self, device: int) -> int:
        return 0


class Building:
    """Stands for the kernels: a launch builds what it would run."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.built = kernels, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        def launch(grid: Any, *args: Any, **kwargs: Any) -> None:
            self.built[name] = getattr(self.kernels, name).warmup(*args, grid=grid, **kwargs).asm

        return Grids(launch)


@dataclass
class Grids:
    """``kernel[grid](...)``."""

    launch: Any

    def __getitem__(self, grid: Any) -> Any:
        return partial(self.launch, grid)


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Building:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = Building(cuda_kernels.library())
    trusted = dict.fromkeys(("ready", "_products_tried"), lambda device: True)
    for name, value in {"DEVICES": ("cpu",), "library": lambda: found, **trusted}.items():
        monkeypatch.setattr(cuda_kernels, name, value)
    return found


BOUNDS: dict[str, Any] = {"rows": (1, 64, 768), "columns": (768, 96, 1), "between": (64, 32, 16), "short": (1, 8, 1), "odd": (1, 1, 27),
                          "shared": (1, 2, 1 << 15), "together": None}  # fmt: skip
EVERY = [(name, sphere, dtype, capability) for name in (*BOUNDS, "gram") for sphere in (False, True)
         for dtype in (torch.float32, torch.bfloat16) for capability in (75, 80, 90)
         if name != "gram" or (dtype != torch.float32 and capability > 75)]  # fmt: skip
FEW = [("rows", False, torch.bfloat16, 90), ("gram", False, torch.bfloat16, 90)]


@pytest.mark.parametrize(("name", "sphere", "dtype", "capability"), [*FEW, *(pytest.param(*one, marks=pytest.mark.long) for one in EVERY)])
def test_they_build_for_devices(
    name: str, sphere: bool, dtype: torch.dtype, capability: int, building: Building, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launch, with the arguments that it really has, to machine code by the compiler that Triton brings; memory is read 16 bytes at a
    time where blocks are even, and products are a tensor core's."""
    monkeypatch.setattr(import_module("triton.runtime").driver, "_active", Driver(capability))
    if name == "gram":
        x = torch.ones(2, 512, 768, dtype=dtype)
        cuda_kernels.gram(x, torch.ones(2, 512, 512, dtype=dtype) if not sphere else None, 2.0, -0.5)
        assert building.built["gram"]["cubin"] and "mma" in building.built["gram"]["ptx"]
        return
    axes = BOUNDS[name]
    tensors = [torch.ones(axes or (k + 1, 301), dtype=dtype) for k in range(2)]
    workspace = cuda_kernels.Workspace(tensors, axes).aim(torch.ones(2 * axes[1]) if axes and sphere else 1.0)
    assert workspace.place(tensors)
    cuda_kernels.bound_(tensors, workspace, sphere)
    assert set(building.built) == ({"square_pieces", "scale_pieces"} if name in ("shared", "together") else {"bound_blocks"})
    assert all(one["cubin"] and ("global.v4.b32" in one["ptx"] or name in ("odd", "short")) for one in building.built.values())
