"""Numbers that change with the step: ``nw.schedules.linear(3, 1, steps=1000)``. All are plain data: they compare by value and go to YAML.

A *schedule* is any callable ``step -> number``; steps count the optimizer steps since attaching, from 0. Those named here
can be written to YAML, a function of the user's own cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, TypeAlias

from normwise.errors import PolicyError, nearest

Schedule: TypeAlias = Callable[[int], float]
Varying: TypeAlias = float | Schedule
Checks: TypeAlias = Mapping[str, Callable[[Any], Any]]
MOST_STEPS = 1 << 53


# ---------------------------------------------------------------------------------------------------------- numbers


def is_number(value: object) -> bool:
    """A real number; ``True`` and ``False`` are not numbers here, since they are a slip wherever a bound is asked for."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number(value: object, what: str, *, zero: bool = False) -> float:
    """``value`` as a finite float above zero (``zero=True``: or zero); PolicyError names ``what`` otherwise."""
    allowed = "a finite number " + (">= 0" if zero else "> 0")
    if not is_number(value):
        raise PolicyError(f"{what} is {value!r}, but {what} must be {allowed}.")
    given = as_float(value)
    if not math.isfinite(given) or given < 0 or (given == 0 and not zero):
        hint = f" To set no bound, leave the rule out of the policy ({what} is required)." if given == math.inf else ""
        raise PolicyError(f"{what} is {given}, but {what} must be {allowed}.{hint}")
    return given


def as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def count(value: object, what: str, *, least: int) -> int:
    """``value`` as a whole number >= ``least`` and at most 2⁵³, beyond which floats do not count."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_STEPS:
        most = f" and <= {MOST_STEPS}" if isinstance(value, int) and value > MOST_STEPS else ""
        raise PolicyError(f"{what} is {value!r}, but {what} must be a whole number of steps >= {least}{most}.")
    return value


def varying(value: object, what: str, *, zero: bool = False) -> Varying:
    """A number as a float, or a schedule whose end points are checked like one."""
    if isinstance(value, Scheduled):
        for end in value.ends():
            number(end, f"{what} (an end point of {value.label()})", zero=zero)
        return value
    if callable(value) and not isinstance(value, type):
        return value
    if not is_number(value):
        raise PolicyError(f"{what} is {value!r}, but {what} must be a number or a schedule {tuple(sorted(SCHEDULES))}.")
    return number(value, what, zero=zero)


def at(value: Varying, step: int, what: str = "a schedule") -> float:
    """The number that holds at ``step``. A schedule that raises or gives NaN, an infinity or a negative number: PolicyError."""
    if not callable(value):
        return value
    try:
        given = value(step)
    except Exception as error:
        raise PolicyError(f"{what} failed at step {step}: {type(error).__name__}: {error}.") from error
    try:
        result = float(given)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result) or result < 0:
        raise PolicyError(f"{what} gave {given!r} at step {step}, but it must give a finite number >= 0.")
    return result


# -------------------------------------------------------------------------------------------------------- schedules


class Plain:
    """Base of schedules and radii: frozen dataclasses that compare by value and go to YAML under their ``name``."""

    name: ClassVar[str]
    _checks: ClassVar[Checks] = {}
    """What each field becomes, or why it cannot mean anything."""

    def __post_init__(self) -> None:
        for field, check in self._checks.items():
            object.__setattr__(self, field, check(getattr(self, field)))

    def to_data(self) -> Any:
        """``{name: {field: value}}``, plain types only."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {self.name: {k: v if isinstance(v, str) else to_data(v) for k, v in given.items()}}

    def label(self) -> str:
        """Short form for tables, e.g. ``quantile(10, 10000)``."""
        shown = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}({', '.join(v if isinstance(v, str) else label(v) for v in shown)})"


