"""Norms and bounds of fp32 numbers on a CPU as C kernels, built once where the machine has a C compiler.

A norm is one read of the data; torch takes several calls for it, each of some microseconds, and reads large columns ten times slower than
memory gives them. ``kernels.c`` takes one call for all tensors of a shape, and brings a block to its radius while it is in the cache.
The library is built at its first use (half a second) and kept in the user's cache. Without a compiler, or with ``NORMWISE_KERNELS=0`` set,
the same is done by torch's calls; both are right to the last digits of fp32, which may differ.

``norms``, ``row_norms`` and ``squared_distances`` return None where the kernels cannot. The others ask for a :func:`library`, and for a
:class:`Workspace` in which the tensors have been placed; they raise MemoryError where a kernel gets no memory, with nothing changed.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from normwise.files import cache_folder

SOURCE = Path(__file__).with_name("kernels.c")
SWITCH = "NORMWISE_KERNELS"
FLAGS = (["-O3", "-march=native", "-fno-math-errno"], ["-O3"])
"""Tried in this order: not every compiler knows its own machine."""
SMALL = 64
"""The shorter side of a matrix, above which blocked products win over plain loops."""
LONGEST = 1 << 16
"""Entries of a row that the kernel of AdamW can bound."""
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
    try:
        with _folder() as folder:
            return _declared(ctypes.CDLL(str(_built(compiler, folder))))
    except (OSError, subprocess.SubprocessError):    # a full disk, a compiler that is broken: torch's calls do it all
        return None


class _Job(ctypes.Structure):
    """As in ``kernels.c``."""

    _fields_ = (
        ("x", _P), ("sizes", _P), ("k", _L), ("outer", _L), ("units", _L), ("inner", _L), ("norms", _P), ("factors", _P), ("each", _P),
        ("changed", _P), ("radii", _P), ("radius", _D), ("sphere", _I), ("acts", _I),
    )  # fmt: skip


class _Step(ctypes.Structure):
    """As in ``kernels.c``."""

    _fields_ = (
        ("x", _P), ("gradient", _P), ("first", _P), ("second", _P), ("count", _P), ("sizes", _P), ("k", _L), ("bounds", _P), ("place", _P),
        ("each", _P), ("apart", _P), ("rate", _D), ("beta1", _D), ("beta2", _D), ("shrink", _D), ("eps", _D), ("sign", _F),
        ("tensor", _P), ("from", _P), ("to", _P), ("sums", _P), ("was", _P), ("longest", _L), ("workers", _I),
    )  # fmt: skip


class _Tally(ctypes.Structure):
    """As in ``kernels.c``."""

    _fields_ = (
        ("x", _P), ("kind", _L), ("first", _L), ("count", _L), ("n", _L), ("rows", _P), ("tops", _P), ("zeros", _L), ("nonfinite", _L),
    )  # fmt: skip


def _declared(found: Any) -> Any:
    found.normwise_step.argtypes, found.normwise_step.restype = [_P, _I], _L
    found.normwise_blocks.argtypes, found.normwise_blocks.restype = [_P, _I], _L
    found.normwise_squares.argtypes, found.normwise_squares.restype = [_P, _I], _D
    found.normwise_multiply.argtypes, found.normwise_multiply.restype = [_P, _D, _I], _L
    found.normwise_moved.argtypes, found.normwise_moved.restype = [_P, _P, _I, _I], _L
    found.normwise_spectra.argtypes, found.normwise_spectra.restype = [_P, _L, _L, _D], _L
    found.normwise_clamp.argtypes, found.normwise_clamp.restype = [_P, _F, _F, _I], _L
    found.normwise_tally.argtypes, found.normwise_tally.restype = [_P], None
    return found


def _own_folder() -> Path | None:
    """In the user's cache, if nobody else can write there: who can decides what runs here."""
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owned = folder.stat()
    except (OSError, RuntimeError):    # a disk that is read only, a user without a home
        return None
    safe = owned.st_uid == os.getuid() and not owned.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if safe and os.access(folder, os.W_OK) else None


@contextmanager
def _folder() -> Iterator[Path]:
    own = _own_folder()
    if own is not None:
        yield own
    else:
        with tempfile.TemporaryDirectory(prefix="normwise-") as scratch:    # what is loaded from it stays
            yield Path(scratch)


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


