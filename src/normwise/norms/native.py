"""Norms and bounds of fp32 numbers on a CPU as C kernels, built once where the machine has a C compiler.

A norm is one read of the data; torch takes several calls for it, each of some microseconds, and reads large columns ten times slower than
memory gives them. ``kernels.c`` takes one call for all tensors of a shape, and brings a block to its radius while it is in the cache.
The library is built at its first use (half a second) and kept in the user's cache. Without a compiler, or with ``NORMWISE_KERNELS=0`` set,
the same is done by torch's calls; both are right to the last digits of fp32, which may differ.

Every function takes tensors that :func:`fit`, and a :class:`Room` that is ready for them, and returns None where there are no kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

SOURCE = Path(__file__).with_name("kernels.c")
SWITCH = "NORMWISE_KERNELS"
FLAGS = (["-O3", "-march=native"], ["-O3"])
"""Tried in this order: not every compiler knows its own machine."""
SMALL = 64
"""The shorter side of a matrix, above which blocked products win over plain loops."""
PATIENCE = 60
"""Seconds for the compiler."""
KINDS, FIT = {Tensor, nn.Parameter}, {(torch.float32, True)}
_ABOUT = operator.attrgetter("dtype", "is_cpu")    # mapped in C: there may be hundreds of tensors
Axes = tuple[int, int, int]
"""A tensor as (outer, units, inner): a block is all entries of one unit."""
_P, _L, _D, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_float, ctypes.c_int


# ---------------------------------------------------------------------------------------------------- building


@cache
def library() -> Any | None:
    """The kernels, built if need be; None where they are switched off, or cannot be built."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if os.environ.get(SWITCH) == "0" or compiler is None or os.name != "posix":
        return None
    folder = _folder()
    try:
        return _declared(ctypes.CDLL(str(_built(compiler, folder))))
    except (OSError, subprocess.SubprocessError):    # a full disk, a compiler that is broken: torch's calls do it all
        return None
    finally:
        if folder.parent == Path(tempfile.gettempdir()):    # what is loaded stays
            shutil.rmtree(folder, ignore_errors=True)


class _Job(ctypes.Structure):
    """As in ``kernels.c``."""

    _fields_ = (
        ("x", _P), ("sizes", _P), ("k", _L), ("outer", _L), ("units", _L), ("inner", _L), ("norms", _P), ("factors", _P), ("each", _P),
        ("changed", _P), ("radii", _P), ("radius", _D), ("sphere", _I), ("acts", _I),
    )  # fmt: skip


def _declared(found: Any) -> Any:
    found.normwise_blocks.argtypes, found.normwise_blocks.restype = [_P, _I], _L
    found.normwise_squares.argtypes, found.normwise_squares.restype = [_P, _I], _D
    found.normwise_multiply.argtypes, found.normwise_multiply.restype = [_P, _D, _I], _L
    found.normwise_moved.argtypes, found.normwise_moved.restype = [_P, _P, _I, _I], _L
    found.normwise_spectra.argtypes, found.normwise_spectra.restype = [_P, _L, _L, _D], _L
    found.normwise_clamp.argtypes, found.normwise_clamp.restype = [_P, _F, _F, _I], _L
    return found


def _folder() -> Path:
    """A folder of this user's alone: whoever can write there decides what runs here."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normwise" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owned = folder.stat()
        if owned.st_uid == os.getuid() and not owned.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="normwise-"))


def _built(compiler: str, folder: Path) -> Path:
    about = subprocess.run([compiler, "--version"], capture_output=True, timeout=PATIENCE, check=True).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), about, _machine().encode()])).hexdigest()[:16]
    target = folder / f"kernels-{key}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:    # another process may build the same at this moment
        fresh = Path(scratch) / target.name
        for flags in FLAGS:
            call = [compiler, *flags, "-std=gnu11", "-shared", "-fPIC", "-pthread", "-o", str(fresh), str(SOURCE), "-lm"]
            if subprocess.run(call, capture_output=True, timeout=PATIENCE).returncode == 0:
                fresh.replace(target)
                return target
    raise OSError(f"{compiler} does not build {SOURCE}")


def _machine() -> str:
    """What the instructions of this processor depend on: a home folder may be shared by many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.machine() + platform.processor() + platform.node()


# ---------------------------------------------------------------------------------------------------- calling


def fit(tensors: Sequence[Any]) -> bool:
    """Whether the kernels can read and write these: plain fp32 tensors on a CPU, each in one stretch of memory."""
    return set(map(type, tensors)) <= KINDS and set(map(_ABOUT, tensors)) <= FIT and all(map(Tensor.is_contiguous, tensors))


