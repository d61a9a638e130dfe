"""A pickle read as data: what it says is to be made, and nothing is made of it.

Python's unpickler hands live classes to the program that a pickle is, and that program may set their attributes, even where it can name but
a few of them. Here a class is its name, an object is the name of what makes it with its arguments and its state, a dictionary is a list of
pairs (so that no key is ever hashed), and nothing recurses: a pickle can only describe.
"""

from __future__ import annotations

import pickletools
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
_DAMAGED = "it is cut off or damaged"


def read(data: bytes, allowed: Callable[[str, str], bool]) -> Any:
    """The pickle in ``data``. allowed(module, name): whether a class or function may be named. Raises NotInert for everything else."""
    machine = _Machine(allowed)
    try:
        for opcode, argument, at in pickletools.genops(data):
            if opcode.name != "STOP":
                if opcode.name not in _STEPS:
                    raise NotInert(f"it has the opcode {ord(opcode.code):#04x} at {at}, which no description needs")
                _STEPS[opcode.name](machine, argument)
        value = machine.pop()
    except NotInert:
        raise
    except (LookupError, ValueError) as error:
        raise NotInert(f"{_DAMAGED}: {str(error)[:200]}") from None
    if machine.stack:
        raise NotInert(_DAMAGED)
    return value


class _Machine:
    """The stack and the memo of an unpickler."""

    def __init__(self, allowed: Callable[[str, str], bool]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise NotInert(_DAMAGED)
        return value

    def above(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def several(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

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
        self.push(Global(module, name))

    def make(self) -> None:
        what, arguments = self.several(2)
        if type(what) is not Global or type(arguments) is not tuple:
            raise NotInert("it calls what is no class")
        self.push(Made(what, arguments))

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if type(made) is not Made or made.state is not None:
            raise NotInert("it sets the state of what is no new object")
        made.state = state

    def keep(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise NotInert(_DAMAGED)
        self.memo[index] = self.stack[-1]


# By their names in `pickletools`, the opcodes of protocols 2 to 5 that describe.
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),    # FRAME is only a hint
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    "MARK": lambda m, _: m.push(_MARK), "POP": lambda m, _: m.pop(),
    "NONE": lambda m, _: m.push(None), "NEWTRUE": lambda m, _: m.push(True), "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()), "TUPLE1": lambda m, _: m.push(tuple(m.several(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.several(2))), "TUPLE3": lambda m, _: m.push(tuple(m.several(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.above())),
    "EMPTY_LIST": lambda m, _: m.push([]), "APPEND": lambda m, _: m.extend([m.pop()]), "APPENDS": lambda m, _: m.extend(m.above()),
    "EMPTY_DICT": lambda m, _: m.push(Pairs()), "SETITEM": lambda m, _: m.items(m.several(2)), "SETITEMS": lambda m, _: m.items(m.above()),
    "MEMOIZE": lambda m, _: m.keep(len(m.memo)), **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.keep),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": lambda m, line: m.named(*line.split(" ", 1)), "STACK_GLOBAL": lambda m, _: m.named(*m.several(2)),
    "REDUCE": lambda m, _: m.make(), "NEWOBJ": lambda m, _: m.make(), "BUILD": lambda m, _: m.build(),
}  # fmt: skip