class Workspace:
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
        self._aims: tuple[float, bool] | None = None

    def aim(self, radius: float | Tensor, sphere: bool = False) -> Workspace:
        """At a number, or at one a block. ``sphere``: blocks below are brought there, too."""
        if not isinstance(radius, Tensor) and (radius, sphere) == self._aims:    # at each step: writing to the job takes a microsecond
            return self
        self._aims = None if isinstance(radius, Tensor) else (radius, sphere)
        self._radii = radius.to(torch.float64).expand(len(self.norms)).contiguous() if isinstance(radius, Tensor) else None
        self.job.radii = None if self._radii is None else self._radii.data_ptr()
        self.job.radius = radius if self._radii is None else 0.0
        self.job.sphere, self.job.acts = sphere, 1
        return self

    def place(self, tensors: Sequence[Tensor]) -> bool:
        """Notes where tensors that :func:`fit` lie now; False where one has no memory, since it was given back."""
        self._last = now = list(map(Tensor.data_ptr, tensors))
        self.at[:] = now    # type: ignore[assignment]
        return all(now)

    def place_again(self, tensors: Sequence[Tensor]) -> bool:
        """As ``place``, of the tensors of the call before, as a rule's weights are: where their memory is the same, only its order is
        looked at. False where they do not fit, either."""
        if list(map(Tensor.data_ptr, tensors)) == self._last:
            return all(map(Tensor.is_contiguous, tensors))
        return fit(tensors) and self.place(tensors)


def row_norms(x: Tensor) -> Tensor | None:
    """The L2 norm of each row of a matrix; None where the kernels cannot."""
    return norms([x], (1, *x.shape))


def norms(tensors: Sequence[Tensor], axes: Axes) -> Tensor | None:
    """The L2 norm of each block of tensors of one shape, ``(len(tensors) · units,)`` in float64; None where the kernels cannot."""
    found = library()
    if found is None or not fit(tensors):    # asked first: a workspace is memory
        return None
    workspace = Workspace(tensors, axes)
    if not workspace.place(tensors):
        return None
    found.normwise_blocks(workspace.call, torch.get_num_threads())
    return workspace.norms


def bound_(tensors: Sequence[Tensor], workspace: Workspace) -> tuple[Tensor, Tensor, bool]:
    """Brings each block whose L2 norm is above the radius that the workspace aims at onto it, in place; on a sphere each block but zero.

    Returns the norms, what the blocks were multiplied by (empty where none was), and whether all norms are finite: blocks that have none
    stay as they are. Both are the workspace's, and overwritten by the next call.
    """
    acted = _kernels().normwise_blocks(workspace.call, torch.get_num_threads())
    if acted:
        increment_version([t for t, c in zip(tensors, workspace.changed, strict=False) if c])
    return left_in(workspace, acted > 0)


def left_in(workspace: Workspace, acted: bool) -> tuple[Tensor, Tensor, bool]:
    """What a kernel has left of a bound, as :func:`bound_` returns it."""
    return workspace.norms, workspace.factors if acted else workspace.nothing, not workspace.changed[workspace.count]


def sum_of_squares(workspace: Workspace) -> float:
    """Σ x² of tensors of any shapes, all together; ``workspace.each`` then has that of each."""
    return _done(_kernels().normwise_squares(workspace.call, torch.get_num_threads()))


