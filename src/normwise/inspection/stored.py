"""A tensor of a checkpoint as a place from which any of its entries can be read, without the others."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from normwise import files
from normwise.errors import DataError

REAL = torch.float64, torch.float32, torch.float16, torch.bfloat16
EIGHT_BITS = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz


class Stored(ABC):
    """A tensor that can be read in parts.

    Args:
        name: as the checkpoint has it, without the traces of wrappers.
        shape: of the tensor.
        dtype: of its entries.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, tuple(int(n) for n in shape), dtype

    @property
    def count(self) -> int:
        """How many entries there are."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """How many bytes they take."""
        return self.count * self.dtype.itemsize

    @abstractmethod
    def fetch(self, first: int, count: int, into: Tensor | None = None) -> Tensor:
        """Entries in the order of the tensor's axes, ``(count,)``, in the stored dtype. into: bytes that may be overwritten with them."""

    def whole(self) -> Tensor:
        """All of it, in its shape."""
        return self.fetch(0, self.count).view(self.shape)

    def ahead(self) -> None:    # noqa: B027 - most need nothing
        """Tells the system that it will be read next."""


class File:
    """A file from which bytes are read at any place, by several threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = os.stat(path).st_size

    @cached_property
    def _handle(self) -> int:
        with files.opened(self.path, "a checkpoint") as file:
            return os.dup(file.fileno())

    def read_into(self, buffer: memoryview, at: int) -> None:
        """Fills the buffer. DataError where the file ends before: it has become shorter since it was opened."""
        while len(buffer):
            try:
                got = os.preadv(self._handle, [buffer], at)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from error
            if not got:
                raise DataError(f"{self.path}: ends at byte {at}, in the middle of a tensor; the checkpoint is damaged or being written.")
            buffer, at = buffer[got:], at + got

    def ahead(self, at: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._handle, at, length, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if "_handle" in self.__dict__:
            os.close(self._handle)


class InFile(Stored):
    """A tensor whose entries lie one after the other in a file, from byte ``at`` on."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, file: File, at: int) -> None:
        super().__init__(name, shape, dtype)
        self.file, self.at = file, at
        end = at + self.size
        if end > file.size:
            raise DataError(f"{file.path}: {name} ends at byte {end}, but the file has {file.size}; it is cut off.")

    def fetch(self, first: int, count: int, into: Tensor | None = None) -> Tensor:
        size = count * self.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
        self.file.read_into(memoryview(cast(Any, buffer.numpy())), self.at + first * self.dtype.itemsize)
        return buffer.view(self.dtype)

    def ahead(self) -> None:
        self.file.ahead(self.at, self.size)


class Loaded(Stored):
    """A tensor that must be loaded as a whole: it is in pieces, or its entries lie in another order. The last one is kept."""

    _last: tuple[Loaded, Tensor] | None = None

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, load: Callable[[], Tensor]) -> None:
        super().__init__(name, shape, dtype)
        self._load = load

    def fetch(self, first: int, count: int, into: Tensor | None = None) -> Tensor:
        last = Loaded._last
        if last is None or last[0] is not self:
            del last
            Loaded._last = None    # before the next one is loaded, or there would be two
            last = Loaded._last = self, self._load().contiguous()
        return last[1].view(-1)[first : first + count]

    def whole(self) -> Tensor:
        return self.fetch(0, self.count).view(self.shape)
