"""``normwise bench inspect``: norms of a checkpoint against reading it, and spectra.

A safetensors file of 2 GB is read whole by ``readinto``, in blocks of the size that ours has, and inspected without spectra, in turns. Both
find it in the system's cache, so that norms must keep up with memory's speed, not a disk's (bar: 80% of it, by the median of rounds).
A file with the shapes of GPT-2's 124M parameters is inspected with spectra in a process of its own (bars: 60 s, and a peak of memory, over
that after the imports, of the largest tensor and 200 MB). σ₁ is compared with a float64 SVD of one matrix of each shape but the largest.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.provenance import machine
from normwise.experiments.framework.timing import in_turn, seconds
from normwise.inspection import inspect
from normwise.inspection.tally import BLOCK_BYTES
from normwise.norms import native
from normwise.norms.decompose import singular_values

BARS = (
    Bar("share", sense="at least"), Bar("seconds", "seconds_bar"), Bar("over_imports_mb", "memory_bar_mb"), Bar("sigma_error", "sigma_bar"),
)  # fmt: skip
WIDTH, LAYERS, TOKENS, PLACES = 768, 12, 50257, 1024


def run(gigabytes: float = 2.0, repeats: int = 3, layers: int = LAYERS, tokens: int = TOKENS) -> dict[str, Any]:
    """Three rows: of rows as units, of columns, and of spectra."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_speed(kind, Path(folder), gigabytes, repeats) for kind in ("rows", "columns")] + [_spectra(Path(folder), layers, tokens)]
    return {"bench": "inspect", "machine": machine(), "threads": 2, "kernels": native.library() is not None, "rows": rows}


def _speed(kind: str, folder: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    """Matrices of 64 MB whose units are rows, or columns, as their biases tell."""
    torch.manual_seed(0)
    count = max(int(gigabytes * 16), 1)
    tensors = {f"h.{i}.a.weight": torch.randn(4096, 4096 if kind == "rows" else 4100) for i in range(count)}
    if kind == "columns":
        tensors |= {f"h.{i}.a.bias": torch.zeros(4100) for i in range(count)}
    path = folder / f"{kind}.safetensors"
    _save(tensors, path)
    del tensors
    turns = [lambda: seconds(lambda: _read(path)), lambda: seconds(lambda: inspect(path, spectra=False))]
    read, own = in_turn(turns, repeats, warm_up=1, threads=None)
    size = path.stat().st_size
    path.unlink()
    share = statistics.median(r / o for r, o in zip(read, own, strict=True))
    speeds = {name: size / statistics.median(taken) / 1e9 for name, taken in (("read_gb_s", read), ("norms_gb_s", own))}
    return {"case": f"norms, units are {kind}", "size_gb": size / 1e9, **speeds, "share": share, "bar": 0.8}


def _read(path: Path) -> None:
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _spectra(folder: Path, layers: int, tokens: int) -> dict[str, Any]:
    path = folder / "gpt2.safetensors"
    tensors = _gpt2(layers, tokens)
    _save(tensors, path)
    chosen = ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight", "wpe.weight"]
    truth = {name: singular_values(tensors[name].double()[None])[0] for name in chosen}
    largest = max(t.nbytes for t in tensors.values())
    done = subprocess.run([sys.executable, "-c", f"from {__name__} import measure; measure({str(path)!r})"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    found = json.loads(done.stdout)
    sigmas = [abs(found["sigma"][name] / float(s[0]) - 1) for name, s in truth.items()]
    wrong = sum(found["rank"][name] != int((s > 2**-24 * tensors[name].double().norm()).sum()) for name, s in truth.items())
    return {
        "case": "spectra, GPT-2's shapes", "entries": sum(t.numel() for t in tensors.values()),
        "seconds": found["seconds"], "seconds_bar": 60.0, "processor_seconds": found["processor"],
        "over_imports_mb": found["mb"], "memory_bar_mb": largest / 1e6 + 200,
        "sigma_error": max(sigmas), "sigma_bar": 1e-4, "wrong_ranks": wrong,
    }  # fmt: skip


def measure(path: str) -> None:
    """In a process of its own: prints seconds, peak memory over that after the imports, σ₁ and ranks."""
    native.library()
    before, started, processor = peak_resident(), time.perf_counter(), time.process_time()
    found = inspect(path)
    spent, used = time.perf_counter() - started, time.process_time() - processor
    peak = (peak_resident() - before) / 1e6
    told = {key: {r["name"]: r[key] for r in found.tensors if key in r} for key in ("sigma", "rank")}
    print(json.dumps({"seconds": spent, "processor": used, "mb": peak, **told}))


def peak_resident() -> int:
    """Of memory. Not what getrusage says, which a process takes over from the one that started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _gpt2(layers: int, tokens: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (tokens, WIDTH), "wpe.weight": (PLACES, WIDTH)}
    for i in range(layers):
        for name, m, n in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
            shapes[f"h.{i}.{name}.weight"] = (m * WIDTH, n * WIDTH)
    return {name: 0.02 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As safetensors does, whose library need not be here."""
    at, described = 0, {}
    for name, t in tensors.items():
        described[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at := at + t.nbytes]}
    head = json.dumps(described).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(memoryview(t.numpy()))    # type: ignore[arg-type]
