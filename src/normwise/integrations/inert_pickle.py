"""A pickle read as data: what it says is to be made, and nothing is made of it.

Python's unpickler hands live classes to the program that a pickle is, and that program may set their attributes, even where it can name but
a few of them. Here a class is its name, an object is the name of what makes it with its arguments and its state, a dictionary is a list of
pairs (so that no key is ever hashed), and nothing recurses: a pickle can only describe.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Global", "Made", "NotInert", "Pairs", "read"]


class NotInert(ValueError):
    """What is no pickle, or one that does more than to describe plain data and objects of the classes allowed."""


@dataclass(frozen=True, eq=False)
class Global:
    """The name of a class or a function."""

    module: str
    name: str


@dataclass(eq=False)
class Made:
    """An object, as what makes it, the arguments, and the state that is set afterwards (None: no state)."""

    what: Global
    arguments: tuple[Any, ...]
    state: Any = None


class Pairs(list[tuple[Any, Any]]):
    """A dictionary's items."""


_MARK = object()


def read(data: bytes, allowed: Callable[[str, str], bool]) -> Any:
    """The pickle in ``data``. allowed(module, name): whether a class or function may be named. Raises NotInert for everything else."""
    try:
        return _Machine(data, allowed).run()
    except (IndexError, struct.error, KeyError, UnicodeDecodeError):
        raise NotInert("it is cut off or damaged") from None


class _Machine:
    """Protocols 2 to 5: the opcodes that describe, by their names in ``pickletools``."""

    def __init__(self, data: bytes, allowed: Callable[[str, str], bool]) -> None:
        self.data, self.at, self.allowed = data, 0, allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.data[self.at]) != 0x2E:    # STOP
            self.at += 1
            step = _STEPS.get(code)
            if step is None:
                raise NotInert(f"it has the opcode {code:#04x} at {self.at - 1}, which no description needs")
            step(self)
        self.at += 1
        value = self.stack.pop()
        if self.stack or value is _MARK:
            raise NotInert("it is cut off or damaged")
        return value

    # ------------------------------------------------------------------------------------------------------ reading

    def bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise NotInert("it is cut off or damaged")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        [value] = struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))
        return value

    def text(self, size: int) -> str:
        return self.bytes(size).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise NotInert("it is cut off or damaged")
        text = self.text(end - self.at)
        self.at += 1
        return text

    # --------------------------------------------------------------------------------------------------- the stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise NotInert("it is cut off or damaged")
        return value

    def above(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            if at == 0:
                raise NotInert("it is cut off or damaged")
            at -= 1
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def tuple(self, size: int) -> None:
        values = [self.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(values)))

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise NotInert("it adds to what is no list")
        self.stack[-1].extend(values)

    def items(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not Pairs or len(values) % 2:
            raise NotInert("it sets items of what is no dictionary")
        self.stack[-1].extend(zip(values[::2], values[1::2], strict=True))

    def named(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or not self.allowed(module, name):
            raise NotInert(f"they name {str(module)[:100]}.{str(name)[:100]}, which no checkpoint needs")
        self.stack.append(Global(module, name))

    def global_line(self) -> None:
        module = self.line()
        self.named(module, self.line())

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.named(module, name)

    def make(self) -> None:
        arguments, what = self.pop(), self.pop()
        if type(what) is not Global or type(arguments) is not tuple:
            raise NotInert("it calls what is no class")
        self.stack.append(Made(what, arguments))

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if type(made) is not Made or made.state is not None:
            raise NotInert("it sets the state of what is no new object")
        made.state = state

    def keep(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise NotInert("it is cut off or damaged")
        self.memo[index] = self.stack[-1]


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


_STEPS: dict[int, Callable[[_Machine], Any]] = {
    ord("\x80"): lambda m: m.number("B"), ord("\x95"): lambda m: m.number("Q"),    # PROTO, FRAME: only a hint
    ord("("): _push(_MARK), ord("0"): _Machine.pop,
    ord("N"): _push(None), ord("\x88"): _push(True), ord("\x89"): _push(False),
    ord("J"): lambda m: m.stack.append(m.number("i")), ord("K"): lambda m: m.stack.append(m.number("B")),
    ord("M"): lambda m: m.stack.append(m.number("H")), ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.bytes(8))[0]),
    ord("\x8a"): lambda m: m.stack.append(int.from_bytes(m.bytes(m.number("B")), "little", signed=True)),
    ord("\x8c"): lambda m: m.stack.append(m.text(m.number("B"))), ord("X"): lambda m: m.stack.append(m.text(m.number("I"))),
    ord("\x8d"): lambda m: m.stack.append(m.text(m.number("Q"))),
    ord("C"): lambda m: m.stack.append(m.bytes(m.number("B"))), ord("B"): lambda m: m.stack.append(m.bytes(m.number("I"))),
    ord(")"): _push(()), ord("\x85"): lambda m: m.tuple(1), ord("\x86"): lambda m: m.tuple(2), ord("\x87"): lambda m: m.tuple(3),
    ord("t"): lambda m: m.stack.append(tuple(m.above())),
    ord("]"): lambda m: m.stack.append([]), ord("a"): lambda m: m.extend([m.pop()]), ord("e"): lambda m: m.extend(m.above()),
    ord("}"): lambda m: m.stack.append(Pairs()), ord("u"): lambda m: m.items(m.above()),
    ord("s"): lambda m: m.items([m.pop(), m.pop()][::-1]),
    ord("\x94"): lambda m: m.keep(len(m.memo)), ord("q"): lambda m: m.keep(m.number("B")), ord("r"): lambda m: m.keep(m.number("I")),
    ord("h"): lambda m: m.stack.append(m.memo[m.number("B")]), ord("j"): lambda m: m.stack.append(m.memo[m.number("I")]),
    ord("c"): _Machine.global_line, ord("\x93"): _Machine.stack_global,
    ord("R"): _Machine.make, ord("\x81"): _Machine.make, ord("b"): _Machine.build,
}  # fmt: skip