class Room:
    """Where the kernels find tensors of these shapes, and put what they find: made once for tensors that are looked at again and again.

    Args:
        like: tensors of the shapes that are given later.
        axes: how all of them are seen, where they have one shape.
    """

    def __init__(self, like: Sequence[Tensor], axes: Axes = (1, 1, 1)) -> None:
        k = self.count = len(like)
        self.at, self.each, self.changed = (_P * k)(), (_D * k)(), (_L * (k + 1))()
        self.sizes = (_L * k)(*map(Tensor.numel, like))
        self.norms = torch.empty(k * axes[1], dtype=torch.float64)
        self.factors = torch.empty_like(self.norms)
        self.nothing = self.factors[:0]
        parts = [ctypes.addressof(x) for x in (self.each, self.changed)]
        at, sizes = ctypes.addressof(self.at), ctypes.addressof(self.sizes)
        self.job = _Job(at, sizes, k, *axes, self.norms.data_ptr(), self.factors.data_ptr(), *parts, None, 0.0, 0, 0)
        self.call = ctypes.addressof(self.job)
        self._last: list[int] = []

    def aim(self, radius: float | Tensor, sphere: bool = False) -> Room:
        """At a number, or at one a block. ``sphere``: blocks below are brought there, too."""
        self._radii = radius.to(torch.float64).expand(len(self.norms)).contiguous() if isinstance(radius, Tensor) else None
        self.job.radii = None if self._radii is None else self._radii.data_ptr()
        self.job.radius = radius if self._radii is None else 0.0
        self.job.sphere, self.job.acts = sphere, 1
        return self

    def ready(self, tensors: Sequence[Tensor]) -> bool:
        """Looks where the tensors lie now, and whether the kernels can work there. Others of that shape at the same addresses are those of
        before, unless they are the gradients of another step: ask :func:`fit` for these first."""
        now = list(map(Tensor.data_ptr, tensors))
        if now == self._last:
            return all(map(Tensor.is_contiguous, tensors))
        if not fit(tensors):
            return False
        self.at[:] = now    # type: ignore[assignment]
        self._last = now
        return True


def row_norms(x: Tensor) -> Tensor | None:
    """The L2 norm of each row of a matrix."""
    return norms([x], (1, *x.shape))


def norms(tensors: Sequence[Tensor], axes: Axes) -> Tensor | None:
    """The L2 norm of each block of tensors of one shape, ``(len(tensors) · units,)`` in float64."""
    found = library()
    if found is None:
        return None
    room = Room(tensors, axes)
    room.ready(tensors)
    found.normwise_blocks(room.call, torch.get_num_threads())
    return room.norms


def bound_(tensors: Sequence[Tensor], room: Room) -> tuple[Tensor, Tensor, bool] | None:
    """Brings each block whose L2 norm is above the radius that the room aims at onto it, in place; on a sphere each block but zero.

    Returns the norms, what the blocks were multiplied by (empty where none was), and whether all norms are finite: blocks that have none
    stay as they are. Both are the room's, and overwritten by the next call.
    """
    found = library()
    if found is None:
        return None
    acted = found.normwise_blocks(room.call, torch.get_num_threads())
    if acted:
        increment_version([t for t, c in zip(tensors, room.changed, strict=False) if c])
    return room.norms, room.factors if acted else room.nothing, not room.changed[room.count]


def squares(tensors: Sequence[Tensor], room: Room | None = None) -> float | None:
    """Σ x² of tensors of any shapes, all together; ``room.each`` then has that of each."""
    found = library()
    if found is None:
        return None
    if room is None:
        room = Room(tensors)
        room.ready(tensors)
    total = found.normwise_squares(room.call, torch.get_num_threads())
    return None if total < 0 else total


def apart(room: Room, others: Room) -> list[float]:
    """Σ (x − y)² of each tensor and its counterpart. Only where there is a :func:`library`."""
    found: Any = library()
    if found.normwise_moved(room.call, others.call, 0, torch.get_num_threads()) < 0:
        raise MemoryError("no memory is left for a table of the tensors' pieces.")
    return list(others.each)


def moved_(room: Room, copies: Room) -> None:
    """``room.each`` becomes Σ x² of each tensor, ``copies.each`` that of how far it is from its copy; the copy then becomes the tensor.

    In one pass. Only where there is a :func:`library`.
    """
    found: Any = library()
    if found.normwise_moved(room.call, copies.call, 1, torch.get_num_threads()) < 0:
        raise MemoryError("no memory is left for a table of the tensors' pieces.")


def multiply_(tensors: Sequence[Tensor], room: Room, factor: float) -> bool:
    """Every tensor times one factor, in place; whether it could."""
    found = library()
    if found is None or found.normwise_multiply(room.call, factor, torch.get_num_threads()) < 0:
        return False
    increment_version(tensors)
    return True


def clamp_(tensors: Sequence[Tensor], room: Room, low: float, high: float) -> bool:
    """Brings every entry into [low, high], numbers of fp32, in place; whether any was outside. NaN stays.

    ``room.factors``, one a tensor, is then 0 for those that were changed and 1 for the others. Only where there is a :func:`library`.
    """
    found: Any = library()
    acted = found.normwise_clamp(room.call, low, high, torch.get_num_threads())
    if acted < 0:
        raise MemoryError("no memory is left for a table of the tensors' pieces.")
    if acted:
        increment_version([t for t, c in zip(tensors, room.changed, strict=False) if c])
    return acted > 0


def beyond(room: Room, shape: tuple[int, int], radius: float) -> list[int] | None:
    """Which of the tensors, as matrices of this shape, may have a singular value above ``radius``: that the others have none is proven.

    For matrices whose shorter side is at most ``SMALL``: of larger ones torch makes shorter work. None also where memory is out.
    """
    found = library()
    unproven = -1 if found is None else found.normwise_spectra(room.call, *shape, radius)
    if unproven <= 0:
        return [] if unproven == 0 else None
    return (room.factors[: room.count] == 0).nonzero().flatten().tolist()
