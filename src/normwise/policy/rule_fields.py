"""The fields of a rule, one by one: what each accepts, what it becomes, and its plain form in YAML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from torch import Tensor

from normwise.errors import NormError, PolicyError, nearest
from normwise.low_precision import ROUNDINGS
from normwise.norms import FORMS, NORMS, SETS, Box, Norm, Set, get_norm
from normwise.parameters import selectors
from normwise.parameters.layouts import Heads, Layout
from normwise.parameters.selectors import Selector
from normwise.policy import radii, schedules

Given = TypeVar("Given")
Kept = TypeVar("Kept")

NormLike: TypeAlias = str | Norm | Set
LONGEST_NAME = 100
RadiusLike: TypeAlias = radii.Radius | str | None


class FieldError(PolicyError):
    """A PolicyError that knows which field of the rule it is about, so that a YAML file can be told the line."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def _same(value: Any) -> Any:
    return value


class Field(Generic[Given, Kept]):
    """A dataclass field that is converted and checked when it is set, so that a rule holds one form of each value.

    ``to_data`` gives its plain form in YAML, ``from_data`` takes that back; without them the value is plain.
    """

    def __init__(
        self, convert: Callable[[Any], Kept], default: Given, to_data: Callable[[Any], Any] = _same, from_data: Callable[[Any], Any] = _same
    ) -> None:
        self.convert, self.default, self.to_data, self.from_data = convert, default, to_data, from_data

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, rule: None, owner: type[Any]) -> Given: ...
    @overload
    def __get__(self, rule: object, owner: type[Any]) -> Kept: ...
    def __get__(self, rule: object | None, owner: type[Any]) -> Given | Kept:
        # Asked of the class, as the dataclass machinery does, a descriptor tells the default.
        return self.default if rule is None else rule.__dict__[self.name]

    def __set__(self, rule: object, value: Given) -> None:
        try:
            rule.__dict__[self.name] = self.convert(value)
        except (PolicyError, NormError) as error:
            raise FieldError(str(error), self.name) from error


# -------------------------------------------------------------------------------------------------------------- norm


def convert_norm(norm: object) -> Norm | Set:
    """A name or an object as the object."""
    if not isinstance(norm, str | Norm | Set):
        raise PolicyError(f"norm is {norm!r}, but norm must be a name ({', '.join(_norm_names())}) or an object of normwise.norms.")
    if norm == Box.name:
        raise PolicyError("norm 'box' needs its two ends: norm=nw.Box(low, high), in YAML norm: {box: [low, high]}.")
    return get_norm(norm)


def _norm_names() -> list[str]:
    return [*NORMS, *FORMS, *SETS]


def norm_name(norm: Norm | Set) -> str | None:
    """The name that :func:`get_norm` takes for this object, None where it has none."""
    named = (name for name in _norm_names() if name != Box.name and get_norm(name) == norm)
    return next(named, None)


def norm_label(norm: Norm | Set) -> str:
    """For tables and messages: ``l2``, ``box(-1, 1)``."""
    if isinstance(norm, Box):
        return f"box({norm.low:g}, {norm.high:g})"
    return norm_name(norm) or repr(norm)


def norm_to_data(norm: Norm | Set) -> Any:
    """``"l2"``, or ``{"box": [low, high]}``; a norm of the user's own has no YAML form: PolicyError."""
    if isinstance(norm, Box):
        return {Box.name: [float(norm.low), float(norm.high)]}
    name = norm_name(norm)
    if name is None:
        raise PolicyError(f"{norm!r} cannot be written to YAML, which knows {', '.join(_norm_names())}: keep this rule in Python.")
    return name


def norm_from_data(data: Any) -> Any:
    """The inverse of :func:`norm_to_data`; ``{box: {low: -1, high: 1}}`` is taken as well."""
    if not isinstance(data, Mapping):
        return data
    _, arguments = schedules.one_entry(data, "norm", {Box.name: Box})
    given = schedules.arguments_by_name(["low", "high"], arguments, "norm's box")
    if set(given) != {"low", "high"} or not all(schedules.is_number(end) for end in given.values()):
        raise PolicyError(f"norm's box has {given!r}, but it needs two numbers: {{box: [low, high]}}.")
    return Box(*(schedules.as_float(given[end]) for end in ("low", "high")))


# ---------------------------------------------------------------------------------------- selectors, centres, layouts


def convert_selector(selector: Any) -> Any:
    """Checked, with lists as tuples, so that a rule can be hashed; an empty list selects nothing and is an error."""
    if selector is None:
        return None
    if isinstance(selector, list | tuple) and not selector:
        raise PolicyError("an empty list of selectors selects nothing: leave it out for the default.")
    selectors.check_selector(selector)
    return tuple(selector) if isinstance(selector, list) else selector