def squared_distances(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[float] | None:
    """Σ (x − y)² of each tensor and its counterpart; None where the kernels cannot."""
    if library() is None or not (fit(tensors) and fit(others)):
        return None
    these, those = Workspace(tensors), Workspace(others)
    if not (these.place(tensors) and those.place(others)):
        return None
    _done(_kernels().normwise_moved(these.call, those.call, 0, torch.get_num_threads()))
    return list(those.each)


def squared_updates_(workspace: Workspace, copies: Workspace) -> None:
    """``workspace.each`` becomes Σ x² of each tensor, ``copies.each`` Σ (x − y)² of it and its copy y; the copy then becomes the tensor.

    In one pass.
    """
    _done(_kernels().normwise_moved(workspace.call, copies.call, 1, torch.get_num_threads()))


def multiply_(tensors: Sequence[Tensor], workspace: Workspace, factor: float) -> None:
    """Every tensor times one factor, in place."""
    _done(_kernels().normwise_multiply(workspace.call, factor, torch.get_num_threads()))
    increment_version(tensors)


def clamp_(tensors: Sequence[Tensor], workspace: Workspace, low: float, high: float) -> bool:
    """Brings every entry into [low, high], numbers of fp32, in place; whether any was outside. NaN stays.

    ``workspace.factors``, one a tensor, is then 0 for those that were changed and 1 for the others.
    """
    acted = _done(_kernels().normwise_clamp(workspace.call, low, high, torch.get_num_threads()))
    if acted:
        increment_version([t for t, c in zip(tensors, workspace.changed, strict=False) if c])
    return acted > 0


class AdamW:
    """The kernel of AdamW (Loshchilov and Hutter, 2019) for one optimizer's group, with the rows brought under their radii on the way.

    Args:
        like: parameters of any shapes, fp32 on a CPU, as those that are stepped later.
        bounds: of each, the workspace that bounds its rows and which of that workspace's tensors it is; None where none does. Rows are at
            most ``LONGEST`` long.
    """

    def __init__(self, like: Sequence[Tensor], bounds: Sequence[tuple[Workspace, int] | None]) -> None:
        k = len(like)
        self._workspaces = [b[0] for b in bounds if b is not None]    # the kernel has their addresses
        self._at = [(_P * k)() for _ in range(5)]
        self._sizes = (_L * k)(*map(Tensor.numel, like))
        self._bounds = (_P * k)(*[None if b is None else b[0].call for b in bounds])
        self._place = (_L * k)(*[0 if b is None else b[1] for b in bounds])
        self._each, self._apart = (_D * k)(), (_D * k)()
        step = self._step = _Step()
        step.x, step.gradient, step.first, step.second, step.count = [ctypes.addressof(at) for at in self._at]
        step.k = k
        step.sizes, step.bounds, step.place = [ctypes.addressof(about) for about in (self._sizes, self._bounds, self._place)]

    def step_(
        self, tensors: tuple[Sequence[Tensor], ...], measured: bool, lr: float, betas: tuple[float, float], weight_decay: float,
        eps: float, maximize: bool,
    ) -> list[tuple[float, float]]:  # fmt: skip
        """One step as ``torch._fused_adamw_`` takes it, bit for bit where that rounds as here.

        Args:
            tensors: parameters, gradients, first moments, second moments, and numbers of steps, one of each for every parameter. The first
                four lie in memory alike, whatever their order there.
            measured: whether squares are wanted.

        Returns:
            Of each parameter Σ x² afterwards, and Σ Δx²; nothing unless ``measured``.

        Raises:
            MemoryError: with nothing changed.
        """
        step = self._step
        for at, some in zip(self._at, tensors, strict=True):
            at[:] = list(map(Tensor.data_ptr, some))
        step.each, step.apart = (ctypes.addressof(self._each), ctypes.addressof(self._apart)) if measured else (None, None)
        step.rate, (step.beta1, step.beta2), step.shrink, step.eps = lr, betas, 1 - lr * weight_decay, eps
        step.sign = -1.0 if maximize else 1.0
        _done(_kernels().normwise_step(ctypes.addressof(step), torch.get_num_threads()))
        params, _, *moments = tensors
        increment_version([*params, *chain.from_iterable(moments)])
        return list(zip(self._each, self._apart, strict=True)) if measured else []


def exceeding(workspace: Workspace, shape: tuple[int, int], radius: float) -> list[int]:
    """Which of the tensors, as matrices of this shape, may have a singular value above ``radius``: that the others have none is proven.

    c² I − A Aᵀ has a Cholesky factor only if every singular value of A is below c. For matrices whose shorter side is at most ``SMALL``:
    of larger ones torch makes shorter work.
    """
    if not _done(_kernels().normwise_spectra(workspace.call, *shape, radius)):
        return []
    return (workspace.factors[: workspace.count] == 0).nonzero().flatten().tolist()


STRETCH, TALLIED = 4096, (torch.float32, torch.bfloat16, torch.float16)
"""Of :func:`tally`: the entries of which the largest is kept, and the dtypes that it knows."""


def tally(x: Tensor, first: int, n: int, rows: Tensor, tops: Tensor) -> tuple[int, int] | None:
    """Looks once at some entries of a tensor, one after the other as they lie in a file. None where the kernels cannot.

    Args:
        x: the entries, of a dtype in ``TALLIED``.
        first: the place of the first one in the tensor.
        n: how long the rows are that squares are summed over.
        rows: float64, one for each row that an entry lies in, the first one's first: Σ x² of the finite entries is added.
        tops: float32, one for each ``STRETCH`` of the entries: the largest finite |x|.

    Returns:
        How many entries are zero, and how many are not finite.
    """
    found = library()
    if found is None or x.dtype not in TALLIED:
        return None
    given = _Tally(x.data_ptr(), TALLIED.index(x.dtype), first, x.numel(), n, rows.data_ptr(), tops.data_ptr(), 0, 0)
    found.normwise_tally(ctypes.addressof(given))
    return given.zeros, given.nonfinite


def _kernels() -> Any:
    found = library()
    assert found is not None, "ask library() first"
    return found


def _done(found: float) -> float:
    if found < 0:
        raise MemoryError("no memory is left for a kernel's table of pieces, or for its copy of a matrix.")
    return found
