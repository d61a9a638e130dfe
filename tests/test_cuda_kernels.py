"""The kernels for CUDA devices without one: what they compute in Triton's interpreter, and that they build for real devices."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

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


EVEN = ["units", "inner", "size", "m", "n", "x_batch", "x_row", "x", "base", "out"]
HINT = [["tt.divisibility", 16]]    # what Triton learns of sizes and addresses that are multiples of 16, as most are
SIGNATURES = {
    "bound_blocks": "at*i64 like*T aims*fp64 each:i32 norms*fp64 factors*fp64 units:i32 inner:i32 size:i32",
    "square_pieces": "at*i64 like*T pieces*i64 sums*fp64",
    "scale_pieces": "at*i64 like*T pieces*i64 ends*i64 sums*fp64 aims*fp64 each:i32 norms*fp64 factors*fp64",
    "gram": "x*T base*T out*T m:i32 n:i32 x_batch:i32 x_row:i32 beta:fp32 alpha:fp32",
}
ROWS = {"SPHERE": False, "ROWS": True, "ALIGNED": True, "B": 4, "K": 256}
COLUMNS = {"inner": 1, "SPHERE": True, "ROWS": False, "ALIGNED": True, "B": 32, "K": 32}
TOGETHER = {"ALIGNED": True, "K": 1024}
HALF = {"x_column": 1, "ADDS": True, "T": 128, "K": 64}
EVERY = [(name, kind, given, capability) for capability in (75, 80, 90) for kind in ("fp32", "bf16", "fp16") for name, given in [
    ("bound_blocks", ROWS), ("bound_blocks", COLUMNS), ("square_pieces", {"EXACT": False, **TOGETHER}),
    ("scale_pieces", {"SPHERE": True, **TOGETHER}), ("gram", HALF),
] if name != "gram" or (kind != "fp32" and capability > 75)]  # fmt: skip
FEW = [("bound_blocks", "bf16", ROWS, 90), ("square_pieces", "fp32", {"EXACT": False, **TOGETHER}, 90), ("gram", "bf16", HALF, 90)]


@pytest.mark.parametrize(("name", "kind", "given", "capability"), [*FEW, *(pytest.param(*one, marks=pytest.mark.long) for one in EVERY)])
def test_they_build_for_devices(
    name: str, kind: str, given: dict[str, Any], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, by the compiler that Triton brings. Memory is read 16 bytes at a time, and products are a tensor core's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(cuda_kernels.library(), name)
    words = (word.replace("*", ":*").split(":") for word in SIGNATURES[name].replace("*T", f"*{kind}").split())
    known = dict(words)
    signature = {arg: "constexpr" if arg in given else known[arg] for arg in kernel.arg_names}
    hints = {(i,): HINT for i, arg in enumerate(kernel.arg_names) if arg in EVEN and arg not in given}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(arg),): value for arg, value in given.items()}, hints)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8 if name == "gram" else 4})
    assert built.asm["cubin"] and built.asm["ptx"].count("global.v4.b32") + built.asm["ptx"].count("cp.async") > 1
    assert name != "gram" or "mma" in built.asm["ptx"]