class Weights(Mapping[str, Tensor]):
    """Weights by parameter name, to be a center. Compared by identity: comparing tensors is no way to compare rules."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Weights({len(self)} tensors)"

    __eq__ = object.__eq__
    __hash__ = object.__hash__


CenterLike: TypeAlias = Literal["init"] | Mapping[str, Tensor] | None
Center: TypeAlias = Literal["init"] | Weights | None


def convert_center(center: Any) -> Center:
    """None, ``"init"`` or weights by name."""
    if center is None or isinstance(center, Weights):
        return center
    if isinstance(center, str) and center == "init":
        return "init"
    if isinstance(center, Mapping) and center and all(isinstance(t, Tensor) for t in center.values()):
        return Weights(center)
    raise PolicyError(f"center is {center!r}, but center must be None, 'init', or tensors by parameter name (a state_dict).")


def center_to_data(center: Center) -> Any:
    """``"init"``; tensors: PolicyError."""
    if isinstance(center, Weights):
        raise PolicyError("a center given as tensors cannot be written to YAML: use center='init', or keep this rule in Python.")
    return center


def convert_layout(layout: Any) -> Layout | None:
    """None, or a Layout stated by hand."""
    if layout is None or isinstance(layout, Layout):
        return layout
    raise PolicyError(f"layout is {layout!r}, but layout must be nw.Layout(axes, shape), e.g. nw.Layout('hoi', (8, 64, 512)).")


def layout_to_data(layout: Layout | None) -> Any:
    if layout is None:
        return None
    parts = {"parts": list(layout.parts)} if layout.parts else {}
    return {"axes": layout.axes, "shape": list(layout.shape), **parts}


def layout_from_data(data: Any) -> Any:
    """``{axes: hoi, shape: [8, 64, 512]}`` as a Layout; with ``parts: [q, k, v]``, the names of the matrices along s, where it has them."""
    if not isinstance(data, Mapping):
        return data
    given = schedules.arguments_by_name(["axes", "shape", "parts"], data, "layout")
    shape, parts = given.get("shape"), given.get("parts") or []
    if not isinstance(given.get("axes"), str) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise PolicyError(f"layout is {given!r}, but it needs its axes and its shape: {{axes: hoi, shape: [8, 64, 512]}}.")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise PolicyError(f"the parts of a layout are {parts!r}, but they are a list of names: [q, k, v].")
    return Layout(given["axes"], tuple(shape), parts=tuple(parts))


def selector_to_data(selector: Selector | None) -> Any:
    """A string or a list of strings; a function: PolicyError."""
    return None if selector is None else selectors.selector_to_data(selector)


def selector_from_data(data: Any) -> Any:
    """The inverse of :func:`selector_to_data`."""
    if data is not None and not isinstance(data, str | list):
        raise PolicyError(f"a selector is {data!r}, but it must be a string, or a list of strings.")
    return data


# ------------------------------------------------------------------------------------------------------------ numbers


def word(value: object, what: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of the words allowed; otherwise PolicyError with the nearest."""
    if not isinstance(value, str) or value not in allowed:
        raise FieldError(f"{what} is {value!r}, which is unknown.{nearest(str(value), allowed)}", what)
    return value


def optional(convert: Callable[[Any], Kept]) -> Callable[[Any], Kept | None]:
    """``convert`` that lets None pass."""
    return lambda value: None if value is None else convert(value)


def convert_strength(value: Any) -> schedules.Varying:
    return schedules.varying(value, "strength", zero=True)


def convert_rate(value: Any) -> float:
    rate = schedules.number(value, "rate")
    if rate > 1:
        raise PolicyError(f"rate is {rate:g}, but rate must be in (0, 1]: the share of the way that is gone at each step.")
    return rate


def convert_tolerance(value: Any) -> float:
    tolerance = schedules.number(value, "tolerance", zero=True)
    if tolerance and not 0.01 <= tolerance < 1:
        raise PolicyError(f"tolerance is {tolerance:g}, but tolerance must be 0 (exact) or in [0.01, 1): less is not promised.")
    return tolerance


def convert_rounding(value: Any) -> str:
    return word(value, "rounding", tuple(ROUNDINGS))


def positive(what: str) -> Callable[[Any], float]:
    return lambda value: schedules.number(value, what)


def convert_power(value: Any) -> int:
    if not schedules.is_number(value) or value not in (1, 2):
        raise PolicyError(f"power is {value!r}, but power must be 1 (the norm) or 2 (half of its square).")
    return int(value)


def steps(what: str, least: int) -> Callable[[Any], int]:
    return lambda value: schedules.count(value, what, least=least)


def convert_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > LONGEST_NAME:
        raise PolicyError(f"name is {value!r}, but name must be a text of one line, {LONGEST_NAME} characters at most.")
    return value


def heads_to_data(heads: Heads | None) -> Any:
    """A number or a list of two."""
    return list(heads) if isinstance(heads, tuple) else heads


def convert_heads(value: Any) -> Heads | None:
    """None, a number of heads, or (stacked matrices, heads); a list becomes a tuple."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if value is None:
        return None
    if not all(type(n) is int and n >= 1 for n in listed) or (isinstance(value, list | tuple) and len(listed) != 2):
        raise PolicyError(f"heads is {value!r}, but heads must be a whole number >= 1, or two of them: (stacked matrices, heads).")
    return (listed[0], listed[1]) if len(listed) == 2 else int(listed[0])


def convert_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise PolicyError(f"optional is {value!r}, but optional must be true or false.")
    return value