class Scheduled(Plain):
    """Base of the schedules that are data: a way from one number to another in ``steps``, and that number from there on."""

    steps: int

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, what = getattr(self, f.name), f"{self.name}'s {f.name}"
            checked = count(value, what, least=1) if f.name == "steps" else number(value, what, zero=True)
            object.__setattr__(self, f.name, checked)

    def __call__(self, step: int) -> float:
        (start, end), share = self.ends(), self._share(step)
        # Exact at both ends, which start + share * (end - start) is not.
        return start * (1 - share) + end * share

    def ends(self) -> tuple[float, float]:
        """The two values between which the schedule stays."""
        raise NotImplementedError

    def _share(self, step: int) -> float:
        """How much of the way is gone at ``step``, in [0, 1]."""
        return min(max(step, 0) / self.steps, 1.0)

    def label(self) -> str:
        """Short form for tables, e.g. ``linear(1 -> 0.1 in 100 steps)``."""
        first, last = self.ends()
        return f"{self.name}({first:g} -> {last:g} in {self.steps} steps)"


@dataclass(frozen=True)
class Constant(Scheduled):
    """``value`` at every step: what a plain number means.

    Args:
        value: a number >= 0.
    """

    value: float
    name: ClassVar[str] = "constant"

    def __call__(self, step: int) -> float:
        return self.value

    def ends(self) -> tuple[float, float]:
        return self.value, self.value

    def label(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Linear(Scheduled):
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``, and ``end`` from there on.

    Args:
        start, end: numbers >= 0; as a radius > 0.
        steps: optimizer steps, a whole number >= 1.
    """

    start: float
    end: float
    steps: int
    name: ClassVar[str] = "linear"

    def ends(self) -> tuple[float, float]:
        return self.start, self.end


@dataclass(frozen=True)
class Cosine(Linear):
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``steps``, and ``end`` from there on: flat at both ends.

    Loshchilov and Hutter, SGDR, 2017, without restarts. Args: as of `Linear`.
    """

    name: ClassVar[str] = "cosine"

    def _share(self, step: int) -> float:
        return (1 - math.cos(math.pi * super()._share(step))) / 2


@dataclass(frozen=True)
class Warmup(Scheduled):
    """A straight line from ``start`` at step 0 to ``value`` at step ``steps``, and ``value`` from there on.

    Args:
        value: a number >= 0; as a radius > 0.
        steps: optimizer steps, a whole number >= 1.
        start: default 0, which suits a strength. A radius cannot be 0: give ``start`` there.
    """

    value: float
    steps: int
    start: float = 0.0
    name: ClassVar[str] = "warmup"

    def ends(self) -> tuple[float, float]:
        return self.start, self.value


SCHEDULES: dict[str, type[Scheduled]] = {cls.name: cls for cls in (Constant, Linear, Cosine, Warmup)}
linear, cosine, warmup = Linear, Cosine, Warmup


# -------------------------------------------------------------------------------------------------------- plain data
def label(value: Any) -> str:
    """A radius or a strength in a few characters."""
    if value is None or is_number(value):
        return "-" if value is None else f"{value:g}"
    return str(value.label()) if hasattr(value, "label") else getattr(value, "__name__", "function")


def to_data(value: Any) -> Any:
    """A number, a schedule or a radius as plain YAML types; a user's own function: PolicyError."""
    if value is None or is_number(value):
        return value
    if isinstance(value, Plain):
        return value.to_data()
    raise PolicyError(
        f"{value!r} is a function of your own, which cannot be written to YAML: "
        f"use one of the schedules {', '.join(sorted(SCHEDULES))}, or keep this rule in Python."
    )


def one_entry(data: Mapping[Any, Any], what: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    """The key and the value of ``{name: arguments}``; PolicyError unless there is one key and it is known."""
    if len(data) != 1:
        raise PolicyError(f"{what} is a mapping of {len(data)} keys, but it must have one: {', '.join(sorted(known))}.")
    [(name, arguments)] = data.items()
    if name not in known:
        raise PolicyError(f"{what} has the unknown form {name!r}.{nearest(str(name), known)}")
    return name, arguments


def arguments_by_name(names: Sequence[str], arguments: Any, what: str) -> dict[str, Any]:
    """Arguments in data, by their names; PolicyError for a name that is unknown and for too many of them."""
    if not isinstance(arguments, Mapping):
        listed = [] if arguments is None else arguments if isinstance(arguments, list) else [arguments]
        if len(listed) > len(names):
            raise PolicyError(f"{what} has {len(listed)} arguments, but takes at most {len(names)}: {', '.join(names)}.")
        return dict(zip(names, listed, strict=False))
    for name in arguments:
        if name not in names:
            raise PolicyError(f"{what} has no argument {name!r}.{nearest(str(name), names)}")
    return dict(arguments)
